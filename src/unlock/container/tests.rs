//! Containers over a store in memory: rotation, pins, use, and the lockbox before the store.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use uuid::Uuid;

use super::{Author, Container, Source, Step, TrustError, Use, ViaLockbox, lock};
use crate::{
    base::key::{KeyId, ManagedObject, ObjectFacts, SecretBytes},
    config::IdentitySpec,
    keys::{
        seal::{ContainerKey, Content, For, LockboxKey, OwnerKey, Payload},
        store::{ContainerKeys, Current, StoreError},
    },
    sys::device::Device,
    unlock::{
        Error,
        lockbox::{EntryError, Lockbox},
        testing::Site,
    },
    volumes::header::{self, NewHeader, SectorSize, Volume},
};

fn object() -> ManagedObject {
    let facts = ObjectFacts { algorithm: None, fresh: true, ..ObjectFacts::symmetric(256) };
    ManagedObject { facts, value: SecretBytes::random(32).unwrap() }
}

fn kept(container: &Container) -> KeyId {
    container.keep_object(object()).unwrap().key
}

fn rotate(site: &Site) -> super::Rotation {
    site.container().rotate(Duration::ZERO, &|_| ()).unwrap()
}

#[test]
fn a_rotation_goes_on_where_a_key_has_stopped_it() {
    let site = Site::with("");
    site.container().make_first_key().unwrap();
    let ids: Vec<KeyId> = (0..3).map(|_| kept(&site.container())).collect();
    site.store.lie(ids[1], site.store.stored(ids[0]).unwrap());
    let told = Mutex::new(Vec::new());
    let hear = |step: Step<'_>| {
        if let Step::Not(what, id, _) = step {
            lock(&told).push((what, *id));
        }
    };
    let stopped = site.container().rotate(Duration::ZERO, &hear).unwrap();
    assert_eq!(*lock(&told), [("failed", ids[1])], "at once");
    assert_eq!((stopped.resealed, stopped.failed.len()), (2, 1), "{stopped:?}");
    assert_eq!(stopped.failed[0].0, ids[1]);
    assert_eq!(stopped.deleted, [], "a key is still sealed under the one before");

    site.store.be_honest(ids[1]);
    let ended = rotate(&site);
    assert_eq!((ended.epoch, ended.resealed, ended.unchanged), (stopped.epoch, 1, 2), "{ended:?}");
    assert!(ended.failed.is_empty());
    ids.iter().for_each(|id| drop(site.container().object(id).unwrap()));
    let next = rotate(&site);
    assert!(next.epoch > ended.epoch && next.resealed == 3, "{next:?}");
    assert_eq!(next.deleted.len(), 1, "the one before the last goes");
}

#[test]
fn a_host_seals_under_no_earlier_and_no_other_container_key_than_it_has_seen() {
    let site = Site::with("");
    site.container().make_first_key().unwrap();
    kept(&site.container());
    let first = site.store.current().unwrap().unwrap();
    rotate(&site);
    let second = site.store.current().unwrap().unwrap();

    site.store.set_current(&Current { epoch: first.epoch, rotating: false }, "").unwrap();
    let refused = site.container().keep_object(object()).err();
    assert!(matches!(refused, Some(Error::Trust(TrustError::Older { .. }))), "{refused:?}");

    site.store.set_current(&second, "").unwrap();
    let container = site.container();
    let before = ContainerKey::random(&site.name, None).unwrap();
    let planted = ContainerKey::random(&site.name, Some(&before)).unwrap();
    assert_eq!(planted.epoch(), second.epoch);
    site.store
        .lie(format!("kek/{}", second.epoch), planted.seal_to(container.key_recipients(&planted).unwrap(), 0).unwrap());
    let refused = container.keep_object(object()).err();
    assert!(matches!(refused, Some(Error::Trust(TrustError::Another { .. }))), "{refused:?}");
    site.store.be_honest(format!("kek/{}", second.epoch));
    site.container().keep_object(object()).expect("a lie ends with the lie");
}

#[test]
fn a_store_that_fails_before_the_read_back_leaves_no_key_current() {
    let site = Site::with("");
    site.store.fail_next(StoreError::Denied { action: "read from", at: "memory".to_owned() });
    assert!(matches!(site.container().make_first_key(), Err(Error::Store(StoreError::Denied { .. }))));
    assert!(site.store.current().unwrap().is_none());
    site.container().make_first_key().unwrap();
    site.container().make_first_key().expect("it is there");
}

