//! Containers: a store, whom its keys are sealed to, and what opens them on this host.
//!
//! Verbs ask a container for keys and give it keys; what is between, a public-key operation or a container key, is here.

mod admitted;
pub mod backup;
mod each;
mod opens;
mod rehearsal;
mod rotation;
mod shared;
mod tenant_keys;
#[cfg(test)]
mod tests;
mod trust;
mod usage;
mod via_lockbox;
mod warm;
mod whom;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use uuid::Uuid;

pub use each::{Progress, Step, for_each, lock};
pub use opens::{asks_people, logins, may_open_without_tpm, public_keys, servers_to_open, taken_by_leaves};
pub use rehearsal::{By, Rehearsal, prove_pair, rehearse};
pub use rotation::Rotation;
use shared::Shared;
pub use tenant_keys::{Listed, TenantKeys};
pub(in crate::unlock) use trust::Seen;
pub use trust::{Author, TrustError, forget};
pub use usage::Unused;
pub use via_lockbox::ViaLockbox;
use warm::Warm;
pub use whom::{OpenedBy, Opener};

use crate::{
    base::{
        chain::chain,
        clock::now,
        key::{
            BoundContext, ContainerKeyId, Epoch, HostName, KeyId, KeyReference, Location, Place, Ring, SealedKey,
            SecretBytes, SecretMemoryError, StoreName,
        },
        person::Attendant,
    },
    config::{Config, Network, Sealing},
    keys::{
        seal::{self, Asking, ContainerKey, Content, Expected, For, Identities, Opened, SealError, identities},
        store::{self, Current, KeyStore, Released, RingAnswer, StoreError, Stored, parse_endpoints},
    },
    unlock::{Error, deletions::Deletions, lockbox::Lockbox, tenant::Tenant},
};

/// A container of keys.
pub struct Container {
    name: StoreName,
    store: Box<dyn KeyStore>,
    sealing: Sealing,
    /// Limits on waiting for the servers of leaves.
    network: Network,
    /// Container keys that were opened: one public-key operation each, in locked memory of this process only.
    opened: Mutex<BTreeMap<Epoch, Arc<ContainerKey>>>,
    /// What the store says of its container key to those who make keys at the same time.
    current: Shared<Option<Current>>,
    /// Where the store has said that the rows rest that list its keys.
    rows: Mutex<Rows>,
    /// What earlier attaches of this boot have left.
    warm: Option<Warm>,
    /// The directory where this host remembers what the store has shown it.
    state: PathBuf,
    /// What this host keeps to open keys, and where it says so.
    own_places: Vec<Place>,
    /// This host's lockbox, if it has one: its key opens what is sealed to this host.
    lockbox: Option<Lockbox>,
    /// An entry of the lockbox opens with this host's identity alone, and the container's policy takes more.
    is_lockbox_weaker: bool,
    /// What it is used for.
    used: Use,
    /// On whose behalf a hook uses it; `None` if this host does so for itself.
    tenant: Option<Tenant>,
    /// Which person to ask for what opens it; nobody for a tenant.
    asking: Asking,
    /// What alone may open it, in place of all that this host has.
    alone: Option<Identities>,
}

/// Where rows rest; of several threads one asks first, and the others have its answer if it is one.
#[derive(Default)]
struct Rows {
    is_asked: bool,
    places: Option<Vec<Place>>,
}

/// How a container is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// To open one volume: a valid entry of the lockbox is enough, and all requests to the store have one limit in time.
    Unlock,
    /// To open the volumes of a boot with the lockbox. Each request may take as long as the boot.
    BootByLockbox,
    /// To open the volumes of a boot with keys from the store. Each request may take as long as the boot.
    BootByStore,
    /// To work on keys, or to judge where they rest: the store itself is asked.
    Keys,
}

impl Use {
    fn lockbox_first(self) -> bool {
        matches!(self, Self::Unlock | Self::BootByLockbox)
    }
}

/// A key, opened or released.
pub(in crate::unlock) enum Fetched {
    /// It was sealed.
    Sealed(Opened),
    /// The store keeps it unsealed.
    Released(Released),
}

impl Fetched {
    /// Whether nothing is on its volume but what is written there again from the beginning if it fails.
    pub fn is_being_filled(&self) -> bool {
        let (Self::Sealed(Opened { content: Content::Object(object), .. }) | Self::Released(Released { object, .. })) =
            self
        else {
            return false;
        };
        object.facts.filling.is_some()
    }

