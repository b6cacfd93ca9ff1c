//! Sessions, and the commands that build up a session's policy.
#![allow(unsafe_code)] // calls into libtss2, and the fields of its unions

use std::ptr::{null, null_mut};

use tss_esapi::{constants::tss, tss2_esys as sys};

use super::{
    super::{
        Digest, Name, TpmError,
        esys::{Esys, Handle, NONE, PASSWORD, SHA256, TpmAnswer, buffer, command, sized},
        pcr,
    },
    take,
};
use crate::base::pcr_set::PcrSet;

/// What a session is for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum SessionKind {
    /// Encrypts parameters.
    Hmac,
    /// Authenticates commands and answers that have no parameter to encrypt (TPM 2.0 Part 1, section 17.6.3: audit).
    Audit,
    /// Authorizes by policy, and encrypts parameters.
    Policy,
    /// Computes a policy's digest only.
    Trial,
}

impl SessionKind {
    /// TPM 2.0 Part 2, TPM_SE.
    fn tpm_se(self) -> u8 {
        match self {
            Self::Hmac | Self::Audit => tss::TPM2_SE_HMAC,
            Self::Policy => tss::TPM2_SE_POLICY,
            Self::Trial => tss::TPM2_SE_TRIAL,
        }
    }

    fn attributes(self) -> sys::TPMA_SESSION {
        match self {
            Self::Hmac | Self::Policy => {
                tss::TPMA_SESSION_CONTINUESESSION | tss::TPMA_SESSION_DECRYPT | tss::TPMA_SESSION_ENCRYPT
            }
            Self::Audit => tss::TPMA_SESSION_CONTINUESESSION | tss::TPMA_SESSION_AUDIT,
            Self::Trial => tss::TPMA_SESSION_CONTINUESESSION,
        }
    }
}

impl Esys {
    /// A session, salted to `salt`: with it, whoever listens on the bus cannot compute the session's key.
    pub fn start_session(&self, kind: SessionKind, salt: Option<&Handle<'_>>) -> Result<Handle<'_>, TpmError> {
        let mut tr = NONE;
        let symmetric = sys::TPMT_SYM_DEF {
            algorithm: tss::TPM2_ALG_AES,
            keyBits: sys::TPMU_SYM_KEY_BITS { aes: 128 },
            mode: sys::TPMU_SYM_MODE { aes: tss::TPM2_ALG_CFB },
        };
        let salt_key = salt.map_or(NONE, Handle::tr);
        let tpm_se = kind.tpm_se();
        command!(
            self,
            Esys_StartAuthSession_Async(salt_key, NONE, NONE, NONE, NONE, null(), tpm_se, &symmetric, SHA256),
            Esys_StartAuthSession_Finish(&mut tr)
        )?;
        let session = self.transient(tr);
        if kind == SessionKind::Policy {
            self.count_policy_session();
        }
        // SAFETY: the context and the session are live.
        let code = unsafe { sys::Esys_TRSess_SetAttributes(self.context(), tr, kind.attributes(), 0xFF) };
        if code != 0 {
            return Err(TpmError::Answer { command: "StartAuthSession" });
        }
        Ok(session)
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
}
