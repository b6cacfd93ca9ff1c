//! The hooks of OpenStack on dm-crypt: attach, extend, detach, and what os-brick's plain provider made.

use base64ct::{Base64, Encoding};

use crate::{Story, machine::Machine};

pub const STORIES: &[Story] = &[
    ("a hook attaches, extends and detaches", attach),
    ("a plain volume of os-brick's making opens by a hook", plain),
    ("resize follows a device that has grown", resize),
];

/// A request, and the answer as jq sees it.
fn hook(machine: &mut Machine, verb: &str, request: &str, member: &str) -> String {
    machine.ok(&format!(
        "printf %s '{request}' | cryptattach hook {verb} | sed 's/.*\"{member}\":\"\\{{0,1\\}}\\([^\",}}]*\\).*/\\1/'"
    ))
}

fn loop_device(machine: &mut Machine, name: &str) -> String {
    machine.ok(&format!("truncate -s 64M /root/{name} && losetup --find --show /root/{name}"))
}

/// The hooks of this host serve one tenant.
fn one_tenant(machine: &mut Machine) {
    let file = "/keys/cryptattach.toml";
    machine.ok(&format!("grep -q '^\\[hooks\\]' {file} || printf '[hooks]\\ntenants = \"one\"\\n' >>{file}"));
}

fn attach(machine: &mut Machine) {
    one_tenant(machine);
    let device = loop_device(machine, "volume");
    let key = hook(machine, "key create", r#"{"version":1,"algorithm":"AES","bit_length":512}"#, "key_id");
    let request = format!(
        r#"{{"version":1,"device":"{device}","link":"/dev/disk/by-id/os-brick-x","name":"crypt-os-brick-x","key_id":"{key}","cipher":"aes-xts-plain64","key_size":512}}"#
    );
    assert_eq!(hook(machine, "attach", &request, "device"), "/dev/mapper/crypt-os-brick-x");
    assert_eq!(machine.ok("readlink /dev/disk/by-id/os-brick-x"), "/dev/mapper/crypt-os-brick-x");
    machine
        .ok("mkfs.ext4 -q /dev/disk/by-id/os-brick-x && mount /dev/disk/by-id/os-brick-x /mnt && seq 1 100000 >/mnt/n");
    assert_eq!(hook(machine, "attach", &request, "device"), "/dev/mapper/crypt-os-brick-x");
    machine.ok(&format!("truncate -s 96M /root/volume && losetup -c {device}"));
    let size: u64 = hook(machine, "extend", &request, "size_bytes").parse().unwrap();
    assert_eq!(size, (96 - 16) << 20);
    assert_eq!(machine.ok("blockdev --getsize64 /dev/mapper/crypt-os-brick-x"), size.to_string());
    machine.ok("seq 1 100000 | cmp - /mnt/n && resize2fs /dev/mapper/crypt-os-brick-x && umount /mnt");
    let detach = r#"{"version":1,"name":"crypt-os-brick-x"}"#;
    assert_eq!(hook(machine, "detach", detach, "detached"), "true");
    assert_eq!(hook(machine, "detach", detach, "detached"), "false");
    // As stock os-brick would open it.
    machine.ok(&format!(
        "cryptattach key passphrase cinder/{key} | cryptsetup luksOpen --key-file=- {device} stock &&
         mount /dev/mapper/stock /mnt && seq 1 100000 | cmp - /mnt/n && umount /mnt && cryptsetup luksClose stock"
    ));
    machine.ok(&format!("losetup -d {device} && rm /root/volume /dev/disk/by-id/os-brick-x"));
}

/// os-brick gives cryptsetup the key in hexadecimal on standard input, of which it makes a plain volume's key by its hash.
fn plain(machine: &mut Machine) {
    let device = loop_device(machine, "plain");
    // What this cryptsetup was built with is what os-brick got from it.
    let hash = machine.ok("cryptsetup --help | sed -n 's/.*plain: .*Password hashing: \\([a-z0-9]*\\).*/\\1/p'");
    one_tenant(machine);
    machine.ok(&format!("sed -i 's/^\\[hooks\\]/&\\nplain_hash = \"{hash}\"/' /keys/cryptattach.toml"));
    let bytes: Vec<u8> = (0..32).collect();
    let value = Base64::encode_string(&bytes);
    let passphrase: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let request = format!(
        r#"{{"version":1,"secret":{{"type":"symmetric","algorithm":"AES","bit_length":256,"value":"{value}"}}}}"#
    );
    let key = hook(machine, "key store", &request, "key_id");
    machine.ok(&format!(
        "printf %s {passphrase} | cryptsetup create --key-file=- --cipher aes-xts-plain64 --key-size 256 stock {device} &&
         mkfs.ext4 -q /dev/mapper/stock && mount /dev/mapper/stock /mnt && seq 1 100000 >/mnt/n && umount /mnt &&
         cryptsetup remove stock"
    ));
    let request = format!(
        r#"{{"version":1,"device":"{device}","link":null,"name":"crypt-plain","key_id":"{key}","provider":"plain","cipher":"aes-xts-plain64","key_size":256}}"#
    );
    assert_eq!(hook(machine, "attach", &request, "device"), "/dev/mapper/crypt-plain");
    machine.ok("mount /dev/mapper/crypt-plain /mnt && seq 1 100000 | cmp - /mnt/n");
    machine.ok(&format!("truncate -s 80M /root/plain && losetup -c {device}"));
    assert_eq!(hook(machine, "extend", &request, "size_bytes"), (80 << 20).to_string());
    machine.ok("seq 1 100000 | cmp - /mnt/n && umount /mnt");
    hook(machine, "detach", r#"{"version":1,"name":"crypt-plain"}"#, "detached");
    machine.ok(&format!("losetup -d {device} && rm /root/plain"));
}

fn resize(machine: &mut Machine) {
    let device = loop_device(machine, "grows");
    machine.ok(&format!("cryptattach format {device} && cryptattach attach {device} grows"));
    machine.ok("mkfs.ext4 -q /dev/mapper/grows && mount /dev/mapper/grows /mnt && seq 1 100000 >/mnt/n");
    assert_eq!(machine.ok("cryptattach resize grows"), ((64 - 16) << 20).to_string(), "as large as it was");
    machine.ok(&format!("truncate -s 128M /root/grows && losetup -c {device}"));
    assert_eq!(machine.ok("cryptattach resize grows"), ((128 - 16) << 20).to_string());
    machine.ok("seq 1 100000 | cmp - /mnt/n && umount /mnt");
    assert!(machine.ok("cryptattach status grows").contains("117440512 bytes"));
    // A mapping never shrinks: what the file system has behind its device's end may come back with it.
    machine.ok(&format!("truncate -s 100M /root/grows && losetup -c {device}"));
    assert!(machine.fails(71, "cryptattach resize grows").contains("has become smaller"));
    machine.ok(&format!("truncate -s 128M /root/grows && losetup -c {device}"));
    assert!(machine.ok("cryptattach status grows").contains("117440512 bytes"));
    machine.fails(66, "cryptattach resize nothing");
    machine.ok(&format!("cryptattach detach grows && losetup -d {device} && rm /root/grows"));
}
