//! What a server answers that lies, or is no key-value engine. The host layer has the real one.

use std::sync::{Arc, Mutex};

use super::*;
use crate::{
    base::{advice::Advice, exit::Exit},
    config::Config,
    keys::net::testing::serve,
};

struct Site {
    _folder: tempfile::TempDir,
    store: BaoKv,
}

type Answer = (u16, String, String);

fn json(status: u16, body: serde_json::Value) -> Answer {
    (status, String::new(), body.to_string())
}

impl Site {
    fn new(answer: impl Fn(&str) -> Answer + Send + 'static) -> Self {
        let (folder, url) = (tempfile::tempdir().unwrap(), serve(answer));
        std::fs::write(folder.path().join("token"), "token").unwrap();
        let text = format!(
            "[network]\ntotal_seconds = 30.0\n[servers.main]\nbao = ['{url}']\ntoken_file = 'token'\n[stores.s]\ntype = 'bao'\n\
             server = 'main'\npath = 'kv/a/b'\nowner = 'o'\nno_escrow = true\n"
        );
        let config = Config::parse(&text, &folder.path().join("c.toml")).unwrap();
        let section = &config.stores[&"s".parse().unwrap()].section;
        let path = KvPath::of("kv/a/b").unwrap();
        let kind = BaoConfig { server: section.server.clone().unwrap(), path };
        Self { store: kind.store(&config.network).unwrap(), _folder: folder }
    }
}

fn id() -> KeyId {
    "3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de".parse().unwrap()
}

fn get(status: u16, body: serde_json::Value) -> StoreError {
    KeyStore::get(&Site::new(move |_| json(status, body.clone())).store, &id()).err().unwrap()
}

#[test]
fn only_an_empty_404_is_not_found() {
    let nothing = get(404, json!({"errors": []}));
    assert!(matches!(nothing, StoreError::NotFound { .. }));
    for (status, body, exit, told) in [
        (404, json!({"errors": ["no handler for route"]}), Exit::StoreUnavailable, "no key-value engine of version 2"),
        (404, json!({"nothing": 1}), Exit::StoreUnavailable, "no key-value engine"),
        (404, json!({"data": {"metadata": {"version": 3, "deletion_time": "x"}}}), Exit::NoKey, "version 3 can be"),
        (404, json!({"data": {"metadata": {"version": 3, "destroyed": true}}}), Exit::StoreUnavailable, "destroyed"),
        (200, json!({"data": {"jwe": "of version 1"}}), Exit::StoreUnavailable, "no key-value engine of version 2"),
        (
            200,
            json!({"data": {"data": {"x": 1}, "metadata": {"version": 1}}}),
            Exit::StoreUnavailable,
            "no field 'jwe'",
        ),
        (200, json!({"data": {"data": {"jwe": "{}"}, "metadata": {"version": 1}}}), Exit::NoSealedKey, "requested"),
        (400, json!({"errors": ["bad"]}), Exit::StoreUnavailable, "answers 400: bad"),
    ] {
        let error = get(status, body);
        assert!(error.exit() == exit && error.to_string().contains(told), "{status}: {error}");
        assert!(!matches!(error, StoreError::NotFound { .. }), "{status}: {error}");
    }
    let html = Site::new(|_| (200, String::new(), "<html>".to_owned()));
    assert!(KeyStore::get(&html.store, &id()).err().unwrap().to_string().contains("not JSON"));
}

