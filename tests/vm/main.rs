//! The vm layer: the built binary on real dm-crypt, in a virtual machine that stories share, the Debian package in one that
//! boots with systemd, and machines with a TPM that boot for their stories, installed ones among them. The last ones run beside
//! the others, for a machine that boots keeps one processor busy. Run by `scripts/test vm`; a word on the command line picks the
//! stories whose names contain it.

#[path = "../common/image.rs"]
mod image;
#[path = "../common/manufacture.rs"]
mod manufacture;
#[expect(dead_code, reason = "loop devices are the host layer's")]
#[path = "../common/shell.rs"]
mod shell;

mod formats;
mod hooks;
mod hotplug;
mod installed;
mod machine;
mod mapping;
mod measured;
mod separation;
mod speed;
mod token;
mod tpm;
mod ublk;
mod units;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
    thread,
    time::Instant,
};

use machine::{DiskOptions, Init, Machine};

type Story = (&'static str, fn(&mut Machine));

fn main() -> ExitCode {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    if wanted == ["bench"] {
        speed::compare(&mut boot(Init::Plain));
        return ExitCode::SUCCESS;
    }
    if wanted == ["bench-ublk"] {
        ublk::compare(&mut ublk::boot());
        return ExitCode::SUCCESS;
    }
    let is_wanted = |name: &str| wanted.is_empty() || wanted.iter().any(|word| name.contains(word.as_str()));
    let among = |stories: &[&[Story]]| -> Vec<Story> {
        stories.concat().into_iter().filter(|(name, _)| is_wanted(name)).collect()
    };
    let plain = among(&[mapping::STORIES, hooks::STORIES, formats::STORIES, separation::STORIES]);
    let systemd = among(&[token::STORIES, hotplug::STORIES, units::STORIES]);
    let newer = among(&[if ublk::is_possible() { ublk::STORIES } else { &[] }]);
    if !ublk::is_possible() {
        println!(
            "the stories of ublk and of installed machines are not told: they need Debian 13, from Debian's apt sources"
        );
    }
    let machines = [tpm::STORIES, installed::stories()].concat();
    let machines: Vec<_> = machines.iter().filter(|(name, _)| is_wanted(name)).collect();
    let count = plain.len() + systemd.len() + newer.len() + machines.len();
    assert!(count > 0, "no story's name contains any of these words");
    println!("running {count} stories");
    let failed = thread::scope(|scope| {
        let beside = scope.spawn(|| machines.iter().filter(|(name, story)| !succeeds(name, story)).count());
        let shared =
            tell(&plain, || boot(Init::Plain)) + tell(&systemd, || boot(Init::Systemd)) + tell(&newer, ublk::boot);
        shared + beside.join().unwrap()
    });
    println!("{} passed, {failed} failed", count - failed);
    ExitCode::from(u8::from(failed > 0))
}

/// Tells the stories on one machine; the number of those that failed.
fn tell(stories: &[Story], boot: fn() -> Machine) -> usize {
    let (mut machine, mut failed) = (None, 0);
    for (name, story) in stories {
        if !succeeds(name, || story(machine.get_or_insert_with(boot))) {
            failed += 1;
            // The next story gets a machine that this one has not left in disorder.
            machine = None;
        }
    }
    failed
}

fn succeeds(name: &str, story: impl FnOnce()) -> bool {
    let start = Instant::now();
    let told = catch_unwind(AssertUnwindSafe(story)).is_ok();
    println!("story {name} ... {} ({:.1?})", if told { "ok" } else { "FAILED" }, start.elapsed());
    told
}

/// A machine with a key disk and a store on it.
fn boot(init: Init) -> Machine {
    boot_release(init, None)
}

/// The same on another release.
fn boot_release(init: Init, release: Option<&str>) -> Machine {
    let start = Instant::now();
    let mut machine = Machine::boot_release(init, release);
    if init == Init::Systemd {
        machine.ok("apt-get install -qq --no-install-recommends /tools/cryptattach.deb");
    }
    let keys = machine.plug(32 << 20, DiskOptions::default());
    // One that boots has its configuration where it is found before anything is mounted.
    let config = match init {
        Init::Plain => "/keys/cryptattach.toml",
        Init::Systemd => "/etc/cryptattach/cryptattach.toml",
    };
    machine.ok(&format!(
        "mkfs.ext4 -q {} && echo {0} /keys ext4 nofail >>/etc/fstab && mount {0} /keys && cd /keys &&
         openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out escrow.key 2>/dev/null &&
         openssl pkey -in escrow.key -pubout -out escrow.pem && mkdir -p /etc/cryptattach &&
         cryptattach init --config {config} --store cinder --path /keys/cinder --escrow escrow.pem &&
         {{ [ -e /etc/cryptattach/cryptattach.toml ] || ln -s {config} /etc/cryptattach; }}",
        keys.path()
    ));
    println!("booted in {:.1?}: {}", start.elapsed(), machine.ok("uname -r; cryptsetup --version").replace('\n', ", "));
    machine
}
