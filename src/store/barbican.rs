//! OpenStack's key manager as a store.
//!
//! Barbican gives out ids itself, takes the payload of a secret once, and gives what it has to whoever it trusts. So a
//! sealed key is an opaque secret of two steps: the id first, for the key is bound to it, then the payload. A re-sealed form
//! is another secret, which user metadata of the first one names. Keys that Cinder or castellan put there are released
//! unsealed. Source: Barbican's API guide, "Secrets", "Secret Metadata", "Orders".

use base64ct::{Base64, Encoding};
use reqwest::{Method, StatusCode, Url, header::HeaderValue};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    KeyStore, ObjectStore, Released, StoreError, Stored,
    http::{self, Answer, Request},
    keystone::{HOLE, SendError, Session, fill},
};
use crate::{
    config::{BarbicanConfig, Network},
    key::{KeyId, Location, MalformedSealedKey, ManagedObject, ObjectFacts, ObjectKind, Place, SealedKey, SecretBytes},
};

/// Name of the secrets that are sealed keys of ours.
const SEALED: &str = "cryptattach sealed key";
/// Name of the secrets that are re-sealed forms; nobody refers to them by id but the first form's metadata.
const RESEALED: &str = "cryptattach re-sealed key";
/// User metadata: the id of the re-sealed form.
const CURRENT: &str = "cryptattach-resealed";
/// User metadata: the volume that was formatted with a key.
const USED_FOR: &str = "cryptattach-used-for";

const MOST_BYTES: usize = 512 * 1024;
const PAGE: usize = 100;
/// How often an order is looked at before it counts as failed; servers without a queue are done at once.
const ORDER_LOOKS: u32 = 40;

/// The key manager.
pub struct Barbican {
    session: Session,
    /// New keys are sealed by us.
    sealed: bool,
}

/// `GET /v1/secrets/{id}`
#[derive(Deserialize)]
struct Secret {
    secret_type: String,
    name: Option<String>,
    algorithm: Option<String>,
    bit_length: Option<u32>,
    created: Option<String>,
    /// Absent until there is a payload.
    content_types: Option<ContentTypes>,
}

#[derive(Deserialize)]
struct ContentTypes {
    default: String,
}

#[derive(Clone, Copy)]
enum PayloadType {
    Bytes,
    Text,
}

#[derive(Deserialize)]
struct Reference {
    secret_ref: String,
}

impl Barbican {
    /// The service; nothing is asked yet. `sealed`: new keys are sealed by us.
    pub fn open(
        config: &BarbicanConfig,
        network: &Network,
        sealed: bool,
        caller: Option<SecretBytes>,
    ) -> Result<Self, StoreError> {
        let caller = caller.filter(|_| config.caller_token);
        Ok(Self { session: Session::new(&config.cloud, &config.urls, network, "key-manager", caller)?, sealed })
    }

    fn urls(urls: &[Url], path: &[&str]) -> Vec<Url> {
        let versioned = |url: &Url| url.path().trim_end_matches('/').ends_with("/v1");
        let below = |url: &Url| {
            let url = if versioned(url) { url.clone() } else { http::below(url, &["v1"]) };
            http::below(&url, path)
        };
        urls.iter().map(below).collect()
    }

    fn send(&self, action: &'static str, build: impl Fn(&[Url]) -> Request) -> Result<Answer, StoreError> {
        self.session.send(build).map_err(|source| self.unreachable(action, source))
    }

    fn unreachable(&self, action: &'static str, source: SendError) -> StoreError {
        StoreError::Unreachable { action, at: self.to_string(), source: Box::new(source) }
    }

