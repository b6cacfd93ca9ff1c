//! One volume and its key, from the header to the key in hand. Each step is the only way to the next:
//! [`Case::find`] -> [`Case::prove`] -> [`Proven::key`] -> [`Unlocked`].

use std::sync::Arc;

use crate::{
    base::{
        chain::chain,
        key::{BoundContext, KeyReference, KeySize, Place, SecretBytes, VolumeKey, hex},
        mapping_name::MappingName,
    },
    config::{Config, LeafName, SeparationPolicy},
    keys::{
        seal::{Content, EntryContext, For, Opened, Payload, SealError, Told, clevis::Binding},
        store::Released,
    },
    unlock::{
        Error,
        audit::{self, Event},
        container::{Author, Container, Fetched, Source, Use, ViaLockbox},
        pins::{Pin, Pins},
        tenant::Tenant,
    },
    volumes::{
        Authority, Rest, Unlocked,
        header::{self, CIPHER, Volume, VolumeError},
        separation::{self, Inventory, Report, Separated, Surroundings, Target},
    },
};

/// Which key opens a volume, for whom, and under which name.
#[derive(Default)]
pub struct Asked {
    /// The key; what the LUKS2 token says unless given.
    pub key: Option<KeyReference>,
    /// On whose behalf a hook asks.
    pub tenant: Option<Tenant>,
    /// The mapping's name, if there is to be one.
    pub name: Option<MappingName>,
    /// What the caller of a hook calls the volume.
    pub volume_id: Option<String>,
    /// The caller of a hook is going to fill the whole volume anew.
    pub fills: bool,
    /// What earlier attaches of this boot have had of the store need not be asked for again.
    pub warm: bool,
}

/// What the separation check may let through.
#[derive(Clone, Copy, Debug, Default)]
pub struct Strictness {
    /// Overrides the configuration's policy.
    pub policy: Option<SeparationPolicy>,
    /// Go on although key and data share a device; recorded.
    pub allow_shared: bool,
}

/// What the separation check takes into account.
#[derive(Clone, Copy, Default)]
pub struct Circumstances<'a> {
    /// Who serves the volume, if the caller knows it.
    pub target: Option<&'a Target>,
    /// How strict to be.
    pub strictness: Strictness,
    /// Places that do not count, for what rests there is in memory when the volume is opened.
    pub in_memory: Option<&'a dyn Fn(&Place) -> bool>,
}

/// A volume whose header is checked, and where its key is.
pub struct Case<'a> {
    config: &'a Config,
    volume: Volume,
    reference: KeyReference,
    key: ViaLockbox,
    name: Option<MappingName>,
    volume_id: Option<String>,
    fills: bool,
    pinning: Pinning,
    /// The case of the old key, if the volume is in the middle of a rotation.
    rest: Option<Box<Case<'a>>>,
}

/// What this host's memory of the volume has to do with the case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pinning {
    /// The volume has to be the one that is pinned, if one is, and is pinned once its key has opened it.
    Pin,
    /// The same, but nothing is pinned.
    Check,
    /// Its key is made now, by a person who says what the volume is: it is pinned anew.
    Renew,
    /// Its key is going to be another one: what is pinned stays for now.
    Leave,
}

/// A case whose key rests apart from the volume, or whose policy lets it pass. Only [`Case::prove`] makes one.
///
/// ```compile_fail,E0599
/// # use cryptattach::unlock::case::Case;
/// fn key_without_proof(case: Case<'_>) {
///     case.key(); // only `Proven` has a key
/// }
/// ```
///
/// ```compile_fail,E0451
/// # use cryptattach::{unlock::case::{Case, Proven}, volumes::separation::Separated};
/// fn proof_out_of_nothing(case: Case<'_>, separated: Separated) -> Proven<'_> {
///     Proven { case, separated } // the members are private
/// }
/// ```
///
/// ```compile_fail,E0624
/// # use cryptattach::{base::key::KeyId, keys::seal::For, unlock::container::Container};
/// fn past_the_proof(container: &Container, id: &KeyId) {
///     container.fetch(id, For::Any); // a container gives no volume key out
/// }
/// ```
pub struct Proven<'a> {
    case: Case<'a>,
    separated: Separated,
    /// The key that is pinned, and whether the header has its digest; `None` if none is pinned, or what is counts no longer.
    pinned: Option<(KeyReference, bool)>,
    rest: Option<Box<Proven<'a>>>,
}

