//! Tang servers in threads: a good one, and those that lie, are silent, or never end.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use openssl::{
    bn::BigNumContext,
    ec::{EcGroup, EcPoint},
    ecdsa::EcdsaSig,
    hash::{MessageDigest, hash},
    nid::Nid,
    pkey::Private,
};

use super::*;
use crate::{
    config::Config,
    keys::seal::{OwnerKey, Recipient},
};

/// How a server answers a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    Honest,
    /// Says what it was told.
    Echo,
    /// A point that is none.
    OffCurve,
    Short,
    /// A point on P-256.
    OtherCurve,
    NoJson,
    NoSuchKey,
    /// Sends without end.
    Endless,
    /// Sends a byte now and then.
    Trickle,
    /// To a server of somebody else's choice.
    Redirect,
    Silent,
}

pub struct Server {
    pub url: String,
    pub keys: Arc<Keys>,
    pub manner: Arc<Mutex<Manner>>,
    stopped: Arc<AtomicBool>,
    asked: Arc<Mutex<Vec<String>>>,
    thread: Option<JoinHandle<()>>,
}

pub struct Keys {
    signing: EcKey<Private>,
    exchange: EcKey<Private>,
    curve: curve::Curve,
}

impl Keys {
    fn new(curve: curve::Curve) -> Self {
        let key = || EcKey::generate(&curve.group().unwrap()).unwrap();
        Self { signing: key(), exchange: key(), curve }
    }

    fn jwk(&self, key: &EcKey<Private>, uses: &str) -> Value {
        let mut jwk = self.curve.jwk(&self.curve.group().unwrap(), key.public_key()).unwrap();
        jwk["key_ops"] = json!([uses]);
        jwk
    }

    pub fn thumbprint(&self) -> String {
        let group = self.curve.group().unwrap();
        jwk::thumbprint(&self.curve.jwk(&group, self.signing.public_key()).unwrap())
    }

    fn advertisement(&self, signed_by: &[&EcKey<Private>]) -> Value {
        let keys = json!({"keys": [self.jwk(&self.exchange, "deriveKey"), self.jwk(&self.signing, "verify")]});
        let payload = Base64UrlUnpadded::encode_string(keys.to_string().as_bytes());
        let (alg, digest) = self.curve.signature();
        let signature = |key: &&EcKey<Private>| {
            let header = json!({"alg": alg, "cty": "jwk-set+json"}).to_string();
            let protected = Base64UrlUnpadded::encode_string(header.as_bytes());
            let signed = EcdsaSig::sign(&hash(digest, format!("{protected}.{payload}").as_bytes()).unwrap(), key);
            let (signed, len) = (signed.unwrap(), self.curve.bytes() as i32);
            let raw = [signed.r().to_vec_padded(len).unwrap(), signed.s().to_vec_padded(len).unwrap()].concat();
            json!({"protected": protected, "signature": Base64UrlUnpadded::encode_string(&raw)})
        };
        json!({"payload": payload, "signatures": signed_by.iter().map(signature).collect::<Vec<_>>()})
    }

    fn recover(&self, question: &Value) -> Value {
        let x = Point::of_jwk(question.as_object().unwrap()).unwrap();
        let mut y = EcPoint::new(&x.group).unwrap();
        let mut context = BigNumContext::new().unwrap();
        y.mul2(&x.group, x.key.public_key(), self.exchange.private_key(), &mut context).unwrap();
        self.curve.jwk(&x.group, &y).unwrap()
    }
}

impl Server {
    pub fn start(manner: Manner) -> Self {
        Self::with(manner, Arc::new(Keys::new(curve::Curve::P521)))
    }

