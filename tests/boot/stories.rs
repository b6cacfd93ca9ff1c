//! What happens when a machine boots, and what a person sees of it.

use std::{fs, time::Instant};

use crate::{
    Story,
    machine::{Machine, Parts, STATIC},
    site::{Boxed, DATA, Initrd, PASSPHRASE, SPARE, Site, UUID},
};

pub const STORIES: &[Story] = &[
    ("the network store opens the root", network),
    ("a directory on another disk opens the root", stick),
    ("of three sources two are dead and the third opens the root", two_of_three),
    ("a root whose key is being rotated is opened by both keys", paused),
    ("a root whose rotation was killed in a stretch is recovered", rotation_killed),
    ("a dead store leaves the prompt to a person", dead_store),
    ("without an answer of DHCP a person is asked", no_dhcp),
    ("a disk that comes late is waited for", late_disk),
    ("a token of another machine is told and left to the system", foreign_token),
    ("a key that is not there is told and left to the system", no_such_key),
    ("when time is over the system asks as ever", out_of_time),
    ("a volume that is none of ours is left to the system at once", not_ours),
    ("the TPM's lockbox opens two volumes without a network and a person the third", lockbox),
    ("the network is faster than the lockbox, which is open and latched all the same", race),
    ("in another boot state the TPM refuses and a person is asked", wrong_pcr),
    ("a TPM that comes late is waited for beside the prompt", late_tpm),
    ("a boot that is killed leaves one prompt, and a TPM that opens no more", killed),
    ("dracut: a directory on another disk opens the root", dracut),
    ("dracut: a person is asked by systemd's way", dracut_person),
    ("dracut: the TPM's lockbox opens the root and the network store another volume", dracut_both),
    ("the doctor finds what is missing and what should not be there", doctor),
];

/// The configuration of the network store.
pub const NET: &str = "[stores.net]\ntype = \"swift\"\ncloud = \"net\"\nclouds = \"clouds.yaml\"\nowner = \"net.owner.pem\"\n\
    no_escrow = true\nidentities = [\"net.owner.key\"]\n";
pub const STICK: &str = "[stores.stick]\ntype = \"directory\"\npath = \"/mnt/keys/stick\"\nowner = \"stick.owner.pem\"\n\
    no_escrow = true\nidentities = [\"/mnt/keys/stick.owner.key\"]\n\
    [[boot.mounts]]\ndevice = \"LABEL=keys\"\nat = \"/mnt/keys\"\ntype = \"ext4\"\n";

/// The network store, asked because the header's token says so.
fn net_initrd(site: &Site) -> Initrd {
    site.initrd("net", &format!("[boot]\nsecrets_in_image = true\n{NET}"))
}

/// A volume of `[boot]`.
pub fn volume(name: &str, uuid: &str, keys: &[&str]) -> String {
    format!("[[boot.volumes]]\nname = \"{name}\"\ndevice = \"UUID={uuid}\"\nkeys = {keys:?}\n")
}

/// The network store at the second address.
fn far() -> String {
    NET.replace("stores.net", "stores.far").replace("cloud = \"net\"", "cloud = \"far\"\ncontainer = \"net\"")
}

/// A machine with a network card; a command answers at the store's address.
pub fn with_network(site: &Site, initrd: &Initrd, server: &str) -> Parts {
    Parts { servers: vec![server.to_owned()], append: STATIC.to_owned(), ..site.parts(initrd) }
}

/// Takes the connection, and says nothing: of all dead servers the worst.
pub fn silent(site: &Site) -> String {
    let script = site.file("silent");
    fs::write(&script, "#!/bin/sh\nexec cat >/dev/null\n").unwrap();
    site.sh("chmod +x silent");
    script.display().to_string()
}

/// The root is there, opened by `by`.
#[track_caller]
pub fn boots(machine: &mut Machine, by: &str) -> serde_json::Value {
    machine.see("BOOTED from /dev/mapper/root");
    let record = machine.record();
    assert_eq!((&record["volumes"][0]["result"], &record["volumes"][0]["by"]), (&"attached".into(), &by.into()));
    record
}

