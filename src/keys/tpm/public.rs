//! Public areas: the templates of our keys, and keys as libcrypto knows them.

use openssl::{
    bn::{BigNum, BigNumContext},
    ec::{EcGroup, EcKey},
    nid::Nid,
    pkey::{HasPublic, Id, PKey, PKeyRef, Public as PublicPart},
    rsa::Rsa,
};
use tss_esapi::{
    attributes::{ObjectAttributes, ObjectAttributesBuilder},
    interface_types::{algorithm::HashingAlgorithm, ecc::EccCurve, key_bits::RsaKeyBits},
    structures::{
        Digest as SizedDigest, EccParameter, EccPoint, EccScheme, KeyDerivationFunctionScheme, Public,
        PublicEccParameters, PublicKeyRsa, PublicRsaParameters, RsaExponent, RsaScheme, SymmetricDefinitionObject,
    },
    traits::{Marshall, UnMarshall},
};

use super::{Digest, Name, TpmError};

const COORDINATE_BYTES: i32 = 32;

/// The name of what has this public area.
pub fn name_of(public: &Public) -> Result<Name, TpmError> {
    Ok(Name::of(&public.marshall()?))
}

/// As TPM2B_PUBLIC: its length, and the marshalled public area.
pub fn to_sized(public: &Public) -> Result<Vec<u8>, TpmError> {
    let area = public.marshall()?;
    Ok([&(area.len() as u16).to_be_bytes()[..], &area].concat())
}

/// Reads a TPM2B_PUBLIC and nothing behind it.
pub fn from_sized(bytes: &[u8]) -> Result<Public, TpmError> {
    let wrong = || TpmError::Structure("no public area".to_owned());
    let (size, area) = bytes.split_first_chunk().ok_or_else(wrong)?;
    if usize::from(u16::from_be_bytes(*size)) != area.len() {
        return Err(wrong());
    }
    let public = Public::unmarshall(area)?;
    // What libtss2 has understood must be all that there is, or name and meaning would part.
    if public.marshall()? != area { Err(wrong()) } else { Ok(public) }
}

/// The public area in libtss2's serialized record of a key: its handle, its name, the kind of record, TPM2B_PUBLIC.
pub(super) fn of_record(record: &[u8]) -> Result<Public, TpmError> {
    let public = || {
        let (_handle, rest) = record.split_first_chunk::<4>()?;
        let (name_size, rest) = rest.split_first_chunk::<2>()?;
        let (_name, rest) = rest.split_at_checked(u16::from_be_bytes(*name_size).into())?;
        let (_kind, public) = rest.split_first_chunk::<4>()?;
        Some(public)
    };
    from_sized(public().ok_or(TpmError::Answer { command: "TR_Serialize" })?)
}

/// The storage root key by the TCG's template for P-256 (TCG EK Credential Profile, H-2, as the TCG TPM v2.0 Provisioning
/// Guidance section 7.5.1 changes it).
pub(super) fn storage_root() -> Result<Public, TpmError> {
    let attributes = ObjectAttributesBuilder::new()
        .with_fixed_tpm(true)
        .with_fixed_parent(true)
        .with_sensitive_data_origin(true)
        .with_user_with_auth(true)
        .with_no_da(true)
        .with_restricted(true)
        .with_decrypt(true)
        .build()?;
    Ok(ecc(attributes, SizedDigest::default(), SymmetricDefinitionObject::AES_128_CFB, EccPoint::default()))
}

/// The attributes of an identity key: it never leaves its TPM and its parent, nobody has ever known it, and it is used by
/// its policy only.
///
/// With a PIN the TPM counts wrong ones (dictionary attack protection); without one there is nothing to guess, and a
/// lock-out must not keep a host from booting.
pub fn identity_attributes(pin: bool) -> Result<ObjectAttributes, TpmError> {
    Ok(ObjectAttributesBuilder::new()
        .with_fixed_tpm(true)
        .with_fixed_parent(true)
        .with_sensitive_data_origin(true)
        .with_admin_with_policy(true)
        .with_no_da(!pin)
        .with_decrypt(true)
        .build()?)
}

/// An identity key on P-256.
pub fn identity_p256(policy: &Digest, pin: bool) -> Result<Public, TpmError> {
    let policy = SizedDigest::try_from(policy.to_vec())?;
    Ok(ecc(identity_attributes(pin)?, policy, SymmetricDefinitionObject::Null, EccPoint::default()))
}

