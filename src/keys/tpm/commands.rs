//! The commands of TPM 2.0 Part 3 that we send, in its order, each with the values of this crate.
#![allow(unsafe_code)] // calls into libtss2, and the fields of its unions

use std::ptr::{null, null_mut};

use tss_esapi::{
    constants::tss,
    structures::{Public, Signature},
    tss2_esys as sys,
};

use super::{
    Digest, Name, PcrValues, TpmError,
    esys::{Esys, Handle, NONE, OWNER, PASSWORD, SHA256, TpmAnswer, buffer, command, sized},
    pcr, public,
};
use crate::base::{key::SecretBytes, pcr_set::PcrSet};

/// Takes what libtss2 has allocated.
macro_rules! take {
    ($esys:expr, $command:literal, $value:expr) => {
        // SAFETY: an output of the call just above, which has succeeded; it is in no other hands.
        unsafe { TpmAnswer::take($esys, $command, $value) }
    };
}

/// What a session is for (TPM 2.0 Part 2, TPM_SE).
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum SessionKind {
    /// Encrypts parameters.
    Hmac = tss::TPM2_SE_HMAC as isize,
    /// Authorizes by policy, and encrypts parameters.
    Policy = tss::TPM2_SE_POLICY as isize,
    /// Computes a policy's digest only.
    Trial = tss::TPM2_SE_TRIAL as isize,
}

/// A key that the TPM has made.
pub struct Created {
    /// Its private part, encrypted to its parent (the bytes of TPM2B_PRIVATE).
    pub private: Vec<u8>,
    /// Its public part.
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

