//! Asking a person for what opens a leaf: only if nothing else does, or that takes long; a few times; and not any more once
//! it is not needed.

use std::{
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread,
    time::Duration,
};

use super::{
    Identities, Identity, LeafError, Node, OwnerKey, SealError, Told,
    leaves::person::WordsError,
    tree::{Openers, PersonsLeaf},
};
use crate::{
    base::{chain::printable, key::SecretBytes, person::Attendant},
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
    /// The keys of leaves that persons have opened: a leaf is asked for once.
    pub opened: Arc<Mutex<Vec<Arc<OwnerKey>>>>,
}

impl Asking {
    fn opened(&self) -> Vec<Arc<OwnerKey>> {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

type Outcome = (Result<SecretBytes, SealError>, Told);

impl Identities {
    /// The content of a node, and what each part of its policy said.
    pub(super) fn open_node(&self, node: &Node) -> Outcome {
        let mut questions = Questions::of(&self.asking, node.persons(&self.leaves));
        let mut persons = self.asking.opened();
        let (mut outcome, mut key) = match questions.can_ask() {
            true => self.meanwhile(node, &persons, &mut questions),
            false => (self.openers(&persons).content(node, &Cancel::never()), None),
        };
        loop {
            if outcome.0.is_ok() {
                return (outcome.0, outcome.1.opened());
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

    pub(super) fn openers<'a>(&'a self, persons: &'a [Arc<OwnerKey>]) -> Openers<'a> {
        Openers { identities: &self.identities, leaves: &self.leaves, names: &self.names, persons }
    }

    /// Tries what this host has. If that takes long, a person is asked meanwhile; whoever is first ends the other.
    fn meanwhile(
        &self,
        node: &Node,
        persons: &[Arc<OwnerKey>],
        questions: &mut Questions<'_>,
    ) -> (Outcome, Option<Arc<OwnerKey>>) {
        let (work, is_open) = (Cancel::never().below(), AtomicBool::new(false));
        let (is_done, done) = (Mutex::new(false), Condvar::new());
        thread::scope(|scope| {
            let working = scope.spawn(|| {
                let outcome = self.openers(persons).content(node, &work);
                is_open.store(outcome.0.is_ok(), SeqCst);
                *is_done.lock().unwrap_or_else(PoisonError::into_inner) = true;
                done.notify_one();
                outcome
            });
            let is_done = is_done.lock().unwrap_or_else(PoisonError::into_inner);
            let waited = done.wait_timeout_while(is_done, questions.asking.patience, |is_done| !*is_done);
            let was_quick = *waited.unwrap_or_else(PoisonError::into_inner).0;
            let key = if was_quick { None } else { questions.ask(&|| is_open.load(SeqCst)) };
            if key.is_some() {
                work.cancel();
            }
            let outcome = working.join();
            (outcome.unwrap_or_else(|_| self.openers(persons).content(node, &Cancel::never())), key)
        })
    }
}

/// Asks for a leaf although it may not be needed.
pub(super) fn ask_now(asking: &Asking, leaf: PersonsLeaf<'_>) -> Result<(), SealError> {
    let mut questions = Questions::of(asking, vec![leaf]);
    match questions.ask(&|| false) {
        Some(_) => Ok(()),
        None => Err(questions.wrong.unwrap_or_else(|| LeafError::NoAnswer.into())),
    }
}

/// Whether somebody seems to have typed a recovery key, not a passphrase.
fn is_nearly_one(error: &SealError) -> bool {
    !matches!(error, SealError::Leaf(error) if matches!(**error, LeafError::Words(WordsError::Number(0..8))))
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
    fn of(asking: &'a Asking, mut left: Vec<PersonsLeaf<'a>>) -> Self {
        let opened = asking.opened();
        left.retain(|leaf| !opened.iter().any(|key| key.kid() == leaf.entry.kid()));
        Self { asking, left, tries: TRIES, wrong: None }
    }

    fn can_ask(&self) -> bool {
        self.asking.attendant.person().is_some() && !self.left.is_empty()
    }

    /// Asks until an answer opens a leaf; `None` if that is over, nobody answers, or too many answers were wrong.
    fn ask(&mut self, is_over: &dyn Fn() -> bool) -> Option<Arc<OwnerKey>> {
        let person = self.asking.attendant.person()?;
        while self.tries > 0 && !self.left.is_empty() {
            let answer = person.ask(&self.text(), is_over).filter(|answer| !answer.is_empty())?;
            match self.try_answer(&answer) {
                Ok(key) => {
                    self.left.retain(|leaf| leaf.entry.kid() != key.kid());
                    (self.tries, self.wrong) = (TRIES, None);
                    let key = Arc::new(key);
                    self.asking.opened.lock().unwrap_or_else(PoisonError::into_inner).push(key.clone());
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
        let mut kinds = Vec::new();
        for kind in self.left.iter().map(|leaf| leaf.entry.by.describe()) {
            if !kinds.contains(&kind) {
                kinds.push(kind);
            }
        }
        let again = self.wrong.as_ref().map(|error| format!("{error}. ")).unwrap_or_default();
        let text = format!("{again}Enter the {} of {} ({}): ", kinds.join(" or "), self.asking.of, self.names());
        printable(&text)
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
                let but = unfit.filter(is_nearly_one).map(|error| format!(" ({error})")).unwrap_or_default();
                Err(LeafError::OtherAnswer(self.names() + &but).into())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::atomic::AtomicUsize, time::Instant};

    use openssl::error::ErrorStack;

    use super::*;
    use crate::{
        base::{
            key::{JoseHeader, JweRecipient, SealedKey},
            person::Person,
        },
        config::{Config, LeafName, Network},
        keys::seal::{
            ContentKey, Recipient, Said, Shape, TYPE, Threshold, content, key_wrap,
            leaves::{
                self, Kind,
                person::{By, Kept, MOST},
            },
            seal_node,
        },
    };

    fn secret(text: &str) -> SecretBytes {
        SecretBytes::copy_of(text.as_bytes()).unwrap()
    }

    /// Says what it is told to, one answer after the other, and counts the questions.
    #[derive(Clone, Default)]
    struct Typist {
        answers: Arc<Vec<String>>,
        asked: Arc<AtomicUsize>,
        last: Arc<std::sync::Mutex<String>>,
    }

    impl Typist {
        fn of(answers: &[&str]) -> Self {
            Self { answers: Arc::new(answers.iter().map(|text| (*text).to_owned()).collect()), ..Self::default() }
        }

        fn asked(&self) -> usize {
            self.asked.load(SeqCst)
        }
    }

    impl Person for Typist {
        fn ask(&self, question: &str, is_over: &dyn Fn() -> bool) -> Option<SecretBytes> {
            question.clone_into(&mut self.last.lock().unwrap());
            let at = self.asked.fetch_add(1, SeqCst);
            match self.answers.get(at).map(String::as_str) {
                // Who thinks until it is over.
                Some("...") => {
                    while !is_over() {
                        thread::sleep(Duration::from_millis(5));
                    }
                    None
                }
                answer => answer.map(secret),
            }
        }
    }

    /// Leaves whose passphrases are "the passphrase of NAME", in files.
    struct Leaves {
        folder: tempfile::TempDir,
        names: Vec<&'static str>,
    }

    impl Leaves {
        fn new(names: &[&'static str]) -> Self {
            let leaves = Self { folder: tempfile::tempdir().unwrap(), names: names.to_vec() };
            for name in names {
                let kept = Kept::new(By::Passphrase, &secret(&passphrase(name))).unwrap();
                std::fs::write(leaves.folder.path().join(format!("{name}.json")), kept.to_json().unwrap()).unwrap();
            }
            leaves
        }

        fn kinds(&self) -> Vec<(LeafName, Box<dyn Kind>)> {
            let tables = self.names.iter().map(|name| format!("[leaves.{name}]\npassphrase = '{name}.json'\n"));
            let config = Config::parse(&tables.collect::<String>(), &self.folder.path().join("c.toml")).unwrap();
            let kind =
                |(name, config)| (LeafName::clone(name), leaves::kind(name, config, Network::default()).unwrap());
            config.leaves.iter().map(kind).collect()
        }

        fn recipient(&self, name: &str) -> Vec<Box<dyn Recipient>> {
            let kinds = self.kinds();
            let (_, kind) = kinds.iter().find(|(leaf, _)| leaf.as_str() == name).unwrap();
            kind.recipients(self.folder.path()).unwrap()
        }

        fn open(
            &self,
            sealed: &SealedKey,
            identities: Vec<Box<dyn Identity>>,
            typist: &Typist,
            patience: Duration,
        ) -> Outcome {
            let of = "container 'c'".to_owned();
            let asking = Asking { attendant: Attendant::of(typist.clone()), of, patience, ..Asking::default() };
            let names = std::collections::BTreeMap::new();
            let identities = Identities::of(identities).with_leaves(self.kinds(), names).with_person(asking);
            identities.open_node(&Node::of(sealed).unwrap())
        }
    }

    fn passphrase(name: &str) -> String {
        format!("the passphrase of {name}")
    }

    fn sealed(recipients: &[Box<dyn Recipient>]) -> SealedKey {
        let protected = serde_json::json!({"typ": TYPE, "enc": content::ENC}).to_string();
        let sealed = seal_node(&protected, &secret("the content"), recipients).unwrap();
        SealedKey::from_json(&sealed.to_json()).unwrap()
    }

    const LONG: Duration = Duration::from_secs(60);

    /// Somebody who takes his time, and then opens it or fails.
    struct Slow {
        key: SecretBytes,
        takes: Duration,
        opens: bool,
    }

    impl Slow {
        fn new(takes: Duration, opens: bool) -> Self {
            Self { key: secret(&"k".repeat(32)), takes, opens }
        }
    }

    impl Recipient for Slow {
        fn seal(&self, key: &ContentKey) -> Result<JweRecipient, SealError> {
            key_wrap::seal("slow", &self.key, key)
        }

        fn shape(&self) -> Shape {
            Shape::Key("slow".to_owned())
        }
    }

    impl Identity for Slow {
        fn kid(&self) -> &str {
            "slow"
        }

        fn alg(&self) -> &str {
            key_wrap::ALG
        }

        fn takes_time(&self) -> bool {
            true
        }

        fn unwrap(&self, encrypted_key: &[u8], _: &JoseHeader) -> Result<Option<ContentKey>, SealError> {
            thread::sleep(self.takes);
            if self.opens { key_wrap::unwrap(&self.key, encrypted_key) } else { Err(ErrorStack::get().into()) }
        }
    }

    #[test]
    fn a_person_is_asked_only_if_nothing_else_opens_it() {
        let leaves = Leaves::new(&["anna"]);
        let owner = OwnerKey::generate().unwrap();
        let recipients: Vec<Box<dyn Recipient>> =
            leaves.recipient("anna").into_iter().chain([Box::new(owner.recipient().unwrap()) as _]).collect();
        let (sealed, typist) = (sealed(&recipients), Typist::of(&["wrong", &passphrase("anna")]));
        let (content, told) = leaves.open(&sealed, vec![Box::new(owner)], &typist, LONG);
        assert_eq!((content.unwrap().expose(), typist.asked()), (&b"the content"[..], 0));
        assert_eq!(told.said, Said::Opened);
        let (content, told) = leaves.open(&sealed, Vec::new(), &typist, LONG);
        assert_eq!((content.unwrap().expose(), typist.asked()), (&b"the content"[..], 2));
        assert!(told.lines().contains(&"  anna: opened".to_owned()), "{told}");
        let last = typist.last.lock().unwrap().clone();
        assert_eq!(last, "what was typed opens none of: anna. Enter the passphrase of container 'c' (anna): ");
    }

    #[test]
    fn after_three_wrong_answers_nobody_is_asked_again() {
        let leaves = Leaves::new(&["anna"]);
        let sealed = sealed(&leaves.recipient("anna"));
        let typist = Typist::of(&["a", "b", "c", &passphrase("anna")]);
        let (content, _) = leaves.open(&sealed, Vec::new(), &typist, LONG);
        let error = content.err().unwrap();
        assert!(matches!(&error, SealError::Leaf(error) if matches!(**error, LeafError::OtherAnswer(_))), "{error}");
        assert_eq!(typist.asked(), 3);
        // Who gives up is not asked again, and is told what the policy lacks.
        let typist = Typist::of(&[""]);
        let (content, told) = leaves.open(&sealed, Vec::new(), &typist, LONG);
        assert!(matches!(content.err().unwrap(), SealError::PolicyNotMet(_)));
        assert_eq!((typist.asked(), told.lacks_a_person()), (1, true));
    }

    #[test]
    fn a_leaf_is_asked_for_once_whatever_it_opens() {
        let leaves = Leaves::new(&["anna"]);
        let (one, two) = (sealed(&leaves.recipient("anna")), sealed(&leaves.recipient("anna")));
        let typist = Typist::of(&[&passphrase("anna")]);
        let attendant = Attendant::of(typist.clone());
        let asking = Asking { attendant, patience: LONG, ..Asking::default() };
        for sealed in [&one, &two] {
            let names = std::collections::BTreeMap::new();
            let identities = Identities::default().with_leaves(leaves.kinds(), names).with_person(asking.clone());
            assert!(identities.open_node(&Node::of(sealed).unwrap()).0.is_ok());
        }
        assert_eq!(typist.asked(), 1);
    }

    #[test]
    fn two_persons_open_together_and_one_is_not_enough() {
        let leaves = Leaves::new(&["anna", "ben", "carl"]);
        let of = ["anna", "ben", "carl"].map(|name| leaves.recipient(name)).into();
        let sealed = sealed(&[Box::new(Threshold::of(2, of).unwrap())]);
        let typist = Typist::of(&[&passphrase("carl"), &passphrase("carl"), &passphrase("anna")]);
        let (content, told) = leaves.open(&sealed, Vec::new(), &typist, LONG);
        assert!(content.is_ok(), "{told}");
        assert_eq!(typist.asked(), 3);
        let alone = Typist::of(&[&passphrase("ben"), ""]);
        assert!(leaves.open(&sealed, Vec::new(), &alone, LONG).0.is_err());
    }

    #[test]
    fn whoever_is_first_ends_the_other() {
        let leaves = Leaves::new(&["anna"]);
        let slow = |takes, opens| Slow::new(Duration::from_millis(takes), opens);
        let recipients: Vec<Box<dyn Recipient>> =
            leaves.recipient("anna").into_iter().chain([Box::new(slow(0, true)) as _]).collect();
        let (sealed, patience) = (sealed(&recipients), Duration::from_millis(50));
        // The server answers while the person thinks: the prompt goes.
        let thinks = Typist::of(&["..."]);
        let (content, told) = leaves.open(&sealed, vec![Box::new(slow(300, true))], &thinks, patience);
        assert!(content.is_ok() && thinks.asked() == 1, "{told}");
        // The person answers first.
        let types = Typist::of(&[&passphrase("anna")]);
        let (content, told) = leaves.open(&sealed, vec![Box::new(slow(300, false))], &types, patience);
        assert!(content.is_ok() && types.asked() == 1, "{told}");
        // What is quick enough asks nobody.
        let nobody = Typist::of(&[]);
        assert!(leaves.open(&sealed, vec![Box::new(slow(1, true))], &nobody, LONG).0.is_ok());
        assert_eq!(nobody.asked(), 0);
    }

    #[test]
    fn a_key_asks_few_persons_and_each_within_bounds() {
        let leaves = Leaves::new(&["anna"]);
        let many = |number: usize| (0..number).flat_map(|_| leaves.recipient("anna")).collect::<Vec<_>>();
        assert!(Node::of(&sealed(&many(MOST))).is_ok());
        let error = Node::of(&sealed(&many(MOST + 1))).err().unwrap().to_string();
        assert_eq!(error, "its policy has more than 4 leaves that persons open");
        // As one who writes to the store would have it, also within a share.
        let mut hostile = sealed(&many(1));
        hostile.recipients[0].header["person"]["key"]["recipients"][0]["header"]["p2c"] = 2_000_001.into();
        let started = Instant::now();
        let error = Node::of(&hostile).err().unwrap().to_string();
        assert!(error.contains("'p2c' that is not from 1 to 2000000"), "{error}");
        assert!(started.elapsed() < Duration::from_secs(1));
        let mut hostile = sealed(&[Box::new(Threshold::of(2, vec![many(3), many(2)]).unwrap())]);
        assert!(Node::of(&hostile).err().unwrap().to_string().contains("more than 4"));
        hostile.recipients[0].header["sss"]["t"] = 1.into();
        assert!(Node::of(&hostile).is_err());
    }

    #[test]
    fn the_store_alone_is_enough_and_its_lies_open_nothing() {
        let leaves = Leaves::new(&["anna", "ben"]);
        let sealed = sealed(&leaves.recipient("anna"));
        std::fs::remove_file(leaves.folder.path().join("anna.json")).unwrap();
        let (content, _) = leaves.open(&sealed, Vec::new(), &Typist::of(&[&passphrase("anna")]), LONG);
        assert!(content.is_ok());
        // Another person's encrypted key under this public key.
        let mut lie = sealed;
        let kept = std::fs::read(leaves.folder.path().join("ben.json")).unwrap();
        lie.recipients[0].header["person"]["key"] =
            serde_json::from_slice::<serde_json::Value>(&kept).unwrap()["key"].clone();
        for name in ["anna", "ben"] {
            assert!(leaves.open(&lie, Vec::new(), &Typist::of(&[&passphrase(name)]), LONG).0.is_err());
        }
    }
}
