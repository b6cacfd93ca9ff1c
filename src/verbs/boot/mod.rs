//! Boot: list the volumes, wait for their devices, ask all sources at once and a person besides, attach each volume as
//! soon as its key is there, and say what happened.
//!
//! Nothing here waits without a bound, and nothing waits for another: each volume and each of its sources has a thread of
//! its own, and whoever has the key first attaches the volume. What still runs at the end is left to end with the process.

mod console;
mod crypttab_entries;
pub mod doctor;
mod error;
pub mod image;
mod initrd;
mod key_source;
mod lockbox_once;
mod mounts;
mod plan;
mod prompt;
mod record;

use std::{
    sync::{
        Arc,
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    thread,
    time::{Duration, Instant},
};

pub use console::Console;
pub use error::BootError;
pub use plan::{Planned, plan};

use self::{
    key_source::{By, Claim, Latch, Sources},
    prompt::{Answer, Prompt},
    record::Record,
};
use crate::{
    base::{chain::chain, key::SecretBytes},
    config::Config,
    keys::seal::identities,
    sys::announce::Announced,
    unlock,
    verbs::{attach::Options, error::Error},
    volumes::{
        backend::{self, Activate},
        header::{Volume, VolumeError},
    },
};

/// Where a boot leaves its record for those who look later; a tmpfs that outlives the initramfs.
pub const RECORD: &str = "/run/cryptattach/boot.json";

/// How long the end of a boot waits for the TPM: for a lockbox that is being opened, and to extend PCR 15, for which old chips
/// take half a second.
const LONGEST_LATCH: Duration = Duration::from_secs(10);

/// Who only presses Enter is asked again, after a moment: a program that answers so by itself must not be started at once.
const AFTER_ENTER: Duration = Duration::from_secs(1);

/// What the threads tell the boot; the number is the volume's.
enum Report {
    /// A wait has begun; so there is a time to tell of it.
    Waiting,
    /// A line of the log.
    Logged(String),
    /// The lockbox is open.
    LockboxOpened,
    /// Its device is there.
    Found(usize, Arc<Volume>),
    /// It has no token of ours, or a header that is none of ours: the distribution opens it.
    NotOurs(usize, Option<Error>),
    /// A source has failed for good.
    Failed(usize, By, Error),
    /// No source is left.
    GaveUp(usize),
    /// It is attached.
    Attached(usize, By),
    /// A person has answered the prompt of that number, or it could not be shown.
    Answered(usize, Option<SecretBytes>),
    /// What a person typed was tried on a volume.
    Tried(usize, Result<(), Error>),
}

/// What has become of a volume.
enum State {
    /// Its device is not there yet.
    Awaited,
    /// Its device is there, its key is not.
    Found(Arc<Volume>),
    /// Only a person could open it now.
    GaveUp(Option<Arc<Volume>>),
    /// Attached, or none of ours.
    Done,
}

struct Boot {
    config: Arc<Config>,
    planned: Vec<Planned>,
    states: Vec<State>,
    claims: Vec<Arc<Claim>>,
    /// What has not answered yet, of each volume.
    pending: Vec<Vec<By>>,
    sources: Arc<Sources>,
    record: Record,
    reports: Receiver<Report>,
    sender: Sender<Report>,
    prompt: Option<Prompt>,
    /// How many prompts are gone: the number of the next.
    prompts: usize,
    /// When each volume was found, or else the start.
    found: Vec<Instant>,
    /// Before that no prompt is shown.
    no_prompt_before: Instant,
    /// On how many volumes a passphrase is being tried.
    trying: usize,
    deadline: Instant,
}

/// Attaches the volumes of this boot; `crypttab` is its text, if it is another than this boot's.
pub fn boot(config: Config, crypttab: Option<&str>) -> Result<(), Error> {
    let planned = plan(&config, crypttab);
    let mut boot = Boot::new(config, planned);
    boot.start();
    while !boot.is_over() {
        boot.step();
    }
    boot.end()
}

/// For a boot that was killed: what it would have done at its end, lest the TPM opens a key again in this boot.
pub fn finish(config: &Config) -> Result<(), Error> {
    let lockbox = config.lockbox.iter().flat_map(|lockbox| &lockbox.identities);
    let identities = config.stores.values().flat_map(|store| &store.sealing.identities).chain(lockbox);
    if identities::need_tpm(identities) {
        key_source::latch(config)?;
    }
    Ok(())
}

impl Boot {
    fn new(mut config: Config, planned: Vec<Planned>) -> Self {
        let start = Instant::now();
        let deadline = start + config.boot.total;
        // A store that is not there yet may come: it is tried as long as the boot lasts.
        for store in config.stores.values_mut() {
            store.network.total_seconds = config.boot.total.as_secs_f64();
        }
        let config = Arc::new(config);
        let (sender, reports) = mpsc::channel();
        console::tell(Some(sender.clone()));
        Self {
            states: planned.iter().map(|_| State::Awaited).collect(),
            found: vec![start; planned.len()],
            claims: planned.iter().map(|_| Arc::default()).collect(),
            pending: vec![vec![By::Device]; planned.len()],
            sources: Arc::new(Sources::new(config.clone(), deadline, sender.clone())),
            record: Record::begin(&planned),
            config,
            planned,
            reports,
            sender,
            prompt: None,
            prompts: 0,
            no_prompt_before: start,
            trying: 0,
            deadline,
        }
    }

    /// Waits for each volume's device.
    fn start(&mut self) {
        for (number, planned) in self.planned.iter().enumerate() {
            let (planned, sources, sender) = (planned.clone(), self.sources.clone(), self.sender.clone());
            thread::spawn(move || {
                let report = match sources.find(number, &planned) {
                    Ok(volume) if is_attached(&planned, &volume) => Report::Attached(number, By::Before),
                    Ok(volume) if planned.configured || volume.luks().is_some_and(|luks| luks.reference.is_some()) => {
                        Report::Found(number, Arc::new(volume))
                    }
                    Ok(_) => Report::NotOurs(number, None),
                    // What crypttab lists may be anything.
                    Err(error @ Error::Unlock(unlock::Error::Volume(_))) if !planned.configured => {
                        Report::NotOurs(number, Some(error))
                    }
                    Err(error) => {
                        let _ = sender.send(Report::Failed(number, By::Device, error));
                        Report::GaveUp(number)
                    }
                };
                let _ = sender.send(report);
            });
        }
    }

    fn step(&mut self) {
        let ticks = [Some(self.deadline), self.sources.waits.next_due(), self.prompt_due()];
        let next = ticks.into_iter().flatten().min().unwrap_or(self.deadline);
        match self.reports.recv_timeout(next.saturating_duration_since(Instant::now())) {
            Ok(report) => self.take(report),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
        }
        let pending = |volume: usize| matches!(self.states[volume], State::Awaited | State::Found(_));
        for line in self.sources.waits.due(Instant::now(), pending) {
            let line = format!("waiting for {line}");
            // It goes on: no reason to disturb the person who types.
            if self.prompt.is_some() { self.record.note(&line) } else { self.record.say(&line) }
        }
        if self.prompt_due().is_some_and(|due| due <= Instant::now()) {
            self.show_prompt();
        }
    }

    fn take(&mut self, report: Report) {
        match report {
            Report::Waiting => {}
            Report::Logged(line) => self.record.logged(&line),
            Report::LockboxOpened => self.record.note("the lockbox is open"),
            Report::Found(number, volume) => {
                self.ask_all_sources(number, &volume);
                self.states[number] = State::Found(volume);
                self.found[number] = Instant::now();
            }
            Report::NotOurs(number, why) => {
                self.record.not_ours(number, why.as_ref());
                self.states[number] = State::Done;
            }
            Report::Failed(number, by, error) => {
                self.pending[number].retain(|pending| *pending != by);
                self.record.failed(number, &by, &error);
            }
            Report::GaveUp(number) => {
                self.states[number] = match std::mem::replace(&mut self.states[number], State::Awaited) {
                    State::Found(volume) => State::GaveUp(Some(volume)),
                    State::Awaited => State::GaveUp(None),
                    settled => settled,
                }
            }
            Report::Attached(number, by) => {
                self.states[number] = State::Done;
                if self.waits_for_a_person().is_empty() {
                    self.take_prompt_away();
                }
                self.record.attached(number, &by);
            }
            // That one was taken away.
            Report::Answered(number, _) if number != self.prompts => {}
            Report::Answered(_, answer) => {
                if let Some(prompt) = self.prompt.take() {
                    prompt.answered();
                }
                self.take_prompt_away();
                match answer {
                    Some(nothing) if nothing.is_empty() => self.no_prompt_before = Instant::now() + AFTER_ENTER,
                    Some(passphrase) => self.try_passphrase(passphrase),
                    // Whatever the matter is, it is not shown again at once.
                    None => self.no_prompt_before = self.deadline,
                }
            }
            Report::Tried(number, tried) => self.tried(number, tried),
        }
    }

    /// Each in a thread of its own; the first with a key attaches the volume.
    fn ask_all_sources(&mut self, number: usize, volume: &Arc<Volume>) {
        let planned = &self.planned[number];
        let token = volume.luks().and_then(|luks| luks.reference.clone());
        let keys = if planned.keys.is_empty() { token.into_iter().collect() } else { planned.keys.clone() };
        if keys.is_empty() {
            let error = unlock::Error::NoReference(volume.device.path.clone()).into();
            let _ = self.sender.send(Report::Failed(number, By::Device, error));
        }
        let left = Arc::new(());
        self.pending[number] = self.sources.of(&keys);
        for by in self.pending[number].clone() {
            let (sources, sender, volume) = (self.sources.clone(), self.sender.clone(), volume.clone());
            let (claim, options, left) = (self.claims[number].clone(), activation(planned, &volume), left.clone());
            thread::spawn(move || {
                let attached =
                    sources.fetch(number, &volume, &by).and_then(|key| claim.attach(&volume, &key, &options));
                report_attached(&sender, number, by, attached);
                // The last source out says so.
                if Arc::into_inner(left).is_some() {
                    let _ = sender.send(Report::GaveUp(number));
                }
            });
        }
        if Arc::into_inner(left).is_some() {
            let _ = self.sender.send(Report::GaveUp(number));
        }
    }

    /// When a prompt is to be shown: not while one is, and not without a volume that a passphrase could open.
    fn prompt_due(&self) -> Option<Instant> {
        if self.prompt.is_some() || self.trying > 0 || self.no_prompt_before >= self.deadline {
            return None;
        }
        let first = self.waits_for_a_person().into_iter().map(|number| self.found[number]).min()?;
        Some((first + self.config.boot.prompt_after).max(self.no_prompt_before))
    }

    /// The volumes that a passphrase could open now.
    fn waits_for_a_person(&self) -> Vec<usize> {
        let asks = |state: &State| match state {
            State::Found(volume) | State::GaveUp(Some(volume)) => volume.luks().is_some_and(|luks| luks.asks_people),
            _ => false,
        };
        (0..self.states.len()).filter(|number| asks(&self.states[*number])).collect()
    }

    fn show_prompt(&mut self) {
        let waiting = self.waits_for_a_person();
        let names: Vec<&str> = waiting.iter().map(|number| self.planned[*number].name.as_str()).collect();
        let text = format!("Please unlock disk {} (it is being opened automatically, too): ", names.join(", "));
        match Prompt::show(&text, names.first().copied().unwrap_or_default()) {
            Some(Ok((prompt, answer))) => {
                self.record.prompt_shown(text);
                self.prompt = Some(prompt);
                let (sender, number) = (self.sender.clone(), self.prompts);
                thread::spawn(move || {
                    let _ = sender.send(Report::Answered(number, Answer::read(answer)));
                });
            }
            Some(Err(error)) => {
                self.record.say(&format!("cannot ask for a passphrase: {error}"));
                self.no_prompt_before = self.deadline;
            }
            None => self.no_prompt_before = self.deadline,
        }
    }

    fn take_prompt_away(&mut self) {
        self.prompt = None;
        self.prompts += 1;
        self.record.prompt_gone();
    }

    /// Tries what a person typed on all volumes that it could open, at once.
    fn try_passphrase(&mut self, passphrase: SecretBytes) {
        let passphrase = Arc::new(passphrase);
        for number in self.waits_for_a_person() {
            let (State::Found(volume) | State::GaveUp(Some(volume))) = &self.states[number] else { continue };
            let (volume, sender, passphrase) = (volume.clone(), self.sender.clone(), passphrase.clone());
            let (claim, options) = (self.claims[number].clone(), activation(&self.planned[number], &volume));
            self.trying += 1;
            thread::spawn(move || {
                let key = volume.open_keyslot(&passphrase).map_err(Error::from);
                let tried = key.and_then(|key| claim.attach(&volume, &key, &options));
                let _ = sender.send(Report::Tried(number, tried));
            });
        }
    }

    fn tried(&mut self, number: usize, tried: Result<(), Error>) {
        self.trying -= 1;
        match tried {
            Ok(()) => self.take(Report::Attached(number, By::Passphrase)),
            Err(Error::Unlock(unlock::Error::Volume(VolumeError::WrongPassphrase { .. }))) => {
                self.record.say(&format!("the passphrase does not open {}", self.planned[number].name));
            }
            Err(error) => self.record.failed(number, &By::Passphrase, &error),
        }
        // For what is left, once all have tried it.
        self.no_prompt_before = Instant::now();
    }

    /// All is attached; or time is over; or only a person could help, and the distribution asks them as well.
    fn is_over(&self) -> bool {
        let asking = self.prompt.is_some() || self.trying > 0;
        let settled = |number| match self.states[number] {
            State::Done => true,
            State::GaveUp(_) => !asking,
            State::Awaited | State::Found(_) => self.is_absent(number),
        };
        (0..self.states.len()).all(settled) || Instant::now() >= self.deadline
    }

    /// One that may be absent, and is.
    fn is_absent(&self, number: usize) -> bool {
        self.planned[number].optional && matches!(self.states[number], State::Awaited)
    }

    /// The log's lines; what else comes now is too late.
    fn take_what_was_said(&mut self) {
        let reports: Vec<Report> = self.reports.try_iter().collect();
        let said = reports.into_iter().filter(|report| matches!(report, Report::Logged(_) | Report::LockboxOpened));
        said.for_each(|report| self.take(report));
    }

    /// What has neither answered nor failed by now is why the volume is not attached.
    fn tell_what_did_not_come(&mut self, number: usize) {
        let pending = std::mem::take(&mut self.pending[number]);
        for by in &pending {
            let waits_for = self.sources.waits.of(number).filter(|_| pending.len() == 1);
            let what = waits_for.unwrap_or_else(|| match by {
                By::Device => format!("the header on {}", self.planned[number].device),
                by => format!("the key {by}"),
            });
            let error = BootError::TooLate { what, after: self.config.boot.total };
            self.record.failed(number, by, &error.into());
        }
    }

    /// The latch, but no wait for a TPM that hangs.
    fn latch(&mut self) {
        let (sender, done) = mpsc::channel();
        let sources = self.sources.clone();
        thread::spawn(move || {
            let _ = sender.send(sources.latch());
        });
        let latched = done.recv_timeout(LONGEST_LATCH);
        self.take_what_was_said();
        match latched {
            Ok(Ok(Latch::Done)) => self.record.note("PCR 15 is latched"),
            Ok(Ok(Latch::NotWanted)) => {}
            Ok(Ok(Latch::NoTpm(device))) => {
                self.record.say(&format!("PCR 15 is not latched: there is no TPM {}", device.display()));
            }
            Ok(Err(error)) => self.record.say(&format!("PCR 15 is not latched: {}", line(&error))),
            Err(_) => self.record.say("PCR 15 is not latched: the TPM does not answer"),
        }
    }

    fn end(mut self) -> Result<(), Error> {
        self.take_prompt_away();
        let time_is_over = Instant::now() >= self.deadline;
        let open = |number: &usize| !matches!(self.states[*number], State::Done) && !self.is_absent(*number);
        let left: Vec<usize> = (0..self.states.len()).filter(open).collect();
        left.iter().for_each(|number| self.tell_what_did_not_come(*number));
        self.latch();
        self.sources.unmount();
        console::tell(None);
        self.take_what_was_said();
        let names: Vec<String> = left.iter().map(|number| self.planned[*number].name.to_string()).collect();
        self.record.end(&left, time_is_over.then_some(self.config.boot.total));
        if names.is_empty() { Ok(()) } else { Err(BootError::Unfinished(names).into()) }
    }
}

fn is_attached(planned: &Planned, volume: &Volume) -> bool {
    let active =
        backend::choose(None, &volume.device).and_then(|backend| backend.active(volume, &activation(planned, volume)));
    active.is_ok_and(|mapping| mapping.is_some())
}

fn report_attached(sender: &Sender<Report>, number: usize, by: By, attached: Result<(), Error>) {
    let _ = sender.send(match attached {
        Ok(()) => Report::Attached(number, by),
        Err(error) => Report::Failed(number, by, error),
    });
}

fn activation(planned: &Planned, volume: &Volume) -> Activate {
    let Options { read_only, export, allow_discards, no_read_workqueue, no_write_workqueue } = planned.options;
    let read_only = read_only || volume.device.read_only;
    Activate { name: planned.name.clone(), read_only, export, allow_discards, no_read_workqueue, no_write_workqueue }
}

/// In one line for a log.
fn line(error: &Error) -> String {
    chain(error).split_whitespace().collect::<Vec<_>>().join(" ")
}