/// cryptroot asks, is answered, and the root is there.
#[track_caller]
pub fn boots_by_the_system(machine: &mut Machine) -> serde_json::Value {
    machine.see("Please unlock disk root: ");
    machine.type_line(PASSPHRASE);
    machine.see("BOOTED from /dev/mapper/root");
    let record = machine.record();
    assert_ne!(record["volumes"][0]["result"], "attached", "{record}");
    record
}

fn network(site: &Site, story: &str) {
    // It is just being started.
    fs::write(site.file("served/ill"), "503\n503\ndrop\ndrop\n").unwrap();
    let mut parts = with_network(site, &net_initrd(site), &site.server());
    parts.append.push_str(" guest-shows=kmsg");
    let mut machine = site.start(story, &parts);
    let unavailable = "https://10.0.2.100 answers 503 Service Unavailable; trying again for up to";
    let broken = "the connection to https://10.0.2.100/auth/v1.0 broke during the answer";
    machine.see(unavailable);
    machine.see(broken);
    machine.see(&format!("root is attached, by {}", site.net));
    for said in [unavailable, broken] {
        assert_eq!(machine.shown.matches(said).count(), 1, "once, not at each try: {}", machine.shown);
    }
    let record = boots(&mut machine, &site.net);
    assert!(record["volumes"][0]["failures"].as_array().unwrap().is_empty(), "{record}");
    // What was said is in the kernel's log, from where the journal has it.
    machine.see("KMSG");
    machine.see(unavailable);
    machine.see("root is attached, by");
}

fn stick(site: &Site, story: &str) {
    let volume = volume("root", UUID, &[&site.stick]);
    site.add("stick", "etc/initramfs-tools/scripts/local-bottom/mounted", MOUNTED);
    let mut parts = site.parts(&site.initrd("stick", &format!("{volume}{STICK}")));
    parts.disks.push(("stick".to_owned(), site.file("stick.img")));
    let mut machine = site.start(story, &parts);
    boots(&mut machine, &site.stick);
    assert!(machine.has_shown("MOUNTED ") && !machine.has_shown("/mnt/keys "), "{}", machine.shown);
}

fn two_of_three(site: &Site, story: &str) {
    let net = site.net.replace("net/", "far/");
    let volumes = volume("root", UUID, &[&site.net, &net, &site.stick]) + &volume("spare", SPARE, &[&site.net]);
    let initrd = site.initrd("three", &format!("[boot]\nsecrets_in_image = true\n{volumes}{NET}{}{STICK}", far()));
    let mut parts = with_network(site, &initrd, &silent(site));
    // Its certificate is for another address.
    parts.servers.push(site.server());
    parts.append.push_str(" guest-shows=processes");
    let mut machine = site.start(story, &parts);
    machine.see(&format!("root: {net}: cannot ask"));
    machine.see("certificate verify failed (IP address mismatch)");
    machine.see("Please unlock disk root (it is being opened automatically, too): ");
    machine.plug("stick", &site.file("stick.img"));
    let plugged = Instant::now();
    machine.see(&format!("root is attached, by {}", site.stick));
    println!("  the root was open {:.1?} after the stick was plugged in", plugged.elapsed());
    // That prompt is gone, and another volume that comes later has one of its own.
    machine.plug("spare", &site.file("spare.img"));
    machine.see("Please unlock disk spare (it is being opened automatically, too): ");
    machine.type_line(PASSPHRASE);
    let record = boots(&mut machine, &site.stick);
    // The silent store had not been given up yet: nothing waited for it.
    assert_eq!(record["volumes"][0]["failures"].as_array().unwrap().len(), 1, "{record}");
    // Nor does anything read the console that was to be taken away.
    machine.see("PROCESSES");
    machine.see("END");
    assert!(!machine.has_shown("askpass"), "{}", machine.shown);
}

