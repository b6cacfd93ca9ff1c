//! A host's identity key: made, and used under its policy.

use tss_esapi::{constants::tss, structures::Public};

use super::{
    Created, Handle, IdentityFile, Policy, SessionKind, StorageRoot, Tpm, TpmError,
    policy_session::{Satisfiable, not_this_state},
    public::{identity_p256, identity_rsa},
};
use crate::base::key::SecretBytes;

/// TPM_ECC_NIST_P256
pub(super) const P256: u16 = 3;

/// A key that was just made.
pub struct NewIdentity {
    /// The key, for its file.
    pub file: IdentityFile,
    /// How it was made, for its certification.
    pub created: Created,
}

/// A loaded identity key.
pub struct Identity<'t> {
    tpm: &'t Tpm,
    file: &'t IdentityFile,
    root: StorageRoot<'t>,
    key: Handle<'t>,
}

impl Tpm {
    /// Makes an identity key: on P-256, or for RSA where the TPM does not have that curve.
    pub fn create_identity(&self, policy: &Policy, pin: Option<&SecretBytes>) -> Result<NewIdentity, TpmError> {
        let template = if self.esys().has_curve(P256)? { identity_p256 } else { identity_rsa };
        self.create_by(template(&policy.digest()?, policy.pin)?, policy, pin)
    }

    /// Makes an identity key for RSA.
    pub fn create_rsa_identity(&self, policy: &Policy, pin: Option<&SecretBytes>) -> Result<NewIdentity, TpmError> {
        self.create_by(identity_rsa(&policy.digest()?, policy.pin)?, policy, pin)
    }

    fn create_by(&self, template: Public, policy: &Policy, pin: Option<&SecretBytes>) -> Result<NewIdentity, TpmError> {
        policy.check()?;
        if policy.pin != pin.is_some_and(|pin| !pin.is_empty()) {
            return Err(if policy.pin { TpmError::NoPin } else { TpmError::Policy("it has no PIN".to_owned()) });
        }
        let root = self.storage_root(None)?;
        let session = self.esys().start_session(SessionKind::Hmac, Some(&root.handle))?;
        let created = self.esys().create(&root.handle, &session, &template, pin)?;
        let file = IdentityFile {
            public: created.public.clone(),
            private: created.private.clone(),
            storage_root: root.name(),
            policy: policy.clone(),
            admission: None,
        };
        Ok(NewIdentity { file, created })
    }

    /// Loads an identity key; only the TPM that made it can.
    pub fn identity<'t>(&'t self, file: &'t IdentityFile) -> Result<Identity<'t>, TpmError> {
        let root = self.storage_root(Some(file.storage_root))?;
        let key = self.esys().load(&root.handle, &file.private, &file.public)?;
        Ok(Identity { tpm: self, file, root, key })
    }
}

impl Identity<'_> {
    /// The loaded key.
    pub fn handle(&self) -> &Handle<'_> {
        &self.key
    }

    /// Convinces the TPM that the policy holds, all but the key's use. A PIN is not tried.
    pub fn test(&self, now: &Satisfiable<'_>) -> Result<(), TpmError> {
        let session = self.session(now)?;
        if self.tpm.esys().policy_digest(&session)? != now.policy().digest()? {
            return Err(TpmError::Answer { command: "PolicyGetDigest" });
        }
        Ok(())
    }

    /// Z of ECDH with this point on P-256: the shared x coordinate, 32 bytes.
    pub fn ecdh_z(
        &self,
        now: &Satisfiable<'_>,
        point: (&[u8], &[u8]),
        pin: Option<&SecretBytes>,
    ) -> Result<SecretBytes, TpmError> {
        self.authorized(now, pin, |session| self.tpm.esys().ecdh_z(&self.key, session, point))
    }

    /// Decrypts what was encrypted by RSA-OAEP-256.
    pub fn rsa_decrypt(
        &self,
        now: &Satisfiable<'_>,
        encrypted: &[u8],
        pin: Option<&SecretBytes>,
    ) -> Result<SecretBytes, TpmError> {
        self.authorized(now, pin, |session| self.tpm.esys().rsa_decrypt(&self.key, session, encrypted))
    }

    fn authorized<T>(
        &self,
        now: &Satisfiable<'_>,
        pin: Option<&SecretBytes>,
        operation: impl FnOnce(&Handle<'_>) -> Result<T, TpmError>,
    ) -> Result<T, TpmError> {
        if self.file.policy.pin {
            self.tpm.check_not_locked_out()?;
            self.tpm.esys().set_authorization(&self.key, pin.ok_or(TpmError::NoPin)?)?;
        }
        let session = self.session(now)?;
        operation(&session).map_err(|error| self.tpm.explain_authorization(error))
    }

    /// The one session for all that is secret: salted to the pinned storage root key, encrypting, and authorizing.
    fn session(&self, now: &Satisfiable<'_>) -> Result<Handle<'_>, TpmError> {
        let session = self.tpm.esys().start_session(SessionKind::Policy, Some(&self.root.handle))?;
        self.tpm.satisfy(&session, now)?;
        Ok(session)
    }
}

impl Tpm {
    /// A locked TPM is left alone.
    fn check_not_locked_out(&self) -> Result<(), TpmError> {
        let (failed, most, recovery_seconds) = self.dictionary_attack_state()?;
        if failed >= most { Err(TpmError::LockedOut { failed, recovery_seconds }) } else { Ok(()) }
    }

    /// Failed tries, how many are allowed, and seconds until one is forgiven.
    fn dictionary_attack_state(&self) -> Result<(u32, u32, u32), TpmError> {
        const MAX_AUTH_FAIL: u32 = tss::TPM2_PT_LOCKOUT_COUNTER + 1;
        let property = |property| self.esys().property(property);
        Ok((
            property(tss::TPM2_PT_LOCKOUT_COUNTER)?,
            property(MAX_AUTH_FAIL)?,
            property(tss::TPM2_PT_LOCKOUT_INTERVAL)?,
        ))
    }

    fn explain_authorization(&self, error: TpmError) -> TpmError {
        let Some(code) = error.code() else { return error };
        if !code.is_auth() && !code.is_lockout() {
            return not_this_state(error);
        }
        match self.dictionary_attack_state() {
            Ok((failed, most, recovery_seconds)) if code.is_lockout() || failed >= most => {
                TpmError::LockedOut { failed, recovery_seconds }
            }
            Ok((failed, most, _)) => TpmError::WrongPin { left: most - failed },
            Err(_) => error,
        }
    }
}
