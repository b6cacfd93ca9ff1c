//! The latch: PCR 15 is extended once a host has its keys, and until the next power-on the TPM uses no key whose policy has the
//! latch.
//!
//! Whoever sits on the TPM's wires would like to swallow that. So command and answers are authenticated: by a session that is
//! salted to the storage root key whose name is pinned (TPM 2.0 Part 1, section 17.6). What counts is what the TPM itself says
//! that PCR 15 holds.

use std::path::Path;

use openssl::sha::{Sha256, sha256};

use super::{
    Digest, Handle, IdentityFile, Name, Tpm, TpmError,
    policy::{LATCH, unextended},
};
use crate::{
    base::{chain::chain, pcr_set::PcrSet},
    config::TpmConfig,
};

/// What PCR 15 is extended by where nobody says what was opened.
pub const KEYS_WERE_OPENED: &str = "cryptattach: this boot has its keys";

/// Has the TPM of the configuration extend PCR 15 by this event, once per boot; the value that it proves to hold then.
///
/// `identity` is the file of a key that this TPM has made: it has the storage root key's name. Without a proof PCR 15 is
/// extended all the same, as well as that can be told, and the error says why there is none.
pub fn latch(config: &TpmConfig, identity: &Path, event: &str) -> Result<Digest, TpmError> {
    let latch = || Tpm::open(config)?.latch(IdentityFile::read(identity)?.storage_root, event);
    // An answer that was forged or lost ends the use of its connection.
    let proven = latch().or_else(|error| {
        tracing::debug!("the TPM is asked to extend PCR 15 once more: {}", chain(&error));
        latch()
    });
    proven.inspect_err(|_| {
        let digest = sha256(event.as_bytes());
        if let Err(error) = Tpm::open(config).and_then(|tpm| tpm.esys().pcr_extend(LATCH, &digest, None)) {
            tracing::debug!("cannot extend PCR 15 without a proof either: {}", chain(&error));
        }
    })
}

/// The value of PCR 15 if this event is all that it was extended by.
pub fn pcr_after(event: &str) -> Digest {
    let mut hash = Sha256::new();
    hash.update(&Digest::default());
    hash.update(&sha256(event.as_bytes()));
    hash.finish()
}

impl Tpm {
    /// Extends PCR 15 by this event, unless it has been extended in this boot; its value, by the TPM's own word.
    fn latch(&self, root: Name, event: &str) -> Result<Digest, TpmError> {
        let session = self.audit_session(Some(root))?;
        let before = self.latch_pcr(&session)?;
        if before != Digest::default() {
            return Ok(before);
        }
        self.esys().pcr_extend(LATCH, &sha256(event.as_bytes()), Some(&session))?;
        match self.latch_pcr(&session)? {
            after if after != Digest::default() => Ok(after),
            _ => Err(TpmError::NotExtended),
        }
    }

    fn latch_pcr(&self, session: &Handle<'_>) -> Result<Digest, TpmError> {
        let values = self.read_pcrs(PcrSet::of(&[LATCH]), Some(session))?;
        values.get(LATCH).copied().ok_or(TpmError::Answer { command: "PCR_Read" })
    }

    /// Whether PCR 15 has been extended in this boot, as far as nobody sits between: for an explanation.
    pub fn is_latched(&self) -> Result<bool, TpmError> {
        Ok(self.pcr_values(PcrSet::of(&[LATCH]))? != unextended())
    }
}
