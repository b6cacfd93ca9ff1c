//! The boot tests: the distribution's own initramfs, with our hook, boots a machine from an encrypted root. Run by
//! `scripts/test vm`; its arguments are those of `cargo test`. The benchmarks are ignored stories. Consoles are kept in
//! target/boot-logs.

mod attackers;
mod bench;
#[path = "../common/image.rs"]
mod image;
mod machine;
#[path = "../common/qemu.rs"]
mod qemu;
mod site;
mod sources;
mod stories;
mod swift;
#[path = "../common/token_program.rs"]
mod token_program;
#[path = "../common/tpm_process.rs"]
mod tpm_process;

use std::{
    path::Path,
    process::ExitCode,
    sync::{Arc, LazyLock},
};

use libtest_mimic::{Arguments, Trial};
use site::Site;

type Story = (&'static str, fn(&Site, &str));

fn main() -> ExitCode {
    // QEMU starts this program for each connection that the guest makes.
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let [verb, folder] = words.as_slice()
        && verb == "swift-connection"
    {
        swift::serve(Path::new(folder));
        return ExitCode::SUCCESS;
    }
    let mut arguments = Arguments::from_args();
    // Stories write into the same site.
    arguments.test_threads = Some(1);
    let site = Arc::new(LazyLock::new(Site::make));
    let trial = |(name, story): Story| {
        let site = Arc::clone(&site);
        Trial::test(name, move || {
            story(&site, name);
            Ok(())
        })
    };
    let mut trials: Vec<Trial> =
        [stories::STORIES, sources::STORIES, attackers::STORIES].concat().into_iter().map(trial).collect();
    let benches: [Story; 2] =
        [("bench-boot", |site, _| bench::compare(site)), ("bench-initramfs", |site, _| bench::grow(site))];
    trials.extend(benches.into_iter().map(|bench| trial(bench).with_ignored_flag(true)));
    libtest_mimic::run(&arguments, trials).exit_code()
}
