//! Asking a person for what opens a leaf: only if nothing else does, or that takes long; a few times; and not any more once
//! it is not needed.

use std::{
    sync::{
        atomic::{AtomicBool, Ordering::SeqCst},
        mpsc,
    },
    thread,
    time::Duration,
};

use super::{
    Identities, Identity, LeafError, Node, OwnerKey, SealError, Told,
    tree::{Openers, PersonsLeaf},
};
use crate::{
    base::{key::SecretBytes, person::Attendant},
    keys::net::http::Cancel,
};

/// Wrong answers after which nobody is asked any more.
const TRIES: usize = 3;

/// Whom to ask, and for what.
#[derive(Clone, Default)]
pub struct Asking {
    pub attendant: Attendant,
    /// "container 'cinder'"
    pub of: String,
    /// How long all else may take before a person is asked.
    pub patience: Duration,
}

type Outcome = (Result<SecretBytes, SealError>, Told);

impl Identities {
    /// The content of a node, and what each part of its policy said.
    pub(super) fn open_node(&self, node: &Node) -> Outcome {
        let mut questions = Questions::of(&self.asking, node.persons(&self.leaves));
        let mut persons = Vec::new();
        let (mut outcome, mut key) = match questions.can_ask() {
            true => self.meanwhile(node, &mut questions),
            false => (self.openers(&[]).content(node, &Cancel::never()), None),
        };
        loop {
            if outcome.0.is_ok() {
                return outcome;
            }
            if key.is_none() && outcome.1.lacks_a_person() {
                key = questions.ask(&|| false);
            }
            match key.take() {
                Some(key) => persons.push(key),
                None => return (outcome.0.map_err(|error| questions.wrong.take().unwrap_or(error)), outcome.1),
            }
            outcome = self.openers(&persons).content(node, &Cancel::never());
        }
    }

    pub(super) fn openers<'a>(&'a self, persons: &'a [OwnerKey]) -> Openers<'a> {
        Openers { identities: &self.identities, leaves: &self.leaves, names: &self.names, persons }
    }

    /// Tries what this host has. If that takes long, a person is asked meanwhile; whoever is first ends the other.
    fn meanwhile(&self, node: &Node, questions: &mut Questions<'_>) -> (Outcome, Option<OwnerKey>) {
        let (work, is_open) = (Cancel::never().below(), AtomicBool::new(false));
        thread::scope(|scope| {
            let (sender, done) = mpsc::channel();
            let (cancel, opened) = (&work, &is_open);
            scope.spawn(move || {
                let outcome = self.openers(&[]).content(node, cancel);
                opened.store(outcome.0.is_ok(), SeqCst);
                drop(sender.send(outcome));
            });
            if let Ok(outcome) = done.recv_timeout(questions.asking.patience) {
                return (outcome, None);
            }
            let key = questions.ask(&|| is_open.load(SeqCst));
            if key.is_some() {
                work.cancel();
            }
            let outcome = done.recv().unwrap_or_else(|_| self.openers(&[]).content(node, &Cancel::never()));
            (outcome, key)
        })
    }
}

/// The private key of a person's leaf of this node.
pub(super) fn key_of_person(asking: &Asking, leaf: PersonsLeaf<'_>) -> Result<OwnerKey, SealError> {
    let mut questions = Questions::of(asking, vec![leaf]);
    let key = questions.ask(&|| false);
    key.ok_or_else(|| questions.wrong.unwrap_or_else(|| LeafError::NoAnswer.into()))
}

/// What a person may still be asked.
struct Questions<'a> {
    asking: &'a Asking,
    /// The leaves that are not open yet.
    left: Vec<PersonsLeaf<'a>>,
    tries: usize,
    /// Why the last answer was none.
    wrong: Option<SealError>,
}

impl<'a> Questions<'a> {
    fn of(asking: &'a Asking, left: Vec<PersonsLeaf<'a>>) -> Self {
        Self { asking, left, tries: TRIES, wrong: None }
    }

    fn can_ask(&self) -> bool {
        self.asking.attendant.person().is_some() && !self.left.is_empty()
    }

    /// Asks until an answer opens a leaf; `None` if that is over, nobody answers, or too many answers were wrong.
    fn ask(&mut self, is_over: &dyn Fn() -> bool) -> Option<OwnerKey> {
        let person = self.asking.attendant.person()?;
        while self.tries > 0 && !self.left.is_empty() {
            let answer = person.ask(&self.text(), is_over).filter(|answer| !answer.is_empty())?;
            match self.try_answer(&answer) {
                Ok(key) => {
                    self.left.retain(|leaf| leaf.entry.kid() != key.kid());
                    (self.tries, self.wrong) = (TRIES, None);
                    return Some(key);
                }
                Err(error) => {
                    self.tries -= 1;
                    self.wrong = Some(error);
                }
            }
        }
        None
    }

    fn text(&self) -> String {
        let mut kinds: Vec<_> = self.left.iter().map(|leaf| leaf.entry.by.describe()).collect();
        kinds.sort_unstable();
        kinds.dedup();
        let again = self.wrong.as_ref().map(|error| format!("{error}. ")).unwrap_or_default();
        format!("{again}Enter the {} of {} ({}): ", kinds.join(" or "), self.asking.of, self.names())
    }

    fn names(&self) -> String {
        self.left.iter().map(|leaf| leaf.name.as_str()).collect::<Vec<_>>().join(", ")
    }

    /// One leaf after the other: there are few.
    fn try_answer(&self, answer: &SecretBytes) -> Result<OwnerKey, SealError> {
        let (mut unfit, mut was_tried) = (None, false);
        for PersonsLeaf { entry, .. } in &self.left {
            match entry.by.read(answer) {
                Ok(answer) => match entry.open(&answer)? {
                    Some(key) => return Ok(key),
                    None => was_tried = true,
                },
                Err(error) => unfit = Some(error),
            }
        }
        match unfit {
            Some(error) if !was_tried => Err(error),
            unfit => {
                let but = unfit.map(|error| format!(" ({error})")).unwrap_or_default();
                Err(LeafError::OtherAnswer(self.names() + &but).into())
            }
        }
    }
}
