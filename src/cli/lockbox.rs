//! `cryptattach lockbox ...`

use std::path::Path;

use base64ct::{Base64UrlUnpadded, Encoding};
use clap::{ArgGroup, Args, Subcommand};
use serde_json::{Value, json};

use super::{Global, output};
use crate::{
    base::key::KeyReference,
    config::Config,
    keys::seal::EntryContext,
    unlock::{
        audit::{self, Event},
        case::{Asked, Case, Circumstances},
        container::{Container, Use},
        lockbox::{self, EntryStatus, Lockbox, LockboxError, LockboxKeyFrom, Opening, State, Status as Known},
    },
    verbs::error::Error,
    volumes::header,
};

/// Cache this host's keys for times when the key store cannot be reached
#[derive(Subcommand)]
pub enum LockboxVerb {
    Open(Open),
    Close(Close),
    #[command(alias = "list")]
    Status(Status),
    Add(Add),
    Forget(Forget),
}

/// Open the lockbox until power-off: fetch this host's lockbox key and open it with the host's identity
///
/// Run it once per boot. If the lockbox is already open, it asks the store whether this host is still admitted. If the
/// host is not admitted, it removes everything in the lockbox. If the host's identity is in its TPM, it extends PCR 15:
/// the TPM then opens the lockbox again only after the next power-on.
#[derive(Args)]
pub struct Open {
    /// Trust only the lockbox key with this fingerprint, which 'host admit' printed
    // One in 64 begins with a hyphen.
    #[arg(long, value_name = "FINGERPRINT", value_parser = fingerprint, allow_hyphen_values = true)]
    fingerprint: Option<String>,
}

/// A SHA-256 thumbprint in base64url (RFC 7638).
pub(super) fn fingerprint(text: &str) -> Result<String, String> {
    match Base64UrlUnpadded::decode_vec(text) {
        Ok(digest) if digest.len() == 32 => Ok(text.to_owned()),
        _ => Err("43 characters of base64url".to_owned()),
    }
}

/// Close the lockbox: remove its key from the kernel's keyring, and remove its entries
///
/// Volumes that are attached stay attached.
#[derive(Args)]
pub struct Close {}

/// Show whether the lockbox is open, its entries, and what a thief of this server could open
#[derive(Args)]
pub struct Status {}

/// Fetch keys from their store and add them to the lockbox, replacing older entries
#[derive(Args)]
#[command(after_help = "Examples:
  cryptattach lockbox add /dev/vdb /dev/vdc
  cryptattach lockbox add cinder/3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de")]
pub struct Add {
    /// Encrypted devices whose headers name their keys, or keys (STORE/KEY-ID)
    #[arg(required = true, value_name = "DEVICE|KEY")]
    keys: Vec<String>,
}

/// Remove entries from the lockbox; the keys stay in their store
#[derive(Args)]
#[command(group = ArgGroup::new("which").required(true).args(["key", "all"]))]
pub struct Forget {
    /// The key (STORE/KEY-ID)
    key: Option<KeyReference>,
    /// Remove all entries
    #[arg(long)]
    all: bool,
}

impl LockboxVerb {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let config = global.config()?;
        let lockbox = Lockbox::configured(&config)?;
        match self {
            Self::Open(open) => open.run(&config, &lockbox, global.json),
            Self::Close(_) => close(&config, &lockbox, global.json),
            Self::Status(_) => status(&config, &lockbox, global.json),
            Self::Add(add) => add.run(&config, &lockbox, global.json),
            Self::Forget(forget) => forget.run(&config, &lockbox, global.json),
        }
    }
}

impl Open {
    fn run(&self, config: &Config, lockbox: &Lockbox, json: bool) -> Result<(), Error> {
        let opened = lockbox.open(config, self.fingerprint.as_deref());
        if let Err(LockboxError::Removed { .. }) = &opened {
            record(config, "lockbox wipe", lockbox, None);
        }
        if let Err(LockboxError::NotLatched { .. }) = &opened {
            record(config, "lockbox close", lockbox, None);
        }
        let opening = opened?;
        if !opening.already_open {
            record(config, "lockbox open", lockbox, None);
        }
        if opening.from == Some(LockboxKeyFrom::Store) {
            lockbox.leave_time(config);
        }
        output::print(json, &opening, || said(lockbox, &opening))
    }
}

