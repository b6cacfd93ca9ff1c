//! Signed statements: a JWS (RFC 7515) in its flattened form, with ES256 (RFC 7518 section 3.4). `jose jws ver` reads it, too.
//!
//! The key is in the protected header, so that the statement can be read alone. Whose key that is, a reader has to know: by its
//! thumbprint (RFC 7638).

use base64ct::{Base64UrlUnpadded, Encoding};
use openssl::{bn::BigNum, ecdsa::EcdsaSig, sha::sha256};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{OwnerKey, SealError, jwk};

const ALG: &str = "ES256";

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Flattened {
    payload: String,
    protected: String,
    signature: String,
}

/// No other member is understood, so none may be there.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Protected {
    alg: String,
    jwk: Map<String, Value>,
}

/// A statement whose signature fits the key that it brings.
#[derive(Debug, PartialEq, Eq)]
pub struct Signed {
    pub payload: Vec<u8>,
    /// The thumbprint of the key.
    pub signer: String,
}

/// Why a statement is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotSigned {
    /// It does not have the form.
    Malformed,
    /// The signature is not that of the key for these words.
    Changed,
}

/// Signs; the key is on P-256.
pub fn sign(payload: &[u8], key: &OwnerKey) -> Result<Vec<u8>, SealError> {
    let Value::Object(jwk) = jwk::of_p256(&*key.p256()?)? else { return Err(SealError::Tampered) };
    let protected = serde_json::to_vec(&Protected { alg: ALG.to_owned(), jwk }).map_err(|_| SealError::Tampered)?;
    let [payload, protected] = [payload, &protected].map(Base64UrlUnpadded::encode_string);
    let signature = EcdsaSig::sign(&digest(&protected, &payload), &*key.p256()?)?;
    let len = i32::try_from(jwk::COORDINATE_BYTES).unwrap_or_default();
    let signature = [signature.r().to_vec_padded(len)?, signature.s().to_vec_padded(len)?].concat();
    let signature = Base64UrlUnpadded::encode_string(&signature);
    serde_json::to_vec(&Flattened { payload, protected, signature }).map_err(|_| SealError::Tampered)
}

/// Reads a statement.
pub fn verify(json: &[u8]) -> Result<Signed, NotSigned> {
    let Flattened { payload, protected, signature } = parsed(json)?;
    let [payload_bytes, header, signature] =
        [&payload, &protected, &signature].map(|text| Base64UrlUnpadded::decode_vec(text).ok());
    let header: Protected = parsed(&header.ok_or(NotSigned::Malformed)?)?;
    let (payload_bytes, signature) = payload_bytes.zip(signature).ok_or(NotSigned::Malformed)?;
    if header.alg != ALG || signature.len() != 2 * jwk::COORDINATE_BYTES {
        return Err(NotSigned::Malformed);
    }
    let key = jwk::p256(&header.jwk).and_then(|key| key.ec_key().map_err(|error| error.to_string()));
    let key = key.map_err(|_| NotSigned::Malformed)?;
    let (r, s) = signature.split_at(jwk::COORDINATE_BYTES);
    let fits = BigNum::from_slice(r)
        .and_then(|r| EcdsaSig::from_private_components(r, BigNum::from_slice(s)?))
        .and_then(|signature| signature.verify(&digest(&protected, &payload), &key));
    // Numbers out of range are an error of libcrypto's, and no signature.
    if !fits.unwrap_or(false) {
        return Err(NotSigned::Changed);
    }
    let signer = jwk::of_p256(&key).map_err(|_| NotSigned::Malformed)?;
    Ok(Signed { payload: payload_bytes, signer: jwk::thumbprint(&signer) })
}

fn parsed<'a, T: Deserialize<'a>>(json: &'a [u8]) -> Result<T, NotSigned> {
    serde_json::from_slice(json).map_err(|_| NotSigned::Malformed)
}

/// The signing input (RFC 7515 section 5.1).
fn digest(protected: &str, payload: &str) -> [u8; 32] {
    sha256(format!("{protected}.{payload}").as_bytes())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parts(signed: &[u8]) -> Value {
        serde_json::from_slice(signed).unwrap()
    }

    #[test]
    fn what_is_signed_is_read_and_its_signer_named() {
        let key = OwnerKey::generate().unwrap();
        let signed = sign(b"it is so", &key).unwrap();
        let read = verify(&signed).unwrap();
        assert_eq!((&read.payload[..], &*read.signer), (&b"it is so"[..], key.recipient().unwrap().kid()));
    }

    #[test]
    fn each_change_is_found() {
        let (key, other) = (OwnerKey::generate().unwrap(), OwnerKey::generate().unwrap());
        let (one, two) = (parts(&sign(b"it is so", &key).unwrap()), parts(&sign(b"it is not", &other).unwrap()));
        for member in ["payload", "protected", "signature"] {
            let mut swapped = one.clone();
            swapped[member] = two[member].clone();
            assert_eq!(verify(swapped.to_string().as_bytes()), Err(NotSigned::Changed), "{member}");
        }
        for at in 0..64 {
            let mut bytes = Base64UrlUnpadded::decode_vec(one["signature"].as_str().unwrap()).unwrap();
            bytes[at] ^= 1;
            let mut changed = one.clone();
            changed["signature"] = Base64UrlUnpadded::encode_string(&bytes).into();
            assert_eq!(verify(changed.to_string().as_bytes()), Err(NotSigned::Changed), "{at}");
        }
    }

    #[test]
    fn what_is_no_statement_is_refused() {
        let one = parts(&sign(b"it is so", &OwnerKey::generate().unwrap()).unwrap());
        let header = |header: Value| Base64UrlUnpadded::encode_string(header.to_string().as_bytes());
        let protected = Base64UrlUnpadded::decode_vec(one["protected"].as_str().unwrap()).unwrap();
        let protected = parts(&protected);
        let mut wrong = vec![Value::Null, json!([]), json!({})];
        for (member, value) in [
            ("alg", json!("none")),
            ("alg", json!("HS256")),
            ("crit", json!(["exp"])),
            ("jwk", json!({})),
            ("jwk", json!({"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"})),
        ] {
            let mut forged = protected.clone();
            forged[member] = value;
            let mut statement = one.clone();
            statement["protected"] = header(forged).into();
            wrong.push(statement);
        }
        for (member, value) in
            [("signature", json!("AA")), ("signature", json!("")), ("header", json!({})), ("payload", json!("%"))]
        {
            let mut statement = one.clone();
            statement[member] = value;
            wrong.push(statement);
        }
        for wrong in wrong {
            assert_eq!(verify(wrong.to_string().as_bytes()), Err(NotSigned::Malformed), "{wrong}");
        }
        let zero = Base64UrlUnpadded::encode_string(&[0; 64]);
        let mut statement = one;
        statement["signature"] = zero.into();
        assert_eq!(verify(statement.to_string().as_bytes()), Err(NotSigned::Changed));
        assert_eq!(verify(&[b'['; 60_000]), Err(NotSigned::Malformed));
    }
}
