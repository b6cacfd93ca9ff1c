//! Another owner or escrow of a container: the configuration says it, and the next container key is sealed to the new one.

use std::{
    fmt,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::Serialize;
use toml::Value;

use crate::{
    base::{
        key::{HostName, StoreName},
        person::Attendant,
    },
    config::{IdentitySpec, LeafName},
    unlock::container::{self, Container, Progress, Rotation, Use},
    verbs::{
        container::record,
        edit,
        error::Error,
        setup::{self, absolute},
    },
};

/// Whose key it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Holder {
    Owner,
    Escrow,
}

impl Holder {
    /// The member of the configuration, and the leaf of policies.
    fn name(self) -> &'static str {
        match self {
            Self::Owner => LeafName::OWNER,
            Self::Escrow => LeafName::ESCROW,
        }
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A new key for a holder.
pub struct Request<'a> {
    pub name: &'a StoreName,
    pub holder: Holder,
    /// The public key or certificate.
    pub public: &'a Path,
    /// The private key, which has to open what is sealed to the public one; `None`: a person answers for it.
    pub private: Option<&'a IdentitySpec>,
    /// How long former container keys stay.
    pub keep: Duration,
}

/// What was done.
#[derive(Serialize)]
pub struct Replaced {
    pub holder: Holder,
    pub public: PathBuf,
    pub before: Option<PathBuf>,
    /// The private key has opened what was sealed to the public one.
    pub proven: bool,
    /// Hosts whose lockbox keys the former escrow opens still.
    pub lockboxes: Vec<HostName>,
    #[serde(flatten)]
    pub rotation: Rotation,
}

/// Makes another key the holder's, and seals all keys anew. Run again after an interruption, it goes on, as a change of the
/// policy does.
pub fn replace(
    config: &Path,
    request: &Request<'_>,
    attendant: &Attendant,
    progress: &Progress<'_>,
) -> Result<Replaced, Error> {
    let Request { name, holder, public, private, keep } = *request;
    let old = setup::configuration(config)?;
    let sealing = &old.store(name)?.sealing;
    if !sealing.policy.names(holder.name()) {
        let policy = &sealing.policy;
        return Err(Error::Usage(format!("the policy of '{name}' does not name the {holder}: {policy}")));
    }
    if holder == Holder::Escrow && sealing.no_escrow {
        return Err(Error::Usage(format!(
            "the store '{name}' has no_escrow = true: write escrow = \"FILE\" in its place, and run 'cryptattach container rotate \
             {name}'"
        )));
    }
    let before =
        if holder == Holder::Owner { &sealing.owner } else { &sealing.escrow }.as_ref().map(|file| file.to_path_buf());
    if let Some(private) = private {
        container::prove_pair(&old, name, public, private)?;
    }
    let public = absolute(public)?;
    let mut members = vec![(holder.name(), Value::from(public.to_string_lossy().into_owned()))];
    // The owner's private key is this host's to use; the escrow's stays offline.
    if let Some(private) = private.filter(|_| holder == Holder::Owner) {
        let own = setup::found(private)?.to_string();
        let mut all =
            edit::member(config, name, "identities")?.and_then(|all| all.as_array().cloned()).unwrap_or_default();
        if !sealing.identities.iter().any(|identity| identity.to_string() == own) {
            all.push(own.into());
            members.push(("identities", all.into()));
        }
    }
    let mut new = edit::edited(config, name, &members)?;
    new.config.attendant = attendant.clone();
    // A rotation that this host could not go on with is not begun.
    Container::open(&new.config, name, None, Use::Keys)?.opens_next()?;
    let mut new = new.write()?;
    new.attendant = attendant.clone();
    let container = Container::open(&new, name, None, Use::Keys)?;
    let rotation = container.rotate(keep, progress)?;
    let lockboxes = match container.store().host_keys() {
        Some(hosts) if holder == Holder::Escrow => hosts.hosts()?,
        _ => Vec::new(),
    };
    record(&new, if holder == Holder::Owner { "container owner" } else { "container escrow" }, name);
    Ok(Replaced { holder, public, before, proven: private.is_some(), lockboxes, rotation })
}
