//! OpenStack's key manager as a store.
//!
//! Barbican gives out ids itself, takes the payload of a secret once, and gives what it has to whoever it trusts. So a
//! sealed key is an opaque secret of two steps: the id first, for the key is bound to it, then the payload. A re-sealed form
//! is another secret, which user metadata of the first one names. Keys that Cinder or castellan put there are released
//! unsealed. Source: Barbican's API guide, "Secrets", "Secret Metadata", "Orders".

mod consumers;
mod container_keys;
mod secrets;

use std::sync::Arc;

use base64ct::{Base64, Encoding};
use reqwest::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use secrets::{PayloadType, Secret};

use super::{
    Access, ContainerKeys, Facts, KeyStore, Kind, ObjectStore, Released, StoreError, StoreType, Stored, cloud::Service,
    pem,
};
use crate::{
    base::{
        chain::chain,
        key::{KeyId, Location, ManagedObject, ObjectFacts, Place, SealedKey, SecretBytes, StoreName},
    },
    config::{CloudConfig, ConfigError, Section, StoreConfig},
    keys::net::{
        Caller,
        http::{self, Request},
        keystone::{HOLE, Session, fill},
    },
};

/// How the names of our secrets begin.
const OURS: &str = "cryptattach ";
/// Name of the secrets that are sealed keys of ours.
const SEALED: &str = "cryptattach sealed key";
/// Name of the secrets that are re-sealed forms; nobody refers to them by id but the first form's metadata.
const RESEALED: &str = "cryptattach re-sealed key";
/// User metadata: the id of the re-sealed form.
const CURRENT: &str = "cryptattach-resealed";
/// User metadata: we ordered this key, and nobody got it since.
const FRESH: &str = "cryptattach-fresh";
/// User metadata: what a key was used for.
const USED_FOR: &str = "cryptattach-used-for";
/// User metadata: the volume that is being filled, see [`ObjectFacts::filling`].
const FILLING: &str = "cryptattach-filling";

const MOST_BYTES: usize = 512 * 1024;
/// How often an order is looked at before it counts as failed; servers without a queue are done at once.
const ORDER_LOOKS: u32 = 40;

/// `type = "barbican"`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BarbicanConfig {
    /// The cloud.
    #[serde(skip)]
    cloud: CloudConfig,
    /// What its container keys are filed under; the store's name unless given.
    container: Option<String>,
    /// URLs of the service, in place of the catalogue's.
    #[serde(default)]
    urls: Vec<String>,
    /// Log in as the caller of a hook, by the token in its request, as castellan does.
    #[serde(default = "yes")]
    caller_token: bool,
}

fn yes() -> bool {
    true
}

/// `barbican`
pub const TYPE: StoreType = StoreType { name: "barbican", keeps_host_keys: false, read: BarbicanConfig::kind };

impl BarbicanConfig {
    fn kind(section: &Section) -> Result<Box<dyn Kind>, ConfigError> {
        let (cloud, own) = section.part(&CloudConfig::MEMBERS);
        Ok(Box::new(Self { cloud: cloud.read()?, ..own.read()? }))
    }
}

impl Kind for BarbicanConfig {
    fn open(
        &self,
        name: &StoreName,
        config: &StoreConfig,
        caller: Option<Arc<Caller>>,
    ) -> Result<Box<dyn KeyStore>, StoreError> {
        Ok(Box::new(Barbican::open(self, name, config, caller)?))
    }

    fn describe(&self) -> String {
        "Barbican".to_owned()
    }

    fn service(&self) -> Option<Service<'_>> {
        Some(Service { cloud: &self.cloud, urls: &self.urls, releases: true })
    }

    fn takes_caller_token(&self) -> bool {
        self.caller_token
    }

    fn may_keep_unsealed_keys(&self) -> bool {
        true
    }

    fn no_access_lists(&self) -> Option<&'static str> {
        Some("Barbican's own roles and access lists decide who may use it")
    }

    fn make(&self, _: &StoreName, config: &StoreConfig, _: &Access<'_>) -> Option<Result<(), StoreError>> {
        config.sealing.seals().then_some(Ok(()))
    }

    fn facts(&self, name: &StoreName, config: &StoreConfig) -> Option<Result<Facts, StoreError>> {
        let facts = || Barbican::open(self, name, config, None).and_then(|barbican| barbican.facts_of_container());
        config.sealing.seals().then(facts)
    }
}

/// The key manager.
pub struct Barbican {
    /// What its container keys are filed under.
    container: String,
    session: Session,
    /// New keys are sealed by us.
    sealed: bool,
    /// The same as the configuration's user, who has the container keys; `None` if this is it.
    as_ourselves: Option<Box<Self>>,
}

