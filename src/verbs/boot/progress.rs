//! The decisions of a boot: which sources are asked, when a person is asked, what is told, when the boot is over. Here is
//! neither a thread nor a device nor a terminal; the boot reports what has happened, and carries out what is decided.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    BootError, Planned,
    key_source::{OpenedBy, sources_of},
    opened::{self, Opened},
    volumes::{Awaited, FoundVolume, State, VolumeNo, Volumes},
};
use crate::{
    base::key::SecretBytes,
    config::Config,
    unlock::{self, case},
    verbs::error::Error,
    volumes::header::VolumeError,
};

/// After an empty answer the prompt is shown again, but not at once: a program may answer so by itself, without end.
const AFTER_ENTER: Duration = Duration::from_secs(1);
/// A leaf of a policy is tried for about a second; meanwhile nobody is asked anew.
const AFTER_ANSWER: Duration = Duration::from_secs(2);

/// The number of a prompt; an answer to an earlier one does not count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PromptNo(usize);

/// What has happened.
pub enum Change {
    /// A volume's device is there.
    Found(VolumeNo, Arc<FoundVolume>),
    /// A volume has no token of ours, or a header that is none of ours: the distribution opens it.
    NotOurs(VolumeNo, Option<Error>),
    /// A source has failed for good.
    Failed(VolumeNo, OpenedBy, Error),
    /// A volume is attached.
    Attached(VolumeNo, Opened),
    /// A person has answered a prompt; nothing if it was ended, or could not be shown.
    Answered(PromptNo, Option<SecretBytes>),
    /// What a person typed was tried on a volume.
    Tried(VolumeNo, Result<Opened, Error>),
    /// A source asks for what a person has on paper or in mind: this question.
    Wanted(String),
    /// It has the key without.
    NotWanted(String),
}

/// What is to be done.
pub enum Action {
    /// Ask a source for a volume's key, and attach it.
    Ask(VolumeNo, Arc<FoundVolume>, OpenedBy),
    /// Open a volume by what a person typed, and attach it.
    Try(VolumeNo, Arc<FoundVolume>, Arc<SecretBytes>),
    /// Ask a person for a passphrase of these volumes, and what a source asks for.
    ShowPrompt(PromptNo, Vec<VolumeNo>, Option<String>),
    /// Give the sources that ask what a person typed; nothing if nobody answers.
    Answer(Option<Arc<SecretBytes>>),
    /// A prompt's program has ended by itself.
    PromptAnswered,
    /// End a prompt, if there is one: nobody needs to answer it.
    TakePromptAway,
    /// Tell that a volume is attached.
    TellAttached(VolumeNo, Opened),
    /// Tell that a source has failed.
    TellFailed(VolumeNo, OpenedBy, Error),
    /// Tell that a passphrase does not open a volume.
    TellWrongPassphrase(VolumeNo),
    /// Note that a volume is left to the distribution.
    TellNotOurs(VolumeNo, Option<Error>),
}

/// How far a boot is.
pub struct Progress {
    config: Arc<Config>,
    volumes: Volumes,
    deadline: Instant,
    /// The prompt that is shown, or else the next.
    prompt: PromptNo,
    is_asking: bool,
    no_prompt_before: Instant,
    /// On how many volumes a passphrase is being tried.
    trying: usize,
    /// What sources ask a person for.
    wanted: Vec<String>,
}

impl Progress {
    /// Nothing has happened yet.
    pub fn new(config: Arc<Config>, planned: Vec<Planned>, start: Instant) -> Self {
        Self {
            volumes: Volumes::new(planned, start),
            deadline: start + config.boot.total,
            config,
            prompt: PromptNo(0),
            is_asking: false,
            no_prompt_before: start,
            trying: 0,
            wanted: Vec::new(),
        }
    }

    /// All volumes.
    pub fn volumes(&self) -> &Volumes {
        &self.volumes
    }

    /// When the boot goes on without what is missing.
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Whether a prompt is shown.
    pub fn is_asking(&self) -> bool {
        self.is_asking
    }

