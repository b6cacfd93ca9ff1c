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

use serde::Serialize;

use super::{Planned, RECORD, key_source::OpenedBy, line, log::Logged, volumes::VolumeNo};
use crate::{
    base::mapping_name::MappingName,
    verbs::{error::Error, explain, failure::Failure as Told},
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
#[derive(Serialize)]
struct Facts {
    version: u32,
    /// Seconds since the kernel started.
    started: f64,
    /// Seconds that the boot took; null while it goes on.
    seconds: Option<f64>,
    /// When a person was asked, in seconds since the start.
    prompt_after: Option<f64>,
    volumes: Vec<VolumeFacts>,
}

#[derive(Serialize)]
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
    seconds: Option<f64>,
    failures: Vec<Failure>,
}

#[derive(Clone, Copy, Serialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
enum Outcome {
    Pending,
    Attached,
    NotOurs,
    NotAttached,
}

#[derive(Serialize)]
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
        let folder = Path::new(RECORD).parent().unwrap_or(Path::new("/run"));
        let _ = DirBuilder::new().recursive(true).mode(0o700).create(folder);
        // Under systemd standard error is the journal already.
        let is_journal = std::env::var_os("JOURNAL_STREAM").is_some();
        let write = |path: &Path| OpenOptions::new().write(true).open(path).ok();
        let kernel = if is_journal { None } else { write(Path::new("/dev/kmsg")) };
        let log = new_file(&folder.join("boot.log")).ok();
        let volumes = planned.iter().map(|planned| VolumeFacts {
            name: planned.name.clone(),
            device: planned.device.to_string(),
            path: planned.device.path().to_owned(),
            several: planned.keys.len() > 1,
            result: Outcome::Pending,
            by: None,
            seconds: None,
            failures: Vec::new(),
        });
        let facts =
            Facts { version: 1, started: uptime(), seconds: None, prompt_after: None, volumes: volumes.collect() };
        let (prompt, warned) = (None, BTreeSet::new());
        let record = Self { start: Instant::now(), is_journal, kernel, log, prompt, warned, facts };
        record.write();
        record
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
    pub fn attached(&mut self, number: VolumeNo, by: &OpenedBy) {
        let seconds = self.seconds();
        let facts = &mut self.facts.volumes[number.index()];
        if facts.result == Outcome::Attached {
            return;
        }
        (facts.result, facts.by, facts.seconds) = (Outcome::Attached, Some(by.to_string()), Some(seconds));
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
        self.say(&told.next.map_or(text.clone(), |next| format!("{text}\n  next: {next}")));
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
        self.facts.seconds = Some(self.seconds());
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
mod tests {
    use std::process::Command;

    /// This test again, in a process of its own, whose standard error takes nothing.
    const PRINTS: &str = "CRYPTATTACH_TEST_PRINTS";

    #[test]
    fn goes_on_where_nobody_listens() {
        if std::env::var_os(PRINTS).is_some() {
            return super::print("nobody reads this\n");
        }
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let name = "boot::record::tests::goes_on_where_nobody_listens";
        let mut again = Command::new(std::env::current_exe().unwrap());
        let again = again.args(["--exact", name, "--nocapture"]).env(PRINTS, "").stderr(full).output().unwrap();
        assert!(again.status.success(), "{again:?}");
    }
}