    fn expect(&self, action: &'static str, answer: Answer) -> Result<Answer, StoreError> {
        if answer.status.is_success() {
            return Ok(answer);
        }
        let said = http::reason(&answer).map(|said| format!(": {said}")).unwrap_or_default();
        match answer.status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                Err(StoreError::Denied { action, at: self.to_string() })
            }
            status => Err(self.wrong(action, format!("it answers {status}{said}"))),
        }
    }

    fn wrong(&self, action: &'static str, what: impl Into<String>) -> StoreError {
        StoreError::Answer { action, at: self.to_string(), what: what.into() }
    }

    fn not_found(&self, id: &KeyId) -> StoreError {
        StoreError::NotFound { id: id.to_string(), at: self.to_string() }
    }

    /// `None` if there is no such secret.
    fn find(&self, path: &[&str], accept: &'static str) -> Result<Option<Answer>, StoreError> {
        let answer = self.send("read from", |urls| {
            Request::new(Method::GET, Self::urls(urls, path), MOST_BYTES)
                .header("accept", HeaderValue::from_static(accept))
        })?;
        // A metadata-only secret has no payload: a key that was begun and never stored.
        if answer.status == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        self.expect("read from", answer).map(Some)
    }

    fn parse<T: for<'a> Deserialize<'a>>(&self, answer: &Answer) -> Result<T, StoreError> {
        serde_json::from_slice(answer.body.expose())
            .map_err(|error| self.wrong("read from", format!("its answer is not understood ({:?})", error.classify())))
    }

    /// Barbican wants to be asked for exactly the type that was stored.
    fn payload(&self, id: &KeyId, kind: PayloadType) -> Result<SecretBytes, StoreError> {
        let accept = match kind {
            PayloadType::Bytes => "application/octet-stream",
            PayloadType::Text => "text/plain",
        };
        let answer = self.find(&["secrets", &id.to_string(), "payload"], accept)?;
        Ok(answer.ok_or_else(|| self.not_found(id))?.body)
    }

    fn metadata(&self, id: &KeyId) -> Result<serde_json::Map<String, Value>, StoreError> {
        #[derive(Deserialize)]
        struct Metadata {
            metadata: serde_json::Map<String, Value>,
        }
        match self.find(&["secrets", &id.to_string(), "metadata"], "application/json")? {
            Some(answer) => Ok(self.parse::<Metadata>(&answer)?.metadata),
            None => Ok(serde_json::Map::new()),
        }
    }

    fn set_metadata(&self, id: &KeyId, name: &str, value: &str) -> Result<(), StoreError> {
        let mut metadata = self.metadata(id)?;
        metadata.insert(name.to_owned(), value.into());
        let body = json!({"metadata": metadata}).to_string();
        let answer = self.send("write to", |urls| {
            Request::new(Method::PUT, Self::urls(urls, &["secrets", &id.to_string(), "metadata"]), MOST_BYTES)
                .body("application/json", body.clone())
        })?;
        self.expect("write to", answer).map(drop)
    }

    /// A key's current form and, if it is not the first one, that one's id.
    fn sealed(&self, id: &KeyId) -> Result<(SealedKey, Option<KeyId>), StoreError> {
        let current = self.metadata(id)?.get(CURRENT).and_then(Value::as_str).and_then(|text| text.parse().ok());
        let bytes = self.payload(&current.unwrap_or(*id), PayloadType::Bytes)?;
        Ok((self.parse_sealed(id, &bytes)?, current))
    }

    fn parse_sealed(&self, id: &KeyId, bytes: &SecretBytes) -> Result<SealedKey, StoreError> {
        let malformed = |source| StoreError::Malformed { what: format!("{self}/{id}"), source };
        let key = SealedKey::from_json(bytes.expose()).map_err(malformed)?;
        let claimed = key.claimed_context().map_err(malformed)?;
        if claimed.key_id != *id {
            return Err(malformed(MalformedSealedKey::OtherKey(claimed.key_id)));
        }
        Ok(key)
    }

    /// A secret without payload.
    fn begin(&self, name: &str) -> Result<KeyId, StoreError> {
        let body = json!({"name": name, "secret_type": "opaque"}).to_string();
        self.post_secret(body.into())
    }

    fn post_secret(&self, body: bytes::Bytes) -> Result<KeyId, StoreError> {
        let answer = self.send("write to", |urls| {
            // Sent twice it would make two secrets.
            Request::new(Method::POST, Self::urls(urls, &["secrets"]), MOST_BYTES)
                .body("application/json", body.clone())
                .once()
        })?;
        let answer = self.expect("write to", answer)?;
        self.id_of(&self.parse::<Reference>(&answer)?.secret_ref)
    }

    /// The id at the end of a reference. Its host is Barbican's idea of itself and is not followed.
    fn id_of(&self, reference: &str) -> Result<KeyId, StoreError> {
        let id = reference.rsplit('/').next().and_then(|id| id.parse().ok());
        id.ok_or_else(|| self.wrong("read from", format!("'{reference}' is no reference to a secret")))
    }

    fn fill(&self, id: &KeyId, key: &SealedKey) -> Result<(), StoreError> {
        let bytes = key.to_json();
        let body = Base64::encode_string(&bytes);
        let answer = self.send("write to", |urls| {
            Request::new(Method::PUT, Self::urls(urls, &["secrets", &id.to_string()]), MOST_BYTES)
                .body("application/octet-stream", body.clone())
                .header("content-encoding", HeaderValue::from_static("base64"))
        })?;
        match answer.status {
            StatusCode::NOT_FOUND => return Err(self.not_found(id)),
            // Also for a first try whose answer was lost: what is there decides.
            StatusCode::CONFLICT => {}
            _ => drop(self.expect("write to", answer)?),
        }
        if self.payload(id, PayloadType::Bytes)?.expose() == bytes {
            Ok(())
        } else {
            Err(StoreError::Exists { id: id.to_string(), at: self.to_string() })
        }
    }

    fn delete_secret(&self, id: &KeyId) -> Result<bool, StoreError> {
        let answer = self.send("delete from", |urls| {
            Request::new(Method::DELETE, Self::urls(urls, &["secrets", &id.to_string()]), MOST_BYTES)
        })?;
        if answer.status == StatusCode::NOT_FOUND {
            return Ok(false);
        }
        self.expect("delete from", answer).map(|_| true)
    }

    /// The ids of all secrets with a payload that `keep` says yes to.
    fn secrets(&self, keep: impl Fn(&Listed) -> bool) -> Result<Vec<KeyId>, StoreError> {
        #[derive(Deserialize)]
        struct Page {
            secrets: Vec<Listed>,
            total: usize,
        }
        let (mut ids, mut seen) = (Vec::new(), 0);
        loop {
            let (offset, limit) = (seen.to_string(), PAGE.to_string());
            let answer = self.send("list", |urls| {
                let mut urls = Self::urls(urls, &["secrets"]);
                for url in &mut urls {
                    url.query_pairs_mut().append_pair("limit", &limit).append_pair("offset", &offset);
                }
                Request::new(Method::GET, urls, MOST_BYTES)
            })?;
            let page: Page = self.parse(&self.expect("list", answer)?)?;
            seen += page.secrets.len();
            let kept = page.secrets.iter().filter(|secret| secret.content_types.is_some() && keep(secret));
            ids.extend(kept.filter_map(|secret| self.id_of(&secret.secret_ref).ok()));
            if page.secrets.is_empty() || seen >= page.total {
                ids.sort_unstable();
                return Ok(ids);
            }
        }
    }
}

