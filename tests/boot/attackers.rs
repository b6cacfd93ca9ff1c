//! What an attacker's system gets, who has the whole server and brings a root file system of his own; and what the host's own
//! system keeps.
//!
//! In each story a script runs when the root is mounted and nothing of it has run yet: it has the kernel's memory and the TPM as
//! the root's own programs have them, and does what an attacker would.

use crate::{
    Story,
    machine::{Machine, Parts, STATIC},
    site::{Boxed, DATA, PASSPHRASE, Site, UUID},
    stories::{NET, boots, enrolled_parts, is_latched, lockbox_of, silent, values, volume},
};

pub const STORIES: &[Story] = &[
    ("the host's own disk keeps the lockbox open for its system", own_disk),
    ("a disk of the same UUID without our token gets nothing", without_token),
    ("a disk of the same UUID with our token gets nothing", with_token),
    ("of two disks of one UUID only the host's own gets the lockbox", two_disks),
    ("a disk that is put in place of one that was pulled gets nothing", pulled_disk),
    ("a disk in place of the root's gets nothing of the host's other disks", beside_the_hosts_data),
    ("an attacker who types his passphrase at our prompt gets nothing", typed_by_the_attacker),
    ("the owner who types the passphrase has their system without the lockbox", typed_by_the_owner),
    ("a machine that requires the latch powers off where no TPM proves it", required),
    ("dracut: a disk of the same UUID gets nothing", dracut_attack),
    ("dracut: a machine that requires the latch powers off where no TPM proves it", dracut_required),
];

/// Root's own programs could do the same a moment later. The victim's disk is plugged in for that: its key is in the
/// lockbox.
const LOOT: &str = "#!/bin/sh\n[ \"$1\" = prereqs ] && exit 0\nexec >/dev/console 2>&1\n\
    grep -c cryptattach:lockbox /proc/keys | sed 's/^/LOOT keys /'\n\
    cryptattach lockbox open; echo \"LOOT open $?\"\n\
    until [ -e /dev/disk/by-id/virtio-victim ]; do sleep 1; done\n\
    cryptattach attach /dev/disk/by-id/virtio-victim stolen --key ROOT; echo \"LOOT attach $?\"\n\
    grep -c cryptattach:lockbox /proc/keys | sed 's/^/LOOT then /'\n";

/// The victim: a machine whose TPM opens its lockbox in this boot state, with the keys of `root` and `data` in that.
fn victim(site: &Site, name: &str, config: impl Fn(&Boxed) -> String) -> Parts {
    site.add(name, "etc/initramfs-tools/scripts/local-bottom/loot", &LOOT.replace("ROOT", &site.enrolled().root));
    // No store answers here.
    let network = "[network]\ntotal_seconds = 2\n";
    let config = |boxed: &Boxed| format!("{}{network}{}", config(boxed), lockbox_of("net"));
    enrolled_parts(site, name, "mkinitramfs", &values(site), config)
}

/// One whose configuration names the root, as the stories' own disk and the attacker's are.
fn plain_victim(site: &Site) -> Parts {
    victim(site, "victim", |boxed| volume("root", UUID, &[&boxed.root]))
}

/// One whose crypttab names the root: it is this host's if it has a token.
fn crypttab_victim(site: &Site) -> Parts {
    victim(site, "crypttab-victim", |_| "[boot]\ntotal_seconds = 12\n".to_owned())
}

/// A disk of the attacker's: the victim's UUID, a volume key and a passphrase of his own; with this token. One is made at a
/// time: cryptsetup has a lock for each UUID, and does not wait for it.
fn evil(site: &Site, token: Option<&str>) -> std::path::PathBuf {
    site.sh(
        "[ -e evil.img ] || {
            truncate -s 640M evil.new
            mke2fs -q -t ext4 -m 0 -O ^has_journal -E lazy_itable_init=0,nodiscard -d $TREE/root evil.new 608M
            flock /run/lock/cryptattach-tests cryptsetup reencrypt -q --encrypt --force-offline-reencrypt --type luks2 --cipher aes-xts-plain64 --key-size 512 \
                --uuid 11111111-2222-3333-4444-555555555555 --reduce-device-size 32M --resilience none \
                --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --key-file $TREE/passphrase evil.new
            mv evil.new evil.img
        }",
    );
    let Some(key) = token else { return site.file("evil.img") };
    let (store, key) = key.split_once('/').unwrap();
    let token = format!(r#"{{"type":"cryptattach","keyslots":[],"store":"{store}","key":"{key}"}}"#);
    site.sh(&format!(
        "cp --sparse=always evil.img tokened.img; printf '%s' '{token}' | cryptsetup token import --json-file - tokened.img"
    ));
    site.file("tokened.img")
}

fn with_disk(parts: Parts, disk: std::path::PathBuf) -> Parts {
    Parts { disks: vec![("root".to_owned(), disk)], ..parts }
}

