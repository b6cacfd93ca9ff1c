//! `tang = "URL"`: a Tang server. Whoever reaches it opens the leaf, so it stands for a place in a network.
//!
//! A recipient is `ECDH-ES+A256KW` to the server's exchange key, with the member `"tang": {"url", "key"}`. Sealing takes the
//! key only, which this host remembers ([`Pinned`]). Opening asks the server; which one, the configuration decides: a store
//! must not send this host anywhere.

mod advertisement;
mod curve;
mod exchange;
#[cfg(test)]
pub(in crate::keys::seal) mod tests;

use std::{
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
};

use base64ct::{Base64UrlUnpadded, Encoding};
use openssl::{ec::EcKey, pkey::PKey};
use reqwest::{Method, Url};
use serde::{Deserialize, Deserializer, Serialize, de};
use serde_json::{Value, json};

pub use advertisement::Advertisement;
pub(in crate::keys::seal) use advertisement::{MOST_KEYS, is_called, is_for};

use super::{Kind, LeafError, Offer, Pin, text};
use crate::{
    base::key::{JoseHeader, JweRecipient, SecretBytes},
    config::{ConfigError, LeafConfig, LeafName, Network},
    keys::{
        net::http::{self, Cancel, Http, HttpAnswer, Repeat, Request},
        seal::{ContentKey, Recipient, SealError, Shape, clevis::Whom, ecdh_es, jwk, key_wrap, members},
        store::Server,
    },
    sys::state,
};
use curve::Point;
use exchange::Question;

/// What tells this kind, in the configuration and in a header.
pub(in crate::keys::seal) const MEMBER: &str = "tang";
/// An answer has 250 bytes, an advertisement 1000.
const MOST_ANSWER_BYTES: usize = 16 * 1024;
/// The longest wait for whether a server has new keys.
const MOST_SECONDS_FOR_NEWS: f64 = 2.0;
/// The most URLs of one server.
const MOST_URLS: usize = 16;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    #[serde(deserialize_with = "urls")]
    tang: Vec<Url>,
    thumbprint: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMore {
    One(String),
    More(Vec<String>),
}

fn urls<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Url>, D::Error> {
    let texts = match OneOrMore::deserialize(deserializer)? {
        OneOrMore::One(text) => vec![text],
        OneOrMore::More(texts) => texts,
    };
    if !(1..=MOST_URLS).contains(&texts.len()) {
        return Err(de::Error::custom(format!("tang must have 1 to {MOST_URLS} URLs")));
    }
    let url = |text: &String| {
        http::server(text)
            .ok_or_else(|| de::Error::custom(format!("tang: '{text}' is not an http or https URL of a server")))
    };
    texts.iter().map(url).collect()
}

/// One Tang server.
struct Tang {
    name: LeafName,
    /// The same key at each.
    urls: Vec<Url>,
    thumbprint: Option<String>,
    network: Network,
}

pub(super) fn kind(name: &LeafName, config: &LeafConfig, network: Network) -> Result<Box<dyn Kind>, ConfigError> {
    Ok(Box::new(tang(name, config, network)?))
}

fn tang(name: &LeafName, config: &LeafConfig, network: Network) -> Result<Tang, ConfigError> {
    let Table { tang: urls, thumbprint } = config.read()?;
    if let Some(thumbprint) = &thumbprint
        && !is_thumbprint(thumbprint)
    {
        return Err(config.unusable("thumbprint: expected 43 or 27 characters, as 'tang-show-keys' prints them"));
    }
    Ok(Tang { name: name.clone(), urls, thumbprint, network })
}

/// SHA-256 or SHA-1, base64url.
fn is_thumbprint(text: &str) -> bool {
    Base64UrlUnpadded::decode_vec(text).is_ok_and(|bytes| matches!(bytes.len(), 32 | 20))
}

impl Tang {
    fn pinned_at(&self, state: &Path) -> Pinned {
        Pinned {
            name: self.name.clone(),
            urls: self.urls.clone(),
            thumbprint: self.thumbprint.clone(),
            network: self.network,
            file: state.join("leaves").join(format!("{}.json", self.name)),
        }
    }

    /// Asks one of its URLs.
    fn ask(
        &self,
        url: &Url,
        server: &Party<'_>,
        entry: &JweRecipient,
        header: &JoseHeader,
        cancel: &Cancel,
    ) -> Result<ContentKey, SealError> {
        let z = server.shared(url, self.network, cancel)?;
        let key = key_wrap::unwrap_entry(&ecdh_es::wrapping_key(&z, header)?, entry);
        key.map_err(|error| does_not_open(url, error))
    }

