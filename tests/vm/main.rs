//! The vm layer: the built binary on real dm-crypt, in one virtual machine that all stories share. Run by
//! `scripts/test vm`; a word on the command line picks the stories whose names contain it.

mod formats;
mod hooks;
mod machine;
mod mapping;
mod separation;
mod speed;
mod ublk;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
    time::Instant,
};

use machine::{DiskOptions, Machine};

type Story = (&'static str, fn(&mut Machine));

fn main() -> ExitCode {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    if wanted == ["bench"] {
        speed::compare(&mut boot());
        return ExitCode::SUCCESS;
    }
    if wanted == ["bench-ublk"] {
        ublk::compare(&mut ublk::boot());
        return ExitCode::SUCCESS;
    }
    let wanted = |stories: Vec<Story>| -> Vec<Story> {
        let is_wanted = |name: &str| wanted.is_empty() || wanted.iter().any(|word| name.contains(word.as_str()));
        stories.into_iter().filter(|(name, _)| is_wanted(name)).collect()
    };
    let on_own = wanted([mapping::STORIES, hooks::STORIES, formats::STORIES, separation::STORIES].concat());
    let on_newer = wanted(if ublk::is_possible() { ublk::STORIES.to_vec() } else { Vec::new() });
    if !ublk::is_possible() {
        println!("the stories of ublk are not told: they need Debian 13's kernel, from Debian's apt sources");
    }
    let count = on_own.len() + on_newer.len();
    assert!(count > 0, "no story's name contains any of these words");
    println!("running {count} stories");
    let failed = tell(&on_own, boot) + tell(&on_newer, ublk::boot);
    println!("{} passed, {failed} failed", count - failed);
    ExitCode::from(u8::from(failed > 0))
}

/// Tells the stories on one machine; the number of those that failed.
fn tell(stories: &[Story], boot: fn() -> Machine) -> usize {
    if stories.is_empty() {
        return 0;
    }
    let (mut machine, mut failed) = (boot(), 0);
    for (name, story) in stories {
        let start = Instant::now();
        let told = catch_unwind(AssertUnwindSafe(|| story(&mut machine)));
        println!("story {name} ... {} ({:.1?})", if told.is_ok() { "ok" } else { "FAILED" }, start.elapsed());
        if told.is_err() {
            failed += 1;
            // The next story gets a machine that this one has not left in disorder.
            machine = boot();
        }
    }
    failed
}

/// A machine with a key disk and a store on it.
fn boot() -> Machine {
    with_store(Machine::boot)
}

fn with_store(boot: impl FnOnce() -> Machine) -> Machine {
    let start = Instant::now();
    let mut machine = boot();
    let keys = machine.plug(32 << 20, DiskOptions::default());
    machine.ok(&format!(
        "mkfs.ext4 -q {} && mount {0} /keys && cd /keys &&
         openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out escrow.key 2>/dev/null &&
         openssl pkey -in escrow.key -pubout -out escrow.pem &&
         mkdir -p /etc/cryptattach && ln -s /keys/cryptattach.toml /etc/cryptattach/cryptattach.toml &&
         cryptattach init --config /keys/cryptattach.toml --store cinder --path /keys/cinder --escrow escrow.pem",
        keys.path()
    ));
    println!("booted in {:.1?}: {}", start.elapsed(), machine.ok("uname -r; cryptsetup --version").replace('\n', ", "));
    machine
}
