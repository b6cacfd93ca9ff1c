//! Policies in a sealed key's own form. A node is a JWE; its recipients are an *any*. A recipient may be a threshold,
//! `{"alg":"A256KW","sss":{"t","p","shares":[node, ...]}}`: the secret of a split wraps the content key, and each share is
//! sealed in a node again. So whatever seals content keys seals shares, and `jose` opens each node by itself.
//!
//! What a store gives is bounded before anything is opened. Then all leaves of a node are tried together. The node ends
//! with the share that was lacking, or as soon as there cannot be enough; the others are cancelled, and waited for.

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::{Arc, mpsc},
    thread,
};

use base64ct::{Base64UrlUnpadded, Encoding};
use serde::Serialize;
use serde_json::{Value, json};

use super::{
    ContentKey, Identity, OwnerKey, Recipient, SealError, check_enc, content, joint_header, key_wrap,
    leaves::{self, person},
    members, sss,
};
use crate::{
    base::{
        advice::Advice,
        chain::{chain, printable},
        exit::Exit,
        key::{JoseHeader, JweRecipient, SealedKey, SecretBytes},
    },
    config::{LeafName, policy},
    keys::net::http::Cancel,
};

/// The member of a recipient's header that makes it a threshold.
const MEMBER: &str = "sss";
/// `typ` of a node that has a share: it cannot be taken for a key, nor a key for it.
const SHARE_TYPE: &str = "cryptattach-share";

/// Whom a node is sealed to, for comparing; the order says nothing.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Shape {
    /// The holder of this key.
    Key(String),
    /// Enough of the holders of these shares.
    Threshold { least: usize, shares: Vec<BTreeSet<Shape>> },
}

/// At least `least` of these, each of which is an *any*.
pub struct Threshold {
    least: usize,
    of: Vec<Vec<Box<dyn Recipient>>>,
}

impl Threshold {
    /// `None` if there are fewer shares than it takes, for nobody holds the others.
    pub fn of(least: usize, of: Vec<Vec<Box<dyn Recipient>>>) -> Option<Self> {
        let of: Vec<_> = of.into_iter().filter(|any| !any.is_empty()).collect();
        (least >= 1 && least <= of.len()).then_some(Self { least, of })
    }
}

impl Recipient for Threshold {
    fn seal(&self, key: &ContentKey) -> Result<JweRecipient, SealError> {
        let (secret, shares) = sss::split(self.least, self.of.len())?;
        let protected = json!({"typ": SHARE_TYPE, "enc": content::ENC}).to_string();
        let node = |(share, any): (&SecretBytes, &Vec<Box<dyn Recipient>>)| super::seal_node(&protected, share, any);
        let nodes = shares.iter().zip(&self.of).map(node).collect::<Result<Vec<_>, _>>()?;
        let member = json!({"t": self.least, "p": Base64UrlUnpadded::encode_string(&sss::PRIME), "shares": nodes});
        let header = members(json!({"alg": key_wrap::ALG, MEMBER: member}));
        Ok(JweRecipient { header, encrypted_key: Base64UrlUnpadded::encode_string(&key_wrap::wrap(&secret, key)?) })
    }

    fn shape(&self) -> Shape {
        let any = |any: &Vec<Box<dyn Recipient>>| any.iter().map(|recipient| recipient.shape()).collect();
        let mut shares: Vec<_> = self.of.iter().map(any).collect();
        shares.sort();
        Shape::Threshold { least: self.least, shares }
    }
}

/// Whether nothing of a sealed key is a policy: its recipients are holders of keys, and nobody else has to be asked. A leaf may
/// have a holder's key, too: its recipient looks the same.
pub(super) fn is_plain(sealed: &SealedKey, leaves: &[(LeafName, Box<dyn leaves::Kind>)]) -> bool {
    let is_policy = |header: &JoseHeader| header.keys().any(|name| name == MEMBER || leaves::is_member(name));
    let is_of_leaf = |header: &JoseHeader| leaves.iter().any(|(_, leaf)| leaf.is_for(header));
    let is_other = |header: &JoseHeader| is_policy(header) || is_of_leaf(header);
    !is_policy(&sealed.unprotected) && !sealed.recipients.iter().any(|entry| is_other(&entry.header))
}

