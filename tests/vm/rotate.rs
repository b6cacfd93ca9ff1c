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
    ("a killed rotation of a volume in use is got out of, and goes on", killed),
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

    fn ends(&self, machine: &mut Machine, code: &str) {
        machine.eventually("[ -e /tmp/code ]");
        assert_eq!(machine.ok("cat /tmp/code"), code, "{}", machine.ok("tail -n 3 /tmp/progress"));
    }

    fn status(&self, machine: &mut Machine) -> Value {
        serde_json::from_str(&machine.ok("cryptattach status data --json")).unwrap()
    }
}

/// The program, as the guest's processor runs it.
pub static WRITER: LazyLock<Vec<u8>> = LazyLock::new(|| {
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
        written.begin(machine, "--rate 8");
        machine.eventually("grep -q done_bytes /tmp/progress");
        assert_eq!(written.status(machine)["rotation"]["state"], "running");
        assert_eq!(machine.ok("cat /proc/$(pidof cryptattach)/oom_score_adj"), "-1000");
        let refused = machine.fails(75, "cryptattach detach data");
        assert!(refused.contains("is being rotated now"), "{refused}");
        machine.fails(75, &format!("cryptattach key rotate {path}"));
        written.ends(machine, "0");
        assert!(machine.ok("cat /tmp/rotated").contains("\"attached\":\"data\""));
        let table = machine.ok("dmsetup table data");
        assert!(table.contains("allow_discards") && table.contains("no_read_workqueue"), "{table}");
        assert_eq!(machine.ok("dmsetup ls | wc -l"), "1");
        assert!(written.is_written(machine), "the writer goes on");
        written.verify_again(machine);
        assert!(!machine.ok(&format!("cryptsetup luksDump {path}")).contains("online-reencrypt"));
        machine.unplug(&written.disk);
    }
}

fn paused(machine: &mut Machine) {
    let mut written = Written::new(machine, "", "");
    written.begin(machine, "--rate 4");
    machine.eventually("grep -q '\"done_bytes\":[1-9]' /tmp/progress && kill -TERM $(pidof cryptattach)");
    written.ends(machine, "83");
    assert!(written.is_written(machine), "the writer goes on");
    let rotation = &written.status(machine)["rotation"];
    assert_eq!(rotation["state"], "paused");
    assert!(
        rotation["next"].as_str().is_some_and(|next| next.starts_with("cryptattach key rotate /dev/")),
        "{rotation}"
    );
    written.begin(machine, "");
    written.ends(machine, "0");
    written.verify_again(machine);
    machine.unplug(&written.disk);
}

/// Killed while it waits between two stretches, then within one, while all that is asked of that waits: what it has put below the
/// mapping stays, and has to go before anything goes on.
fn killed(machine: &mut Machine) {
    let mut written = Written::new(machine, "", "");
    let path = written.disk.path();
    let waits = "dmsetup info data-hotzone-forward 2>/dev/null | grep -q SUSPENDED";
    for moment in [
        "grep -q '\"done_bytes\":[1-9]' /tmp/progress && kill -9 $(pidof cryptattach)".to_owned(),
        // Halted before it is looked at once more: that stays so.
        format!(
            "p=$(pidof cryptattach) && {waits} && kill -STOP $p && if {waits}; then kill -9 $p; else kill -CONT $p; exit 1; fi"
        ),
    ] {
        written.begin(machine, "--rate 2");
        machine.eventually(&format!("for i in $(seq 50); do ( {moment} ) && exit 0; done; exit 1"));
        machine.eventually("[ -e /tmp/code ]");
        let status = written.status(machine);
        let trouble = status["trouble"].as_str().unwrap_or_else(|| panic!("{status}"));
        assert!(trouble.contains("was killed, and has left its devices below it"), "{trouble}");
        assert!(trouble.contains("waits") || !moment.contains("SUSPENDED"), "{trouble}");
        let refused = machine.fails(75, &format!("cryptattach key rotate {path}"));
        assert!(refused.contains("run: cryptattach detach data"), "{refused}");
        // It is mounted; what waits for the stretch that it was killed in can be ended, nothing else.
        machine.fails(75, "cryptattach detach data");
        if trouble.contains("waits") {
            machine.fails(75, "cryptattach detach data --force");
        }
        written.stop(machine);
        machine.ok("umount /mnt && cryptattach detach data && ! dmsetup ls | grep data");
        written.attach(machine);
        written.verify(machine);
        written.go_on(machine);
    }
    written.begin(machine, "");
    written.ends(machine, "0");
    written.verify_again(machine);
    machine.unplug(&written.disk);
}
