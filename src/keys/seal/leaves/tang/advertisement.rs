//! What a Tang server advertises: a JWK set, signed by each of its signing keys (JWS, RFC 7515).

use base64ct::{Base64UrlUnpadded, Encoding};
use openssl::{
    bn::BigNum,
    ecdsa::EcdsaSig,
    hash::{MessageDigest, hash},
};
use serde_json::{Value, json};

use super::curve::Point;
use crate::keys::seal::jwk;

/// The most keys that are looked at: a server has two, and two more for each rotation.
pub const MOST_KEYS: usize = 64;

/// An advertisement that each signing key in it has signed.
#[derive(Debug)]
pub struct Advertisement {
    /// The thumbprints of its signing keys, SHA-256.
    pub signers: Vec<String>,
    /// Its signing keys, their required members.
    keys: Vec<Value>,
    /// The key to seal to.
    exchange: Value,
    /// All of its keys.
    set: Value,
    jws: Value,
}

impl Advertisement {
    /// Checks the signatures. The error says what is wrong, after "the advertisement".
    pub fn of(jws: Value) -> Result<Self, String> {
        let (payload, signatures) = parts(&jws).ok_or("has no payload")?;
        let set: Value = decode(payload).and_then(|json| serde_json::from_slice(&json).ok()).ok_or("is not JSON")?;
        let set = set.get("keys").and_then(Value::as_array).ok_or("has no keys")?;
        if set.len() > MOST_KEYS || signatures.len() > MOST_KEYS {
            return Err(format!("has more than {MOST_KEYS} keys"));
        }
        let (mut signers, mut keys) = (Vec::new(), Vec::new());
        for key in set.iter().filter(|key| is_for(key, "verify")) {
            let point = point_of(key).map_err(|why| format!("has a signing key that {why}"))?;
            let jwk = point.jwk().map_err(|error| error.to_string())?;
            let thumbprint = jwk::thumbprint(&jwk);
            if !signatures.iter().any(|signature| has_signed(&point, signature, payload)) {
                return Err(format!("is not signed by its key {thumbprint}"));
            }
            signers.push(thumbprint);
            keys.push(jwk);
        }
        if signers.is_empty() {
            return Err("has no signing key".to_owned());
        }
        let exchange = set.iter().find(|key| is_for(key, "deriveKey")).ok_or("has no exchange key")?;
        let exchange = point_of(exchange).map_err(|why| format!("has an exchange key that {why}"))?;
        let exchange = exchange.jwk().map_err(|error| error.to_string())?;
        Ok(Self { signers, keys, exchange, set: set.clone().into(), jws })
    }

    /// The signing key of this thumbprint, SHA-256 or SHA-1.
    pub fn signer(&self, thumbprint: &str) -> Option<&Value> {
        self.keys.iter().find(|key| is_called(key, thumbprint))
    }

    /// Whether this key has signed it: a server signs with a key that was rotated away, too, if it is asked for that.
    pub fn is_signed_with(&self, key: &Value) -> bool {
        point_of(key).ok().zip(parts(&self.jws)).is_some_and(|(point, (payload, signatures))| {
            signatures.iter().any(|signature| has_signed(&point, signature, payload))
        })
    }

    /// The key to seal to, its required members.
    pub fn exchange(&self) -> &Value {
        &self.exchange
    }

    /// Whether it has a key to seal to of this thumbprint.
    pub fn has(&self, kid: &str) -> bool {
        let exchange = self.set.as_array().into_iter().flatten().filter(|key| is_for(key, "deriveKey"));
        exchange.filter_map(|key| point_of(key).ok()?.jwk().ok()).any(|key| is_called(&key, kid))
    }

    /// All that it advertises, as a JWK set.
    pub fn set(&self) -> Value {
        json!({"keys": self.set})
    }

    /// As the server gave it.
    pub fn jws(&self) -> &Value {
        &self.jws
    }
}

/// Whether a key has this thumbprint, SHA-256 or SHA-1, as older servers print it.
pub fn is_called(key: &Value, thumbprint: &str) -> bool {
    let sha1 = || hash(MessageDigest::sha1(), key.to_string().as_bytes()).ok();
    jwk::thumbprint(key) == thumbprint
        || sha1().is_some_and(|sha1| Base64UrlUnpadded::encode_string(&sha1) == thumbprint)
}

/// The payload and the signatures, of which the flattened form has one.
fn parts(jws: &Value) -> Option<(&str, &[Value])> {
    let signatures = jws.get("signatures").and_then(Value::as_array);
    Some((jws.get("payload")?.as_str()?, signatures.map_or(std::slice::from_ref(jws), Vec::as_slice)))
}

fn decode(text: &str) -> Option<Vec<u8>> {
    Base64UrlUnpadded::decode_vec(text).ok()
}

fn point_of(key: &Value) -> Result<Point, String> {
    key.as_object().ok_or("is no key".to_owned()).and_then(Point::of_jwk)
}

/// Whether a key says that it is for this use.
pub fn is_for(key: &Value, use_: &str) -> bool {
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