const SEALED: fn(KeyReference) -> Authority = Authority::SealedKey;
const RELEASED: fn(KeyReference) -> Authority = Authority::ReleasedKey;

/// How a key was had, for `test`.
pub struct Tried {
    /// What gave it.
    pub source: Source,
    /// In words: sealed or not, and what else opens the volume.
    pub found: String,
}

impl<'a> Case<'a> {
    /// The case of a volume whose key exists. The store is not asked yet.
    pub fn find(config: &'a Config, volume: Volume, asked: Asked) -> Result<Self, Error> {
        let Asked { key, tenant, name, volume_id, fills, warm } = asked;
        let reference = reference(key.map(|key| volume.current(key)), &volume)?;
        let container = Container::open(config, &reference.store, tenant.as_ref(), Use::Unlock)?;
        let container = Arc::new(if warm { container.warm(config)? } else { container });
        // The volumes of tenants come and go, and one must not stand in another's way.
        let pinning = if tenant.is_some() { Pinning::Check } else { Pinning::Pin };
        let case = Self { name, volume_id, fills, pinning, ..Self::of(config, volume, reference, container) };
        case.with_rest(Use::Unlock)
    }

    /// With the case of the part that has the old key, if the volume is in the middle of a rotation. This host knows the volume
    /// by that until the rotation has ended; by a header from before its end, the new data would be taken for old.
    pub fn with_rest(self, used: Use) -> Result<Self, Error> {
        let Some(rest) = &self.volume.rest else { return Ok(self) };
        let (volume, reference) = ((*rest.volume).clone(), reference(None, &rest.volume)?);
        let container = match self.key.container().reference(reference.key) == reference {
            true => self.key.shared_container(),
            false => Arc::new(Container::open(self.config, &reference.store, None, used)?),
        };
        let rest = Self { pinning: Pinning::Check, ..Self::of(self.config, volume, reference, container) };
        Ok(Self { pinning: Pinning::Leave, rest: Some(Box::new(rest)), ..self })
    }

    /// The same in a container that is open.
    pub fn of(config: &'a Config, volume: Volume, reference: KeyReference, container: Arc<Container>) -> Self {
        let fits = |content: &Content| match content {
            Content::VolumeKey(payload) if !has_digest_of(payload, &volume) => Err("the digest differs".to_owned()),
            Content::VolumeKey(payload) => agrees(payload, &volume),
            Content::Object(_) => Ok(()),
        };
        let key = ViaLockbox::look(container, reference.key, For::volume(volume.uuid()), &fits);
        let (name, volume_id, pinning) = (None, None, Pinning::Pin);
        Self { config, volume, reference, key, name, volume_id, fills: false, pinning, rest: None }
    }

    /// The case of a volume whose key is made now: what this host knew of the volume counts no longer.
    pub fn of_new_key(config: &'a Config, volume: Volume, reference: KeyReference, container: Arc<Container>) -> Self {
        Self { pinning: Pinning::Renew, ..Self::of(config, volume, reference, container) }
    }

    /// The case of a volume as it will be, or was: a rotation asks for one of its two keys.
    pub fn of_rotation(config: &'a Config, volume: Volume, reference: KeyReference, container: Arc<Container>) -> Self {
        Self { pinning: Pinning::Leave, ..Self::of(config, volume, reference, container) }
    }

    /// With a name for the mapping and for the volume.
    pub fn named(self, name: Option<MappingName>, volume_id: Option<String>) -> Self {
        Self { name, volume_id, ..self }
    }

    /// Whether the store has to be reached: the lockbox has no entry that may be used.
    pub fn needs_store(&self) -> bool {
        !self.key.has_entry() || self.rest.as_ref().is_some_and(|rest| rest.needs_store())
    }

    /// The volume.
    pub fn volume(&self) -> &Volume {
        &self.volume
    }

    /// Where its key is.
    pub fn reference(&self) -> &KeyReference {
        &self.reference
    }

