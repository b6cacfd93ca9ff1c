//! The host's side: its TPM makes the keys, says how it made them, and answers.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tss_esapi::structures::Public;

use super::{
    Bundle, Challenge, EnrolAnswer, EnrolError, Statement,
    credential::answer_mac,
    document::{Attestation, EndorsementKey, base64, sized},
    endorsement::fingerprint,
};
use crate::{
    base::{
        clock::now,
        hex,
        key::{HostName, SecretBytes},
    },
    keys::tpm::{
        Digest, EndorsementKind, Handle, IdentityFile, Name, Policy, Tpm, TpmError,
        public::{name_of, to_pkey},
    },
    sys::state,
};

/// An enrolment that was begun.
pub struct Enrolled {
    /// The identity key, for its file.
    pub file: IdentityFile,
    /// What the administrator is to get.
    pub bundle: Bundle,
    /// Fingerprints of the endorsement keys, and whether each has a certificate: for people to compare.
    pub endorsement_keys: Vec<(Digest, bool)>,
    answering: Answering,
}

/// What the host keeps to answer the challenge with: the file `enrolment.json` of the state directory.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Answering {
    host: HostName,
    #[serde(with = "hex")]
    enrolment: Digest,
    storage_root: Name,
    endorsement_keys: Vec<(EndorsementKind, Name)>,
    #[serde(with = "sized")]
    attestation_key: Public,
    /// Its private part, encrypted by the TPM.
    #[serde(with = "base64")]
    private: Vec<u8>,
}

impl Enrolled {
    /// Keeps what the answer will need; the enrolment before is forgotten.
    pub fn keep(&self, state: &Path) -> Result<(), EnrolError> {
        Ok(state::write(&kept(state), &self.answering)?)
    }
}

fn kept(state: &Path) -> PathBuf {
    state.join("enrolment.json")
}

/// Makes an identity key under this policy, and the proof of how it was made.
pub fn enrol(tpm: &Tpm, host: &HostName, policy: &Policy, pin: Option<&SecretBytes>) -> Result<Enrolled, EnrolError> {
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
    let bundle = Bundle::of(statement, Attestation::of(creation)?, counter);

    let names = endorsement.iter().map(|(kind, key)| Ok((*kind, name_of(&key.public)?)));
    let answering = Answering {
        host: host.clone(),
        enrolment,
        storage_root: identity.file.storage_root,
        endorsement_keys: names.collect::<Result<_, TpmError>>()?,
        attestation_key: attestation_key.public,
        private: attestation_key.private,
    };
    let fingerprints = endorsement
        .iter()
        .map(|(_, key)| Ok::<_, EnrolError>((fingerprint(&*to_pkey(&key.public)?)?, key.certificate.is_some())));
    Ok(Enrolled { endorsement_keys: fingerprints.collect::<Result<_, _>>()?, file: identity.file, bundle, answering })
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

/// Answers a challenge to the last enrolment of this host.
pub fn answer(tpm: &Tpm, challenge: &Challenge, state: &Path) -> Result<EnrolAnswer, EnrolError> {
    let path = kept(state);
    let answering: Answering = state::read(&path)?.ok_or(EnrolError::NotEnrolled(path))?;
    let kind = check_for_us(challenge, &answering)?;
    let secret = activate(tpm, challenge, &answering, kind)?;
    let (challenge, host, enrolment) = (challenge.id, answering.host, answering.enrolment);
    Ok(EnrolAnswer { mac: answer_mac(&secret, &challenge, &enrolment, &host)?, challenge, host, enrolment })
}

fn check_for_us(challenge: &Challenge, answering: &Answering) -> Result<EndorsementKind, EnrolError> {
    let Answering { host, enrolment, endorsement_keys, .. } = answering;
    if challenge.host != *host {
        return Err(EnrolError::NotForThisHost(format!("'{}', this host is '{host}'", challenge.host)));
    }
    if challenge.enrolment != *enrolment {
        let what = "another enrolment than the last one of this host";
        return Err(EnrolError::NotForThisHost(what.to_owned()));
    }
    if challenge.expires < now() {
        return Err(EnrolError::Expired { host: host.clone(), ago_seconds: now() - challenge.expires });
    }
    let kind = endorsement_keys.iter().find(|(_, name)| *name == challenge.endorsement_key);
    kind.map(|(kind, _)| *kind).ok_or_else(|| EnrolError::NotForThisHost("the TPM of another host".to_owned()))
}

fn activate(
    tpm: &Tpm,
    challenge: &Challenge,
    answering: &Answering,
    kind: EndorsementKind,
) -> Result<SecretBytes, EnrolError> {
    let root = tpm.storage_root(Some(answering.storage_root))?;
    let signer = tpm.esys().load(root.handle(), &answering.private, &answering.attestation_key)?;
    let endorsement_key = tpm.endorsement_key(kind)?;
    let Challenge { credential, secret, .. } = challenge;
    tpm.activate_credential(&root, &endorsement_key, &signer, credential, secret).map_err(|error| match error {
        TpmError::Refused { command: "ActivateCredential", .. } | TpmError::TooLong => EnrolError::NotForThisTpm(error),
        error => error.into(),
    })
}
