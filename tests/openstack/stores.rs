//! Every kind of store does the same: one suite for the directory, Swift and Barbican.

use cryptattach::{
    config::Config,
    key::{BoundContext, KeyId, KeySize, SealedKey, StoreName, VolumeKey},
    seal::{self, Content, Payload},
    store::{self, KeyStore, StoreError, Stored},
};

use crate::{
    Story,
    cloud::{Cloud, Site},
};

pub const STORIES: &[Story] = &[
    ("directory_conforms", |cloud| conforms(&Site::bare(cloud), "directory")),
    ("swift_conforms", |cloud| conforms(&Site::bare(cloud), "swift")),
    ("swift_with_an_application_credential_conforms", |cloud| conforms(&Site::bare(cloud), "robot")),
    ("swift_with_tempauth_conforms", |cloud| conforms(&Site::bare(cloud), "tempauth")),
    ("swift_with_versions_conforms_and_shreds", versions),
    ("barbican_conforms", |cloud| conforms(&Site::bare(cloud), "barbican")),
];

/// The library's store of that name in the site's configuration.
pub fn open(site: &Site<'_>, name: &str) -> Box<dyn KeyStore> {
    let config = Config::read(&site.path("cryptattach.toml")).unwrap();
    let name: StoreName = name.parse().unwrap();
    store::open(&name, config.store(&name).unwrap(), None).unwrap()
}

/// A key sealed to the site's owner.
pub fn sealed(site: &Site<'_>, container: &str, id: KeyId, generation: u64) -> SealedKey {
    let context = BoundContext {
        version: 1,
        key_id: id,
        container: container.parse().unwrap(),
        volume: None,
        generation,
        created: 0,
    };
    let payload = Payload {
        volume_key: VolumeKey::random(KeySize::Bits512).unwrap(),
        cipher: "aes-xts-plain64".to_owned(),
        sector_size_bytes: 512,
        data_offset_bytes: 0,
        iv_offset_sectors: 0,
        digest: None,
        passphrase: None,
    };
    let recipients = seal::recipients(&[site.path("owner.pem")]).unwrap();
    seal::seal(&context, &Content::VolumeKey(payload), &recipients).unwrap()
}

fn stored(store: &dyn KeyStore, id: &KeyId) -> SealedKey {
    match store.get(id).unwrap() {
        Stored::Sealed(key) => key,
        Stored::Released(_) => panic!("it was sealed"),
    }
}

fn conforms(site: &Site<'_>, kind: &str) {
    match kind {
        "directory" => {
            let path = site.path("keys");
            std::fs::create_dir(&path).unwrap();
            site.configure(&format!(
                "[stores.s]\ntype = \"directory\"\npath = \"{}\"\nowner = \"owner.pem\"\nno_escrow = true\n",
                path.display()
            ));
        }
        "barbican" => site.barbican("s", true),
        "robot" => site.swift("s", "robot", ""),
        "tempauth" => site.swift("s", "alone", ""),
        _ => site.swift("s", "keys", ""),
    }
    if matches!(kind, "swift" | "robot" | "tempauth") {
        site.ok(&["container", "create", "s"]);
    }
    suite(site, &*open(site, "s"));
}

fn suite(site: &Site<'_>, store: &dyn KeyStore) {
    let before = store.list().unwrap();
    let id = store.new_id().unwrap();
    assert!(matches!(store.get(&id), Err(StoreError::NotFound { .. })), "before it is stored");
    assert!(matches!(store.get(&KeyId::random()), Err(StoreError::NotFound { .. })), "never stored");
    let (first, second, third) = (sealed(site, "s", id, 1), sealed(site, "s", id, 2), sealed(site, "s", id, 3));
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
    store.create(&other, &sealed(site, "s", other, 1)).unwrap();
    let mut listed = store.list().unwrap();
    listed.retain(|id| !before.contains(id));
    let mut expected = vec![id, other];
    expected.sort_unstable();
    assert_eq!(listed, expected);

    store.delete(&id).unwrap();
    assert!(matches!(store.get(&id), Err(StoreError::NotFound { .. })), "deleted");
    assert!(matches!(store.delete(&id), Err(StoreError::NotFound { .. })), "deleted twice");
    assert!(matches!(store.reseal(&id, &third), Err(StoreError::NotFound { .. })), "re-sealing does not create");
    assert_eq!(store.list().unwrap().iter().filter(|id| !before.contains(id)).collect::<Vec<_>>(), [&other]);
    store.delete(&other).unwrap();
}

/// In a container that keeps old versions a deleted key must be gone in all of them.
fn versions(cloud: &Cloud) {
    let site = Site::bare(cloud);
    site.swift("s", "keys", "");
    site.ok(&["container", "create", "s"]);
    let (token, url) = (cloud.token("cinder"), cloud.container_url(&site.container("s")));
    let curl = |more: &str| crate::shell::sh(&format!("curl -sf -H 'X-Auth-Token: {token}' {more}"));
    curl(&format!("-X POST -H 'X-Versions-Enabled: true' {url}"));
    suite(&site, &*open(&site, "s"));
    let left = curl(&format!("'{url}?versions&format=json'"));
    let left: Vec<serde_json::Value> = serde_json::from_str(&left).unwrap();
    let names: Vec<_> = left.iter().filter_map(|object| object["name"].as_str()).collect();
    assert_eq!(names, ["kek/1"], "nothing of the keys is left");
}