    /// Checks that nothing which opens the volume rests on the volume's device, and judges by the policy.
    pub fn prove(mut self, given: Circumstances<'_>) -> Result<Proven<'a>, Error> {
        let rest = self.rest.take().map(|rest| rest.prove(given)).transpose()?.map(Box::new);
        let Circumstances { target, strictness, in_memory } = given;
        let mut places = self.key.places()?;
        places.retain(|place| !in_memory.is_some_and(|in_memory| in_memory(place)));
        let inventory = Inventory::of(&self.config.separation)?;
        let surroundings = Surroundings { target, inventory: &inventory, level: self.config.separation.level };
        let policy = strictness.policy.unwrap_or(self.config.separation.policy);
        let separated = match separation::prove(&self.volume, &self.reference, &places, &surroundings, policy) {
            Ok(separated) => separated,
            Err(refused) if strictness.allow_shared && refused.refusal.is_shared() => {
                refused.overridden(|refused| {
                    tracing::warn!("{}; continuing because of --allow-shared", refused.refusal);
                    let event =
                        Event { overridden: Some("--allow-shared"), ..self.event("override", refused.report()) };
                    Ok::<_, Error>(audit::permit(self.config, &event)?)
                })?
            }
            Err(refused) => {
                self.key.container().forget_rows();
                self.record("refused", refused.report());
                return Err(refused.refusal.into());
            }
        };
        Ok(Proven { pinned: self.pinned()?, case: self, separated, rest })
    }

    fn pinned(&self) -> Result<Option<(KeyReference, bool)>, Error> {
        let luks = self.volume.luks().filter(|_| !matches!(self.pinning, Pinning::Renew | Pinning::Leave));
        let Some((luks, uuid)) = luks.zip(self.volume.uuid()) else { return Ok(None) };
        let pin = Pins::of(self.config).get(uuid)?;
        Ok(pin.map(|pin| (pin.key, pin.digest == luks.digest)))
    }

    fn record(&self, action: &str, report: &Report) {
        audit::done(self.config, &self.event(action, report));
    }

    /// Why the key was not fetched. A header that is another only in its UUID was edited by a person.
    fn told(&self, error: Error) -> Error {
        match (error, self.volume.luks()) {
            (
                Error::KeyRefused {
                    reference,
                    source: SealError::OtherVolume { is: Some(was), asked: Some(now), digest: Some(digest) },
                },
                Some(header),
            ) if digest == header.digest => {
                Error::UuidChanged { reference, device: self.volume.device.path.clone(), was, now }
            }
            (error, _) => error,
        }
    }

    fn event<'e>(&'e self, action: &'e str, report: &Report) -> Event<'e> {
        Event {
            action,
            device: Some(&self.volume.device.path),
            key: Some(self.reference.to_string()),
            name: self.name.as_ref().map(ToString::to_string),
            volume_id: self.volume_id.as_deref(),
            separation: serde_json::to_value(report).ok(),
            overridden: None,
            caller: self.key.container().acting(),
            ..Event::default()
        }
    }
}

impl Proven<'_> {
    /// The volume.
    pub fn volume(&self) -> &Volume {
        &self.case.volume
    }

    /// Where its key is.
    pub fn reference(&self) -> &KeyReference {
        &self.case.reference
    }

    /// The report of the separation check.
    pub fn report(&self) -> &Report {
        self.separated.report()
    }

    /// Fetches the key, opens it, and checks what it says against what the header says.
    ///
    /// What this host knows of stores and volumes changes here only: by a key that is the volume's.
    pub fn key(&self) -> Result<Unlocked, Error> {
        let (fetched, _) = self.fetch()?;
        let unlocked = self.open(fetched)?;
        self.remember();
        Ok(unlocked)
    }

    fn fetch(&self) -> Result<(Fetched, Source), Error> {
        self.case.key.fetch(self.author()).map_err(|error| self.case.told(error))
    }

    /// Vouches for the key's maker.
    fn author(&self) -> Author {
        if matches!(self.pinned, Some((_, true))) { Author::Pinned } else { Author::Container }
    }

    /// Refuses a volume that has the UUID of one that this host has opened before, and another volume key; unless our side
    /// has said, in the sealed key, that it takes the place of the other one.
    fn check_pin(&self, replaces: Option<&KeyReference>) -> Result<(), Error> {
        let Case { volume, .. } = &self.case;
        let is_other = matches!(&self.pinned, Some((pinned, false)) if replaces != Some(pinned));
        match volume.uuid() {
            Some(uuid) if is_other => Err(Error::NotPinned { volume: uuid, device: volume.device.path.clone() }),
            _ => Ok(()),
        }
    }