    /// A session, salted to `salt`: with it, whoever listens on the bus cannot compute the session's key.
    pub fn start_session(&self, kind: SessionKind, salt: Option<&Handle<'_>>) -> Result<Handle<'_>, TpmError> {
        let mut tr = NONE;
        let symmetric = sys::TPMT_SYM_DEF {
            algorithm: tss::TPM2_ALG_AES,
            keyBits: sys::TPMU_SYM_KEY_BITS { aes: 128 },
            mode: sys::TPMU_SYM_MODE { aes: tss::TPM2_ALG_CFB },
        };
        let salt_key = salt.map_or(NONE, Handle::tr);
        let kind_byte = kind as u8;
        command!(
            self,
            Esys_StartAuthSession_Async(salt_key, NONE, NONE, NONE, NONE, null(), kind_byte, &symmetric, SHA256),
            Esys_StartAuthSession_Finish(&mut tr)
        )?;
        let session = self.transient(tr);
        if kind == SessionKind::Policy {
            self.count_policy_session();
        }
        if kind != SessionKind::Trial {
            let attributes = tss::TPMA_SESSION_CONTINUESESSION | tss::TPMA_SESSION_DECRYPT | tss::TPMA_SESSION_ENCRYPT;
            // SAFETY: the context and the session are live.
            let code = unsafe { sys::Esys_TRSess_SetAttributes(self.context(), tr, attributes, 0xFF) };
            if code != 0 {
                return Err(TpmError::Answer { command: "StartAuthSession" });
            }
        }
        Ok(session)
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

    /// Extends a PCR by a SHA-256 digest.
    pub fn pcr_extend(&self, pcr: u8, digest: &Digest) -> Result<(), TpmError> {
        let mut values = sys::TPML_DIGEST_VALUES { count: 1, ..Default::default() };
        values.digests[0] = sys::TPMT_HA { hashAlg: SHA256, digest: sys::TPMU_HA { sha256: *digest } };
        command!(self, Esys_PCR_Extend_Async(u32::from(pcr), PASSWORD, NONE, NONE, &values), Esys_PCR_Extend_Finish())
    }

    /// The values of PCRs in the SHA-256 bank. Those that the bank does not have are left out.
    pub fn pcr_read(&self, pcrs: PcrSet) -> Result<PcrValues, TpmError> {
        let (mut left, mut values) = (pcrs, PcrValues::default());
        // The TPM answers with eight values at most.
        while !left.is_empty() {
            let selection = pcr::selection(left);
            let (mut counter, mut read, mut digests) = (0, null_mut(), null_mut());
            command!(
                self,
                Esys_PCR_Read_Async(NONE, NONE, NONE, &selection),
                Esys_PCR_Read_Finish(&mut counter, &mut read, &mut digests)
            )?;
            let (read, digests) = (take!(self, "PCR_Read", read)?, take!(self, "PCR_Read", digests)?);
            let read = pcr::of_selection(&read);
            if read.is_empty() {
                break;
            }
            if !read.without(left).is_empty() {
                return Err(TpmError::Answer { command: "PCR_Read" });
            }
            for (pcr, digest) in read.iter().zip(&digests.digests) {
                let value = sized(digest.size, &digest.buffer).try_into();
                values.insert(pcr, value.map_err(|_| TpmError::Answer { command: "PCR_Read" })?);
            }
            left = left.without(read);
        }
        Ok(values)
    }

    /// Extends the session's policy by the present values of these PCRs; refused by a policy session if these are not
    /// `expected` (their digest).
    pub fn policy_pcr(&self, session: &Handle<'_>, pcrs: PcrSet, expected: Option<&Digest>) -> Result<(), TpmError> {
        let (digest, selection) = (buffer(expected.map_or(&[], |digest| &digest[..]))?, pcr::selection(pcrs));
        command!(
            self,
            Esys_PolicyPCR_Async(session.tr(), NONE, NONE, NONE, &digest, &selection),
            Esys_PolicyPCR_Finish()
        )
    }

    /// Replaces the session's policy `approved` by one that stands for all that the key has signed.
    pub fn policy_authorize(
        &self,
        session: &Handle<'_>,
        approved: &Digest,
        policy_ref: &[u8],
        key: &Name,
        ticket: &sys::TPMT_TK_VERIFIED,
    ) -> Result<(), TpmError> {
        let (approved, policy_ref) = (buffer(approved)?, buffer(policy_ref)?);
        let mut name = sys::TPM2B_NAME { size: key.as_bytes().len() as u16, ..Default::default() };
        name.name[..key.as_bytes().len()].copy_from_slice(key.as_bytes());
        command!(
            self,
            Esys_PolicyAuthorize_Async(session.tr(), NONE, NONE, NONE, &approved, &policy_ref, &name, ticket),
            Esys_PolicyAuthorize_Finish()
        )
    }

    /// Extends the session's policy by: the counter is not above `most`.
    pub fn policy_counter(&self, session: &Handle<'_>, counter: &Handle<'_>, most: u64) -> Result<(), TpmError> {
        let operand = buffer(&most.to_be_bytes())?;
        command!(
            self,
            Esys_PolicyNV_Async(
                counter.tr(),
                counter.tr(),
                session.tr(),
                PASSWORD,
                NONE,
                NONE,
                &operand,
                0,
                tss::TPM2_EO_UNSIGNED_LE
            ),
            Esys_PolicyNV_Finish()
        )
    }

    /// Replaces the session's policy, which must be one of these, by one that stands for all of them.
    pub fn policy_or(&self, session: &Handle<'_>, branches: &[Digest]) -> Result<(), TpmError> {
        let mut list = sys::TPML_DIGEST { count: branches.len() as u32, ..Default::default() };
        for (index, branch) in branches.iter().enumerate() {
            *list.digests.get_mut(index).ok_or(TpmError::TooLong)? = buffer(branch)?;
        }
        command!(self, Esys_PolicyOR_Async(session.tr(), NONE, NONE, NONE, &list), Esys_PolicyOR_Finish())
    }

    /// Extends the session's policy by: the key's authorization value is known.
    pub fn policy_auth_value(&self, session: &Handle<'_>) -> Result<(), TpmError> {
        command!(self, Esys_PolicyAuthValue_Async(session.tr(), NONE, NONE, NONE), Esys_PolicyAuthValue_Finish())
    }

    /// The session's policy digest.
    pub fn policy_digest(&self, session: &Handle<'_>) -> Result<Digest, TpmError> {
        let mut digest = null_mut();
        command!(
            self,
            Esys_PolicyGetDigest_Async(session.tr(), NONE, NONE, NONE),
            Esys_PolicyGetDigest_Finish(&mut digest)
        )?;
        let digest = take!(self, "PolicyGetDigest", digest)?;
        let answer = TpmError::Answer { command: "PolicyGetDigest" };
        sized(digest.size, &digest.buffer).try_into().map_err(|_| answer)
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

    /// A property of the TPM (TPM 2.0 Part 2, TPM_PT), zero if it does not have it.
    pub fn property(&self, property: u32) -> Result<u32, TpmError> {
        let (mut more, mut data) = (0, null_mut());
        command!(
            self,
            Esys_GetCapability_Async(NONE, NONE, NONE, tss::TPM2_CAP_TPM_PROPERTIES, property, 1),
            Esys_GetCapability_Finish(&mut more, &mut data)
        )?;
        let data = take!(self, "GetCapability", data)?;
        // SAFETY: the member of the capability that was asked for; all are plain numbers.
        let properties = unsafe { data.data.tpmProperties };
        let first = properties.tpmProperty.iter().take(properties.count as usize).next();
        Ok(first.filter(|found| found.property == property).map_or(0, |found| found.value))
    }

    /// Whether the TPM has this curve (TPM 2.0 Part 4 of the TCG Algorithm Registry, TPM_ECC_CURVE).
    pub fn has_curve(&self, curve: u16) -> Result<bool, TpmError> {
        let (mut more, mut data) = (0, null_mut());
        command!(
            self,
            Esys_GetCapability_Async(NONE, NONE, NONE, tss::TPM2_CAP_ECC_CURVES, u32::from(curve), 1),
            Esys_GetCapability_Finish(&mut more, &mut data)
        )?;
        let data = take!(self, "GetCapability", data)?;
        // SAFETY: the member of the capability that was asked for; all are plain numbers.
        let curves = unsafe { data.data.eccCurves };
        Ok(curves.count > 0 && curves.eccCurves[0] == curve)
    }

    /// Makes a counter that anyone may read and the owner may raise.
    pub fn nv_define_counter(&self, index: u32, attributes: u32) -> Result<Handle<'_>, TpmError> {
        let (authorization, mut tr) = (buffer(&[])?, NONE);
        let nv_public =
            sys::TPMS_NV_PUBLIC { nvIndex: index, nameAlg: SHA256, attributes, authPolicy: buffer(&[])?, dataSize: 8 };
        let public = sys::TPM2B_NV_PUBLIC { size: 0, nvPublic: nv_public };
        command!(
            self,
            Esys_NV_DefineSpace_Async(OWNER, PASSWORD, NONE, NONE, &authorization, &public),
            Esys_NV_DefineSpace_Finish(&mut tr)
        )?;
        Ok(self.resident(tr))
    }

    /// The name of an NV index, computed from what the TPM says of it.
    pub fn nv_name(&self, index: &Handle<'_>) -> Result<Name, TpmError> {
        let (mut nv_public, mut name) = (null_mut(), null_mut());
        command!(
            self,
            Esys_NV_ReadPublic_Async(index.tr(), NONE, NONE, NONE),
            Esys_NV_ReadPublic_Finish(&mut nv_public, &mut name)
        )?;
        let (_, name) = (take!(self, "NV_ReadPublic", nv_public)?, take!(self, "NV_ReadPublic", name)?);
        Name::from_bytes(sized(name.size, &name.name)).ok_or(TpmError::Answer { command: "NV_ReadPublic" })
    }

    /// Raises a counter by one.
    pub fn nv_increment(&self, counter: &Handle<'_>) -> Result<(), TpmError> {
        command!(self, Esys_NV_Increment_Async(OWNER, counter.tr(), PASSWORD, NONE, NONE), Esys_NV_Increment_Finish())
    }

    /// A counter's value.
    pub fn nv_read_counter(&self, counter: &Handle<'_>) -> Result<u64, TpmError> {
        let mut data = null_mut();
        command!(
            self,
            Esys_NV_Read_Async(counter.tr(), counter.tr(), PASSWORD, NONE, NONE, 8, 0),
            Esys_NV_Read_Finish(&mut data)
        )?;
        let data = take!(self, "NV_Read", data)?;
        let bytes = sized(data.size, &data.buffer).try_into();
        Ok(u64::from_be_bytes(bytes.map_err(|_| TpmError::Answer { command: "NV_Read" })?))
    }

    /// The authorization value that sessions prove for a key from now on.
    pub fn set_authorization(&self, key: &Handle<'_>, value: &SecretBytes) -> Result<(), TpmError> {
        let mut authorization = buffer(value.expose())?;
        // SAFETY: the context and the handle are live; libtss2 copies the value.
        let code = unsafe { sys::Esys_TR_SetAuth(self.context(), key.tr(), &authorization) };
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
