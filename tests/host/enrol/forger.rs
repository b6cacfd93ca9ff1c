//! What a malicious host can do: everything, with a real TPM and the right attestation key. It makes requests that lie in one
//! point, and has its TPM sign them.

use std::fs;

use cryptattach::{
    base::key::HostName,
    keys::tpm::{
        Certified, Counter, EndorsementKind, Policy, SessionKind, Tpm, attestation_templates, public::identity_p256,
    },
    unlock::enrol::{Attestation, Document, EndorsementKey, Request, Statement},
};
use openssl::{
    bn::{BigNum, BigNumContext},
    ec::{EcGroup, EcKey},
    ecdsa::EcdsaSig,
    nid::Nid,
    sha::sha256,
};
use tss_esapi::{
    attributes::{ObjectAttributes, ObjectAttributesBuilder},
    interface_types::algorithm::HashingAlgorithm,
    structures::{EccParameter, EccPoint, EccSignature, Public, Signature},
};

use super::stage::Host;

/// What goes into a request; as it should be, until a test changes it.
pub struct Plan {
    pub host: HostName,
    pub created: u64,
    pub endorsement_keys: Vec<EndorsementKey>,
    pub attestation_key: Public,
    pub identity: Public,
    /// What the request says.
    pub policy: Policy,
    /// Swaps what the TPM has signed.
    pub certify: Certify,
}

/// What the attestation key says instead of how the identity key was made.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Certify {
    TheIdentity,
    /// How another key of this TPM was made.
    AnotherKey,
    /// What is in the counter.
    TheCounter,
    /// The truth, but for another enrolment.
    AnotherEnrolment,
    /// Nothing of the counter.
    NotTheCounter,
    /// The right things, said by software that has the attestation key of nobody's TPM.
    InSoftware {
        magic: u32,
    },
}

/// Makes a request that lies, in place of the host's own.
pub fn forge(host: &Host<'_>, change: impl FnOnce(&mut Plan)) {
    let tpm = Tpm::open(&host.tpm_config()).unwrap();
    let policy = tpm.policy_here(&host.tpm_config(), false).unwrap();
    let mut plan = Plan {
        host: host.name().parse().unwrap(),
        created: cryptattach::base::clock::now(),
        endorsement_keys: endorsement_keys(&tpm),
        attestation_key: attestation_templates().unwrap()[0].clone(),
        identity: identity_p256(&policy.digest().unwrap(), false).unwrap(),
        policy,
        certify: Certify::TheIdentity,
    };
    change(&mut plan);
    let _ = fs::remove_file(host.file("request"));
    make(&tpm, plan).write(host.file("request").as_ref()).unwrap();
}

pub fn endorsement_keys(tpm: &Tpm) -> Vec<EndorsementKey> {
    let key = |kind: EndorsementKind| {
        let public = tpm.esys().public_of(&tpm.endorsement_key(kind).unwrap()).unwrap();
        EndorsementKey { public, certificate: tpm.endorsement_certificate(kind).unwrap() }
    };
    tpm.endorsement_kinds().unwrap().into_iter().map(key).collect()
}

