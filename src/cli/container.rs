//! `cryptattach container ...`

use std::{path::PathBuf, time::Duration};

use clap::{ArgGroup, Args, Subcommand};

use super::{AnswerOption, Global, backup, bar::with_bar, holder::HolderVerb, key::openers, output, paper};
use crate::{
    base::key::StoreName,
    config::{Config, IdentitySpec, LeafName, Policy},
    keys::store::Access,
    unlock::{
        self,
        container::{By, Container as Open, Rotation, Use},
    },
    verbs::{
        container::{self, New, Request},
        error::Error,
        holder::Holder,
        leaf::Hands,
        policy,
        setup::NewPlace,
    },
};

/// Manage containers of keys: their access lists and their container keys
#[derive(Subcommand)]
pub enum Container {
    Create(Create),
    Show(Show),
    Rotate(Rotate),
    Policy(PolicyVerb),
    /// Change whose key the owner's is
    #[command(subcommand)]
    Owner(HolderVerb),
    /// Change whose key the escrow's is
    #[command(subcommand)]
    Escrow(HolderVerb),
    Rehearse(Rehearse),
    Backup(backup::Backup),
    Restore(backup::Restore),
}

/// Create a container and its first container key, and configure it as a store
///
/// The container is in Swift, with access lists, in a directory, or in the TPM. If the store is already configured, the container
/// is created as configured. An existing container gets the given access lists and keeps its keys. Keys that are sealed
/// to the owner stay so until 'container rotate'.
#[derive(Args)]
#[command(
    group = ArgGroup::new("rescue").multiple(true).args(["escrow", "no_escrow", "recovery"]),
    after_help = "Examples:
  cryptattach container create cinder --cloud keys --owner cinder.pem --escrow escrow.pem
  cryptattach container create cinder --cloud keys --owner cinder.pem --escrow escrow.pem --identity cinder.key \\
      --reader 3fb8…:91c2…          Swift's ACL element: PROJECT-ID:USER-ID
  cryptattach container create logs --path /mnt/keys/logs --owner logs.pem --escrow escrow.pem
  cryptattach container create logs --path /mnt/keys/logs --owner logs.pem --recovery
  cryptattach container create disk --tpm-nv --owner disk.pem --escrow escrow.pem --identity tpm:host.tpm.pem"
)]
pub struct Create {
    /// Name of the store and of its container
    name: StoreName,
    /// Entry of clouds.yaml [default: OS_CLOUD]
    #[arg(long)]
    cloud: Option<String>,
    /// Create the container in this directory instead of Swift
    #[arg(long, value_name = "DIR", conflicts_with_all = ["cloud", "readers", "writers"])]
    path: Option<PathBuf>,
    /// Create the container in this machine's TPM instead of Swift
    #[arg(long, conflicts_with_all = ["cloud", "path", "readers", "writers"])]
    tpm_nv: bool,
    /// Public key or certificate (PEM) of the service that owns the keys
    #[arg(long, value_name = "FILE")]
    owner: Option<PathBuf>,
    /// Public key or certificate (PEM) for recovery, whose private key is kept offline
    #[arg(long, value_name = "FILE")]
    escrow: Option<PathBuf>,
    /// Use no escrow: if the owner's key is lost, all data is lost
    #[arg(long, conflicts_with = "escrow")]
    no_escrow: bool,
    /// Make a recovery key, too: words for paper, shown once; they open the container like an escrow's private key
    #[arg(long)]
    recovery: bool,
    /// The owner's private key on this host: FILE in PEM, or tpm:FILE
    #[arg(long, value_name = "FILE")]
    identity: Option<IdentitySpec>,
    /// Allow this user to fetch and list keys (PROJECT:USER, by their ids); repeatable
    #[arg(long = "reader", value_name = "WHO", value_parser = access_element)]
    readers: Vec<String>,
    /// Allow this user also to create and delete keys; repeatable
    #[arg(long = "writer", value_name = "WHO", value_parser = access_element)]
    writers: Vec<String>,
}

/// Show a container: its access lists, its container key, and by name who opens it
///
/// Says of each opener since when at least, and by which proof a host was admitted. All of that is what the store says:
/// 'container rehearse' and 'test' prove it.
#[derive(Args)]
pub struct Show {
    /// The store [default: default_store of the configuration, or its only store]
    name: Option<StoreName>,
}

/// Create the next container key and seal all keys of the container under it
///
/// Run it to withdraw a host or an owner. It does not touch the volumes. Resumes if interrupted.
#[derive(Args)]
pub struct Rotate {
    /// The store
    name: StoreName,
    /// Delete container keys that were replaced more than this many days ago; Swift may list a key up to a week late
    #[arg(long, value_name = "DAYS", default_value_t = 7)]
    keep_days: u32,
    #[command(flatten)]
    answer: AnswerOption,
}

