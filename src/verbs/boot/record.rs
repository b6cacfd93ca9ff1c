//! What a boot tells: a line on the console at once, the same in the kernel's log, from where the journal takes it, and a
//! record in /run for programs. `cryptattach explain` tells the failures later.

use std::{
    collections::BTreeSet,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    process,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use super::{
    BootError, Planned, RECORD,
    key_source::OpenedBy,
    latch::LatchNews,
    line,
    log::Logged,
    opened::{self, Evidence, Opened},
    volumes::VolumeNo,
};
use crate::{
    base::{hex, mapping_name::MappingName},
    keys::tpm::pcr_after,
    unlock::{self, lockbox::LockboxError},
    verbs::{error::Error, explain, failure::Failure as Told},
    volumes::{backend::BackendKind, header::Volume},
};

/// The record of a boot.
pub struct Record {
    start: Instant,
    is_journal: bool,
    kernel: Option<File>,
    log: Option<File>,
    /// What is asked on the console now.
    prompt: Option<String>,
    /// What the log has warned of.
    warned: BTreeSet<String>,
    facts: Facts,
}

/// `/run/cryptattach/boot.json`
#[derive(Serialize, Deserialize)]
struct Facts {
    version: u32,
    /// Seconds since the kernel started.
    started: f64,
    /// Seconds that the boot took; null while it goes on.
    seconds: Option<f64>,
    /// When a person was asked, in seconds since the start.
    prompt_after: Option<f64>,
    volumes: Vec<VolumeFacts>,
    /// What has become of PCR 15; null while the boot goes on.
    latch: Option<LatchFacts>,
    /// Why the lockbox was closed; null if it was not.
    lockbox_closed: Option<String>,
}

/// What has become of PCR 15.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "pcr15")]
enum LatchFacts {
    /// It is extended.
    Extended {
        /// By SHA-256 of this,
        event: String,
        /// and by nothing else; or not by this, for something else had extended it before.
        measured: bool,
        /// It has this value.
        value: String,
    },
    /// That is not proven.
    NotExtended { why: String },
    /// No key of a TPM opens anything in this boot.
    NotWanted,
}

#[derive(Serialize, Deserialize)]
struct VolumeFacts {
    name: MappingName,
    device: String,
    #[serde(skip)]
    path: PathBuf,
    /// It has several keys, so that a failure has to say of which it is.
    #[serde(skip)]
    several: bool,
    result: Outcome,
    /// What attached it: a key's reference, or "passphrase".
    by: Option<String>,
    #[serde(flatten)]
    evidence: Evidence,
    seconds: Option<f64>,
    failures: Vec<Failure>,
}

#[derive(Clone, Copy, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
enum Outcome {
    Pending,
    Attached,
    NotOurs,
    NotAttached,
    /// It was attached, and taken away from a system that is not this host's own.
    Detached,
}

#[derive(Serialize, Deserialize)]
struct Failure {
    source: String,
    /// The reason, as an exit code of `cryptattach attach`.
    reason: u8,
    error: String,
    next: Option<String>,
    seconds: f64,
}

impl Record {
    /// Begins with what is planned.
    pub fn begin(planned: &[Planned]) -> Self {
        let volumes = planned.iter().map(|planned| VolumeFacts {
            name: planned.name.clone(),
            device: planned.device.to_string(),
            path: planned.device.path().to_owned(),
            several: planned.keys.len() > 1,
            result: Outcome::Pending,
            by: None,
            evidence: Evidence::default(),
            seconds: None,
            failures: Vec::new(),
        });
        Self::of(volumes.collect(), false)
    }

    /// Goes on with the record of a boot that was killed, or that could not extend PCR 15; `None` if nothing is left to do.
    pub fn unfinished() -> Option<Self> {
        let is_left = |facts: &Facts| match facts.latch {
            Some(LatchFacts::NotExtended { .. }) | None => true,
            Some(LatchFacts::Extended { .. } | LatchFacts::NotWanted) => facts.seconds.is_none(),
        };
        let facts = Facts::read();
        facts.as_ref().is_none_or(is_left).then(|| Self::going_on(facts))
    }

    /// Goes on with the record of a boot that has ended.
    pub fn go_on() -> Self {
        Self::going_on(Facts::read())
    }

    fn going_on(facts: Option<Facts>) -> Self {
        let record = Self::of(Vec::new(), true);
        Self { facts: facts.unwrap_or(record.facts), ..record }
    }

    /// The volumes that are attached and proven to be this host's own.
    pub fn proven(&self) -> Vec<MappingName> {
        let is_proven = |facts: &&VolumeFacts| facts.result == Outcome::Attached && facts.evidence.proven;
        self.facts.volumes.iter().filter(is_proven).map(|facts| facts.name.clone()).collect()
    }

    /// A volume was detached for this reason, or cannot be.
    pub fn detached(&mut self, name: &MappingName, why: &str, detached: Result<BackendKind, Error>) {
        match detached {
            Ok(_) => {
                let volumes = self.facts.volumes.iter_mut();
                volumes.filter(|facts| facts.name == *name).for_each(|facts| facts.result = Outcome::Detached);
                self.say(&format!("{name} was detached: {why}"));
                self.write();
            }
            Err(error) => self.tell("detach", Some(Path::new(name.as_str())), &error),
        }
    }

    fn of(volumes: Vec<VolumeFacts>, goes_on: bool) -> Self {
        let folder = Path::new(RECORD).parent().unwrap_or(Path::new("/run"));
        let _ = DirBuilder::new().recursive(true).mode(0o700).create(folder);
        // Under systemd standard error is the journal already.
        let is_journal = std::env::var_os("JOURNAL_STREAM").is_some();
        let write = |path: &Path| OpenOptions::new().write(true).open(path).ok();
        let kernel = if is_journal { None } else { write(Path::new("/dev/kmsg")) };
        let log = folder.join("boot.log");
        let log = if goes_on { OpenOptions::new().append(true).open(log) } else { new_file(&log) }.ok();
        let (latch, lockbox_closed) = (None, None);
        let facts =
            Facts { version: 1, started: uptime(), seconds: None, prompt_after: None, volumes, latch, lockbox_closed };
        let (prompt, warned) = (None, BTreeSet::new());
        let record = Self { start: Instant::now(), is_journal, kernel, log, prompt, warned, facts };
        if !goes_on {
            record.write();
        }
        record
    }

    /// What an unfinished boot has opened, as it is measured.
    pub fn event(&self) -> String {
        let is_attached = |facts: &&VolumeFacts| facts.result == Outcome::Attached;
        let evidence = |facts| Some(facts).filter(is_attached).map(|facts| &facts.evidence);
        opened::event(self.facts.volumes.iter().map(|facts| (&facts.name, evidence(facts))))
    }

    /// What has become of PCR 15, which was to be extended by this event; whether that has been told before.
    pub fn latched(&mut self, news: &LatchNews, event: String) -> bool {
        let is_known = match (&self.facts.latch, news) {
            (Some(LatchFacts::NotExtended { why }), LatchNews::NotLatched(now)) => why == now,
            _ => false,
        };
        self.facts.latch = Some(match news {
            LatchNews::Latched(value) => {
                self.note("PCR 15 is latched");
                LatchFacts::Extended { measured: *value == pcr_after(&event), event, value: hex::encode(value) }
            }
            LatchNews::NotLatched(why) => LatchFacts::NotExtended { why: why.clone() },
            LatchNews::Nothing => LatchFacts::NotWanted,
        });
        self.write();
        is_known
    }

    /// The lockbox is closed, for this reason, or cannot be. If it was not open, a person need not know.
    pub fn lockbox_shut(&mut self, why: String, shut: Result<bool, LockboxError>) {
        let error = BootError::LockboxShut(why.clone()).into();
        match shut {
            Ok(true) => self.tell("close the lockbox", None, &error),
            Ok(false) => self.note(&line(&error)),
            Err(error) => self.tell("close the lockbox", None, &unlock::Error::from(error).into()),
        }
        self.facts.lockbox_closed.get_or_insert(why);
        self.write();
    }

    /// Says a failure of the boot as a whole, and keeps it for `explain`.
    pub fn tell(&mut self, action: &str, device: Option<&Path>, error: &Error) {
        explain::note::<()>(action, device, None, Err(error));
        self.say_failure(line(error), Told::of(error).next);
    }

    fn say_failure(&mut self, text: String, next: Option<String>) {
        let next = next.map(|next| format!("\n  next: {next}")).unwrap_or_default();
        self.say(&(text + &next));
    }

    /// Says a line, or a few at once.
    pub fn say(&mut self, text: &str) {
        // The journal knows who says it.
        let who = if self.is_journal { "" } else { "cryptattach: " };
        let lines: String = text.lines().map(|line| format!("{who}{line}\n")).collect();
        match &self.prompt {
            // What is being typed goes on below.
            Some(prompt) if !self.is_journal => print(&format!("\n{lines}{prompt}")),
            _ => print(&lines),
        }
        text.lines().for_each(|line| self.note(line));
    }

    /// Says a line of the log. Several volumes and sources may ask one server: what is the matter with it, is said once.
    pub fn logged(&mut self, logged: &Logged) {
        let problem = logged.problem.as_ref().unwrap_or(&logged.text);
        if !logged.is_warning || self.warned.insert(problem.clone()) {
            self.say(&logged.text);
        }
    }

    /// Writes a line down that the console does not show.
    pub fn note(&mut self, text: &str) {
        if let Some(log) = &mut self.log {
            let _ = writeln!(log, "[{:8.3}] {text}", uptime());
        }
        if let Some(kernel) = &mut self.kernel {
            // Facility daemon, level debug: on the console it has been said (syslog(2)). One write is one message.
            let _ = kernel.write_all(format!("<31>cryptattach[{}]: {text}\n", process::id()).as_bytes());
        }
    }

    /// A volume is attached.
    pub fn attached(&mut self, number: VolumeNo, Opened { by, evidence }: &Opened) {
        let seconds = self.seconds();
        let facts = &mut self.facts.volumes[number.index()];
        if facts.result == Outcome::Attached {
            return;
        }
        (facts.result, facts.by, facts.seconds) = (Outcome::Attached, Some(by.to_string()), Some(seconds));
        facts.evidence = evidence.clone();
        // Why a person had to be asked is still to be explained later.
        if matches!(by, OpenedBy::Store(_) | OpenedBy::Lockbox(_)) {
            explain::note("attach at boot", Some(&facts.path), Some(&facts.name), Ok(()));
        }
        let text = format!("{} is attached, by {by}, after {seconds:.1} s", facts.name);
        self.say(&text);
        self.write();
    }

    /// A source has failed for good.
    pub fn failed(&mut self, number: VolumeNo, by: &OpenedBy, error: &Error) {
        let (seconds, told) = (self.seconds(), Told::of(error));
        let facts = &mut self.facts.volumes[number.index()];
        if facts.result == Outcome::Attached {
            return;
        }
        let of = match by {
            OpenedBy::Store(_) | OpenedBy::Lockbox(_) if facts.several => format!("{by}: "),
            _ => String::new(),
        };
        let text = format!("{}: {of}{}", facts.name, line(error));
        explain::note::<()>("attach at boot", Some(&facts.path), Some(&facts.name), Err(error));
        facts.failures.push(Failure {
            source: by.to_string(),
            reason: told.exit_code,
            error: line(error),
            next: told.next.clone(),
            seconds,
        });
        self.say_failure(text, told.next);
        self.write();
    }

    /// A volume is none of ours.
    pub fn not_ours(&mut self, number: VolumeNo, why: Option<&Error>) {
        let facts = &mut self.facts.volumes[number.index()];
        facts.result = Outcome::NotOurs;
        let why = why.map_or_else(|| "it has no token of cryptattach".to_owned(), line);
        let text = format!("{} is left to the system: {why}", facts.name);
        self.note(&text);
        self.write();
    }

    /// A person is asked.
    pub fn prompt_shown(&mut self, text: String) {
        let seconds = self.seconds();
        self.facts.prompt_after.get_or_insert(seconds);
        self.prompt = Some(text);
        self.write();
    }

    /// A person has answered, or need not any more.
    pub fn prompt_gone(&mut self) {
        self.prompt = None;
    }

    /// The boot continues without the volumes that are left; `after` that time, if it is over.
    pub fn end(&mut self, left: &[VolumeNo], after: Option<Duration>) {
        let seconds = self.seconds();
        // Of the boot itself, if that came to its end and left a step to be done again.
        self.facts.seconds.get_or_insert(seconds);
        for facts in self.facts.volumes.iter_mut().filter(|facts| facts.result == Outcome::Pending) {
            facts.result = Outcome::NotAttached;
        }
        if !left.is_empty() {
            let names: Vec<&str> = left.iter().map(|number| self.facts.volumes[number.index()].name.as_str()).collect();
            let why = after.map_or("automatically".to_owned(), |total| format!("within {} s", total.as_secs()));
            let text = format!("could not unlock {} {why}; falling back to the system's own unlock", names.join(", "));
            self.say(&text);
        }
        self.write();
    }

    fn seconds(&self) -> f64 {
        (self.start.elapsed().as_secs_f64() * 1000.0).round() / 1000.0
    }

    /// The record must not fail a boot.
    fn write(&self) {
        if let Ok(json) = serde_json::to_vec(&self.facts) {
            let unfinished = format!("{RECORD}.new");
            let written = new_file(Path::new(&unfinished)).and_then(|mut file| file.write_all(&json));
            let _ = written.and_then(|()| fs::rename(&unfinished, RECORD));
        }
    }
}

impl Facts {
    fn read() -> Option<Self> {
        serde_json::from_slice(&fs::read(RECORD).ok()?).ok()
    }
}

/// What earlier runs of this boot attached: it may have been started more than once.
#[derive(Default)]
pub struct Earlier(Vec<VolumeFacts>);

impl Earlier {
    /// What the record says. To be read before another is begun.
    pub fn read() -> Self {
        Self(Facts::read().map(|facts| facts.volumes).unwrap_or_default())
    }

    /// What is known of a planned volume that is attached already.
    pub fn of(&self, planned: &Planned, volume: &Volume) -> Opened {
        let is_it = |facts: &&VolumeFacts| {
            facts.name == planned.name
                && facts.evidence.header == volume.luks().map(|luks| luks.digest.clone())
                && facts.device == planned.device.to_string()
                && facts.result == Outcome::Attached
        };
        match self.0.iter().find(is_it) {
            Some(facts) => Opened { by: OpenedBy::Earlier, evidence: facts.evidence.clone() },
            None => Opened { by: OpenedBy::Before, evidence: Evidence::default() },
        }
    }
}

/// What becomes of a volume, as the record calls it.
pub const RESULTS: [&str; 5] = ["pending", "attached", "not-ours", "not-attached", "detached"];

/// What this boot left behind, for those who count.
pub struct Numbers {
    /// How long it took; `None` while it goes on.
    pub seconds: Option<f64>,
    /// One of [`RESULTS`] for each volume.
    pub results: Vec<&'static str>,
    /// The exit code of each failure.
    pub reasons: Vec<u8>,
}

/// `None` if there was no boot of ours.
pub fn numbers() -> Option<Numbers> {
    Facts::read().map(|Facts { seconds, volumes, .. }| Numbers {
        seconds,
        results: volumes.iter().map(|facts| RESULTS[facts.result as usize]).collect(),
        reasons: volumes.iter().flat_map(|facts| facts.failures.iter().map(|failure| failure.reason)).collect(),
    })
}

/// What this boot left behind, for `explain`; nothing if there was none.
pub fn left_behind() -> Vec<String> {
    Facts::read().as_ref().map(lines).unwrap_or_default()
}

fn lines(facts: &Facts) -> Vec<String> {
    let volume = |facts: &VolumeFacts| match (facts.result, &facts.by) {
        (Outcome::Attached, Some(by)) => {
            let proven = if facts.evidence.proven { "" } else { ", which does not prove that it is this host's own" };
            format!("  {} was attached, by {by}{proven}", facts.name)
        }
        _ => format!("  {} was not attached", facts.name),
    };
    let mut lines = vec!["this boot:".to_owned()];
    lines.extend(facts.volumes.iter().map(volume));
    lines.push(match &facts.latch {
        Some(LatchFacts::Extended { measured: true, value, .. }) => {
            format!("  PCR 15 is extended, by what was opened: {value}")
        }
        Some(LatchFacts::Extended { value, .. }) => format!("  PCR 15 is extended, by other events, too: {value}"),
        Some(LatchFacts::NotExtended { why }) => format!("  PCR 15 is not extended: {why}"),
        Some(LatchFacts::NotWanted) => "  PCR 15 was left alone".to_owned(),
        None => "  it has not ended yet".to_owned(),
    });
    lines.extend(facts.lockbox_closed.as_ref().map(|why| format!("  the lockbox was closed: {why}")));
    lines
}

/// A file for root only, in place of the one that is there: failures quote stores and other hosts.
fn new_file(path: &Path) -> io::Result<File> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => OpenOptions::new().write(true).create_new(true).mode(0o600).open(path),
    }
}

/// A console that has gone, or a journal that is just restarted, is no reason to end a boot.
fn print(text: &str) {
    let _ = io::stderr().write_all(text.as_bytes());
}

/// Seconds since the kernel started.
fn uptime() -> f64 {
    let text = fs::read_to_string("/proc/uptime").unwrap_or_default();
    text.split(' ').next().and_then(|seconds| seconds.parse().ok()).unwrap_or(0.0)
}

#[cfg(test)]
mod tests;
