//! Barbican's secrets: found, begun, filled, listed, deleted, and their user metadata.

use base64ct::{Base64, Encoding};
use reqwest::{Method, StatusCode, Url, header::HeaderValue};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Barbican, MOST_BYTES};
use crate::{
    base::{
        chain::chain,
        key::{KeyId, ObjectFacts, ObjectKind, SealedKey, SecretBytes},
    },
    keys::{
        net::{
            http::{self, HttpAnswer, Request},
            keystone::SendError,
        },
        store::StoreError,
    },
};

const PAGE: usize = 100;

/// `GET /v1/secrets/{id}`
#[derive(Deserialize)]
pub(super) struct Secret {
    secret_type: String,
    pub(super) name: Option<String>,
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
pub(super) enum PayloadType {
    Bytes,
    Text,
}

#[derive(Deserialize)]
pub(super) struct Reference {
    secret_ref: String,
}

#[derive(Deserialize)]
pub(super) struct Listed {
    secret_ref: String,
    name: Option<String>,
    content_types: Option<ContentTypes>,
}

impl Listed {
    pub(super) fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }
}

impl Barbican {
    pub(super) fn urls(urls: &[Url], path: &[&str]) -> Vec<Url> {
        let versioned = |url: &Url| url.path().trim_end_matches('/').ends_with("/v1");
        let below = |url: &Url| {
            let url = if versioned(url) { url.clone() } else { http::below(url, &["v1"]) };
            http::below(&url, path)
        };
        urls.iter().map(below).collect()
    }

    pub(super) fn send(
        &self,
        action: &'static str,
        build: impl Fn(&[Url]) -> Request,
    ) -> Result<HttpAnswer, StoreError> {
        self.session.send(build).map_err(|source| self.unreachable(action, source))
    }

    pub(super) fn unreachable(&self, action: &'static str, source: SendError) -> StoreError {
        StoreError::Unreachable { action, at: self.to_string(), source: Box::new(source) }
    }

    pub(super) fn expect(&self, action: &'static str, answer: HttpAnswer) -> Result<HttpAnswer, StoreError> {
        if answer.status.is_success() {
            return Ok(answer);
        }
        let said = http::reason(&answer).map(|said| format!(": {said}")).unwrap_or_default();
        match answer.status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                let said = http::reason(&answer).unwrap_or_else(|| format!("it answers {}", answer.status));
                let hint = if said.to_lowercase().contains("quota") {
                    "raise the project's quota in Barbican, or delete keys that nobody needs any more"
                } else {
                    "check the project and roles of the user, by whose token Barbican judges, and the secret's access list"
                };
                Err(StoreError::Refused { action, at: self.to_string(), said, hint })
            }
            status => Err(self.wrong(action, format!("it answers {status}{said}"))),
        }
    }

    pub(super) fn wrong(&self, action: &'static str, what: impl Into<String>) -> StoreError {
        StoreError::Answer { action, at: self.to_string(), what: what.into() }
    }

    pub(super) fn not_found(&self, id: &KeyId) -> StoreError {
        StoreError::NotFound { id: id.to_string(), at: self.to_string() }
    }

    /// `None` if there is no such secret.
    pub(super) fn find(&self, path: &[&str], accept: &'static str) -> Result<Option<HttpAnswer>, StoreError> {
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

    pub(super) fn parse<T: for<'a> Deserialize<'a>>(&self, answer: &HttpAnswer) -> Result<T, StoreError> {
        serde_json::from_slice(answer.body.expose())
            .map_err(|error| self.wrong("read from", format!("its answer is not understood ({:?})", error.classify())))
    }

    /// Barbican wants to be asked for exactly the type that was stored.
    pub(super) fn payload(&self, id: &KeyId, kind: PayloadType) -> Result<SecretBytes, StoreError> {
        let accept = match kind {
            PayloadType::Bytes => "application/octet-stream",
            PayloadType::Text => "text/plain",
        };
        let answer = self.find(&["secrets", &id.to_string(), "payload"], accept)?;
        Ok(answer.ok_or_else(|| self.not_found(id))?.body)
    }

    pub(super) fn metadata(&self, id: &KeyId) -> Result<serde_json::Map<String, Value>, StoreError> {
        #[derive(Deserialize)]
        struct Metadata {
            metadata: serde_json::Map<String, Value>,
        }
        match self.find(&["secrets", &id.to_string(), "metadata"], "application/json")? {
            Some(answer) => Ok(self.parse::<Metadata>(&answer)?.metadata),
            None => Ok(serde_json::Map::new()),
        }
    }

    pub(super) fn set_metadata(&self, id: &KeyId, name: &str, value: &str) -> Result<(), StoreError> {
        let mut metadata = self.metadata(id)?;
        metadata.insert(name.to_owned(), value.into());
        self.put_metadata(id, &metadata)
    }

    pub(super) fn put_metadata(&self, id: &KeyId, metadata: &serde_json::Map<String, Value>) -> Result<(), StoreError> {
        let body = json!({"metadata": metadata}).to_string();
        let answer = self.send("write to", |urls| {
            Request::new(Method::PUT, Self::urls(urls, &["secrets", &id.to_string(), "metadata"]), MOST_BYTES)
                .body("application/json", body.clone())
        })?;
        self.expect("write to", answer).map(drop)
    }

    /// A secret without payload.
    pub(super) fn begin(&self, name: &str) -> Result<KeyId, StoreError> {
        let body = json!({"name": name, "secret_type": "opaque"}).to_string();
        self.post_secret(body.into())
    }

    pub(super) fn post_secret(&self, body: bytes::Bytes) -> Result<KeyId, StoreError> {
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
    pub(super) fn id_of(&self, reference: &str) -> Result<KeyId, StoreError> {
        let id = reference.rsplit('/').next().and_then(|id| id.parse().ok());
        id.ok_or_else(|| self.wrong("read from", format!("'{reference}' is not a reference to a secret")))
    }

    pub(super) fn fill(&self, id: &KeyId, key: &SealedKey) -> Result<(), StoreError> {
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

    pub(super) fn delete_secret(&self, id: &KeyId) -> Result<bool, StoreError> {
        let answer = self.send("delete from", |urls| {
            Request::new(Method::DELETE, Self::urls(urls, &["secrets", &id.to_string()]), MOST_BYTES)
        })?;
        match answer.status {
            // Sent twice, the first one may have deleted it.
            StatusCode::NOT_FOUND => Ok(answer.repeated),
            _ => self.expect("delete from", answer).map(|_| true),
        }
    }

    /// An order that is done only stands around.
    pub(super) fn forget_order(&self, order: &str) {
        let forgotten = self
            .send("delete from", |urls| Request::new(Method::DELETE, Self::urls(urls, &["orders", order]), MOST_BYTES));
        if let Err(error) = forgotten.and_then(|answer| self.expect("delete from", answer)) {
            tracing::debug!("cannot delete the order {order}: {}", chain(&error));
        }
    }

    /// The ids of all secrets with a payload, of this name if one is given, that `keep` says yes to.
    pub(super) fn secrets(&self, name: Option<&str>, keep: impl Fn(&Listed) -> bool) -> Result<Vec<KeyId>, StoreError> {
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
                    let mut query = url.query_pairs_mut();
                    query.append_pair("limit", &limit).append_pair("offset", &offset);
                    query.extend_pairs(name.map(|name| ("name", name)));
                }
                Request::new(Method::GET, urls, MOST_BYTES)
            })?;
            let page: Page = self.parse(&self.expect("list", answer)?)?;
            seen += page.secrets.len();
            let named = |secret: &Listed| name.is_none_or(|name| secret.name() == Some(name));
            let kept =
                page.secrets.iter().filter(|secret| secret.content_types.is_some() && named(secret) && keep(secret));
            ids.extend(kept.filter_map(|secret| self.id_of(&secret.secret_ref).ok()));
            if page.secrets.is_empty() || seen >= page.total {
                ids.sort_unstable();
                return Ok(ids);
            }
        }
    }
}