/// A node of which all is known but what only its keys tell.
pub struct Node {
    sealed: SealedKey,
    entries: Vec<Entry>,
}

struct Entry {
    recipient: JweRecipient,
    /// Protected, shared and per-recipient members together.
    header: JoseHeader,
    /// If it is a threshold.
    threshold: Option<(usize, Vec<Node>)>,
    /// If a person can be asked for it.
    person: Option<person::Entry>,
}

/// A leaf of a node that a person can be asked for.
pub(super) struct PersonsLeaf<'a> {
    pub name: &'a LeafName,
    pub entry: &'a person::Entry,
}

/// What a store may make us do for one key.
struct Budget {
    shares: usize,
    /// Leaves for which somebody has to be asked.
    asked: usize,
    /// Those for which a person has to be.
    persons: usize,
}

impl Node {
    /// Reads a sealed key, within bounds.
    pub fn of(sealed: &SealedKey) -> Result<Self, SealError> {
        // A tree of so many leaves has less than twice as many parts.
        let mut budget = Budget { shares: 2 * policy::MOST_LEAVES, asked: policy::MOST_LEAVES, persons: person::MOST };
        Self::within(sealed.clone(), &mut budget, 0)
    }

    fn within(sealed: SealedKey, budget: &mut Budget, depth: usize) -> Result<Self, SealError> {
        let protected = sealed.protected_header()?;
        let is_share = protected.get("typ").and_then(Value::as_str) == Some(SHARE_TYPE);
        if is_share != (depth > 0) {
            return Err(SealError::Unsupported("a share of its threshold is of another type".to_owned()));
        }
        check_enc(&protected)?;
        let entry = |recipient: &JweRecipient| {
            let mut header = joint_header([&protected, &sealed.unprotected, &recipient.header])?;
            if header.keys().any(|name| leaves::is_member(name)) {
                take(&mut budget.asked, 1, policy::MOST_LEAVES, "leaves")?;
            }
            let person = person::Entry::of(&header).transpose()?;
            if person.is_some() {
                take(&mut budget.persons, 1, person::MOST, "leaves that persons open")?;
                // The encrypted key is in `person`.
                let member = header.get_mut(person::MEMBER).and_then(Value::as_object_mut);
                member.map(|member| member.remove("key"));
            }
            let member = header.remove(MEMBER);
            let threshold = member.map(|member| Self::threshold(member, budget, depth + 1)).transpose()?;
            // The shares are in `threshold`: a large header is not kept twice.
            let encrypted_key = recipient.encrypted_key.clone();
            Ok(Entry {
                recipient: JweRecipient { header: JoseHeader::new(), encrypted_key },
                header,
                threshold,
                person,
            })
        };
        let entries = sealed.recipients.iter().map(entry).collect::<Result<_, SealError>>()?;
        Ok(Self { entries, sealed: SealedKey { recipients: Vec::new(), ..sealed } })
    }

