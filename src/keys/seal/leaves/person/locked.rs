//! A private key on P-256 under what a person knows: a JWE `PBES2-HS512+A256KW` (RFC 7518 section 4.8) of its JWK.

use base64ct::{Base64UrlUnpadded, Encoding};
use openssl::{
    bn::{BigNum, BigNumContext},
    ec::{EcGroup, EcKey, EcPoint},
    hash::MessageDigest,
    nid::Nid,
    pkcs5::pbkdf2_hmac,
    pkey::PKey,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    base::key::{JoseHeader, JweRecipient, SealedKey, SecretBytes},
    keys::seal::{
        ContentKey, Identity, OwnerKey, Recipient, SealError, Shape, content, decode, jwk, key_wrap, members,
        payload::{Base64, decode_bytes, read_json, write_json},
        seal_node,
    },
};

const ALG: &str = "PBES2-HS512+A256KW";
/// `typ` of the JWE: it cannot be taken for a sealed key, nor a share for it.
const TYPE: &str = "cryptattach-person";
const SALT_BYTES: usize = 16;
/// What a store may make us do for one answer: 1.1 s on a usual machine.
const MOST_ITERATIONS: u32 = 2_000_000;
const MOST_SALT_BYTES: usize = 64;
/// The JWK of a private key has 190 bytes.
const MOST_JWK_BYTES: usize = 512;

/// An encrypted private key, of which all is known and within bounds but what the answer tells.
pub struct Locked {
    sealed: SealedKey,
    salt: Vec<u8>,
    iterations: u32,
}

#[derive(Serialize)]
struct Written<'a> {
    kty: &'a str,
    crv: &'a str,
    x: &'a str,
    y: &'a str,
    d: Base64<'a>,
}

#[derive(Deserialize)]
struct Read<'a> {
    #[serde(borrow)]
    d: &'a str,
}

impl Locked {
    /// Encrypts a private key.
    pub fn new(key: &OwnerKey, answer: &SecretBytes, iterations: u32) -> Result<Self, SealError> {
        let public = Value::Object(key.recipient()?.jwk()?);
        let text = |name: &str| public.get(name).and_then(Value::as_str).unwrap_or_default();
        let d = key.private_number()?;
        let written = Written { kty: "EC", crv: text("crv"), x: text("x"), y: text("y"), d: Base64(&d) };
        let protected = json!({"typ": TYPE, "enc": content::ENC}).to_string();
        let by: [Box<dyn Recipient>; 1] =
            [Box::new(Answered { answer: SecretBytes::copy_of(answer.expose())?, iterations })];
        Self::of(seal_node(&protected, &write_json(&written, MOST_JWK_BYTES)?, &by)?)
    }

    /// Reads it, within bounds; nothing is derived yet.
    pub fn of(sealed: SealedKey) -> Result<Self, SealError> {
        let wrong =
            |what: &str| Err(SealError::Unsupported(format!("the encrypted key of a person's leaf has {what}")));
        let protected = sealed.protected_header()?;
        let [JweRecipient { header, .. }] = &sealed.recipients[..] else { return wrong("more than one recipient") };
        let text = |header: &JoseHeader, name: &str| header.get(name).and_then(Value::as_str).map(str::to_owned);
        let is_ours = text(&protected, "typ").as_deref() == Some(TYPE)
            && text(&protected, "enc").as_deref() == Some(content::ENC)
            && text(header, "alg").as_deref() == Some(ALG)
            // One place for each member: what is read is what jose reads.
            && protected.len() == 2
            && sealed.unprotected.is_empty()
            && sealed.aad.is_none();
        if !is_ours {
            return wrong("an unsupported form");
        }
        let Some(iterations) = header.get("p2c").and_then(Value::as_u64) else { return wrong("no 'p2c'") };
        let iterations = match u32::try_from(iterations) {
            Ok(iterations @ 1..=MOST_ITERATIONS) => iterations,
            _ => return wrong(&format!("a 'p2c' that is not from 1 to {MOST_ITERATIONS}")),
        };
        let salt = decode("p2s", &text(header, "p2s").unwrap_or_default())?;
        if !(8..=MOST_SALT_BYTES).contains(&salt.len()) {
            return wrong(&format!("a 'p2s' that has not 8 to {MOST_SALT_BYTES} bytes"));
        }
        if sealed.ciphertext.len() > 2 * MOST_JWK_BYTES {
            return wrong("too much content");
        }
        Ok(Self { sealed, salt, iterations })
    }

    /// As a value of a header or file.
    pub fn to_value(&self) -> Result<Value, SealError> {
        Ok(serde_json::from_slice(&self.sealed.to_json()).unwrap_or_default())
    }

