//! The boot tests: the distribution's own initramfs, with our hook, boots a machine from an encrypted root. Run by
//! `scripts/test vm`; a word on the command line picks the stories whose names contain it. Consoles are kept in target/boot-logs.

mod bench;
#[path = "../common/image.rs"]
mod image;
mod machine;
mod site;
mod stories;
mod swift;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    process::ExitCode,
    time::Instant,
};

use site::Site;

type Story = (&'static str, fn(&Site, &str));

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    // QEMU starts this program for each connection that the guest makes.
    if let [verb, folder] = arguments.as_slice()
        && verb == "swift-connection"
    {
        swift::serve(Path::new(folder));
        return ExitCode::SUCCESS;
    }
    if arguments == ["bench"] {
        bench::compare(&Site::make());
        return ExitCode::SUCCESS;
    }
    let wanted = |name: &str| arguments.is_empty() || arguments.iter().any(|word| name.contains(word.as_str()));
    let stories: Vec<Story> = stories::STORIES.iter().copied().filter(|(name, _)| wanted(name)).collect();
    assert!(!stories.is_empty(), "no story's name contains any of {arguments:?}");
    println!("running {} stories", stories.len());
    let (site, mut failed) = (Site::make(), 0);
    for (name, story) in &stories {
        let start = Instant::now();
        let told = catch_unwind(AssertUnwindSafe(|| story(&site, name)));
        println!("story {name} ... {} ({:.1?})", if told.is_ok() { "ok" } else { "FAILED" }, start.elapsed());
        failed += usize::from(told.is_err());
    }
    println!("{} passed, {failed} failed", stories.len() - failed);
    ExitCode::from(u8::from(failed > 0))
}
