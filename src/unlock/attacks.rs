//! Attacks of whoever can write to the store and to headers, and knows all public keys.

use std::{fs::OpenOptions, path::PathBuf, time::Duration};

use uuid::Uuid;

use super::{
    Error,
    case::{Asked, Case, Circumstances},
    container::TrustError,
    lockbox::{self, LockboxError},
    testing::Site,
};
use crate::{
    base::key::{
        BoundContext, HostName, KeyId, KeyReference, KeySize, ManagedObject, ObjectFacts, SealedKey, SecretBytes,
        VolumeKey,
    },
    keys::{
        seal::{ContainerKey, Content, LockboxKey, OwnerKey, OwnerRecipient, Payload, Recipient, seal},
        store::{ContainerKeys, Current},
    },
    sys::device::Device,
    volumes::{
        Authority,
        header::{self, CIPHER, HEADER_BYTES, NewHeader, SectorSize, Volume},
    },
};

/// A site with one volume, and what the attacker makes of it: a header of the same UUID and token over another volume key.
struct Attack {
    site: Site,
    device: PathBuf,
    reference: KeyReference,
    uuid: Uuid,
    /// What a removed host still knows.
    right: VolumeKey,
    evil: VolumeKey,
}

fn copy(key: &VolumeKey) -> VolumeKey {
    VolumeKey::from_secret(SecretBytes::copy_of(key.expose()).unwrap()).unwrap()
}

impl Attack {
    fn new() -> Self {
        let site = Site::with("");
        let (device, reference) = (site.blank("a"), site.container().new_reference().unwrap());
        let key = VolumeKey::random(KeySize::Bits512).unwrap();
        let uuid = Uuid::new_v4();
        let (right, evil) = (copy(&key), VolumeKey::random(KeySize::Bits512).unwrap());
        let attack = Self { site, device, reference, uuid, right, evil };
        let volume = attack.header(&key);
        let container = std::sync::Arc::new(attack.site.container());
        let case = Case::of_new_key(&attack.site.config, volume, attack.reference.clone(), container);
        case.prove(Circumstances::default()).unwrap().store_key(key, None).unwrap();
        attack
    }

    /// Writes a header of the volume's UUID and token, over this key.
    fn header(&self, key: &VolumeKey) -> Volume {
        self.header_with(key, &self.reference, None)
    }

    fn header_with(&self, key: &VolumeKey, reference: &KeyReference, keyslot: Option<&SecretBytes>) -> Volume {
        let device = Device::look(&self.device).unwrap();
        let header =
            NewHeader { uuid: self.uuid, key, sector_size: SectorSize::B512, reference, keyslot, detached: false };
        let image = header.make(&device).unwrap();
        let volume = header::probe_image(&device, None, &image).unwrap();
        let file = OpenOptions::new().write(true).open(&self.device).unwrap();
        volume.luks().unwrap().image.write_to(&file, HEADER_BYTES).unwrap();
        volume
    }

    /// A sealed key for the attacker's volume key, and for whom it is sealed to.
    fn forged(&self, volume: &Volume, generation: u64, recipient: Box<dyn Recipient>) -> SealedKey {
        self.sealed(&self.evil, volume, generation, recipient)
    }

    fn sealed(&self, key: &VolumeKey, volume: &Volume, generation: u64, recipient: Box<dyn Recipient>) -> SealedKey {
        let context = BoundContext {
            version: 1,
            key_id: self.reference.key,
            container: self.site.name.clone(),
            volume: Some(self.uuid),
            project: None,
            generation,
            created: 1,
        };
        let content = Content::VolumeKey(Payload {
            volume_key: copy(key),
            cipher: CIPHER.to_owned(),
            data_offset_bytes: volume.geometry.data_offset_bytes,
            digest: volume.luks().map(|luks| luks.digest.clone()),
            ..Payload::random()
        });
        seal(&context, &content, &[recipient]).unwrap()
    }

    fn owner(&self) -> Box<dyn Recipient> {
        Box::new(OwnerRecipient::read(&self.site.beside_the_keys("owner.pem")).unwrap())
    }

    /// The same site as another host sees it, which has opened nothing yet.
    fn other_host(mut self) -> Self {
        self.site.config.state = self.site.beside_the_keys("other-state").into();
        self
    }