    /// The private key of this id; `None` if the answer is another one.
    pub fn open(&self, answer: &SecretBytes, kid: &str) -> Result<Option<OwnerKey>, SealError> {
        let [entry] = &self.sealed.recipients[..] else { return Ok(None) };
        let wrapping_key = derive(answer, &self.salt, self.iterations)?;
        let wrapped = decode("encrypted_key", &entry.encrypted_key)?;
        let Some(key) = key_wrap::unwrap(&wrapping_key, &wrapped)? else { return Ok(None) };
        let jwk = content::Sealed {
            iv: decode("iv", &self.sealed.iv)?,
            ciphertext: decode("ciphertext", &self.sealed.ciphertext)?,
            tag: decode("tag", &self.sealed.tag)?,
        }
        .open(&key, self.sealed.protected.as_bytes())?;
        let d = decode_bytes(read_json::<Read<'_>>(&jwk)?.d)?.filter(|d| d.len() == jwk::COORDINATE_BYTES);
        let key = d.map(|d| private_key(&d)).transpose()?.filter(|key| key.kid() == kid);
        key.map(Some).ok_or_else(|| SealError::Payload("it is not the private key of its leaf".to_owned()))
    }
}

/// The key of this private number. It alone decides: no point that a file names is believed.
fn private_key(d: &SecretBytes) -> Result<OwnerKey, SealError> {
    let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1)?;
    // Wiped when it is freed.
    let mut number = BigNum::new_secure()?;
    number.copy_from_slice(d.expose())?;
    let (mut context, mut point) = (BigNumContext::new_secure()?, EcPoint::new(&group)?);
    point.mul_generator2(&group, &number, &mut context)?;
    let key = EcKey::from_private_components(&group, &number, &point)?;
    key.check_key()?;
    OwnerKey::of_p256(PKey::from_ec_key(key)?)
}

fn derive(answer: &SecretBytes, salt: &[u8], iterations: u32) -> Result<SecretBytes, SealError> {
    let mut key = SecretBytes::zeroed(ContentKey::BYTES)?;
    let salt = [ALG.as_bytes(), &[0], salt].concat();
    pbkdf2_hmac(answer.expose(), &salt, iterations as usize, MessageDigest::sha512(), key.expose_mut())?;
    Ok(key)
}

/// Who knows an answer.
struct Answered {
    answer: SecretBytes,
    iterations: u32,
}

impl Recipient for Answered {
    fn seal(&self, key: &ContentKey) -> Result<JweRecipient, SealError> {
        let mut salt = [0; SALT_BYTES];
        openssl::rand::rand_bytes(&mut salt)?;
        let wrapped = key_wrap::wrap(&derive(&self.answer, &salt, self.iterations)?, key)?;
        let header = json!({"alg": ALG, "p2s": Base64UrlUnpadded::encode_string(&salt), "p2c": self.iterations});
        Ok(JweRecipient { header: members(header), encrypted_key: Base64UrlUnpadded::encode_string(&wrapped) })
    }

    fn shape(&self) -> Shape {
        Shape::Key(String::new())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(text: &str) -> SecretBytes {
        SecretBytes::copy_of(text.as_bytes()).unwrap()
    }

    /// Made by Python's hashlib; jose and openssl agree.
    #[test]
    fn pbes2_as_others_derive_it() {
        let salt: Vec<u8> = (0..16).collect();
        let key = derive(&secret("correct horse"), &salt, 1000).unwrap();
        assert_eq!(Base64UrlUnpadded::encode_string(key.expose()), "VBgKVZtryGgVFljE4j1VWB26ouZRr1fBUB_KObOYPrM");
    }

    #[test]
    fn the_answer_opens_it_and_no_other() {
        let key = OwnerKey::generate().unwrap();
        let locked = Locked::new(&key, &secret("a"), 1000).unwrap();
        let read = Locked::of(SealedKey::from_value(locked.to_value().unwrap()).unwrap()).unwrap();
        assert_eq!(read.open(&secret("a"), key.kid()).unwrap().unwrap().kid(), key.kid());
        assert!(read.open(&secret("b"), key.kid()).unwrap().is_none());
        // Another key under the right answer is not that of the leaf.
        let other = OwnerKey::generate().unwrap();
        assert!(matches!(read.open(&secret("a"), other.kid()), Err(SealError::Payload(_))));
    }

    #[test]
    fn a_hostile_header_is_refused_before_any_work() {
        let locked = Locked::new(&OwnerKey::generate().unwrap(), &secret("a"), 1).unwrap();
        let with = |change: &dyn Fn(&mut SealedKey)| {
            let mut sealed = locked.sealed.clone();
            change(&mut sealed);
            Locked::of(sealed).err().map(|error| error.to_string())
        };
        assert_eq!(with(&|_| ()), None);
        let member = |name: &str, value: Value| {
            with(&|sealed| drop(sealed.recipients[0].header.insert(name.to_owned(), value.clone())))
        };
        for p2c in [json!(0), json!(2_000_001), json!(u64::MAX), json!(-1), json!(1.5), json!("1000"), Value::Null] {
            assert!(member("p2c", p2c.clone()).unwrap().contains("p2c"), "{p2c}");
        }
        assert_eq!(member("p2c", json!(2_000_000)), None);
        for p2s in [json!("AAAA"), json!("A".repeat(100)), json!("?"), json!(7)] {
            assert!(member("p2s", p2s.clone()).unwrap().contains("p2s"), "{p2s}");
        }
        for (name, value) in [("alg", "PBES2-HS256+A128KW"), ("alg", "dir")] {
            assert!(member(name, json!(value)).unwrap().contains("unsupported form"));
        }
        assert!(with(&|sealed| sealed.recipients.push(sealed.recipients[0].clone())).is_some());
        assert!(with(&|sealed| drop(sealed.unprotected.insert("p2c".to_owned(), json!(1)))).is_some());
        let other = Base64UrlUnpadded::encode_string(br#"{"typ":"cryptattach","enc":"A256GCM"}"#);
        assert!(with(&|sealed| sealed.protected.clone_from(&other)).is_some());
    }
}