    fn with(manner: Manner, keys: Arc<Keys>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (manner, stopped) = (Arc::new(Mutex::new(manner)), Arc::new(AtomicBool::new(false)));
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (of_thread, stop, keys_, log) = (manner.clone(), stopped.clone(), keys.clone(), asked.clone());
        let thread = std::thread::spawn(move || {
            let mut held = Vec::new();
            for stream in listener.incoming().map_while(Result::ok) {
                if stop.load(SeqCst) {
                    break;
                }
                let manner = *of_thread.lock().unwrap();
                let (keys, log, stop) = (keys_.clone(), log.clone(), stop.clone());
                held.push(std::thread::spawn(move || answer(stream, manner, &keys, &log, &stop)));
            }
            held.into_iter().for_each(|thread| drop(thread.join()));
        });
        Self { url, keys, manner, stopped, asked, thread: Some(thread) }
    }

    pub fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stopped.store(true, SeqCst);
        let _ = TcpStream::connect(self.url.trim_start_matches("http://"));
        self.thread.take().map(JoinHandle::join);
    }
}

fn answer(mut stream: TcpStream, manner: Manner, keys: &Keys, log: &Mutex<Vec<String>>, stop: &AtomicBool) {
    let mut request = Vec::new();
    let mut buffer = [0; 4096];
    let body = loop {
        let Ok(read @ 1..) = stream.read(&mut buffer) else { return };
        request.extend_from_slice(&buffer[..read]);
        let text = String::from_utf8_lossy(&request).into_owned();
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let length = head
            .to_ascii_lowercase()
            .split("content-length: ")
            .nth(1)
            .map_or(0, |rest| rest.split("\r\n").next().unwrap().trim().parse().unwrap());
        if body.len() >= length {
            log.lock().unwrap().push(head.lines().next().unwrap_or_default().to_owned());
            break (head.starts_with("GET"), body.to_owned());
        }
    };
    let (is_advertisement, body) = body;
    let send = |stream: &mut TcpStream, status: &str, body: &str| {
        let _ =
            write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len());
    };
    if is_advertisement {
        return send(&mut stream, "200 OK", &keys.advertisement(&[&keys.signing]).to_string());
    }
    let mut question: Value = serde_json::from_str(&body).unwrap();
    let until_stopped = |mut each: Box<dyn FnMut() -> bool + '_>| {
        while !stop.load(SeqCst) && each() {}
    };
    match manner {
        Manner::Honest => send(&mut stream, "200 OK", &keys.recover(&question).to_string()),
        Manner::Echo => send(&mut stream, "200 OK", &body),
        Manner::OffCurve => {
            question["x"] = question["y"].clone();
            send(&mut stream, "200 OK", &question.to_string());
        }
        Manner::Short => {
            question["x"] = json!("AA");
            send(&mut stream, "200 OK", &question.to_string());
        }
        Manner::OtherCurve => {
            let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap();
            let jwk = curve::Curve::P256.jwk(&group, EcKey::generate(&group).unwrap().public_key()).unwrap();
            send(&mut stream, "200 OK", &jwk.to_string());
        }
        Manner::NoJson => send(&mut stream, "200 OK", "<html>a portal</html>"),
        Manner::NoSuchKey => send(&mut stream, "404 Not Found", ""),
        Manner::Redirect => {
            let _ = stream
                .write_all(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.2:1/rec\r\nContent-Length: 0\r\n\r\n");
        }
        Manner::Endless => {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n");
            until_stopped(Box::new(|| stream.write_all(&[b'x'; 65536]).is_ok()));
        }
        Manner::Trickle => {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n");
            until_stopped(Box::new(|| {
                std::thread::sleep(Duration::from_millis(20));
                stream.write_all(b" ").is_ok()
            }));
        }
        Manner::Silent => until_stopped(Box::new(|| {
            std::thread::sleep(Duration::from_millis(20));
            true
        })),
    }
}

pub struct Site {
    pub folder: tempfile::TempDir,
    /// The limits of each way to ask.
    seconds: f64,
}