fn said(lockbox: &Lockbox, opening: &Opening) -> Vec<String> {
    let host = lockbox.host();
    let first = if opening.already_open { "is open already" } else { "is open" };
    let mut lines = vec![format!("the lockbox of '{host}' {first}"), format!("  fingerprint  {}", opening.fingerprint)];
    lines.push(match opening.from {
        Some(LockboxKeyFrom::Store) => "  admitted     yes, the store has its lockbox key".to_owned(),
        Some(LockboxKeyFrom::Copy) => "  admitted     not known; it was opened from the copy on this host".to_owned(),
        None => "  admitted     not known; the store cannot be reached".to_owned(),
    });
    lines.push(format!("  key kept in  {}", opening.kept));
    if opening.latched {
        lines.push("  latch        PCR 15 is extended: the TPM opens it again after the next power-on".to_owned());
    }
    if opening.swept > 0 {
        lines.push(format!(
            "  swept        {}: expired, damaged or of another lockbox key",
            lockbox::removed(opening.swept)
        ));
    }
    lines
}

fn close(config: &Config, lockbox: &Lockbox, json: bool) -> Result<(), Error> {
    let closed = lockbox.close()?;
    record(config, "lockbox close", lockbox, None);
    output::print(json, &closed, || closed.to_string())
}

fn status(config: &Config, lockbox: &Lockbox, json: bool) -> Result<(), Error> {
    let known = lockbox.status(config)?;
    output::print(json, &known, || words(&known))
}

fn words(known: &Known) -> Vec<String> {
    let Known { host, store, path, .. } = known;
    let mut lines = vec![
        format!("the lockbox of '{host}' is {}", if known.open { "open" } else { "closed" }),
        format!("  sealed key   in the store '{store}'"),
    ];
    lines.extend(
        known.copy.iter().map(|copy| format!("               and in {}, for boots without the store", copy.display())),
    );
    lines.extend(known.fingerprint.iter().map(|fingerprint| format!("  fingerprint  {fingerprint}")));
    lines.extend(known.kept.iter().map(|kept| format!("  open key     in {kept}")));
    lines.push(format!("  entries      {} in {}", known.entries.len(), path.display()));
    lines.extend(known.entries.iter().map(entry));
    lines.push("someone who steals this server has".to_owned());
    lines.extend(known.stolen.iter().map(|line| format!("  {line}")));
    lines
}

pub(super) fn entry(entry: &EntryStatus) -> String {
    let time = |seconds: Option<u64>| seconds.map_or("?".to_owned(), duration);
    let state = match (entry.state, &entry.why) {
        (State::Valid, _) => "valid".to_owned(),
        (State::Closed, _) => "closed".to_owned(),
        (State::Unusable, why) => format!("not used: {}", why.as_deref().unwrap_or_default()),
    };
    let (age, left) = (time(entry.age_seconds), time(entry.expires_in_seconds));
    format!("    {}  {age} old, {left} left, {state}", entry.key)
}

pub(super) fn duration(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        _ => format!("{} h", seconds / 3600),
    }
}

impl Add {
    fn run(&self, config: &Config, lockbox: &Lockbox, json: bool) -> Result<(), Error> {
        lockbox.open_key()?;
        let mut added: Vec<Value> = Vec::new();
        for text in &self.keys {
            let (key, entry) = add(config, text)?;
            record(config, "lockbox add", lockbox, Some(&key));
            added.push(json!({"key": key, "expires": entry.expires}));
        }
        output::print(json, &added, || match added.len() {
            1 => format!("1 entry was added to the lockbox of '{}'", lockbox.host()),
            many => format!("{many} entries were added to the lockbox of '{}'", lockbox.host()),
        })
    }
}

/// Adds a key, given as it is, or by a device: then its entry must not come to be on that device.
fn add(config: &Config, text: &str) -> Result<(KeyReference, EntryContext), Error> {
    let (reference, entry) = match text.parse::<KeyReference>() {
        Ok(reference) => {
            let container = Container::open(config, &reference.store, None, Use::Keys)?;
            let entry = container.add_reference_to_lockbox(&reference.key)?;
            (reference, entry)
        }
        Err(_) => {
            let volume = header::probe(Path::new(text), None)?;
            let case = Case::find(config, volume, Asked::default())?;
            let reference = case.reference().clone();
            (reference, case.prove(Circumstances::default())?.add_to_lockbox()?)
        }
    };
    let unsealed =
        || Error::Usage(format!("the store keeps {reference} unsealed and decides at each request who gets it"));
    let entry = entry.ok_or_else(unsealed)?;
    Ok((reference, entry))
}

impl Forget {
    fn run(&self, config: &Config, lockbox: &Lockbox, json: bool) -> Result<(), Error> {
        let removed = match &self.key {
            Some(key) => usize::from(lockbox.forget(key)?),
            None => lockbox.forget_all()?,
        };
        record(config, "lockbox forget", lockbox, self.key.as_ref());
        output::print(json, &json!({"removed": removed}), || lockbox::removed(removed))
    }
}

fn record(config: &Config, action: &str, lockbox: &Lockbox, key: Option<&KeyReference>) {
    let event =
        Event { action, key: key.map(ToString::to_string), name: Some(lockbox.host().to_string()), ..Event::default() };
    audit::done(config, &event);
}