    fn opened(&self) -> Result<(), Error> {
        let volume = header::probe(&self.device, None).unwrap();
        Case::find(&self.site.config, volume, Asked::default())?.prove(Circumstances::default())?.key().map(drop)
    }

    fn remembered(&self) -> Vec<String> {
        let files = walk(&self.site.config.state);
        files.iter().map(|path| path.display().to_string()).collect()
    }
}

fn walk(folder: &std::path::Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect()
}

#[test]
fn a_key_that_is_sealed_to_the_owner_has_no_author_and_opens_nothing() {
    let attack = Attack::new().other_host();
    let good = attack.site.store.stored(attack.reference.key).unwrap();
    let volume = attack.header(&attack.evil);
    attack.site.store.put(attack.reference.key, attack.forged(&volume, 1, attack.owner()));
    assert!(matches!(attack.opened(), Err(Error::NoAuthor(_))));
    assert!(attack.remembered().is_empty(), "{:?}", attack.remembered());
    attack.site.store.put(attack.reference.key, good);
    assert!(matches!(attack.opened(), Err(Error::NoLongerFits { .. })), "the header is still the attacker's");
}

#[test]
fn a_volume_that_was_opened_here_stays_the_same_volume_whoever_made_the_key() {
    let attack = Attack::new();
    attack.opened().unwrap();
    let volume = attack.header(&attack.evil);
    // A host that was removed knows the container key: what it seals has an author.
    let container = std::sync::Arc::new(attack.site.container());
    attack.site.store.put(attack.reference.key, attack.forged(&volume, 2, Box::new(container.current_key().unwrap())));
    let refused = attack.opened().err();
    assert!(matches!(&refused, Some(Error::NotPinned { volume, .. }) if *volume == attack.uuid), "{refused:?}");
}

#[test]
fn a_key_under_a_planted_container_key_is_refused_where_another_one_is_trusted() {
    let attack = Attack::new();
    let name = &attack.site.name;
    std::fs::remove_dir_all(attack.site.config.state.join("volumes")).unwrap();
    attack.site.container().rotate(Duration::ZERO, &|_| ()).unwrap();
    let volume = attack.header(&attack.evil);
    let first = ContainerKey::random(name, None).unwrap();
    let second = ContainerKey::random(name, Some(&first)).unwrap();
    let third = ContainerKey::random(name, Some(&second)).unwrap();
    for planted in [first, second, third].map(std::sync::Arc::new) {
        let place = format!("kek/{}", planted.epoch());
        attack.site.store.lie(&place, planted.seal_to(vec![attack.owner()], 1).unwrap());
        attack.site.store.put(attack.reference.key, attack.forged(&volume, 2, Box::new(planted)));
        let refused = attack.opened().err();
        assert!(
            matches!(refused, Some(Error::Trust(TrustError::Another { .. } | TrustError::Unproven(_)))),
            "{place}: {refused:?}"
        );
        attack.site.store.be_honest(&place);
    }
}

#[test]
fn a_pinned_volume_opens_although_its_container_key_cannot_be_connected_any_more() {
    let attack = Attack::new();
    // An initramfs is older than the last rotations; the proofs between are gone.
    for _ in 0..3 {
        attack.site.container().rotate(Duration::ZERO, &|_| ()).unwrap();
    }
    let file = attack.site.config.state.join("containers").join(attack.site.name.as_str());
    std::fs::write(file, "{\"epoch\":\"1\",\"fingerprint\":\"00\"}").unwrap();
    attack.opened().unwrap();
}

#[test]
fn nothing_is_remembered_of_a_key_that_has_opened_nothing() {
    let attack = Attack::new().other_host();
    let good = attack.site.store.stored(attack.reference.key).unwrap();
    let volume = header::probe(&attack.device, None).unwrap();
    // Everything about it is right, but the key.
    attack
        .site
        .store
        .put(attack.reference.key, attack.forged(&volume, 7, Box::new(attack.site.container().current_key().unwrap())));
    assert!(matches!(attack.opened(), Err(Error::Volume(_))));
    assert!(attack.remembered().is_empty(), "{:?}", attack.remembered());
    attack.site.store.put(attack.reference.key, good);
    attack.opened().unwrap();
    let remembered = attack.remembered();
    assert!(remembered.iter().any(|path| path.ends_with(&attack.uuid.to_string())), "{remembered:?}");
    assert!(remembered.iter().any(|path| path.contains("containers")), "{remembered:?}");
}

