//! Every format, both ways: cryptsetup and we, dm-crypt and userspace, byte for byte.

use crate::{
    Story,
    machine::{DiskOptions, Machine},
};

pub const STORIES: &[Story] = &[
    ("volumes of cryptsetup: dm-crypt and userspace agree byte for byte", matrix),
    ("cryptsetup opens our compatible volume by its passphrase", compatible),
    ("cryptsetup opens our strict volume by the recovered volume key", strict),
];

struct Case {
    name: &'static str,
    /// cryptsetup's way to make the volume; empty for plain.
    format: &'static str,
    /// cryptsetup's and our way to open it.
    open: &'static str,
    attach: &'static str,
}

const FAST: &str = "--pbkdf pbkdf2 --pbkdf-force-iterations 1000";

const CASES: [Case; 9] = [
    Case { name: "LUKS1, 256 bits", format: "--type luks1 --key-size 256", open: "", attach: "" },
    Case { name: "LUKS1, 512 bits", format: "--type luks1 --key-size 512", open: "", attach: "" },
    Case { name: "LUKS2, 512 byte sectors", format: "--type luks2 --sector-size 512", open: "", attach: "" },
    Case {
        name: "LUKS2, 512 byte sectors, 256 bits",
        format: "--type luks2 --sector-size 512 --key-size 256",
        open: "",
        attach: "",
    },
    Case { name: "LUKS2, 4096 byte sectors", format: "--type luks2 --sector-size 4096", open: "", attach: "" },
    Case {
        name: "LUKS2, 2048 byte sectors, 256 bits",
        format: "--type luks2 --sector-size 2048 --key-size 256",
        open: "",
        attach: "",
    },
    Case {
        name: "LUKS2, detached header",
        format: "--type luks2 --sector-size 4096 --header /keys/header",
        open: "--header /keys/header",
        attach: "--header /keys/header",
    },
    Case {
        name: "plain, 512 bits",
        format: "",
        open: "--type plain --cipher aes-xts-plain64 --key-size 512",
        attach: "--plain --key-size 512",
    },
    Case {
        name: "plain, 256 bits, 4096 byte sectors, offset and skip",
        format: "",
        open: "--type plain --cipher aes-xts-plain64 --key-size 256 --sector-size 4096 --offset 2048 --skip 8",
        attach: "--plain --key-size 256 --sector-size 4096 --offset 2048 --skip 8",
    },
];

/// Writes through one, reads through the others, in turn: cryptsetup, our dm-crypt, our userspace.
fn matrix(machine: &mut Machine) {
    machine.ok("head -c 64 /dev/urandom >/keys/pass && head -c 32 /keys/pass >/keys/pass256");
    for case in &CASES {
        println!("  {}", case.name);
        let disk = machine.plug(48 << 20, DiskOptions::default());
        let path = disk.path();
        let Case { format, open, attach, .. } = case;
        let pass = if attach.contains("256") { "/keys/pass256" } else { "/keys/pass" };
        if !format.is_empty() {
            machine
                .ok(&format!("rm -f /keys/header; cryptsetup luksFormat -q {format} {FAST} --key-file {pass} {path}"));
        }
        let reference = machine.ok(&format!("cryptattach key import {path} {attach} --key-file {pass}"));
        let ours = format!("cryptattach attach {path} data {attach} --key {reference}");
        let theirs = format!("cryptsetup open {open} --key-file {pass} {path} data");

        // 1 MiB of new random bytes at an odd place, each time by another writer.
        let write = |machine: &mut Machine, device: &str| {
            machine.ok("head -c 1048576 /dev/urandom >/tmp/expected");
            machine.ok(&format!("dd if=/tmp/expected of={device} bs=4096 seek=5 conv=fsync,notrunc status=none"));
        };
        let read = |machine: &mut Machine, device: &str, who: &str| {
            let same = machine.sh(&format!("tail -c +20481 {device} | head -c 1048576 | cmp - /tmp/expected"));
            assert_eq!(same.code, 0, "{}: {who}: {}", case.name, same.stdout);
        };
        let (mapped, link) = ("/dev/mapper/data", "/dev/disk/by-cryptattach/data");

        machine.ok(&theirs);
        write(machine, mapped);
        machine.ok("cryptsetup close data");
        machine.ok(&ours);
        read(machine, mapped, "our dm-crypt reads what cryptsetup wrote");
        let size = machine.ok(&format!("blockdev --getsize64 {mapped}"));
        machine.ok("cryptattach detach data");
        machine.ok(&format!("{ours} --backend userspace"));
        println!("    {}", machine.ok("grep -o 'XTS by .*' /run/cryptattach/data/worker.log"));
        read(machine, link, "userspace reads what cryptsetup wrote");
        assert_eq!(machine.ok(&format!("blockdev --getsize64 {link}")), size, "{}", case.name);
        write(machine, link);
        machine.ok("cryptattach detach data");
        machine.ok(&ours);
        read(machine, mapped, "our dm-crypt reads what userspace wrote");
        write(machine, mapped);
        machine.ok("cryptattach detach data");
        machine.ok(&theirs);
        read(machine, mapped, "cryptsetup reads what our dm-crypt wrote");
        machine.ok("cryptsetup close data");
        machine.ok(&format!("{ours} --backend userspace"));
        read(machine, link, "userspace reads what our dm-crypt wrote");
        machine.ok("cryptattach detach data");
        machine.unplug(&disk);
    }
}

fn compatible(machine: &mut Machine) {
    let disk = machine.plug(64 << 20, DiskOptions::default());
    let path = disk.path();
    let reference = machine.ok(&format!("cryptattach format {path} --keyslot"));
    machine.ok(&format!("cryptattach attach {path} data && echo ours | dd of=/dev/mapper/data conv=fsync status=none"));
    machine.ok("cryptattach detach data");
    machine.ok(&format!("cryptattach key passphrase {reference} | cryptsetup open --key-file=- {path} data"));
    assert_eq!(machine.ok("head -c 4 /dev/mapper/data"), "ours");
    // What cryptsetup has opened is this volume under this name: attach takes it as done.
    machine.ok(&format!("cryptattach attach {path} data && cryptattach detach data"));
    machine.unplug(&disk);
}

fn strict(machine: &mut Machine) {
    let disk = machine.plug(64 << 20, DiskOptions::default());
    let path = disk.path();
    machine.ok(&format!("cryptattach format {path} && cryptattach attach {path} data"));
    machine.ok("echo ours | dd of=/dev/mapper/data conv=fsync status=none && cryptattach detach data");
    // Only the escrow's key is left; its identity makes the passphraseless volume cryptsetup's.
    machine.ok(
        "sed 's/cinder.owner.key/escrow.key/' /keys/cryptattach.toml >/keys/recovery.toml && mv /keys/cinder.owner.key /keys/lost",
    );
    machine.ok(&format!("cryptattach --config /keys/recovery.toml attach {path} data"));
    assert_eq!(machine.ok("head -c 4 /dev/mapper/data"), "ours");
    machine.ok("cryptattach detach data && mv /keys/lost /keys/cinder.owner.key");
    machine.unplug(&disk);
}
