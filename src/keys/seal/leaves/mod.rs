//! Leaves of policies: who can be asked to open a part, a file or folder per kind.
//!
//! Holders of keys need no kind of their own here to open: this host's [identities](super::identities) do that.

mod error;
pub mod person;
mod pkcs11;
mod public;
pub(super) mod tang;
mod transit;

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    thread,
};

use serde_json::Value;

pub use error::LeafError;
pub use pkcs11::{Answer as TokenAnswer, TokenError};
pub use tang::Advertisement;
pub use transit::Versions as TransitVersions;

use super::{ContentKey, Recipient, SealError, clevis::Whom};
use crate::{
    base::key::{JoseHeader, JweRecipient, Location, Place},
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
    /// By what a person opens it, and the file that has it; `None` if no person has to be asked.
    fn person(&self) -> Option<(person::By, &Path)> {
        None
    }
    /// The servers that it asks.
    fn servers(&self) -> Vec<Server> {
        Vec::new()
    }
    /// Where it rests, for judging whether it is apart from a volume.
    fn places(&self, name: &LeafName) -> Vec<Place> {
        let place = |server: Server| Place {
            what: format!("leaf {name}"),
            at: Location::Server { host: server.host, port: server.port },
            opens: true,
        };
        let login = self.login().map(|path| Place::path(format!("log-in of leaf {name}"), path, true));
        self.servers().into_iter().map(place).chain(login).collect()
    }
    /// What it takes to ask it, for an initramfs.
    fn takes(&self) -> Result<Takes, LeafError> {
        Ok(Takes::default())
    }
    /// The files that opening takes and that hide nothing, such as the public keys that tell whether this host opens it.
    fn files(&self) -> Vec<&Path> {
        Vec::new()
    }
    /// The file with which whoever reaches its servers opens it, if there is one.
    fn login(&self) -> Option<&Path> {
        None
    }
    /// Whether whoever is asked for what is sealed to the key of this id has newer keys, as far as that can be found out now.
    fn is_outdated(&self, _kid: &str) -> bool {
        false
    }
    /// Whom clevis would seal to in its place, if clevis has a pin for it.
    fn clevis(&self, _state: &Path) -> Option<Result<Whom, SealError>> {
        None
    }
    /// How its public key is confirmed and remembered before anything is sealed to it; `None` if it needs no confirming.
    fn pin(&self, _state: &Path) -> Option<Box<dyn Pin + '_>> {
        None
    }
}

/// What an initramfs has to have so that a leaf can be asked.
#[derive(Debug, Default)]
pub struct Takes {
    pub programs: Vec<PathBuf>,
    /// Loaded by their paths.
    pub libraries: Vec<PathBuf>,
    pub files: Vec<PathBuf>,
    /// What any machine can use, and what it is: "it is a token's PIN".
    pub secrets: Vec<(PathBuf, &'static str)>,
}

/// How this host learns a leaf's public key.
pub trait Pin {
    /// The thumbprint that is expected, if one is.
    fn expected(&self) -> Result<Option<String>, LeafError>;
    /// The id of the key that this host remembers, and seals to.
    fn pinned(&self) -> Option<String>;
    /// Asks for the key; whose it is, the caller judges.
    fn fetch(&self) -> Result<Box<dyn Offer + '_>, LeafError>;
    /// What a person compares a thumbprint with: "what 'tang-show-keys' prints on the server".
    fn compare_with(&self) -> String;
}

/// A public key that a leaf's server or token offers.
pub trait Offer {
    /// The thumbprints of the keys that vouch for it, of which the first is the one to compare.
    fn thumbprints(&self) -> &[String];
    /// Remembers it, if the key of this thumbprint vouches for it.
    fn keep(&self, thumbprint: &str) -> Result<(), LeafError>;
}

/// How a kind reads its table.
type Make = fn(&LeafName, &LeafConfig, Network) -> Result<Box<dyn Kind>, ConfigError>;

/// The kinds of leaves: the member of `[leaves.NAME]` that tells it, the member of a recipient's header if it has one.
const KINDS: &[(&str, Option<&str>, Make)] = &[
    (tang::MEMBER, Some(tang::MEMBER), tang::kind),
    (transit::MEMBER, None, transit::kind),
    (pkcs11::MEMBER, None, pkcs11::kind),
    (person::By::Recovery.member(), Some(person::MEMBER), person::recovery),
    (person::By::Passphrase.member(), Some(person::MEMBER), person::passphrase),
];

/// The kind of a leaf. Of one that has nothing but a `public` key, this host's identities open what is sealed to it; other
/// kinds may have that member, too.
pub fn kind(name: &LeafName, config: &LeafConfig, network: Network) -> Result<Box<dyn Kind>, ConfigError> {
    let mut told = KINDS.iter().filter(|(member, ..)| config.has(member));
    match (told.next(), told.next()) {
        (Some((.., make)), None) => make(name, config, network),
        (None, None) if config.has(public::MEMBER) => public::kind(name, config, network),
        _ => {
            let members: Vec<_> = KINDS.iter().map(|(member, ..)| format!("`{member}`")).collect();
            let members = members.join(", ");
            Err(config.unusable(format!("expected exactly one of {members}, or `{}` alone", public::MEMBER)))
        }
    }
}

/// Whether a member of a recipient's header says that somebody has to be asked.
pub(super) fn is_member(name: &str) -> bool {
    KINDS.iter().any(|(_, member, _)| *member == Some(name))
}

/// The leaves whose servers have newer keys than those that something is sealed to. All are asked at once.
pub fn outdated<'a>(sealed_to: &[(&'a LeafName, &dyn Kind, String)]) -> BTreeSet<&'a LeafName> {
    thread::scope(|scope| {
        let ask = |of: &'_ _| {
            let (name, leaf, kid): &(&'a LeafName, &dyn Kind, String) = of;
            leaf.is_outdated(kid).then_some(*name)
        };
        let asked: Vec<_> = sealed_to.iter().map(|of| scope.spawn(move || ask(of))).collect();
        asked.into_iter().filter_map(|thread| thread.join().ok().flatten()).collect()
    })
}

/// Why nobody is asked for an entry, if it wants somebody asked: the configuration does not have them.
pub(super) fn not_configured(header: &JoseHeader) -> Option<LeafError> {
    tang::url_of(header).map(|url| LeafError::UnknownServer(url.to_owned()))
}

fn text<'a>(header: &'a JoseHeader, name: &str) -> Option<&'a str> {
    header.get(name).and_then(Value::as_str)
}
