//! What happens when a machine boots, and what a person sees of it.

use std::fs;

use crate::{
    Story,
    machine::{Machine, Parts, STATIC},
    site::{Initrd, PASSPHRASE, Site, UUID},
};

pub const STORIES: &[Story] = &[
    ("the network store opens the root", network),
    ("a directory on another disk opens the root", stick),
    ("of two sources the dead one does not delay the other", both),
    ("a dead store leaves the prompt to a person", dead_store),
    ("without an answer of DHCP a person is asked", no_dhcp),
    ("a disk that comes late is waited for", late_disk),
    ("a token of another machine is told and left to the system", foreign_token),
    ("a key that is not there is told and left to the system", no_such_key),
    ("when time is over the system asks as ever", out_of_time),
    ("a volume that is none of ours is left to the system at once", not_ours),
    ("the TPM's lockbox opens the root without a network", lockbox),
    ("in another boot state the TPM refuses and a person is asked", wrong_pcr),
    ("a TPM that is not there is waited for beside the prompt", no_tpm),
    ("dracut: a directory on another disk opens the root", dracut),
    ("dracut: a person is asked by systemd's way", dracut_person),
    ("the doctor finds what is missing and what should not be there", doctor),
];

/// The configuration of the network store.
pub const NET: &str = "[stores.net]\ntype = \"swift\"\ncloud = \"net\"\nclouds = \"clouds.yaml\"\nowner = \"net.owner.pem\"\n\
    no_escrow = true\nidentities = [\"net.owner.key\"]\n";
const STICK: &str = "[stores.stick]\ntype = \"directory\"\npath = \"/mnt/keys/stick\"\nowner = \"stick.owner.pem\"\n\
    no_escrow = true\nidentities = [\"/mnt/keys/stick.owner.key\"]\n\
    [[boot.mounts]]\ndevice = \"LABEL=keys\"\nat = \"/mnt/keys\"\ntype = \"ext4\"\n";

/// The network store, asked because the header's token says so.
fn net_initrd(site: &Site) -> Initrd {
    site.initrd("net", &format!("[boot]\nsecrets_in_image = true\n{NET}"))
}

/// Both stores, named in the configuration.
fn both_initrd(site: &Site) -> Initrd {
    let volume = format!(
        "[[boot.volumes]]\nname = \"root\"\ndevice = \"UUID={UUID}\"\nkeys = [\"{}\", \"{}\"]\n",
        site.net, site.stick
    );
    site.initrd("both", &format!("[boot]\nsecrets_in_image = true\n{volume}{NET}{STICK}"))
}

/// A machine with a network card; a command answers at the store's address.
pub fn with_network(site: &Site, initrd: &Initrd, server: &str) -> Parts {
    Parts { server: Some(server.to_owned()), append: STATIC.to_owned(), ..site.parts(initrd) }
}

/// Takes the connection, and says nothing: of all dead servers the worst.
fn silent(site: &Site) -> String {
    let script = site.file("silent");
    fs::write(&script, "#!/bin/sh\nexec sleep 600\n").unwrap();
    site.sh("chmod +x silent");
    script.display().to_string()
}

/// The root is there, opened by `by`.
#[track_caller]
fn boots(machine: &mut Machine, by: &str) -> serde_json::Value {
    machine.see("BOOTED from /dev/mapper/root");
    let record = machine.record();
    assert_eq!((&record["volumes"][0]["result"], &record["volumes"][0]["by"]), (&"attached".into(), &by.into()));
    record
}

/// cryptroot asks, is answered, and the root is there.
#[track_caller]
fn boots_by_the_system(machine: &mut Machine) -> serde_json::Value {
    machine.see("Please unlock disk root: ");
    machine.type_line(PASSPHRASE);
    machine.see("BOOTED from /dev/mapper/root");
    let record = machine.record();
    assert_ne!(record["volumes"][0]["result"], "attached", "{record}");
    record
}

fn network(site: &Site, story: &str) {
    let mut parts = with_network(site, &net_initrd(site), &site.server());
    parts.append.push_str(" guest-shows=kmsg guest-shows=network");
    let mut machine = site.start(story, &parts);
    machine.see(&format!("root is attached, by {}", site.net));
    let record = boots(&mut machine, &site.net);
    assert!(record["volumes"][0]["failures"].as_array().unwrap().is_empty(), "{record}");
    // What was said is in the kernel's log, from where the journal has it; the network is as if it had never been up.
    machine.see("KMSG");
    machine.see("root is attached, by");
    machine.see("NETWORK");
    machine.see("END");
    assert!(!machine.has_shown("10.0.2.15"), "{}", machine.shown);
}

fn stick(site: &Site, story: &str) {
    let volume = format!("[[boot.volumes]]\nname = \"root\"\ndevice = \"UUID={UUID}\"\nkeys = [\"{}\"]\n", site.stick);
    let mut parts = site.parts(&site.initrd("stick", &format!("{volume}{STICK}")));
    parts.disks.push(("stick".to_owned(), site.file("stick.img")));
    parts.append.push_str(" guest-shows=mounts");
    let mut machine = site.start(story, &parts);
    boots(&mut machine, &site.stick);
    machine.see("MOUNTS");
    machine.see("END");
    assert!(!machine.has_shown("/mnt/keys"), "{}", machine.shown);
}