#[test]
fn the_first_key_of_a_store_that_begins_anew_is_trusted_before_the_store_names_it() {
    let (before, site) = (Site::with(""), Site::with(""));
    before.container().make_first_key().unwrap();
    let trusted = |of: &Site| of.config.state.join("containers").join(of.name.as_str());
    std::fs::create_dir_all(trusted(&site).parent().unwrap()).unwrap();
    std::fs::copy(trusted(&before), trusted(&site)).unwrap();
    let refused = site.container().keep_object(object()).err();
    assert!(matches!(refused, Some(Error::Trust(TrustError::NoneLeft { .. }))), "{refused:?}");

    site.store.fail_at("set current", StoreError::Denied { action: "write to", at: "memory".to_owned() });
    site.container().make_first_key().unwrap_err();
    let container = site.container();
    assert!(container.is_the_trusted(&container.container_key("1".parse().unwrap()).unwrap()));
    site.container().make_first_key().unwrap();
    kept(&site.container());
}

#[test]
fn a_rotation_that_ends_before_its_key_is_announced_can_be_done_again() {
    let site = Site::with("");
    site.container().make_first_key().unwrap();
    let id = kept(&site.container());
    site.store.fail_at("set current", StoreError::Denied { action: "write to", at: "memory".to_owned() });
    let ended = site.container().rotate(Duration::ZERO, &|_| ()).unwrap_err();
    assert!(matches!(ended, Error::Store(StoreError::Denied { .. })), "{ended:?}");
    site.container().object(&id).expect("it opens meanwhile");
    kept(&site.container());
    assert_eq!(rotate(&site).resealed, 2);
    site.container().object(&id).unwrap();
}

/// A volume in a blank file.
fn volume(site: &Site, name: &str) -> Volume {
    let device = Device::look(&site.blank(name)).unwrap();
    let key = crate::base::key::VolumeKey::random(crate::base::key::KeySize::Bits512).unwrap();
    let reference = site.container().new_reference().unwrap();
    let header = NewHeader {
        uuid: Uuid::new_v4(),
        key: &key,
        sector_size: SectorSize::B512,
        reference: &reference,
        keyslot: None,
        detached: false,
    };
    let image = header.make(&device).unwrap();
    header::probe_image(&device, None, &image).unwrap()
}

#[test]
fn of_two_hosts_that_claim_an_unused_key_one_comes_first() {
    let site = Site::with("");
    let (one, other) = (site.container(), site.container());
    let id = kept(&one);
    let (first, second) = (one.unused(&id, false, None).unwrap(), other.unused(&id, false, None).unwrap());
    one.claim(&id, first, &volume(&site, "a"), None).unwrap();
    let refused = other.claim(&id, second, &volume(&site, "b"), None).err();
    assert!(matches!(refused, Some(Error::Store(StoreError::Outdated { .. }))), "{refused:?}");
    assert!(matches!(other.unused(&id, false, None), Err(Error::KeyUsed { .. })));
}

#[test]
fn a_key_that_was_given_out_is_unused_no_longer_and_a_look_is_no_use() {
    let site = Site::with("");
    let container = site.container();
    let id = kept(&container);
    assert!(container.object(&id).unwrap().facts.fresh);
    assert!(container.unused(&id, false, None).is_ok());
    container.give_out(&id).unwrap();
    assert!(!container.object(&id).unwrap().facts.fresh);
    assert!(matches!(container.unused(&id, false, None), Err(Error::KeyUsed { .. })));
}

/// A host whose lockbox is open, and a key in its store.
struct Host {
    site: Site,
    key: Arc<LockboxKey>,
    id: KeyId,
    volume: Uuid,
}

fn volume_key() -> Content {
    Content::VolumeKey(Payload::random())
}

impl Host {
    fn new() -> Self {
        let site = Site::with("[lockbox]\nhost = 'compute-7'\nstore = 'SITE'\npath = 'box'\n");
        let key = Arc::new(LockboxKey::random(&"compute-7".parse().unwrap(), None, 1).unwrap());
        let (id, volume) = (KeyId::random(), Uuid::new_v4());
        site.container().create(&id, Some(volume), &volume_key()).unwrap();
        Self { site, key, id, volume }
    }

    /// The way to the key, of a process of its own.
    fn way(&self, used: Use, volume: For) -> ViaLockbox {
        let mut container = Container::open(&self.site.config, &self.site.name, None, used).unwrap();
        container.lockbox = Lockbox::of(&self.site.config).map(|lockbox| lockbox.with_key(self.key.clone()));
        ViaLockbox::look(Arc::new(container), self.id, volume, &|_| Ok(()))
    }