/// An identity key for RSA, for TPMs that have no P-256.
pub fn identity_rsa(policy: &Digest, pin: bool) -> Result<Public, TpmError> {
    Ok(Public::Rsa {
        object_attributes: identity_attributes(pin)?,
        name_hashing_algorithm: HashingAlgorithm::Sha256,
        auth_policy: SizedDigest::try_from(policy.to_vec())?,
        parameters: PublicRsaParameters::new(
            SymmetricDefinitionObject::Null,
            RsaScheme::Null,
            RsaKeyBits::Rsa2048,
            RsaExponent::default(),
        ),
        unique: PublicKeyRsa::default(),
    })
}

/// The public area of a site's signing key, as it is loaded to verify. The key's name is part of policies: no bit of this
/// may change.
pub fn signing_key<T: HasPublic>(key: &PKeyRef<T>) -> Result<Public, TpmError> {
    let attributes = ObjectAttributesBuilder::new().with_user_with_auth(true).with_sign_encrypt(true).build()?;
    match key.id() {
        Id::EC => {
            let key = key.ec_key()?;
            if key.group().curve_name() != Some(Nid::X9_62_PRIME256V1) {
                return Err(TpmError::Policy("the site's key is on another curve than P-256".to_owned()));
            }
            let (mut x, mut y, mut context) = (BigNum::new()?, BigNum::new()?, BigNumContext::new()?);
            key.public_key().affine_coordinates(key.group(), &mut x, &mut y, &mut context)?;
            let point = EccPoint::new(
                EccParameter::try_from(x.to_vec_padded(COORDINATE_BYTES)?)?,
                EccParameter::try_from(y.to_vec_padded(COORDINATE_BYTES)?)?,
            );
            Ok(ecc(attributes, SizedDigest::default(), SymmetricDefinitionObject::Null, point))
        }
        Id::RSA => {
            let key = key.rsa()?;
            let wrong = |what: &str| TpmError::Policy(format!("the site's RSA key has {what}"));
            let bits = match key.size() * 8 {
                2048 => RsaKeyBits::Rsa2048,
                3072 => RsaKeyBits::Rsa3072,
                4096 => RsaKeyBits::Rsa4096,
                bits => return Err(wrong(&format!("{bits} bits"))),
            };
            // 65537 is what every TPM takes; its structure says zero for it.
            if key.e().to_vec() != [1, 0, 1] {
                return Err(wrong("another exponent than 65537"));
            }
            Ok(Public::Rsa {
                object_attributes: attributes,
                name_hashing_algorithm: HashingAlgorithm::Sha256,
                auth_policy: SizedDigest::default(),
                parameters: PublicRsaParameters::new(
                    SymmetricDefinitionObject::Null,
                    RsaScheme::Null,
                    bits,
                    RsaExponent::default(),
                ),
                unique: PublicKeyRsa::try_from(key.n().to_vec())?,
            })
        }
        _ => Err(TpmError::Policy("the site's key is neither P-256 nor RSA".to_owned())),
    }
}

fn ecc(
    attributes: ObjectAttributes,
    policy: SizedDigest,
    symmetric: SymmetricDefinitionObject,
    unique: EccPoint,
) -> Public {
    Public::Ecc {
        object_attributes: attributes,
        name_hashing_algorithm: HashingAlgorithm::Sha256,
        auth_policy: policy,
        parameters: PublicEccParameters::new(
            symmetric,
            EccScheme::Null,
            EccCurve::NistP256,
            KeyDerivationFunctionScheme::Null,
        ),
        unique,
    }
}

/// The key as libcrypto knows it; a point is checked to be on P-256.
pub fn to_pkey(public: &Public) -> Result<PKey<PublicPart>, TpmError> {
    match public {
        Public::Ecc { parameters, unique, .. } if parameters.ecc_curve() == EccCurve::NistP256 => {
            let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1)?;
            let (x, y) = (BigNum::from_slice(unique.x().value())?, BigNum::from_slice(unique.y().value())?);
            let key = EcKey::from_public_key_affine_coordinates(&group, &x, &y)?;
            key.check_key()?;
            Ok(PKey::from_ec_key(key)?)
        }
        Public::Rsa { parameters, unique, .. } => {
            let exponent = match parameters.exponent().value() {
                0 => 65537,
                exponent => exponent,
            };
            let (n, e) = (BigNum::from_slice(unique.value())?, BigNum::from_u32(exponent)?);
            Ok(PKey::from_rsa(Rsa::from_public_components(n, e)?)?)
        }
        _ => Err(TpmError::Structure("a key that is neither P-256 nor RSA".to_owned())),
    }
}