    fn threshold(member: Value, budget: &mut Budget, depth: usize) -> Result<(usize, Vec<Self>), SealError> {
        let wrong = |what: &str| SealError::Unsupported(format!("its threshold has {what}"));
        if depth > policy::DEEPEST {
            return Err(wrong(&format!("more than {} levels", policy::DEEPEST)));
        }
        let Value::Object(mut member) = member else { return Err(wrong("no members")) };
        let prime = Base64UrlUnpadded::encode_string(&sss::PRIME);
        if member.get("p").and_then(Value::as_str) != Some(&prime) {
            return Err(wrong("an unsupported prime 'p'"));
        }
        let Some(Value::Array(shares)) = member.remove("shares") else { return Err(wrong("no 'shares'")) };
        take(&mut budget.shares, shares.len(), policy::MOST_LEAVES, "leaves")?;
        let least = member.get("t").and_then(Value::as_u64).and_then(|least| usize::try_from(least).ok());
        let least = least.filter(|least| (1..=shares.len()).contains(least));
        let least = least.ok_or_else(|| wrong("a 't' that is not from 1 to the number of its shares"))?;
        let node = |share| Self::within(SealedKey::from_value(share)?, budget, depth);
        Ok((least, shares.into_iter().map(node).collect::<Result<_, _>>()?))
    }

    /// Whom it is sealed to.
    pub fn shape(&self) -> BTreeSet<Shape> {
        let shape = |entry: &Entry| match &entry.threshold {
            None => Shape::Key(entry.kid().unwrap_or_default().to_owned()),
            Some((least, shares)) => {
                let mut shares: Vec<_> = shares.iter().map(Self::shape).collect();
                shares.sort();
                Shape::Threshold { least: *least, shares }
            }
        };
        self.entries.iter().map(shape).collect()
    }

    /// The leaves of the configuration that a person can be asked for, each once.
    pub(super) fn persons<'a>(&'a self, leaves: &'a [(LeafName, Box<dyn leaves::Kind>)]) -> Vec<PersonsLeaf<'a>> {
        let mut persons: Vec<PersonsLeaf<'a>> = Vec::new();
        for Entry { header, threshold, person, .. } in &self.entries {
            let below = threshold.iter().flat_map(|(_, shares)| shares).flat_map(|share| share.persons(leaves));
            let of_leaf = || leaves.iter().find(|(_, leaf)| leaf.is_for(header));
            let own = person.as_ref().and_then(|entry| Some(PersonsLeaf { name: &of_leaf()?.0, entry }));
            for leaf in below.chain(own) {
                if !persons.iter().any(|known| known.entry.kid() == leaf.entry.kid()) {
                    persons.push(leaf);
                }
            }
        }
        persons
    }
}

/// Somebody whom a node is sealed to, by the name that people have for them; or a threshold of such.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SealedTo {
    /// "owner", a leaf's name, "2 of 3", "any".
    pub name: String,
    /// The id of their key.
    pub kid: Option<String>,
    pub alg: Option<String>,
    pub of: Vec<SealedTo>,
}

impl Openers<'_> {
    /// Whom a node is sealed to; nobody is asked.
    pub fn whom(&self, node: &Node) -> Vec<SealedTo> {
        let any = |mut of: Vec<SealedTo>| match of.len() {
            1 => of.remove(0),
            _ => SealedTo { name: "any".to_owned(), kid: None, alg: None, of },
        };
        let whom = |entry: &Entry| SealedTo {
            name: self.told(entry).part,
            kid: entry.kid().map(str::to_owned),
            alg: entry.header.get("alg").and_then(Value::as_str).map(str::to_owned),
            of: entry.threshold.iter().flat_map(|(_, shares)| shares).map(|share| any(self.whom(share))).collect(),
        };
        node.entries.iter().map(whom).collect()
    }

    /// The leaves whose servers have newer keys than those that a node is sealed to.
    pub fn outdated(&self, node: &Node) -> Vec<LeafName> {
        let mut sealed_to = Vec::new();
        self.sealed_to(node, &mut sealed_to);
        leaves::outdated(&sealed_to).into_iter().cloned().collect()
    }

    fn sealed_to<'a>(&'a self, node: &Node, found: &mut Vec<(&'a LeafName, &'a dyn leaves::Kind, String)>) {
        for entry in &node.entries {
            let leaf = self.leaves.iter().find(|(_, leaf)| leaf.is_for(&entry.header));
            if let Some(((name, leaf), kid)) = leaf.zip(entry.kid()) {
                found.push((name, &**leaf, kid.to_owned()));
            }
            let shares = entry.threshold.iter().flat_map(|(_, shares)| shares);
            shares.for_each(|share| self.sealed_to(share, found));
        }
    }
}