    fn recover(&self, entry: &JweRecipient, header: &JoseHeader, cancel: &Cancel) -> Result<ContentKey, SealError> {
        let server = Party::of(header)?;
        if let [url] = &self.urls[..] {
            return self.ask(url, &server, entry, header, cancel);
        }
        // All at once: a server that lies or is silent must not stand before one that answers.
        let cancel = cancel.below();
        thread::scope(|scope| {
            let (sender, answers) = mpsc::channel();
            for url in &self.urls {
                let (sender, server, cancel) = (sender.clone(), &server, &cancel);
                scope.spawn(move || drop(sender.send(self.ask(url, server, entry, header, cancel))));
            }
            drop(sender);
            let mut best = None;
            for answer in answers {
                if answer.is_ok() {
                    cancel.cancel();
                }
                if answer.is_ok() || best.is_none() {
                    best = Some(answer);
                }
            }
            best.unwrap_or_else(|| Err(SealError::Unsupported("its leaf has no URL".to_owned())))
        })
    }
}

/// The URL that an entry names.
pub(super) fn url_of(header: &JoseHeader) -> Option<&str> {
    header.get(MEMBER)?.get("url")?.as_str()
}

/// A right answer opens the leaf; so a key that opens nothing is the server's fault.
pub(in crate::keys::seal) fn does_not_open(url: &Url, error: SealError) -> SealError {
    match error {
        SealError::Tampered => {
            let what = "answers with a point that does not open the leaf".to_owned();
            LeafError::Answer { url: url.to_string(), what }.into()
        }
        other => other,
    }
}

/// What an entry says of its server.
pub(in crate::keys::seal) struct Party<'a> {
    kid: &'a str,
    /// S
    point: Point,
    /// C
    sender: Point,
}

impl<'a> Party<'a> {
    fn of(header: &'a JoseHeader) -> Result<Self, SealError> {
        if text(header, "alg") != Some(ecdh_es::ALG) {
            return Err(unsupported("has an unsupported algorithm"));
        }
        let server = header.get(MEMBER).and_then(|member| member.get("key"));
        Self::new(text(header, "kid"), server, header.get("epk"))
    }

    /// Of the server's key, which has this thumbprint, and the sender's.
    pub(in crate::keys::seal) fn new(
        kid: Option<&'a str>,
        server: Option<&Value>,
        sender: Option<&Value>,
    ) -> Result<Self, SealError> {
        let point = |jwk: Option<&Value>| {
            let jwk = jwk.and_then(Value::as_object).ok_or_else(|| unsupported("lacks a key"))?;
            Point::of_jwk(jwk).map_err(|why| unsupported(&format!("has a key that {why}")))
        };
        let kid = kid.ok_or_else(|| unsupported("has no kid"))?;
        let (server, sender) = (point(server)?, point(sender)?);
        if !is_called(&server.jwk()?, kid) {
            return Err(unsupported("has a kid that is not its key's"));
        }
        if server.curve != sender.curve {
            return Err(unsupported("has keys on two curves"));
        }
        Ok(Self { kid, point: server, sender })
    }

    /// Z, which the server at this URL helps to compute.
    pub(in crate::keys::seal) fn shared(
        &self,
        url: &Url,
        network: Network,
        cancel: &Cancel,
    ) -> Result<SecretBytes, SealError> {
        let question = Question::new(&self.point, &self.sender)?;
        let at = http::below(url, &["rec", self.kid]);
        let request = Request::new(Method::POST, vec![at], MOST_ANSWER_BYTES).in_clear();
        let request = request.body("application/jwk+json", question.jwk.to_string());
        let http = Http::for_one_request(&network).map_err(LeafError::from)?;
        let answer = http.send_unless(&request, cancel).map_err(LeafError::from)?;
        let wrong = |what: String| LeafError::Answer { url: url.to_string(), what };
        let answer = match answer.status.as_u16() {
            200 => json_of(&answer).ok_or_else(|| wrong("answers with something that is not JSON".to_owned()))?,
            404 => return Err(LeafError::KeyGone { url: url.to_string(), kid: self.kid.to_owned() }.into()),
            _ => return Err(wrong(format!("answers {}", answer.status)).into()),
        };
        let answer = answer.as_object().ok_or("is no key".to_owned()).and_then(Point::of_jwk);
        let answer = answer.map_err(|why| wrong(format!("answers with a point that {why}")))?;
        if answer.curve != self.point.curve {
            return Err(wrong("answers with a point on another curve".to_owned()).into());
        }
        question.answered(&self.point, &answer)
    }
}

fn unsupported(what: &str) -> SealError {
    SealError::Unsupported(format!("a Tang leaf of its policy {what}"))
}

fn json_of(answer: &HttpAnswer) -> Option<Value> {
    serde_json::from_slice(answer.body.expose()).ok()
}

