//! This host's identity: a key in its TPM, in a file that is of no use without that TPM in a trusted boot state.

use std::path::Path;

use openssl::{
    bn::{BigNum, BigNumContext},
    pkey::{Id, PKeyRef, Public},
};

use super::{Identity, Kind, candidate};
use crate::{
    base::key::{JoseHeader, Place},
    config::{ConfigPath, TpmConfig},
    keys::{
        seal::{ContentKey, SealError, ecdh_es, jwk, key_wrap, rsa_oaep},
        tpm::{self, IdentityFile, PcrSignatures, Tpm, TpmError},
    },
};

const COORDINATE_BYTES: i32 = 32;

/// A key in the TPM: opens. The TPM is asked when there is something to open, not before.
pub struct TpmIdentity {
    file: IdentityFile,
    algorithm: &'static str,
    kid: String,
    config: TpmConfig,
}

impl TpmIdentity {
    /// Reads the key's file.
    pub fn read(path: &Path, config: &TpmConfig) -> Result<Self, SealError> {
        Self::of(IdentityFile::read(path)?, config)
    }

    /// This key.
    pub fn of(file: IdentityFile, config: &TpmConfig) -> Result<Self, SealError> {
        let key = file.public_key()?;
        let (algorithm, public) = match key.id() {
            Id::RSA => (rsa_oaep::ALG, jwk::of_rsa(&*key.rsa()?)),
            _ => (ecdh_es::ALG, jwk::of_p256(&*key.ec_key()?)?),
        };
        Ok(Self { file, algorithm, kid: jwk::thumbprint(&public), config: config.clone() })
    }

    /// The key's file.
    pub fn file(&self) -> &IdentityFile {
        &self.file
    }
}

impl Identity for TpmIdentity {
    fn kid(&self) -> &str {
        &self.kid
    }

    fn alg(&self) -> &str {
        self.algorithm
    }

    fn takes_time(&self) -> bool {
        true
    }

    fn unwrap(&self, encrypted_key: &[u8], header: &JoseHeader) -> Result<Option<ContentKey>, SealError> {
        if !candidate::needs_share(header) {
            return self.ask_tpm(encrypted_key, header);
        }
        let share = self.file.admission.ok_or(SealError::NotJoined)?;
        self.ask_tpm(encrypted_key, header)?.map(|key| candidate::joined(&key, &share)).transpose()
    }
}

impl TpmIdentity {
    fn ask_tpm(&self, encrypted_key: &[u8], header: &JoseHeader) -> Result<Option<ContentKey>, SealError> {
        // What the entry says is checked before the TPM is troubled with it.
        let ephemeral = (self.algorithm == ecdh_es::ALG).then(|| ecdh_es::ephemeral_key(header)).transpose()?;
        let tpm = Tpm::open(&self.config)?;
        let identity = tpm.identity(&self.file)?;
        let signatures = PcrSignatures::read(&self.config.signatures)?;
        let now = tpm.satisfiable(&self.file.policy, &signatures)?;
        let pin = self.file.policy.pin.then(|| tpm::pin(&self.config)).transpose()?;
        match ephemeral {
            Some(ephemeral) => {
                let (x, y) = coordinates(&ephemeral)?;
                let z = identity.ecdh_z(&now, (&x, &y), pin.as_ref())?;
                key_wrap::unwrap(&ecdh_es::wrapping_key(&z, header)?, encrypted_key)
            }
            None => match identity.rsa_decrypt(&now, encrypted_key, pin.as_ref()) {
                Ok(key) => Ok(ContentKey::from_secret(key)),
                // What the TPM says of a padding that is wrong.
                Err(TpmError::Refused { code, .. }) if code.is_value() => Ok(None),
                Err(error) => Err(error.into()),
            },
        }
    }
}

fn coordinates(key: &PKeyRef<Public>) -> Result<(Vec<u8>, Vec<u8>), SealError> {
    let key = key.ec_key()?;
    let (mut x, mut y, mut context) = (BigNum::new()?, BigNum::new()?, BigNumContext::new()?);
    key.public_key().affine_coordinates(key.group(), &mut x, &mut y, &mut context)?;
    Ok((x.to_vec_padded(COORDINATE_BYTES)?, y.to_vec_padded(COORDINATE_BYTES)?))
}

/// `tpm:PATH` in `identities`.
struct TpmFile<'a>(&'a ConfigPath);

/// What is in this file.
pub(super) fn kind(path: &ConfigPath) -> Box<dyn Kind + '_> {
    Box::new(TpmFile(path))
}

impl Kind for TpmFile<'_> {
    fn open(&self, tpm: &TpmConfig) -> Result<Box<dyn Identity>, SealError> {
        self.check()?;
        Ok(Box::new(TpmIdentity::read(self.0, tpm)?))
    }

    fn check(&self) -> Result<(), SealError> {
        let path = self.0.to_path_buf();
        if path.exists() && !IdentityFile::is_at(&path) {
            let why = "is not a key file of the TPM: write its path without 'tpm:' in identities".to_owned();
            return Err(SealError::KeyFile { path, why });
        }
        Ok(())
    }

    /// Without this host's TPM it opens nothing.
    fn place(&self) -> Place {
        Place::path("TPM key", &**self.0, false)
    }

    fn files(&self) -> Vec<&Path> {
        vec![self.0]
    }

    fn needs_tpm(&self) -> bool {
        true
    }

    fn is_secret(&self) -> bool {
        false
    }
}
