//! The ublk export: on Debian 13's kernel, for Debian 12's has no ublk.

use crate::{
    Story,
    machine::{DiskOptions, Init, Machine},
};

pub const STORIES: &[Story] = &[
    ("ublk: dm-crypt reads what ublk wrote, and ublk what dm-crypt wrote", agrees),
    ("ublk: a file system, discards, flushes", file_system),
    ("ublk: detach names the holder", busy),
    ("ublk: a killed worker is reported and cleaned up", killed),
    ("ublk: a device that fails is an error", failing),
];

const MIB: u64 = 1 << 20;

/// Where a guest with ublk is known.
pub fn is_possible() -> bool {
    std::fs::read_to_string("/etc/os-release").is_ok_and(|text| text.lines().any(|line| line == "ID=debian"))
}

pub fn boot() -> Machine {
    let mut machine = crate::boot_release(Init::Plain, Some("trixie"));
    machine.ok("test -e /dev/ublk-control");
    machine
}

fn agrees(machine: &mut Machine) {
    for format in ["--type luks2 --sector-size 4096", "--type luks2 --sector-size 512 --key-size 256"] {
        let disk = machine.plug(48 * MIB, DiskOptions::default());
        let path = disk.path();
        machine.ok(&format!(
            "head -c 64 /dev/urandom >/keys/pass
             cryptsetup luksFormat -q {format} --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --key-file /keys/pass {path}"
        ));
        let reference = machine.ok(&format!("cryptattach key import {path} --key-file /keys/pass"));
        let attach = format!("cryptattach attach {path} data --key {reference}");
        machine.ok(&format!("{attach} && head -c 262144 /dev/urandom >/tmp/one"));
        machine.ok("dd if=/tmp/one of=/dev/mapper/data bs=4096 seek=5 conv=fsync,notrunc status=none && cryptattach detach data");
        let device = machine.ok(&format!("{attach} --backend userspace"));
        assert_eq!(device, "/dev/disk/by-cryptattach/data");
        assert!(machine.ok(&format!("readlink {device}")).starts_with("/dev/ublkb"), "ublk is taken where it is there");
        machine.ok(&format!(
            "tail -c +20481 {device} | head -c 262144 | cmp - /tmp/one && head -c 262144 /dev/urandom >/tmp/two &&
             dd if=/tmp/two of={device} bs=4096 seek=300 conv=fsync,notrunc oflag=direct status=none"
        ));
        machine.ok("cryptattach status data --json | grep -q '\"export\":\"ublk\"'");
        machine.ok("cryptattach detach data && ! ls /dev/ublkb* /dev/ublkc* 2>/dev/null");
        machine.ok(&format!("{attach} && tail -c +1228801 /dev/mapper/data | head -c 262144 | cmp - /tmp/two"));
        machine.ok("cryptattach detach data");
        machine.unplug(&disk);
    }
}

fn file_system(machine: &mut Machine) {
    let disk = machine.plug(96 * MIB, DiskOptions::default());
    let path = disk.path();
    machine.ok(&format!("cryptattach format {path}"));
    let attach = format!("cryptattach attach {path} data --backend userspace");
    let device = machine.ok(&format!("{attach} --export ublk --allow-discards"));
    machine.ok(&format!(
        "mkfs.ext4 -q {device} && mount -o discard {device} /mnt && seq 1 300000 >/mnt/numbers && cp /mnt/numbers /mnt/more &&
         sync && rm /mnt/more && fstrim /mnt && umount /mnt && e2fsck -fn {device}"
    ));
    machine.ok("cryptattach detach data");
    let device = machine.ok(&format!("{attach} --export fuse --read-only"));
    machine.ok(&format!("mount -o ro {device} /mnt && seq 1 300000 | cmp - /mnt/numbers; umount /mnt"));
    machine.ok("cryptattach detach data");
    let device = machine.ok(&format!("{attach} --export ublk --read-only"));
    machine.ok(&format!("mount -o ro {device} /mnt && seq 1 300000 | cmp - /mnt/numbers; umount /mnt"));
    machine.fails(1, &format!("dd if=/dev/zero of=$(readlink {device}) bs=4096 count=1 oflag=direct"));
    machine.ok("cryptattach detach data");
    machine.unplug(&disk);
}

fn busy(machine: &mut Machine) {
    let disk = machine.plug(64 * MIB, DiskOptions::default());
    let path = disk.path();
    machine.ok(&format!("cryptattach format {path}"));
    let device = machine.ok(&format!("cryptattach attach {path} data --backend userspace --export ublk"));
    machine.ok(&format!("mkfs.ext4 -q {device} && mount {device} /mnt"));
    let refused = machine.fails(75, "cryptattach detach data");
    assert!(refused.contains("mounted on /mnt"), "{refused}");
    let refused = machine.fails(71, "cryptattach detach data --deferred");
    assert!(refused.contains("last user"), "{refused}");
    machine.ok("echo works >/mnt/still && umount /mnt");
    let script = format!(
        "exec 4<{device}; sleep 60 <&4 & exec 4<&-; cryptattach detach data; code=$?; kill $!; wait; exit $code"
    );
    let refused = machine.fails(75, &script);
    assert!(refused.contains("sleep"), "{refused}");
    machine.ok("cryptattach detach data");
    machine.unplug(&disk);
}

