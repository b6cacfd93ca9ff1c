//! `transit = "KEY"`: an RSA key in the Transit engine of an OpenBao or Vault server. Whoever may log in there opens the leaf.
//!
//! A recipient is an ordinary `RSA-OAEP-256` one: sealing takes the public key only, which is in a file (`public`), or is the
//! one that a person has confirmed (`leaf pin`). Opening asks the server to decrypt with the version of that key.

#[cfg(test)]
mod tests;

use std::{
    path::{Path, PathBuf},
    sync::OnceLock,
};

use base64ct::{Base64, Base64UrlUnpadded, Encoding};
use openssl::pkey::PKey;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Kind, LeafError, Offer, Pin, text};
use crate::{
    base::key::{JoseHeader, JweRecipient, SecretBytes},
    config::{ConfigError, ConfigPath, LeafConfig, LeafName, Network, ServerConfig},
    keys::{
        net::{
            bao::{self, Bao, MOST_WORDS_BYTES, Question, Secrets, unexpected},
            http::{self, Cancel},
        },
        seal::{ContentKey, OwnerRecipient, Recipient, SealError, rsa_oaep},
        store::Server,
    },
    sys::state,
};

/// What tells this kind, in the configuration.
pub(super) const MEMBER: &str = "transit";
/// The most keys that are remembered of a leaf: one for each time that it was pinned.
const MOST_KEYS: usize = 32;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    transit: String,
    #[serde(rename = "server")]
    _server: String,
    public: Option<ConfigPath>,
}

/// A key of a server.
#[derive(Clone)]
struct Transit {
    name: LeafName,
    server: ServerConfig,
    mount: String,
    key: String,
    public: Option<ConfigPath>,
    network: Network,
    memory: PathBuf,
    /// The thumbprints of the keys that it opens for, read once.
    kids: OnceLock<Vec<String>>,
}

pub(super) fn kind(name: &LeafName, config: &LeafConfig, network: Network) -> Result<Box<dyn Kind>, ConfigError> {
    let Table { transit, public, .. } = config.read()?;
    let server = config.server.clone().ok_or_else(|| config.unusable("missing field `server`"))?;
    bao::urls(&server)?;
    let (mount, key) = transit.rsplit_once('/').unwrap_or((MEMBER, &transit));
    let fits = |name: &str| !matches!(name, "" | "." | "..") && name.bytes().all(|byte| byte.is_ascii_graphic());
    if !fits(key) || !mount.split('/').all(fits) {
        return Err(config.unusable("transit: expected 'KEY' or 'MOUNT/KEY'"));
    }
    let (mount, key, memory) = (mount.to_owned(), key.to_owned(), config.memory.clone());
    Ok(Box::new(Transit { name: name.clone(), server, mount, key, public, network, memory, kids: OnceLock::new() }))
}

/// What this host remembers of a leaf: the public keys that were confirmed, the last one to seal to.
#[derive(Default, Serialize, Deserialize)]
struct Remembered {
    keys: Vec<String>,
}

/// The holder of a public key in PEM, which has to be one for RSA.
fn recipient(pem: &str) -> Result<OwnerRecipient, String> {
    let key = PKey::public_key_from_pem(pem.as_bytes()).map_err(|_| "is not a public key in PEM".to_owned())?;
    let recipient = OwnerRecipient::of_public(key).map_err(|error| error.to_string())?;
    if recipient.is_rsa() { Ok(recipient) } else { Err("is not an RSA key".to_owned()) }
}

impl Transit {
    fn path<'a>(&'a self, action: &'a str) -> Vec<&'a str> {
        self.mount.split('/').chain([action, &*self.key]).collect()
    }

    /// The public keys, the last one to seal to.
    fn keys(&self) -> Result<Vec<OwnerRecipient>, SealError> {
        if let Some(path) = &self.public {
            let key = OwnerRecipient::read(path)?;
            let why = "is not an RSA key, and Transit decrypts with no other".to_owned();
            return if key.is_rsa() {
                Ok(vec![key])
            } else {
                Err(SealError::KeyFile { path: path.to_path_buf(), why })
            };
        }
        let remembered: Option<Remembered> = state::read(&self.memory).map_err(LeafError::from)?;
        let keys = remembered.unwrap_or_default().keys;
        let key = |pem: &String| recipient(pem).map_err(|why| self.refusal(why).into());
        keys.iter().map(key).collect()
    }

