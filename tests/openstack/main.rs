//! The openstack layer: the built binary and the library against real Keystone, Swift and Barbican, which all stories
//! share. Run by `scripts/test openstack`; its arguments are those of `cargo test`. What takes long is an ignored story.

mod access;
#[path = "../common/bao.rs"]
#[allow(dead_code)] // the host layer asks it for more
mod bao;
mod barbican;
#[path = "../common/chance.rs"]
mod chance;
mod cloud;
#[path = "../common/container_key.rs"]
mod container_key;
mod failures;
mod fleet;
mod fresh;
mod hooks;
mod journey;
mod keys;
mod letters;
mod lies;
mod lockbox;
#[path = "../common/manufacture.rs"]
mod manufacture;
mod moves;
#[path = "../common/opens.rs"]
mod opens;
#[allow(dead_code)] // the cloud layer asks it for more
mod operator;
#[path = "../host/page.rs"]
mod page;
mod placement;
mod rotations;
#[path = "../common/sealing.rs"]
mod sealing;
#[path = "../common/shell.rs"]
mod shell;
mod speed;
#[path = "../common/store_suite.rs"]
mod store_suite;
mod stores;
#[path = "../common/swtpm.rs"]
#[allow(dead_code)] // the host layer asks it for more
mod swtpm;
#[path = "../common/tangd.rs"]
#[allow(dead_code)] // the host layer asks it for more
mod tangd;
mod tenants;
#[path = "../common/tpm_process.rs"]
mod tpm_process;

use std::{
    process::ExitCode,
    sync::{Arc, LazyLock},
};

use cloud::Cloud;
use libtest_mimic::{Arguments, Trial};

type Story = (&'static str, fn(&Cloud));

fn main() -> ExitCode {
    // One of many hosts.
    if let Some(exit) = fleet::ordered() {
        return exit;
    }
    let mut arguments = Arguments::from_args();
    // A story may stop a server.
    arguments.test_threads = Some(1);
    // The first story starts the servers; they end when no story needs them any more.
    let cloud = Arc::new(LazyLock::new(Cloud::up));
    let trial = |(name, story): Story| {
        let cloud = Arc::clone(&cloud);
        Trial::test(name, move || {
            // The story before may have left servers stopped.
            cloud.repair();
            story(&cloud);
            Ok(())
        })
    };
    let stories = [
        stores::STORIES,
        keys::STORIES,
        access::STORIES,
        letters::STORIES,
        journey::STORIES,
        failures::STORIES,
        lies::STORIES,
        lockbox::STORIES,
        placement::STORIES,
        hooks::STORIES,
        tenants::STORIES,
        fresh::STORIES,
        barbican::STORIES,
        moves::STORIES,
        rotations::STORIES,
    ];
    let mut stories = stories.concat();
    if hooks::other_clients().is_some() {
        stories.retain(|(name, _)| name.contains("os_brick") || name.contains("castellan"));
    }
    let mut trials: Vec<Trial> = stories.into_iter().map(trial).collect();
    let on_demand: [Story; 3] =
        [("bench-stores", speed::compare), ("bench-fleet", fleet::storm), ("torture-keys", rotations::two_hundred)];
    trials.extend(on_demand.map(|story| trial(story).with_ignored_flag(true)));
    libtest_mimic::run(&arguments, trials).exit_code()
}
