//! A store in memory for unit tests: it answers, fails, is out of reach or lies, as a test tells it.
//!
//! Clones share what is stored, so a test keeps one and hands the other in.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    io,
    str::FromStr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::{Consumers, ContainerKeys, Current, HostKeys, KeyStore, RingAnswer, StoreError, Stored};
use crate::base::key::{Consumer, Epoch, HostName, KeyId, Location, Place, Ring, SealedKey, StoreName};

/// A dictionary in memory.
#[derive(Clone, Debug, Default)]
pub struct Memory(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// By name: a key's id, `kek/EPOCH` or `host/NAME`.
    stored: BTreeMap<String, SealedKey>,
    current: Option<(Current, String)>,
    places: Option<Vec<Place>>,
    failures: VecDeque<StoreError>,
    fails_at: Option<(String, StoreError)>,
    unreachable: bool,
    /// How many requests are answered until none is.
    answers: Option<usize>,
    lies: BTreeMap<String, SealedKey>,
    lie: Option<SealedKey>,
    consumers: BTreeMap<KeyId, BTreeSet<Consumer>>,
    makes_up_ids: bool,
    asked: Vec<String>,
    /// Whether it says of rings where they are; `None`: it has none.
    rings: Option<bool>,
}

/// Stores that tests have handed in, by the names that their configurations give them.
static HANDED_IN: Mutex<BTreeMap<StoreName, Memory>> = Mutex::new(BTreeMap::new());

impl Memory {
    /// From now on this store is what a configuration means by the name.
    pub fn hand_in(&self, name: &StoreName) {
        HANDED_IN.lock().unwrap_or_else(PoisonError::into_inner).insert(name.clone(), self.clone());
    }

