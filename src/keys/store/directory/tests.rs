use std::{sync::Barrier, thread};

use base64ct::{Base64UrlUnpadded, Encoding};
use serde_json::json;

use super::*;
use crate::base::{
    advice::Advice,
    exit::Exit,
    key::{BoundContext, JweRecipient},
};

fn sealed(id: KeyId, generation: u64) -> SealedKey {
    let container = "cinder".parse().unwrap();
    let context =
        BoundContext { version: 1, key_id: id, container, volume: None, project: None, generation, created: 0 };
    let protected = json!({"enc": "A256GCM", "cryptattach": context}).to_string();
    SealedKey {
        aad: None,
        protected: Base64UrlUnpadded::encode_string(protected.as_bytes()),
        unprotected: Default::default(),
        recipients: vec![JweRecipient { header: Default::default(), encrypted_key: "AAAA".to_owned() }],
        iv: String::new(),
        ciphertext: format!("AA{generation}"),
        tag: String::new(),
    }
}

#[test]
fn keeps_what_it_was_given() {
    let folder = tempfile::tempdir().unwrap();
    let store = Directory::make(&folder.path().join("deep/cinder")).unwrap();
    let id = KeyId::random();
    assert!(matches!(store.read_key(&id), Err(StoreError::NotFound { .. })));
    KeyStore::create(&store, &id, &sealed(id, 1)).unwrap();
    assert_eq!(store.read_key(&id).unwrap(), sealed(id, 1));
    assert!(matches!(KeyStore::create(&store, &id, &sealed(id, 2)), Err(StoreError::Exists { .. })));
    KeyStore::reseal(&store, &id, &sealed(id, 2)).unwrap();
    assert!(matches!(KeyStore::reseal(&store, &id, &sealed(id, 2)), Err(StoreError::Outdated { generation: 2, .. })));
    assert_eq!(store.read_key(&id).unwrap(), sealed(id, 2));
    assert_eq!(store.list().unwrap(), [id]);
    KeyStore::delete(&store, &id).unwrap();
    assert!(matches!(KeyStore::delete(&store, &id), Err(StoreError::NotFound { .. })));
    assert!(matches!(KeyStore::reseal(&store, &id, &sealed(id, 3)), Err(StoreError::NotFound { .. })));
    assert!(store.list().unwrap().is_empty());
}

#[test]
fn names_the_file_that_is_no_sealed_key() {
    let folder = tempfile::tempdir().unwrap();
    let store = Directory::open(folder.path());
    let (id, other) = (KeyId::random(), KeyId::random());
    let whole = sealed(id, 1).to_json();
    let cases: [(&str, Vec<u8>); 5] = [
        ("empty", Vec::new()),
        ("truncated", whole[..whole.len() / 2].to_vec()),
        ("foreign", b"[foreign]\nfile = true\n".to_vec()),
        ("another key's", sealed(other, 1).to_json()),
        ("endless", vec![b' '; MAX_SEALED_BYTES + 1]),
    ];
    for (case, bytes) in cases {
        fs::write(folder.path().join(format!("{id}.jwe")), bytes).unwrap();
        let error = store.read_key(&id).unwrap_err();
        assert!(matches!(error, StoreError::Malformed { .. }), "{case}: {error:?}");
        assert!(error.to_string().contains(&id.to_string()), "{case}: {error}");
    }
}

#[test]
fn a_key_that_a_link_leads_to_has_a_place_of_its_own() {
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let elsewhere = tempfile::tempdir_in("/dev/shm").unwrap();
    let store = Directory::open(folder.path());
    let id = KeyId::random();
    KeyStore::create(&store, &id, &sealed(id, 1)).unwrap();
    let places = |store: &Directory| {
        let places = store.places(&id).unwrap();
        places.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    let whole = format!("sealed keys {}", folder.path().display());
    assert_eq!(places(&store), std::slice::from_ref(&whole));
    let file = folder.path().join(format!("{id}.jwe"));
    fs::copy(&file, elsewhere.path().join("key")).unwrap();
    fs::remove_file(&file).unwrap();
    std::os::unix::fs::symlink(elsewhere.path().join("key"), &file).unwrap();
    std::os::unix::fs::symlink(elsewhere.path(), folder.path().join("kek")).unwrap();
    let kek = format!("container key {}", folder.path().join("kek").display());
    assert_eq!(places(&store), [whole, format!("sealed key {}", file.display()), kek]);
}

#[test]
fn what_is_no_file_is_not_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let store = Directory::open(folder.path());
    let id = KeyId::random();
    let pipe = nix::sys::stat::Mode::from_bits_truncate(0o600);
    nix::unistd::mkfifo(&folder.path().join(format!("{id}.jwe")), pipe).unwrap();
    std::os::unix::fs::symlink("/dev/zero", folder.path().join("container.json")).unwrap();
    for error in [store.read_key(&id).unwrap_err(), store.current().unwrap_err()] {
        assert!(matches!(&error, StoreError::Io { source, .. } if source.to_string().contains("regular")), "{error:?}");
    }
}

#[test]
fn one_of_many_writers_wins() {
    let folder = tempfile::tempdir().unwrap();
    let store = Directory::open(folder.path());
    let (id, start) = (KeyId::random(), Barrier::new(8));
    let wins: Vec<u64> = thread::scope(|scope| {
        let writers: Vec<_> = (1..=8)
            .map(|generation| {
                let (store, start) = (&store, &start);
                scope.spawn(move || {
                    start.wait();
                    KeyStore::create(store, &id, &sealed(id, generation)).is_ok().then_some(generation)
                })
            })
            .collect();
        writers.into_iter().filter_map(|writer| writer.join().unwrap()).collect()
    });
    assert_eq!(wins.len(), 1, "exactly one create succeeds");
    assert_eq!(store.read_key(&id).unwrap(), sealed(id, wins[0]));
}

/// The disk is not mounted: whoever deletes a key there has deleted none.
#[test]
fn a_directory_without_a_container_does_not_say_that_a_key_is_gone() {
    let folder = tempfile::tempdir().unwrap();
    let (store, id) = (Directory::open(folder.path()), KeyId::random());
    let vacant = store.is_gone(&id).unwrap_err();
    assert!(matches!(vacant, StoreError::Vacant(_)) && vacant.exit() == Exit::StoreUnavailable, "{vacant:?}");
    store.set_current(&Current { epoch: Epoch::FIRST, rotating: false }, "").unwrap();
    assert!(store.is_gone(&id).unwrap());
    KeyStore::create(&store, &id, &sealed(id, 1)).unwrap();
    assert!(!store.is_gone(&id).unwrap());
}
