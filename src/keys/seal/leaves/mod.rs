//! Leaves of policies: who can be asked to open a part, a file or folder per kind.
//!
//! Holders of keys need no kind of their own here to open: this host's [identities](super::identities) do that.

mod error;
mod public;
mod tang;

use std::path::Path;

use serde_json::Value;

pub use error::LeafError;
pub use tang::{Advertisement, Pinned};

use super::{ContentKey, Recipient, SealError};
use crate::{
    base::key::{JoseHeader, JweRecipient},
    config::{ConfigError, LeafConfig, LeafName, Network},
    keys::{net::http::Cancel, store::Server},
};

/// A kind of leaf, as `[leaves.NAME]` describes it.
pub trait Kind: Send + Sync {
    /// Whom a share or a key is sealed to. `state` is the directory where this host remembers.
    fn recipients(&self, state: &Path) -> Result<Vec<Box<dyn Recipient>>, SealError>;
    /// Whether a recipient's entry is one that this leaf is asked for.
    fn is_for(&self, _header: &JoseHeader) -> bool {
        false
    }
    /// Has an entry opened, until that is not needed any more; `None` if it is not this leaf's.
    fn open(&self, _: &JweRecipient, _: &JoseHeader, _: &Cancel) -> Option<Result<ContentKey, SealError>> {
        None
    }
    /// The servers that it asks.
    fn servers(&self) -> Vec<Server> {
        Vec::new()
    }
    /// The files of public keys that tell whether this host opens it.
    fn files(&self) -> Vec<&Path> {
        Vec::new()
    }
    /// What has to be confirmed and remembered before anything is sealed to it; `None` if nothing has.
    fn pinned(&self, _state: &Path) -> Option<Pinned> {
        None
    }
}

/// How a kind reads its table.
type Make = fn(&LeafName, &LeafConfig, Network) -> Result<Box<dyn Kind>, ConfigError>;

/// The kinds of leaves: the member of `[leaves.NAME]` that tells it, the member of a recipient's header if it has one.
const KINDS: &[(&str, Option<&str>, Make)] =
    &[(tang::MEMBER, Some(tang::MEMBER), tang::kind), ("public", None, public::kind)];

/// The kind of a leaf.
pub fn kind(name: &LeafName, config: &LeafConfig, network: Network) -> Result<Box<dyn Kind>, ConfigError> {
    let mut told = KINDS.iter().filter(|(member, ..)| config.has(member));
    match (told.next(), told.next()) {
        (Some((.., make)), None) => make(name, config, network),
        _ => {
            let members: Vec<_> = KINDS.iter().map(|(member, ..)| format!("`{member}`")).collect();
            Err(config.unusable(format!("expected exactly one of {}", members.join(", "))))
        }
    }
}

/// Whether a member of a recipient's header says that somebody has to be asked.
pub(super) fn is_member(name: &str) -> bool {
    KINDS.iter().any(|(_, member, _)| *member == Some(name))
}

/// Why nobody is asked for an entry, if it wants somebody asked: the configuration does not have them.
pub(super) fn not_configured(header: &JoseHeader) -> Option<LeafError> {
    tang::url_of(header).map(|url| LeafError::UnknownServer(url.to_owned()))
}

fn text<'a>(header: &'a JoseHeader, name: &str) -> Option<&'a str> {
    header.get(name).and_then(Value::as_str)
}