    /// The store that was handed in under a name.
    pub fn named(name: &StoreName) -> Option<Self> {
        HANDED_IN.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    /// The next request fails like this; several are used up in order.
    pub fn fail_next(&self, error: StoreError) {
        self.state().failures.push_back(error);
    }

    /// The next request of this kind ("set current", ...) fails like this.
    pub fn fail_at(&self, action: &str, error: StoreError) {
        self.state().fails_at = Some((action.to_owned(), error));
    }

    /// From now on every request fails, or none.
    pub fn set_unreachable(&self, unreachable: bool) {
        self.state().unreachable = unreachable;
    }

    /// This many requests are answered, and then none, until that is taken back.
    pub fn answer_only(&self, requests: Option<usize>) {
        self.state().answers = requests;
    }

    /// From now on reading `name` (a key's id, `kek/EPOCH` or `host/NAME`) gives another key than the one that is stored.
    pub fn lie(&self, name: impl ToString, answer: SealedKey) {
        self.state().lies.insert(name.to_string(), answer);
    }

    /// From now on reading `name` gives what is stored.
    pub fn be_honest(&self, name: impl ToString) {
        self.state().lies.remove(&name.to_string());
    }

    /// From now on reading any key, but no container or lockbox key, gives this one.
    pub fn lie_about_all(&self, answer: SealedKey) {
        self.state().lie = Some(answer);
    }

    /// From now on reading gives what is stored, but for lies about single names.
    pub fn be_honest_about_all(&self) {
        self.state().lie = None;
    }

    /// Where the keys rest; a name that nothing can be followed to, unless set.
    pub fn set_places(&self, places: Vec<Place>) {
        self.state().places = Some(places);
    }

    /// From now on it takes no ids but its own, like Barbican.
    pub fn make_up_ids(&self) {
        self.state().makes_up_ids = true;
    }

    /// From now on it says of rings where they are, or of none.
    pub fn tell_rings(&self, rings: bool) {
        self.state().rings = Some(rings);
    }

    /// What was asked so far, in order: "get ID", "create kek/1", ...
    pub fn asked(&self) -> Vec<String> {
        self.state().asked.clone()
    }

    /// What is stored under a name, without asking.
    pub fn stored(&self, name: impl ToString) -> Option<SealedKey> {
        self.state().stored.get(&name.to_string()).cloned()
    }

    /// Stores something under a name, without asking and whatever is there.
    pub fn put(&self, name: impl ToString, key: SealedKey) {
        self.state().stored.insert(name.to_string(), key);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Every request begins here.
    fn ask(&self, action: &'static str, name: &str) -> Result<MutexGuard<'_, State>, StoreError> {
        let mut state = self.state();
        state.asked.push(format!("{action} {name}").trim_end().to_owned());
        if let Some((_, error)) = state.fails_at.take_if(|(at, _)| at == action) {
            return Err(error);
        }
        let is_away = state.unreachable || state.answers == Some(0);
        state.answers = state.answers.map(|left| left.saturating_sub(1));
        match state.failures.pop_front() {
            Some(error) => Err(error),
            None if is_away => {
                let source = io::ErrorKind::HostUnreachable.into();
                Err(StoreError::Io { action, path: "memory".into(), source })
            }
            None => Ok(state),
        }
    }

    fn read(&self, name: &str) -> Result<SealedKey, StoreError> {
        let state = self.ask("get", name)?;
        let lie = state.lie.as_ref().filter(|_| !name.contains('/'));
        state.lies.get(name).or(lie).or(state.stored.get(name)).cloned().ok_or_else(|| not_found(name))
    }

    fn add(&self, name: &str, key: &SealedKey) -> Result<(), StoreError> {
        let mut state = self.ask("create", name)?;
        if state.stored.contains_key(name) {
            return Err(StoreError::Exists { id: name.to_owned(), at: "memory".to_owned() });
        }
        state.stored.insert(name.to_owned(), key.clone());
        Ok(())
    }

    fn replace_by_later(&self, name: &str, key: &SealedKey) -> Result<(), StoreError> {
        let mut state = self.ask("replace", name)?;
        let before = state.stored.get(name).ok_or_else(|| not_found(name))?;
        let generation = |key: &SealedKey| {
            key.claimed_generation().map_err(|source| StoreError::Malformed { what: name.to_owned(), source })
        };
        let stored = generation(before)?;
        if generation(key)? <= stored {
            return Err(StoreError::Outdated { id: name.to_owned(), generation: stored });
        }
        state.stored.insert(name.to_owned(), key.clone());
        Ok(())
    }

    fn remove(&self, name: &str) -> Result<(), StoreError> {
        self.ask("delete", name)?.stored.remove(name).map(drop).ok_or_else(|| not_found(name))
    }

    /// The names below a prefix that are of this type.
    fn names<T: FromStr + Ord>(&self, prefix: &str) -> Result<Vec<T>, StoreError> {
        let state = self.ask("list", prefix)?;
        let mut names: Vec<T> =
            state.stored.keys().filter_map(|name| name.strip_prefix(prefix)?.parse().ok()).collect();
        names.sort_unstable();
        Ok(names)
    }
}

fn not_found(name: &str) -> StoreError {
    StoreError::NotFound { id: name.to_owned(), at: "memory".to_owned() }
}

impl KeyStore for Memory {
    fn takes_any_id(&self) -> bool {
        !self.state().makes_up_ids
    }

    fn get(&self, id: &KeyId) -> Result<Stored, StoreError> {
        self.read(&id.to_string()).map(Stored::Sealed)
    }

    fn create(&self, id: &KeyId, key: &SealedKey) -> Result<(), StoreError> {
        self.add(&id.to_string(), key)
    }

    fn rings(&self, id: &KeyId, rows: bool) -> Result<Vec<RingAnswer>, StoreError> {
        if self.state().rings.is_none() {
            return Ok(Vec::new());
        }
        let told = self.ask(if rows { "all rings of" } else { "ring of" }, &id.to_string())?.rings == Some(true);
        let rings = if rows { &[Ring::Object, Ring::Container, Ring::Account][..] } else { &[Ring::Object] };
        let url = |kind| match kind {
            Ring::Object => "http://10.0.0.5:6200/sdb1/1/a/c/o",
            Ring::Container => "http://10.0.0.5:6201/sdb1/1/a/c",
            Ring::Account => "http://10.0.0.5:6202/sdb1/1/a",
        };
        let answer = |ring| if told { Ok(format!("[\"{}\"]", url(ring)).into_bytes()) } else { Err("none".to_owned()) };
        Ok(rings.iter().map(|ring| RingAnswer { ring: *ring, answer: answer(*ring) }).collect())
    }

    fn reseal(&self, id: &KeyId, key: &SealedKey) -> Result<(), StoreError> {
        self.replace_by_later(&id.to_string(), key)
    }

    fn delete(&self, id: &KeyId) -> Result<(), StoreError> {
        self.remove(&id.to_string())
    }

    fn list(&self) -> Result<Vec<KeyId>, StoreError> {
        self.names("")
    }

    fn places(&self, id: &KeyId) -> Result<Vec<Place>, StoreError> {
        let state = self.ask("places", &id.to_string())?;
        let unknown = || {
            let at = Location::Elsewhere { name: "memory".to_owned(), why: "it is in memory".to_owned() };
            vec![Place { what: "sealed key".to_owned(), at, opens: true }]
        };
        Ok(state.places.clone().unwrap_or_else(unknown))
    }

    fn container_keys(&self) -> Option<&dyn ContainerKeys> {
        Some(self)
    }

    fn host_keys(&self) -> Option<&dyn HostKeys> {
        Some(self)
    }
}

impl Consumers for Memory {
    fn consumers(&self, id: &KeyId) -> Result<Vec<Consumer>, StoreError> {
        let state = self.ask("list consumers", &id.to_string())?;
        Ok(state.consumers.get(id).into_iter().flatten().cloned().collect())
    }

    fn add_consumer(&self, id: &KeyId, consumer: &Consumer) -> Result<(), StoreError> {
        self.ask("add consumer", &id.to_string())?.consumers.entry(*id).or_default().insert(consumer.clone());
        Ok(())
    }

    fn remove_consumer(&self, id: &KeyId, consumer: &Consumer) -> Result<(), StoreError> {
        let mut state = self.ask("remove consumer", &id.to_string())?;
        let removed = state.consumers.get_mut(id).is_some_and(|of| of.remove(consumer));
        if removed { Ok(()) } else { Err(super::consumers::missing(id, consumer)) }
    }
}

impl ContainerKeys for Memory {
    fn current(&self) -> Result<Option<Current>, StoreError> {
        Ok(self.ask("current", "")?.current.as_ref().map(|(current, _)| *current))
    }

    fn set_current(&self, current: &Current, fingerprint: &str) -> Result<(), StoreError> {
        self.ask("set current", &current.epoch.to_string())?.current = Some((*current, fingerprint.to_owned()));
        Ok(())
    }

    fn get(&self, epoch: Epoch) -> Result<SealedKey, StoreError> {
        self.read(&format!("kek/{epoch}"))
    }

    fn create(&self, epoch: Epoch, key: &SealedKey) -> Result<(), StoreError> {
        self.add(&format!("kek/{epoch}"), key)
    }

    fn reseal(&self, epoch: Epoch, key: &SealedKey) -> Result<(), StoreError> {
        self.replace_by_later(&format!("kek/{epoch}"), key)
    }

    fn delete(&self, epoch: Epoch) -> Result<(), StoreError> {
        self.remove(&format!("kek/{epoch}"))
    }

    fn epochs(&self) -> Result<Vec<Epoch>, StoreError> {
        self.names("kek/")
    }
}

impl HostKeys for Memory {
    fn get(&self, host: &HostName) -> Result<SealedKey, StoreError> {
        self.read(&format!("host/{host}"))
    }

    fn create(&self, host: &HostName, key: &SealedKey) -> Result<(), StoreError> {
        self.add(&format!("host/{host}"), key)
    }

    fn replace(&self, host: &HostName, key: &SealedKey) -> Result<(), StoreError> {
        self.replace_by_later(&format!("host/{host}"), key)
    }

    fn delete(&self, host: &HostName) -> Result<(), StoreError> {
        self.remove(&format!("host/{host}"))
    }

    fn hosts(&self) -> Result<Vec<HostName>, StoreError> {
        self.names("host/")
    }
}

mod tests {
    use super::*;
    use crate::{
        base::key::BoundContext,
        keys::seal::{Content, OwnerKey, Payload, seal},
    };

    fn sealed(id: KeyId, generation: u64) -> SealedKey {
        let container = "cinder".parse().unwrap();
        let context =
            BoundContext { version: 1, key_id: id, container, volume: None, project: None, generation, created: 0 };
        let owner = OwnerKey::generate().unwrap().recipient().unwrap();
        seal(&context, &Content::VolumeKey(Payload::random()), &[Box::new(owner)]).unwrap()
    }

    #[test]
    fn does_what_a_test_tells_it() {
        let store = Memory::default();
        let (id, shared) = (KeyId::random(), store.clone());
        let get = |store: &Memory| KeyStore::get(store, &id);
        assert!(matches!(get(&store), Err(StoreError::NotFound { .. })));
        let (first, second) = (sealed(id, 1), sealed(id, 2));
        KeyStore::create(&shared, &id, &first).unwrap();
        assert!(matches!(KeyStore::create(&store, &id, &second), Err(StoreError::Exists { .. })));
        assert!(matches!(KeyStore::reseal(&store, &id, &first), Err(StoreError::Outdated { generation: 1, .. })));
        KeyStore::reseal(&store, &id, &second).unwrap();
        assert!(matches!(get(&store), Ok(Stored::Sealed(key)) if key == second));
        store.lie(id, first.clone());
        assert!(matches!(get(&store), Ok(Stored::Sealed(key)) if key == first));
        store.be_honest(id);
        store.fail_next(StoreError::NoContainer { at: "memory".to_owned() });
        assert!(matches!(get(&shared), Err(StoreError::NoContainer { .. })));
        store.set_unreachable(true);
        assert!(matches!(get(&shared), Err(StoreError::Io { .. })));
        store.set_unreachable(false);
        assert_eq!((store.list().unwrap(), store.stored(id)), (vec![id], Some(second)));
        assert!(store.epochs().unwrap().is_empty() && store.hosts().unwrap().is_empty());
        store.put("kek/3", first);
        assert_eq!(store.epochs().unwrap(), ["3".parse().unwrap()]);
        assert_eq!(store.asked().last().unwrap(), "list kek/");
        store.set_places(vec![Place::path("sealed key", "/srv/keys", true)]);
        assert_eq!(store.places(&id).unwrap(), [Place::path("sealed key", "/srv/keys", true)]);
    }
}
