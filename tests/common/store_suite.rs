//! Every kind of store does the same: what each must do, in a container `s` whose owner's keys are in a folder.

use std::path::Path;

use cryptattach::{
    base::key::{BoundContext, Consumer, Epoch, HostName, KeyId, KeySize, SealedKey, VolumeKey},
    keys::{
        seal::{self, ContainerKey, Content, LockboxKey},
        store::{ContainerKeys, Current, HostKeys, KeyStore, StoreError, Stored},
    },
};

use crate::{
    container_key,
    sealing::{context, payload},
};

/// The whole suite. `container create` has made the first container key.
pub fn conforms(folder: &Path, store: &dyn KeyStore, keeps_host_keys: bool) {
    suite(folder, store);
    container_keys_suite(folder, store.container_keys().expect("every store that seals has container keys"));
    match store.host_keys() {
        Some(host_keys) if keeps_host_keys => host_keys_suite(folder, host_keys),
        None if !keeps_host_keys => {}
        _ => panic!("it has host keys or has not"),
    }
    suite(folder, store);
}

/// A key sealed to the owner, whose `owner.pem` is in this folder.
pub fn sealed(folder: &Path, container: &str, id: KeyId, generation: u64) -> SealedKey {
    let context = BoundContext { key_id: id, container: container.parse().unwrap(), generation, ..context() };
    let payload = payload(&VolumeKey::random(KeySize::Bits512).unwrap());
    let recipients = seal::recipients(&[folder.join("owner.pem")]).unwrap();
    seal::seal(&context, &Content::VolumeKey(payload), &recipients).unwrap()
}

fn stored(store: &dyn KeyStore, id: &KeyId) -> SealedKey {
    match store.get(id).unwrap() {
        Stored::Sealed(key) => key,
        Stored::Released(_) => panic!("it was sealed"),
    }
}

/// After `container create` there is the first key.
fn container_keys_suite(folder: &Path, keys: &dyn ContainerKeys) {
    let current = |epoch: &str, rotating| Current { epoch: epoch.parse().unwrap(), rotating };
    let (one, two): (Epoch, Epoch) = (Epoch::FIRST, Epoch::FIRST.next());
    assert_eq!(keys.current().unwrap(), Some(current("1", false)));
    assert_eq!(keys.epochs().unwrap(), [one]);
    let recipients = || seal::recipients(&[folder.join("owner.pem")]).unwrap();
    let first = keys.get(one).unwrap();
    let first_key = container_key::first("s", &first, &folder.join("owner.key"));
    let second_key = ContainerKey::random(&"s".parse().unwrap(), Some(&first_key)).unwrap();
    let second = second_key.seal_to(recipients(), 0).unwrap();

    assert!(matches!(keys.get(two), Err(StoreError::NotFound { .. })));
    keys.create(two, &second).unwrap();
    assert_eq!(keys.get(two).unwrap(), second);
    let other = second_key.seal_to(recipients(), 0).unwrap();
    assert!(matches!(keys.create(two, &other), Err(StoreError::Exists { .. })), "never overwrites");
    assert_eq!(keys.epochs().unwrap(), [one, two]);
    keys.set_current(&current("2", true), "aa").unwrap();
    assert_eq!(keys.current().unwrap(), Some(current("2", true)));
    keys.set_current(&current("2", false), "aa").unwrap();
    assert_eq!(keys.current().unwrap(), Some(current("2", false)));

    // Sealed anew for a host more: a later generation, and only that.
    let host = LockboxKey::random(&"compute-7".parse().unwrap(), None, 1).unwrap();
    let admitted = second_key.with_host(&host.id().host, &host.recipient().unwrap()).unwrap();
    let admitted = admitted.seal_to(recipients(), 0).unwrap();
    keys.reseal(two, &admitted).unwrap();
    assert_eq!(keys.get(two).unwrap(), admitted);
    assert!(matches!(keys.reseal(two, &second), Err(StoreError::Outdated { generation: 2, .. })), "never back");
    assert!(matches!(keys.reseal(two.next(), &second), Err(StoreError::NotFound { .. })), "does not create");

    keys.delete(two).unwrap();
    assert!(matches!(keys.delete(two), Err(StoreError::NotFound { .. })), "deleted twice");
    keys.set_current(&current("1", false), "aa").unwrap();
    assert_eq!((keys.get(one).unwrap(), keys.epochs().unwrap()), (first, vec![one]));
}