    /// The passphrase that cryptsetup and os-brick open the key's volume with; `None` if the volume has no keyslot.
    pub fn passphrase(&self) -> Result<Option<SecretBytes>, SecretMemoryError> {
        match self {
            Self::Sealed(Opened { content: Content::VolumeKey(payload), .. }) => {
                payload.passphrase.as_ref().map(|passphrase| SecretBytes::copy_of(passphrase.expose())).transpose()
            }
            Self::Sealed(Opened { content: Content::Object(object), .. }) | Self::Released(Released { object, .. }) => {
                object.passphrase().map(Some)
            }
        }
    }
}

/// What gave a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// An entry of the lockbox; the store was not asked.
    Lockbox,
    /// The store.
    Store,
}

impl Container {
    /// The container that the configuration describes, for this host itself or on behalf of a hook's caller.
    pub fn open(config: &Config, name: &StoreName, tenant: Option<&Tenant>, used: Use) -> Result<Self, Error> {
        tenant.map_or(Ok(()), |tenant| tenant.check_store(name))?;
        let store_config = config.store(name)?;
        let lockbox = Lockbox::of(config);
        let kind = store::kind(store_config)?;
        let mut own_places = identities::places(&store_config.sealing.identities)?;
        own_places.extend(kind.places());
        own_places.extend(opens::place(&store_config.sealing, store_config.network)?);
        own_places.push(Place::path("configuration", &config.path, false));
        if let Some(lockbox) = &lockbox {
            own_places.extend(lockbox.places(config, name)?);
        }
        own_places.extend(config.boot.place());
        let mut store = store::open(&*kind, name, store_config, tenant.and_then(Tenant::caller))?;
        if used == Use::Unlock {
            store.as_one();
        }
        Ok(Self {
            name: name.clone(),
            tenant: tenant.cloned(),
            store,
            sealing: store_config.sealing.clone(),
            network: store_config.network,
            opened: Mutex::default(),
            current: Shared::default(),
            rows: Mutex::default(),
            warm: None,
            state: config.state.to_path_buf(),
            own_places,
            lockbox,
            is_lockbox_weaker: opens::is_lockbox_weaker(config, store_config),
            used,
            asking: Asking {
                attendant: if tenant.is_none() { config.attendant.clone() } else { Attendant::default() },
                of: format!("container '{name}'"),
                patience: config.boot.prompt_after,
                ..Asking::default()
            },
            alone: None,
        })
    }

    /// The same, which goes on with what earlier attaches of this boot have had of the store. It has to be asked as this host:
    /// what one caller of a hook was told is not for the next.
    pub fn warm(mut self, config: &Config) -> Result<Self, Error> {
        if self.tenant.as_ref().and_then(Tenant::caller).is_none() {
            self.store.warm();
            let kind = store::kind(config.store(&self.name)?)?;
            self.warm = Warm::of(config, &self.name, &*kind);
        }
        Ok(self)
    }

    /// The store's dictionary.
    pub fn store(&self) -> &dyn KeyStore {
        &*self.store
    }

    /// What this host keeps to open keys, and where it says so.
    pub fn own_places(&self) -> &[Place] {
        &self.own_places
    }

    /// A key's reference.
    pub fn reference(&self, key: KeyId) -> KeyReference {
        KeyReference { store: self.name.clone(), key }
    }

    /// The reference of a new key.
    pub fn new_reference(&self) -> Result<KeyReference, Error> {
        Ok(self.reference(self.store.new_id()?))
    }

    /// Fetches a key from the store and opens it, if it is for this volume; and what to remember once it has done its work.
    /// Nothing above this floor gets a volume key so.
    pub(in crate::unlock) fn fetch(&self, id: &KeyId, volume: For, author: Author) -> Result<(Fetched, Seen), Error> {
        match self.stored(id)? {
            Stored::Released(released) => Ok((Fetched::Released(released), Seen::default())),
            Stored::Sealed(sealed) => {
                let (opened, seen) = self.open_key(id, &sealed, volume, author)?;
                self.admit(id, opened.context.project.as_ref())?;
                Ok((Fetched::Sealed(opened), seen))
            }
        }
    }

    /// Opens a sealed key, if it is sealed under a container key and that is one to trust. Everybody can seal to the public
    /// keys of owner, escrow and hosts; so a key that is sealed to those has no author.
    fn open_key(&self, id: &KeyId, sealed: &SealedKey, volume: For, author: Author) -> Result<(Opened, Seen), Error> {
        let key = self.container_key(self.sealed_under(id, sealed)?)?;
        let learned = self.learn(&key, author)?;
        let opened = self.open_under(key, id, sealed, volume)?;
        let seen = self.see(id, opened.context.generation, learned)?;
        Ok((opened, seen))
    }

