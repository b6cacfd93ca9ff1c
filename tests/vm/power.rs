//! The power of the whole machine is cut, again and again, while the key of a volume is rotated: in use, with a writer that knows
//! which of its blocks were acknowledged, or detached, or while an earlier cut is recovered from. Each time the machine boots, goes
//! on, and all data is compared.
//!
//! The guest's memory goes with its process. By chance the disks have a volatile cache, too: then all goes that was written since
//! the last flush, and of a flush that is cut, a part.

use std::{
    collections::BTreeMap,
    fs::File,
    os::unix::fs::FileExt,
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use tempfile::TempDir;

use crate::{
    chance::Chance,
    machine::{Booted, Disk, DiskOptions, Machine},
    rotate::WRITER,
};

pub const STORIES: &[(&str, fn())] = &[("power cuts while a key is rotated lose nothing", few)];

const MIB: u64 = 1 << 20;
/// Of the file that fills the volume, 4096 bytes each.
const BLOCKS: u64 = 4300;
/// A rotation, and what comes before and after it, takes about so long.
const MOST_MILLISECONDS: u64 = 7000;

fn few() {
    cut(2);
}

/// `CUTS` of them.
pub fn many() {
    cut(std::env::var("CUTS").expect("CUTS is not set").parse().unwrap());
}

/// When the power is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum During {
    Online,
    Offline,
    Recovery,
}

/// What stays without power.
struct Site {
    booted: Booted,
    folder: TempDir,
    acknowledged: Vec<(u64, u64)>,
}

/// What does not.
struct Running {
    machine: Machine,
    caches: Vec<Child>,
    volume: String,
    /// The disk on which the writer tells what was acknowledged.
    told: String,
}

fn cut(cuts: u64) {
    let (mut chance, start) = (Chance::new(), Instant::now());
    let mut site = Site::new();
    println!("a booted machine and a volume after {:.1?}", start.elapsed());
    // By kind: those that left no re-encryption under way, one between two stretches, one in a stretch.
    let mut met: BTreeMap<During, [u64; 3]> = BTreeMap::new();
    let (mut volatile, mut is_midway) = (0, false);
    for number in 1..=cuts {
        let start = Instant::now();
        let is_volatile = chance.below(2) == 0;
        let during = match (number % 2, is_midway && chance.below(3) == 0) {
            (_, true) => During::Recovery,
            (0, false) => During::Offline,
            (_, false) => During::Online,
        };
        let mut running = site.power_on(is_volatile);
        let first = site.acknowledged.last().map_or(1, |(_, last)| last + 100_000);
        let (most, how) = match during {
            During::Recovery => {
                // By the boot, or by who goes on.
                let verb = if chance.below(2) == 0 { "attach" } else { "key rotate" };
                running.begin(verb, if verb == "attach" { "data" } else { "" });
                (MOST_MILLISECONDS / 3, verb)
            }
            During::Online | During::Offline => {
                running.recover(chance.below(4) == 0);
                running.verify(&site.acknowledged);
                let rate = ["--json", "--json", "--json --rate 4", "--json --rate 16"][chance.below(4) as usize];
                if during == During::Online {
                    let told = &running.told;
                    let write =
                        format!("(/root/writer write /mnt/blocks {first} {told} >/tmp/writer 2>&1 </dev/null &)");
                    running.machine.ok(&write);
                } else {
                    running.machine.ok("umount /mnt && cryptattach detach data");
                }
                running.begin("key rotate", rate);
                (MOST_MILLISECONDS, rate)
            }
        };
        // From the beginning, or from when data is rewritten.
        let is_late = during != During::Recovery && chance.below(4) != 0;
        if is_late {
            running.wait_for_a_stretch();
        }
        let moment = chance.below(if is_late { most / 4 } else { most });
        thread::sleep(Duration::from_millis(moment));
        running.cut();
        if during == During::Online
            && let Some(last) = site.told()
        {
            site.acknowledged.push((first, last));
        }
        let state = site.state();
        is_midway = state > 0;
        met.entry(during).or_default()[state] += 1;
        volatile += u64::from(is_volatile);
        println!(
            "cut {number}: {during:?} {how}, after {moment} ms{}{}; it leaves {}; {} acknowledged; {:.1?}",
            if is_late { " from the first stretch on" } else { "" },
            if is_volatile { ", with the disks' caches" } else { "" },
            ["no re-encryption", "one between two stretches", "one in a stretch"][state],
            site.acknowledged.last().filter(|(of, _)| *of == first).map_or(0, |(first, last)| last - first + 1),
            start.elapsed(),
        );
    }
    let mut running = site.power_on(false);
    running.recover(true);
    running.verify(&site.acknowledged);
    let keys = running.machine.ok("ls /keys/cinder | grep -c jwe");
    let total = |part: usize| met.values().map(|counts| counts[part]).sum::<u64>();
    println!("\n| power cut during | no re-encryption was under way | between two stretches | in a stretch |");
    println!("|---|---:|---:|---:|");
    for (during, [none, between, within]) in &met {
        println!("| {during:?} | {none} | {between} | {within} |");
    }
    println!("| all {cuts} | {} | {} | {} |", total(0), total(1), total(2));
    let blocks: u64 = site.acknowledged.iter().map(|(first, last)| last - first + 1).sum();
    println!(
        "\nNothing was lost. {volatile} with the disks' caches; {keys} keys; {blocks} blocks acknowledged; {:.0?}",
        start.elapsed()
    );
}

