//! Whether a request proves what it says. All of it in software, from the request's bytes and the site's own word.

use openssl::{bn::BigNum, ecdsa::EcdsaSig, hash::MessageDigest, sign::Verifier};
use tss_esapi::{
    attributes::ObjectAttributes,
    interface_types::algorithm::HashingAlgorithm,
    structures::{Attest, AttestInfo, NvCertifyInfo, Public, Signature},
    traits::{Marshall, UnMarshall},
};

use super::{EnrolError, Part, Request, Site, Statement, document::Attestation};
use crate::{
    base::{chain::chain, hex},
    keys::tpm::{
        Digest, Policy, attestation_attributes, attestation_templates,
        public::{identity_attributes, identity_p256, identity_rsa, name_of, to_pkey},
        with_unique_of,
    },
};

/// A refusal of a part of this host's request.
pub(super) fn refused(statement: &Statement, part: Part, why: impl Into<String>) -> EnrolError {
    EnrolError::Refused { host: statement.host.clone(), part, why: why.into() }
}

/// Checks everything but the endorsement key and its connection with the attestation key: that is what the answer is for.
pub fn check(request: &Request, statement: &Statement, site: &Site) -> Result<(), EnrolError> {
    check_attestation_key(statement)?;
    let policy = check_policy(request, statement, site)?;
    check_identity(statement, &policy)?;
    check_creation(request, statement)
}

fn check_attestation_key(statement: &Statement) -> Result<(), EnrolError> {
    let key = &statement.attestation_key;
    let no = |why: String| Err(refused(statement, Part::AttestationKey, why));
    if let Some(why) = differing(attributes(key), attestation_attributes()?) {
        return no(why);
    }
    match attestation_templates()?.into_iter().any(|template| with_unique_of(template, key).as_ref() == Some(key)) {
        true => Ok(()),
        false => no("it signs neither with ECDSA on P-256 nor with RSASSA and 2048 bits, under SHA-256".to_owned()),
    }
}

/// The identity key's public area must be, bit by bit, the one that a host of this site makes for this policy.
fn check_identity(statement: &Statement, policy: &Policy) -> Result<(), EnrolError> {
    let key = &statement.identity;
    let no = |why: String| Err(refused(statement, Part::IdentityKey, why));
    if let Some(why) = differing(attributes(key), identity_attributes(policy.pin)?) {
        return no(why);
    }
    let digest = policy.digest()?;
    if auth_policy(key) != digest {
        return no(format!(
            "its policy differs from the one in the request: {}; expected {}",
            hex::encode(auth_policy(key)),
            hex::encode(&digest)
        ));
    }
    let templates = [identity_p256(&digest, policy.pin)?, identity_rsa(&digest, policy.pin)?];
    if !templates.into_iter().any(|template| with_unique_of(template, key).as_ref() == Some(key)) {
        return no("it is neither a decryption key on P-256 nor one for RSA with 2048 bits".to_owned());
    }
    to_pkey(key).map(drop).or_else(|error| no(format!("it is not a key ({})", chain(&error))))
}

fn check_policy(request: &Request, statement: &Statement, site: &Site) -> Result<Policy, EnrolError> {
    let no = |why: String| refused(statement, Part::Policy, why);
    let expected = site.policy_for(&statement.policy).map_err(no)?;
    expected.check().map_err(|error| no(chain(&error)))?;
    if let Some(revocation) = expected.signed.as_ref().and_then(|signed| signed.revocation) {
        check_counter(request, statement, revocation.counter.name().as_bytes(), revocation.base)?;
    }
    Ok(expected)
}

/// What epochs are counted from is not the host's to choose: too high a value would keep old signatures alive. A lower one than
/// the counter has, of the key that the host had before, lets fewer of them count.
fn check_counter(request: &Request, statement: &Statement, name: &[u8], base: u64) -> Result<(), EnrolError> {
    let no = |why: &str| Err(refused(statement, Part::Counter, why));
    let Some(attestation) = &request.counter else { return no("there is none") };
    match verified(statement, Part::Counter, attestation, &request.digest())? {
        AttestInfo::Nv { info } if info.index_name().value() != name => no("it is for another NV index"),
        AttestInfo::Nv { info } if info.offset() != 0 || value(&info).is_none_or(|value| value < base) => {
            no("the counter has another value than the policy says")
        }
        AttestInfo::Nv { .. } => Ok(()),
        _ => no("it certifies something else"),
    }
}

fn value(counter: &NvCertifyInfo) -> Option<u64> {
    counter.nv_contents().value().try_into().ok().map(u64::from_be_bytes)
}

fn check_creation(request: &Request, statement: &Statement) -> Result<(), EnrolError> {
    let no = |why: &str| Err(refused(statement, Part::Creation, why));
    match verified(statement, Part::Creation, &request.creation, &request.digest())? {
        AttestInfo::Creation { info } if info.object_name().value() == name_of(&statement.identity)?.as_bytes() => {
            Ok(())
        }
        AttestInfo::Creation { .. } => no("it is for another key"),
        _ => no("it certifies something else"),
    }
}