impl Barbican {
    /// The service; nothing is asked yet.
    pub fn open(
        config: &BarbicanConfig,
        name: &StoreName,
        store: &StoreConfig,
        caller: Option<Arc<Caller>>,
    ) -> Result<Self, StoreError> {
        let caller = caller.filter(|_| config.caller_token);
        let sealed = store.sealing.seals();
        let as_ourselves = (sealed && caller.is_some()).then(|| Self::open(config, name, store, None));
        let as_ourselves = as_ourselves.transpose()?.map(Box::new);
        let session = Session::new(&config.cloud, &config.urls, &store.network, "key-manager", caller)?;
        let container = config.container.clone().unwrap_or_else(|| name.to_string());
        Ok(Self { container, session, sealed, as_ourselves })
    }

    /// The id of a key's current form, if it is not the first one.
    fn current(&self, id: &KeyId) -> Result<Option<KeyId>, StoreError> {
        Ok(self.metadata(id)?.get(CURRENT).and_then(Value::as_str).and_then(|text| text.parse().ok()))
    }

    /// A key's current form and, if it is not the first one, that one's id.
    fn sealed(&self, id: &KeyId) -> Result<(SealedKey, Option<KeyId>), StoreError> {
        let current = self.current(id)?;
        let bytes = self.payload(&current.unwrap_or(*id), PayloadType::Bytes)?;
        Ok((self.parse_sealed(id, &bytes)?, current))
    }

    /// What is known of an unsealed key, and what it was used for.
    fn facts(&self, id: &KeyId, secret: Secret) -> Result<(ObjectFacts, Option<String>), StoreError> {
        let metadata = self.metadata(id)?;
        let used_for = metadata.get(USED_FOR).and_then(Value::as_str).map(str::to_owned);
        let fresh = metadata.contains_key(FRESH) && used_for.is_none();
        let filling = metadata.get(FILLING).and_then(Value::as_str).map(str::to_owned);
        Ok((ObjectFacts { fresh, filling, ..secret.facts() }, used_for))
    }

    /// Replaces the form `stored`, which the secret `before` has or else the first one, by a later one.
    fn replace(
        &self,
        id: &KeyId,
        stored: &SealedKey,
        before: Option<KeyId>,
        key: &SealedKey,
    ) -> Result<(), StoreError> {
        let generation = |key: &SealedKey| key.claimed_generation().unwrap_or_default();
        if generation(key) <= generation(stored) {
            return Err(StoreError::Outdated { id: id.to_string(), generation: generation(stored) });
        }
        let next = self.begin(RESEALED)?;
        let replaced = self.fill(&next, key).and_then(|()| self.set_metadata(id, CURRENT, &next.to_string()));
        replaced.inspect_err(|error| {
            // Nothing refers to it. After an answer that got lost, something may.
            if !matches!(error, StoreError::Unreachable { .. }) {
                self.abandon_secret(&next);
            }
        })?;
        // Of two that re-seal at the same time, the second one's form stays.
        if self.current(id)? != Some(next) {
            self.abandon_secret(&next);
            return Err(StoreError::Outdated { id: id.to_string(), generation: generation(key) });
        }
        if let Some(before) = before {
            self.abandon_secret(&before);
        }
        Ok(())
    }

    fn abandon_secret(&self, id: &KeyId) {
        if let Err(error) = self.delete_secret(id) {
            tracing::warn!("cannot delete the unneeded secret {id} from Barbican: {}", chain(&error));
        }
    }

    fn secret(&self, id: &KeyId) -> Result<Secret, StoreError> {
        let answer = self.find(&["secrets", &id.to_string()], "application/json")?;
        self.parse(&answer.ok_or_else(|| self.not_found(id))?)
    }

    fn parse_sealed(&self, id: &KeyId, bytes: &SecretBytes) -> Result<SealedKey, StoreError> {
        let malformed = |source| StoreError::Malformed { what: format!("{self}/{id}"), source };
        let key = SealedKey::from_json(bytes.expose()).map_err(malformed)?;
        key.claimed_context_of(id).map_err(malformed)?;
        Ok(key)
    }
}

impl KeyStore for Barbican {
    fn as_one(&mut self) {
        self.session.as_one();
    }

    fn warm(&mut self) {
        self.session.warm();
    }

    fn new_id(&self) -> Result<KeyId, StoreError> {
        self.begin(SEALED)
    }

    /// Barbican makes the ids of its secrets itself.
    fn takes_any_id(&self) -> bool {
        false
    }

    fn get(&self, id: &KeyId) -> Result<Stored, StoreError> {
        let secret = self.secret(id)?;
        if secret.name.as_deref() == Some(SEALED) {
            return self.sealed(id).map(|(key, _)| Stored::Sealed(key));
        }
        let value = self.payload(id, secret.payload_type())?;
        // Barbican accepts malformed base64 and keeps nothing of it.
        if value.is_empty() {
            return Err(self.wrong("read from", format!("the secret {id} is empty")));
        }
        let (facts, used_for) = self.facts(id, secret)?;
        let value = pem::from_pem(facts.kind, value)
            .map_err(|error| self.wrong("read from", format!("the secret {id}: {error}")))?;
        Ok(Stored::Released(Released { object: ManagedObject { facts, value }, used_for }))
    }