impl Site {
    fn new() -> Self {
        let booted = Booted::new(|machine| {
            machine.put("/root/writer", &WRITER);
            machine.ok(
                "chmod +x /root/writer && mkdir -p /etc/cryptattach && ln -s /keys/cryptattach.toml /etc/cryptattach",
            );
        });
        let folder = tempfile::Builder::new().prefix("cryptattach-vm").tempdir_in("/var/tmp").unwrap();
        let site = Self { booted, folder, acknowledged: Vec::new() };
        for (name, bytes) in [("keys", 32 * MIB), ("volume", (16 + 24) * MIB), ("told", MIB)] {
            File::create(site.file(name)).unwrap().set_len(bytes).unwrap();
        }
        let mut machine = site.booted.power_on();
        let [keys, volume] =
            ["keys", "volume"].map(|name| machine.plug_file(&site.file(name), DiskOptions::default()).path());
        machine.ok(&format!(
            "mkfs.ext4 -q {keys} && mount {keys} /keys && cd /keys &&
             cryptattach init --config /keys/cryptattach.toml --store cinder --path /keys/cinder --no-escrow &&
             sed -i '1i state = \"/keys/state\"' cryptattach.toml && cryptattach format {volume} &&
             cryptattach attach {volume} data && mkfs.ext4 -q -b 4096 -m 0 -J size=4 /dev/mapper/data &&
             mount /dev/mapper/data /mnt && /root/writer fill /mnt/blocks {BLOCKS} && umount /mnt &&
             cryptattach detach data && cd / && umount /keys"
        ));
        machine.cut();
        site
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn power_on(&self, is_volatile: bool) -> Running {
        File::create(self.file("told")).unwrap().set_len(MIB).unwrap();
        let (mut machine, mut caches) = (self.booted.power_on(), Vec::new());
        let mut plug = |name: &str, is_volatile: bool| -> Disk {
            let file = self.file(name);
            if !is_volatile {
                return machine.plug_file(&file, DiskOptions::default());
            }
            let socket = self.file(&format!("{name}.socket"));
            let _ = std::fs::remove_file(&socket);
            // What it has in its cache goes to the file at a flush, and only then.
            let served = Command::new("nbdkit")
                .args(["--foreground", "--exit-with-parent", "--filter=cache", "-U"])
                .arg(&socket)
                .arg("file")
                .arg(&file)
                .args(["cache=writeback", "cache-min-block-size=4K"])
                .env("TMPDIR", self.folder.path())
                .stderr(Stdio::null())
                .spawn();
            caches.push(served.expect("nbdkit is missing: scripts/prerequisites vm"));
            while !socket.exists() {
                thread::sleep(Duration::from_millis(10));
            }
            machine.plug_served(&socket, DiskOptions::default())
        };
        let (keys, volume) = (plug("keys", is_volatile).path(), plug("volume", is_volatile).path());
        let told = plug("told", false).path();
        machine.ok(&format!("mount {keys} /keys"));
        Running { machine, caches, volume, told }
    }

    /// What the disk of the writer's word has.
    fn told(&self) -> Option<u64> {
        let mut line = [0; 20];
        File::open(self.file("told")).unwrap().read_exact_at(&mut line, 0).unwrap();
        std::str::from_utf8(&line).ok()?.trim().parse().ok()
    }

    /// Where the header says that the re-encryption stands.
    fn state(&self) -> usize {
        let dump =
            Command::new("cryptsetup").args(["luksDump", "--dump-json-metadata"]).arg(self.file("volume")).output();
        let json: serde_json::Value = serde_json::from_slice(&dump.unwrap().stdout).unwrap();
        let segments = json["segments"].as_object().unwrap();
        match segments.values().any(|segment| segment["flags"].to_string().contains("in-reencryption")) {
            true => 2,
            false => usize::from(json["config"]["requirements"].to_string().contains("online-reencrypt")),
        }
    }
}

impl Running {
    /// Does something in the background.
    fn begin(&mut self, verb: &str, options: &str) {
        let volume = &self.volume;
        self.machine.ok(&format!(
            "(sh -c 'cryptattach {verb} {volume} {options} >/tmp/said 2>&1 </dev/null; echo $? >/tmp/code' &) >/dev/null 2>&1"
        ));
    }

    /// Waits until the rotation is about to write.
    fn wait_for_a_stretch(&mut self) {
        self.machine.eventually("grep -q done_bytes /tmp/said || [ -e /tmp/code ]");
        self.machine.ok("[ ! -e /tmp/code ] || grep -qx 0 /tmp/code || { cat /tmp/said; exit 1; }");
    }

    /// Attaches and mounts the volume, as a boot does; or has the rotation come to its end before.
    fn recover(&mut self, to_the_end: bool) {
        let volume = &self.volume;
        let first = if to_the_end { format!("cryptattach key rotate {volume} &&") } else { String::new() };
        self.machine.ok(&format!(
            "{first} cryptattach attach {volume} data && {{ fsck.ext4 -p /dev/mapper/data || [ $? = 1 ]; }} &&
             fsck.ext4 -fn /dev/mapper/data && mount /dev/mapper/data /mnt"
        ));
    }

    /// Each acknowledged block is there, or one that was written after it; every other is whole, and one that was written there.
    fn verify(&mut self, acknowledged: &[(u64, u64)]) {
        let ranges: Vec<_> = acknowledged.iter().map(|(first, last)| format!("{first}-{last}")).collect();
        self.machine.ok(&format!("/root/writer verify /mnt/blocks {}", ranges.join(" ")));
    }

    fn cut(mut self) {
        self.machine.cut();
        for cache in &mut self.caches {
            cache.kill().unwrap();
            cache.wait().unwrap();
        }
    }
}