/// A copy of the root disk in the middle of a rotation, and the new key: the command `how` is ended by a signal, after `wait`,
/// until the header has this mark.
fn rotating(site: &Site, name: &str, [how, wait, signal, mark]: [&str; 4]) -> String {
    let header = format!("cryptsetup luksDump --dump-json-metadata {name}.img");
    let json = site.sh(&format!(
        "cp --sparse=always root.img {name}.img
        sed 's/^state = .*/state = \"{name}.state\"/' host.toml >{name}.toml
        is_there() {{ {header} | grep -Eq '{mark}'; }}
        for i in $(seq 60); do
            $CRYPTATTACH --config {name}.toml key rotate {name}.img --drop-others --allow-shared {how} >/dev/null & pid=$!
            {wait}
            kill -{signal} $pid || true
            wait $pid || true
            ! is_there || break
        done
        {header}"
    ));
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let tokens: Vec<_> = json["tokens"].as_object().unwrap().values().collect();
    let next = &tokens[0]["next"];
    let is_killed = json.to_string().contains("in-reencryption");
    assert!(tokens.len() == 1 && is_killed == (signal == "KILL") && next.is_object(), "{json}");
    format!("{}/{}", next["store"].as_str().unwrap(), next["key"].as_str().unwrap())
}

fn boots_by_both_keys(site: &Site, story: &str, name: &str, new: &str) -> Machine {
    let mut parts = with_network(site, &net_initrd(site), &site.server());
    parts.disks = vec![("root".to_owned(), site.file(&format!("{name}.img")))];
    let mut machine = site.start(story, &parts);
    machine.see("the key of root is being rotated: its two stored keys open it together, and no passphrase does");
    boots(&mut machine, new);
    machine
}

fn paused(site: &Site, story: &str) {
    let wait = "for j in $(seq 600); do is_there && break; sleep 0.1; done";
    let new = rotating(site, "paused", ["--rate 100", wait, "TERM", "\"iv_tweak\": *\"[1-9]"]);
    boots_by_both_keys(site, story, "paused", &new);
}

fn rotation_killed(site: &Site, story: &str) {
    let new = rotating(site, "killed", ["--hotzone 8192", "sleep 0.$((i * 7 % 10))", "KILL", "in-reencryption"]);
    let machine = boots_by_both_keys(site, story, "killed", &new);
    assert!(machine.has_shown("was killed while it wrote: recovering that stretch"), "{}", machine.shown);
}

fn dead_store(site: &Site, story: &str) {
    let mut machine = site.start(story, &with_network(site, &net_initrd(site), &silent(site)));
    machine.see("Please unlock disk root (it is being opened automatically, too): ");
    // Only Enter, to see whether it is alive.
    machine.type_line("");
    machine.see("Please unlock disk root (it is being opened automatically, too): ");
    machine.type_line("wrong");
    machine.see("the passphrase does not open root");
    machine.see("Please unlock disk root (it is being opened automatically, too): ");
    machine.type_line(PASSPHRASE);
    machine.see("root is attached, by passphrase");
    let record = boots(&mut machine, "passphrase");
    let asked = record["prompt_after"].as_f64().unwrap();
    // Later by what a busy machine takes, and long before the store is given up.
    assert!((5.0..30.0).contains(&asked), "{record}");
    println!("  a person was asked after {asked:.2} s");
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
    // By DHCP: there is time for it.
    parts.append = "guest-shows=network".to_owned();
    site.sh("cp --sparse=always root.img late.img");
    let mut machine = site.start(story, &parts);
    // After 1, 3, 10 and 20 seconds.
    for _ in 0..4 {
        machine.see(&format!("waiting for the disk UUID={UUID} ("));
    }
    machine.plug("root", &site.file("late.img"));
    boots(&mut machine, &site.net);
    // The network is as if it had never been up. (With ip=, the initramfs of Ubuntu and Debian 13 has it up at its end.)
    machine.see("NETWORK");
    machine.see("END");
    assert!(!machine.has_shown("10.0.2.15"), "{}", machine.shown);
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
    machine.see("could not unlock root within 4 s");
    let record = boots_by_the_system(&mut machine);
    assert_eq!(record["volumes"][0]["result"], "not-attached");
    assert_eq!(record["volumes"][0]["failures"][0]["reason"], 69, "{record}");
    assert!(record["prompt_after"].is_null(), "{record}");
}

