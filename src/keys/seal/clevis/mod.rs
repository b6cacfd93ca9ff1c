//! What clevis makes, and what it opens: a JWE in compact form. Its protected header names the *pin* that has the key: `tang`
//! (`ECDH-ES` to a server's key) or `sss` (the key is the secret of a split, each share is such a JWE again). Other pins are
//! opened by clevis itself, if it is there.
//!
//! Such a JWE comes out of a volume's header. Its URLs are chosen by whoever has written that, so it is opened only where a
//! person has asked for it, and within the bounds of a policy.

mod open;
mod seal;
#[cfg(test)]
mod tests;

use std::fmt;

use base64ct::{Base64UrlUnpadded, Encoding};
use reqwest::Url;
use serde_json::{Value, json};

use super::{
    SealError, check_enc, content, ecdh_es, jwk,
    leaves::{self, tang},
    sss, text,
};
use crate::{
    base::{
        chain::printable,
        key::{JoseHeader, MAX_SEALED_BYTES},
    },
    config::policy,
    keys::net::http,
};

pub use open::Means;
pub use seal::{Whom, seal, to_members};

/// The longest name of a pin.
const LONGEST_PIN: usize = 32;

/// What clevis has bound to a pin. Nothing of it is authentic before it was opened.
pub struct Binding {
    /// The compact form.
    jwe: String,
    pin: Pin,
}

/// Who has the key.
enum Pin {
    Tang(Box<Tang>),
    Threshold {
        least: usize,
        modulus: [u8; sss::BYTES],
        of: Vec<Binding>,
    },
    /// One that clevis has a program for.
    Foreign(String),
}

struct Tang {
    url: Url,
    header: JoseHeader,
    /// The server's key.
    key: Value,
    /// The thumbprints of its signing keys.
    signers: Vec<String>,
}

/// A pin that is no threshold.
pub enum Leaf<'a> {
    /// A Tang server, and the thumbprint of a signing key of it, if the binding has one.
    Tang { url: &'a Url, thumbprint: Option<&'a str> },
    /// A pin of this name.
    Foreign(&'a str),
}

impl Binding {
    /// Reads what a LUKS2 token has: the members of a JWE.
    pub fn of_members(jwe: &Value) -> Result<Self, SealError> {
        let member = |name| jwe.get(name).and_then(Value::as_str).unwrap_or_default();
        Self::of_text(["protected", "encrypted_key", "iv", "ciphertext", "tag"].map(member).join("."))
    }

    /// Reads the compact form.
    pub fn of_text(jwe: String) -> Result<Self, SealError> {
        if jwe.len() > MAX_SEALED_BYTES {
            return Err(wrong(&format!("has more than {MAX_SEALED_BYTES} bytes")));
        }
        Self::within(jwe, &mut { policy::MOST_LEAVES }, 0)
    }

    fn within(jwe: String, leaves: &mut usize, depth: usize) -> Result<Self, SealError> {
        let [protected, ..] = parts(&jwe)?;
        let json = Base64UrlUnpadded::decode_vec(protected).map_err(|_| wrong("has a header that is not base64url"))?;
        let header: JoseHeader = serde_json::from_slice(&json).map_err(|_| wrong("has a header that is not JSON"))?;
        let clevis = header.get("clevis").ok_or_else(|| wrong("has no member 'clevis'"))?;
        let name = clevis.get("pin").and_then(Value::as_str).ok_or_else(|| wrong("names no pin"))?.to_owned();
        let pin = match (&name[..], clevis.get(&name)) {
            ("sss", Some(pin)) => {
                check(&header, "dir")?;
                Pin::threshold(pin, leaves, depth + 1)?
            }
            ("tang", Some(pin)) => {
                check(&header, ecdh_es::DIRECT)?;
                Pin::Tang(Box::new(Tang::of(pin, header.clone())?))
            }
            ("sss" | "tang", None) => return Err(wrong("has no member of its pin's name")),
            _ if is_name(&name) => Pin::Foreign(name),
            _ => return Err(wrong("has a pin that is no name of a pin")),
        };
        if !matches!(pin, Pin::Threshold { .. }) {
            *leaves = leaves.checked_sub(1).ok_or_else(too_many)?;
        }
        Ok(Self { jwe, pin })
    }

    /// As an expression of a policy, in which `name` says what a leaf is called.
    pub fn expression(&self, name: &mut dyn FnMut(Leaf<'_>) -> String) -> String {
        let (least, of) = match &self.pin {
            Pin::Tang(tang) => {
                return name(Leaf::Tang { url: &tang.url, thumbprint: tang.signers.first().map(String::as_str) });
            }
            Pin::Foreign(pin) => return name(Leaf::Foreign(pin)),
            Pin::Threshold { least, of, .. } => (*least, of),
        };
        let inner: Vec<_> = of.iter().map(|binding| binding.expression(name)).collect();
        let inner = inner.join(", ");
        match () {
            () if of.len() == 1 => inner,
            () if least == of.len() => format!("all({inner})"),
            () if least == 1 => format!("any({inner})"),
            () => format!("{least} of ({inner})"),
        }
    }
}

/// `2 of (http://10.0.0.5/, http://10.0.0.6/, pin tpm2)`
impl fmt::Display for Binding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut name = |leaf: Leaf<'_>| match leaf {
            Leaf::Tang { url, .. } => printable(url.as_str()),
            Leaf::Foreign(pin) => format!("pin {pin}"),
        };
        f.write_str(&self.expression(&mut name))
    }
}

