//! The vm layer: the built binary on real dm-crypt, in a virtual machine that stories share, the Debian package in one that
//! boots with systemd, and machines with a TPM that boot for their stories, installed ones among them. Two stories run at a
//! time, for a machine that boots keeps one processor busy. Run by `scripts/test vm`; its arguments are those of `cargo test`.
//! The benchmarks are ignored stories.

#[path = "../common/chance.rs"]
mod chance;
#[path = "../common/container_key.rs"]
mod container_key;
#[path = "../common/image.rs"]
mod image;
#[path = "../common/manufacture.rs"]
mod manufacture;
#[path = "../common/page_words.rs"]
mod page_words;
#[path = "../common/qemu.rs"]
mod qemu;
#[path = "../common/sealing.rs"]
mod sealing;
#[expect(dead_code, reason = "loop devices and mappings are of the layers that run on this host")]
#[path = "../common/shell.rs"]
mod shell;
#[path = "../common/tpm_process.rs"]
mod tpm_process;

mod bind;
mod formats;
mod hooks;
mod hotplug;
mod installed;
mod machine;
mod mapping;
mod measured;
mod midway;
mod power;
mod rotate;
mod separation;
mod speed;
mod token;
mod tpm;
mod ublk;
mod units;

use std::{
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use libtest_mimic::{Arguments, Trial};
use machine::{DiskOptions, Init, Machine};

type Story = (&'static str, fn(&mut Machine));

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(2);
    // The longest stories first.
    let mut trials: Vec<Trial> =
        tpm::STORIES.iter().chain(power::STORIES).map(own_machine).chain(installed::trials()).collect();
    let plain =
        [mapping::STORIES, hooks::STORIES, formats::STORIES, midway::STORIES, separation::STORIES, rotate::STORIES]
            .concat();
    let systemd = [token::STORIES, hotplug::STORIES, units::STORIES].concat();
    let newer = sharing(ublk::boot, ublk::STORIES).map(|trial| trial.with_ignored_flag(!ublk::is_possible()));
    // Stories of two machines in turn: a story waits while another one has its machine.
    let beside = sharing(|| boot(Init::Systemd), &systemd).chain(newer);
    let mut shared: Vec<_> = sharing(|| boot(Init::Plain), &plain).enumerate().chain(beside.enumerate()).collect();
    shared.sort_by_key(|(place, _)| *place);
    trials.extend(shared.into_iter().map(|(_, trial)| trial));
    let benches = sharing(|| boot(Init::Plain), &[("bench-attach", speed::compare)])
        .chain(sharing(ublk::boot, &[("bench-ublk", ublk::compare)]));
    let benches = benches.chain([own_machine(&("power-cuts", power::many))]);
    let benches = benches.chain(bind::BENCHES.iter().chain(bind::STORIES).map(own_machine));
    trials.extend(benches.map(|trial| trial.with_ignored_flag(true)));
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// A story that boots machines of its own.
fn own_machine((name, story): &(&str, fn())) -> Trial {
    let story = *story;
    let taking = format!("{name} took");
    Trial::test(*name, move || {
        let start = Instant::now();
        story();
        println!("{taking} {:.0?}", start.elapsed());
        Ok(())
    })
}

/// Stories that share a machine: the first of them boots it, and it ends after the last.
fn sharing(boot: fn() -> Machine, stories: &[Story]) -> impl Iterator<Item = Trial> {
    let shared = Arc::new(Mutex::new(None));
    stories.iter().map(move |(name, story)| {
        let (story, shared, taking) = (*story, Arc::clone(&shared), format!("{name} took"));
        Trial::test(*name, move || {
            let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
            let start = Instant::now();
            // A story that fails takes its machine along: the next one boots another.
            let mut machine = shared.take().unwrap_or_else(boot);
            story(&mut machine);
            println!("{taking} {:.0?}", start.elapsed());
            *shared = Some(machine);
            Ok(())
        })
    })
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
        Init::Systemd | Init::OneDisk => "/etc/cryptattach/cryptattach.toml",
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