fn not_ours(site: &Site, story: &str) {
    let mut parts = with_network(site, &net_initrd(site), &site.server());
    parts.disks = vec![("root".to_owned(), site.tree("root.img"))];
    let record = boots_by_the_system(&mut site.start(story, &parts));
    assert_eq!(record["volumes"][0]["result"], "not-ours");
}

/// PCRs 4 and 7 as the machines' firmware leaves them.
pub fn values(site: &Site) -> String {
    site.values.get_or_init(|| shown_values(site)).clone()
}

fn shown_values(site: &Site) -> String {
    let parts = Parts {
        disks: vec![("root".to_owned(), site.tree("root.img"))],
        append: "guest-shows=pcrs".to_owned(),
        tpm: Some(site.file("tpm/blank")),
        ..site.parts(&net_initrd(site))
    };
    site.sh("mkdir -p tpm/blank");
    let mut machine = site.start("values", &parts);
    boots_by_the_system(&mut machine);
    machine.see("PCRS ");
    machine.see("\n");
    let line = machine.shown.rsplit_once("PCRS ").unwrap().1;
    line.split_once('}').unwrap().0.to_ascii_lowercase() + "}"
}

/// The lockbox `vm`, its store in the cloud `net` or `far`.
pub fn lockbox_of(cloud: &str) -> String {
    let store = NET.replace("stores.net", "stores.box").replace("identities = [\"net.owner.key\"]\n", "");
    format!(
        "[tpm]\nsite_key = \"site.pem\"\n[lockbox]\nhost = \"vm\"\nstore = \"box\"\nidentities = [\"tpm:host.tpm.pem\"]\n\
         lifetime_hours = 100\noffline = true\n{}",
        store.replace("cloud = \"net\"", &format!("cloud = \"{cloud}\""))
    )
}

/// An enrolled machine, whose TPM opens the lockbox in that boot state; with this of a configuration.
pub fn enrolled_parts(site: &Site, name: &str, maker: &str, values: &str, config: impl Fn(&Boxed) -> String) -> Parts {
    let config = config(site.enrol(name, values));
    let initrd = site.initrd_by(maker, name, &config);
    assert!(!initrd.doctor.contains("unfit"), "{}\n{}", initrd.warnings, initrd.doctor);
    Parts { tpm: Some(site.file(&format!("tpm/{name}"))), append: "guest-shows=pcrs".into(), ..site.parts(&initrd) }
}

/// A machine whose root's key comes out of its lockbox, which its TPM opens in that boot state.
fn lockbox_parts(site: &Site, name: &str, values: &str) -> (Parts, String) {
    let config = |boxed: &Boxed| format!("{}{}", lockbox_of("net"), volume("root", UUID, &[&boxed.root]));
    let parts = enrolled_parts(site, name, "mkinitramfs", values, config);
    (parts, site.enrolled().root.clone())
}

/// Latched: nothing that runs later in this boot opens the lockbox again.
#[track_caller]
pub fn is_latched(machine: &mut Machine) {
    machine.see("PCRS ");
    machine.see("END");
    let pcrs = machine.shown.rsplit_once("PCRS ").unwrap().1.to_owned();
    assert!(!pcrs.contains(&format!("\"15\":\"{}\"", "0".repeat(64))), "{pcrs}");
}

