//! Commands that make, load and use keys.
#![allow(unsafe_code)] // calls into libtss2, and the fields of its unions

use std::ptr::{null, null_mut};

use tss_esapi::{
    constants::tss,
    structures::{Public, Signature},
    tss2_esys as sys,
};

use super::{
    super::{
        Digest, TpmError,
        esys::{Esys, Handle, NONE, OWNER, PASSWORD, SHA256, TpmAnswer, buffer, command, sized},
        public,
    },
    take,
};
use crate::base::key::SecretBytes;

/// A key that the TPM has made.
pub struct Created {
    /// Its private part, encrypted to its parent (the bytes of TPM2B_PRIVATE).
    pub private: Vec<u8>,
    pub public: Public,
    /// In which environment it was made (for `TPM2_CertifyCreation`).
    pub creation_data: Box<sys::TPM2B_CREATION_DATA>,
    /// Digest of that.
    pub creation_hash: sys::TPM2B_DIGEST,
    /// The TPM's word for it.
    pub creation_ticket: sys::TPMT_TK_CREATION,
}

impl Esys {
    /// A persistent object or NV index. What the TPM says of it is not verified: see [`Esys::public_of`].
    pub fn resident_at(&self, handle: u32) -> Result<Handle<'_>, TpmError> {
        let mut tr = NONE;
        command!(self, Esys_TR_FromTPMPublic_Async(handle, NONE, NONE, NONE), Esys_TR_FromTPMPublic_Finish(&mut tr))?;
        Ok(self.resident(tr))
    }

    /// The public part of a loaded key, as libtss2 has it: what a session is salted to.
    pub fn public_of(&self, key: &Handle<'_>) -> Result<Public, TpmError> {
        let (mut bytes, mut len) = (null_mut(), 0);
        // SAFETY: the context and the handle are live.
        let code = unsafe { sys::Esys_TR_Serialize(self.context(), key.tr(), &mut bytes, &mut len) };
        if code != 0 || bytes.is_null() {
            return Err(TpmError::Answer { command: "TR_Serialize" });
        }
        // SAFETY: libtss2 has allocated `len` bytes.
        let record = unsafe { std::slice::from_raw_parts(bytes, len as usize) }.to_vec();
        // SAFETY: allocated by libtss2, and not used any more.
        unsafe { sys::Esys_Free(bytes.cast()) };
        public::of_record(&record)
    }

    /// Makes a key under a parent; `authorization` is the new key's (empty: none), encrypted on its way by `session`.
    pub fn create(
        &self,
        parent: &Handle<'_>,
        session: &Handle<'_>,
        template: &Public,
        authorization: Option<&SecretBytes>,
    ) -> Result<Created, TpmError> {
        let public = sys::TPM2B_PUBLIC::try_from(template.clone())?;
        let mut sensitive = Sensitive::of(authorization)?;
        let (outside, pcrs) = (sys::TPM2B_DATA::default(), sys::TPML_PCR_SELECTION::default());
        let (mut private, mut made, mut data) = (null_mut(), null_mut(), null_mut());
        let (mut hash, mut ticket) = (null_mut(), null_mut());
        command!(
            self,
            Esys_Create_Async(parent.tr(), PASSWORD, session.tr(), NONE, sensitive.get(), &public, &outside, &pcrs),
            Esys_Create_Finish(&mut private, &mut made, &mut data, &mut hash, &mut ticket)
        )?;
        let private = take!(self, "Create", private)?;
        let made = take!(self, "Create", made)?;
        Ok(Created {
            private: sized(private.size, &private.buffer).to_vec(),
            public: Public::try_from(*made)?,
            creation_data: Box::new(*take!(self, "Create", data)?),
            creation_hash: *take!(self, "Create", hash)?,
            creation_ticket: *take!(self, "Create", ticket)?,
        })
    }

    /// Loads a key under its parent.
    pub fn load(&self, parent: &Handle<'_>, private: &[u8], public: &Public) -> Result<Handle<'_>, TpmError> {
        let public = sys::TPM2B_PUBLIC::try_from(public.clone())?;
        let mut sealed = Box::new(sys::TPM2B_PRIVATE { size: private.len() as u16, buffer: [0; 1550] });
        sealed.buffer.get_mut(..private.len()).ok_or(TpmError::TooLong)?.copy_from_slice(private);
        let mut tr = NONE;
        command!(
            self,
            Esys_Load_Async(parent.tr(), PASSWORD, NONE, NONE, &*sealed, &public),
            Esys_Load_Finish(&mut tr)
        )?;
        Ok(self.transient(tr))
    }

    /// Loads somebody's public key, for the verification of a signature.
    pub fn load_external(&self, public: &Public) -> Result<Handle<'_>, TpmError> {
        let public = sys::TPM2B_PUBLIC::try_from(public.clone())?;
        let mut tr = NONE;
        // TPM2_PolicyAuthorize wants a ticket of a hierarchy that is not null (TPM 2.0 Part 3, section 23.16).
        command!(
            self,
            Esys_LoadExternal_Async(NONE, NONE, NONE, null(), &public, OWNER),
            Esys_LoadExternal_Finish(&mut tr)
        )?;
        Ok(self.transient(tr))
    }

    /// Decrypts OAEP with SHA-256 and no label: RSA-OAEP-256 of RFC 7518.
    pub fn rsa_decrypt(
        &self,
        key: &Handle<'_>,
        session: &Handle<'_>,
        encrypted: &[u8],
    ) -> Result<SecretBytes, TpmError> {
        let mut cipher_text = sys::TPM2B_PUBLIC_KEY_RSA { size: encrypted.len() as u16, ..Default::default() };
        cipher_text.buffer.get_mut(..encrypted.len()).ok_or(TpmError::TooLong)?.copy_from_slice(encrypted);
        let scheme = sys::TPMT_RSA_DECRYPT {
            scheme: tss::TPM2_ALG_OAEP,
            details: sys::TPMU_ASYM_SCHEME { oaep: sys::TPMS_SCHEME_HASH { hashAlg: SHA256 } },
        };
        let (label, mut message) = (sys::TPM2B_DATA::default(), null_mut());
        command!(
            self,
            Esys_RSA_Decrypt_Async(key.tr(), session.tr(), NONE, NONE, &cipher_text, &scheme, &label),
            Esys_RSA_Decrypt_Finish(&mut message)
        )?;
        let message = take!(self, "RSA_Decrypt", message)?;
        Ok(SecretBytes::copy_of(sized(message.size, &message.buffer))?)
    }

    /// The x coordinate, 32 bytes, of a point multiplied by the key: Z of ECDH.
    pub fn ecdh_z(
        &self,
        key: &Handle<'_>,
        session: &Handle<'_>,
        point: (&[u8], &[u8]),
    ) -> Result<SecretBytes, TpmError> {
        const BYTES: usize = 32;
        let coordinate = |bytes: &[u8]| {
            let mut coordinate = sys::TPM2B_ECC_PARAMETER { size: bytes.len() as u16, ..Default::default() };
            coordinate.buffer.get_mut(..bytes.len()).ok_or(TpmError::TooLong)?.copy_from_slice(bytes);
            Ok::<_, TpmError>(coordinate)
        };
        let point = sys::TPM2B_ECC_POINT {
            size: 0,
            point: sys::TPMS_ECC_POINT { x: coordinate(point.0)?, y: coordinate(point.1)? },
        };
        let mut out = null_mut();
        command!(
            self,
            Esys_ECDH_ZGen_Async(key.tr(), session.tr(), NONE, NONE, &point),
            Esys_ECDH_ZGen_Finish(&mut out)
        )?;
        let out = take!(self, "ECDH_ZGen", out)?;
        let x = sized(out.point.x.size, &out.point.x.buffer);
        // Some TPMs leave zeroes in front away.
        let mut z = SecretBytes::zeroed(BYTES)?;
        let front = BYTES.checked_sub(x.len()).ok_or(TpmError::Answer { command: "ECDH_ZGen" })?;
        z.expose_mut()[front..].copy_from_slice(x);
        Ok(z)
    }

    /// Verifies a signature over a digest; the ticket says so to `policy_authorize`.
    pub fn verify_signature(
        &self,
        key: &Handle<'_>,
        digest: &Digest,
        signature: &Signature,
    ) -> Result<TpmAnswer<'_, sys::TPMT_TK_VERIFIED>, TpmError> {
        let (digest, signature) = (buffer(digest)?, sys::TPMT_SIGNATURE::try_from(signature.clone())?);
        let mut ticket = null_mut();
        command!(
            self,
            Esys_VerifySignature_Async(key.tr(), NONE, NONE, NONE, &digest, &signature),
            Esys_VerifySignature_Finish(&mut ticket)
        )?;
        take!(self, "VerifySignature", ticket)
    }

    /// Makes a primary key of a hierarchy.
    pub fn create_primary(&self, hierarchy: sys::ESYS_TR, template: &Public) -> Result<Handle<'_>, TpmError> {
        let public = sys::TPM2B_PUBLIC::try_from(template.clone())?;
        let mut sensitive = Sensitive::of(None)?;
        let (outside, pcrs) = (sys::TPM2B_DATA::default(), sys::TPML_PCR_SELECTION::default());
        let (mut tr, mut made, mut data) = (NONE, null_mut(), null_mut());
        let (mut hash, mut ticket) = (null_mut(), null_mut());
        command!(
            self,
            Esys_CreatePrimary_Async(hierarchy, PASSWORD, NONE, NONE, sensitive.get(), &public, &outside, &pcrs),
            Esys_CreatePrimary_Finish(&mut tr, &mut made, &mut data, &mut hash, &mut ticket)
        )?;
        let handle = self.transient(tr);
        take!(self, "CreatePrimary", made)?;
        take!(self, "CreatePrimary", data)?;
        take!(self, "CreatePrimary", hash)?;
        take!(self, "CreatePrimary", ticket)?;
        Ok(handle)
    }

    /// Keeps a primary key in the TPM.
    pub fn make_persistent(&self, key: &Handle<'_>, handle: u32) -> Result<Handle<'_>, TpmError> {
        let mut tr = NONE;
        command!(
            self,
            Esys_EvictControl_Async(OWNER, key.tr(), PASSWORD, NONE, NONE, handle),
            Esys_EvictControl_Finish(&mut tr)
        )?;
        Ok(self.resident(tr))
    }

    /// The authorization value that sessions prove for a key from now on.
    pub fn set_authorization(&self, key: &Handle<'_>, value: &SecretBytes) -> Result<(), TpmError> {
        self.set_authorization_of(key.tr(), value)
    }

    /// The owner's password, which sessions prove from now on.
    pub fn set_owner_password(&self, value: &SecretBytes) -> Result<(), TpmError> {
        self.set_authorization_of(OWNER, value)
    }

    fn set_authorization_of(&self, tr: sys::ESYS_TR, value: &SecretBytes) -> Result<(), TpmError> {
        let mut authorization = buffer(value.expose())?;
        // SAFETY: the context and the handle are live; libtss2 copies the value.
        let code = unsafe { sys::Esys_TR_SetAuth(self.context(), tr, &authorization) };
        zeroize::Zeroize::zeroize(&mut authorization.buffer[..]);
        if code == 0 { Ok(()) } else { Err(TpmError::Answer { command: "TR_SetAuth" }) }
    }
}

/// A new key's authorization value; wiped on drop.
struct Sensitive(Box<sys::TPM2B_SENSITIVE_CREATE>);

impl Sensitive {
    fn of(authorization: Option<&SecretBytes>) -> Result<Self, TpmError> {
        let mut sensitive = Self(Box::default());
        if let Some(value) = authorization {
            sensitive.0.sensitive.userAuth = buffer(value.expose())?;
        }
        Ok(sensitive)
    }

    fn get(&mut self) -> *const sys::TPM2B_SENSITIVE_CREATE {
        &raw const *self.0
    }
}

impl Drop for Sensitive {
    fn drop(&mut self) {
        zeroize::Zeroize::zeroize(&mut self.0.sensitive.userAuth.buffer[..]);
    }
}