    /// Takes a change; what is to be done about it, in this order.
    pub fn take(&mut self, change: Change, now: Instant) -> Vec<Action> {
        match change {
            Change::Found(number, found) => self.found(number, found, now),
            Change::NotOurs(number, why) => {
                self.volumes[number].state = State::NotOurs;
                vec![Action::TellNotOurs(number, why)]
            }
            Change::Failed(number, by, error) => self.failed(number, by, error),
            Change::Attached(number, opened) => self.attached(number, opened),
            Change::Answered(number, answer) if self.is_asking && number == self.prompt => self.answered(answer, now),
            // That prompt was taken away.
            Change::Answered(..) => Vec::new(),
            Change::Tried(number, tried) => self.tried(number, tried, now),
            Change::Wanted(question) => {
                self.wanted.push(question);
                Vec::new()
            }
            Change::NotWanted(question) => {
                self.wanted.retain(|wanted| *wanted != question);
                self.take_away().into_iter().collect()
            }
        }
    }

    fn found(&mut self, number: VolumeNo, found: Arc<FoundVolume>, now: Instant) -> Vec<Action> {
        let awaited = &mut self.volumes[number];
        let token = found.volume.reference().cloned();
        let keys = &awaited.planned.keys;
        let keys: Vec<_> = if keys.is_empty() { token.into_iter().collect() } else { keys.clone() };
        let keys: Vec<_> = keys.into_iter().map(|key| found.volume.current(key)).collect();
        awaited.since = now;
        awaited.state = State::Found(found.clone());
        let sources = sources_of(&self.config, &keys);
        if sources.is_empty() {
            let error = case::no_reference(&found.volume).into();
            return self.failed(number, OpenedBy::Device, error);
        }
        awaited.pending.clone_from(&sources);
        sources.into_iter().map(|by| Action::Ask(number, found.clone(), by)).collect()
    }

    fn failed(&mut self, number: VolumeNo, by: OpenedBy, error: Error) -> Vec<Action> {
        let Awaited { state, pending, .. } = &mut self.volumes[number];
        pending.retain(|pending| *pending != by);
        if pending.is_empty() {
            *state = match std::mem::replace(state, State::Absent) {
                State::Absent => State::GaveUp(None),
                State::Found(found) => State::GaveUp(Some(found)),
                settled => settled,
            };
        }
        vec![Action::TellFailed(number, by, error)]
    }

    fn attached(&mut self, number: VolumeNo, opened: Opened) -> Vec<Action> {
        self.volumes[number].state = State::Attached(opened.evidence.clone());
        self.take_away().into_iter().chain([Action::TellAttached(number, opened)]).collect()
    }

    /// The prompt goes if nobody needs to answer it any more.
    fn take_away(&mut self) -> Option<Action> {
        if !self.wanted.is_empty() || !self.for_a_person().is_empty() {
            return None;
        }
        self.forget_prompt();
        Some(Action::TakePromptAway)
    }

    fn answered(&mut self, answer: Option<SecretBytes>, now: Instant) -> Vec<Action> {
        self.forget_prompt();
        let mut actions = vec![Action::PromptAnswered];
        match answer {
            Some(nothing) if nothing.is_empty() => self.no_prompt_before = now + AFTER_ENTER,
            Some(passphrase) => {
                let passphrase = Arc::new(passphrase);
                let tries = self.for_a_person();
                self.trying += tries.len();
                if !std::mem::take(&mut self.wanted).is_empty() {
                    self.no_prompt_before = now + AFTER_ANSWER;
                    actions.push(Action::Answer(Some(passphrase.clone())));
                }
                actions.extend(tries.into_iter().map(|(number, found)| Action::Try(number, found, passphrase.clone())));
            }
            // Nobody could answer: the next prompt would fare no better.
            None => {
                self.no_prompt_before = self.deadline;
                self.wanted.clear();
                actions.push(Action::Answer(None));
            }
        }
        actions
    }

    fn tried(&mut self, number: VolumeNo, tried: Result<Opened, Error>, now: Instant) -> Vec<Action> {
        self.trying -= 1;
        // What is left is asked for again, once all have tried the passphrase.
        self.no_prompt_before = self.no_prompt_before.max(now);
        match tried {
            Ok(opened) => self.attached(number, opened),
            Err(Error::Unlock(unlock::Error::Volume(VolumeError::WrongPassphrase { .. }))) => {
                vec![Action::TellWrongPassphrase(number)]
            }
            Err(error) => vec![Action::TellFailed(number, OpenedBy::Passphrase, error)],
        }
    }