    /// Whether it opens what is sealed to this key.
    fn has(&self, kid: &str) -> bool {
        // What cannot be read is told where something is sealed to it.
        let read = || self.keys().unwrap_or_default().iter().map(|key| key.kid().to_owned()).collect();
        self.kids.get_or_init(read).iter().any(|known| known == kid)
    }

    fn refusal(&self, why: String) -> LeafError {
        LeafError::Offered { name: self.name.to_string(), why }
    }

    /// The versions of the key that the server has, by number.
    fn versions(&self, bao: &Bao, cancel: &Cancel) -> Result<Versions, LeafError> {
        let answer = bao.ask(Question::get(self.path("keys"), MOST_WORDS_BYTES), cancel)?;
        let versions = Versions::of(answer.body.expose()).filter(|_| answer.status.is_success());
        versions.ok_or_else(|| LeafError::NoTransitKey { key: self.key.clone(), url: answer.url.into() })
    }

    fn recover(&self, entry: &JweRecipient, kid: &str, cancel: &Cancel) -> Result<ContentKey, SealError> {
        let bao = Bao::new(&self.server, &self.network).map_err(LeafError::from)?;
        let versions = self.versions(&bao, cancel)?;
        let is_ours = |pem: &str| recipient(pem).is_ok_and(|key| key.kid() == kid);
        let Some((number, _)) = versions.keys.iter().find(|(_, pem)| is_ours(pem)) else {
            return Err(self.no_version(kid, versions.least).into());
        };
        let encrypted = Base64UrlUnpadded::decode_vec(&entry.encrypted_key).map_err(|_| SealError::Tampered)?;
        let ciphertext = format!("vault:v{number}:{}", Base64::encode_string(&encrypted));
        let question =
            Question::post(self.path("decrypt"), &json!({"ciphertext": ciphertext})).map_err(LeafError::from)?;
        let answer = bao.ask(question, cancel).map_err(LeafError::from)?;
        if !answer.status.is_success() {
            let said = http::reason(&answer).unwrap_or_else(|| answer.status.to_string());
            if said.contains("too old") {
                return Err(self.no_version(kid, versions.least.max(number.saturating_add(1))).into());
            }
            return Err(LeafError::from(unexpected(&answer, &format!("does not decrypt: {said}"))).into());
        }
        let plaintext = Secrets::of(&answer.body).plaintext().ok_or_else(|| unexpected(&answer, "gives no plaintext"));
        let plaintext = plaintext.map_err(LeafError::from)?;
        let mut key = SecretBytes::zeroed(plaintext.len())?;
        let decoded = Base64::decode(plaintext, key.expose_mut()).map(<[u8]>::len);
        key.truncate(decoded.map_err(|_| SealError::Tampered)?);
        ContentKey::from_secret(key).ok_or(SealError::Tampered)
    }

    /// Why the server has no key of ours: it holds it back, or has another one.
    fn no_version(&self, kid: &str, least: u64) -> LeafError {
        let (name, key, kid) = (self.name.to_string(), self.key.clone(), kid.to_owned());
        if least > 1 {
            LeafError::KeyTooOld { name, key, kid, least }
        } else {
            LeafError::KeyReplaced { name, key, kid }
        }
    }
}

/// What a server has of a key.
pub struct Versions {
    latest: u64,
    /// Of those before this one it decrypts nothing.
    least: u64,
    keys: Vec<(u64, String)>,
}

