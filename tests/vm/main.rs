//! The vm layer: the built binary on real dm-crypt, in one virtual machine that all stories share. Run by
//! `scripts/test vm`; a word on the command line picks the stories whose names contain it.

mod formats;
mod hooks;
mod machine;
mod mapping;
mod separation;
mod speed;

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
    let stories = [mapping::STORIES, hooks::STORIES, formats::STORIES, separation::STORIES].concat();
    let stories: Vec<Story> = stories
        .into_iter()
        .filter(|(name, _)| wanted.is_empty() || wanted.iter().any(|word| name.contains(word.as_str())))
        .collect();
    assert!(!stories.is_empty(), "no story's name contains any of {wanted:?}");
    println!("running {} stories", stories.len());
    let (mut machine, mut failed) = (boot(), 0);
    for (name, story) in &stories {
        let start = Instant::now();
        let told = catch_unwind(AssertUnwindSafe(|| story(&mut machine)));
        println!("story {name} ... {} ({:.1?})", if told.is_ok() { "ok" } else { "FAILED" }, start.elapsed());
        if told.is_err() {
            failed += 1;
            // The next story gets a machine that this one has not left in disorder.
            machine = boot();
        }
    }
    println!("{} passed, {failed} failed", stories.len() - failed);
    ExitCode::from(u8::from(failed > 0))
}

/// A machine with a key disk and a store on it.
fn boot() -> Machine {
    let start = Instant::now();
    let mut machine = Machine::boot();
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