#[derive(Deserialize)]
struct Listed {
    secret_ref: String,
    name: Option<String>,
    content_types: Option<ContentTypes>,
}

impl Listed {
    fn is_named(&self, name: &str) -> bool {
        self.name.as_deref() == Some(name)
    }
}

impl KeyStore for Barbican {
    fn new_id(&self) -> Result<KeyId, StoreError> {
        self.begin(SEALED)
    }

    fn get(&self, id: &KeyId) -> Result<Stored, StoreError> {
        let answer = self.find(&["secrets", &id.to_string()], "application/json")?;
        let secret: Secret = self.parse(&answer.ok_or_else(|| self.not_found(id))?)?;
        if secret.name.as_deref() == Some(SEALED) {
            return self.sealed(id).map(|(key, _)| Stored::Sealed(key));
        }
        let value = self.payload(id, secret.payload_type())?;
        // Barbican takes base64 that is none and keeps nothing of it.
        if value.is_empty() {
            return Err(self.wrong("read from", format!("the secret {id} is empty")));
        }
        let used_for = self.metadata(id)?.get(USED_FOR).and_then(Value::as_str).map(str::to_owned);
        Ok(Stored::Released(Released { object: ManagedObject { facts: secret.facts(), value }, used_for }))
    }

    fn create(&self, id: &KeyId, key: &SealedKey) -> Result<(), StoreError> {
        self.fill(id, key).inspect_err(|error| {
            // What was begun for this key and not filled.
            if !matches!(error, StoreError::Exists { .. } | StoreError::NotFound { .. }) {
                let _ = self.delete_secret(id);
            }
        })
    }

