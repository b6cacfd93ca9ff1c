//! A store in a container of OpenStack's object store: one object per key, named by its id; container keys below `kek/`,
//! hosts' lockbox keys below `host/`.
//!
//! Swift is eventually consistent: a plain GET may be answered by a replica that missed an overwrite or a deletion, and
//! not even `If-None-Match: *` is atomic. So what is read is asked for with `X-Newest`, which compares all replicas that
//! answer, and what is written is read back before anything depends on it. Of a new key there is one form only, so that is
//! read back from any replica. Source: Swift's API reference, and what its servers were seen to do.

mod consumers;
mod endpoints;
mod objects;

pub use endpoints::{MalformedEndpoints, parse_endpoints};

use std::sync::{Arc, OnceLock};

use reqwest::{Method, Url, header::HeaderValue};
use serde::Deserialize;
use serde_json::json;

use super::{
    Access, ContainerKeys, Current, Facts, HostKeys, KeyStore, Kind, Letters, RingAnswer, StoreError, StoreType,
    Stored, cloud::Service,
};
use crate::{
    base::{
        chain::chain,
        key::{Epoch, HostName, KeyId, MAX_SEALED_BYTES, Place, Ring, SealedKey, StoreName},
    },
    config::{CloudConfig, ConfigError, Network, Section, StoreConfig},
    keys::net::{
        Caller,
        http::{self, HttpAnswer, HttpError, Repeat, Request},
        keystone::{AuthError, SendError, Session},
    },
};

/// The longest answer whose words do not matter.
const MOST_WORDS_BYTES: usize = 16 * 1024;

/// The longest answer that names replicas.
const MOST_RING_BYTES: usize = 256 * 1024;

/// Container metadata: the number of the current container key.
const EPOCH: &str = "x-container-meta-cryptattach-epoch";
/// Container metadata: the current container key's fingerprint.
const FINGERPRINT: &str = "x-container-meta-cryptattach-fingerprint";
/// Container metadata: there while keys are being sealed anew.
const ROTATING: &str = "x-container-meta-cryptattach-rotating";

/// A container with sealed keys.
pub struct Swift {
    session: Session,
    container: String,
    /// Where the list_endpoints middleware answers, if not beside the account.
    endpoints: Option<Url>,
    /// Whether old versions of deleted objects are kept; asked for once.
    versioned: OnceLock<bool>,
}

/// `type = "swift"`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SwiftConfig {
    /// The cloud.
    #[serde(skip)]
    cloud: CloudConfig,
    /// The container; named as the store unless given.
    container: Option<String>,
    /// URLs of the account (`https://HOST/v1/AUTH_...`), all of one cluster, in place of the catalogue's.
    #[serde(default)]
    urls: Vec<String>,
    /// URL of the list_endpoints middleware (`https://HOST/endpoints`), if that is not beside the account.
    endpoints: Option<String>,
    /// Log in as the caller of a hook, by the token in its request.
    #[serde(default)]
    caller_token: bool,
}

/// `swift`
pub const TYPE: StoreType = StoreType { name: "swift", keeps_host_keys: true, read: SwiftConfig::kind };

impl SwiftConfig {
    fn kind(section: &Section) -> Result<Box<dyn Kind>, ConfigError> {
        let (cloud, own) = section.part(&CloudConfig::MEMBERS);
        Ok(Box::new(Self { cloud: cloud.read()?, ..own.read()? }))
    }
}

impl Kind for SwiftConfig {
    fn open(
        &self,
        name: &StoreName,
        config: &StoreConfig,
        caller: Option<Arc<Caller>>,
    ) -> Result<Box<dyn KeyStore>, StoreError> {
        Ok(Box::new(Swift::open(name, self, &config.network, caller)?))
    }

    fn describe(&self) -> String {
        "Swift".to_owned()
    }

    fn service(&self) -> Option<Service<'_>> {
        Some(Service { cloud: &self.cloud, urls: &self.urls, releases: false })
    }

    fn takes_caller_token(&self) -> bool {
        self.caller_token
    }

    fn make(&self, name: &StoreName, config: &StoreConfig, access: &Access<'_>) -> Option<Result<(), StoreError>> {
        Some(Swift::open(name, self, &config.network, None).and_then(|swift| swift.make_container(access)))
    }

    fn facts(&self, name: &StoreName, config: &StoreConfig) -> Option<Result<Facts, StoreError>> {
        Some(Swift::open(name, self, &config.network, None).and_then(|swift| swift.facts()))
    }
}

