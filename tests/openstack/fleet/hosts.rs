//! Hosts that boot. Each process of this kind is started by the bench, is told what it is, and prints a line
//! of JSON for each of its hosts, and one for itself.
//!
//! A host is the boot's own way from the reference of a key to the open key, with the boot's own limits: one container for all
//! volumes, a thread for each, log-in, rings, sealed keys, container key. A *process* reads the headers of its volumes as well
//! and proves that key and data are apart. What is left out is the mapping: `Backend::activate` is never called.

use std::{
    env,
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use cryptattach::{
    base::key::KeyId,
    config::Config,
    keys::seal::For,
    unlock::{
        case::{Case, Circumstances},
        container::{Container, Use, ViaLockbox},
    },
    volumes::header,
};
use nix::sys::resource::{UsageWho, getrusage};
use serde::{Deserialize, Serialize};

use super::{count, replay};
use crate::opens::opens;

/// A process that has this in its environment reads what it is from its standard input: a stream is too long for an argument.
const ORDER: &str = "CRYPTATTACH_FLEET";

/// What a process is.
#[derive(Clone, Serialize, Deserialize)]
pub struct Order {
    pub what: What,
    pub hosts: usize,
    /// When the power comes back, in seconds since 1970-01-01 UTC.
    pub begin: f64,
    /// Hosts start within so many seconds after that.
    pub spread: f64,
    /// `boot.total_seconds`
    pub total: f64,
    /// The hosts of this process are every so-manieth, from this one on.
    pub first: usize,
    pub every: usize,
}

#[derive(Clone, Serialize, Deserialize)]
pub enum What {
    /// One host, with the volumes that are beside its configuration.
    Process { config: PathBuf, volumes: Vec<PathBuf> },
    /// Hosts in threads, which take the keys of these hosts in turn.
    Threads { configs: Vec<PathBuf>, keys: Vec<Vec<KeyId>> },
    /// Hosts that send requests which were written down.
    Replay(replay::Stream),
}

/// What is printed.
#[derive(Serialize, Deserialize)]
pub enum Line {
    /// Seconds until a host had all of its keys; or why it never had them.
    Host(Result<f64, String>),
    /// At the end: what the process has asked and used.
    Process { counts: count::Counts, cpu: f64 },
}

/// Does what the environment says, if it says anything.
pub fn ordered() -> Option<ExitCode> {
    env::var_os(ORDER)?;
    let order: Order = serde_json::from_reader(std::io::stdin()).unwrap();
    count::begin();
    let say = |line: &Line| println!("{}", serde_json::to_string(line).unwrap());
    let host = |result| say(&Line::Host(result));
    match &order.what {
        What::Process { config, volumes } => host(order.process(config, volumes)),
        What::Threads { configs, keys } => order.threads(configs, keys, &host),
        What::Replay(stream) => {
            let starts = (0..order.hosts).map(|number| order.start(number)).collect();
            replay::play(stream, starts, &host);
        }
    }
    say(&Line::Process { counts: count::so_far(), cpu: cpu_seconds(UsageWho::RUSAGE_SELF) });
    Some(ExitCode::SUCCESS)
}

/// Processor time.
pub fn cpu_seconds(who: UsageWho) -> f64 {
    let usage = getrusage(who).unwrap();
    [usage.user_time(), usage.system_time()].iter().map(|time| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6).sum()
}

pub fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64()
}

impl Order {
    /// Starts a process that does this.
    pub fn spawn(&self) -> Child {
        let mut command = Command::new("/proc/self/exe");
        let mut child = command.env(ORDER, "").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        serde_json::to_writer(child.stdin.take().unwrap(), self).unwrap();
        child
    }

    /// When a host starts. They are spread evenly, in an order that has nothing to do with their keys.
    pub fn start(&self, number: usize) -> Instant {
        let number = self.first + number * self.every;
        let share = (number as f64 * 0.618_034).fract();
        let at = self.begin + share * self.spread;
        Instant::now() + Duration::from_secs_f64((at - now()).max(0.0))
    }

    /// As `Boot::new` has it.
    fn config(&self, path: &Path) -> Arc<Config> {
        let mut config = Config::read(path).unwrap();
        config.stores.values_mut().for_each(|store| store.network.total_seconds = self.total);
        Arc::new(config)
    }

    fn process(&self, config: &Path, volumes: &[PathBuf]) -> Result<f64, String> {
        let config = self.config(config);
        let container = open(&config)?;
        let one = |device: &PathBuf| {
            let volume = header::find_to_map(device, None, None).map_err(|error| error.to_string())?;
            let reference = volume.luks().and_then(|luks| luks.reference.clone()).ok_or("the header names no key")?;
            let case = Case::of(&config, volume, reference, container.clone()).with_rest(Use::BootByStore);
            let proven = case.and_then(|case| case.prove(Circumstances::default()));
            proven.and_then(|proven| proven.key()).map(drop).map_err(|error| error.to_string())
        };
        // The process was started when the host was: what that took counts.
        let finished = all(volumes, one).map(|()| now());
        finished.map(|now| now - self.begin)
    }

    fn threads(&self, configs: &[PathBuf], keys: &[Vec<KeyId>], say: &(impl Fn(Result<f64, String>) + Sync)) {
        let configs: Vec<_> = configs.iter().map(|path| self.config(path)).collect();
        // Lines are not to be mixed.
        let say = Mutex::new(say);
        let host = |number: usize| {
            let of = (self.first + number * self.every) % configs.len();
            let start = self.start(number);
            thread::sleep(start.saturating_duration_since(Instant::now()));
            let opened = open(&configs[of]).and_then(|container| {
                all(&keys[of], |id| {
                    let places = ViaLockbox::look(container.clone(), *id, For::Any, &|_| Ok(())).places();
                    places.map_err(|error| error.to_string())?;
                    if opens(&container, id) { Ok(()) } else { Err(format!("{id} does not open")) }
                })
            });
            say.lock().unwrap()(opened.map(|()| start.elapsed().as_secs_f64()));
        };
        let numbers: Vec<usize> = (0..self.hosts).collect();
        at_once(&numbers, |number| host(*number));
    }
}

fn open(config: &Config) -> Result<Arc<Container>, String> {
    let container = Container::open(config, &"cinder".parse().unwrap(), None, Use::BootByStore);
    container.map(Arc::new).map_err(|error| error.to_string())
}

/// All at once, as a boot does its volumes; the first that fails.
fn all<T: Sync>(things: &[T], work: impl Fn(&T) -> Result<(), String> + Sync) -> Result<(), String> {
    let failed = Mutex::new(None);
    at_once(things, |thing| {
        if let Err(error) = work(thing) {
            *failed.lock().unwrap() = Some(error);
        }
    });
    failed.into_inner().unwrap().map_or(Ok(()), Err)
}

fn at_once<T: Sync>(things: &[T], work: impl Fn(&T) + Sync) {
    thread::scope(|scope| {
        for thing in things {
            let work = &work;
            thread::Builder::new().stack_size(512 << 10).spawn_scoped(scope, move || work(thing)).unwrap();
        }
    });
}
