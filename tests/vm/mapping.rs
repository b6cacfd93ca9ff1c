//! Our volumes on dm-crypt: attach, use, detach, and who is in the way.

use std::sync::Arc;

use base64ct::{Base64, Encoding};
use cryptattach::{
    base::key::{BoundContext, KeySize, SealedKey, VolumeKey},
    keys::seal::{Content, Payload, seal},
};
use serde_json::Value;

use crate::{
    Story, container_key,
    machine::{DiskOptions, Machine},
    sealing::{context, payload},
};

pub const STORIES: &[Story] = &[
    ("what was written is read back after a second attach", read_back),
    ("the volume key is in the kernel keyring", keyring),
    ("sectors are as large as the device allows", sectors),
    ("options reach the mapping", options),
    ("attaching twice succeeds, a foreign name is refused", twice),
    ("detach names the holder, and can be deferred", busy),
    ("a device that is read-only or vanishes", vanishing),
    ("hostile headers are refused before activation", hostile),
    ("a wrong volume key in a rightly sealed form is refused", wrong_key),
];

const MIB: u64 = 1 << 20;

fn read_back(machine: &mut Machine) {
    let disk = machine.plug(64 * MIB, DiskOptions::default());
    let path = disk.path();
    let reference = machine.ok(&format!("cryptattach format {path}"));
    assert!(reference.starts_with("cinder/"), "{reference}");
    assert_eq!(machine.ok(&format!("cryptattach attach {path} data")), "/dev/mapper/data");
    machine.ok(
        "mkfs.ext4 -q /dev/mapper/data && mount /dev/mapper/data /mnt && seq 1 100000 >/mnt/numbers && umount /mnt",
    );
    machine.ok("cryptattach detach data && test ! -e /dev/mapper/data");
    let raw = std::fs::read(&disk.file).unwrap();
    assert!(!raw.windows(12).any(|bytes| bytes == b"123456\n12345"), "plaintext on the disk");
    machine.ok(&format!("cryptattach attach {path} data --read-only"));
    assert_eq!(machine.ok("blockdev --getro /dev/mapper/data"), "1");
    machine.ok("mount -o ro /dev/mapper/data /mnt && seq 1 100000 | cmp - /mnt/numbers && umount /mnt");
    let status = machine.ok("cryptattach status data");
    for told in ["dm-crypt", "read-only", "512 bit key, 4096 byte sectors", &machine.ok(&format!("readlink -f {path}"))]
    {
        assert!(status.contains(told), "{told}: {status}");
    }
    let listed = machine.ok("cryptattach list");
    assert!(listed.contains("\ndata ") && listed.contains(" /dev/mapper/data "), "{listed}");
    machine.ok("cryptattach detach data");
    machine.fails(66, "cryptattach detach data");
    machine.unplug(&disk);
}

fn keyring(machine: &mut Machine) {
    let disk = machine.plug(64 * MIB, DiskOptions::default());
    machine.ok(&format!("cryptattach format {0} && cryptattach attach {0} data", disk.path()));
    let table = machine.ok("dmsetup table --showkeys data");
    assert!(table.contains(" :64:logon:cryptsetup:"), "{table}");
    machine.ok("cryptattach detach data");
    machine.unplug(&disk);
}

fn sectors(machine: &mut Machine) {
    for (bytes, block_bytes, expected) in [(64 * MIB, 512, 4096), (64 * MIB + 512, 512, 512), (64 * MIB, 4096, 4096)] {
        let disk = machine.plug(bytes, DiskOptions { block_bytes, read_only: false });
        machine.ok(&format!("cryptattach format {0} && cryptattach attach {0} data", disk.path()));
        let status: serde_json::Value = serde_json::from_str(&machine.ok("cryptattach status data --json")).unwrap();
        assert_eq!(status["sector_size_bytes"], expected, "{bytes} bytes in blocks of {block_bytes}");
        assert_eq!(machine.ok("blockdev --getss /dev/mapper/data"), expected.to_string());
        machine.ok("cryptattach detach data");
        machine.unplug(&disk);
    }
}

fn options(machine: &mut Machine) {
    let disk = machine.plug(64 * MIB, DiskOptions::default());
    machine.ok(&format!("cryptattach format {}", disk.path()));
    machine.ok(&format!(
        "cryptattach attach {} data --allow-discards --no-read-workqueue --no-write-workqueue",
        disk.path()
    ));
    let table = machine.ok("dmsetup table data");
    for option in ["allow_discards", "no_read_workqueue", "no_write_workqueue"] {
        assert!(table.contains(option), "{option}: {table}");
    }
    machine.ok("cryptattach detach data");
    // What the header asks for is not what the caller asked for.
    let reference =
        machine.ok(&format!("cryptattach key list | tail -1; cryptattach format {} --force --keyslot", disk.path()));
    let reference = reference.lines().last().unwrap();
    machine.ok(&format!(
        "cryptattach key passphrase {reference} | cryptsetup open --key-file=- --allow-discards --persistent {} data &&
         dmsetup table data | grep -q allow_discards && cryptsetup close data",
        disk.path()
    ));
    machine.ok(&format!("cryptattach attach {} data", disk.path()));
    assert!(!machine.ok("dmsetup table data").contains("allow_discards"));
    machine.ok("cryptattach detach data");
    machine.unplug(&disk);
}