    fn source(&self, used: Use) -> Result<Source, Error> {
        let way = self.way(used, For::Luks(self.volume));
        way.places()?;
        let source = way.fetch(Author::Container)?.1;
        way.remember();
        Ok(source)
    }
}

#[test]
fn a_key_comes_out_of_the_lockbox_once_the_store_has_given_it() {
    let host = Host::new();
    assert_eq!(host.source(Use::Unlock).unwrap(), Source::Store);
    host.site.store.set_unreachable(true);
    let asked = host.site.store.asked().len();
    assert_eq!(host.source(Use::Unlock).unwrap(), Source::Lockbox);
    assert_eq!(host.site.store.asked().len(), asked, "the store is not asked for its places either");
    assert!(matches!(host.source(Use::Keys), Err(Error::Store(_))), "work on keys sees the store itself");
    assert!(matches!(host.source(Use::BootByStore), Err(Error::Store(_))));
}

#[test]
fn an_entry_that_is_for_another_volume_or_older_than_what_was_seen_is_left_out() {
    let host = Host::new();
    host.source(Use::Unlock).unwrap();
    host.site.store.set_unreachable(true);
    let other = host.way(Use::Unlock, For::Luks(Uuid::new_v4()));
    assert!(!other.has_entry());
    let refused = other.fetch(Author::Container).err();
    assert!(matches!(refused, Some(Error::NeitherStoreNorLockbox { .. })), "{refused:?}");
    host.site.store.set_unreachable(false);

    // The store withdraws what the entry was made of.
    host.site.container().make_first_key().unwrap();
    rotate(&host.site);
    let container = host.site.container();
    let (_, seen) = container.fetch(&host.id, For::Any, Author::Container).unwrap();
    container.remember(seen);
    host.site.store.set_unreachable(true);
    let refused = host.source(Use::Unlock).err();
    let is_old = |error: &Error| matches!(error, Error::NeitherStoreNorLockbox { entry, .. } if matches!(**entry, EntryError::OldGeneration { .. }));
    assert!(refused.as_ref().is_some_and(is_old), "{refused:?}");
}

#[test]
fn a_store_that_lies_does_not_destroy_a_good_entry() {
    let host = Host::new();
    host.source(Use::Unlock).unwrap();
    let container = || {
        let mut container = Container::open(&host.site.config, &host.site.name, None, Use::Keys).unwrap();
        container.lockbox = Lockbox::of(&host.site.config).map(|lockbox| lockbox.with_key(host.key.clone()));
        container
    };
    let good = host.site.store.stored(host.id).unwrap();
    // Somebody who holds the container key has put in a key of the same id.
    host.site.container().store().delete(&host.id).unwrap();
    host.site.container().create(&host.id, Some(host.volume), &volume_key()).unwrap();
    assert!(matches!(container().add_reference_to_lockbox(&host.id), Err(Error::AnotherKey(_))));
    host.site.store.put(host.id, good);
    container().add_reference_to_lockbox(&host.id).unwrap();
    assert_eq!(host.source(Use::Unlock).unwrap(), Source::Lockbox);
}

#[test]
fn an_entry_that_does_not_fit_the_header_gives_way_to_the_store() {
    let host = Host::new();
    host.source(Use::Unlock).unwrap();
    let mut container = Container::open(&host.site.config, &host.site.name, None, Use::Unlock).unwrap();
    container.lockbox = Lockbox::of(&host.site.config).map(|lockbox| lockbox.with_key(host.key.clone()));
    let unfit = |_: &Content| Err("the digest differs".to_owned());
    let way = ViaLockbox::look(Arc::new(container), host.id, For::Luks(host.volume), &unfit);
    assert!(!way.has_entry());
    assert_eq!(way.fetch(Author::Container).unwrap().1, Source::Store);
    assert_eq!(host.source(Use::Unlock).unwrap(), Source::Lockbox, "the entry stays: the header may be wrong");
}