    fn released_facts(&self, id: &KeyId) -> Result<Option<ObjectFacts>, StoreError> {
        let secret = self.secret(id)?;
        if secret.name.as_deref() == Some(SEALED) {
            return Ok(None);
        }
        self.facts(id, secret).map(|(facts, _)| Some(facts))
    }

    fn create(&self, id: &KeyId, key: &SealedKey) -> Result<(), StoreError> {
        self.fill(id, key).inspect_err(|error| {
            // What was begun for this key and not filled.
            if !matches!(error, StoreError::Exists { .. } | StoreError::NotFound { .. }) {
                self.abandon(id);
            }
        })
    }

    fn abandon(&self, id: &KeyId) {
        self.abandon_secret(id);
    }

    fn reseal(&self, id: &KeyId, key: &SealedKey) -> Result<(), StoreError> {
        let (stored, before) = self.sealed(id)?;
        self.replace(id, &stored, before, key)
    }

    fn delete(&self, id: &KeyId) -> Result<(), StoreError> {
        if let Some(current) = self.current(id)? {
            self.delete_secret(&current)?;
        }
        if self.delete_secret(id)? { Ok(()) } else { Err(self.not_found(id)) }
    }

    fn list(&self) -> Result<Vec<KeyId>, StoreError> {
        // Without an owner to seal to, the keys are those that others put there.
        if self.sealed {
            return self.secrets(Some(SEALED), |_| true);
        }
        self.secrets(None, |secret| !secret.name().is_some_and(|name| name.starts_with(OURS)))
    }

    fn places(&self, _: &KeyId) -> Result<Vec<Place>, StoreError> {
        let at = Location::Elsewhere {
            name: self.to_string(),
            why: "this host cannot see the disks of its database and its key store".to_owned(),
        };
        Ok(vec![Place { what: if self.sealed { "sealed key" } else { "key" }.to_owned(), at, opens: true }])
    }

    fn mark_used(&self, id: &KeyId, what: &str, filling: Option<&str>) -> Result<(), StoreError> {
        let mut metadata = self.metadata(id)?;
        metadata.remove(FRESH);
        if metadata.remove(FILLING).is_some() || !metadata.contains_key(USED_FOR) {
            metadata.insert(USED_FOR.to_owned(), what.into());
        }
        metadata.extend(filling.map(|volume| (FILLING.to_owned(), volume.into())));
        self.put_metadata(id, &metadata)?;
        if self.metadata(id)? == metadata {
            Ok(())
        } else {
            Err(self.wrong("write to", "it did not keep the metadata that it accepted"))
        }
    }

    fn container_keys(&self) -> Option<&dyn ContainerKeys> {
        self.sealed.then_some(self.as_ourselves.as_deref().unwrap_or(self))
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
        let ordered_id =
            ordered["order_ref"].as_str().and_then(|text| text.rsplit('/').next()).unwrap_or_default().to_owned();
        for _ in 0..ORDER_LOOKS {
            let answer = self.find(&["orders", &ordered_id], "application/json")?;
            let order: Value = answer.map(|answer| self.parse(&answer)).transpose()?.unwrap_or_default();
            match order["status"].as_str() {
                Some("ACTIVE") => {
                    let id = self.id_of(order["secret_ref"].as_str().unwrap_or_default())?;
                    self.forget_order(&ordered_id);
                    let marked = self.set_metadata(&id, FRESH, "true");
                    // A key that was ordered and is not handed to anybody must not stay.
                    return marked.map(|()| id).inspect_err(|_| self.abandon(&id));
                }
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
        let pem = pem::to_pem(facts.kind, &object.value).map_err(|error| self.wrong("write to", error.to_string()))?;
        let value = pem.as_ref().unwrap_or(&object.value);
        let mut text = SecretBytes::zeroed(Base64::encoded_len(value.expose()))?;
        let encoded = Base64::encode(value.expose(), text.expose_mut()).map(str::len).unwrap_or_default();
        text.truncate(encoded);
        // Always bytes, as castellan's own driver does: what is text there, it would read as another type.
        let mut body = json!({
            "name": facts.name,
            "secret_type": facts.kind,
            "algorithm": facts.algorithm,
            "bit_length": facts.bit_length,
            "payload": HOLE,
            "payload_content_type": "application/octet-stream",
            "payload_content_encoding": "base64",
        });
        leave_out_nulls(&mut body);
        let id = self.post_secret(http::secret_body(fill(&body, &text)?))?;
        if facts.fresh {
            self.set_metadata(&id, FRESH, "true").inspect_err(|_| self.abandon(&id))?;
        }
        Ok(id)
    }
}

/// Barbican's schemas know absence, not null.
fn leave_out_nulls(json: &mut Value) {
    if let Value::Object(members) = json {
        members.retain(|_, value| !value.is_null());
    }
}

impl std::fmt::Display for Barbican {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Barbican")
    }
}