    fn reseal(&self, id: &KeyId, key: &SealedKey) -> Result<(), StoreError> {
        let (stored, before) = self.sealed(id)?;
        let generation = |key: &SealedKey| key.claimed_context().map_or(0, |context| context.generation);
        if generation(key) <= generation(&stored) {
            return Err(StoreError::Outdated { id: id.to_string(), generation: generation(&stored) });
        }
        let next = self.begin(RESEALED)?;
        self.fill(&next, key)?;
        self.set_metadata(id, CURRENT, &next.to_string())?;
        if let Some(before) = before {
            self.delete_secret(&before)?;
        }
        Ok(())
    }

    fn delete(&self, id: &KeyId) -> Result<(), StoreError> {
        let current = self.metadata(id)?.get(CURRENT).and_then(Value::as_str).and_then(|text| text.parse().ok());
        if let Some(current) = current {
            self.delete_secret(&current)?;
        }
        if self.delete_secret(id)? { Ok(()) } else { Err(self.not_found(id)) }
    }

    fn list(&self) -> Result<Vec<KeyId>, StoreError> {
        // Without an owner to seal to, the keys are those that others put there.
        self.secrets(|secret| if self.sealed { secret.is_named(SEALED) } else { !secret.is_named(RESEALED) })
    }

    fn places(&self, _: &KeyId) -> Result<Vec<Place>, StoreError> {
        let at = Location::Elsewhere {
            name: self.to_string(),
            why: "which disks its database and its key store are on cannot be seen from here".to_owned(),
        };
        Ok(vec![Place { what: if self.sealed { "sealed key" } else { "key" }.to_owned(), at, opens: true }])
    }

    fn objects(&self) -> Option<&dyn ObjectStore> {
        (!self.sealed).then_some(self)
    }
}

impl ObjectStore for Barbican {
    fn order(&self, facts: &ObjectFacts) -> Result<KeyId, StoreError> {
        let mut meta = json!({
            "name": facts.name,
            "algorithm": facts.algorithm.as_deref().unwrap_or("aes").to_lowercase(),
            "bit_length": facts.bit_length.unwrap_or(256),
            "payload_content_type": "application/octet-stream",
        });
        // Barbican makes keys of 512 bits for XTS only, which is what they are for.
        if facts.bit_length == Some(512) {
            meta["mode"] = "xts".into();
        }
        leave_out_nulls(&mut meta);
        let body = json!({"type": "key", "meta": meta}).to_string();
        let answer = self.send("order a key of", |urls| {
            Request::new(Method::POST, Self::urls(urls, &["orders"]), MOST_BYTES)
                .body("application/json", body.clone())
                .once()
        })?;
        let ordered: Value = self.parse(&self.expect("order a key of", answer)?)?;
        let order =
            ordered["order_ref"].as_str().and_then(|text| text.rsplit('/').next()).unwrap_or_default().to_owned();
        for _ in 0..ORDER_LOOKS {
            let answer = self.find(&["orders", &order], "application/json")?;
            let order: Value = answer.map(|answer| self.parse(&answer)).transpose()?.unwrap_or_default();
            match order["status"].as_str() {
                Some("ACTIVE") => return self.id_of(order["secret_ref"].as_str().unwrap_or_default()),
                Some("ERROR") => {
                    let why = order["error_reason"].as_str().unwrap_or("it does not say why");
                    return Err(self.wrong("order a key of", why));
                }
                _ => std::thread::sleep(std::time::Duration::from_millis(250)),
            }
        }
        Err(self.wrong("order a key of", "the order is still pending"))
    }