impl Site {
    /// It waits longer than any test should take.
    pub fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), seconds: 30.0 }
    }

    fn leaf(&self, table: &str) -> Result<Box<dyn Kind>, ConfigError> {
        let (name, config) = self.config(table)?;
        super::super::kind(&name, &config.leaves[&name], config.network)
    }

    fn config(&self, table: &str) -> Result<(LeafName, Config), ConfigError> {
        let limits = ["connect", "try", "total"].map(|of| format!("{of}_seconds = {:?}\n", self.seconds)).concat();
        let text = format!("[network]\n{limits}[leaves.t1]\n{table}\n");
        let config = Config::parse(&text, &self.folder.path().join("c.toml"))?;
        Ok(("t1".parse().unwrap(), config))
    }

    fn pinned(&self, url: &str) -> Pinned {
        let (name, config) = self.config(&format!("tang = '{url}'")).unwrap();
        tang(&name, &config.leaves[&name], config.network).unwrap().pinned_at(self.folder.path())
    }

    pub fn leaf_at(&self, urls: &[&str], thumbprint: &str) -> Box<dyn Kind> {
        self.leaf(&format!("tang = {}\nthumbprint = '{thumbprint}'", json!(urls))).unwrap()
    }
}

fn sealed(leaf: &dyn Kind, state: &Path) -> (ContentKey, JweRecipient) {
    let key = ContentKey::random().unwrap();
    let entry = leaf.recipients(state).unwrap()[0].seal(&key).unwrap();
    (key, entry)
}

fn open(leaf: &dyn Kind, entry: &JweRecipient) -> Result<ContentKey, SealError> {
    leaf.open(entry, &entry.header, &Cancel::never()).unwrap()
}

#[test]
fn a_leaf_opens_on_each_curve_and_sealing_asks_no_server_again() {
    for curve in [curve::Curve::P256, curve::Curve::P384, curve::Curve::P521] {
        let (site, server) = (Site::new(), Server::with(Manner::Honest, Arc::new(Keys::new(curve))));
        let leaf = site.leaf_at(&[&server.url], &server.keys.thumbprint());
        let state = site.folder.path();
        drop(leaf.recipients(state).unwrap());
        assert_eq!(server.asked(), [format!("GET /adv/{} HTTP/1.1", server.keys.thumbprint())]);
        let (key, entry) = sealed(&*leaf, state);
        assert_eq!(server.asked().len(), 1, "the advertisement is remembered");
        assert!(open(&*leaf, &entry).unwrap().expose() == key.expose());
        assert!(server.asked()[1].starts_with(&format!("POST /rec/{} ", entry.header["kid"].as_str().unwrap())));
    }
}

#[test]
fn a_server_that_lies_is_an_error_and_none_holds_anybody_up() {
    let (site, server) = (Site { seconds: 1.0, ..Site::new() }, Server::start(Manner::Honest));
    let leaf = site.leaf_at(&[&server.url], &server.keys.thumbprint());
    let (_, entry) = sealed(&*leaf, site.folder.path());
    let cases = [
        (Manner::Echo, "does not open the leaf"),
        (Manner::OffCurve, "is not a point on P-521"),
        (Manner::Short, "has no 'x' of 66 bytes"),
        (Manner::OtherCurve, "another curve"),
        (Manner::NoJson, "not JSON"),
        (Manner::NoSuchKey, "no longer has the key"),
        (Manner::Endless, "longer than the limit"),
        (Manner::Trickle, "did not answer within"),
        (Manner::Redirect, "answers 302"),
        (Manner::Silent, "did not answer within"),
    ];
    for (manner, told) in cases {
        *server.manner.lock().unwrap() = manner;
        let started = Instant::now();
        let error = open(&*leaf, &entry).err().unwrap().to_string();
        assert!(error.contains(told), "{manner:?}: {error}");
        assert!(started.elapsed() < Duration::from_secs(15), "{manner:?} took {:?}", started.elapsed());
    }
}

#[test]
fn of_several_urls_the_good_one_is_enough_whatever_the_others_do() {
    let good = Server::start(Manner::Honest);
    for manner in [Manner::Silent, Manner::NoSuchKey, Manner::Echo, Manner::Endless] {
        let (site, bad) = (Site::new(), Server::with(manner, good.keys.clone()));
        let leaf = site.leaf_at(&[&bad.url, &good.url], &good.keys.thumbprint());
        let (key, entry) = sealed(&*leaf, site.folder.path());
        let started = Instant::now();
        assert!(open(&*leaf, &entry).unwrap().expose() == key.expose(), "{manner:?}");
        assert!(started.elapsed() < Duration::from_secs(15), "{manner:?} is not waited for");
    }
}