fn lockbox(site: &Site, story: &str) {
    let entry = |name: &str, uuid: &str| format!("{name} UUID={uuid} none luks,initramfs\n");
    let crypttab = [("root", UUID), ("data", DATA), ("spare", SPARE)].map(|(name, uuid)| entry(name, uuid));
    site.add("lockbox", "etc/crypttab", &crypttab.concat());
    let config = |boxed: &Boxed| {
        let spare = volume("spare", SPARE, &[&site.net]);
        let volumes = [volume("root", UUID, &[&boxed.root]), volume("data", DATA, &[&boxed.data]), spare].concat();
        // A person is asked for what is not open by then: ten times as late as it takes.
        let boot = "[boot]\nsecrets_in_image = true\nprompt_after_seconds = 12\n";
        format!("{boot}{volumes}{}{NET}", lockbox_of("net"))
    };
    let mut parts = enrolled_parts(site, "lockbox", "mkinitramfs", &values(site), config);
    for name in ["data", "spare"] {
        parts.disks.push((name.to_owned(), site.file(&format!("{name}.img"))));
    }
    parts.append.push_str(" guest-shows=log");
    let mut machine = site.start(story, &parts);
    // The two that can be opened are, before a person is asked for the third.
    machine.see("Please unlock disk spare (it is being opened automatically, too): ");
    for (name, key) in [("root", &site.enrolled().root), ("data", &site.enrolled().data)] {
        assert!(machine.has_shown(&format!("{name} is attached, by {key} with the lockbox")), "{}", machine.shown);
    }
    machine.type_line(PASSPHRASE);
    machine.see("spare is attached, by passphrase");
    boots(&mut machine, &format!("{} with the lockbox", site.enrolled().root));
    machine.see("LOG");
    machine.see("PCR 15 is latched");
    machine.see("the lockbox was closed: nothing proves that this host's own volume was opened as spare");
    assert_eq!(machine.shown.matches("] the lockbox is open").count(), 1, "once for all: {}", machine.shown);
    is_latched(&mut machine);
}

fn race(site: &Site, story: &str) {
    let config = |boxed: &Boxed| {
        let root = volume("root", UUID, &[&boxed.root, &site.net]);
        format!("[boot]\nsecrets_in_image = true\n{root}{}{NET}", lockbox_of("far"))
    };
    let mut parts = enrolled_parts(site, "race", "mkinitramfs", &values(site), config);
    // The lockbox's store takes the connection and says nothing: the copy has to do, after two seconds.
    parts.servers = vec![site.server(), silent(site)];
    parts.append.push_str(&format!(" guest-shows=keys guest-shows=log {STATIC}"));
    let mut machine = site.start(story, &parts);
    let record = boots(&mut machine, &site.net);
    assert!(record["volumes"][0]["seconds"].as_f64() < record["seconds"].as_f64().map(|all| all - 0.5), "{record}");
    machine.see("LOG");
    machine.see("the lockbox is open");
    // For the volumes that come later.
    machine.see("KEYS");
    machine.see("cryptattach:lockbox:vm");
    is_latched(&mut machine);
}

/// Of a boot state that no machine here is in.
fn other_values() -> String {
    format!("{{\"4\":\"{}\",\"7\":\"{}\"}}", "11".repeat(32), "22".repeat(32))
}

fn wrong_pcr(site: &Site, story: &str) {
    let (parts, _) = lockbox_parts(site, "other-state", &other_values());
    let mut machine = site.start(story, &parts);
    machine.see("root: the lockbox key of 'vm' is refused");
    let record = boots_by_the_system(&mut machine);
    assert_eq!(record["volumes"][0]["failures"][0]["reason"], 79, "{record}");
}

fn late_tpm(site: &Site, story: &str) {
    // The kernel's driver lets go of the TPM before the boot begins, and takes it again, as another, when a disk is plugged in: QEMU
    // plugs no TPM in.
    let script = "#!/bin/sh\n[ \"$1\" = prereqs ] && exit 0\ncd /sys/bus/*/drivers/tpm_tis || exit 0\n\
        for tpm in *:*; do echo \"$tpm\" >unbind; done\n\
        (while [ ! -e /sys/class/block/vdb ]; do sleep 1; done; echo \"$tpm\" >bind) </dev/null >/dev/null 2>&1 &\n";
    site.add("late-tpm", "etc/initramfs-tools/scripts/init-premount/late-tpm", script);
    let config = |boxed: &Boxed| {
        let lockbox = lockbox_of("net").replace("[tpm]\n", "[tpm]\ntcti = \"device:/dev/tpmrm1\"\n");
        lockbox + &volume("root", UUID, &[&boxed.root])
    };
    let parts = enrolled_parts(site, "late-tpm", "mkinitramfs", &values(site), config);
    let mut machine = site.start(story, &Parts { append: "guest-shows=log".to_owned(), ..parts });
    machine.see("waiting for the TPM /dev/tpmrm1 (");
    machine.see("Please unlock disk root (it is being opened automatically, too): ");
    machine.plug("now", &site.file("data.img"));
    boots(&mut machine, &format!("{} with the lockbox", site.enrolled().root));
    machine.see("LOG");
    machine.see("PCR 15 is latched");
}