impl Kind for Tang {
    fn recipients(&self, state: &Path) -> Result<Vec<Box<dyn Recipient>>, SealError> {
        let advertisement = self.pinned_at(state).advertisement()?;
        let key = advertisement.exchange().clone();
        let url = self.urls.first().map(Url::to_string).unwrap_or_default();
        Ok(vec![Box::new(TangRecipient { kid: jwk::thumbprint(&key), url, key })])
    }

    fn is_for(&self, header: &JoseHeader) -> bool {
        let url = url_of(header).and_then(|url| Url::parse(url).ok());
        url.is_some_and(|url| self.urls.contains(&url))
    }

    fn open(
        &self,
        entry: &JweRecipient,
        header: &JoseHeader,
        cancel: &Cancel,
    ) -> Option<Result<ContentKey, SealError>> {
        self.is_for(header).then(|| self.recover(entry, header, cancel))
    }

    fn is_outdated(&self, kid: &str) -> bool {
        // Nothing depends on the answer, so it is not waited for as long as for a key.
        let total_seconds = self.network.total_seconds.min(MOST_SECONDS_FOR_NEWS);
        let network =
            Network { try_seconds: self.network.try_seconds.min(total_seconds), total_seconds, ..self.network };
        let urls = self.urls.iter().map(|url| http::below(url, &["adv"])).collect();
        answer_at(urls, network, Repeat::Never).is_ok_and(|answer| {
            answer.status.is_success()
                && json_of(&answer).and_then(|jws| Advertisement::of(jws).ok()).is_some_and(|now| !now.has(kid))
        })
    }

    fn clevis(&self, state: &Path) -> Option<Result<Whom, SealError>> {
        let whom = |advertisement: Advertisement| {
            let of_url = |url: &Url| Whom::Tang {
                // clevis appends "/rec/KID".
                url: url.as_str().trim_end_matches('/').to_owned(),
                key: advertisement.exchange().clone(),
                advertised: advertisement.set(),
            };
            Whom::any(self.urls.iter().map(of_url).collect())
        };
        self.pinned_at(state).advertisement().map(whom).map_err(SealError::from).transpose()
    }

    fn servers(&self) -> Vec<Server> {
        self.urls.iter().map(Server::of).collect()
    }

    fn pin(&self, state: &Path) -> Option<Box<dyn Pin>> {
        Some(Box::new(self.pinned_at(state)))
    }
}

/// A Tang server's exchange key: seals.
struct TangRecipient {
    url: String,
    key: Value,
    kid: String,
}

impl Recipient for TangRecipient {
    fn seal(&self, content_key: &ContentKey) -> Result<JweRecipient, SealError> {
        let (epk, z) = agree(&self.key)?;
        let header = members(json!({
            "alg": ecdh_es::ALG, "kid": self.kid, "epk": epk, MEMBER: {"url": self.url, "key": self.key},
        }));
        let wrapped = key_wrap::wrap(&ecdh_es::wrapping_key(&z, &header)?, content_key)?;
        Ok(JweRecipient { header, encrypted_key: Base64UrlUnpadded::encode_string(&wrapped) })
    }

    fn shape(&self) -> Shape {
        Shape::Key(self.kid.clone())
    }
}

/// An ephemeral key, and the secret that it shares with a server's key.
pub(in crate::keys::seal) fn agree(key: &Value) -> Result<(Value, SecretBytes), SealError> {
    let wrong = |why: String| SealError::Unsupported(format!("the Tang server's key {why}"));
    let server = key.as_object().ok_or("is no key".to_owned()).and_then(Point::of_jwk).map_err(wrong)?;
    let ephemeral = EcKey::generate(&server.group)?;
    let epk = server.curve.jwk(&server.group, ephemeral.public_key())?;
    let (ours, theirs) = (PKey::from_ec_key(ephemeral)?, PKey::from_ec_key(server.key)?);
    Ok((epk, ecdh_es::shared(&ours, &theirs)?))
}

/// What this host remembers of a server: the file `leaves/NAME.json` of the state directory. The advertisement is checked
/// each time that it is read, so the file is trusted with the thumbprint only, and with that only if the configuration has
/// none.
struct Pinned {
    name: LeafName,
    urls: Vec<Url>,
    thumbprint: Option<String>,
    network: Network,
    file: PathBuf,
}

#[derive(Serialize, Deserialize)]
struct Remembered {
    thumbprint: String,
    /// The signing key of that thumbprint. Once the server's keys were rotated, the advertisement does not have it any more.
    signer: Value,
    advertisement: Value,
}

impl Pin for Pinned {
    fn expected(&self) -> Result<Option<String>, LeafError> {
        Ok(self.thumbprint.clone().or(self.remembered()?.map(|remembered| remembered.thumbprint)))
    }