fn make(tpm: &Tpm, plan: Plan) -> Request {
    let (esys, root) = (tpm.esys(), tpm.storage_root(None).unwrap());
    let create = |template: &Public| {
        let session = esys.start_session(SessionKind::Hmac, Some(root.handle())).unwrap();
        esys.create(root.handle(), &session, template, None).unwrap()
    };
    let mut signer = create(&plan.attestation_key);
    let software = EcKey::generate(&EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap()).unwrap();
    let in_software = matches!(plan.certify, Certify::InSoftware { .. });
    let said = if in_software { with_point(&signer.public, &software) } else { signer.public.clone() };
    let created = create(&plan.identity);
    let statement = Statement {
        host: plan.host,
        created: plan.created,
        nonce: sha256(&signer.private),
        endorsement_keys: plan.endorsement_keys,
        attestation_key: said,
        identity: created.public.clone(),
        storage_root: root.name(),
        policy: plan.policy.clone(),
    };
    let statement = statement.to_json().unwrap();
    let digest = if plan.certify == Certify::AnotherEnrolment { [7; 32] } else { sha256(&statement) };
    let counter = plan.policy.signed.as_ref().and_then(|signed| signed.revocation).map(|revocation| revocation.counter);
    let loaded = esys.load(root.handle(), &std::mem::take(&mut signer.private), &signer.public).unwrap();
    let certify_counter = |counter: Counter| {
        let index = esys.resident_at(counter.index()).unwrap();
        esys.certify_nv(&loaded, &index, 8, &digest).unwrap()
    };
    let made = if plan.certify == Certify::AnotherKey { create(&plan.identity) } else { created };
    let creation = match plan.certify {
        Certify::TheCounter => certify_counter(counter.unwrap()),
        _ => {
            let key = esys.load(root.handle(), &made.private, &made.public).unwrap();
            esys.certify_creation(&loaded, &key, &made, &digest).unwrap()
        }
    };
    let resign = |certified: Certified| match plan.certify {
        Certify::InSoftware { magic } => sign_in_software(certified, &software, magic),
        _ => certified,
    };
    let counter = counter.filter(|_| plan.certify != Certify::NotTheCounter).map(certify_counter);
    let attestation = |certified| Attestation::of(resign(certified)).unwrap();
    Request::of(statement, attestation(creation), counter.map(attestation))
}

fn coordinates(key: &EcKey<openssl::pkey::Private>) -> (EccParameter, EccParameter) {
    let (mut x, mut y, mut context) = (BigNum::new().unwrap(), BigNum::new().unwrap(), BigNumContext::new().unwrap());
    key.public_key().affine_coordinates(key.group(), &mut x, &mut y, &mut context).unwrap();
    let parameter = |number: &BigNum| EccParameter::try_from(number.to_vec_padded(32).unwrap()).unwrap();
    (parameter(&x), parameter(&y))
}

/// The same public area with a key that is not in any TPM.
pub fn with_point(public: &Public, key: &EcKey<openssl::pkey::Private>) -> Public {
    let (x, y) = coordinates(key);
    let mut public = public.clone();
    let Public::Ecc { unique, .. } = &mut public else { panic!("no P-256") };
    *unique = EccPoint::new(x, y);
    public
}

fn sign_in_software(certified: Certified, key: &EcKey<openssl::pkey::Private>, magic: u32) -> Certified {
    let mut attest = certified.attest;
    attest[..4].copy_from_slice(&magic.to_be_bytes());
    let signature = EcdsaSig::sign(&sha256(&attest), key).unwrap();
    let parameter =
        |number: &openssl::bn::BigNumRef| EccParameter::try_from(number.to_vec_padded(32).unwrap()).unwrap();
    let (r, s) = (parameter(signature.r()), parameter(signature.s()));
    Certified { attest, signature: Signature::EcDsa(EccSignature::create(HashingAlgorithm::Sha256, r, s).unwrap()) }
}

/// Changes a key's attributes.
pub fn attributes(key: &mut Public, change: impl FnOnce(ObjectAttributesBuilder) -> ObjectAttributesBuilder) {
    let (Public::Ecc { object_attributes, .. } | Public::Rsa { object_attributes, .. }) = key else { panic!() };
    let is: ObjectAttributes = *object_attributes;
    let builder = ObjectAttributesBuilder::new()
        .with_fixed_tpm(is.fixed_tpm())
        .with_fixed_parent(is.fixed_parent())
        .with_sensitive_data_origin(is.sensitive_data_origin())
        .with_user_with_auth(is.user_with_auth())
        .with_admin_with_policy(is.admin_with_policy())
        .with_no_da(is.no_da())
        .with_restricted(is.restricted())
        .with_decrypt(is.decrypt())
        .with_sign_encrypt(is.sign_encrypt());
    *object_attributes = change(builder).build().unwrap();
}