fn killed(machine: &mut Machine) {
    let disk = machine.plug(64 * MIB, DiskOptions::default());
    let path = disk.path();
    machine.ok(&format!("cryptattach format {path}"));
    let attach = format!("cryptattach attach {path} data --backend userspace --export ublk");
    let device = machine.ok(&attach);
    machine.ok(&format!("mkfs.ext4 -q {device} && mount {device} /mnt && echo kept >/mnt/kept && sync -f /mnt"));
    machine.ok("kill -9 $(pgrep -f userspace-worker)");
    machine.ok(
        "for i in $(seq 100); do cryptattach status data | grep -q 'trouble .*worker has died' && exit 0; sleep 0.1; done; exit 1",
    );
    machine.ok(
        "umount /mnt; cryptattach detach data && test ! -e /run/cryptattach/data && ! ls /dev/ublk[bc]* 2>/dev/null",
    );
    let device = machine.ok(&attach);
    machine.ok(&format!("e2fsck -fy {device} >/dev/null || test $? -le 1"));
    machine.ok(&format!("mount {device} /mnt && grep -q kept /mnt/kept; umount /mnt"));
    // Told to end, it ends.
    machine.ok("kill -TERM $(pgrep -f userspace-worker)");
    machine.ok("for i in $(seq 100); do test -e /run/cryptattach/data || exit 0; sleep 0.1; done; exit 1");
    machine.unplug(&disk);
}

fn failing(machine: &mut Machine) {
    let disk = machine.plug(64 * MIB, DiskOptions::default());
    let path = disk.path();
    machine.ok(&format!("cryptattach format {path}"));
    // From 32 MiB on, the disk is gone.
    machine.ok(&format!(
        "dmsetup create bad --table \"$(printf '0 65536 linear %s 0\\n65536 65536 error' {path})\" && udevadm settle"
    ));
    let device = machine.ok("cryptattach attach /dev/mapper/bad data --backend userspace --export ublk");
    machine.ok(&format!("dd if=/dev/zero of={device} bs=1M count=8 oflag=direct conv=notrunc status=none"));
    let error =
        machine.fails(1, &format!("dd if=/dev/zero of={device} bs=1M seek=20 count=1 oflag=direct conv=notrunc"));
    assert!(error.contains("Input/output error"), "{error}");
    let error = machine.fails(1, &format!("dd if={device} of=/dev/null bs=1M skip=20 count=1 iflag=direct"));
    assert!(error.contains("Input/output error"), "{error}");
    machine.ok("cryptattach detach data && dmsetup remove bad");
    machine.unplug(&disk);
}

/// Megabytes per second through ublk next to FUSE + loop, interleaved, in this very machine; prints medians and ratios.
pub fn compare(machine: &mut Machine) {
    const ROUNDS: usize = 3;
    machine.ok("truncate -s 96M /dev/shm/volume && cryptattach format --allow-shared /dev/shm/volume");
    let work = [
        "if={} of=/dev/null iflag=direct bs=1M count=64",
        "if=/dev/zero of={} oflag=direct bs=1M count=64",
        "if={} of=/dev/null iflag=direct bs=4k count=2000",
        "if=/dev/zero of={} oflag=direct bs=4k count=2000",
    ];
    let mut rates = [const { [const { Vec::new() }; 4] }; 2];
    for _ in 0..ROUNDS {
        for (way, export) in ["ublk", "fuse"].iter().enumerate() {
            let device =
                machine.ok(&format!("cryptattach attach /dev/shm/volume data --allow-shared --export {export}"));
            for (at, work) in work.iter().enumerate() {
                let dd = work.replace("{}", &device);
                let text = machine.ok(&format!(
                    "s=$(date +%s%N); dd {dd} conv=notrunc status=none; e=$(date +%s%N); echo $((e - s))"
                ));
                let bytes = if at < 2 { 64e6 * 1.048_576 } else { 2000.0 * 4096.0 };
                rates[way][at].push(bytes * 1e3 / text.parse::<f64>().unwrap());
            }
            machine.ok("cryptattach detach data");
        }
    }
    let [ublk, fuse] = rates.map(|way| {
        way.map(|mut rates| {
            rates.sort_by(f64::total_cmp);
            rates[ROUNDS / 2]
        })
    });
    println!("MB/s, medians of {ROUNDS} rounds, interleaved, in one virtual machine (emulated processor):");
    for (at, what) in ["1 MiB read", "1 MiB write", "4 KiB read, depth 1", "4 KiB write, depth 1"].iter().enumerate() {
        println!("{what:<22} ublk {:>8.1}  fuse {:>8.1}  ratio {:.2}", ublk[at], fuse[at], ublk[at] / fuse[at]);
    }
}
