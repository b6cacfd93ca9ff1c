//! Making what clevis opens.

use base64ct::{Base64UrlUnpadded, Encoding};
use serde_json::{Value, json};

use super::{content, ecdh_es, jwk, sss, tang};
use crate::{
    base::key::SecretBytes,
    keys::seal::{ContentKey, SealError, members},
};

/// Who is to open it: what clevis has pins for.
pub enum Whom {
    /// A Tang server: the key that is sealed to, among those that it advertises.
    Tang { url: String, key: Value, advertised: Value },
    /// At least so many of these.
    Threshold { least: usize, of: Vec<Whom> },
}

impl Whom {
    /// One of these is enough.
    pub fn any(mut of: Vec<Self>) -> Option<Self> {
        if of.len() < 2 { of.pop() } else { Some(Self::Threshold { least: 1, of }) }
    }
}

/// Seals a secret; the compact form.
pub fn seal(whom: &Whom, secret: &SecretBytes) -> Result<String, SealError> {
    let (mut header, key) = match whom {
        Whom::Tang { url, key, advertised } => {
            let (epk, z) = tang::agree(key)?;
            let pin = json!({"pin": "tang", "tang": {"url": url, "adv": advertised}});
            let kid = jwk::thumbprint(key);
            let header = json!({"alg": ecdh_es::DIRECT, "kid": kid, "epk": epk, "clevis": pin});
            let header = members(header);
            let key = ecdh_es::content_key(&z, &header)?;
            (header, key)
        }
        Whom::Threshold { least, of } => {
            let (key, shares) = sss::split(*least, of.len())?;
            let jwe = of.iter().zip(&shares).map(|(whom, share)| seal(whom, share)).collect::<Result<Vec<_>, _>>()?;
            let p = Base64UrlUnpadded::encode_string(&sss::PRIME);
            let pin = json!({"pin": "sss", "sss": {"t": least, "p": p, "jwe": jwe}});
            (members(json!({"alg": "dir", "clevis": pin})), key)
        }
    };
    header.insert("enc".to_owned(), content::ENC.into());
    let protected = Base64UrlUnpadded::encode_string(Value::Object(header).to_string().as_bytes());
    let key = ContentKey::from_secret(key).ok_or(SealError::Tampered)?;
    let sealed = content::encrypt(&key, protected.as_bytes(), secret)?;
    let [iv, ciphertext, tag] =
        [sealed.iv, sealed.ciphertext, sealed.tag].map(|b| Base64UrlUnpadded::encode_string(&b));
    Ok([&protected, "", &iv, &ciphertext, &tag].join("."))
}

/// The members of a JWE, as a LUKS2 token has them.
pub fn to_members(jwe: &str) -> Result<Value, SealError> {
    let [protected, encrypted_key, iv, ciphertext, tag] = super::parts(jwe)?;
    Ok(json!({
        "protected": protected, "encrypted_key": encrypted_key, "iv": iv, "ciphertext": ciphertext, "tag": tag,
    }))
}
