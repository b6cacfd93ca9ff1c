//! The key of a volume is rotated while dm-crypt has it and a file system upon it is written to: to the end, paused, killed.

use std::{process::Command, sync::LazyLock};

use serde_json::Value;

use crate::{
    Story,
    machine::{Disk, DiskOptions, Machine},
};

pub const STORIES: &[Story] = &[
    ("a volume in use gets a new key, and loses nothing", to_the_end),
    ("the rotation of a volume in use is paused, and goes on", paused),
    ("a killed rotation of a volume in use is got out of, and goes on", |machine| killed(machine, 3)),
];

const MIB: u64 = 1 << 20;

/// A volume that is attached as `data` and mounted on /mnt, with a file of stamped blocks that is being written to.
struct Written {
    disk: Disk,
    /// The sequence numbers that a writer has had acknowledged.
    acknowledged: Vec<(u64, u64)>,
}

impl Written {
    fn new(machine: &mut Machine, format: &str, attach: &str) -> Self {
        machine.put("/root/writer", &WRITER);
        let disk = machine.plug((16 + 48) * MIB, DiskOptions::default());
        machine.ok(&format!(
            "chmod +x /root/writer && cryptattach format {format} {0} && cryptattach attach {0} data {attach} &&
             mkfs.ext4 -q /dev/mapper/data && mount /dev/mapper/data /mnt && /root/writer fill /mnt/blocks 6144",
            disk.path()
        ));
        let written = Self { disk, acknowledged: Vec::new() };
        written.go_on(machine);
        written
    }

    fn first(&self) -> u64 {
        self.acknowledged.last().map_or(1, |(_, last)| last + 100_000)
    }

    /// Writes, in the background.
    fn go_on(&self, machine: &mut Machine) {
        machine.ok(&format!(
            "rm -f /tmp/told; (/root/writer write /mnt/blocks {} /tmp/told >/tmp/writer 2>&1 </dev/null &)",
            self.first()
        ));
        machine.eventually("[ -s /tmp/told ]");
    }

    /// Ends the writer, if it has not come to its end in the killed rotation's I/O errors.
    fn stop(&mut self, machine: &mut Machine) {
        machine.sh("kill -9 $(pidof writer)");
        machine.eventually("! pidof writer");
        self.acknowledged.push((self.first(), machine.ok("cat /tmp/told").trim().parse().unwrap()));
    }

    /// The writer is at work: what it writes now is acknowledged.
    fn is_written(&self, machine: &mut Machine) -> bool {
        machine.sh("before=$(cat /tmp/told); for i in $(seq 100); do [ \"$before\" = \"$(cat /tmp/told)\" ] || exit 0; sleep 0.1; done; exit 1").code == 0
    }

    /// Each acknowledged block is there, as the disk gives it.
    fn verify(&self, machine: &mut Machine) {
        let ranges: Vec<_> = self.acknowledged.iter().map(|(first, last)| format!("{first}-{last}")).collect();
        let told = machine.ok(&format!("/root/writer verify /mnt/blocks {}", ranges.join(" ")));
        println!("{told}; acknowledged: {ranges:?}");
    }

    /// The same once it was detached.
    fn verify_again(&mut self, machine: &mut Machine) {
        self.stop(machine);
        self.verify(machine);
        machine.ok("umount /mnt && cryptattach detach data");
        self.attach(machine);
        self.verify(machine);
        machine.ok("umount /mnt && cryptattach detach data");
    }

    fn attach(&self, machine: &mut Machine) {
        machine.ok(&format!(
            "cryptattach attach {} data && {{ fsck.ext4 -p /dev/mapper/data || [ $? = 1 ]; }} && mount /dev/mapper/data /mnt",
            self.disk.path()
        ));
    }

    /// Rotates in the background; its exit code will be in /tmp/code.
    fn begin(&self, machine: &mut Machine, options: &str) {
        machine.ok(&format!(
            "rm -f /tmp/code; (sh -c 'cryptattach key rotate {} --json {options} >/tmp/rotated 2>/tmp/progress </dev/null; echo $? >/tmp/code' &) >/dev/null 2>&1",
            self.disk.path()
        ));
    }

    fn status(&self, machine: &mut Machine) -> Value {
        serde_json::from_str(&machine.ok("cryptattach status data --json")).unwrap()
    }
}

/// The program, as the guest's processor runs it.
static WRITER: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("writer");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/vm/writer.c");
    let made = Command::new("cc").args(["-O2", "-s", "-o"]).arg(&program).arg(source).output().expect("no C compiler");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    std::fs::read(program).unwrap()
});