impl Pin {
    fn threshold(pin: &Value, leaves: &mut usize, depth: usize) -> Result<Self, SealError> {
        if depth > policy::DEEPEST {
            return Err(wrong(&format!("has thresholds of more than {} levels", policy::DEEPEST)));
        }
        let modulus = pin.get("p").and_then(Value::as_str).and_then(|p| Base64UrlUnpadded::decode_vec(p).ok());
        // The secret is the key, so it has as many bytes as a key has. An even number is no prime.
        let modulus = modulus.and_then(|p| <[u8; sss::BYTES]>::try_from(p).ok()).filter(|p| p[sss::BYTES - 1] & 1 == 1);
        let modulus = modulus.ok_or_else(|| wrong("has a 'p' that is no prime of 256 bits"))?;
        let of = pin.get("jwe").and_then(Value::as_array).ok_or_else(|| wrong("has no shares"))?;
        if of.len() > policy::MOST_LEAVES {
            return Err(too_many());
        }
        let least = pin.get("t").and_then(Value::as_u64).and_then(|least| usize::try_from(least).ok());
        let least = least.filter(|least| (1..=of.len()).contains(least));
        let least = least.ok_or_else(|| wrong("has a 't' that is not from 1 to the number of its shares"))?;
        let share = |share: &Value| {
            let jwe = share.as_str().ok_or_else(|| wrong("has a share that is no text"))?;
            Binding::within(jwe.to_owned(), leaves, depth)
        };
        Ok(Self::Threshold { least, modulus, of: of.iter().map(share).collect::<Result<_, _>>()? })
    }
}

impl Tang {
    fn of(pin: &Value, header: JoseHeader) -> Result<Self, SealError> {
        let url = pin.get("url").and_then(Value::as_str).unwrap_or_default();
        // clevis hands it to curl, which takes what has no scheme for http.
        let url = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
        let url = http::server(&url).ok_or_else(|| wrong("has a URL that is not an http or https URL of a server"))?;
        let keys = pin.get("adv").and_then(|adv| adv.get("keys")).and_then(Value::as_array);
        let keys = keys.ok_or_else(|| wrong("has no advertisement"))?;
        let kid = text(&header, "kid");
        // As text: whether it is a key is looked at once it is used, for the header may name many.
        let members = |key: &Value| {
            let text = |name: &str| key.get(name).and_then(Value::as_str);
            Some(json!({"crv": text("crv")?, "kty": text("kty")?, "x": text("x")?, "y": text("y")?}))
        };
        let key = keys.iter().take(tang::MOST_KEYS).filter_map(members).find(|key| tang::is_called(key, kid));
        let key = key.ok_or_else(|| wrong("has an advertisement without the key that it was sealed to"))?;
        let signing = keys.iter().take(tang::MOST_KEYS).filter(|key| tang::is_for(key, "verify"));
        let signers = signing.filter_map(members).map(|key| jwk::thumbprint(&key)).collect();
        Ok(Self { url, header, key, signers })
    }
}

/// Checks what a pin of ours has: its algorithm, and nothing that changes how a JWE is read.
fn check(header: &JoseHeader, alg: &str) -> Result<(), SealError> {
    let is_known = |name: &String| matches!(name.as_str(), "alg" | "enc" | "clevis" | "epk" | "kid" | "apu" | "apv");
    if text(header, "alg") != alg {
        return Err(wrong("has an algorithm that is not its pin's"));
    }
    match header.keys().find(|name| !is_known(name)) {
        Some(name) => Err(wrong(&format!("has the unsupported member '{}'", printable(name)))),
        None => check_enc(header),
    }
}

/// Whether it can be the name of a pin, and of nothing else on this host.
fn is_name(name: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=LONGEST_PIN).contains(&name.len()) && name.bytes().all(fits)
}

/// Whether a leaf of a policy stands for the server at this URL.
pub fn is_of(leaf: &dyn leaves::Kind, url: &Url) -> bool {
    leaf.is_for(&super::members(json!({tang::MEMBER: {"url": url.as_str()}})))
}

/// Protected header, encrypted key, IV, ciphertext and tag.
fn parts(jwe: &str) -> Result<[&str; 5], SealError> {
    let mut parts = jwe.trim_end().split('.');
    let five = std::array::from_fn(|_| parts.next());
    match (five, parts.next()) {
        ([Some(protected), Some(key), Some(iv), Some(ciphertext), Some(tag)], None) => {
            Ok([protected, key, iv, ciphertext, tag])
        }
        _ => Err(wrong("has not the five parts of a JWE")),
    }
}

fn wrong(what: &str) -> SealError {
    SealError::Unsupported(format!("the clevis binding {what}"))
}

fn too_many() -> SealError {
    wrong(&format!("has more than {} pins", policy::MOST_LEAVES))
}
