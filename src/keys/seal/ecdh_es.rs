//! Key agreement on P-256: `ECDH-ES+A256KW` (RFC 7518 section 4.6).
//!
//! What needs the private key is one thing only, the shared point's x coordinate; a TPM computes it as well.

use base64ct::{Base64UrlUnpadded, Encoding};
use openssl::{
    bn::BigNumContext,
    derive::Deriver,
    ec::{EcGroup, EcKey},
    nid::Nid,
    pkey::{HasPrivate, PKey, PKeyRef, Private, Public},
    sha::Sha256,
};
use serde_json::Value;

use super::{SealError, content, jwk};
use crate::base::key::{JoseHeader, SecretBytes};

/// Value of `alg`.
pub const ALG: &str = "ECDH-ES+A256KW";
/// Value of `alg` where the agreed key encrypts the content itself.
pub const DIRECT: &str = "ECDH-ES";
const KEY_BITS: u32 = 256;

/// A key pair for one sealing.
pub fn ephemeral() -> Result<PKey<Private>, SealError> {
    let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1)?;
    Ok(PKey::from_ec_key(EcKey::generate(&group)?)?)
}

/// The shared point's x coordinate (RFC 7518 appendix C calls it Z).
pub fn shared<T: HasPrivate>(ours: &PKeyRef<T>, theirs: &PKeyRef<Public>) -> Result<SecretBytes, SealError> {
    let mut deriver = Deriver::new(ours)?;
    deriver.set_peer(theirs)?;
    let mut z = SecretBytes::zeroed(deriver.len()?)?;
    let len = deriver.derive(z.expose_mut())?;
    z.truncate(len);
    Ok(z)
}

/// The wrapping key of an entry: the Concat KDF of NIST SP 800-56A as RFC 7518 section 4.6.2 fills it in. One round of
/// SHA-256 gives all 256 bits.
pub fn wrapping_key(z: &SecretBytes, header: &JoseHeader) -> Result<SecretBytes, SealError> {
    concat_kdf(z, ALG, &party(header, "apu")?, &party(header, "apv")?)
}

/// The key that encrypts a content without a key in between: `ECDH-ES` alone, for `A256GCM`.
pub fn content_key(z: &SecretBytes, header: &JoseHeader) -> Result<SecretBytes, SealError> {
    concat_kdf(z, content::ENC, &party(header, "apu")?, &party(header, "apv")?)
}

fn concat_kdf(z: &SecretBytes, algorithm: &str, apu: &[u8], apv: &[u8]) -> Result<SecretBytes, SealError> {
    let mut hash = Sha256::new();
    hash.update(&1_u32.to_be_bytes());
    hash.update(z.expose());
    for field in [algorithm.as_bytes(), apu, apv] {
        hash.update(&u32::try_from(field.len()).unwrap_or(u32::MAX).to_be_bytes());
        hash.update(field);
    }
    hash.update(&KEY_BITS.to_be_bytes());
    let mut digest = hash.finish();
    let key = SecretBytes::copy_of(&digest);
    zeroize::Zeroize::zeroize(&mut digest);
    Ok(key?)
}

fn party(header: &JoseHeader, name: &str) -> Result<Vec<u8>, SealError> {
    match header.get(name) {
        None => Ok(Vec::new()),
        Some(value) => value
            .as_str()
            .and_then(|text| Base64UrlUnpadded::decode_vec(text).ok())
            .ok_or_else(|| SealError::Unsupported(format!("its header's '{name}' is not base64url"))),
    }
}

/// The sender's ephemeral public key in `epk`: a point on P-256 and no other, or an attacker learns bits of our private
/// key (invalid curve attack).
pub fn ephemeral_key(header: &JoseHeader) -> Result<PKey<Public>, SealError> {
    let epk = header.get("epk").and_then(Value::as_object);
    let epk = epk.ok_or_else(|| SealError::Unsupported("its header has no 'epk'".to_owned()))?;
    jwk::p256(epk).map_err(|why| SealError::Unsupported(format!("its header's 'epk' {why}")))
}

/// The group of P-256, checked to be that of `key`.
pub fn is_p256<T: openssl::pkey::HasPublic>(key: &EcKey<T>) -> Result<bool, SealError> {
    let mut context = BigNumContext::new()?;
    let on_curve = key.public_key().is_on_curve(key.group(), &mut context)?;
    Ok(on_curve && key.group().curve_name() == Some(Nid::X9_62_PRIME256V1))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 7518 appendix C derives 128 bits for the direct use of A128GCM; the KDF is the same but for those two.
    #[test]
    fn concat_kdf_as_in_rfc_7518_appendix_c() {
        let alice = jwk::tests::private(
            "gI0GAILBdu7T53akrFmMyGcsF3n5dO7MmwNBHKW5SV0",
            "SLW_xSffzlPWrHEVI30DHM_4egVwt3NQqeUD7nMFpps",
            "0_NxaRPUMQoAJt50Gz8YiTr8gRTwyEaCumd-MToTmIo",
        );
        let bob = jwk::tests::public(
            "weNJy2HscCSM6AEDTDg04biOvhFhyyWvOHQfeF_PxMQ",
            "e8lnCO-AlStT-NJVX-crhB7QRYhiix03illJOVAOyck",
        );
        let z = shared(&alice, &bob).unwrap();
        let expected = [
            158, 86, 217, 29, 129, 113, 53, 211, 114, 131, 66, 131, 191, 132, 38, 156, 251, 49, 110, 163, 218, 128,
            106, 72, 246, 218, 167, 121, 140, 254, 144, 196,
        ];
        assert_eq!(z.expose(), expected);
        let mut hash = Sha256::new();
        let fields: [&[u8]; 9] = [
            &1_u32.to_be_bytes(),
            z.expose(),
            &7_u32.to_be_bytes(),
            b"A128GCM",
            &5_u32.to_be_bytes(),
            b"Alice",
            &3_u32.to_be_bytes(),
            b"Bob",
            &128_u32.to_be_bytes(),
        ];
        fields.iter().for_each(|field| hash.update(field));
        let derived = Base64UrlUnpadded::encode_string(&hash.finish()[..16]);
        assert_eq!(derived, "VqqN6vgjbSBcIijNcacQGg", "the fields' order and widths are the RFC's");
    }
}
