//! The token plug-in: programs that know nothing of us open compatible volumes.

use crate::{
    Story,
    machine::{DiskOptions, Machine},
};

pub const STORIES: &[Story] = &[
    ("plain cryptsetup opens a compatible volume by its token", opens),
    ("without the store, cryptsetup fails with our reason, and goes on to a passphrase", falls_back),
    ("no passphrase is released for a volume that shares a disk with its key", shared),
];

const MIB: u64 = 1 << 20;

fn opens(machine: &mut Machine) {
    let disk = machine.plug(64 * MIB, DiskOptions::default());
    let path = disk.path();
    let reference = machine.ok(&format!("cryptattach format --keyslot {path}"));
    let dump = machine.ok(&format!("cryptsetup luksDump {path}"));
    assert!(dump.contains(&format!("Key:        {reference}")), "{dump}");

    machine.ok(&format!("cryptsetup open --token-only {path} data && test -b /dev/mapper/data"));
    // It is the same volume as ours.
    machine.ok("mkfs.ext4 -q -L told /dev/mapper/data && cryptsetup close data");
    machine.ok(&format!("cryptattach attach {path} data"));
    assert_eq!(machine.ok("blkid -o value -s LABEL /dev/mapper/data"), "told");
    machine.ok("cryptattach detach data");

    // A strict volume has nothing that a passphrase could open.
    machine.ok(&format!("cryptattach format --force {path}"));
    let dump = machine.ok(&format!("cryptsetup luksDump {path}"));
    assert!(dump.contains("strict: there is no keyslot"), "{dump}");
    machine.fails(1, &format!("cryptsetup open --token-only {path} data"));
    // What is no token of ours does not get into a header.
    let bad = r#"{"type":"cryptattach","keyslots":[],"store":"a\u001b[2Jb","key":"k"}"#;
    machine.fails(1, &format!("echo '{bad}' | cryptsetup token import {path}"));
    machine.unplug(&disk);
}

fn falls_back(machine: &mut Machine) {
    let disk = machine.plug(64 * MIB, DiskOptions::default());
    let path = disk.path();
    machine.ok(&format!("cryptattach format --keyslot {path} && printf %s human >/root/human"));
    machine.ok(&format!(
        "cryptattach key passphrase --for {path} >/run/ours &&
         cryptsetup luksAddKey --key-file /run/ours --pbkdf pbkdf2 --pbkdf-force-iterations 1000 {path} /root/human; rm /run/ours"
    ));
    machine.ok("mv /keys/cinder /keys/gone");
    let told = machine.fails(1, &format!("cryptsetup open --token-only {path} data"));
    assert!(told.contains("cryptattach: cannot open the key store /keys/cinder"), "{told}");
    let explained = machine.ok(&format!("cryptattach explain {path}"));
    assert!(explained.contains("exit code 69") && explained.contains("/keys/cinder"), "{explained}");
    machine.ok(&format!("cryptsetup open --key-file /root/human {path} data && cryptsetup close data"));
    machine.ok("mv /keys/gone /keys/cinder");
    machine.ok(&format!("cryptsetup open --token-only {path} data && cryptsetup close data"));
    assert!(machine.ok(&format!("cryptattach explain {path}")).starts_with("no failure of"));
    machine.unplug(&disk);
}

fn shared(machine: &mut Machine) {
    let disk = machine.plug(64 * MIB, DiskOptions::default());
    let path = disk.path();
    machine.ok(&format!("cryptattach format --keyslot {path} && cryptsetup open --token-only {path} data"));
    // The key moves to where its volume is.
    machine.ok("mkfs.ext4 -q /dev/mapper/data && mount /dev/mapper/data /mnt && cp -a /keys/cinder /mnt &&
        sed 's|\"/keys/cinder\"|\"/mnt/cinder\"|' /etc/cryptattach/cryptattach.toml >/etc/cryptattach/moved.toml");
    let test = format!("cryptsetup open --test-passphrase --token-only {path}");
    machine.ok(&test);
    machine.ok(&format!("CRYPTATTACH_CONFIG=/etc/cryptattach/moved.toml {test}"));
    machine.ok("cd /etc/cryptattach && mv cryptattach.toml before.toml && cp moved.toml cryptattach.toml");
    let told = machine.fails(1, &test);
    assert!(told.contains("same d"), "{told}");
    machine.ok("mv /etc/cryptattach/before.toml /etc/cryptattach/cryptattach.toml");
    machine.fails(72, &format!("cryptattach --config /etc/cryptattach/moved.toml key passphrase --for {path}"));
    machine.ok("umount /mnt && cryptsetup close data");
    machine.unplug(&disk);
}