#[test]
fn a_generation_beyond_all_rotations_is_refused_and_the_lie_ends_with_the_lie() {
    let attack = Attack::new();
    let good = attack.site.store.stored(attack.reference.key).unwrap();
    let volume = header::probe(&attack.device, None).unwrap();
    let container = attack.site.container();
    attack
        .site
        .store
        .put(attack.reference.key, attack.forged(&volume, u64::MAX, Box::new(container.current_key().unwrap())));
    assert!(matches!(attack.opened(), Err(Error::Trust(TrustError::Jump { .. }))));
    attack.site.store.put(attack.reference.key, good);
    attack.opened().unwrap();
}

#[test]
fn a_rotation_leaves_alone_what_nobody_vouches_for_and_ends() {
    let attack = Attack::new();
    let volume = attack.header(&attack.evil);
    let planted = KeyId::random();
    let mut forged = attack.forged(&volume, 1, attack.owner());
    forged.unprotected.clear();
    attack.site.store.put(planted, forged.clone());
    let rotation = attack.site.container().rotate(Duration::ZERO, &|_| ()).unwrap();
    assert_eq!((rotation.resealed, &rotation.left_alone), (1, &vec![planted]), "{rotation:?}");
    assert_eq!(attack.site.store.stored(planted), Some(forged), "it stays as it is");
    assert_eq!(attack.site.store.current().unwrap().map(|current: Current| current.rotating), Some(false));
}

/// What a host that knows `first` puts in as the container key after it, for all whom that is to be for, and not for itself.
fn planted_after(site: &Site, first: &ContainerKey, host: &HostName) -> ContainerKey {
    let planted = ContainerKey::random(&site.name, Some(first)).unwrap().without_host(host);
    let recipients = site.container().key_recipients(&planted).unwrap();
    site.store.put(format!("kek/{}", planted.epoch()), planted.seal_to(recipients, 1).unwrap());
    planted
}

#[test]
fn a_host_is_not_removed_with_the_container_key_that_it_has_planted_before() {
    for announced in [false, true] {
        let attack = Attack::new();
        let (site, host): (_, HostName) = (&attack.site, "compute-7".parse().unwrap());
        let recipient = OwnerKey::generate().unwrap().recipient().unwrap();
        site.container().admit_host(&host, &recipient).unwrap();
        let planted = planted_after(site, &site.container().current_key().unwrap(), &host);
        if announced {
            site.store.set_current(&Current { epoch: planted.epoch(), rotating: true }, "").unwrap();
        }
        let rotation = site.container().remove_host(&host, &|_| ()).unwrap();
        assert!(rotation.failed.is_empty() && rotation.resealed == 1, "{rotation:?}");
        assert_ne!(rotation.fingerprint, planted.fingerprint().unwrap(), "announced: {announced}");
        assert_eq!(site.container().hosts().unwrap(), []);
        attack.opened().unwrap();
    }
}

#[test]
fn a_rotation_does_not_go_on_with_a_key_that_a_host_got_meanwhile_and_hides_that() {
    let attack = Attack::new();
    let (site, host): (_, HostName) = (&attack.site, "compute-7".parse().unwrap());
    site.container().rotate(Duration::ZERO, &|_| ()).unwrap();
    let hidden = site.store.stored("kek/2").unwrap();
    site.store.set_current(&Current { epoch: "2".parse().unwrap(), rotating: true }, "").unwrap();
    let recipient = OwnerKey::generate().unwrap().recipient().unwrap();
    site.container().admit_host(&host, &recipient).unwrap();
    site.store.put("kek/2", hidden);
    let rotation = site.container().remove_host(&host, &|_| ()).unwrap();
    assert_eq!(rotation.epoch, "3".parse().unwrap());
}

#[test]
fn a_look_at_a_container_trusts_nothing_after_the_lie() {
    let attack = Attack::new().other_host();
    let planted = ContainerKey::random(&attack.site.name, None).unwrap();
    attack.site.store.lie("kek/1", planted.seal_to(vec![attack.owner()], 1).unwrap());
    drop(attack.site.container().hosts());
    assert!(attack.remembered().is_empty(), "{:?}", attack.remembered());
    attack.site.store.be_honest("kek/1");
    attack.opened().unwrap();
}