/// Change what may open a container: write the policy to the configuration, and seal all keys under the next container key
///
/// A policy is a leaf's name, any(...), all(...) or N of (...). Leaves are owner, escrow, hosts and the names of
/// [leaves.NAME]. It does not touch the volumes. Resumes if interrupted.
#[derive(Args)]
#[command(
    name = "policy",
    after_help = "Examples:
  cryptattach container policy cinder 'any(escrow, all(tpm, 2 of (t1, t2, t3)))'
  cryptattach container policy cinder 'any(owner, escrow, hosts)'      the default"
)]
pub struct PolicyVerb {
    /// The store
    name: StoreName,
    /// The policy
    policy: Policy,
    /// Delete container keys that were replaced more than this many days ago; Swift may list a key up to a week late
    #[arg(long, value_name = "DAYS", default_value_t = 7)]
    keep_days: u32,
    #[command(flatten)]
    answer: AnswerOption,
}

/// Rehearse the recovery of a container: would the escrow's key, or the words on paper, alone open each of its keys?
///
/// Changes nothing in the store and uses nothing else that this host has. Says how many keys would be saved, and which
/// would be lost and why. Exits with an error if any would be lost.
#[derive(Args)]
#[command(
    group = ArgGroup::new("by").args(["with", "identity"]),
    after_help = "Examples:
  cryptattach container rehearse cinder                               asks for the words of the container's recovery key
  cryptattach container rehearse cinder --with anna                   asks for a passphrase
  cryptattach container rehearse cinder --identity /media/usb/escrow.key"
)]
pub struct Rehearse {
    /// The store
    name: StoreName,
    /// The leaf that a person opens [default: the policy's recovery key]
    #[arg(long, value_name = "LEAF")]
    with: Option<LeafName>,
    /// The escrow's private key: FILE in PEM, or tpm:FILE
    #[arg(long, value_name = "FILE")]
    identity: Option<IdentitySpec>,
    /// Rehearse over this backup of the container, and not over its store
    #[arg(long, value_name = "FILE")]
    backup: Option<PathBuf>,
    #[command(flatten)]
    answer: AnswerOption,
}

/// One element of Swift's ACLs; `.r:*` would open the container to everyone.
fn access_element(text: &str) -> Result<String, String> {
    let fits = text.contains(':') && !text.starts_with('.') && !text.contains([',', ' ']) && !text.contains('*');
    if fits {
        Ok(text.to_owned())
    } else {
        Err("expected PROJECT:USER without '*' (keys are never for everyone)".to_owned())
    }
}

impl Container {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        match self {
            Self::Create(create) => create.run(global),
            Self::Show(show) => show.run(global),
            Self::Rotate(rotate) => rotate.run(global),
            Self::Policy(policy) => policy.run(global),
            Self::Owner(owner) => owner.run(global, Holder::Owner),
            Self::Escrow(escrow) => escrow.run(global, Holder::Escrow),
            Self::Rehearse(rehearse) => rehearse.run(global),
            Self::Backup(backup) => backup.run(global),
            Self::Restore(restore) => restore.run(global),
        }
    }
}

impl Create {
    fn run(&self, global: &Global) -> Result<(), Error> {
        let hands = paper::at_terminal(self.recovery)?;
        let request = Request {
            name: &self.name,
            access: Access { readers: &self.readers, writers: &self.writers },
            new: New {
                place: match &self.path {
                    Some(path) => NewPlace::Directory(path),
                    None if self.tpm_nv => NewPlace::Tpm,
                    None => NewPlace::Swift(self.cloud.as_deref()),
                },
                owner: self.owner.as_deref(),
                escrow: self.escrow.as_deref(),
                no_escrow: self.no_escrow,
                identity: self.identity.as_ref(),
                recovery: hands.as_ref().map(|hands| hands as &dyn Hands),
            },
        };
        let config = container::create(&global.config, &request)?;
        show(&config, &self.name, global.json)
    }
}

impl Show {
    fn run(&self, global: &Global) -> Result<(), Error> {
        let config = global.config()?;
        let name = config.store_or_default(self.name.as_ref())?;
        show(&config, &name, global.json)
    }
}

fn show(config: &Config, name: &StoreName, json: bool) -> Result<(), Error> {
    let (mut facts, told) = container::facts(config, name)?;
    let opened_by = Open::open(config, name, None, Use::Keys)?.opened_by()?;
    facts.own.insert("opened_by".to_owned(), serde_json::json!(opened_by));
    let sealing = &config.store(name)?.sealing;
    if sealing.has_policy() {
        facts.own.insert("opens".to_owned(), sealing.policy.to_string().into());
        facts.lines.push(("opens", sealing.policy.to_string()));
    }
    if let Some(told) = told {
        facts.lines.extend(told.lines().into_iter().map(|line| ("", line)));
        facts.own.insert("policy".to_owned(), serde_json::json!(told));
    }
    output::print(json, &facts, || {
        let mut lines = vec![format!("store '{name}'")];
        lines.extend(facts.lines.iter().map(|(what, value)| format!("  {what:17}{value}")));
        lines.push(match facts.epoch.as_ref().map(|epoch| epoch.to_string()) {
            Some(epoch) => format!("  container key    {name}/kek/{}", epoch.trim_matches('"')),
            None => "  container key    none yet: the first key that is stored makes it".to_owned(),
        });
        lines.extend(facts.fingerprint.iter().map(|fingerprint| format!("  fingerprint      {fingerprint}")));
        let under_way = || format!("  rotation         under way: 'cryptattach container rotate {name}' finishes it");
        lines.extend(facts.rotating.then(under_way));
        lines.extend(opened_by.iter().flat_map(openers));
        lines
    })
}