    fn remember(&self) {
        let Case { config, volume, reference, key, pinning, .. } = &self.case;
        key.remember();
        let Some((luks, uuid)) = volume.luks().zip(volume.uuid()) else { return };
        if matches!(pinning, Pinning::Check | Pinning::Leave) {
            return;
        }
        let pin = Pin { key: reference.clone(), digest: luks.digest.clone() };
        if let Err(error) = Pins::of(config).set(uuid, &pin) {
            tracing::warn!("{}", chain(&error));
        }
    }

    /// The passphrase of the volume's keyslot, for programs that know passphrases only.
    pub fn passphrase(&self) -> Result<SecretBytes, Error> {
        let none = || Error::NoPassphrase(self.case.reference.clone());
        match self.fetch()?.0 {
            Fetched::Sealed(Opened { content: Content::VolumeKey(payload), .. }) => {
                self.agree(&payload)?;
                self.check_pin(payload.replaces.as_ref())?;
                self.volume().verify_key(&payload.volume_key)?;
                self.remember();
                payload.passphrase.ok_or_else(none)
            }
            object => {
                self.check_pin(None)?;
                self.mark_used(&object);
                object.passphrase()?.ok_or_else(none)
            }
        }
    }

    /// What each part of the container's policy said when its key was opened; `None` if none was, or it has the default.
    pub fn told(&self) -> Option<Told> {
        self.case.key.container().told()
    }

    /// The leaves of the container's policy whose servers have newer keys; not known, none.
    pub fn outdated_leaves(&self) -> Vec<LeafName> {
        self.case.key.container().outdated_leaves().unwrap_or_default()
    }

    /// As [`Proven::key`], and how the key was had. Nothing is changed: a key that counts as unused still does.
    pub fn try_out(&self) -> Result<(Unlocked, Tried), Error> {
        let (fetched, source) = self.fetch()?;
        let (key, by, half, found) = match fetched {
            Fetched::Sealed(Opened { content: Content::VolumeKey(payload), context }) => {
                self.agree(&payload)?;
                let others = match (&payload.passphrase, self.volume().luks()) {
                    // In the middle of a rotation it is for libcryptsetup, and a keyslot for it need not stay.
                    (Some(passphrase), Some(_)) if self.rest.is_none() => {
                        match self.volume().open_keyslot(passphrase) {
                            Ok(key) if key == payload.volume_key => {
                                "; its passphrase opens the keyslot, for other programs"
                            }
                            _ => "; its passphrase opens NO keyslot: other programs cannot open the volume",
                        }
                    }
                    _ => "",
                };
                let found = format!("sealed, generation {}{others}", context.generation);
                (payload.volume_key, SEALED, (payload.replaces, payload.passphrase), found)
            }
            Fetched::Sealed(Opened { content: Content::Object(object), .. }) => {
                let key = self.volume().unlock(&object.passphrase()?)?;
                (key, SEALED, Default::default(), "sealed; a passphrase that opens a keyslot".to_owned())
            }
            Fetched::Released(Released { object, .. }) => {
                let key = self.volume().unlock(&object.passphrase()?)?;
                (key, RELEASED, Default::default(), "NOT sealed; a passphrase that opens a keyslot".to_owned())
            }
        };
        let unlocked = self.unlocked(key, by, half, |rest| Ok(rest.try_out()?.0))?;
        Ok((unlocked, Tried { source, found }))
    }

    /// Seals the key of a new or imported volume, stores it, and makes sure that it can be had back. One that cannot is
    /// removed again: nothing depends on it yet.
    pub fn store_key(&self, volume_key: VolumeKey, passphrase: Option<SecretBytes>) -> Result<(), Error> {
        self.store_key_for(volume_key, passphrase, None)
    }

    /// Likewise the key of a volume whose key has been `replaces`.
    pub fn store_successor(
        &self,
        volume_key: VolumeKey,
        passphrase: SecretBytes,
        replaces: KeyReference,
    ) -> Result<(), Error> {
        self.store_key_for(volume_key, Some(passphrase), Some(replaces))
    }