fn to_the_end(machine: &mut Machine) {
    for format in ["", "--keyslot"] {
        let mut written = Written::new(machine, format, "--allow-discards --no-read-workqueue");
        let path = written.disk.path();
        let old = machine.ok("cryptattach key list | head -1");
        let table = machine.ok("dmsetup table data");
        written.begin(machine, "--hotzone 1024");
        machine.eventually("grep -q done_bytes /tmp/progress");
        println!("{}", machine.sh("dmsetup ls; dmsetup info -c; dmsetup table; ls /run/cryptsetup; cat /proc/locks; cryptattach status data; cryptattach list; cryptattach explain; cat /proc/$(pidof cryptattach)/oom_score_adj").stdout);
        let refused = machine.fails(75, "cryptattach detach data");
        assert!(refused.contains("is being rotated now"), "{refused}");
        machine.eventually("[ -e /tmp/code ]");
        assert_eq!(machine.ok("cat /tmp/code"), "0", "{}", machine.ok("tail -3 /tmp/progress"));
        println!(
            "{old}; {}\n{table}\n{}",
            machine.ok("cat /tmp/rotated; tail -1 /tmp/progress"),
            machine.ok("dmsetup table data; dmsetup ls")
        );
        assert!(written.is_written(machine), "the writer goes on");
        written.verify_again(machine);
        println!("{}", machine.ok(&format!("cryptsetup luksDump {path}")));
        machine.unplug(&written.disk);
    }
}

fn paused(machine: &mut Machine) {
    let mut written = Written::new(machine, "", "");
    written.begin(machine, "--rate 4");
    machine.eventually("grep -q '\"done_bytes\":1[0-9]*,' /tmp/progress && kill -TERM $(pidof cryptattach)");
    machine.eventually("[ -e /tmp/code ]");
    assert_eq!(machine.ok("cat /tmp/code"), "83", "{}", machine.ok("tail -3 /tmp/progress"));
    println!("{}", machine.sh("dmsetup ls; dmsetup table data; cryptattach status data; cryptattach list").stdout);
    assert!(written.is_written(machine), "the writer goes on");
    written.begin(machine, "");
    machine.eventually("[ -e /tmp/code ]");
    assert_eq!(machine.ok("cat /tmp/code"), "0", "{}", machine.ok("tail -3 /tmp/progress"));
    written.verify_again(machine);
    machine.unplug(&written.disk);
}

/// Killed at any time; where that has left a stretch suspended, its users are got out of it first. All that was acknowledged is
/// there each time.
fn killed(machine: &mut Machine, times: u32) {
    let mut written = Written::new(machine, "", "");
    let (mut kills, mut left_over, mut hanging) = (0, 0, 0);
    while kills < times {
        written.begin(machine, "--hotzone 512 --delete-old");
        machine.eventually("[ -s /tmp/progress ] || [ -e /tmp/code ]");
        machine.sh(&format!("sleep 0.{:02}; kill -9 $(pidof cryptattach)", (kills * 37 + 5) % 100));
        machine.eventually("[ -e /tmp/code ]");
        if machine.ok("cat /tmp/code") == "0" {
            continue;
        }
        kills += 1;
        println!("{}", machine.sh("cat /tmp/code; tail -n 1 /tmp/progress; dmsetup info -c; cryptattach status data").stdout);
        let status = written.status(machine);
        let Some(trouble) = status["trouble"].as_str() else {
            assert!(written.is_written(machine), "nothing is left below it, and the writer goes on");
            continue;
        };
        left_over += 1;
        hanging += u32::from(trouble.contains("waits"));
        assert!(trouble.contains("was killed, and has left its devices below it"), "{trouble}");
        let path = written.disk.path();
        let refused = machine.fails(75, &format!("cryptattach key rotate {path}"));
        assert!(refused.contains("cryptattach detach data"), "{refused}");
        // It is mounted, so only what waits is ended.
        machine.fails(75, "cryptattach detach data --force");
        written.stop(machine);
        machine.ok("umount /mnt && cryptattach detach data && ! dmsetup ls | grep data");
        written.attach(machine);
        written.verify(machine);
        written.go_on(machine);
        println!("goes on");
    }
    println!("{kills} kills, {left_over} with devices left over, {hanging} with I/O that waits");
    written.begin(machine, "");
    machine.eventually("[ -e /tmp/code ]");
    assert_eq!(machine.ok("cat /tmp/code"), "0", "{}", machine.ok("tail -3 /tmp/progress"));
    written.verify_again(machine);
    machine.unplug(&written.disk);
}