impl Versions {
    /// Reads an answer; `None` if it tells of no key.
    pub fn of(body: &[u8]) -> Option<Self> {
        let json: Value = serde_json::from_slice(body).ok()?;
        let data = json.get("data")?;
        let number = |name: &str| data.get(name).and_then(Value::as_u64).unwrap_or_default();
        // Keys for encryption by the server itself have no public half.
        let key = |(number, key): (&String, &Value)| {
            Some((number.parse().ok()?, key.get("public_key")?.as_str()?.to_owned()))
        };
        let keys = data.get("keys")?.as_object()?.iter().filter_map(key).collect();
        Some(Self { latest: number("latest_version"), least: number("min_decryption_version"), keys })
    }

    /// The newest one, and its thumbprint; or what is wrong with it.
    pub fn newest(self) -> Result<(String, String), String> {
        let pem = self.keys.into_iter().find(|(number, _)| *number == self.latest).map(|(_, pem)| pem);
        let pem = pem.ok_or("has no public half: Transit needs a key of type rsa-2048 or larger")?;
        let kid = recipient(&pem)?.kid().to_owned();
        Ok((pem, kid))
    }
}

impl Kind for Transit {
    fn recipients(&self, _: &Path) -> Result<Vec<Box<dyn Recipient>>, SealError> {
        let key = self.keys()?.pop().ok_or_else(|| LeafError::NotPinned(self.name.to_string()))?;
        Ok(vec![Box::new(key)])
    }

    fn is_for(&self, header: &JoseHeader) -> bool {
        text(header, "alg") == Some(rsa_oaep::ALG) && text(header, "kid").is_some_and(|kid| self.has(kid))
    }

    fn open(
        &self,
        entry: &JweRecipient,
        header: &JoseHeader,
        cancel: &Cancel,
    ) -> Option<Result<ContentKey, SealError>> {
        let kid = text(header, "kid").filter(|_| self.is_for(header))?;
        Some(self.recover(entry, kid, cancel))
    }

    fn servers(&self) -> Vec<Server> {
        bao::servers(&self.server)
    }

    fn files(&self) -> Vec<&Path> {
        let key = self.public.as_deref().unwrap_or(&self.memory);
        bao::files(&self.server).into_iter().chain([key]).collect()
    }

    fn login(&self) -> Option<&Path> {
        Some(self.server.secret())
    }

    fn pin(&self, _: &Path) -> Option<Box<dyn Pin>> {
        self.public.is_none().then(|| Box::new(self.clone()) as Box<dyn Pin>)
    }
}

impl Pin for Transit {
    /// Nothing vouches for the next version of a key, so a person is asked each time.
    fn expected(&self) -> Result<Option<String>, LeafError> {
        Ok(None)
    }

    fn pinned(&self) -> Option<String> {
        let remembered = state::read::<Remembered>(&self.memory).ok()??;
        recipient(remembered.keys.last()?).ok().map(|key| key.kid().to_owned())
    }

    fn fetch(&self) -> Result<Box<dyn Offer + '_>, LeafError> {
        let bao = Bao::new(&self.server, &self.network)?;
        let (pem, kid) = self.versions(&bao, &Cancel::never())?.newest().map_err(|why| self.refusal(why))?;
        Ok(Box::new(Offered { transit: self, pem, thumbprint: [kid] }))
    }

    fn compare_with(&self) -> String {
        format!("what the commands in docs/openbao.md print for {}/keys/{} on the server", self.mount, self.key)
    }
}

/// The newest version of the key.
struct Offered<'a> {
    transit: &'a Transit,
    pem: String,
    thumbprint: [String; 1],
}

impl Offer for Offered<'_> {
    fn thumbprints(&self) -> &[String] {
        &self.thumbprint
    }

    fn keep(&self, thumbprint: &str) -> Result<(), LeafError> {
        let [offered] = &self.thumbprint;
        if offered != thumbprint {
            return Err(self.transit.refusal(format!("is {offered}; expected {thumbprint}")));
        }
        let memory = &self.transit.memory;
        let mut keys = state::read::<Remembered>(memory)?.unwrap_or_default().keys;
        // The former ones go on to open what was sealed to them.
        keys.retain(|known| *known != self.pem);
        keys.push(self.pem.clone());
        keys.drain(..keys.len().saturating_sub(MOST_KEYS));
        Ok(state::write(memory, &Remembered { keys })?)
    }
}