    /// Why this key is not ours to replace by another one, in words; `None` if it is.
    pub fn not_replaceable(&self) -> Result<Option<&'static str>, Error> {
        Ok(match self.fetch()?.0 {
            Fetched::Sealed(Opened { content: Content::VolumeKey(_), context }) => {
                context.project.map(|_| "it is a tenant's: whoever has asked for it knows it by its id")
            }
            Fetched::Sealed(_) | Fetched::Released(_) => Some("another program has made it, and knows it by its id"),
        })
    }

    /// The key whose place this one has taken, by the sealed key's own word; `None` if it says of none.
    pub fn replaces(&self) -> Result<Option<KeyReference>, Error> {
        match self.fetch()?.0 {
            Fetched::Sealed(Opened { content: Content::VolumeKey(payload), .. }) => {
                self.agree(&payload)?;
                self.volume().verify_key(&payload.volume_key)?;
                Ok(payload.replaces)
            }
            Fetched::Sealed(_) | Fetched::Released(_) => Ok(None),
        }
    }

    /// Seals the key anew without its passphrase, of which no keyslot is left.
    pub fn forget_passphrase(&self) -> Result<(), Error> {
        let (payload, context) = self.payload()?;
        if payload.passphrase.is_none() {
            return Ok(());
        }
        self.reseal(context, Payload { passphrase: None, passphrase_next: None, ..payload })
    }

    fn reseal(&self, context: BoundContext, payload: Payload) -> Result<(), Error> {
        self.case.key.container().reseal(Opened { context, content: Content::VolumeKey(payload) })
    }

    /// The passphrase that is to take the place of the one of the keyslot, as the store has it; it is made and sealed with the
    /// key now, unless an earlier run has done that.
    pub fn next_passphrase(&self) -> Result<SecretBytes, Error> {
        let (payload, context) = self.payload()?;
        if payload.passphrase.is_none() {
            return Err(Error::NoPassphrase(self.case.reference.clone()));
        }
        if payload.passphrase_next.is_none() {
            self.reseal(context, Payload { passphrase_next: Some(random_passphrase()?), ..payload })?;
        }
        let (payload, _) = self.payload()?;
        payload.passphrase_next.ok_or_else(|| Error::ReadBack(self.case.reference.clone()))
    }

    /// Whether a passphrase is sealed with the key that is to take the place of the keyslot's.
    pub fn has_next_passphrase(&self) -> Result<bool, Error> {
        Ok(self.payload()?.0.passphrase_next.is_some())
    }

    /// Has the next passphrase take its place, once it has opened a keyslot that our token claims; the old one is forgotten.
    pub fn take_next_passphrase(&self) -> Result<(), Error> {
        let (payload, context) = self.payload()?;
        let Some(next) = payload.passphrase_next else { return Ok(()) };
        self.keyslot_of(&next, &payload.volume_key)?;
        self.reseal(context, Payload { passphrase: Some(next), passphrase_next: None, ..payload })
    }

    /// The keyslot, of those that our token claims, that the sealed passphrase opens. An older form of the sealed key, with a next
    /// passphrase, would have the wrong one; from now on this host takes none.
    pub fn keyslot(&self) -> Result<u32, Error> {
        match self.payload()?.0 {
            Payload { passphrase: Some(passphrase), passphrase_next: None, volume_key, .. } => {
                let number = self.keyslot_of(&passphrase, &volume_key)?;
                self.remember();
                Ok(number)
            }
            Payload { passphrase: None, .. } => Err(Error::NoPassphrase(self.case.reference.clone())),
            _ => Err(Error::ReadBack(self.case.reference.clone())),
        }
    }

    fn keyslot_of(&self, passphrase: &SecretBytes, key: &VolumeKey) -> Result<u32, Error> {
        let claimed = self.volume().claimed_keyslots()?;
        match self.volume().open_keyslot_of(passphrase, Some(&claimed))? {
            (opened, number) if opened == *key => Ok(number),
            _ => Err(VolumeError::WrongPassphrase { path: self.volume().device.path.clone() }.into()),
        }
    }

    fn store_key_for(
        &self,
        volume_key: VolumeKey,
        passphrase: Option<SecretBytes>,
        replaces: Option<KeyReference>,
    ) -> Result<(), Error> {
        let Case { volume, reference, key: source, .. } = &self.case;
        let container = source.container();
        let content = Content::VolumeKey(Payload {
            volume_key,
            cipher: CIPHER.to_owned(),
            sector_size_bytes: volume.geometry.sector_size.bytes(),
            data_offset_bytes: volume.geometry.data_offset_bytes,
            iv_offset_sectors: volume.geometry.iv_offset_sectors,
            digest: volume.luks().map(|header| header.digest.clone()),
            passphrase,
            passphrase_next: None,
            replaces,
        });
        container.create(&reference.key, volume.uuid(), &content)?;
        self.read_back(&content)
    }

    /// Seals the same key, with all that was sealed with it, for this container, and stores it. It is read back, opened, and
    /// compared with the volume's header.
    pub fn store_copy(&self, of: &Proven<'_>) -> Result<(), Error> {
        let (payload, context) = of.payload()?;
        let content = Content::VolumeKey(payload);
        self.case.key.container().create_copy(&self.case.reference.key, context, &content)?;
        self.read_back(&content)
    }

    /// Whether all is sealed here that is sealed there, and fits the volume.
    pub fn is_copy(&self, of: &Proven<'_>) -> Result<bool, Error> {
        Ok(self.payload()?.0.is(&of.payload()?.0)?)
    }

    /// What is sealed, if it is the volume's own key.
    fn payload(&self) -> Result<(Payload, BoundContext), Error> {
        match self.fetch()?.0 {
            Fetched::Sealed(Opened { content: Content::VolumeKey(payload), context }) => {
                self.agree(&payload)?;
                self.volume().verify_key(&payload.volume_key)?;
                Ok((payload, context))
            }
            Fetched::Sealed(_) | Fetched::Released(_) => Err(Error::NotOurs(self.case.reference.clone())),
        }
    }

    /// A new key that cannot be had back is removed again: nothing depends on it yet.
    fn read_back(&self, content: &Content) -> Result<(), Error> {
        let Case { reference, key: source, .. } = &self.case;
        let read_back = self.key().and_then(|read| match content {
            Content::VolumeKey(payload) if payload.volume_key == *read.key() => Ok(()),
            _ => Err(Error::ReadBack(reference.clone())),
        });
        read_back.inspect_err(|_| {
            if let Err(error) = source.container().store().delete(&reference.key) {
                tracing::warn!("cannot delete the unused key {reference} from the store: {error}");
            }
        })
    }

    /// The same volume as it is on its device now that its header is written; it is opened by what the store has.
    pub fn verify_written(mut self) -> Result<Self, Error> {
        let volume = self.volume();
        let detached = volume.luks().and_then(|header| header.detached.as_deref());
        let written = header::probe(&volume.device.path, detached)?;
        self.case.volume = written;
        self.key()?;
        Ok(self)
    }

    /// Adds the key to this host's lockbox; `None` if the store keeps it unsealed, and so decides each time who may have it.
    pub fn add_to_lockbox(&self) -> Result<Option<EntryContext>, Error> {
        let Case { volume, reference, key, .. } = &self.case;
        let volume = For::volume(volume.uuid());
        let added = key
            .container()
            .add_to_lockbox(&reference.key, volume, self.author(), |fetched| self.open(fetched).map(drop))
            .map_err(|error| self.case.told(error))?;
        self.remember();
        Ok(added)
    }

    /// Writes the audit record of what was done.
    pub fn record(&self, action: &str) {
        self.case.record(action, self.separated.report());
    }

    fn open(&self, fetched: Fetched) -> Result<Unlocked, Error> {
        let (key, by, half) = match fetched {
            Fetched::Sealed(Opened { content: Content::VolumeKey(payload), .. }) => {
                self.agree(&payload)?;
                (payload.volume_key, SEALED, (payload.replaces, payload.passphrase))
            }
            object => {
                let none = || Error::NoPassphrase(self.case.reference.clone());
                let key = self.volume().unlock(&object.passphrase()?.ok_or_else(none)?)?;
                self.mark_used(&object);
                // Whom an object was given out to can make a volume that it opens.
                let is_for_it =
                    |context: &BoundContext| context.volume.is_some() && context.volume == self.volume().uuid();
                let is_sealed_for_it = matches!(&object, Fetched::Sealed(Opened { context, .. }) if is_for_it(context));
                (key, if is_sealed_for_it { SEALED } else { RELEASED }, Default::default())
            }
        };
        self.unlocked(key, by, half, |rest| rest.key())
    }

    fn unlocked(
        &self,
        key: VolumeKey,
        by: fn(KeyReference) -> Authority,
        (replaces, passphrase): (Option<KeyReference>, Option<SecretBytes>),
        open: impl FnOnce(&Proven<'_>) -> Result<Unlocked, Error>,
    ) -> Result<Unlocked, Error> {
        self.check_pin(replaces.as_ref())?;
        let path = &self.volume().device.path;
        let rest = match &self.rest {
            Some(rest) if replaces.as_ref() != Some(&rest.case.reference) => {
                return Err(VolumeError::no_successor(path).into());
            }
            Some(rest) => {
                let unlocked = Box::new(open(rest)?);
                // A strict volume's is forgotten at the end.
                let passphrase = passphrase.ok_or_else(|| VolumeError::HasEnded { path: path.clone() })?;
                Some(Rest { unlocked, passphrase })
            }
            None => None,
        };
        Ok(Unlocked::by_stored_key(&self.separated, self.volume(), key, by, rest)?)
    }

    /// Marks a key that opens one volume as used. Failing to do so is a warning: the volume exists already.
    fn mark_used(&self, key: &Fetched) {
        let Case { volume, reference, key: source, fills, .. } = &self.case;
        if *fills && key.is_being_filled() {
            return;
        }
        let what = volume.uuid().map_or_else(|| "a plain volume".to_owned(), |uuid| uuid.to_string());
        if let Err(error) = source.container().mark_used(&reference.key, key, &what) {
            tracing::warn!("the key {reference} is not noted as used: {}", chain(&error));
        }
    }

    /// Refuses a key whose sealed form says something else of the volume than the header does.
    fn agree(&self, sealed: &Payload) -> Result<(), Error> {
        let Case { volume, reference, .. } = &self.case;
        let device = volume.device.path.clone();
        if !has_digest_of(sealed, volume) {
            return Err(Error::NoLongerFits { reference: reference.clone(), device });
        }
        agrees(sealed, volume).map_err(|what| Error::Mismatch { reference: reference.clone(), device, what })
    }
}