fn both(site: &Site, story: &str) {
    let mut parts = with_network(site, &both_initrd(site), &silent(site));
    parts.disks.push(("stick".to_owned(), site.file("stick.img")));
    boots(&mut site.start(story, &parts), &site.stick);
}

fn dead_store(site: &Site, story: &str) {
    let mut machine = site.start(story, &with_network(site, &net_initrd(site), &silent(site)));
    machine.see("Please unlock disk root (it is being opened automatically, too): ");
    machine.type_line("wrong");
    machine.see("the passphrase does not open root");
    machine.see("Please unlock disk root (it is being opened automatically, too): ");
    machine.type_line(PASSPHRASE);
    machine.see("root is attached, by passphrase");
    boots(&mut machine, "passphrase");
    assert!(!machine.has_shown(PASSPHRASE) || !machine.shown.contains(&format!("): {PASSPHRASE}")), "no echo");
}

fn no_dhcp(site: &Site, story: &str) {
    let mut parts = site.parts(&net_initrd(site));
    // A cable that leads nowhere.
    parts.qemu =
        ["-netdev", "hubport,id=net,hubid=0", "-device", "virtio-net-pci,netdev=net,romfile="].map(Into::into).to_vec();
    let mut machine = site.start(story, &parts);
    machine.see("waiting for a route to 10.0.2.100 (");
    machine.see("waiting for a route to 10.0.2.100 (");
    machine.see("Please unlock disk root (it is being opened automatically, too): ");
    machine.type_line(PASSPHRASE);
    boots(&mut machine, "passphrase");
}

fn late_disk(site: &Site, story: &str) {
    let mut parts = with_network(site, &net_initrd(site), &site.server());
    parts.disks.clear();
    site.sh("cp --sparse=always root.img late.img");
    let mut machine = site.start(story, &parts);
    // After 1, 3, 10 and 20 seconds.
    for _ in 0..4 {
        machine.see(&format!("waiting for the disk UUID={UUID} ("));
    }
    machine.plug("root", &site.file("late.img"));
    boots(&mut machine, &site.net);
}

fn foreign_token(site: &Site, story: &str) {
    let token =
        r#"{"type":"cryptattach","keyslots":[],"store":"elsewhere","key":"3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de"}"#;
    site.sh(&format!(
        "cp --sparse=always $TREE/root.img foreign.img; printf '%s' '{token}' | cryptsetup token import --json-file - foreign.img"
    ));
    let mut parts = with_network(site, &net_initrd(site), &site.server());
    parts.disks = vec![("root".to_owned(), site.file("foreign.img"))];
    let mut machine = site.start(story, &parts);
    machine.see("root: the configuration /etc/cryptattach/cryptattach.toml has no store 'elsewhere' (it has: net)");
    let record = boots_by_the_system(&mut machine);
    assert_eq!(record["volumes"][0]["failures"][0]["reason"], 78);
}

fn no_such_key(site: &Site, story: &str) {
    let id = site.net.strip_prefix("net/").unwrap();
    site.sh(&format!("cp -r served empty; rm empty/net/{id}.jwe"));
    let server = site.server().replace("served", "empty");
    let mut machine = site.start(story, &with_network(site, &net_initrd(site), &server));
    machine.see(&format!("root: there is no key {id} in the Swift container 'net'"));
    let record = boots_by_the_system(&mut machine);
    assert_eq!(record["volumes"][0]["failures"][0]["reason"], 67);
}

fn out_of_time(site: &Site, story: &str) {
    let initrd = site.initrd("short", &format!("[boot]\nsecrets_in_image = true\ntotal_seconds = 4\n{NET}"));
    let mut machine = site.start(story, &with_network(site, &initrd, &silent(site)));
    machine.see("root; the system's own way goes on");
    let record = boots_by_the_system(&mut machine);
    assert_eq!(record["volumes"][0]["result"], "not-attached");
    assert!(record["prompt_after"].is_null(), "{record}");
}

fn not_ours(site: &Site, story: &str) {
    let mut parts = with_network(site, &net_initrd(site), &site.server());
    parts.disks = vec![("root".to_owned(), site.tree("root.img"))];
    let record = boots_by_the_system(&mut site.start(story, &parts));
    assert_eq!(record["volumes"][0]["result"], "not-ours");
}

/// PCRs 4 and 7 as this machine's firmware leaves them.
fn values(site: &Site) -> String {
    let parts = Parts {
        disks: vec![("root".to_owned(), site.tree("root.img"))],
        append: "guest-shows=pcrs".to_owned(),
        tpm: Some(site.file("tpm.blank")),
        ..site.parts(&net_initrd(site))
    };
    site.sh("mkdir -p tpm.blank");
    let mut machine = site.start("values", &parts);
    boots_by_the_system(&mut machine);
    machine.see("PCRS ");
    machine.see("\n");
    let line = machine.shown.rsplit_once("PCRS ").unwrap().1;
    line.split_once('}').unwrap().0.to_ascii_lowercase() + "}"
}