#[test]
fn a_generation_that_nobody_vouches_for_is_not_remembered() {
    for known in [false, true] {
        let attack = Attack::new();
        let volume = header::probe(&attack.device, None).unwrap();
        // A host that was removed knows the volume key, and the container key before the last one.
        let before = Box::new(attack.site.container().current_key().unwrap());
        attack.site.container().rotate(Duration::from_secs(3600), &|_| ()).unwrap();
        let good = attack.site.store.stored(attack.reference.key).unwrap();
        let planted = std::sync::Arc::new(ContainerKey::random(&attack.site.name, None).unwrap());
        let recipient = if known {
            before
        } else {
            attack.site.store.lie("kek/1", planted.seal_to(vec![attack.owner()], 1).unwrap());
            Box::new(planted)
        };
        attack.site.store.put(attack.reference.key, attack.sealed(&attack.right, &volume, 9000, recipient));
        attack.opened().expect("it is the volume's key");
        attack.site.store.be_honest("kek/1");
        attack.site.store.put(attack.reference.key, good);
        attack.opened().expect("a lie ends with the lie");
    }
}

#[test]
fn a_lockbox_key_of_the_last_generation_does_not_stay_the_last() {
    let attack = Attack::new();
    let (store, host) = (&attack.site.store, "compute-7".parse().unwrap());
    let recipients = || vec![attack.owner()];
    lockbox::admit(store, &host, &recipients()).unwrap();
    let last = LockboxKey::random(&host, Some(u64::MAX), 1).unwrap();
    store.lie("host/compute-7", last.seal_to(&recipients()).unwrap());
    let refused = lockbox::admit(store, &host, &recipients()).err();
    assert!(matches!(refused, Some(LockboxError::OfTheFuture(_))), "{refused:?}");
    store.be_honest("host/compute-7");
    assert!(lockbox::admit(store, &host, &recipients()).unwrap().generation < u64::MAX - 1);
}

#[test]
fn a_rotation_seals_under_no_container_key_but_its_own() {
    let attack = Attack::new();
    let site = &attack.site;
    let planted = ContainerKey::random(&site.name, Some(&site.container().current_key().unwrap())).unwrap();
    let good = site.store.stored(attack.reference.key);
    // Whoever can write to the store answers with this when the new key is read back; no secret is needed for that.
    let stranger = ContainerKey::random(&site.name, None).unwrap();
    let stranger = ContainerKey::random(&site.name, Some(&stranger)).unwrap();
    for lie in [stranger, planted] {
        let place = format!("kek/{}", lie.epoch());
        site.store.lie(&place, lie.seal_to(vec![attack.owner()], 1).unwrap());
        let refused = site.container().rotate(Duration::ZERO, &|_| ()).err();
        let is_told = matches!(refused, Some(Error::Trust(TrustError::Another { .. } | TrustError::Unproven(_))));
        assert!(is_told, "{refused:?}");
        assert_eq!(site.store.stored(attack.reference.key), good);
        site.store.be_honest(&place);
        ContainerKeys::delete(&site.store, lie.epoch()).unwrap();
    }
    assert_eq!(site.container().rotate(Duration::ZERO, &|_| ()).unwrap().resealed, 1);
    attack.opened().unwrap();
}

#[test]
fn a_tenants_object_does_not_prove_a_volume_to_be_the_hosts_own() {
    let attack = Attack::new().other_host();
    let facts = ObjectFacts { algorithm: None, ..ObjectFacts::symmetric(256) };
    let container = attack.site.container();
    let object = container.keep_object(ManagedObject { facts, value: SecretBytes::random(32).unwrap() }).unwrap();
    // The tenant gets it, and makes a volume of the host's UUID that it opens.
    let passphrase = container.give_out(&object.key).unwrap().passphrase().unwrap();
    attack.header_with(&attack.evil, &object, Some(&passphrase));
    let volume = header::probe(&attack.device, None).unwrap();
    let case = Case::find(&attack.site.config, volume, Asked::default()).unwrap();
    let unlocked = case.prove(Circumstances::default()).unwrap().key().unwrap();
    assert_eq!(unlocked.by(), &Authority::ReleasedKey(object));
}