/// The key that is asked for, or else the one that the header's token names.
fn reference(asked: Option<KeyReference>, volume: &Volume) -> Result<KeyReference, Error> {
    asked.or_else(|| volume.reference().cloned()).ok_or_else(|| no_reference(volume))
}

/// The header names no key of ours: what it says instead.
pub fn no_reference(volume: &Volume) -> Error {
    let device = volume.device.path.clone();
    let tokens = volume.luks().map(|header| &header.clevis[..]).unwrap_or_default();
    let described = tokens.iter().filter_map(|token| Binding::of_members(&token.jwe).ok());
    let opens: Vec<_> = described.map(|binding| binding.to_string()).collect();
    match opens.is_empty() {
        true => Error::NoReference(device),
        false => Error::OnlyClevis { device, opens: opens.join(" or ") },
    }
}

/// Whether the header has the sealed digest.
fn has_digest_of(sealed: &Payload, volume: &Volume) -> bool {
    sealed.digest.as_deref() == volume.luks().map(|header| header.digest.as_str())
}

/// Whether the header says what was sealed, but for the digest: neither is believed alone.
fn agrees(sealed: &Payload, volume: &Volume) -> Result<(), String> {
    let geometry = &volume.geometry;
    let differ = |what: &str, sealed: String, header: String| {
        if sealed == header {
            Ok(())
        } else {
            Err(format!("{what} {header} in the header, {sealed} in the sealed key"))
        }
    };
    differ("cipher", sealed.cipher.clone(), CIPHER.to_owned())?;
    differ("sector size", sealed.sector_size_bytes.to_string(), geometry.sector_size.to_string())?;
    differ("IV offset", sealed.iv_offset_sectors.to_string(), geometry.iv_offset_sectors.to_string())?;
    differ("data offset", sealed.data_offset_bytes.to_string(), geometry.data_offset_bytes.to_string())?;
    if let Some(size) = volume.key_size {
        let bits = |size: KeySize| size.bits().to_string();
        differ("key size", bits(sealed.volume_key.size()), bits(size))?;
    }
    Ok(())
}

/// A passphrase of 256 random bits, in the form that os-brick makes of a key's bytes: 64 lower-case hex digits.
pub fn random_passphrase() -> Result<SecretBytes, Error> {
    Ok(hex(&SecretBytes::random(32)?)?)
}
