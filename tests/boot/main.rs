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
    sync::{Arc, Mutex},
    time::Instant,
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
    // What keeps a machine busy is one processor, mostly.
    arguments.test_threads.get_or_insert(2);
    // A story writes into its site, so it has one to itself; one after which a story failed is not used again.
    let sites = Arc::new(Mutex::new(Vec::new()));
    let trial = |(name, story): Story| {
        let sites = Arc::clone(&sites);
        Trial::test(name, move || {
            let left = sites.lock().unwrap().pop();
            let site = left.unwrap_or_else(Site::make);
            let start = Instant::now();
            story(&site, name);
            println!("{name} took {:.0?}", start.elapsed());
            sites.lock().unwrap().push(site);
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