#[test]
fn a_server_with_new_keys_is_noticed_and_one_that_says_nothing_is_not() {
    let (site, server) = (Site::new(), Server::start(Manner::Honest));
    let leaf = site.leaf_at(&[&server.url], &server.keys.thumbprint());
    let pin = leaf.pin(site.folder.path()).unwrap();
    assert_eq!(pin.pinned(), None, "nothing is remembered yet");
    let (_, entry) = sealed(&*leaf, site.folder.path());
    let kid = entry.header["kid"].as_str().unwrap();
    assert_eq!(pin.pinned().as_deref(), Some(kid));
    assert!(!leaf.is_outdated(kid));
    let other = Server::start(Manner::Honest);
    let now_other = site.leaf_at(&[&other.url], &server.keys.thumbprint());
    assert!(now_other.is_outdated(kid));
    let [named, same] = ["t1", "t2"].map(|name| name.parse::<LeafName>().unwrap());
    let both = [(&named, &*now_other, kid.to_owned()), (&same, &*leaf, kid.to_owned())];
    assert_eq!(super::super::outdated(&both).into_iter().collect::<Vec<_>>(), [&named]);
    let url = other.url.clone();
    drop(other);
    assert!(!site.leaf_at(&[&url], &server.keys.thumbprint()).is_outdated(kid));
}

#[test]
fn what_is_not_needed_any_more_ends_at_once() {
    let (site, server) = (Site::new(), Server::start(Manner::Honest));
    let leaf = site.leaf_at(&[&server.url], &server.keys.thumbprint());
    let (_, entry) = sealed(&*leaf, site.folder.path());
    *server.manner.lock().unwrap() = Manner::Silent;
    let outer = Cancel::never().below();
    let cancel = outer.below();
    let started = Instant::now();
    std::thread::scope(|scope| {
        let opening = scope.spawn(|| leaf.open(&entry, &entry.header, &cancel).unwrap().err().unwrap().to_string());
        std::thread::sleep(Duration::from_millis(100));
        outer.cancel();
        assert!(opening.join().unwrap().contains("not needed any more"));
    });
    assert!(started.elapsed() < Duration::from_secs(15));
}

#[test]
fn a_store_sends_nobody_to_a_server_that_is_not_configured() {
    let (site, server, other) = (Site::new(), Server::start(Manner::Honest), Server::start(Manner::Honest));
    let leaf = site.leaf_at(&[&server.url], &server.keys.thumbprint());
    let (_, entry) = sealed(&*leaf, site.folder.path());
    let mut forged = entry.clone();
    forged.header[MEMBER]["url"] = json!(other.url);
    assert!(leaf.open(&forged, &forged.header, &Cancel::never()).is_none());
    assert!(other.asked().is_empty());
    // Nor does a key of the store's choice go unnoticed.
    for (member, value) in [("kid", json!("AA")), ("alg", json!("A256KW")), ("epk", json!({}))] {
        let mut forged = entry.clone();
        forged.header.insert(member.to_owned(), value);
        assert!(matches!(open(&*leaf, &forged), Err(SealError::Unsupported(_))), "{member}");
    }
    assert_eq!(server.asked().len(), 1, "what is malformed is not sent");
}