fn take(budget: &mut usize, number: usize, most: usize, of: &str) -> Result<(), SealError> {
    let too_many = || SealError::Unsupported(format!("its policy has more than {most} {of}"));
    *budget = budget.checked_sub(number).ok_or_else(too_many)?;
    Ok(())
}

impl Entry {
    fn kid(&self) -> Option<&str> {
        self.header.get("kid")?.as_str()
    }
}

/// What a part of a policy said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Told {
    /// A leaf's name, "2 of 3" or "any".
    pub part: String,
    pub said: Said,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub of: Vec<Told>,
}

/// What it said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Said {
    /// It gave its share, or the key.
    Opened,
    /// The others were enough.
    NotNeeded,
    /// This host has nothing that opens it.
    NotHere,
    /// A person opens it, and was not asked.
    NotAsked,
    /// It failed.
    Failed {
        why: String,
        #[serde(skip)]
        exit: Exit,
    },
}

impl Said {
    /// What is said of an entry that nothing on this host is for.
    fn of_stranger(entry: &Entry) -> Self {
        leaves::not_configured(&entry.header).map_or(Self::NotHere, |error| Self::failed(&error.into()))
    }

    pub(super) fn failed(error: &SealError) -> Self {
        Self::Failed { why: chain(error), exit: error.exit() }
    }
}

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Opened => f.write_str("opened"),
            Self::NotNeeded => f.write_str("not needed"),
            Self::NotHere => f.write_str("this host has no key for it"),
            Self::NotAsked => f.write_str("nobody was asked for it"),
            Self::Failed { why, .. } => f.write_str(why),
        }
    }
}

impl fmt::Display for Told {
    /// On one line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}", self.part, self.said)?;
        for (number, told) in self.of.iter().enumerate() {
            write!(f, "{}{told}", if number == 0 { ": " } else { ", " })?;
        }
        f.write_str(")")
    }
}

impl Told {
    /// What a node said: its only part, or *any* of several.
    fn of_node(mut parts: Vec<Self>) -> Self {
        if parts.len() == 1 {
            return parts.remove(0);
        }
        let said = if parts.iter().any(|told| told.said == Said::Opened) {
            Said::Opened
        } else if parts.iter().all(|told| told.said == Said::NotHere) {
            Said::NotHere
        } else if parts.iter().any(|told| told.said == Said::NotNeeded) {
            Said::NotNeeded
        } else {
            Said::Failed { why: "none of them opened it".to_owned(), exit: Exit::KeyRefused }
        };
        Self { part: "any".to_owned(), said, of: parts }
    }

    /// As a tree, a line per part.
    pub fn lines(&self) -> Vec<String> {
        let own = format!("{}: {}", self.part, self.said);
        let below = self.of.iter().flat_map(Self::lines).map(|line| format!("  {line}"));
        [own].into_iter().chain(below).collect()
    }

    /// Of what is open, no person is lacking.
    pub(super) fn opened(mut self) -> Self {
        if self.said == Said::NotAsked {
            self.said = Said::NotNeeded;
        }
        self.of = self.of.into_iter().map(Self::opened).collect();
        self
    }

    /// Whether a person might have opened a part of it.
    pub(super) fn lacks_a_person(&self) -> bool {
        self.said == Said::NotAsked || self.of.iter().any(Self::lacks_a_person)
    }

    /// The exit code of a policy that is not met: one that asks for another try, if a leaf had that.
    pub(super) fn exit(&self) -> Exit {
        let own = match &self.said {
            Said::Failed { exit, .. } if self.of.is_empty() => Some(*exit),
            _ => None,
        };
        let is_temporary = |exit: &Exit| *exit == Exit::StoreUnavailable;
        let mut all = own.into_iter().chain(self.of.iter().map(Self::exit));
        all.find(is_temporary).unwrap_or(Exit::KeyRefused)
    }
}

