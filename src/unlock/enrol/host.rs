//! The host's side: its TPM makes the keys, says how it made them, and opens the answer.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tss_esapi::structures::Public;

use super::{
    Answer, EnrolError, Request, Statement,
    document::{Attestation, EndorsementKey, base64, sized},
    endorsement::fingerprint,
};
use crate::{
    base::{
        clock::now,
        key::{HostName, SecretBytes},
    },
    keys::tpm::{
        Digest, EndorsementKind, Handle, IdentityFile, Name, Policy, Share, Tpm, TpmError,
        public::{name_of, to_pkey},
    },
    sys::state,
};

/// A host's request, and what the host needs to take the answer: the file `enrolment.json` of the state directory.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Asked {
    pub host: HostName,
    /// What the administrator is to get.
    pub request: Request,
    /// The identity key, as it stands in its file at first.
    key: String,
    storage_root: Name,
    endorsement_keys: Vec<(EndorsementKind, Name)>,
    #[serde(with = "sized")]
    attestation_key: Public,
    /// Its private part, encrypted by the TPM.
    #[serde(with = "base64")]
    private: Vec<u8>,
}

/// What a host has for having joined.
pub struct Joined {
    /// Of the content key of its lockbox key.
    pub share: Share,
    /// The public part of the identity key that the answer is for.
    pub key: Public,
}

impl Asked {
    /// Keeps it; the request before is forgotten.
    pub fn keep(&self, state: &Path) -> Result<(), EnrolError> {
        Ok(state::write(&kept(state), self)?)
    }

    /// The identity key, not admitted yet.
    pub fn key(&self) -> Result<IdentityFile, EnrolError> {
        let damaged = |why| TpmError::Structure(format!("the identity key of the enrolment {why}"));
        Ok(IdentityFile::parse(self.key.as_bytes()).map_err(damaged)?)
    }

    /// Fingerprints of the endorsement keys, and who certified each, if anybody: for people to compare.
    pub fn endorsement_keys(&self) -> Result<Vec<(Digest, bool)>, EnrolError> {
        let statement = self.request.statement(Path::new("enrolment.json"))?;
        let each = statement.endorsement_keys.iter();
        each.map(|key| Ok((fingerprint(&*to_pkey(&key.public)?)?, key.certificate.is_some()))).collect()
    }
}

/// The last request of this host, if it has asked.
pub fn asked(state: &Path) -> Result<Option<Asked>, EnrolError> {
    Ok(state::read(&kept(state))?)
}

fn kept(state: &Path) -> PathBuf {
    state.join("enrolment.json")
}

/// Makes an identity key under this policy, and the proof of how it was made.
pub fn request(tpm: &Tpm, host: &HostName, policy: &Policy, pin: Option<&SecretBytes>) -> Result<Asked, EnrolError> {
    let identity = tpm.create_identity(policy, pin)?;
    let endorsement = endorsement_keys(tpm)?;
    let root = tpm.storage_root(Some(identity.file.storage_root))?;
    let attestation_key = tpm.create_attestation_key(&root)?;
    let mut nonce = [0; 32];
    openssl::rand::rand_bytes(&mut nonce)?;
    let statement = Statement {
        host: host.clone(),
        created: now(),
        nonce,
        endorsement_keys: endorsement.iter().map(|(_, key)| key.clone()).collect(),
        attestation_key: attestation_key.public.clone(),
        identity: identity.file.public.clone(),
        storage_root: identity.file.storage_root,
        policy: policy.clone(),
    };
    let statement = statement.to_json()?;
    let enrolment = openssl::sha::sha256(&statement);

    let esys = tpm.esys();
    let signer = esys.load(root.handle(), &attestation_key.private, &attestation_key.public)?;
    let creation = {
        let key = tpm.identity(&identity.file)?;
        esys.certify_creation(&signer, key.handle(), &identity.created, &enrolment)?
    };
    let counter = certify_counter(tpm, &signer, policy, &enrolment)?;
    let names = endorsement.iter().map(|(kind, key)| Ok((*kind, name_of(&key.public)?)));
    Ok(Asked {
        host: host.clone(),
        request: Request::of(statement, Attestation::of(creation)?, counter),
        key: identity.file.to_pem()?,
        storage_root: identity.file.storage_root,
        endorsement_keys: names.collect::<Result<_, TpmError>>()?,
        attestation_key: attestation_key.public,
        private: attestation_key.private,
    })
}

fn endorsement_keys(tpm: &Tpm) -> Result<Vec<(EndorsementKind, EndorsementKey)>, TpmError> {
    let key = |kind: EndorsementKind| {
        let public = tpm.esys().public_of(&tpm.endorsement_key(kind)?)?;
        Ok((kind, EndorsementKey { public, certificate: tpm.endorsement_certificate(kind)? }))
    };
    tpm.endorsement_kinds()?.into_iter().map(key).collect()
}

fn certify_counter(
    tpm: &Tpm,
    signer: &Handle<'_>,
    policy: &Policy,
    enrolment: &Digest,
) -> Result<Option<Attestation>, TpmError> {
    const COUNTER_BYTES: u16 = 8;
    let Some(revocation) = policy.signed.as_ref().and_then(|signed| signed.revocation) else { return Ok(None) };
    let index = tpm.esys().resident_at(revocation.counter.index())?;
    Attestation::of(tpm.esys().certify_nv(signer, &index, COUNTER_BYTES, enrolment)?).map(Some)
}

/// Has the TPM open the answer to the last request of this host.
pub fn take(tpm: &Tpm, answer: &Answer, state: &Path) -> Result<Joined, EnrolError> {
    let asked = asked(state)?.ok_or_else(|| EnrolError::NotEnrolled(kept(state)))?;
    let kind = check_for_us(answer, &asked)?;
    let share = activate(tpm, answer, &asked, kind)?;
    let share = share.expose().try_into().map_err(|_| EnrolError::NotForThisTpm(TpmError::TooLong))?;
    Ok(Joined { share: Share(share), key: asked.key()?.public })
}

fn check_for_us(answer: &Answer, asked: &Asked) -> Result<EndorsementKind, EnrolError> {
    let Asked { host, endorsement_keys, .. } = asked;
    if answer.host != *host {
        return Err(EnrolError::NotForThisHost(format!("'{}', this host is '{host}'", answer.host)));
    }
    if answer.enrolment != asked.request.digest() {
        let what = "another request than the last one of this host";
        return Err(EnrolError::NotForThisHost(what.to_owned()));
    }
    let kind = endorsement_keys.iter().find(|(_, name)| *name == answer.endorsement_key);
    kind.map(|(kind, _)| *kind).ok_or_else(|| EnrolError::NotForThisHost("the TPM of another host".to_owned()))
}

fn activate(tpm: &Tpm, answer: &Answer, asked: &Asked, kind: EndorsementKind) -> Result<SecretBytes, EnrolError> {
    let root = tpm.storage_root(Some(asked.storage_root))?;
    let signer = tpm.esys().load(root.handle(), &asked.private, &asked.attestation_key)?;
    let endorsement_key = tpm.endorsement_key(kind)?;
    let Answer { credential, secret, .. } = answer;
    tpm.activate_credential(&root, &endorsement_key, &signer, credential, secret).map_err(|error| match error {
        TpmError::Refused { command: "ActivateCredential", .. } | TpmError::TooLong => EnrolError::NotForThisTpm(error),
        error => error.into(),
    })
}