/// Exit code of `lockbox open`, of `attach` of the victim's disk, which is plugged in then, and how many lockbox keys the kernel's
/// keyring has at last.
#[track_caller]
fn loot(site: &Site, machine: &mut Machine) -> (String, String, String) {
    machine.see("LOOT open ");
    let open = machine.see_line().trim().to_owned();
    site.sh("cp --sparse=always root.img victim.img");
    machine.plug("victim", &site.file("victim.img"));
    machine.see("LOOT attach ");
    let attach = machine.see_line().trim().to_owned();
    machine.see("LOOT then ");
    (open, attach, machine.see_line().trim().to_owned())
}

#[track_caller]
fn gets_nothing(site: &Site, machine: &mut Machine) {
    let (open, attach, keys) = loot(site, machine);
    assert_eq!((open.as_str(), keys.as_str()), ("79", "0"), "{}", machine.shown);
    assert_ne!(attach, "0", "{}", machine.shown);
}

/// The distribution asks, and somebody answers.
#[track_caller]
fn answers_the_system(machine: &mut Machine) {
    machine.see("Please unlock disk root: ");
    machine.type_line(PASSPHRASE);
}

fn own_disk(site: &Site, story: &str) {
    let mut machine = site.start(story, &plain_victim(site));
    assert_eq!(loot(site, &mut machine), ("0".to_owned(), "0".to_owned(), "1".to_owned()), "{}", machine.shown);
    let record = boots(&mut machine, &format!("{} with the lockbox", site.enrolled().root));
    assert!(record["volumes"][0]["proven"].as_bool().unwrap() && record["lockbox_closed"].is_null(), "{record}");
    assert_eq!(record["latch"]["pcr15"], "extended", "{record}");
    is_latched(&mut machine);
}

fn without_token(site: &Site, story: &str) {
    let parts = crypttab_victim(site);
    let mut machine = site.start(story, &with_disk(parts, evil(site, None)));
    answers_the_system(&mut machine);
    gets_nothing(site, &mut machine);
    is_latched(&mut machine);
}

fn with_token(site: &Site, story: &str) {
    let parts = crypttab_victim(site);
    let disk = evil(site, Some(&site.enrolled().root));
    let mut machine = site.start(story, &with_disk(parts, disk));
    // The lockbox was opened for it, and closed again.
    machine.see("the lockbox was closed: nothing proves that this host's own volume was opened as root");
    answers_the_system(&mut machine);
    gets_nothing(site, &mut machine);
    is_latched(&mut machine);
}

fn two_disks(site: &Site, story: &str) {
    let mut parts = plain_victim(site);
    parts.disks.push(("evil".to_owned(), evil(site, None)));
    let mut machine = site.start(story, &parts);
    // Which of them has the name, the kernel decides.
    let line = loop {
        machine.see("cryptattach: ");
        let line = machine.see_line();
        if line.starts_with("root is attached, by ") || line.starts_with("could not unlock root") {
            break line;
        }
    };
    if line.starts_with("root is attached, by box/") {
        assert_eq!(loot(site, &mut machine), ("0".to_owned(), "0".to_owned(), "1".to_owned()), "{}", machine.shown);
    } else {
        answers_the_system(&mut machine);
        gets_nothing(site, &mut machine);
    }
    is_latched(&mut machine);
}

fn pulled_disk(site: &Site, story: &str) {
    let config = |boxed: &Boxed| format!("[boot]\ntotal_seconds = 4\n{}", volume("root", UUID, &[&boxed.root]));
    let mut parts = victim(site, "pulled", config);
    parts.disks.clear();
    let mut machine = site.start(story, &parts);
    machine.see("could not unlock root within 4 s");
    machine.plug("evil", &evil(site, None));
    answers_the_system(&mut machine);
    gets_nothing(site, &mut machine);
    is_latched(&mut machine);
}

fn beside_the_hosts_data(site: &Site, story: &str) {
    let mapped = "#!/bin/sh\n[ \"$1\" = prereqs ] && { echo cryptattach; exit 0; }\n\
        echo MAPPED $(cat /sys/block/dm-*/dm/name) >/dev/console\n";
    site.add("beside", "etc/initramfs-tools/scripts/init-bottom/mapped", mapped);
    site.add(
        "beside",
        "etc/crypttab",
        &format!("root UUID={UUID} none luks,initramfs\ndata UUID={DATA} none luks,initramfs\n"),
    );
    let config = |boxed: &Boxed| {
        let volumes = volume("root", UUID, &[&boxed.root]) + &volume("data", DATA, &[&boxed.data]);
        format!("{volumes}{}", lockbox_of("net"))
    };
    let mut parts = enrolled_parts(site, "beside", "mkinitramfs", &values(site), config);
    parts.disks = vec![("root".to_owned(), evil(site, None)), ("data".to_owned(), site.file("data.img"))];
    let mut machine = site.start(story, &parts);
    machine.see(&format!("data is attached, by {} with the lockbox", site.enrolled().data));
    machine.see("the lockbox was closed: nothing proves that this host's own volume was opened as root");
    answers_the_system(&mut machine);
    machine.see(
        "data was detached: the root file system in /root is not on a volume that is proven to be this host's own",
    );
    machine.see("MAPPED ");
    assert_eq!(machine.see_line().trim(), "root");
    boots_by_nobody(&mut machine);
    is_latched(&mut machine);
}

