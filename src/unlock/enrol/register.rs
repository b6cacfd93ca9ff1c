//! What the administrator's machine remembers: which hosts were admitted, by which proof.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{EnrolError, Vouched};
use crate::{
    base::{
        hex,
        key::{HostName, StoreName},
    },
    keys::tpm::{Digest, Name, Policy},
    sys::{durable, state},
};

/// Ends the names of the register's files.
const END: &str = ".json";

/// A host that was admitted. A removed one is kept: its request must not be used again.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Admitted {
    pub host: HostName,
    /// The `kid` of its identity key: RFC 7638 thumbprint.
    pub kid: String,
    /// Fingerprint of its endorsement key.
    #[serde(with = "hex")]
    pub endorsement_key: Digest,
    /// What that was believed for.
    pub vouched: Vouched,
    /// Name of its storage root key.
    pub storage_root: Name,
    /// The policy of its identity key.
    pub policy: Policy,
    /// Digest of its request's statement.
    #[serde(with = "hex")]
    pub enrolment: Digest,
    /// The requests that it was admitted by before.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub before: Vec<Enrolment>,
    /// Seconds since 1970 at which it was admitted.
    pub admitted: u64,
    /// Generation of its lockbox key.
    pub generation: u64,
    /// Fingerprint of its lockbox key.
    pub lockbox_key: String,
    /// The store that keeps its lockbox key.
    pub lockbox_store: StoreName,
    /// The stores whose container keys are sealed to it.
    pub stores: Vec<StoreName>,
    /// Seconds since 1970 at which it was removed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub removed: Option<u64>,
}

/// A request, by the digest of its statement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Enrolment(#[serde(with = "hex")] pub Digest);

impl Admitted {
    /// Whether it was ever admitted by this request.
    pub(super) fn was_by(&self, enrolment: &Digest) -> bool {
        self.enrolment == *enrolment || self.before.contains(&Enrolment(*enrolment))
    }

    /// All requests that it was ever admitted by.
    pub(super) fn all_requests(self) -> Vec<Enrolment> {
        self.before.into_iter().chain([Enrolment(self.enrolment)]).collect()
    }
}

/// The register: one file per host.
pub struct Register {
    folder: PathBuf,
}

impl Register {
    /// The register in this state directory.
    pub fn of(state: &Path) -> Self {
        Self { folder: state.join("admitted") }
    }

    /// A host that is or was admitted.
    pub fn get(&self, host: &HostName) -> Result<Option<Admitted>, EnrolError> {
        Ok(state::read(&self.file(host))?)
    }

    /// All hosts that are or were admitted, in order.
    pub fn all(&self) -> Result<Vec<Admitted>, EnrolError> {
        let failed = |source| EnrolError::File { action: "read", path: self.folder.clone(), source };
        let names = durable::stems(&self.folder, END).map_err(failed)?;
        let hosts = names.iter().filter_map(|name| name.parse().ok());
        Ok(hosts.map(|host| self.get(&host)).collect::<Result<Vec<_>, _>>()?.into_iter().flatten().collect())
    }

    /// Adds or replaces a host.
    pub fn put(&self, admitted: &Admitted) -> Result<(), EnrolError> {
        Ok(state::write(&self.file(&admitted.host), admitted)?)
    }

    fn file(&self, host: &HostName) -> PathBuf {
        self.folder.join(format!("{host}{END}"))
    }
}