impl Swift {
    /// The container, which is named as the store unless the configuration says otherwise; nothing is asked yet.
    pub fn open(
        name: &StoreName,
        config: &SwiftConfig,
        network: &Network,
        caller: Option<Arc<Caller>>,
    ) -> Result<Self, StoreError> {
        let caller = caller.filter(|_| config.caller_token);
        let session = Session::new(&config.cloud, &config.urls, network, "object-store", caller)?;
        let container = config.container.clone().unwrap_or_else(|| name.to_string());
        let endpoints = config.endpoints.as_deref().map(http::url).transpose().map_err(AuthError::from)?;
        Ok(Self { session, container, endpoints, versioned: OnceLock::new() })
    }

    /// What the container says of itself; `kek/` objects count as well.
    fn facts(&self) -> Result<Facts, StoreError> {
        let answer = self.head()?;
        let text = |name: &str| answer.header(name).unwrap_or_default().to_owned();
        let objects = text("x-container-object-count");
        let (readers, writers) = (text("x-container-read"), text("x-container-write"));
        // Swift tells its lists to those only who may change them.
        let list =
            |text: &str| if text.is_empty() { "none told to this user".to_owned() } else { text.replace(',', ", ") };
        let own = [("objects", &objects), ("readers", &readers), ("writers", &writers)];
        let own = own.into_iter().map(|(name, value)| (name.to_owned(), json!(value))).collect();
        Ok(Facts {
            own,
            lines: vec![("objects", objects), ("readers", list(&readers)), ("writers", list(&writers))],
            epoch: answer.header(EPOCH).map(Into::into),
            fingerprint: answer.header(FINGERPRINT).map(str::to_owned),
            rotating: answer.header(ROTATING).is_some(),
        })
    }

    /// Makes the container, or changes who may use the one that there is.
    pub fn make_container(&self, access: &Access<'_>) -> Result<(), StoreError> {
        let acl = |users: &[String]| {
            HeaderValue::from_str(&users.join(","))
                .map_err(|_| self.unusable("an ACL element is not a valid header value"))
        };
        // Who writes a key reads it back, and looks first which container key is the current one.
        let (read, write) = (acl(&[access.readers, access.writers].concat())?, acl(access.writers)?);
        let answer = self.send("make the container", |urls| {
            let headers = [("x-container-read", &read), ("x-container-write", &write)];
            let request = Request::new(Method::PUT, self.urls(urls, &[]), MOST_WORDS_BYTES);
            headers.into_iter().fold(request, |request, (name, value)| request.header(name, value.clone()))
        })?;
        self.expect("make the container", answer).map(drop)
    }

    /// The URLs of something in the container, on each server.
    fn urls(&self, urls: &[Url], object: &[&str]) -> Vec<Url> {
        let path: Vec<&str> = [&*self.container].into_iter().chain(object.iter().copied()).collect();
        urls.iter().map(|url| http::below(url, &path)).collect()
    }

    fn send(&self, action: &'static str, build: impl Fn(&[Url]) -> Request) -> Result<HttpAnswer, StoreError> {
        self.session.send(build).map_err(|source| self.unreachable(action, source))
    }

    fn unreachable(&self, action: &'static str, source: SendError) -> StoreError {
        StoreError::Unreachable { action, at: self.to_string(), source: Box::new(source) }
    }

    fn unusable(&self, what: &str) -> StoreError {
        StoreError::Answer { action: "use", at: self.to_string(), what: what.to_owned() }
    }

    /// The answer if its status is a success; else what its status means.
    fn expect(&self, action: &'static str, answer: HttpAnswer) -> Result<HttpAnswer, StoreError> {
        if answer.status.is_success() {
            return Ok(answer);
        }
        let at = self.to_string();
        let said = http::reason(&answer).map(|said| format!(": {said}")).unwrap_or_default();
        let what = match answer.status.as_u16() {
            401 | 403 => return Err(StoreError::Denied { action, at }),
            404 => return Err(StoreError::NoContainer { at }),
            413 | 422 => format!("it refuses the request ({}){said}", answer.status),
            429 => "it asks to come back later (429 Too Many Requests)".to_owned(),
            498 => "it asks to come back later (498 Slow Down)".to_owned(),
            503 => format!("too few of its replicas answer (503 Service Unavailable){said}"),
            507 => "it has no space left (507 Insufficient Storage)".to_owned(),
            300..=399 => format!("it redirects to another server, {}", answer.header("location").unwrap_or("unnamed")),
            _ => format!("it answers {}{said}", answer.status),
        };
        Err(StoreError::Answer { action, at, what })
    }