fn host_keys_suite(folder: &Path, keys: &dyn HostKeys) {
    let hosts: [HostName; 2] = ["compute-7.example", "a"].map(|name| name.parse().unwrap());
    let sealed = |host: &HostName, generation| {
        let recipients = seal::recipients(&[folder.join("owner.pem")]).unwrap();
        LockboxKey::random(host, None, generation).unwrap().seal_to(&recipients).unwrap()
    };
    let [first, second] = [5, 6].map(|generation| sealed(&hosts[0], generation));
    assert!(keys.get(&hosts[0]).is_err() && keys.hosts().unwrap().is_empty());
    keys.create(&hosts[0], &first).unwrap();
    assert!(matches!(keys.get(&hosts[1]), Err(StoreError::NotFound { .. })), "never admitted");
    assert!(matches!(keys.create(&hosts[0], &second), Err(StoreError::Exists { .. })), "never overwrites");
    keys.replace(&hosts[0], &second).unwrap();
    assert!(matches!(keys.replace(&hosts[0], &first), Err(StoreError::Outdated { generation: 6, .. })), "never back");
    assert_eq!(keys.get(&hosts[0]).unwrap(), second);
    keys.create(&hosts[1], &sealed(&hosts[1], 1)).unwrap();
    assert_eq!(keys.hosts().unwrap(), [hosts[1].clone(), hosts[0].clone()]);
    for host in &hosts {
        keys.delete(host).unwrap();
        assert!(matches!(keys.get(host), Err(StoreError::NotFound { .. })), "removed");
        assert!(matches!(keys.delete(host), Err(StoreError::NotFound { .. })), "removed twice");
    }
    assert!(keys.hosts().unwrap().is_empty());
}

fn consumers_suite(store: &dyn KeyStore, id: &KeyId, other: &KeyId) {
    let consumer = |number: usize| Consumer {
        service: "cinder".to_owned(),
        resource_type: "volume \"/..\u{e9}".to_owned(),
        resource_id: format!("{number:03}"),
    };
    assert_eq!(store.consumers(id).unwrap(), []);
    // Barbican gives ten at a time unless asked for more.
    let all: Vec<Consumer> = (0..12).map(consumer).collect();
    all.iter().for_each(|consumer| store.add_consumer(id, consumer).unwrap());
    store.add_consumer(id, &all[0]).expect("again is once");
    assert_eq!(store.consumers(id).unwrap(), all);
    assert_eq!(store.consumers(other).unwrap(), [], "another key's are its own");
    all[1..].iter().for_each(|consumer| store.remove_consumer(id, consumer).unwrap());
    assert!(matches!(store.remove_consumer(id, &all[1]), Err(StoreError::NoConsumer { .. })));
    assert_eq!(store.consumers(id).unwrap(), all[..1]);
    store.remove_consumer(id, &all[0]).unwrap();
    assert_eq!(store.consumers(id).unwrap(), []);
}

/// Keys and their consumers.
pub fn suite(folder: &Path, store: &dyn KeyStore) {
    let before = store.list().unwrap();
    let id = store.new_id().unwrap();
    assert!(matches!(store.get(&id), Err(StoreError::NotFound { .. })), "before it is stored");
    assert!(matches!(store.get(&KeyId::random()), Err(StoreError::NotFound { .. })), "never stored");
    let (first, second, third) = (sealed(folder, "s", id, 1), sealed(folder, "s", id, 2), sealed(folder, "s", id, 3));
    store.create(&id, &first).unwrap();
    assert_eq!(stored(store, &id), first);
    assert!(matches!(store.create(&id, &second), Err(StoreError::Exists { .. })), "create never overwrites");
    assert_eq!(stored(store, &id), first);
    // An answer that got lost: the same create again is the one that succeeded.
    if !matches!(store.create(&id, &first), Ok(()) | Err(StoreError::Exists { .. })) {
        panic!("creating the same again");
    }
    store.reseal(&id, &second).unwrap();
    assert_eq!(stored(store, &id), second);
    store.reseal(&id, &third).unwrap();
    assert_eq!(stored(store, &id), third);
    assert!(matches!(store.reseal(&id, &second), Err(StoreError::Outdated { generation: 3, .. })), "never back");
    assert_eq!(stored(store, &id), third);

    let other = store.new_id().unwrap();
    store.create(&other, &sealed(folder, "s", other, 1)).unwrap();
    let mut listed = store.list().unwrap();
    listed.retain(|id| !before.contains(id));
    let mut expected = vec![id, other];
    expected.sort_unstable();
    assert_eq!(listed, expected);
    consumers_suite(store, &id, &other);

    assert!(!store.is_gone(&id).unwrap());
    store.delete(&id).unwrap();
    assert!(store.is_gone(&id).unwrap() && !store.is_gone(&other).unwrap());
    assert!(matches!(store.get(&id), Err(StoreError::NotFound { .. })), "deleted");
    assert!(matches!(store.delete(&id), Err(StoreError::NotFound { .. })), "deleted twice");
    assert!(matches!(store.reseal(&id, &third), Err(StoreError::NotFound { .. })), "re-sealing does not create");
    assert_eq!(store.list().unwrap().iter().filter(|id| !before.contains(id)).collect::<Vec<_>>(), [&other]);
    store.delete(&other).unwrap();
}