    fn pinned(&self) -> Option<String> {
        let advertisement = Advertisement::of(self.remembered().ok()??.advertisement).ok()?;
        Some(jwk::thumbprint(advertisement.exchange()))
    }

    fn fetch(&self) -> Result<Box<dyn Offer + '_>, LeafError> {
        Ok(Box::new(Advertised { pinned: self, advertisement: self.advertised()? }))
    }

    fn compare_with(&self) -> String {
        "what 'tang-show-keys' prints on the server".to_owned()
    }
}

/// What a server advertises now.
struct Advertised<'a> {
    pinned: &'a Pinned,
    advertisement: Advertisement,
}

impl Offer for Advertised<'_> {
    fn thumbprints(&self) -> &[String] {
        &self.advertisement.signers
    }

    fn keep(&self, thumbprint: &str) -> Result<(), LeafError> {
        self.pinned.keep(&self.advertisement, thumbprint)
    }
}

/// The advertisement at one of these URLs, or what is there instead.
fn answer_at(urls: Vec<Url>, network: Network, repeat: Repeat) -> Result<HttpAnswer, LeafError> {
    let request = Request::new(Method::GET, urls, MOST_ANSWER_BYTES).in_clear();
    Ok(Http::for_one_request(&network)?.send(&Request { repeat, ..request })?)
}

impl Pinned {
    /// Asks the server for its advertisement; who has signed it is for the caller to judge.
    fn advertised(&self) -> Result<Advertisement, LeafError> {
        // With a thumbprint the server signs with that key, too, if it was rotated away.
        let thumbprint = self.expected()?;
        let segments: Vec<_> = ["adv"].into_iter().chain(thumbprint.as_deref()).collect();
        let urls = self.urls.iter().map(|url| http::below(url, &segments)).collect();
        let answer = answer_at(urls, self.network, Repeat::Safe)?;
        let url = answer.url.to_string();
        if answer.status.as_u16() == 404
            && let Some(thumbprint) = thumbprint
        {
            return Err(self.refusal(format!("is not signed by {thumbprint}: the server {url} has no such key")));
        }
        if !answer.status.is_success() {
            return Err(LeafError::Answer { url, what: format!("answers {}", answer.status) });
        }
        let jws = json_of(&answer).ok_or(LeafError::Answer { url, what: "answers with no JSON".to_owned() })?;
        Advertisement::of(jws).map_err(|why| self.refusal(why))
    }

    /// Remembers an advertisement that this key has signed.
    fn keep(&self, advertisement: &Advertisement, thumbprint: &str) -> Result<(), LeafError> {
        let before = self.remembered()?.map(|before| before.signer);
        let signer = self.signer(advertisement, thumbprint, before.as_ref())?.clone();
        let advertisement = advertisement.jws().clone();
        Ok(state::write(&self.file, &Remembered { thumbprint: thumbprint.to_owned(), signer, advertisement })?)
    }

    /// The advertisement to seal to: the one that is remembered, or else the server's if it is signed as configured.
    fn advertisement(&self) -> Result<Advertisement, LeafError> {
        let Some(Remembered { thumbprint, signer, advertisement }) = self.remembered()? else {
            let thumbprint = self.thumbprint.as_ref();
            let thumbprint = thumbprint.ok_or_else(|| LeafError::NoThumbprint(self.name.to_string()))?;
            let advertisement = self.advertised()?;
            self.keep(&advertisement, thumbprint)?;
            return Ok(advertisement);
        };
        let advertisement = Advertisement::of(advertisement).map_err(|why| self.refusal(why))?;
        self.signer(&advertisement, self.thumbprint.as_ref().unwrap_or(&thumbprint), Some(&signer))?;
        Ok(advertisement)
    }

    fn remembered(&self) -> Result<Option<Remembered>, LeafError> {
        Ok(state::read(&self.file)?)
    }

    /// The key of this thumbprint that has signed it: one of its own, or the one that is remembered.
    fn signer<'a>(
        &self,
        advertisement: &'a Advertisement,
        thumbprint: &str,
        before: Option<&'a Value>,
    ) -> Result<&'a Value, LeafError> {
        let vouches = |key: &&Value| is_called(key, thumbprint) && advertisement.is_signed_with(key);
        advertisement.signer(thumbprint).or(before.filter(vouches)).ok_or_else(|| {
            let signers = advertisement.signers.join(", ");
            self.refusal(format!("is signed by {signers}; expected {thumbprint}"))
        })
    }

    fn refusal(&self, why: String) -> LeafError {
        LeafError::Advertisement { name: self.name.to_string(), why }
    }
}
