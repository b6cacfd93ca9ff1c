//! Volumes in the middle of a rotation of their key, on dm-crypt: two keys in one table.

use crate::{
    Story,
    machine::{Disk, DiskOptions, Machine},
};

pub const STORIES: &[Story] = &[
    ("a paused rotation is attached, written to and gone on with", paused),
    ("a rotation that was killed in a stretch is recovered and attached", killed),
];

const HEADER: u64 = 16 << 20;
const DATA: u64 = 12 << 20;

/// A volume with random data, which is in /run/plain.
fn filled(machine: &mut Machine, arguments: &str) -> Disk {
    let disk = machine.plug(HEADER + DATA, DiskOptions::default());
    let path = disk.path();
    machine.ok(&format!("cryptattach format {path} {arguments} && cryptattach attach {path} data"));
    write(machine);
    machine.ok("cryptattach detach data");
    disk
}

/// New data in all of the volume that is attached as `data`.
fn write(machine: &mut Machine) {
    machine.ok(&format!(
        "head -c {DATA} /dev/urandom >/run/plain && dd if=/run/plain of=/dev/mapper/data bs=64k oflag=direct status=none"
    ));
}

/// What the volume has is what was written.
fn check(machine: &mut Machine, path: &str, more: &str) {
    let device = machine.ok(&format!("cryptattach attach {path} check --read-only {more}"));
    machine.ok(&format!("cmp {device} /run/plain; same=$?; cryptattach detach check && exit $same"));
}

/// Goes on until a part more of the data has the new key.
fn pause(machine: &mut Machine, path: &str) {
    machine.ok(&format!(
        "at() {{ cryptsetup luksDump --dump-json-metadata {path} | grep -Eo '\"iv_tweak\": *\"[1-9][0-9]*' || true; }}
         before=$(at)
         cryptattach key rotate {path} --rate 1 2>/run/said & pid=$!
         for i in $(seq 600); do [ \"$(at)\" != \"$before\" ] && break; sleep 0.1; done
         kill -TERM $pid; wait $pid; code=$?; cat /run/said; [ $code = 83 ]"
    ));
}

fn paused(machine: &mut Machine) {
    for arguments in ["", "--keyslot"] {
        let disk = filled(machine, arguments);
        let path = disk.path();
        pause(machine, &path);
        assert!(machine.ok(&format!("cryptattach test {path}")).contains("both keys"));
        let options = "--allow-discards --no-read-workqueue";
        assert_eq!(machine.ok(&format!("cryptattach attach {path} data {options}")), "/dev/mapper/data");
        assert_eq!(machine.ok(&format!("cryptattach attach {path} data")), "/dev/mapper/data", "it is there already");
        // One table: the new key's part, and the old one's. The keys are in the kernel's keyring.
        let table = machine.ok("dmsetup table --showkeys data");
        let parts: Vec<&str> = table.lines().collect();
        assert_eq!(parts.len(), 2, "{table}");
        for part in &parts {
            assert!(
                part.contains(":64:logon:cryptsetup:") && part.contains("allow_discards no_read_workqueue"),
                "{table}"
            );
        }
        assert_ne!(parts[0].split(' ').nth(4), parts[1].split(' ').nth(4), "two keys: {table}");
        machine.ok("cmp /dev/mapper/data /run/plain");
        let status = machine.ok("cryptattach status data");
        assert!(status.contains("re-encrypting, ") && status.contains(&DATA.to_string()), "{status}");
        let refused = machine.fails(65, "cryptattach resize data");
        assert!(refused.contains("its key is being rotated"), "{refused}");
        write(machine);
        machine.ok("cryptattach detach data && test ! -e /dev/mapper/data");
        // Both backends have the same of it.
        check(machine, &path, "");
        check(machine, &path, "--backend userspace");
        pause(machine, &path);
        check(machine, &path, "");
        machine.ok(&format!("cryptattach key rotate {path} --delete-old"));
        check(machine, &path, "");
        machine.unplug(&disk);
    }
}

/// Killed in a stretch for certain: what is halted, by chance with libcryptsetup's lock, stays as it is looked at.
fn killed(machine: &mut Machine) {
    for arguments in ["", "--keyslot"] {
        let disk = filled(machine, arguments);
        let path = disk.path();
        machine.ok(&format!(
            "is_there() {{ cryptsetup luksDump --disable-locks --dump-json-metadata {path} | grep -q in-reencryption; }}
             for i in $(seq 30); do
                 cryptattach key rotate {path} --hotzone 2048 2>/run/said & pid=$!
                 while kill -STOP $pid 2>/dev/null; do
                     is_there && {{ kill -9 $pid; wait $pid; exit 0; }}
                     kill -CONT $pid; sleep 0.02
                 done
             done; cat /run/said; exit 1"
        ));
        let refused = machine.fails(65, &format!("cryptattach attach {path} data --read-only"));
        assert!(refused.contains("is half written"), "{refused}");
        let attached = machine.sh(&format!("cryptattach attach {path} data"));
        assert!(attached.code == 0 && attached.stderr.contains("recovering that stretch"), "{}", attached.stderr);
        machine.ok("cmp /dev/mapper/data /run/plain");
        write(machine);
        machine.ok("cryptattach detach data");
        check(machine, &path, "");
        machine.ok(&format!("cryptattach key rotate {path} --delete-old"));
        check(machine, &path, "");
        machine.unplug(&disk);
    }
}