    /// Asks the list_endpoints middleware, which wants no token, once: what it does not tell is not proven, no more.
    fn ring_request(urls: Vec<Url>) -> Request {
        Request { repeat: Repeat::Never, ..Request::new(Method::GET, urls, MOST_RING_BYTES) }
    }

    /// `https://HOST/v1/ACCOUNT` -> `https://HOST/endpoints/v2/ACCOUNT/...`
    fn endpoints_url(&self, account: &Url, below: &[&str]) -> Option<Url> {
        let name = account.path().trim_end_matches('/').rsplit_once("/v1/")?.1;
        let mut url = account.clone();
        url.set_path("");
        let base = self.endpoints.clone().unwrap_or_else(|| http::below(&url, &["endpoints"]));
        Some(http::below(&base, &[&["v2", name], below].concat()))
    }

    fn head(&self) -> Result<HttpAnswer, StoreError> {
        let answer = self.send("look at", |urls| Request::new(Method::HEAD, self.urls(urls, &[]), MOST_WORDS_BYTES))?;
        self.expect("look at", answer)
    }
}

/// The answer's bytes, or why there are none, in words.
fn told(answer: Result<HttpAnswer, HttpError>) -> Result<Vec<u8>, String> {
    match answer {
        Ok(answer) if answer.status.is_success() => Ok(answer.body.expose().to_vec()),
        Ok(HttpAnswer { url, status, .. }) => {
            Err(format!("{url} answers {status} (is list_endpoints in the proxy's pipeline?)"))
        }
        Err(error) => Err(chain(&error)),
    }
}

impl KeyStore for Swift {
    fn get(&self, id: &KeyId) -> Result<Stored, StoreError> {
        let key = self.fetch(&id.to_string())?;
        key.claimed_context_of(id).map_err(|source| self.malformed(&id.to_string(), source))?;
        Ok(Stored::Sealed(key))
    }

    fn create(&self, id: &KeyId, key: &SealedKey) -> Result<(), StoreError> {
        self.create_key(&id.to_string(), &key.to_json())
    }

    fn reseal(&self, id: &KeyId, key: &SealedKey) -> Result<(), StoreError> {
        self.replace_object(&id.to_string(), key)
    }

    fn delete(&self, id: &KeyId) -> Result<(), StoreError> {
        self.delete_object(&id.to_string())
    }

    /// All replicas are asked, however long one takes. Swift says the same of a container that is not there.
    fn is_gone(&self, id: &KeyId) -> Result<bool, StoreError> {
        let is_gone = self.newest(&id.to_string())?.is_none();
        self.head().map(|_| is_gone)
    }