    /// The container key that it claims to be sealed under.
    fn sealed_under(&self, id: &KeyId, sealed: &SealedKey) -> Result<Epoch, Error> {
        let mut ids = sealed.recipient_kids().filter_map(|kid| kid.parse().ok());
        let under = ids.find(|id: &ContainerKeyId| id.container == self.name);
        under.map(|under| under.epoch).ok_or_else(|| match sealed.claimed_context() {
            Ok(BoundContext { container, .. }) if container != self.name => {
                let (is, asked) = (container.to_string(), self.name.to_string());
                let source = SealError::Other { what: "container", is, asked };
                Error::KeyRefused { reference: self.reference(*id), source }
            }
            _ => Error::NoAuthor(self.reference(*id)),
        })
    }

    fn open_under(&self, key: Arc<ContainerKey>, id: &KeyId, sealed: &SealedKey, volume: For) -> Result<Opened, Error> {
        let expected = Expected { key_id: *id, container: self.name.clone(), volume };
        let opened = Identities::of(vec![Box::new(key)]).open(sealed, &expected);
        opened.map_err(|source| Error::KeyRefused { reference: self.reference(*id), source })
    }

    /// Seals and stores a new key.
    pub(in crate::unlock) fn create(&self, id: &KeyId, volume: Option<Uuid>, content: &Content) -> Result<(), Error> {
        self.create_as(
            BoundContext {
                version: 1,
                key_id: *id,
                container: self.name.clone(),
                volume,
                project: self.tenant.as_ref().and_then(Tenant::project).cloned(),
                generation: 1,
                created: now(),
            },
            content,
        )
    }

    /// Likewise a key of another container. Its generation goes on: it may have been here before, under the same id.
    pub(in crate::unlock) fn create_copy(&self, id: &KeyId, of: BoundContext, content: &Content) -> Result<(), Error> {
        let (container, generation) = (self.name.clone(), of.generation + 1);
        self.create_as(BoundContext { key_id: *id, container, generation, ..of }, content)
    }

    fn create_as(&self, context: BoundContext, content: &Content) -> Result<(), Error> {
        let id = &context.key_id;
        let seal = |key: Arc<ContainerKey>| Ok((seal::seal(&context, content, &[Box::new(key.clone())])?, key));
        let (sealed, key) = self.current_key().and_then(seal).inspect_err(|_| self.store.abandon(id))?;
        self.store.create(id, &sealed)?;
        self.deletions().take_back(id)?;
        self.has_sealed_under(&key)
    }

    /// The keys that this host has deleted.
    fn deletions(&self) -> Deletions {
        Deletions::of(&self.state, &self.name)
    }

    /// Seals a key anew under the current container key, and replaces its sealed form.
    pub(in crate::unlock) fn reseal(&self, opened: Opened) -> Result<(), Error> {
        self.reseal_under(opened, self.current_key()?)
    }

    fn reseal_under(&self, opened: Opened, key: Arc<ContainerKey>) -> Result<(), Error> {
        let Opened { context, content } = opened;
        let id = context.key_id;
        let context = BoundContext { generation: context.generation + 1, ..context };
        self.store.reseal(&id, &seal::seal(&context, &content, &[Box::new(key.clone())])?)?;
        self.has_sealed_under(&key)
    }

    /// The container key that new keys are sealed under. A container that has none yet gets its first one.
    pub(super) fn current_key(&self) -> Result<Arc<ContainerKey>, Error> {
        if !self.sealing.seals() {
            return Err(Error::NoOwner(self.name.clone()));
        }
        let keys = self.container_keys()?;
        match self.current.ask(|| keys.current())? {
            Some(current) => self.trusted_key(current.epoch),
            None => match self.trusted_epoch()? {
                Some(trusted) => Err(TrustError::NoneLeft { container: self.name.clone(), trusted }.into()),
                None => self.make_key(None, None),
            },
        }
    }

    /// Whose lockbox is closed, if it might have opened what did not open.
    fn closed_lockbox(&self, error: &SealError) -> Option<HostName> {
        let lockbox = self.lockbox.as_ref().filter(|_| matches!(error, SealError::NotForUs { .. }))?;
        lockbox.key().is_none().then(|| lockbox.host().clone())
    }