/// A key that is in no store.
const NOT_THERE: &str = "stick/3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de";
/// Shows what is mounted in the initramfs, once the boot is over.
const MOUNTED: &str = "#!/bin/sh\n[ \"$1\" = prereqs ] && exit 0\n\
    echo \"MOUNTED $(cut -d' ' -f2 /proc/mounts | tr '\\n' ' ')\" >/dev/console\n";

fn killed(site: &Site, story: &str) {
    // By its program: the hook's script has the same name.
    let script = "#!/bin/sh\n[ \"$1\" = prereqs ] && exit 0\n\
        pids() { for of in /proc/[0-9]*; do [ \"$(readlink $of/exe)\" != \"$1\" ] || echo ${of#/proc/}; done; }\n\
        (until [ \"$(pids /usr/lib/cryptsetup/askpass)\" ]; do sleep 1; done\n\
        sleep 1; kill -9 $(pids /usr/bin/cryptattach)) </dev/null >/dev/null 2>&1 &\n";
    site.add("killed", "etc/initramfs-tools/scripts/init-premount/killer", script);
    site.add("killed", "etc/initramfs-tools/scripts/local-bottom/mounted", MOUNTED);
    // The TPM refuses, and a store is still hoped for when a person is asked, too. The stick is mounted, and has no such key.
    let config = |boxed: &Boxed| {
        let root = volume("root", UUID, &[&boxed.root, &site.net, NOT_THERE]);
        format!("[boot]\nsecrets_in_image = true\n{root}{}{NET}{STICK}", lockbox_of("net"))
    };
    let mut parts = enrolled_parts(site, "killed", "mkinitramfs", &other_values(), config);
    parts.servers = vec![silent(site)];
    parts.disks.push(("stick".to_owned(), site.file("stick.img")));
    parts.append.push_str(&format!(" {STATIC}"));
    let mut machine = site.start(story, &parts);
    machine.see(&format!("root: {NOT_THERE}: there is no key"));
    machine.see("Please unlock disk root (it is being opened automatically, too): ");
    machine.see("Killed");
    boots_by_the_system(&mut machine);
    assert!(machine.has_shown("MOUNTED ") && !machine.has_shown("/mnt/keys "), "{}", machine.shown);
    is_latched(&mut machine);
}

fn dracut_parts(site: &Site) -> Parts {
    let volume = volume("root", UUID, &[&site.stick]);
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

fn dracut_both(site: &Site, story: &str) {
    let config = |boxed: &Boxed| {
        let volumes = volume("root", UUID, &[&boxed.root]) + &volume("data", DATA, &[&site.net_data]);
        format!("[boot]\nsecrets_in_image = true\n{volumes}{}{NET}", lockbox_of("net"))
    };
    let mut parts = enrolled_parts(site, "dracut-both", "dracut", &values(site), config);
    parts.disks.push(("data".to_owned(), site.file("data.img")));
    parts.servers = vec![site.server()];
    // Without ip=: by DHCP.
    parts.append = format!("rd.luks.name={UUID}=root rd.luks.name={DATA}=data rd.shell=0 {}", parts.append);
    let mut machine = site.start(story, &parts);
    let record = boots(&mut machine, &format!("{} with the lockbox", site.enrolled().root));
    assert!(record["lockbox_closed"].is_null(), "{record}");
    // The lockbox is opened meanwhile, and then a source of its own.
    assert!(record["volumes"][1]["by"].as_str().unwrap().starts_with(&site.net_data), "{record}");
    is_latched(&mut machine);
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
