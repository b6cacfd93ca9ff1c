//! The commands by which a TPM proves what it is and what it holds (TPM 2.0 Part 3, sections 12.5, 18, 24.1 and 31.13).
#![allow(unsafe_code)] // calls into libtss2

use std::ptr::null_mut;

use tss_esapi::{constants::tss, structures::Signature, tss2_esys as sys};

use super::{
    Code, Created, TpmError,
    error::if_there,
    esys::{ENDORSEMENT, Esys, Handle, NONE, PASSWORD, TpmAnswer, buffer, command, sized},
};
use crate::base::key::SecretBytes;

/// What a key of the TPM has signed about something in the TPM.
pub struct Certified {
    /// The marshalled TPMS_ATTEST, which the signature is over.
    pub attest: Vec<u8>,
    pub signature: Signature,
}

/// The key's own scheme.
fn own_scheme() -> sys::TPMT_SIG_SCHEME {
    sys::TPMT_SIG_SCHEME { scheme: tss::TPM2_ALG_NULL, ..Default::default() }
}

fn data(bytes: &[u8]) -> Result<sys::TPM2B_DATA, TpmError> {
    let mut data = sys::TPM2B_DATA { size: bytes.len() as u16, ..Default::default() };
    data.buffer.get_mut(..bytes.len()).ok_or(TpmError::TooLong)?.copy_from_slice(bytes);
    Ok(data)
}

impl Esys {
    /// `signer`'s word that this TPM itself made `object`, in the way that `created` says; `qualifying` (64 bytes at most) is
    /// signed along.
    pub fn certify_creation(
        &self,
        signer: &Handle<'_>,
        object: &Handle<'_>,
        created: &Created,
        qualifying: &[u8],
    ) -> Result<Certified, TpmError> {
        let (qualifying, scheme) = (data(qualifying)?, own_scheme());
        self.certified("CertifyCreation", |attest, signature| {
            command!(
                self,
                Esys_CertifyCreation_Async(
                    signer.tr(),
                    object.tr(),
                    PASSWORD,
                    NONE,
                    NONE,
                    &qualifying,
                    &created.creation_hash,
                    &scheme,
                    &created.creation_ticket
                ),
                Esys_CertifyCreation_Finish(attest, signature)
            )
        })
    }

    /// `signer`'s word for the first `size` bytes of an NV index that anyone may read.
    pub fn certify_nv(
        &self,
        signer: &Handle<'_>,
        index: &Handle<'_>,
        size: u16,
        qualifying: &[u8],
    ) -> Result<Certified, TpmError> {
        let (qualifying, scheme) = (data(qualifying)?, own_scheme());
        self.certified("NV_Certify", |attest, signature| {
            command!(
                self,
                Esys_NV_Certify_Async(
                    signer.tr(),
                    index.tr(),
                    index.tr(),
                    PASSWORD,
                    PASSWORD,
                    NONE,
                    &qualifying,
                    &scheme,
                    size,
                    0
                ),
                Esys_NV_Certify_Finish(attest, signature)
            )
        })
    }

    /// What a certifying command gives.
    fn certified(
        &self,
        command: &'static str,
        run: impl FnOnce(&mut *mut sys::TPM2B_ATTEST, &mut *mut sys::TPMT_SIGNATURE) -> Result<(), TpmError>,
    ) -> Result<Certified, TpmError> {
        let (mut attest, mut signature) = (null_mut(), null_mut());
        run(&mut attest, &mut signature)?;
        // SAFETY: outputs of the command just above, which has succeeded; they are in no other hands.
        let (attest, signature) =
            unsafe { (TpmAnswer::take(self, command, attest)?, TpmAnswer::take(self, command, signature)?) };
        Ok(Certified {
            attest: sized(attest.size, &attest.attestationData).to_vec(),
            signature: Signature::try_from(*signature)?,
        })
    }

    /// Extends the session's policy by: the endorsement hierarchy's authorization (the empty one) was given.
    pub fn policy_endorsement(&self, session: &Handle<'_>) -> Result<(), TpmError> {
        let empty = buffer(&[])?;
        let (mut timeout, mut ticket) = (null_mut(), null_mut());
        command!(
            self,
            Esys_PolicySecret_Async(ENDORSEMENT, session.tr(), PASSWORD, NONE, NONE, &empty, &empty, &empty, 0),
            Esys_PolicySecret_Finish(&mut timeout, &mut ticket)
        )?;
        // SAFETY: outputs of the call just above, which has succeeded; they are in no other hands.
        unsafe {
            TpmAnswer::take(self, "PolicySecret", timeout)?;
            TpmAnswer::take(self, "PolicySecret", ticket)?;
        }
        Ok(())
    }

    /// Opens a credential that was made for the pair of endorsement key and `object`: proves that both are in this TPM.
    /// `session` has satisfied the endorsement key's policy, and encrypts the answer.
    pub fn activate_credential(
        &self,
        object: &Handle<'_>,
        endorsement_key: &Handle<'_>,
        session: &Handle<'_>,
        credential: &[u8],
        secret: &[u8],
    ) -> Result<SecretBytes, TpmError> {
        let mut blob = sys::TPM2B_ID_OBJECT { size: credential.len() as u16, ..Default::default() };
        blob.credential.get_mut(..credential.len()).ok_or(TpmError::TooLong)?.copy_from_slice(credential);
        let mut seed = sys::TPM2B_ENCRYPTED_SECRET { size: secret.len() as u16, ..Default::default() };
        seed.secret.get_mut(..secret.len()).ok_or(TpmError::TooLong)?.copy_from_slice(secret);
        let mut activated = null_mut();
        command!(
            self,
            Esys_ActivateCredential_Async(
                object.tr(),
                endorsement_key.tr(),
                PASSWORD,
                session.tr(),
                NONE,
                &blob,
                &seed
            ),
            Esys_ActivateCredential_Finish(&mut activated)
        )?;
        // SAFETY: an output of the call just above, which has succeeded; it is in no other hands.
        let activated = unsafe { TpmAnswer::take(self, "ActivateCredential", activated)? };
        Ok(SecretBytes::copy_of(sized(activated.size, &activated.buffer))?)
    }

    /// The content of an NV index that anyone may read; `None` if there is no such index, or nothing was ever written.
    pub fn nv_content(&self, index: u32) -> Result<Option<Vec<u8>>, TpmError> {
        /// What every TPM gives at once (TPM 2.0 PC Client Platform TPM Profile, TPM_PT_NV_BUFFER_MAX).
        const AT_ONCE: u16 = 512;
        let content = if_there(|| {
            let handle = self.resident_at(index)?;
            let (public, _) = self.nv_public_of_any(&handle, None)?;
            self.nv_read_all(&handle, public.bytes, AT_ONCE)
        });
        match content {
            Err(error) if error.code().is_some_and(Code::is_unwritten) => Ok(None),
            content => content,
        }
    }
}