impl Secret {
    pub(super) fn payload_type(&self) -> PayloadType {
        match &self.content_types {
            Some(types) if types.default.starts_with("text/plain") => PayloadType::Text,
            _ => PayloadType::Bytes,
        }
    }

    pub(super) fn facts(self) -> ObjectFacts {
        let kind = serde_json::from_value(Value::String(self.secret_type)).unwrap_or(ObjectKind::Opaque);
        let created = self.created.as_deref().and_then(seconds);
        ObjectFacts {
            kind,
            algorithm: self.algorithm,
            bit_length: self.bit_length,
            name: self.name,
            created,
            fresh: false,
            filling: None,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        base::{advice::Advice, exit::Exit},
        keys::{
            net::testing::{cloud, serve},
            store::barbican::BarbicanConfig,
        },
    };

    #[test]
    fn a_refusal_is_told_in_barbicans_words_with_a_hint_that_fits() {
        let refused = |said: &'static str| {
            let url = serve(move |_| (403, String::new(), format!(r#"{{"code": 403, "description": "{said}"}}"#)));
            let (cloud, _folder) = cloud(&format!("{{auth_type: token, auth: {{auth_url: \"{url}\", token: t}}}}"));
            let config = BarbicanConfig { cloud, urls: vec![url], container: None, caller_token: true };
            let section = toml::from_str("type = 'barbican'").unwrap();
            let barbican = Barbican::open(&config, &"b".parse().unwrap(), &section, None).unwrap();
            let error = barbican.secrets(None, |_| true).unwrap_err();
            assert!(error.exit() == Exit::PermissionDenied && error.is_denial());
            (error.to_string(), error.next_step().unwrap())
        };
        let (text, next) = refused("Quota reached for project 7ed2. Only 10 secrets are allowed.");
        assert!(text.contains("Only 10 secrets are allowed") && next.contains("quota"), "{text} {next}");
        let (text, next) = refused("Secret retrieval attempt not allowed");
        assert!(text.contains("attempt not allowed") && !next.contains("quota"), "{text} {next}");
        assert!(!next.contains("container show"), "{next}");
    }

    #[test]
    fn reads_barbicans_times() {
        assert_eq!(super::seconds("2026-11-23T14:35:24.123456"), Some(1_795_444_524));
        assert_eq!(super::seconds("1970-01-01T00:00:01"), Some(1));
        assert_eq!(super::seconds("yesterday"), None);
    }
}