#[test]
fn a_host_whose_key_was_deleted_softly_is_removed() {
    let deleted = json!({"data": {"metadata": {"version": 1, "deletion_time": "x"}}});
    let state = json!({"epoch": "1", "fingerprint": "aa", "rotating": false}).to_string();
    let there = json!({"data": {"data": {"jwe": state}, "metadata": {"version": 7}}});
    let site = Site::new(move |request| match request.split(' ').nth(1).unwrap() {
        "/v1/kv/data/a/b/current" => json(200, there.clone()),
        _ => json(404, deleted.clone()),
    });
    let host = "compute-7".parse().unwrap();
    assert!(matches!(HostKeys::get(&site.store, &host), Err(StoreError::NotFound { .. })));
    // In another path there is nothing, which says nothing of hosts.
    let elsewhere = Site::new(|_| json(404, json!({"errors": []})));
    assert!(matches!(HostKeys::get(&elsewhere.store, &host), Err(StoreError::NoContainer { .. })));
    // Of other keys it is told.
    assert!(matches!(ContainerKeys::get(&site.store, Epoch::FIRST), Err(StoreError::Bao(_))));
}

#[test]
fn of_two_writers_one_is_told() {
    let lost = json!({"errors": ["check-and-set parameter did not match the current version"]});
    let state = json!({"epoch": "1", "fingerprint": "aa", "rotating": false}).to_string();
    let there = json!({"data": {"data": {"jwe": state}, "metadata": {"version": 7}}});
    let asked = Arc::new(Mutex::new(Vec::new()));
    let log = asked.clone();
    let site = Site::new(move |request| {
        log.lock().unwrap().push(request.to_owned());
        if request.starts_with("post") { json(400, lost.clone()) } else { json(200, there.clone()) }
    });
    let current = Current { epoch: Epoch::FIRST, rotating: true };
    let refused = site.store.set_current(&current, "bb");
    assert!(matches!(refused, Err(StoreError::Outdated { generation: 7, .. })));
    assert!(asked.lock().unwrap()[1].contains(r#""options":{"cas":7}"#));
    let refused = site.store.create_object("x", b"mine".to_vec());
    assert!(matches!(refused, Err(StoreError::Exists { .. })));
    assert!(asked.lock().unwrap()[2].contains(r#""options":{"cas":0}"#));
}

#[test]
fn a_listing_is_read_by_pages_and_ends_whatever_the_server_says() {
    let names = |range: std::ops::Range<u32>| range.map(|number| format!("{number:05}")).collect::<Vec<_>>();
    let list = |keys: Vec<String>| json(200, json!({"data": {"keys": keys}}));
    // By pages, as OpenBao does; all at once, as Vault does; a page that is always the same.
    let by_pages = Site::new(move |request| match request.split(' ').nth(1).unwrap() {
        "/v1/kv/metadata/a/b?list=true&limit=1000" => list(names(0..1000)),
        "/v1/kv/metadata/a/b?list=true&limit=1000&after=00999" => list(names(1000..1001)),
        other => panic!("{other}"),
    });
    assert_eq!(by_pages.store.names(&[]).unwrap(), names(0..1001));
    let at_once = Site::new(move |_| list(names(0..1500)));
    assert_eq!(at_once.store.names(&[]).unwrap(), names(0..1500));
    let nothing = Site::new(|_| json(404, json!({"errors": []})));
    assert!(nothing.store.names(&["kek"]).unwrap().is_empty());
    // Pages that are always new.
    let endless = Site::new(move |request| {
        let after = request.split_once("after=").map_or(0, |(_, after)| after[..7].parse().unwrap());
        list((after + 1..after + 80_000).map(|number| format!("{number:07}")).collect())
    });
    let told = endless.store.names(&[]).unwrap_err().to_string();
    assert!(told.contains("lists more than 1000000 secrets"), "{told}");
    let strange = Site::new(|_| json(200, json!({"data": 1})));
    assert!(strange.store.names(&[]).is_err());
}

#[test]
fn a_path_is_a_mount_and_a_path_in_it() {
    for good in ["kv/a", "kv/cryptattach/keys"] {
        assert_eq!(KvPath::of(good).unwrap().to_string(), good);
    }
    for bad in ["", "kv", "kv/", "/a", "kv//a", "kv/../a", "kv/.", "kv/a b", "kv/\u{e9}", &"kv/".repeat(99)] {
        assert!(KvPath::of(bad).is_none(), "{bad}");
    }
}
