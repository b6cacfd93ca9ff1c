//! Servers that have another key, hold one back, or lie. The host layer has the real one.

use std::sync::{Arc, Mutex};

use openssl::{
    pkey::{PKey, Private},
    rsa::Rsa,
};

use super::*;
use crate::{
    base::{
        advice::Advice,
        exit::Exit,
        key::{BoundContext, KeyId},
    },
    config::Config,
    keys::{
        net::testing::serve,
        seal::{Content, Expected, For, Identities, OwnerKey, Payload, SealError, seal},
    },
};

/// What a server does.
#[derive(Clone)]
enum Manner {
    Honest,
    /// Gives another key of the right length.
    OtherKey,
    Gives(&'static str),
    Says(u16, &'static str),
}

struct Server {
    manner: Arc<Mutex<Manner>>,
    /// The versions that it shows, and the least that it decrypts with.
    versions: Arc<Mutex<(Vec<PKey<Private>>, u64)>>,
    folder: tempfile::TempDir,
    config: Config,
}

fn rsa() -> PKey<Private> {
    PKey::from_rsa(Rsa::generate(2048).unwrap()).unwrap()
}

fn pem(key: &PKey<Private>) -> String {
    String::from_utf8(key.public_key_to_pem().unwrap()).unwrap()
}

fn kid(key: &PKey<Private>) -> String {
    recipient(&pem(key)).unwrap().kid().to_owned()
}

impl Server {
    fn new() -> Self {
        let (manner, versions) = (Arc::new(Mutex::new(Manner::Honest)), Arc::new(Mutex::new((vec![rsa()], 1))));
        let (how, keys) = (manner.clone(), versions.clone());
        let url = serve(move |request| {
            let (keys, least) = &*keys.lock().unwrap();
            if request.starts_with("get /v1/transit/keys/owner ") {
                let numbered = keys.iter().enumerate().map(|(at, key)| (at as u64 + 1, key));
                let shown = numbered.filter(|(number, _)| number >= least);
                let shown: serde_json::Map<_, _> =
                    shown.map(|(number, key)| (number.to_string(), json!({"public_key": pem(key)}))).collect();
                let data = json!({"latest_version": keys.len(), "min_decryption_version": least, "keys": shown});
                return (200, String::new(), json!({"data": data}).to_string());
            }
            assert!(request.starts_with("post /v1/transit/decrypt/owner "), "{request}");
            let plaintext = match *how.lock().unwrap() {
                Manner::Honest => decrypted(request, keys),
                Manner::OtherKey => Base64::encode_string(&[7; 32]),
                Manner::Gives(text) => text.to_owned(),
                Manner::Says(status, body) => return (status, String::new(), body.to_owned()),
            };
            (200, String::new(), json!({"data": {"plaintext": plaintext}}).to_string())
        });
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("token"), "token").unwrap();
        let text = format!(
            "state = 'state'\n[network]\ntotal_seconds = 30.0\n[servers.main]\nbao = ['{url}']\ntoken_file = 'token'\n\
             [leaves.v]\ntransit = 'owner'\nserver = 'main'\n"
        );
        let mut config = Config::parse(&text, &folder.path().join("c.toml")).unwrap();
        config.leaves.values_mut().for_each(|leaf| leaf.memory = folder.path().join("v.json"));
        Self { manner, versions, folder, config }
    }

    fn leaf(&self) -> Box<dyn Kind> {
        let name = "v".parse().unwrap();
        super::super::kind(&name, &self.config.leaves[&name], self.config.network).unwrap()
    }

    fn pin(&self) {
        let leaf = self.leaf();
        let pin = leaf.pin(self.folder.path()).unwrap();
        let offer = pin.fetch().unwrap();
        offer.keep(&offer.thumbprints()[0]).unwrap();
    }

    /// What the leaf says of an entry.
    fn open(&self, entry: &JweRecipient) -> Result<ContentKey, SealError> {
        self.leaf().open(entry, &entry.header, &Cancel::never()).expect("it is the leaf's")
    }

    fn sealed(&self) -> (ContentKey, JweRecipient) {
        let key = ContentKey::random().unwrap();
        let entry = self.leaf().recipients(self.folder.path()).unwrap()[0].seal(&key).unwrap();
        (key, entry)
    }
}

fn decrypted(request: &str, keys: &[PKey<Private>]) -> String {
    let body: Value = serde_json::from_str(request.rsplit("\n\n").next().unwrap()).unwrap();
    let text = body["ciphertext"].as_str().unwrap().strip_prefix("vault:v").unwrap();
    let (number, encrypted) = text.split_once(':').unwrap();
    let key = &keys[number.parse::<usize>().unwrap() - 1];
    let key = rsa_oaep::decrypt(key, &Base64::decode_vec(encrypted).unwrap()).unwrap().unwrap();
    Base64::encode_string(key.expose())
}

#[test]
fn a_leaf_opens_with_the_version_that_it_was_sealed_to() {
    let server = Server::new();
    assert!(matches!(server.leaf().recipients(server.folder.path()).err(), Some(SealError::Leaf(error))
        if matches!(*error, LeafError::NotPinned(_))));
    server.pin();
    let (key, entry) = server.sealed();
    assert!(server.open(&entry).unwrap().expose() == key.expose());
    assert_eq!(entry.header.keys().collect::<Vec<_>>(), ["alg", "kid"], "an ordinary recipient");
    server.versions.lock().unwrap().0.push(rsa());
    assert!(server.open(&entry).unwrap().expose() == key.expose());
    // Sealing goes on to the pinned one until the next is confirmed; both open then.
    assert_eq!(server.sealed().1.header["kid"], entry.header["kid"]);
    server.pin();
    let (later, second) = server.sealed();
    assert_ne!(second.header["kid"], entry.header["kid"]);
    assert!(server.open(&second).unwrap().expose() == later.expose());
    assert!(server.open(&entry).unwrap().expose() == key.expose());
}

#[test]
fn what_was_sealed_to_others_is_not_asked_for() {
    let server = Server::new();
    server.pin();
    let other = OwnerRecipient::of_public(PKey::public_key_from_pem(pem(&rsa()).as_bytes()).unwrap()).unwrap();
    let entry = other.seal(&ContentKey::random().unwrap()).unwrap();
    assert!(!server.leaf().is_for(&entry.header));
    assert!(server.leaf().open(&entry, &entry.header, &Cancel::never()).is_none());
}

#[test]
fn a_key_that_was_replaced_or_is_held_back_is_told() {
    let server = Server::new();
    server.pin();
    let (_, entry) = server.sealed();
    let first = server.versions.lock().unwrap().0[0].clone();
    *server.versions.lock().unwrap() = (vec![first.clone(), rsa()], 2);
    let told = server.open(&entry).err().unwrap();
    assert!(matches!(&told, SealError::Leaf(error) if matches!(**error, LeafError::KeyTooOld { least: 2, .. })));
    assert!(told.next_step().unwrap().contains("min_decryption_version=1"));
    *server.versions.lock().unwrap() = (vec![rsa()], 1);
    let told = server.open(&entry).err().unwrap();
    assert!(matches!(&told, SealError::Leaf(error) if matches!(**error, LeafError::KeyReplaced { .. })), "{told}");
    assert!(told.exit() == Exit::KeyRefused && told.to_string().contains(&kid(&first)), "{told}");
    // It is not sealed to by itself, nor by a thumbprint of before.
    assert_eq!(server.sealed().1.header["kid"], kid(&first));
    let leaf = server.leaf();
    let pin = leaf.pin(server.folder.path()).unwrap();
    assert!(pin.expected().unwrap().is_none(), "a person is asked");
    let refused = pin.fetch().unwrap().keep(&kid(&first)).unwrap_err();
    assert!(matches!(refused, LeafError::Offered { .. }) && refused.exit() == Exit::KeyRefused);
}

#[test]
fn a_server_that_decrypts_to_something_else_opens_nothing() {
    let server = Server::new();
    server.pin();
    let (_, entry) = server.sealed();
    let lies = [
        (Manner::Gives(""), "changed since"),
        (Manner::Gives("AAAA"), "changed since"),
        (Manner::Gives("no base64!"), "changed since"),
        (Manner::Says(200, "{}"), "gives no plaintext"),
        (Manner::Says(200, r#"{"data": {"plaintext": 1}}"#), "gives no plaintext"),
        (Manner::Says(400, r#"{"errors": ["ciphertext version is disallowed by policy (too old)"]}"#), "before 2"),
        (Manner::Says(400, r#"{"errors": ["decryption error"]}"#), "does not decrypt: decryption error"),
        (Manner::Says(403, ""), "does not let this host"),
        (Manner::Says(307, ""), "is a standby"),
    ];
    for (manner, told) in lies {
        *server.manner.lock().unwrap() = manner;
        let error = server.open(&entry).err().unwrap().to_string();
        assert!(error.contains(told), "{error}");
    }
    // Another key of the right length is one that opens no content.
    *server.manner.lock().unwrap() = Manner::OtherKey;
    let escrow = OwnerKey::generate().unwrap();
    let context = BoundContext {
        version: 1,
        key_id: KeyId::random(),
        container: "cinder".parse().unwrap(),
        volume: None,
        project: None,
        generation: 1,
        created: 0,
    };
    let mut recipients = server.leaf().recipients(server.folder.path()).unwrap();
    recipients.push(Box::new(escrow.recipient().unwrap()));
    let sealed = seal(&context, &Content::VolumeKey(Payload::random()), &recipients).unwrap();
    let expected = Expected { key_id: context.key_id, container: context.container.clone(), volume: For::Plain };
    let open = || {
        let leaves = vec![("v".parse().unwrap(), server.leaf())];
        Identities::default().with_leaves(leaves, Default::default()).open(&sealed, &expected).map(drop)
    };
    assert!(matches!(open(), Err(SealError::Tampered)));
    *server.manner.lock().unwrap() = Manner::Honest;
    open().unwrap();
}

#[test]
fn a_key_that_is_not_for_rsa_is_refused_before_anything_is_sealed_to_it() {
    let server = Server::new();
    let other = OwnerKey::generate().unwrap();
    let path = server.folder.path().join("ec.pem");
    std::fs::write(&path, other.public_pem().unwrap()).unwrap();
    let text = format!(
        "[servers.main]\nbao = ['https://a']\ntoken_file = 't'\n[leaves.v]\nserver = 'main'\ntransit = 'm/k'\npublic = '{}'\n",
        path.display()
    );
    let name = "v".parse().unwrap();
    let leaf = |text: &str| {
        let config = Config::parse(text, "c.toml".as_ref())?;
        super::super::kind(&name, &config.leaves[&name], config.network)
    };
    let (fixed, state) = (leaf(&text).unwrap(), server.folder.path());
    assert!(matches!(fixed.recipients(state).err(), Some(SealError::KeyFile { why, .. }) if why.contains("RSA")));
    assert!(fixed.pin(state).is_none());
    std::fs::write(&path, pem(&rsa())).unwrap();
    assert_eq!(leaf(&text).unwrap().recipients(state).unwrap().len(), 1);
    assert_eq!(leaf(&text).unwrap().login(), Some("t".as_ref()));
    for wrong in ["", "m/", "/k", "a b", "..", "m//k"] {
        assert!(leaf(&text.replace("'m/k'", &format!("'{wrong}'"))).is_err(), "{wrong}");
    }
    assert!(leaf(&text.replace("server = 'main'\n", "")).is_err());
    assert!(leaf(&format!("{text}tang = 'http://a'\n")).is_err());
}