/// What opens nodes on this host.
pub(super) struct Openers<'a> {
    pub identities: &'a [Box<dyn Identity>],
    pub leaves: &'a [(LeafName, Box<dyn leaves::Kind>)],
    /// What people call the holders of keys, by key id.
    pub names: &'a BTreeMap<String, String>,
    /// The keys of leaves that persons have opened.
    pub persons: &'a [Arc<OwnerKey>],
}

impl Openers<'_> {
    /// The content of a node, and what each part of its policy said.
    pub fn content(&self, node: &Node, cancel: &Cancel) -> (Result<SecretBytes, SealError>, Told) {
        let (key, mut told) = self.key(node, cancel);
        let content = key.and_then(|key| {
            content::Sealed {
                iv: super::decode("iv", &node.sealed.iv)?,
                ciphertext: super::decode("ciphertext", &node.sealed.ciphertext)?,
                tag: super::decode("tag", &node.sealed.tag)?,
            }
            .open(&key, &node.sealed.authenticated())
        });
        match content {
            Err(error) if told.said == Said::Opened => {
                told.said = Said::failed(&error);
                (Err(error), told)
            }
            content => (content, told),
        }
    }

    fn key(&self, node: &Node, cancel: &Cancel) -> (Result<ContentKey, SealError>, Told) {
        let mut told: Vec<Told> = node.entries.iter().map(|entry| self.told(entry)).collect();
        let (mut slow, mut seen) = (Vec::new(), BTreeSet::new());
        // Keys in memory first: whoever has one asks nobody.
        for (at, entry) in node.entries.iter().enumerate() {
            let opened = if entry.threshold.is_some() { None } else { self.quickly(entry) };
            match opened {
                Some(Ok(key)) => {
                    told[at].said = Said::Opened;
                    return (Ok(key), Told::of_node(told));
                }
                Some(Err(error)) => told[at].said = Said::failed(&error),
                // A TPM or server is asked once for each key, however often the store names it.
                None if entry.threshold.is_some() => slow.push(at),
                None if entry.person.is_some() && self.may_open(entry) => told[at].said = Said::NotAsked,
                None if self.may_open(entry) && seen.insert(entry.kid()) => slow.push(at),
                None => told[at].said = Said::of_stranger(entry),
            }
        }
        let jobs = slow.iter().map(|at| {
            let entry = &node.entries[*at];
            Box::new(move |cancel: &Cancel| self.slowly(entry, cancel)) as Job<'_, ContentKey>
        });
        let (mut keys, said) = race(jobs.collect(), 1, cancel);
        for (at, said) in slow.into_iter().zip(said) {
            told[at] = said;
        }
        let told = Told::of_node(told);
        let key = keys.pop().ok_or_else(|| SealError::PolicyNotMet(Box::new(told.clone())));
        (key, told)
    }

    /// Whether this host has something that may open it, if it takes its time.
    fn may_open(&self, entry: &Entry) -> bool {
        let mut slow = self.identities.iter().filter(|identity| identity.takes_time());
        slow.any(|identity| entry.kid() == Some(identity.kid()))
            || self.leaves.iter().any(|(_, leaf)| leaf.is_for(&entry.header))
    }

    fn quickly(&self, entry: &Entry) -> Option<Result<ContentKey, SealError>> {
        let quick = self.identities.iter().map(|identity| &**identity).filter(|identity| !identity.takes_time());
        let mut quick = self.persons.iter().map(|person| &**person as &dyn Identity).chain(quick);
        quick.find_map(|identity| identity.open(&entry.recipient, &entry.header))
    }

    fn slowly(&self, entry: &Entry, cancel: &Cancel) -> (Result<ContentKey, SealError>, Told) {
        let mut told = self.told(entry);
        let key = match &entry.threshold {
            Some((least, shares)) => {
                let (key, of) = self.threshold(entry, *least, shares, cancel);
                told.of = of;
                Some(key)
            }
            None => {
                let mut slow = self.identities.iter().filter(|identity| identity.takes_time());
                let by_identity = slow.find_map(|identity| identity.open(&entry.recipient, &entry.header));
                by_identity.or_else(|| {
                    let mut leaves = self.leaves.iter();
                    leaves.find_map(|(_, leaf)| leaf.open(&entry.recipient, &entry.header, cancel))
                })
            }
        };
        told.said = match &key {
            Some(Ok(_)) => Said::Opened,
            Some(Err(_)) if cancel.is_cancelled() => Said::NotNeeded,
            Some(Err(error)) => Said::failed(error),
            None => Said::NotHere,
        };
        (key.unwrap_or(Err(SealError::TooFewShares { had: 0, least: 1 })), told)
    }

    fn threshold(
        &self,
        entry: &Entry,
        least: usize,
        shares: &[Node],
        cancel: &Cancel,
    ) -> (Result<ContentKey, SealError>, Vec<Told>) {
        let jobs = shares
            .iter()
            .map(|share| Box::new(move |cancel: &Cancel| self.content(share, cancel)) as Job<'_, SecretBytes>);
        let (shares, told) = race(jobs.collect(), least, cancel);
        let key = if shares.len() < least {
            Err(SealError::TooFewShares { had: shares.len(), least })
        } else {
            sss::combine(&shares).and_then(|secret| key_wrap::unwrap_entry(&secret, &entry.recipient))
        };
        (key, told)
    }

    fn told(&self, entry: &Entry) -> Told {
        let part = match &entry.threshold {
            Some((least, shares)) => format!("{least} of {}", shares.len()),
            None => {
                let of_leaf = self.leaves.iter().find(|(_, leaf)| leaf.is_for(&entry.header));
                let named = entry.kid().and_then(|kid| self.names.get(kid).cloned());
                let key = || format!("the key {}", printable(entry.kid().unwrap_or("without id")));
                of_leaf.map(|(name, _)| name.to_string()).or(named).unwrap_or_else(key)
            }
        };
        Told { part, said: Said::NotNeeded, of: Vec::new() }
    }
}