impl Rotate {
    fn run(&self, global: &Global) -> Result<(), Error> {
        let config = global.attended(&self.answer)?;
        let rotation =
            with_bar(global.json, |progress| container::rotate(&config, &self.name, days(self.keep_days), progress))?;
        output::print(global.json, &rotation, || lines_of(&self.name, &rotation))?;
        finished(&self.name, &rotation)
    }
}

impl Rehearse {
    fn run(&self, global: &Global) -> Result<(), Error> {
        let config = global.attended(&self.answer)?;
        let default;
        let by = match (&self.identity, &self.with) {
            (Some(identity), _) => By::Identity(identity),
            (None, Some(leaf)) => By::Leaf(leaf),
            (None, None) => {
                default = container::recovery_leaf(&config, &self.name)?;
                By::Leaf(&default)
            }
        };
        let backup = self.backup.as_deref();
        let found = with_bar(global.json, |progress| container::rehearse(&config, &self.name, &by, backup, progress))?;
        output::print(global.json, &found, || {
            let (name, opened, keys) = (&self.name, found.container_keys.len(), found.saved + found.lost.len());
            let all = opened + found.lost_container_keys.len() + found.replaced.len();
            let mut lines = vec![
                format!("a recovery of '{name}' would save {} of {keys} keys", found.saved),
                format!("  container keys   {opened} of {all}"),
            ];
            let lost = found.lost_container_keys.iter().map(|(epoch, why)| (format!("{name}/kek/{epoch}"), why));
            let lost = lost.chain(found.lost.iter().map(|(id, why)| (id.to_string(), why)));
            lines.extend(lost.map(|(key, why)| format!("  LOST             {key}: {why}")));
            let replaced = found.replaced.iter();
            lines.extend(
                replaced.map(|epoch| format!("  not opened       {name}/kek/{epoch}: replaced, no key needs it")),
            );
            if found.unsealed > 0 {
                lines.push(format!("  not sealed       {}: the store itself can read them", found.unsealed));
            }
            lines
        })?;
        if !found.loses() {
            return Ok(());
        }
        let (keys, container_keys) = (found.lost.len(), found.lost_container_keys.len());
        Err(unlock::Error::WouldBeLost { container: self.name.clone(), keys, container_keys }.into())
    }
}

impl PolicyVerb {
    fn run(&self, global: &Global) -> Result<(), Error> {
        let Self { name, policy, keep_days, answer } = self;
        let attendant = answer.attendant()?;
        let changed = with_bar(global.json, |progress| {
            policy::change(&global.config, name, policy, days(*keep_days), &attendant, progress)
        })?;
        output::print(global.json, &changed, || {
            let mut lines = lines_of(name, &changed.rotation);
            lines.push(format!("  opens            {}", changed.policy));
            if changed.before != changed.policy {
                lines.push(format!("  before           {}", changed.before));
                lines.push(format!(
                    "  still opened     by what was enough before: the container keys before {name}/kek/{} until they are \
                     deleted (after {keep_days} days), and copies of keys that were made until now",
                    changed.rotation.epoch
                ));
            }
            let former: Vec<_> = changed.former.iter().map(LeafName::as_str).collect();
            if !former.is_empty() {
                lines.push(format!("  former leaves    {}", former.join(", ")));
            }
            lines
        })?;
        finished(name, &changed.rotation)
    }
}

pub(super) fn days(number: u32) -> Duration {
    Duration::from_secs(u64::from(number) * 24 * 3600)
}

pub(super) fn lines_of(name: &StoreName, rotation: &Rotation) -> Vec<String> {
    let mut lines = vec![
        format!("container key {name}/kek/{}, fingerprint {}", rotation.epoch, rotation.fingerprint),
        format!("  sealed anew      {}", rotation.resealed),
    ];
    if rotation.unchanged > 0 {
        lines.push(format!("  sealed already   {}", rotation.unchanged));
    }
    lines.extend(rotation.failed.iter().map(|(id, why)| format!("  FAILED           {id}: {why}")));
    let strange = rotation.left_alone.iter();
    lines.extend(strange.map(|id| format!("  LEFT ALONE       {id}: nobody vouches for it")));
    let deleted = rotation.deleted.iter();
    lines.extend(deleted.map(|epoch| format!("  deleted          {name}/kek/{epoch}")));
    lines
}

pub(super) fn finished(name: &StoreName, rotation: &Rotation) -> Result<(), Error> {
    match rotation.failed.len() {
        0 => Ok(()),
        left => Err(unlock::Error::Unfinished { container: name.clone(), left }.into()),
    }
}
