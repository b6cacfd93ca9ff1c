//! The openstack layer: the built binary and the library against real Keystone, Swift and Barbican, which all stories
//! share. Run by `scripts/test openstack`; a word on the command line picks the stories whose names contain it.

mod access;
mod barbican;
mod cloud;
mod failures;
mod fresh;
mod hooks;
mod keys;
mod lies;
mod lockbox;
mod placement;
#[path = "../common/shell.rs"]
mod shell;
mod speed;
mod stores;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
    time::Instant,
};

use cloud::Cloud;

type Story = (&'static str, fn(&Cloud));

fn main() -> ExitCode {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    if wanted == ["bench"] {
        speed::compare(&Cloud::up());
        return ExitCode::SUCCESS;
    }
    let stories = [
        stores::STORIES,
        keys::STORIES,
        access::STORIES,
        failures::STORIES,
        lies::STORIES,
        lockbox::STORIES,
        placement::STORIES,
        hooks::STORIES,
        fresh::STORIES,
        barbican::STORIES,
    ]
    .concat();
    let stories: Vec<Story> = stories
        .into_iter()
        .filter(|(name, _)| wanted.is_empty() || wanted.iter().any(|word| name.contains(word.as_str())))
        .collect();
    assert!(!stories.is_empty(), "no story's name contains any of {wanted:?}");
    println!("running {} stories", stories.len());
    let start = Instant::now();
    let cloud = Cloud::up();
    println!("servers up in {:.1?}", start.elapsed());
    let mut failed = 0;
    for (name, story) in &stories {
        let start = Instant::now();
        let told = catch_unwind(AssertUnwindSafe(|| story(&cloud)));
        println!("story {name} ... {} ({:.1?})", if told.is_ok() { "ok" } else { "FAILED" }, start.elapsed());
        failed += usize::from(told.is_err());
        // The next story finds all servers running, whatever this one did to them.
        cloud.repair();
    }
    println!("{} passed, {failed} failed", stories.len() - failed);
    drop(cloud);
    ExitCode::from(u8::from(failed > 0))
}