    fn create(&self, object: &ManagedObject) -> Result<KeyId, StoreError> {
        let facts = &object.facts;
        let mut text = SecretBytes::zeroed(Base64::encoded_len(object.value.expose()))?;
        let encoded = Base64::encode(object.value.expose(), text.expose_mut()).map(str::len).unwrap_or_default();
        text.truncate(encoded);
        // Castellan's own driver: passphrases are text, all else is bytes.
        let passphrase = facts.kind == ObjectKind::Passphrase && std::str::from_utf8(object.value.expose()).is_ok();
        let mut body = json!({
            "name": facts.name,
            "secret_type": facts.kind,
            "algorithm": facts.algorithm,
            "bit_length": facts.bit_length,
            "payload": HOLE,
            "payload_content_type": if passphrase { "text/plain" } else { "application/octet-stream" },
        });
        if !passphrase {
            body["payload_content_encoding"] = "base64".into();
        }
        leave_out_nulls(&mut body);
        self.post_secret(http::secret_body(fill(&body, if passphrase { &object.value } else { &text })?))
    }

    fn mark_used(&self, id: &KeyId, volume: &str) -> Result<(), StoreError> {
        self.set_metadata(id, USED_FOR, volume)?;
        let stored = self.metadata(id)?.get(USED_FOR).and_then(Value::as_str).map(str::to_owned);
        if stored.as_deref() == Some(volume) {
            Ok(())
        } else {
            Err(self.wrong("write to", "it forgets what it was told"))
        }
    }
}

/// Barbican's schemas know absence, not null.
fn leave_out_nulls(json: &mut Value) {
    if let Value::Object(members) = json {
        members.retain(|_, value| !value.is_null());
    }
}

impl Secret {
    fn payload_type(&self) -> PayloadType {
        match &self.content_types {
            Some(types) if types.default.starts_with("text/plain") => PayloadType::Text,
            _ => PayloadType::Bytes,
        }
    }

    fn facts(self) -> ObjectFacts {
        let kind = serde_json::from_value(Value::String(self.secret_type)).unwrap_or(ObjectKind::Opaque);
        let created = self.created.as_deref().and_then(seconds);
        ObjectFacts {
            kind,
            algorithm: self.algorithm,
            bit_length: self.bit_length,
            name: self.name,
            created,
            given_out: false,
        }
    }
}

/// "2026-11-23T14:35:24" or "...24.123456", UTC, as seconds since 1970.
fn seconds(text: &str) -> Option<u64> {
    let digits: String = text.split('.').next()?.chars().filter(char::is_ascii_digit).collect();
    let time = openssl::asn1::Asn1Time::from_str(&format!("{digits}Z")).ok()?;
    let since = openssl::asn1::Asn1Time::from_unix(0).ok()?.diff(&time).ok()?;
    u64::try_from(i64::from(since.days) * 86400 + i64::from(since.secs)).ok()
}

impl std::fmt::Display for Barbican {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Barbican")
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn reads_barbicans_times() {
        assert_eq!(super::seconds("2026-11-23T14:35:24.123456"), Some(1_795_444_524));
        assert_eq!(super::seconds("1970-01-01T00:00:01"), Some(1));
        assert_eq!(super::seconds("yesterday"), None);
    }
}
