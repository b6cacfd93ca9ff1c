//! What a Tang server advertises: a JWK set, signed by each of its signing keys (JWS, RFC 7515).

use base64ct::{Base64UrlUnpadded, Encoding};
use openssl::{
    bn::BigNum,
    ecdsa::EcdsaSig,
    hash::{MessageDigest, hash},
};
use serde_json::{Map, Value};

use super::curve::Point;
use crate::keys::seal::jwk;

/// The most keys that are looked at: a server has two, and two more for each rotation.
const MOST_KEYS: usize = 64;

/// An advertisement that each signing key in it has signed.
#[derive(Debug)]
pub struct Advertisement {
    /// The thumbprints of its signing keys, SHA-256.
    pub signers: Vec<String>,
    /// The same by SHA-1, as older servers print it.
    older: Vec<String>,
    /// The key to seal to.
    exchange: Value,
}

impl Advertisement {
    /// Checks the signatures. The error says what is wrong, after "the advertisement".
    pub fn of(jws: &Value) -> Result<Self, String> {
        let payload = jws.get("payload").and_then(Value::as_str).ok_or("has no payload")?;
        let keys: Value = decode(payload).and_then(|json| serde_json::from_slice(&json).ok()).ok_or("is not JSON")?;
        let keys = keys.get("keys").and_then(Value::as_array).ok_or("has no keys")?;
        if keys.len() > MOST_KEYS {
            return Err(format!("has more than {MOST_KEYS} keys"));
        }
        let keys: Vec<_> = keys.iter().filter_map(Value::as_object).collect();
        let alone = [jws.clone()];
        let signatures = jws.get("signatures").and_then(Value::as_array).map_or(&alone[..], Vec::as_slice);
        let (mut signers, mut older) = (Vec::new(), Vec::new());
        for key in keys.iter().filter(|key| is_for(key, "verify")) {
            let point = Point::of_jwk(key).map_err(|why| format!("has a signing key that {why}"))?;
            let jwk = point.jwk().map_err(|error| error.to_string())?;
            let thumbprint = jwk::thumbprint(&jwk);
            if !signatures.iter().take(MOST_KEYS).any(|signature| has_signed(&point, signature, payload)) {
                return Err(format!("is not signed by its key {thumbprint}"));
            }
            signers.push(thumbprint);
            let sha1 = hash(MessageDigest::sha1(), jwk.to_string().as_bytes()).map_err(|error| error.to_string())?;
            older.push(Base64UrlUnpadded::encode_string(&sha1));
        }
        if signers.is_empty() {
            return Err("has no signing key".to_owned());
        }
        let exchange = keys.iter().find(|key| is_for(key, "deriveKey")).ok_or("has no exchange key")?;
        let exchange = Point::of_jwk(exchange).map_err(|why| format!("has an exchange key that {why}"))?;
        Ok(Self { signers, older, exchange: exchange.jwk().map_err(|error| error.to_string())? })
    }

    /// Whether a signing key of this thumbprint, SHA-256 or SHA-1, has signed it.
    pub fn is_signed_by(&self, thumbprint: &str) -> bool {
        self.signers.iter().chain(&self.older).any(|signer| signer == thumbprint)
    }

    /// The key to seal to, its required members.
    pub fn exchange(&self) -> &Value {
        &self.exchange
    }
}

fn decode(text: &str) -> Option<Vec<u8>> {
    Base64UrlUnpadded::decode_vec(text).ok()
}

fn is_for(key: &Map<String, Value>, use_: &str) -> bool {
    let uses = key.get("key_ops").and_then(Value::as_array);
    uses.is_some_and(|uses| uses.iter().any(|named| named == use_))
}

fn has_signed(key: &Point, signature: &Value, payload: &str) -> bool {
    let check = || {
        let protected = signature.get("protected")?.as_str()?;
        let header: Value = serde_json::from_slice(&decode(protected)?).ok()?;
        let (alg, digest) = key.curve.signature();
        if header.get("alg")? != alg || header.get("cty")? != "jwk-set+json" || header.get("crit").is_some() {
            return None;
        }
        let raw = decode(signature.get("signature")?.as_str()?)?;
        let (r, s) = raw.split_at_checked(key.curve.bytes()).filter(|(r, s)| r.len() == s.len())?;
        let (r, s) = (BigNum::from_slice(r).ok()?, BigNum::from_slice(s).ok()?);
        let signed = hash(digest, format!("{protected}.{payload}").as_bytes()).ok()?;
        EcdsaSig::from_private_components(r, s).ok()?.verify(&signed, &key.key).ok()
    };
    check() == Some(true)
}