/// What the attestation key has signed, if it has, over this enrolment and no other.
fn verified(
    statement: &Statement,
    part: Part,
    attestation: &Attestation,
    enrolment: &Digest,
) -> Result<AttestInfo, EnrolError> {
    let no = |why: &str| refused(statement, part, why);
    let signature = attestation.signature().map_err(|_| no("its signature is damaged"))?;
    if !is_signed(&statement.attestation_key, &attestation.attest, &signature)? {
        return Err(no("the signature is not the attestation key's"));
    }
    // Wrong magic numbers, which a TPM gives to nothing from outside, are refused here, too.
    let attest = Attest::unmarshall(&attestation.attest).map_err(|_| no("a TPM did not make the signed data"))?;
    if attest.marshall().ok().as_deref() != Some(&attestation.attest) {
        return Err(no("the signed data has more in it than a TPM signs"));
    }
    if attest.extra_data().value() != enrolment {
        return Err(no("it is for another enrolment, or the request was changed"));
    }
    Ok(attest.attested().clone())
}

fn is_signed(key: &Public, message: &[u8], signature: &Signature) -> Result<bool, EnrolError> {
    let (hash, bytes) = match (key, signature) {
        (Public::Ecc { .. }, Signature::EcDsa(signature)) => {
            let r = BigNum::from_slice(signature.signature_r().value())?;
            let s = BigNum::from_slice(signature.signature_s().value())?;
            (signature.hashing_algorithm(), EcdsaSig::from_private_components(r, s)?.to_der()?)
        }
        (Public::Rsa { .. }, Signature::RsaSsa(signature)) => {
            (signature.hashing_algorithm(), signature.signature().value().to_vec())
        }
        _ => return Ok(false),
    };
    if hash != HashingAlgorithm::Sha256 {
        return Ok(false);
    }
    let Ok(key) = to_pkey(key) else { return Ok(false) };
    Ok(Verifier::new(MessageDigest::sha256(), &key)?.verify_oneshot(&bytes, message).unwrap_or(false))
}

fn attributes(key: &Public) -> ObjectAttributes {
    key.object_attributes()
}

fn auth_policy(key: &Public) -> &[u8] {
    match key {
        Public::Ecc { auth_policy, .. }
        | Public::Rsa { auth_policy, .. }
        | Public::KeyedHash { auth_policy, .. }
        | Public::SymCipher { auth_policy, .. } => auth_policy.value(),
    }
}

/// What is wrong with a key's attributes, in the words of TPM 2.0 Part 2, section 8.3.
fn differing(is: ObjectAttributes, expected: ObjectAttributes) -> Option<String> {
    type Has = fn(&ObjectAttributes) -> bool;
    const NAMES: [(&str, Has); 11] = [
        ("fixedTPM", ObjectAttributes::fixed_tpm),
        ("stClear", ObjectAttributes::st_clear),
        ("fixedParent", ObjectAttributes::fixed_parent),
        ("sensitiveDataOrigin", ObjectAttributes::sensitive_data_origin),
        ("userWithAuth", ObjectAttributes::user_with_auth),
        ("adminWithPolicy", ObjectAttributes::admin_with_policy),
        ("noDA", ObjectAttributes::no_da),
        ("encryptedDuplication", ObjectAttributes::encrypted_duplication),
        ("restricted", ObjectAttributes::restricted),
        ("decrypt", ObjectAttributes::decrypt),
        ("sign", ObjectAttributes::sign_encrypt),
    ];
    let wrong = NAMES.iter().filter(|(_, has)| has(&is) != has(&expected));
    let words =
        wrong.map(|(name, has)| if has(&is) { format!("must not be {name}") } else { format!("must be {name}") });
    match words.collect::<Vec<_>>() {
        words if !words.is_empty() => Some(format!("it {}", words.join(", "))),
        _ if is != expected => Some("it has attributes that are not known".to_owned()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What TPM2_CertifyCreation makes up over 32 zero bytes (TPM 2.0 Part 2, section 10.12).
    fn attest() -> Vec<u8> {
        let mut attest = vec![0xFF, b'T', b'C', b'G', 0x80, 0x1A];
        attest.extend([&[0, 34, 0, 0x0B][..], &[1; 32], &[0, 32], &[0; 32]].concat()); // signer, extraData
        attest.extend([&[0; 8][..], &[0, 0, 0, 1, 0, 0, 0, 2, 1], &[3; 8]].concat()); // clock, firmware
        attest.extend([&[0, 34, 0, 0x0B][..], &[4; 32], &[0, 32], &[5; 32]].concat()); // name, creationHash
        attest
    }

    #[test]
    fn no_byte_that_a_request_may_have_makes_the_parsers_panic() {
        let key = crate::keys::tpm::public::to_sized(&attestation_templates().unwrap()[0]).unwrap();
        assert!(Attest::unmarshall(&attest()).is_ok());
        for whole in [attest(), key] {
            for at in 0..whole.len() {
                for byte in [0, 1, 0x7F, 0x80, 0xFF] {
                    let mut changed = whole.clone();
                    changed[at] = byte;
                    let _ = Attest::unmarshall(&changed).map(|attest| attest.marshall());
                    let _ = Signature::unmarshall(&changed);
                    let _ = crate::keys::tpm::public::from_sized(&changed).map(|key| to_pkey(&key));
                    let _ = Attest::unmarshall(&changed[..at]);
                    let _ = crate::keys::tpm::public::from_sized(&changed[..at]);
                }
            }
        }
    }

    #[test]
    fn attributes_are_named_that_are_wrong() {
        let right = attestation_attributes().unwrap();
        assert_eq!(differing(right, right), None);
        let why = differing(identity_attributes(false).unwrap(), right).unwrap();
        for part in ["must be userWithAuth", "must not be adminWithPolicy", "must be restricted", "must be sign"] {
            assert!(why.contains(part), "{why}");
        }
    }
}