/// A site with this policy over the leaves `b` and `c`, whose public keys are beside the configuration.
fn with_policy(policy: &str) -> (Site, OwnerKey, OwnerKey) {
    let more = "[leaves.b]\npublic = 'b.pem'\n[leaves.c]\npublic = 'c.pem'\n";
    let mut site = Site::with(&format!("opens = '{policy}'\n{more}"));
    let [b, c] = ["b", "c"].map(|name| {
        let key = OwnerKey::generate().unwrap();
        std::fs::write(site.beside_the_keys(&format!("{name}.pem")), key.public_pem().unwrap()).unwrap();
        std::fs::write(site.beside_the_keys(&format!("{name}.key")), key.private_pem().unwrap().expose()).unwrap();
        key
    });
    has_identities(&mut site, &["owner", "b"]);
    (site, b, c)
}

fn has_identities(site: &mut Site, names: &[&str]) {
    let identity = |name: &&str| IdentitySpec::of("", site.beside_the_keys(&format!("{name}.key")));
    let identities = names.iter().map(identity).collect();
    site.config.stores.get_mut(&site.name).unwrap().sealing.identities = identities;
}

fn opens(site: &Site, epoch: &str) -> Result<(), Error> {
    site.container().container_key(epoch.parse().unwrap()).map(drop)
}

#[test]
fn a_container_opens_exactly_by_its_policy() {
    let (mut site, ..) = with_policy("any(owner, all(b, c))");
    site.container().make_first_key().unwrap();
    for (identities, met) in [(&["owner"][..], true), (&["b", "c"], true), (&["b"], false), (&["c"], false)] {
        has_identities(&mut site, identities);
        let opened = opens(&site, "1");
        assert_eq!(opened.is_ok(), met, "{identities:?}");
        if let Err(error) = opened {
            let told = crate::base::chain::chain(&error);
            assert!(told.contains("2 of 2 (1 of the 2 shares that it takes could be had"), "{told}");
        }
    }
}

#[test]
fn a_rotation_seals_by_the_policy_that_is_configured_now() {
    let (mut site, ..) = with_policy("any(owner, b)");
    site.container().make_first_key().unwrap();
    let key = kept(&site.container());
    let sealing = &mut site.config.stores.get_mut(&site.name).unwrap().sealing;
    sealing.policy = "all(b, c)".parse().unwrap();
    sealing.leaves = site.config.leaves.clone();
    // Begun for another policy, a rotation is begun anew.
    let current = site.store.current().unwrap().unwrap();
    site.store.set_current(&Current { rotating: true, ..current }, "").unwrap();
    assert_eq!(rotate(&site).epoch, "2".parse().unwrap());
    has_identities(&mut site, &["b"]);
    assert!(opens(&site, "1").is_ok() && opens(&site, "2").is_err());
    has_identities(&mut site, &["b", "c"]);
    drop(site.container().object(&key).unwrap());
    // And with the same policy it goes on.
    site.store.set_current(&Current { epoch: "2".parse().unwrap(), rotating: true }, "").unwrap();
    assert_eq!(rotate(&site).epoch, "2".parse().unwrap());
}

#[test]
fn a_host_is_admitted_into_its_place_in_the_policy() {
    let (mut site, ..) = with_policy("any(owner, all(hosts, b))");
    let (name, host) = ("compute-7".parse().unwrap(), OwnerKey::generate().unwrap());
    std::fs::write(site.beside_the_keys("host.key"), host.private_pem().unwrap().expose()).unwrap();
    site.container().make_first_key().unwrap();
    site.container().admit_host(&name, &host.recipient().unwrap()).unwrap();
    for (identities, met) in [(&["host"][..], false), (&["host", "b"], true), (&["b"], false)] {
        has_identities(&mut site, identities);
        assert_eq!(opens(&site, "1").is_ok(), met, "{identities:?}");
    }
    has_identities(&mut site, &["owner"]);
    rotate(&site);
    has_identities(&mut site, &["host", "b"]);
    assert!(opens(&site, "2").is_ok(), "it stays admitted");

    has_identities(&mut site, &["owner"]);
    site.config.stores.get_mut(&site.name).unwrap().sealing.policy = "any(owner, b)".parse().unwrap();
    let refused = site.container().admit_host(&name, &host.recipient().unwrap());
    assert!(matches!(refused, Err(Error::NoHostsInPolicy { .. })), "{refused:?}");
}

