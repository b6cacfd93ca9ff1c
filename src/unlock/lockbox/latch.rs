//! The latch: once the lockbox key is in the kernel's keyring, PCR 15 is extended, and the TPM opens it no more in this boot.
//! Where the TPM does not prove that, the lockbox is closed: who comes later could open it as well.

use std::path::PathBuf;

use openssl::asn1::Asn1Time;
use serde::{Deserialize, Serialize};

use super::{Lockbox, LockboxError, Opening};
use crate::{
    base::clock::now,
    config::Config,
    keys::{
        seal::{SealError, identities},
        tpm::{self, Finding, TpmError},
    },
    sys::state,
};

/// The file `host/NAME.latch.json` of the state directory: when this lockbox extended PCR 15.
#[derive(Debug, Serialize, Deserialize)]
struct Latched {
    /// In which boot (random(4), boot_id).
    boot: String,
    /// Seconds since 1970-01-01 UTC.
    extended: u64,
}

impl Lockbox {
    /// Extends PCR 15, if that is wanted and this host's identity is in its TPM. If the key was open already and the note says
    /// that this was done in this boot, the TPM is not asked. If the TPM has just opened it, no note counts.
    ///
    /// The lockbox key is in the kernel's keyring: afterwards nothing else has it until the next power-on. Nor has the keyring
    /// itself, if the TPM does not prove that PCR 15 is extended.
    pub(super) fn latch(&self, config: &Config, opening: Opening) -> Result<Opening, LockboxError> {
        let identity = identities::first_of_tpm(self.identities(config)).filter(|_| config.tpm.latch.is_wanted());
        let Some(identity) = identity else { return Ok(opening) };
        let boot = state::boot();
        let is_noted =
            || Ok::<_, LockboxError>(self.latched()?.is_some_and(|latched| boot.as_ref() == Some(&latched.boot)));
        if !(opening.already_open && is_noted()?) {
            if let Err(source) = tpm::latch(&config.tpm, &identity, tpm::KEYS_WERE_OPENED) {
                self.shut()?;
                return Err(LockboxError::NotLatched { host: self.config.host.clone(), source });
            }
            if let Some(boot) = &boot {
                state::write(&self.latch_path(), &Latched { boot: boot.clone(), extended: now() })?;
            }
        }
        Ok(Opening { latched: true, ..opening })
    }

    /// Why the lockbox key does not open: because this lockbox extended PCR 15 in this boot, or else.
    pub(super) fn refused(&self, source: SealError) -> LockboxError {
        let host = self.config.host.clone();
        let by_latch = matches!(&source, SealError::Tpm(TpmError::NotThisState(explanation))
            if explanation.findings.iter().any(|finding| matches!(finding, Finding::Latched)));
        // A note that cannot be read explains nothing; the refusal itself is said all the same.
        let latched =
            self.latched().ok().flatten().filter(|latched| by_latch && state::boot().as_ref() == Some(&latched.boot));
        match latched.and_then(|latched| Asn1Time::from_unix(latched.extended.try_into().ok()?).ok()) {
            Some(at) => LockboxError::Latched { host, at: at.to_string(), source: Box::new(source) },
            None => LockboxError::Refused { host, source },
        }
    }

    fn latched(&self) -> Result<Option<Latched>, LockboxError> {
        Ok(state::read(&self.latch_path())?)
    }

    fn latch_path(&self) -> PathBuf {
        self.state.join("host").join(format!("{}.latch.json", self.config.host))
    }
}