/// A machine whose root's key comes out of its lockbox, which its TPM opens in that boot state.
fn lockbox_parts(site: &Site, name: &str, values: &str) -> (Parts, String) {
    let key = site.enrol(name, values);
    let config = format!(
        "[tpm]\nsite_key = \"site.pem\"\n[lockbox]\nhost = \"vm\"\nstore = \"box\"\nidentities = [\"host.tpm.pem\"]\n\
         lifetime_hours = 100\noffline = true\n[boot]\n\
         [[boot.volumes]]\nname = \"root\"\ndevice = \"UUID={UUID}\"\nkeys = [\"{key}\"]\n{}",
        NET.replace("stores.net", "stores.box").replace("identities = [\"net.owner.key\"]\n", "")
    );
    let initrd = site.initrd(name, &config);
    assert!(!initrd.doctor.contains("unfit"), "{}\n{}", initrd.warnings, initrd.doctor);
    let parts = Parts {
        tpm: Some(site.file(&format!("{name}.tpm"))),
        append: "guest-shows=pcrs".into(),
        ..site.parts(&initrd)
    };
    (parts, key)
}

fn lockbox(site: &Site, story: &str) {
    let (parts, key) = lockbox_parts(site, "lockbox", &values(site));
    let mut machine = site.start(story, &parts);
    boots(&mut machine, &format!("{key} with the lockbox"));
    // Latched: nothing that runs later in this boot opens the lockbox again.
    machine.see("PCRS ");
    machine.see("END");
    let pcrs = machine.shown.rsplit_once("PCRS ").unwrap().1.to_owned();
    assert!(!pcrs.contains(&format!("\"15\":\"{}\"", "0".repeat(64))), "{pcrs}");
}

fn wrong_pcr(site: &Site, story: &str) {
    let other = format!("{{\"4\":\"{}\",\"7\":\"{}\"}}", "11".repeat(32), "22".repeat(32));
    let (parts, _) = lockbox_parts(site, "other-state", &other);
    let mut machine = site.start(story, &parts);
    machine.see("root: the lockbox key of 'vm' is refused");
    let record = boots_by_the_system(&mut machine);
    assert_eq!(record["volumes"][0]["failures"][0]["reason"], 79, "{record}");
}

fn no_tpm(site: &Site, story: &str) {
    let (parts, _) = lockbox_parts(site, "no-tpm", "{\"4\":\"00\"}".replace("00", &"33".repeat(32)).as_str());
    let mut machine = site.start(story, &Parts { tpm: None, ..parts });
    machine.see("waiting for the TPM /dev/tpmrm0 (");
    machine.see("Please unlock disk root (it is being opened automatically, too): ");
    machine.type_line(PASSPHRASE);
    boots(&mut machine, "passphrase");
}

fn dracut_parts(site: &Site) -> Parts {
    let volume = format!("[[boot.volumes]]\nname = \"root\"\ndevice = \"UUID={UUID}\"\nkeys = [\"{}\"]\n", site.stick);
    let initrd = site.initrd_by("dracut", "dracut", &format!("{volume}{STICK}"));
    assert!(!initrd.doctor.contains("unfit"), "{}", initrd.doctor);
    Parts { append: format!("rd.luks.name={UUID}=root rd.shell=0"), ..site.parts(&initrd) }
}

fn dracut(site: &Site, story: &str) {
    let mut parts = dracut_parts(site);
    parts.disks.push(("stick".to_owned(), site.file("stick.img")));
    boots(&mut site.start(story, &parts), &site.stick);
}

fn dracut_person(site: &Site, story: &str) {
    let mut machine = site.start(story, &dracut_parts(site));
    machine.see("waiting for the disk LABEL=keys (");
    machine.see("Please unlock disk root (it is being opened automatically, too): ");
    machine.type_line(PASSPHRASE);
    boots(&mut machine, "passphrase");
}

fn doctor(site: &Site, _: &str) {
    let well = net_initrd(site).doctor;
    assert!(well.contains("well       file /etc/cryptattach/net.owner.key") && !well.contains("unfit"), "{well}");

    let without = site.initrd("without", NET);
    assert!(without.warnings.contains("net.owner.key is not put into the initramfs"), "{}", without.warnings);
    let missing = "MISSING    file /etc/cryptattach/net.owner.key: it is a private key that any machine can use";
    assert!(without.doctor.contains(missing) && without.doctor.contains("unfit"), "{}", without.doctor);

    // Somebody's own hook copies what ours has left out.
    let hook = "#!/bin/sh\n[ \"$1\" = prereqs ] && exit 0\nmkdir -p \"$DESTDIR/etc/cryptattach\"\n\
        cp /etc/cryptattach/net.owner.key \"$DESTDIR/etc/cryptattach/\"\n";
    site.add("careless", "etc/initramfs-tools/hooks/careless", hook);
    let careless = site.initrd("careless", NET);
    let misplaced = "MISPLACED  file /etc/cryptattach/net.owner.key: it is a private key";
    assert!(careless.doctor.contains(misplaced), "{}", careless.doctor);
}