#[test]
fn a_lockbox_is_no_way_round_a_policy() {
    let weaker = |policy: &str, more: &str| {
        let lockbox = format!("[lockbox]\nhost = 'h'\nstore = 'SITE'\n{more}\n");
        let site = Site::with(&format!("opens = '{policy}'\n{lockbox}"));
        let container = site.container();
        let id = kept(&container);
        match container.add_reference_to_lockbox(&id) {
            Err(Error::LockboxIsWeaker { .. }) => {
                let container = Container::open(&site.config, &site.name, None, Use::Unlock).unwrap();
                assert!(container.is_lockbox_weaker);
                true
            }
            // It is not open.
            Err(Error::Lockbox(_)) => false,
            other => panic!("{:?}", other.map(drop)),
        }
    };
    assert!(weaker("owner", ""), "an owner is not this host");
    assert!(!weaker("any(owner, hosts)", ""));
    assert!(!weaker("owner", "weaker = true"));
}

#[test]
fn servers_are_waited_for_only_where_nothing_on_this_host_is_enough() {
    let text = "[leaves.t]\ntang = ['http://10.0.0.5', 'http://[fd00::5]:81']\n";
    let servers = |policy: &str, is_host: bool| {
        let site = Site::with(&format!("opens = '{policy}'\n{text}"));
        let store = site.config.store(&site.name).unwrap();
        let servers = super::servers_to_open(&site.config, store, is_host).unwrap();
        servers.into_iter().map(|server| format!("{} {}", server.host, server.port)).collect::<Vec<_>>()
    };
    assert_eq!(servers("all(owner, t)", false), ["10.0.0.5 80", "fd00::5 81"]);
    assert!(servers("any(owner, t)", false).is_empty());
    assert_eq!(servers("any(hosts, t)", false).len(), 2);
    assert!(servers("any(hosts, t)", true).is_empty());
}

/// A container that goes on with what is left in the folder, as attaches of one boot do.
fn warm(site: &Site, folder: &std::path::Path) -> Container {
    let mut container = Container::open(&site.config, &site.name, None, Use::Unlock).unwrap();
    container.warm = Some(super::warm::Warm::at(folder.to_owned()));
    container
}

/// What the store was asked meanwhile.
fn asked(site: &Site, work: impl FnOnce()) -> Vec<String> {
    let before = site.store.asked().len();
    work();
    site.store.asked().split_off(before)
}

#[test]
fn a_warm_attach_asks_for_the_key_alone_and_each_time() {
    let site = Site::with("");
    let folder = tempfile::tempdir().unwrap();
    site.container().make_first_key().unwrap();
    let id = kept(&site.container());
    let get = |container: &Container| container.fetch(&id, For::Any, Author::Container).map(drop);
    let attach = || get(&warm(&site, folder.path()));
    assert_eq!(asked(&site, || attach().unwrap()), [format!("get {id}"), "get kek/1".to_owned()]);
    assert_eq!(asked(&site, || attach().unwrap()), [format!("get {id}")]);
    // Who does not attach asks.
    assert_eq!(asked(&site, || get(&site.container()).unwrap()).len(), 2);

    // A rotation's new key is asked for, and what was left of the old one does not open what the store brings back.
    let before = site.store.stored(id).unwrap();
    rotate(&site);
    assert_eq!(asked(&site, || attach().unwrap()), [format!("get {id}"), "get kek/2".to_owned()]);
    let (_, seen) = warm(&site, folder.path()).fetch(&id, For::Any, Author::Container).unwrap();
    site.container().remember(seen);
    site.store.lie(id, before);
    let refused = attach().unwrap_err();
    assert!(matches!(refused, Error::Trust(TrustError::OldGeneration { .. })), "{refused:?}");
    site.store.be_honest(id);

    // A key that is deleted, or a host that is forbidden to ask, is not helped.
    site.store.fail_next(StoreError::Denied { action: "read from", at: "memory".to_owned() });
    assert!(matches!(attach(), Err(Error::Store(StoreError::Denied { .. }))));
    crate::keys::store::KeyStore::delete(&site.store, &id).unwrap();
    assert!(matches!(attach(), Err(Error::Store(StoreError::NotFound { .. }))));
}

