//! The NV index that holds the audit record's anchor: it can be extended, but not be set to a value.
//!
//! Its owner can remove it and make it anew, so it is worth most where the owner has a password that is not on this machine. Whoever
//! can use the TPM may extend it; that shows, and hides nothing.

use openssl::sha::sha256;
use tss_esapi::constants::tss;

use super::{Digest, Handle, Name, Tpm, TpmError, error::if_there, nv};
use crate::base::key::SecretBytes;

/// Bits of TPMA_NV (TPM 2.0 Part 2, section 13.4): anyone reads and extends, by the empty password.
const ATTRIBUTES: u32 = nv::OWNERS_TO_READ & !nv::OWNER_WRITE | AUTH_WRITE | EXTEND;
const AUTH_WRITE: u32 = 1 << 2;
const EXTEND: u32 = (tss::TPM2_NT_EXTEND as u32) << 4;
const BYTES: u16 = size_of::<Digest>() as u16;

/// The index of the audit record's anchor.
pub struct AuditIndex<'t> {
    tpm: &'t Tpm,
    number: u32,
}

impl<'t> AuditIndex<'t> {
    /// The one of this number.
    pub fn at(tpm: &'t Tpm, number: u32) -> Self {
        Self { tpm, number }
    }

    /// What it has; `None` if there is no such index, or it was never extended.
    pub fn value(&self) -> Result<Option<Digest>, TpmError> {
        let Some(handle) = self.handle()? else { return Ok(None) };
        let attributes = self.checked(&handle)?;
        if attributes & nv::WRITTEN == 0 {
            return Ok(None);
        }
        let value = self.tpm.esys().nv_read(&handle, BYTES, 0)?.try_into();
        value.map(Some).map_err(|_| TpmError::Answer { command: "NV_Read" })
    }

    /// Makes it, unless it is there; the owner may have a password.
    pub fn make(&self, owner_password: Option<&SecretBytes>, root: Option<Name>) -> Result<(), TpmError> {
        if let Some(handle) = self.handle()? {
            return self.checked(&handle).map(drop);
        }
        let owner = nv::NvMemory::of(self.tpm)?.owner(owner_password, root)?;
        self.tpm.esys().nv_define(self.number, ATTRIBUTES, BYTES, Some(owner.session())).map(drop)
    }

    /// Extends it: it then has the hash of what it had and of this digest. The TPM's answer is authenticated, and it is read back.
    pub fn extend(&self, digest: &Digest, root: Option<Name>) -> Result<(), TpmError> {
        let before = self.value()?.unwrap_or_default();
        let session = self.tpm.audit_session(root)?;
        // Held for one step only: see `NvMemory::handle`.
        self.tpm.esys().nv_extend(&self.tpm.esys().resident_at(self.number)?, digest, &session)?;
        let expected = sha256(&[before, *digest].concat());
        if self.value()? == Some(expected) { Ok(()) } else { Err(TpmError::Answer { command: "NV_Extend" }) }
    }

    fn handle(&self) -> Result<Option<Handle<'_>>, TpmError> {
        if_there(|| self.tpm.esys().resident_at(self.number))
    }

    fn checked(&self, handle: &Handle<'_>) -> Result<u32, TpmError> {
        let (public, _) = self.tpm.esys().nv_public_of_any(handle, None)?;
        if public.attributes & !nv::WRITTEN == ATTRIBUTES && public.bytes == BYTES {
            return Ok(public.attributes);
        }
        let number = self.number;
        Err(TpmError::Policy(format!(
            "the NV index 0x{number:08x} is not one that cryptattach has made for the audit record"
        )))
    }
}
