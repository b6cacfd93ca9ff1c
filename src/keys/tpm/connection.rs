//! The TPM as the rest of the program sees it: a connection, its storage root key, its PCRs.

use std::time::Duration;

use tss_esapi::{
    interface_types::algorithm::HashingAlgorithm,
    structures::{Public, SymmetricDefinitionObject},
};

use super::{
    EventLog, Handle, Name, PcrValues, SessionKind, TpmError,
    error::if_there,
    esys::{Esys, OWNER},
    public::{self, name_of},
};
use crate::{base::pcr_set::PcrSet, config::TpmConfig};

/// Where the TCG's provisioning guidance puts the storage root key.
const STORAGE_ROOT: u32 = 0x8100_0001;

/// A TPM.
pub struct Tpm {
    esys: Esys,
    event_log: EventLog,
}

/// The key above all of ours in the storage hierarchy; sessions are salted to it.
pub struct StorageRoot<'t> {
    pub(super) handle: Handle<'t>,
    name: Name,
}

impl StorageRoot<'_> {
    /// Its name: which TPM, and which of its lives between two clears.
    pub fn name(&self) -> Name {
        self.name
    }

    /// It, loaded.
    pub fn handle(&self) -> &Handle<'_> {
        &self.handle
    }
}

impl Tpm {
    /// Connects to the TPM of the configuration.
    pub fn open(config: &TpmConfig) -> Result<Self, TpmError> {
        let tcti = config.tcti();
        tracing::debug!("connect to the TPM at '{tcti}'");
        let limit = Duration::try_from_secs_f64(config.command_seconds)
            .map_err(|error| TpmError::Policy(format!("command_seconds in [tpm]: {error}")))?;
        Ok(Self { esys: Esys::connect(&tcti, limit)?, event_log: EventLog::at(&config.event_log) })
    }

    /// The commands.
    pub fn esys(&self) -> &Esys {
        &self.esys
    }

    /// What the firmware and boot loader say they have measured.
    pub fn event_log(&self) -> &EventLog {
        &self.event_log
    }

    /// The storage root key, made if there is none. `pinned`: its name as it was at enrolment, else it is not used.
    ///
    /// The name is computed from the public part that sessions will be salted to. An interposer on the bus could answer
    /// with the right name and a key of its own.
    pub fn storage_root(&self, pinned: Option<Name>) -> Result<StorageRoot<'_>, TpmError> {
        let handle = match if_there(|| self.esys.resident_at(STORAGE_ROOT))? {
            Some(handle) => handle,
            None if pinned.is_some() => return Err(TpmError::NoStorageRoot),
            None => {
                let key = self.esys.create_primary(OWNER, &public::storage_root()?)?;
                self.esys.make_persistent(&key, STORAGE_ROOT)?
            }
        };
        let public = self.esys.public_of(&handle)?;
        let name = name_of(&public)?;
        match pinned {
            Some(expected) if expected != name => return Err(TpmError::OtherTpm { expected, seen: name }),
            Some(_) => {}
            None => check_storage_root(&public)?,
        }
        Ok(StorageRoot { handle, name })
    }

    /// A session that authenticates commands and answers. It is salted to the storage root key, which has to be the `pinned`
    /// one; without a pin to the one that is there, if any.
    pub fn audit_session(&self, pinned: Option<Name>) -> Result<Handle<'_>, TpmError> {
        let root = match pinned {
            Some(_) => Some(self.storage_root(pinned)?.handle),
            None => if_there(|| self.esys.resident_at(STORAGE_ROOT))?,
        };
        self.esys.start_session(SessionKind::Audit, root.as_ref())
    }

    /// Present values of PCRs. It is an error if the SHA-256 bank does not have them all.
    pub fn pcr_values(&self, pcrs: PcrSet) -> Result<PcrValues, TpmError> {
        self.read_pcrs(pcrs, None)
    }

    /// The same; with a session the values are the TPM's own.
    pub(super) fn read_pcrs(&self, pcrs: PcrSet, session: Option<&Handle<'_>>) -> Result<PcrValues, TpmError> {
        let values = self.esys.pcr_read(pcrs, session)?;
        if values.pcrs() == pcrs {
            Ok(values)
        } else {
            Err(TpmError::Policy(format!("the TPM has no SHA-256 bank with the PCRs {}", pcrs.without(values.pcrs()))))
        }
    }
}

/// A key that others made is taken, if it is a storage key that cannot be moved here from elsewhere.
fn check_storage_root(public: &Public) -> Result<(), TpmError> {
    let wrong = |what| Err(TpmError::BadStorageRoot(what));
    let attributes = public.object_attributes();
    if !(attributes.restricted() && attributes.decrypt() && !attributes.sign_encrypt()) {
        return wrong("it is not a storage key");
    }
    if !(attributes.fixed_tpm() && attributes.fixed_parent() && attributes.sensitive_data_origin()) {
        return wrong("it may be known outside of this TPM");
    }
    if !attributes.user_with_auth() {
        return wrong("it cannot be used without a policy of its own");
    }
    let (hash, symmetric) = match public {
        Public::Ecc { name_hashing_algorithm, parameters, .. } => {
            (*name_hashing_algorithm, parameters.symmetric_definition_object())
        }
        Public::Rsa { name_hashing_algorithm, parameters, .. } => {
            (*name_hashing_algorithm, parameters.symmetric_definition_object())
        }
        _ => return wrong("it is neither an ECC nor an RSA key"),
    };
    if hash != HashingAlgorithm::Sha256 {
        return wrong("its name is not under SHA-256");
    }
    if !matches!(symmetric, SymmetricDefinitionObject::Aes { .. }) {
        return wrong("it does not encrypt its children by AES");
    }
    Ok(())
}