fn twice(machine: &mut Machine) {
    let (disk, other) =
        (machine.plug(64 * MIB, DiskOptions::default()), machine.plug(64 * MIB, DiskOptions::default()));
    let (path, other_path) = (disk.path(), other.path());
    machine.ok(&format!("cryptattach format {path} && cryptattach format {other_path}"));
    machine.ok(&format!("cryptattach attach {path} data"));
    let again = machine.sh(&format!("cryptattach attach {path} data"));
    assert_eq!((again.code, again.stdout.trim_end()), (0, "/dev/mapper/data"));
    assert!(again.stderr.contains("is attached already as 'data'"), "{}", again.stderr);
    let refused = machine.fails(73, &format!("cryptattach attach {other_path} data"));
    assert!(refused.contains("the name 'data' is taken: the device-mapper device CRYPT-LUKS2-"), "{refused}");
    let refused = machine.fails(75, &format!("cryptattach attach {path} second"));
    assert!(refused.contains("is attached already, as 'data'"), "{refused}");

    machine.ok("dmsetup create linear --table '0 2048 zero'");
    assert!(machine.fails(73, &format!("cryptattach attach {other_path} linear")).contains("is taken"));
    machine.fails(73, "cryptattach detach linear");
    machine.ok("dmsetup remove linear && cryptattach detach data");
    machine.unplug(&disk);
    machine.unplug(&other);
}

fn busy(machine: &mut Machine) {
    let disk = machine.plug(64 * MIB, DiskOptions::default());
    machine.ok(&format!("cryptattach format {0} && cryptattach attach {0} data", disk.path()));
    machine.ok("mkfs.ext4 -q /dev/mapper/data && mount /dev/mapper/data /mnt");
    let refused = machine.fails(75, "cryptattach detach data");
    assert!(refused.contains("'data' is in use: mounted on /mnt"), "{refused}");
    machine.ok("cryptattach detach data --deferred && echo late >/mnt/late");
    let status = machine.ok("cryptattach status data");
    assert!(status.contains("will be removed when its last user closes it"), "{status}");
    machine.ok("umount /mnt");
    // The kernel removes it a while after it was closed.
    machine.eventually("test ! -e /dev/mapper/data");
    machine.ok(&format!("cryptattach attach {} data && mount /dev/mapper/data /mnt", disk.path()));
    assert_eq!(machine.ok("cat /mnt/late"), "late");
    machine.ok("umount /mnt && cryptattach detach data");
    machine.unplug(&disk);
}

fn vanishing(machine: &mut Machine) {
    let disk = machine.plug(64 * MIB, DiskOptions::default());
    let path = disk.path();
    machine.ok(&format!("cryptattach format {path}"));
    let real = machine.ok(&format!("readlink -f {path}"));
    machine.unplug(&disk);
    assert!(machine.fails(66, &format!("cryptattach attach {real} data")).contains("does not exist"));

    let disk = machine.plug_file(&disk.file, DiskOptions { read_only: true, ..DiskOptions::default() });
    assert!(machine.fails(74, &format!("cryptattach format {} --force", disk.path())).contains("is read-only"));
    machine.ok(&format!("cryptattach attach {} data", disk.path()));
    assert_eq!(machine.ok("blockdev --getro /dev/mapper/data"), "1", "a read-only disk makes a read-only mapping");
    machine.ok("cryptattach detach data");
    machine.unplug(&disk);
    let small = machine.plug(MIB, DiskOptions::default());
    assert!(machine.fails(65, &format!("cryptattach format {}", small.path())).contains("is too small"));
    machine.unplug(&small);
}

fn hostile(machine: &mut Machine) {
    let disk = machine.plug(64 * MIB, DiskOptions::default());
    machine.ok(&format!(
        ": >/keys/empty; cryptsetup luksFormat -q --type luks1 --cipher null --key-size 256 --key-file /keys/empty {}",
        disk.path()
    ));
    let refused = machine.fails(65, &format!("cryptattach attach {} data", disk.path()));
    assert!(refused.contains("cipher is 'cipher_null-ecb'"), "{refused}");
    machine.ok("test ! -e /dev/mapper/data");
    machine.unplug(&disk);
}

fn wrong_key(machine: &mut Machine) {
    let disk = machine.plug(64 * MIB, DiskOptions::default());
    let path = disk.path();
    let reference = machine.ok(&format!("cryptattach format {path}"));
    // Whoever holds the container key, and can write to the store, seals a key of his own for this very volume.
    let header: Value =
        serde_json::from_str(&machine.ok(&format!("cryptsetup luksDump --dump-json-metadata {path}"))).unwrap();
    let digest = &header["digests"]["0"];
    let text = |name: &str| digest[name].as_str().unwrap().to_owned();
    let owner = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(owner.path(), machine.ok("cat /keys/cinder.owner.key")).unwrap();
    let kek = SealedKey::from_json(machine.ok("cat /keys/cinder/kek/1.jwe").as_bytes()).unwrap();
    let kek = Arc::new(container_key::first("cinder", &kek, owner.path()));
    let context = BoundContext {
        key_id: reference["cinder/".len()..].parse().unwrap(),
        volume: Some(machine.ok(&format!("cryptsetup luksUUID {path}")).parse().unwrap()),
        project: None,
        generation: 2,
        ..context()
    };
    let payload = Payload {
        digest: Some(format!("{}:{}:{}:{}", text("hash"), digest["iterations"], text("salt"), text("digest"))),
        ..payload(&VolumeKey::random(KeySize::Bits512).unwrap())
    };
    let content = Content::VolumeKey(payload);
    let sealed = seal(&context, &content, &[Box::new(kek)]).unwrap();
    let sealed = Base64::encode_string(&sealed.to_json());
    machine.ok(&format!("echo {sealed} | base64 -d >/keys/{reference}.jwe"));
    for backend in ["dm-crypt", "userspace"] {
        let refused = machine.fails(65, &format!("cryptattach attach {path} data --backend {backend}"));
        assert!(refused.contains("does not match the digest in the header"), "{refused}");
    }
    machine.ok("test ! -e /dev/mapper/data && test ! -e /dev/disk/by-cryptattach/data");
    machine.unplug(&disk);
}