pub(super) type Job<'a, T> = Box<dyn FnOnce(&Cancel) -> (Result<T, SealError>, Told) + Send + 'a>;

/// Does all at once until as many have succeeded as are needed, or cannot any more. The others are cancelled and waited for:
/// a thread that runs on while the process ends meets libcrypto's own end.
pub(super) fn race<T: Send>(jobs: Vec<Job<'_, T>>, need: usize, outer: &Cancel) -> (Vec<T>, Vec<Told>) {
    let (cancel, number) = (outer.below(), jobs.len());
    let (mut had, mut lost) = (Vec::new(), 0);
    let mut told: Vec<Option<Told>> = (0..number).map(|_| None).collect();
    let mut take = |at: usize, (result, said): (Result<T, SealError>, Told)| {
        told[at] = Some(said);
        match result {
            Ok(value) if had.len() < need => had.push(value),
            Ok(_) => {}
            Err(_) => lost += 1,
        }
        if had.len() >= need || number - lost < need {
            cancel.cancel();
        }
    };
    if number == 1 {
        jobs.into_iter().for_each(|job| take(0, job(&outer.below())));
    } else {
        thread::scope(|scope| {
            let (sender, ended) = mpsc::channel();
            let cancel = &cancel;
            for (at, job) in jobs.into_iter().enumerate() {
                let sender = sender.clone();
                scope.spawn(move || drop(sender.send((at, job(cancel)))));
            }
            drop(sender);
            ended.into_iter().for_each(|(at, outcome)| take(at, outcome));
        });
    }
    (had, told.into_iter().flatten().collect())
}
