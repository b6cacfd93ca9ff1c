//! Boot: list the volumes, wait for their devices, ask all sources at once and a person besides, attach each volume as
//! soon as its key is there, and say what happened.
//!
//! Nothing here waits without a bound, and nothing waits for another: each volume and each of its sources has a thread of
//! its own, and whoever has the key first attaches the volume. What still runs at the end is left to end with the process.

pub mod command_line;
pub mod crypttab_entries;
pub mod doctor;
mod error;
pub mod image;
mod initrd;
mod key_source;
mod latch;
mod lockbox_once;
mod log;
mod mounts;
mod plan;
mod progress;
mod prompt;
mod record;
mod volumes;

use std::{
    sync::{
        Arc,
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    thread,
    time::{Duration, Instant},
};

pub use error::BootError;
pub use log::{Log, Reports};
pub use plan::{Planned, Which, plan};

use self::{
    key_source::{OpenedBy, Sources},
    latch::LatchNews,
    log::Logged,
    progress::{Action, Change, Progress, PromptNo},
    prompt::{Answer, Prompt},
    record::Record,
    volumes::{FoundVolume, VolumeNo},
};
use crate::{
    base::chain::chain, config::Config, keys::seal::identities, unlock, verbs::error::Error, volumes::Unlocked,
};

/// Where a boot leaves its record for those who look later; a tmpfs that outlives the initramfs.
pub const RECORD: &str = "/run/cryptattach/boot.json";

/// How long the end of a boot waits for the TPM: for a lockbox that is being opened, and to extend PCR 15, for which old chips
/// take half a second.
const LONGEST_LATCH: Duration = Duration::from_secs(10);

/// What the threads tell the boot.
enum Report {
    /// A wait has begun; so there is a time to tell of it.
    Waiting,
    /// A line of the log.
    Logged(Logged),
    /// The lockbox is open.
    LockboxOpened,
    /// Something that there is to decide upon.
    Changed(Change),
}

#[cfg(test)]
impl Report {
    /// The event of the log, if it is one.
    fn logged(self) -> Option<Logged> {
        match self {
            Self::Logged(logged) => Some(logged),
            _ => None,
        }
    }
}

/// The threads of a boot, and what it shows and tells. [`Progress`] decides.
struct Boot {
    config: Arc<Config>,
    progress: Progress,
    sources: Arc<Sources>,
    record: Record,
    reports: Receiver<Report>,
    sender: Sender<Report>,
    prompt: Option<Prompt>,
}

/// Attaches the volumes of this boot; `crypttab` is its text, if it is another than this boot's.
pub fn boot(config: Config, crypttab: Option<&str>, reports: Reports) -> Result<(), Error> {
    let planned = plan(&config, crypttab, Which::This);
    let mut boot = Boot::new(config, planned, reports);
    boot.start();
    while !boot.progress.is_over(Instant::now()) {
        boot.step();
    }
    boot.end()
}

/// For a boot that was killed: what it would have done at its end, lest the TPM opens a key again in this boot.
pub fn finish(config: &Config) -> Result<(), Error> {
    let lockbox = config.lockbox.iter().flat_map(|lockbox| &lockbox.identities);
    let identities = config.stores.values().flat_map(|store| &store.sealing.identities).chain(lockbox);
    if identities::need_tpm(identities) {
        latch::latch(config)?;
    }
    Ok(())
}

impl Boot {
    fn new(mut config: Config, planned: Vec<Planned>, reports: Reports) -> Self {
        // A store that is not there yet may come: it is tried as long as the boot lasts.
        for store in config.stores.values_mut() {
            store.network.total_seconds = config.boot.total.as_secs_f64();
        }
        let config = Arc::new(config);
        let Reports { sender, receiver: reports } = reports;
        let record = Record::begin(&planned);
        let progress = Progress::new(config.clone(), planned, Instant::now());
        let sources = Arc::new(Sources::new(config.clone(), progress.deadline(), sender.clone()));
        Self { config, progress, sources, record, reports, sender, prompt: None }
    }

    /// Waits for each volume's device.
    fn start(&self) {
        for (number, awaited) in self.progress.volumes().iter() {
            let (planned, sources) = (awaited.planned.clone(), self.sources.clone());
            self.spawn(move || look_for(number, &planned, &sources));
        }
    }

    /// Runs this in a thread of its own, which reports what has changed.
    fn spawn(&self, work: impl FnOnce() -> Change + Send + 'static) {
        let sender = self.sender.clone();
        thread::spawn(move || drop(sender.send(Report::Changed(work()))));
    }

    fn step(&mut self) {
        let deadline = self.progress.deadline();
        let ticks = [self.sources.waits.next_due(), self.progress.prompt_due()];
        let next = ticks.into_iter().flatten().fold(deadline, Instant::min);
        match self.reports.recv_timeout(next.saturating_duration_since(Instant::now())) {
            Ok(report) => self.take(report),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
        }
        self.tell_waits();
        if let Some(action) = self.progress.tick(Instant::now()) {
            self.carry_out(action);
        }
    }

    fn take(&mut self, report: Report) {
        match report {
            Report::Waiting => {}
            Report::Logged(logged) => self.record.logged(&logged),
            Report::LockboxOpened => self.record.note("the lockbox is open"),
            Report::Changed(change) => self.change(change),
        }
    }

    fn change(&mut self, change: Change) {
        for action in self.progress.take(change, Instant::now()) {
            self.carry_out(action);
        }
    }

    fn tell_waits(&mut self) {
        let is_pending = |number: VolumeNo| self.progress.volumes()[number].is_pending();
        for line in self.sources.waits.due(Instant::now(), is_pending) {
            let line = format!("waiting for {line}");
            // It goes on: no reason to disturb the person who types.
            if self.progress.is_asking() { self.record.note(&line) } else { self.record.say(&line) }
        }
    }

    fn carry_out(&mut self, action: Action) {
        match action {
            Action::Ask(number, found, by) => {
                let sources = self.sources.clone();
                self.spawn(move || {
                    match sources.fetch(number, &found.volume, &by).and_then(|unlocked| found.attach(&unlocked)) {
                        Ok(()) => Change::Attached(number, by),
                        Err(error) => Change::Failed(number, by, error),
                    }
                });
            }
            Action::Try(number, found, passphrase) => self.spawn(move || {
                let unlocked = Unlocked::by_passphrase(&found.volume, &passphrase).map_err(Error::from);
                Change::Tried(number, unlocked.and_then(|unlocked| found.attach(&unlocked)))
            }),
            Action::ShowPrompt(prompt, volumes) => self.show_prompt(prompt, &volumes),
            Action::PromptAnswered => {
                if let Some(prompt) = self.prompt.take() {
                    prompt.answered();
                }
                self.record.prompt_gone();
            }
            Action::TakePromptAway => {
                self.prompt = None;
                self.record.prompt_gone();
            }
            Action::TellAttached(number, by) => self.record.attached(number, &by),
            Action::TellFailed(number, by, error) => self.record.failed(number, &by, &error),
            Action::TellWrongPassphrase(number) => {
                let name = &self.progress.volumes()[number].planned.name;
                self.record.say(&format!("the passphrase does not open {name}"));
            }
            Action::TellNotOurs(number, why) => self.record.not_ours(number, why.as_ref()),
        }
    }

    fn names(&self, volumes: &[VolumeNo]) -> Vec<String> {
        volumes.iter().map(|number| self.progress.volumes()[*number].planned.name.to_string()).collect()
    }

    fn show_prompt(&mut self, number: PromptNo, volumes: &[VolumeNo]) {
        let names = self.names(volumes);
        let text = format!("Please unlock disk {} (it is being opened automatically, too): ", names.join(", "));
        match Prompt::show(&text, names.first().map(String::as_str).unwrap_or_default()) {
            Some(Ok((prompt, answer))) => {
                self.record.prompt_shown(text);
                self.prompt = Some(prompt);
                return self.spawn(move || Change::Answered(number, Answer::read(answer)));
            }
            Some(Err(error)) => self.record.say(&format!("cannot ask for a passphrase: {error}")),
            None => {}
        }
        self.change(Change::Answered(number, None));
    }

    /// The log's lines; what else comes now is too late.
    fn take_what_was_said(&mut self) {
        let reports: Vec<Report> = self.reports.try_iter().collect();
        let said = reports.into_iter().filter(|report| !matches!(report, Report::Changed(_)));
        said.for_each(|report| self.take(report));
    }

    /// The latch, but no wait for a TPM that hangs.
    fn latch(&mut self) {
        let (sender, done) = mpsc::channel();
        let sources = self.sources.clone();
        thread::spawn(move || sender.send(sources.latch()));
        let latched = done.recv_timeout(LONGEST_LATCH);
        self.take_what_was_said();
        match latch::news(latched.ok()) {
            LatchNews::Latched => self.record.note("PCR 15 is latched"),
            LatchNews::Nothing => {}
            LatchNews::NotLatched(why) => self.record.say(&why),
        }
    }

    fn end(mut self) -> Result<(), Error> {
        self.carry_out(Action::TakePromptAway);
        let time_is_over = Instant::now() >= self.progress.deadline();
        let left = self.progress.left();
        let sources = self.sources.clone();
        for action in self.progress.too_late(|number| sources.waits.of(number)) {
            self.carry_out(action);
        }
        self.latch();
        self.sources.unmount();
        self.take_what_was_said();
        self.record.end(&left, time_is_over.then_some(self.config.boot.total));
        let names = self.names(&left);
        if names.is_empty() { Ok(()) } else { Err(BootError::Unfinished(names).into()) }
    }
}

/// Waits for a volume's device, and looks whether the volume is ours.
fn look_for(number: VolumeNo, planned: &Planned, sources: &Sources) -> Change {
    let found = match sources.find(number, planned) {
        Ok(volume) => FoundVolume::new(volume, planned),
        // What crypttab lists may be anything.
        Err(error @ Error::Unlock(unlock::Error::Volume(_))) if !planned.configured => {
            return Change::NotOurs(number, Some(error));
        }
        Err(error) => return Change::Failed(number, OpenedBy::Device, error),
    };
    if found.is_attached() {
        return Change::Attached(number, OpenedBy::Before);
    }
    let has_token = found.volume.luks().is_some_and(|luks| luks.reference.is_some());
    if planned.configured || has_token { Change::Found(number, Arc::new(found)) } else { Change::NotOurs(number, None) }
}

/// In one line for a log.
fn line(error: &Error) -> String {
    chain(error).split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_boot_that_was_killed_latches_the_tpm_if_one_of_its_keys_opens_a_store() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.toml");
        // Nobody listens there: to ask the TPM is to fail.
        let tpm = "[tpm]\ntcti = 'swtpm:path=/nonexistent'\n";
        let store = "[stores.a]\ntype = 'directory'\npath = 'a'\nowner = 'o.pem'\nno_escrow = true\n";
        let config = |identity: &str| {
            fs::write(&path, format!("{tpm}{store}identities = ['{identity}']\n")).unwrap();
            Config::read(&path).unwrap()
        };
        finish(&config("host.key")).unwrap();
        finish(&config("tpm:host.key")).unwrap_err();
    }
}
