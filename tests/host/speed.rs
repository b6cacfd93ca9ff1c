//! `bench-tpm`: a boot with 24 volumes by the lockbox, next to a clevis tpm2 unlock per volume with the same TPM.

use std::{
    fs::{self, File},
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use cryptattach::{
    base::key::KeyReference,
    config::Config,
    keys::seal::For,
    unlock::{
        case::{Asked, Case, Circumstances},
        container::{Container, Use, ViaLockbox},
    },
    volumes::header,
};

use crate::opens::opens;
use crate::{
    enrol::stage::{Host, Stage},
    shell::sh,
    wiretap::{Taken, Wiretap},
};

const VOLUMES: usize = 24;
const BOOTS: usize = 3;

/// What clevis unlocks with: a policy session each time, bound to PCR 7.
const CLEVIS: &str = r#"{"pcr_bank":"sha256","pcr_ids":"7"}"#;

/// Times of one kind.
#[derive(Default)]
struct Times(Vec<Duration>);

impl Times {
    fn add<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let done = work();
        self.0.push(start.elapsed());
        done
    }

    fn median(&self) -> Duration {
        let mut sorted = self.0.clone();
        sorted.sort();
        sorted[sorted.len() / 2]
    }

    /// The sum, as a boot has it.
    fn per_boot(&self) -> Duration {
        self.0.iter().sum::<Duration>() / BOOTS as u32
    }
}

struct Volume {
    path: String,
    reference: KeyReference,
    /// For clevis: a key of 64 bytes, in clear and sealed.
    key: String,
    sealed: String,
}

#[test]
#[ignore = "a measurement: make bench-tpm"]
fn bench_tpm() {
    let stage = Stage::new();
    let mut host = stage.host("bench");
    stage.enrols(&host);
    let volumes: Vec<_> = (0..VOLUMES).map(|number| volume(&stage, &host, number)).collect();

    // Commands are counted in a boot of their own: the tap takes time.
    let tap = Wiretap::on(&host.swtpm.socket());
    let tapped = host.by_tcti("tapped.toml", &tap.tcti());
    host.ok(&["--config", &tapped, "lockbox", "open"]);
    let open = tap.taken();
    let count = |work: &dyn Fn(&Volume)| {
        volumes.iter().for_each(work);
        tap.taken()
    };
    let attach = |volume: &Volume| {
        let name = host.mapping();
        host.ok(&["--config", &tapped, "attach", &volume.path, &name, "--backend", "userspace"]);
        host.ok(&["detach", &name]);
    };
    let tapped_config = Config::read(tapped.as_ref()).unwrap();
    let (attaches, again_taken) = (count(&attach), count(&attach));
    let store_taken = count(&|volume| key(&tapped_config, &volume.reference, false));
    let entry_taken = count(&|volume| key(&tapped_config, &volume.reference, true));
    let unmapped_taken = count(&|volume| unmapped(&tapped_config, volume));
    let started_taken = count(&|_| drop(host.ok(&["--config", &tapped, "--version"])));
    let clevis = count(&|volume| decrypt(volume, &tap.tcti()));

    let (mut opening, mut first, mut again, mut entry) =
        (Times::default(), Times::default(), Times::default(), Times::default());
    let (mut from_store, mut decrypting) = (Times::default(), Times::default());
    let (mut starting, mut unmapping) = (Times::default(), Times::default());
    let config = Config::read(host.file("cryptattach.toml").as_ref()).unwrap();
    for _ in 0..BOOTS {
        host.reboots();
        let _ = fs::remove_dir_all(host.file("lockbox"));
        opening.add(|| host.ok(&["lockbox", "open"]));
        // Clevis and we in turn: both have the same neighbours on this machine.
        let names: Vec<_> = volumes
            .iter()
            .map(|volume| {
                let name = format!("{}{}", host.mapping(), first.0.len());
                first.add(|| host.ok(&["attach", &volume.path, &name, "--backend", "userspace"]));
                decrypting.add(|| decrypt(volume, &host.swtpm.tcti()));
                name
            })
            .collect();
        names.iter().for_each(|name| drop(host.ok(&["detach", name])));
        for volume in &volumes {
            let name = host.mapping();
            again.add(|| host.ok(&["attach", &volume.path, &name, "--backend", "userspace"]));
            host.ok(&["detach", &name]);
            starting.add(|| host.ok(&["--version"]));
            unmapping.add(|| unmapped(&config, volume));
            entry.add(|| key(&config, &volume.reference, true));
            from_store.add(|| key(&config, &volume.reference, false));
        }
    }

    println!("{VOLUMES} volumes, {BOOTS} boots, in turn, swtpm (a program, not a chip); load {}", load());
    println!("{:<58} {:>8} {:>9} {:>10} {:>12}", "", "commands", "sessions", "median ms", "per boot ms");
    row("lockbox open, with the latch", open, &opening);
    row("cryptattach attach, key from the store, each", attaches, &first);
    row("cryptattach attach, key from the lockbox's entry, each", again_taken, &again);
    row("  of that all but the mapping (in process)", unmapped_taken, &unmapping);
    row("  of that the key alone (in process), from the entry", entry_taken, &entry);
    row("  the key alone (in process), from the store", store_taken, &from_store);
    row("  a process that does nothing", started_taken, &starting);
    row("clevis decrypt (tpm2, PCR 7), each", clevis, &decrypting);
    let ours = opening.per_boot() + first.per_boot();
    let (ours_took, theirs_took) = (open.commands + attaches.commands, clevis.commands);
    println!("ratios, clevis / cryptattach");
    println!(
        "  TPM commands of a boot        {theirs_took:>6} / {ours_took:<6} = {:.1}",
        theirs_took as f64 / ours_took as f64
    );
    println!(
        "  policy sessions of a boot     {:>6} / {:<6} = {:.1}",
        clevis.policy_sessions,
        open.policy_sessions + attaches.policy_sessions,
        clevis.policy_sessions as f64 / (open.policy_sessions + attaches.policy_sessions) as f64
    );
    let of_times = |name: &str, theirs: Duration, ours: Duration| {
        let (theirs, ours) = (milliseconds(theirs), milliseconds(ours));
        println!("  {name:<28}  {theirs:>6.0} / {ours:<6.0} = {:.1}", theirs / ours);
    };
    of_times("ms of a boot", decrypting.per_boot(), ours);
    of_times("ms of a further volume", decrypting.median(), again.median());
    of_times("ms of that without mapping", decrypting.median(), starting.median() + unmapping.median());
}