    fn list(&self) -> Result<Vec<KeyId>, StoreError> {
        Ok(self.names("")?.iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// What its rings say; nothing of it is on this host for certain.
    fn places(&self, _: &KeyId) -> Result<Vec<Place>, StoreError> {
        Ok(Vec::new())
    }

    fn rings(&self, id: &KeyId, rows: bool) -> Result<Vec<RingAnswer>, StoreError> {
        let accounts = self.session.urls();
        let accounts = accounts.map_err(|error| self.unreachable("ask for the rings of", error.into()))?;
        let id = id.to_string();
        let below: [(Ring, &[&str]); 3] =
            [(Ring::Object, &[&self.container, &id]), (Ring::Container, &[&self.container]), (Ring::Account, &[])];
        let below = if rows { &below[..] } else { &below[..1] };
        let urls =
            below.iter().map(|(_, below)| accounts.iter().filter_map(|url| self.endpoints_url(url, below)).collect());
        let requests: Vec<_> = urls.map(Self::ring_request).collect();
        let answers = self.session.send_all_without_token(&requests);
        let ring = |((ring, _), answer): (&(Ring, _), _)| RingAnswer { ring: *ring, answer: told(answer) };
        Ok(below.iter().zip(answers).map(ring).collect())
    }

    fn as_one(&mut self) {
        self.session.as_one();
    }

    fn warm(&mut self) {
        self.session.warm();
    }

    fn container_keys(&self) -> Option<&dyn ContainerKeys> {
        Some(self)
    }

    fn host_keys(&self) -> Option<&dyn HostKeys> {
        Some(self)
    }
}

impl ContainerKeys for Swift {
    fn current(&self) -> Result<Option<Current>, StoreError> {
        let answer = self.head()?;
        let Some(text) = answer.header(EPOCH).filter(|text| !text.is_empty()) else { return Ok(None) };
        let epoch = text.parse().map_err(|_| self.unusable(&format!("its metadata has the epoch '{text}'")))?;
        Ok(Some(Current { epoch, rotating: answer.header(ROTATING).is_some_and(|text| !text.is_empty()) }))
    }

    fn set_current(&self, current: &Current, fingerprint: &str) -> Result<(), StoreError> {
        let value = |text: &str| HeaderValue::from_str(text).map_err(|_| self.unusable("the fingerprint is not text"));
        let (epoch, fingerprint) = (value(&current.epoch.to_string())?, value(fingerprint)?);
        // An empty value removes the metadata.
        let rotating = HeaderValue::from_static(if current.rotating { "true" } else { "" });
        let answer = self.send("write to", |urls| {
            Request::new(Method::POST, self.urls(urls, &[]), MOST_WORDS_BYTES)
                .header(EPOCH, epoch.clone())
                .header(FINGERPRINT, fingerprint.clone())
                .header(ROTATING, rotating.clone())
        })?;
        self.expect("write to", answer).map(drop)
    }

    fn get(&self, epoch: Epoch) -> Result<SealedKey, StoreError> {
        self.fetch(&format!("kek/{epoch}"))
    }

    fn create(&self, epoch: Epoch, key: &SealedKey) -> Result<(), StoreError> {
        self.create_object(&format!("kek/{epoch}"), &key.to_json())
    }

    fn reseal(&self, epoch: Epoch, key: &SealedKey) -> Result<(), StoreError> {
        self.replace_object(&format!("kek/{epoch}"), key)
    }

    fn delete(&self, epoch: Epoch) -> Result<(), StoreError> {
        self.delete_object(&format!("kek/{epoch}"))
    }

    fn epochs(&self) -> Result<Vec<Epoch>, StoreError> {
        let names = self.names("kek/")?;
        let mut epochs: Vec<Epoch> = names.iter().filter_map(|name| name.strip_prefix("kek/")?.parse().ok()).collect();
        epochs.sort_unstable();
        Ok(epochs)
    }
}

impl HostKeys for Swift {
    fn get(&self, host: &HostName) -> Result<SealedKey, StoreError> {
        // Never what one replica has: a host that was removed is to be told so, and to wipe what it has; so no other answer
        // may look like that one, such as that there is no container of this name.
        let name = format!("host/{host}");
        match self.newest(&name)? {
            Some(key) => Ok(key),
            None => self.head().and_then(|_| Err(self.not_found(&name))),
        }
    }

    fn create(&self, host: &HostName, key: &SealedKey) -> Result<(), StoreError> {
        self.create_object(&format!("host/{host}"), &key.to_json())
    }

    fn replace(&self, host: &HostName, key: &SealedKey) -> Result<(), StoreError> {
        self.replace_object(&format!("host/{host}"), key)
    }

    fn delete(&self, host: &HostName) -> Result<(), StoreError> {
        self.delete_object(&format!("host/{host}"))
    }

    fn hosts(&self) -> Result<Vec<HostName>, StoreError> {
        let names = self.names("host/")?;
        Ok(names.iter().filter_map(|name| name.strip_prefix("host/")?.parse().ok()).collect())
    }

    fn letters(&self) -> Option<&dyn Letters> {
        Some(self)
    }
}

impl Letters for Swift {
    fn read(&self, name: &str) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.small_object(name, MAX_SEALED_BYTES)?.map(|text| text.expose().to_vec()))
    }

    fn put(&self, name: &str, text: &[u8]) -> Result<(), StoreError> {
        self.put_object(name, text)
    }
}

impl std::fmt::Display for Swift {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the Swift container '{}'", self.container)
    }
}
