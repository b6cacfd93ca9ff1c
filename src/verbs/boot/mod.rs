//! Boot: list the volumes, wait for their devices, ask all sources at once and a person besides, attach each volume as
//! soon as its key is there, and say what happened.
//!
//! Nothing here waits without a bound, and nothing waits for another: each volume and each of its sources has a thread of
//! its own, and whoever has the key first attaches the volume. What still runs at the end is left to end with the process.

mod answers;
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
mod opened;
mod plan;
mod progress;
mod prompt;
mod record;
pub(super) mod root;
mod shut_stores;
mod signals;
mod volumes;

use std::{
    path::Path,
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
pub use record::{RESULTS, left_behind, numbers};

use self::{
    answers::Answers,
    key_source::{OpenedBy, Sources},
    latch::LatchNews,
    log::Logged,
    mounts::Mounts,
    progress::{Action, Change, Progress, PromptNo},
    prompt::{Answer, Prompt},
    record::{Earlier, Record},
    volumes::{FoundVolume, VolumeNo},
};
use crate::{
    base::{chain::chain, person::Attendant},
    config::{Config, Latch},
    sys::sysfs::Sysfs,
    unlock::{
        self,
        audit::{self, Event},
        lockbox::{Lockbox, LockboxError},
    },
    verbs::{detach, error::Error, explain},
    volumes::{
        Unlocked,
        backend::{Deferred, ThisHost},
    },
};

/// Where a boot leaves its record for those who look later; a tmpfs that outlives the initramfs.
pub const RECORD: &str = "/run/cryptattach/boot.json";

/// What the threads tell the boot.
enum Report {
    /// A wait has begun; so there is a time to tell of it.
    Waiting,
    /// A line of the log.
    Logged(Logged),
    /// The lockbox is open.
    LockboxOpened,
    /// A signal asks the boot to end.
    Terminated,
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
    earlier: Arc<Earlier>,
    reports: Receiver<Report>,
    sender: Sender<Report>,
    prompt: Option<Prompt>,
    /// For the sources that ask a person.
    answers: Arc<Answers>,
    is_terminated: bool,
}

/// Attaches the volumes of this boot; `crypttab` is its text, if it is another than this boot's.
pub fn boot(config: Config, crypttab: Option<&str>, reports: Reports) -> Result<(), Error> {
    // Before there are threads: they inherit which signals do not end them.
    signals::report(reports.sender.clone())?;
    let planned = plan(&config, crypttab, Which::This);
    let mut boot = Boot::new(config, planned, reports);
    boot.start();
    while !boot.is_terminated && !boot.progress.is_over(Instant::now()) {
        boot.step();
    }
    boot.end()
}

/// Does what a boot that was killed would have done at its end: lest the TPM opens a key again in this boot, or the lockbox
/// stays open for whatever runs next. Nothing is done twice.
///
/// `root` is where the distribution has mounted the root file system, if it has. Nothing is left to one that is not on
/// volumes that are proven to be this host's own.
pub fn finish(config: &Config, root: Option<&Path>) -> Result<(), Error> {
    let finished = finish_killed(config);
    if let Some(root) = root {
        leave_nothing_to_another(root, config);
    }
    finished
}

fn finish_killed(config: &Config) -> Result<(), Error> {
    let Some(mut record) = Record::unfinished() else { return Ok(()) };
    let event = record.event();
    let news = latch::in_time({
        let (config, event) = (config.clone(), event.clone());
        move || latch::latch(&config, &event)
    });
    let may_go_on = latched(&mut record, &news, event, config);
    shut_stores::shut(config, &mut record);
    Mounts::left().unmount();
    shut_lockbox(&mut record, config, "the boot was ended before it was done".to_owned(), Lockbox::shut);
    record.end(&[], None);
    may_go_on
}

/// Closes the lockbox and detaches what sealed keys opened, unless the root file system is on this host's own volumes.
fn leave_nothing_to_another(root: &Path, config: &Config) {
    let mut record = Record::go_on();
    let (own, sysfs) = (record.proven(), Sysfs::this());
    let number = |name| sysfs.look(&detach::status(&ThisHost, name).ok()?.device).ok()?.block;
    if root::is_own(&sysfs, root, &own.iter().filter_map(number).collect::<Vec<_>>()) {
        return;
    }
    let why =
        format!("the root file system in {} is not on a volume that is proven to be this host's own", root.display());
    shut_lockbox(&mut record, config, why.clone(), Lockbox::shut);
    for name in own {
        record.detached(&name, &why, detach::detach(&ThisHost, &name, Deferred::No));
    }
}

/// Has the lockbox closed, if there is one, and tells and records that. `shut` says whether it was open.
fn shut_lockbox(
    record: &mut Record,
    config: &Config,
    why: String,
    shut: impl FnOnce(&Lockbox) -> Result<bool, LockboxError>,
) {
    let Some(lockbox) = Lockbox::of(config) else { return };
    let shut = shut(&lockbox);
    if matches!(shut, Ok(true)) {
        let host = Some(lockbox.host().to_string());
        audit::done(config, &Event { action: "lockbox close", name: host, ..Event::default() });
    }
    record.lockbox_shut(why, shut);
}

/// Records what has become of PCR 15, and tells once that it is not extended; an error if the boot must not go on like that.
fn latched(record: &mut Record, news: &LatchNews, event: String, config: &Config) -> Result<(), Error> {
    let is_known = record.latched(news, event);
    let tpm = config.tpm.device().unwrap_or_else(|| config.tpm.tcti().into());
    let Some(error) = news.error(config.tpm.latch).map(Error::from) else {
        explain::note("extend PCR 15", Some(&tpm), None, Ok(()));
        return Ok(());
    };
    if !is_known {
        record.tell("extend PCR 15", Some(&tpm), &error);
    }
    if config.tpm.latch == Latch::Required { Err(error) } else { Ok(()) }
}

impl Boot {
    fn new(mut config: Config, planned: Vec<Planned>, reports: Reports) -> Self {
        // A store that is not there yet may come: it is tried as long as the boot lasts.
        for store in config.stores.values_mut() {
            store.network.total_seconds = config.boot.total.as_secs_f64();
        }
        let Reports { sender, receiver: reports } = reports;
        let answers = Answers::new(sender.clone());
        config.attendant = Attendant::of(answers.clone());
        let config = Arc::new(config);
        let earlier = Arc::new(Earlier::read());
        let record = Record::begin(&planned);
        let progress = Progress::new(config.clone(), planned, Instant::now());
        let sources = Arc::new(Sources::new(config.clone(), progress.deadline(), sender.clone()));
        Self {
            config,
            progress,
            sources,
            record,
            earlier,
            reports,
            sender,
            prompt: None,
            answers,
            is_terminated: false,
        }
    }

    /// Waits for each volume's device.
    fn start(&self) {
        for (number, awaited) in self.progress.volumes().iter() {
            let (planned, sources, earlier) = (awaited.planned.clone(), self.sources.clone(), self.earlier.clone());
            self.spawn(move || look_for(number, &planned, &sources, &earlier));
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
            Report::Terminated => {
                self.record.note("a signal ends the boot");
                self.is_terminated = true;
            }
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
                    let unlocked = sources.fetch(number, &found.volume, &by);
                    let ready = |unlocked, read_only| sources.recovered(unlocked, read_only);
                    match unlocked.and_then(|unlocked| found.attach(unlocked, by.clone(), ready)) {
                        Ok(opened) => Change::Attached(number, opened),
                        Err(error) => Change::Failed(number, by, error),
                    }
                });
            }
            Action::Try(number, found, passphrase) => self.spawn(move || {
                let unlocked = Unlocked::by_passphrase(&found.volume, &passphrase).map_err(Error::from);
                let ready = |unlocked, _| Ok(unlocked);
                Change::Tried(number, unlocked.and_then(|unlocked| found.attach(unlocked, OpenedBy::Passphrase, ready)))
            }),
            Action::ShowPrompt(prompt, volumes, question) => self.show_prompt(prompt, &volumes, question),
            Action::Answer(answer) => self.answers.give(answer),
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
            Action::TellAttached(number, opened) => self.record.attached(number, &opened),
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

    fn show_prompt(&mut self, number: PromptNo, volumes: &[VolumeNo], question: Option<String>) {
        let names = self.names(volumes);
        let disks = names.join(", ");
        let text = match question {
            None => format!("Please unlock disk {disks} (it is being opened automatically, too): "),
            Some(question) if names.is_empty() => question,
            Some(question) => format!("Please unlock disk {disks} by its passphrase, or by a leaf. {question}"),
        };
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

    /// Extends PCR 15 by what was opened, and closes the lockbox unless all of that is proven to be this host's own.
    fn latch(&mut self) -> Result<(), Error> {
        let event = self.progress.event();
        let news = latch::in_time({
            let (sources, event) = (self.sources.clone(), event.clone());
            move || sources.latch(&event)
        });
        self.take_what_was_said();
        let may_go_on = latched(&mut self.record, &news, event, &self.config);
        let unproven = self.names(&self.progress.unproven());
        let planned = self.progress.volumes().iter().count();
        if let Some(why) = latch::why_shut(&news, planned, &unproven) {
            let shut = |lockbox: &Lockbox| self.sources.shut_lockbox(lockbox);
            shut_lockbox(&mut self.record, &self.config, why, shut);
        }
        may_go_on
    }

    fn end(mut self) -> Result<(), Error> {
        self.carry_out(Action::TakePromptAway);
        let time_is_over = Instant::now() >= self.progress.deadline();
        let left = self.progress.left();
        let sources = self.sources.clone();
        for action in self.progress.too_late(|number| sources.waits.of(number)) {
            self.carry_out(action);
        }
        let may_go_on = self.latch();
        shut_stores::shut(&self.config, &mut self.record);
        self.sources.unmount();
        self.take_what_was_said();
        // Nobody is asked for those on a machine that does not go on.
        let asked_for = if may_go_on.is_ok() { &left[..] } else { &[] };
        self.record.end(asked_for, time_is_over.then_some(self.config.boot.total));
        may_go_on?;
        let names = self.names(&left);
        if names.is_empty() { Ok(()) } else { Err(BootError::Unfinished(names).into()) }
    }
}

/// Waits for a volume's device, and looks whether the volume is ours.
fn look_for(number: VolumeNo, planned: &Planned, sources: &Sources, earlier: &Earlier) -> Change {
    let found = match sources.find(number, planned) {
        Ok(volume) => FoundVolume::new(volume, planned, &sources.pins()),
        // What crypttab lists may be anything.
        Err(error @ Error::Unlock(unlock::Error::Volume(_))) if !planned.configured => {
            return Change::NotOurs(number, Some(error));
        }
        Err(error) => return Change::Failed(number, OpenedBy::Device, error),
    };
    if found.is_attached() {
        return Change::Attached(number, earlier.of(planned, &found.volume));
    }
    let has_token = found.volume.luks().is_some_and(|luks| luks.reference.is_some());
    if planned.configured || has_token { Change::Found(number, Arc::new(found)) } else { Change::NotOurs(number, None) }
}

/// What this says in that time. If it hangs, it is left to end with the process.
fn within<T: Send + 'static>(time: Duration, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let (sender, done) = mpsc::channel();
    thread::spawn(move || sender.send(work()));
    done.recv_timeout(time).ok()
}

/// In one line for a log.
fn line(error: &Error) -> String {
    chain(error).split_whitespace().collect::<Vec<_>>().join(" ")
}