/// One volume of the host's, and a key that clevis seals to its TPM.
fn volume(stage: &Stage, host: &Host<'_>, number: usize) -> Volume {
    let (path, reference) = stage.volume_and_key(&format!("volume-{number}"));
    // What it leaves in the TPM, a resource manager takes away; swtpm has none.
    let (key, sealed) = (host.file(&format!("{number}.key")), host.file(&format!("{number}.jwe")));
    sh(&format!(
        "head -c 64 /dev/urandom >{key} && export TPM2TOOLS_TCTI={} && clevis encrypt tpm2 '{CLEVIS}' <{key} >{sealed} && \
         tpm2_flushcontext -t && tpm2_flushcontext -l",
        host.swtpm.tcti()
    ));
    Volume { path, reference: reference.parse().unwrap(), key, sealed }
}

/// What a boot has to do for a volume with clevis, without the mapping.
fn decrypt(volume: &Volume, tcti: &str) {
    let output = Command::new("clevis")
        .args(["decrypt", "tpm2"])
        .env("TPM2TOOLS_TCTI", tcti)
        .stdin(File::open(&volume.sealed).unwrap())
        .stderr(Stdio::piped())
        .output()
        .expect("clevis is missing: scripts/prerequisites bench-tpm");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stdout == fs::read(Path::new(&volume.key)).unwrap(), "clevis gave another key");
}

/// All that attach does before it maps, in this process: header, separation, key.
fn unmapped(config: &Config, volume: &Volume) {
    let header = header::probe(volume.path.as_ref(), None).unwrap();
    let case = Case::find(config, header, Asked::default()).unwrap();
    case.prove(Circumstances::default()).unwrap().key().unwrap();
}

/// What it does for the key alone, from the store or from the lockbox's entry.
fn key(config: &Config, reference: &KeyReference, from_entry: bool) {
    let used = if from_entry { Use::Unlock } else { Use::Keys };
    let container = Arc::new(Container::open(config, &reference.store, None, used).unwrap());
    match from_entry {
        true => assert!(ViaLockbox::look(container, reference.key, For::Any, &|_| Ok(())).has_entry()),
        false => assert!(opens(&container, &reference.key)),
    }
}

fn row(name: &str, taken: Taken, times: &Times) {
    let Taken { commands, policy_sessions: sessions } = taken;
    let (median, sum) = (milliseconds(times.median()), milliseconds(times.per_boot()));
    println!("{name:<58} {commands:>8} {sessions:>9} {median:>10.1} {sum:>12.0}");
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn load() -> String {
    fs::read_to_string("/proc/loadavg").unwrap().split(' ').next().unwrap().to_owned()
}