    fn forget_prompt(&mut self) {
        self.is_asking = false;
        self.prompt.0 += 1;
    }

    /// The volumes that a passphrase could open now.
    fn for_a_person(&self) -> Vec<(VolumeNo, Arc<FoundVolume>)> {
        let volumes = self.volumes.iter();
        volumes.filter_map(|(number, awaited)| Some((number, awaited.for_a_person()?.clone()))).collect()
    }

    /// When a prompt is to be shown: not while one is, and not without a volume that a passphrase could open.
    pub fn prompt_due(&self) -> Option<Instant> {
        if self.is_asking || self.trying > 0 || self.no_prompt_before >= self.deadline {
            return None;
        }
        let waiting = self.volumes.iter().filter(|(_, awaited)| awaited.for_a_person().is_some());
        let first = waiting.map(|(_, awaited)| awaited.since + self.config.boot.prompt_after).min();
        // Who asks for a leaf has tried all else as long.
        let wanted = (!self.wanted.is_empty()).then_some(self.no_prompt_before);
        Some(first.into_iter().chain(wanted).min()?.max(self.no_prompt_before))
    }

    /// What is to be done because time has passed.
    pub fn tick(&mut self, now: Instant) -> Option<Action> {
        self.prompt_due().filter(|due| *due <= now)?;
        self.is_asking = true;
        let waiting = self.for_a_person().into_iter().map(|(number, _)| number);
        Some(Action::ShowPrompt(self.prompt, waiting.collect(), self.wanted.last().cloned()))
    }

    /// All is attached; or time is over; or only a person could help, and the distribution asks them as well.
    pub fn is_over(&self, now: Instant) -> bool {
        let helps = self.is_asking || self.trying > 0;
        let is_settled = |awaited: &Awaited| match awaited.state {
            State::Attached(_) | State::NotOurs => true,
            State::GaveUp(_) => !helps,
            State::Absent | State::Found(_) => awaited.may_stay_absent(),
        };
        now >= self.deadline || self.volumes.iter().all(|(_, awaited)| is_settled(awaited))
    }

    /// What a boot that is over leaves to the distribution.
    pub fn left(&self) -> Vec<VolumeNo> {
        let is_left = |awaited: &Awaited| {
            !matches!(awaited.state, State::Attached(_) | State::NotOurs) && !awaited.may_stay_absent()
        };
        self.volumes.iter().filter(|(_, awaited)| is_left(awaited)).map(|(number, _)| number).collect()
    }

    /// The planned volumes of which nothing proves that this host's own was attached: those that are left and those that are not
    /// ours among them, and those whose disk never came.
    pub fn unproven(&self) -> Vec<VolumeNo> {
        let is_unproven = |awaited: &Awaited| !awaited.evidence().is_some_and(|evidence| evidence.proven);
        self.volumes.iter().filter(|(_, awaited)| is_unproven(awaited)).map(|(number, _)| number).collect()
    }

    /// What is measured of this boot.
    pub fn event(&self) -> String {
        opened::event(self.volumes.iter().map(|(_, awaited)| (&awaited.planned.name, awaited.evidence())))
    }

    /// Why volumes are left that sources are still pending for: these did not come in time. `waits_for` knows what a volume
    /// waits for.
    pub fn too_late(&mut self, waits_for: impl Fn(VolumeNo) -> Option<String>) -> Vec<Action> {
        let mut actions = Vec::new();
        for number in self.left() {
            let awaited = &mut self.volumes[number];
            let pending = std::mem::take(&mut awaited.pending);
            let only = pending.len() == 1;
            for by in pending {
                let what = waits_for(number).filter(|_| only).unwrap_or_else(|| match &by {
                    OpenedBy::Device => format!("the header on {}", awaited.planned.device),
                    by => format!("the key {by}"),
                });
                let error = BootError::TooLate { what, after: self.config.boot.total };
                actions.push(Action::TellFailed(number, by, error.into()));
            }
        }
        actions
    }
}

#[cfg(test)]
mod tests;