#[test]
fn only_what_the_pinned_key_and_all_others_have_signed_is_sealed_to() {
    let (site, server) = (Site::new(), Server::start(Manner::Honest));
    let state = site.folder.path();
    let stranger = Keys::new(curve::Curve::P521);
    let leaf = site.leaf_at(&[&server.url], &stranger.thumbprint());
    assert!(leaf.recipients(state).err().unwrap().to_string().contains("expected"));
    let none = site.leaf(&format!("tang = '{}'", server.url)).unwrap();
    assert!(none.recipients(state).err().unwrap().to_string().contains("has no thumbprint"));

    let keys = &server.keys;
    let advertisement = |signers: &[&EcKey<Private>]| Advertisement::of(keys.advertisement(signers));
    let good = advertisement(&[&keys.signing]).unwrap();
    assert!(good.signer(&keys.thumbprint()).is_some() && good.signer(&stranger.thumbprint()).is_none());
    let signing = keys.curve.jwk(&keys.curve.group().unwrap(), keys.signing.public_key()).unwrap().to_string();
    let sha1 = hash(MessageDigest::sha1(), signing.as_bytes()).unwrap();
    assert!(good.signer(&Base64UrlUnpadded::encode_string(&sha1)).is_some(), "tang prints SHA-1 as well");
    assert!(advertisement(&[&stranger.signing]).unwrap_err().contains("is not signed by its key"));
    assert!(advertisement(&[]).is_err());
    let mut changed = keys.advertisement(&[&keys.signing]);
    changed["payload"] = stranger.advertisement(&[])["payload"].clone();
    assert!(Advertisement::of(changed).is_err());
    for strange in [json!({}), json!(null), json!({"payload": "e30"}), json!({"payload": "!", "signatures": 1})] {
        assert!(Advertisement::of(strange).is_err());
    }
}

#[test]
fn what_is_remembered_is_checked_again() {
    let (site, server) = (Site::new(), Server::start(Manner::Honest));
    let state = site.folder.path();
    let leaf = site.leaf(&format!("tang = '{}'", server.url)).unwrap();
    let pin = leaf.pin(state).unwrap();
    pin.fetch().unwrap().keep(&server.keys.thumbprint()).unwrap();
    leaf.recipients(state).unwrap();
    let pinned = site.pinned(&server.url);
    let stranger = Keys::new(curve::Curve::P521);
    let leaf = site.leaf_at(&[&server.url], &stranger.thumbprint());
    assert!(leaf.recipients(state).is_err(), "the configuration's thumbprint goes before");

    // After a rotation the key that is remembered vouches for the new ones; no other one does.
    let (old, new) = (&server.keys, Keys::new(curve::Curve::P521));
    let later = |signed_by: &[&EcKey<Private>]| Advertisement::of(new.advertisement(signed_by)).unwrap();
    pinned.keep(&later(&[&new.signing, &stranger.signing]), &old.thumbprint()).unwrap_err();
    pinned.keep(&later(&[&new.signing, &old.signing]), &old.thumbprint()).unwrap();
    assert_eq!(pinned.advertisement().unwrap().exchange(), later(&[&new.signing]).exchange());
}

#[test]
fn a_table_that_is_no_leaf_says_why() {
    let site = Site::new();
    let long = json!(vec!["http://a"; 17]);
    let cases = [
        ("thumbprint = 'x'".to_owned(), "or `public` alone"),
        ("tang = 'http://a'\npublic = 'b.pem'".to_owned(), "unknown field `public`"),
        ("tang = 'ftp://a'".to_owned(), "not an http or https URL"),
        ("tang = 'http://u:p@a'".to_owned(), "not an http or https URL"),
        ("tang = 'http://a'\nthumbprint = 'x'".to_owned(), "43 or 27 characters"),
        ("tang = []".to_owned(), "1 to 16 URLs"),
        (format!("tang = {long}"), "1 to 16 URLs"),
        ("tang = 'http://a'\nthumprint = 'x'".to_owned(), "unknown field"),
    ];
    for (table, told) in cases {
        let error = crate::base::chain::chain(&site.leaf(&table).err().unwrap());
        assert!(error.contains("leaf 't1'") && error.contains(told), "{table}: {error}");
    }
    // A holder of a key needs no server.
    let owner = OwnerKey::generate().unwrap();
    std::fs::write(site.folder.path().join("a.pem"), owner.public_pem().unwrap()).unwrap();
    let leaf = site.leaf("public = 'a.pem'").unwrap();
    let shape = leaf.recipients(site.folder.path()).unwrap()[0].shape();
    assert_eq!(shape, owner.recipient().unwrap().shape());
}