/// A machine that still hopes for a store when a person is asked.
fn hopeful_victim(site: &Site, name: &str, keys: impl Fn(&Boxed) -> Vec<String>) -> Parts {
    let config = |boxed: &Boxed| {
        let keys = keys(boxed);
        let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
        format!("[boot]\nsecrets_in_image = true\n{}{NET}", volume("root", UUID, &keys))
    };
    let parts = victim(site, name, config);
    Parts { servers: vec![silent(site)], append: format!("{} {STATIC}", parts.append), ..parts }
}

fn types_at_our_prompt(site: &Site, story: &str, parts: &Parts) {
    let mut machine = site.start(story, parts);
    machine.see("Please unlock disk root (it is being opened automatically, too): ");
    machine.type_line(PASSPHRASE);
    machine.see("root is attached, by passphrase");
    gets_nothing(site, &mut machine);
    let record = boots(&mut machine, "passphrase");
    assert!(!record["volumes"][0]["proven"].as_bool().unwrap() && record["lockbox_closed"].is_string(), "{record}");
    is_latched(&mut machine);
}

fn typed_by_the_attacker(site: &Site, story: &str) {
    let parts = hopeful_victim(site, "hopeful", |boxed| vec![boxed.root.clone(), site.net.clone()]);
    types_at_our_prompt(site, story, &with_disk(parts, evil(site, None)));
}

fn typed_by_the_owner(site: &Site, story: &str) {
    // The key in the store that answers belongs to another volume: the root's is lost.
    let parts = hopeful_victim(site, "recovering", |boxed| vec![boxed.data.clone(), site.net.clone()]);
    types_at_our_prompt(site, story, &parts);
}

/// Its TPM is not there, and one that hides until the boot is over is not either.
fn powers_off(machine: &mut Machine) {
    machine.see("PCR 15 is not extended: there is no TPM /dev/tpmrm0");
    machine.see("next: the machine powers off; power it on again");
    // And not again and again.
    machine.see("reboot: Power down");
    machine.ends();
    assert!(!machine.has_shown("falling back to the system's own unlock"), "{}", machine.shown);
    assert!(!machine.has_shown("BOOTED") && !machine.has_shown("Please unlock disk root: "), "{}", machine.shown);
}

fn required_config(boxed: &Boxed) -> String {
    let lockbox = lockbox_of("net").replace("[tpm]\n", "[tpm]\nlatch = \"required\"\n");
    format!("[boot]\ntotal_seconds = 4\n{}{lockbox}", volume("root", UUID, &[&boxed.root]))
}

fn required(site: &Site, story: &str) {
    let parts = enrolled_parts(site, "required", "mkinitramfs", &values(site), required_config);
    powers_off(&mut site.start(story, &Parts { tpm: None, ..parts }));
}

fn dracut_attack(site: &Site, story: &str) {
    let config = |boxed: &Boxed| {
        format!("[boot]\ntotal_seconds = 20\n{}{}", volume("root", UUID, &[&boxed.root]), lockbox_of("net"))
    };
    let mut parts = enrolled_parts(site, "dracut-victim", "dracut", &values(site), config);
    parts.append = format!("rd.luks.name={UUID}=root rd.shell=0 guest-shows=keys {}", parts.append);
    let mut machine = site.start(story, &with_disk(parts, evil(site, None)));
    machine.see("the lockbox was closed: nothing proves that this host's own volume was opened as root");
    machine.see("Please enter passphrase for disk");
    machine.type_line(PASSPHRASE);
    boots_by_nobody(&mut machine);
    machine.see("KEYS");
    is_latched(&mut machine);
    assert!(!machine.has_shown("cryptattach:lockbox"), "{}", machine.shown);
}

/// The root is there, and not by us.
#[track_caller]
fn boots_by_nobody(machine: &mut Machine) {
    machine.see("BOOTED from /dev/mapper/root");
    let record = machine.record();
    assert_ne!(record["volumes"][0]["result"], "attached", "{record}");
    assert!(record["lockbox_closed"].is_string(), "{record}");
}

fn dracut_required(site: &Site, story: &str) {
    let mut parts = enrolled_parts(site, "dracut-required", "dracut", &values(site), required_config);
    parts.append = format!("rd.luks.name={UUID}=root rd.shell=0 {}", parts.append);
    powers_off(&mut site.start(story, &Parts { tpm: None, ..parts }));
}