    /// A container key, fetched and opened once per process.
    fn container_key(&self, epoch: Epoch) -> Result<Arc<ContainerKey>, Error> {
        // Held meanwhile: of several threads one opens the key, the others wait for it.
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(key) = opened.get(&epoch) {
            return Ok(key.clone());
        }
        let id = ContainerKeyId { container: self.name.clone(), epoch };
        let keys = self.store.container_keys().ok_or_else(|| Error::NoContainerKeys(self.name.clone()))?;
        let refused = |source| match self.closed_lockbox(&source) {
            Some(host) => {
                Error::WhileClosed { what: format!("the container key {id}"), host, source: Box::new(source) }
            }
            None => Error::ContainerKeyRefused { id: id.clone(), source },
        };
        let open = |sealed: &SealedKey| match &self.alone {
            Some(alone) => Ok(ContainerKey::open(sealed, alone, &id)),
            None => Ok::<_, Error>(ContainerKey::open(sealed, &self.identities()?, &id)),
        };
        let warm = self.warm.as_ref().filter(|_| self.alone.is_none());
        let tried = warm.and_then(|warm| warm.key(epoch)).map(|sealed| Ok::<_, Error>((open(&sealed)?, sealed)));
        let key = match tried.transpose()? {
            Some((Ok(key), _)) if self.is_the_trusted(&key) => Ok(key),
            tried => {
                let sealed = keys.get(epoch)?;
                let key = match tried {
                    // A person is not asked twice.
                    Some((key, before)) if before == sealed => key,
                    _ => open(&sealed)?,
                };
                if let (Some(warm), Ok(_)) = (warm, &key) {
                    warm.keep_key(epoch, &sealed);
                }
                key
            }
        };
        let key = Arc::new(key.map_err(refused)?);
        opened.insert(epoch, key.clone());
        Ok(key)
    }

    /// The keys that claim to be of this volume.
    pub fn keys_of_volume(&self, volume: Uuid) -> Result<Vec<KeyId>, Error> {
        let (ids, found) = (self.store.list()?, Mutex::new(Vec::new()));
        // Where a disk is not mounted there are no keys either.
        if ids.is_empty() && self.container_keys()?.current()?.is_none() {
            return Err(StoreError::Vacant(format!("'{}' has no keys", self.name)).into());
        }
        each::try_for_each(&ids, &|_| {}, &|id| match self.store.get(id) {
            Ok(Stored::Sealed(key)) if key.claimed_context().is_ok_and(|claimed| claimed.volume == Some(volume)) => {
                lock(&found).push(*id);
                Ok(())
            }
            Ok(_) | Err(StoreError::NotFound { .. } | StoreError::Malformed { .. }) => Ok(()),
            Err(error) => Err(error),
        })?;
        Ok(found.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    /// Where a key rests in the store.
    pub fn places_in_store(&self, id: &KeyId) -> Result<Vec<Place>, Error> {
        let mut places = self.store.places(id)?;
        for place in &mut places {
            // It may be remembered, and be read in another directory.
            if let Location::Path(path) = &mut place.at
                && let Ok(absolute) = std::path::absolute(&*path)
            {
                *path = absolute;
            }
        }
        places.extend(self.replicas(id)?);
        Ok(places)
    }

    /// The next attach asks anew where the rows are: what is refused is not to be so by an old answer.
    pub(in crate::unlock) fn forget_rows(&self) {
        self.warm.iter().for_each(Warm::forget_rows);
    }

    /// Where the replicas of a key are, and those of the rows, which are the same for all keys.
    fn replicas(&self, id: &KeyId) -> Result<Vec<Place>, Error> {
        let mut rows = lock(&self.rows);
        if rows.places.is_none() {
            rows.places = self.warm.as_ref().and_then(Warm::rows);
        }
        if let Some(known) = rows.places.clone() {
            drop(rows);
            return Ok(self.store.rings(id, false)?.into_iter().flat_map(replicas).chain(known).collect());
        }
        // Held while the first one asks; if that has no answer, nobody waits for a second.
        let is_first = !std::mem::replace(&mut rows.is_asked, true);
        // Moved in both cases: it must not be held by who is not the first.
        let first = Some(rows).filter(|_| is_first);
        let answers = self.store.rings(id, true)?;
        let (of_key, of_rows): (Vec<_>, Vec<_>) =
            answers.into_iter().partition(|answer| matches!(answer.ring, Ring::Object));
        let of_rows: Vec<Place> = of_rows.into_iter().flat_map(replicas).collect();
        if warm::are_known(&of_rows) {
            self.warm.iter().for_each(|warm| warm.keep_rows(&of_rows));
            match first {
                Some(mut rows) => rows.places = Some(of_rows.clone()),
                None => lock(&self.rows).places = Some(of_rows.clone()),
            }
        }
        Ok(of_key.into_iter().flat_map(replicas).chain(of_rows).collect())
    }
}

/// The places that a ring's answer names.
fn replicas(RingAnswer { ring, answer }: RingAnswer) -> Vec<Place> {
    let what = match ring {
        Ring::Object => "sealed key",
        Ring::Container | Ring::Account => "list of keys",
    };
    let place = |at| Place { what: what.to_owned(), at, opens: true };
    let parsed = answer.and_then(|json| parse_endpoints(&json, ring).map_err(|error| chain(&error)));
    match parsed {
        Ok(replicas) => replicas.into_iter().map(|replica| place(Location::Replica(replica))).collect(),
        Err(why) => vec![place(Location::Elsewhere { name: format!("the {ring} ring"), why })],
    }
}