#[test]
fn each_new_key_is_sealed_under_the_container_key_of_its_time() {
    let site = Site::with("");
    let container = site.container();
    let sealed_under = |id: KeyId| {
        let sealed = site.store.stored(id).unwrap();
        sealed.recipient_kids().map(|kid| kid.rsplit_once('/').unwrap().1.to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(sealed_under(kept(&container)), ["1"]);
    rotate(&site);
    let looked = |asked: &[String]| asked.iter().filter(|what| *what == "current").count();
    assert_eq!(looked(&asked(&site, || assert_eq!(sealed_under(kept(&container)), ["2"]))), 1, "each time");
    rotate(&site);
    // However many threads there are: a rotation that is over before they begin is heard of by all of them.
    std::thread::scope(|scope| {
        let all = [(); 8].map(|()| scope.spawn(|| [(); 4].map(|()| kept(&container))));
        for id in all.into_iter().flat_map(|one| one.join().unwrap()) {
            assert_eq!(sealed_under(id), ["3"]);
        }
    });
}

#[test]
fn what_attaches_have_left_opens_nothing_new_for_a_host_that_was_removed() {
    let (mut site, ..) = with_policy("any(owner, hosts)");
    let folder = tempfile::tempdir().unwrap();
    let (name, host) = ("compute-7".parse().unwrap(), OwnerKey::generate().unwrap());
    std::fs::write(site.beside_the_keys("host.key"), host.private_pem().unwrap().expose()).unwrap();
    site.container().make_first_key().unwrap();
    site.container().admit_host(&name, &host.recipient().unwrap()).unwrap();
    let old = kept(&site.container());
    let attach = |site: &Site, id: &KeyId| {
        warm(site, folder.path())
            .fetch(id, For::Any, Author::Container)
            .map(|(_, seen)| site.container().remember(seen))
    };
    has_identities(&mut site, &["host"]);
    attach(&site, &old).unwrap();
    assert_eq!(asked(&site, || attach(&site, &old).unwrap()), [format!("get {old}")], "it is warm");

    has_identities(&mut site, &["owner"]);
    site.container().rotate_without(Some(&name), Duration::ZERO, &|_| ()).unwrap();
    let new = kept(&site.container());
    has_identities(&mut site, &["host"]);
    for id in [new, old] {
        let refused = attach(&site, &id).unwrap_err();
        assert!(matches!(refused, Error::ContainerKeyRefused { .. }), "{refused:?}");
    }
}

#[test]
fn what_is_planted_among_the_left_container_keys_is_not_believed() {
    let site = Site::with("");
    let folder = tempfile::tempdir().unwrap();
    site.container().make_first_key().unwrap();
    let id = kept(&site.container());
    let attach = || warm(&site, folder.path()).fetch(&id, For::Any, Author::Container).map(drop);
    attach().unwrap();
    let left = folder.path().join("kek-1");
    let good = std::fs::read_to_string(&left).unwrap();
    let planted = ContainerKey::random(&site.name, None).unwrap();
    let planted = planted.seal_to(site.container().key_recipients(&planted).unwrap(), 0).unwrap();
    super::warm::Warm::at(folder.path().to_owned()).keep_key("1".parse().unwrap(), &planted);
    let told = [format!("get {id}"), "get kek/1".to_owned()];
    assert_eq!(asked(&site, || attach().unwrap()), told, "another key of that number");
    let later = good.replacen("\"asked\":", "\"asked\":9", 1);
    let earlier = good.replacen("\"asked\":1", "\"asked\":", 1);
    for wrong in ["", "{}", &good[..good.len() / 2], &later, &earlier] {
        std::fs::write(&left, wrong).unwrap();
        assert_eq!(asked(&site, || attach().unwrap()), told, "{wrong}");
    }
    // The host trusts none any more, so what is left is no better than what a store says for the first time.
    std::fs::remove_dir_all(site.config.state.join("containers")).unwrap();
    assert_eq!(asked(&site, || attach().unwrap()), told);
}

#[test]
fn rows_are_asked_for_once_and_again_after_a_refusal() {
    let site = Site::with("");
    let folder = tempfile::tempdir().unwrap();
    site.container().make_first_key().unwrap();
    let id = kept(&site.container());
    site.store.tell_rings(false);
    let places = |container: &Container| asked(&site, || drop(container.places_in_store(&id).unwrap())).pop().unwrap();
    let (all, one) = (format!("all rings of {id}"), format!("ring of {id}"));
    let container = warm(&site, folder.path());
    assert_eq!((places(&container), places(&container)), (all.clone(), all.clone()), "no answer is kept");
    site.store.tell_rings(true);
    let whole = container.places_in_store(&id).unwrap();
    assert_eq!(places(&container), one);
    let next = warm(&site, folder.path());
    assert_eq!(next.places_in_store(&id).unwrap(), whole);
    assert_eq!(places(&next), one);
    next.forget_rows();
    assert_eq!(places(&warm(&site, folder.path())), all);
    // Of one process, whatever it is for, but not of the next.
    let keys = site.container();
    assert_eq!((places(&keys), places(&keys), places(&site.container())), (all.clone(), one, all));
}
