//! The objects of a container: read, created, replaced, deleted, listed.

use std::time::{Duration, Instant};

use openssl::hash::{MessageDigest, hash};
use reqwest::{Method, StatusCode, header::HeaderValue};
use serde::Deserialize;

use super::{MOST_WORDS_BYTES, Swift};
use crate::{
    base::{
        chain::chain,
        hex,
        key::{MAX_SEALED_BYTES, MalformedSealedKey, SealedKey, SecretBytes},
    },
    keys::{
        net::{
            http::{HttpAnswer, HttpError, Repeat, Request},
            keystone::SendError,
        },
        store::{MOST_NAMES, StoreError},
    },
};

/// How many names a page of a listing has; Swift's own limit is 10000, but an answer is kept in locked memory.
const PAGE: usize = 1000;
const MOST_PAGE_BYTES: usize = 512 * 1024;

#[derive(Deserialize)]
struct Listed {
    /// Absent for a pseudo-directory.
    name: Option<String>,
    version_id: Option<String>,
}

#[derive(Clone, Copy)]
enum Read {
    /// Compare all replicas that answer, however long Swift waits for one that hangs.
    Newest,
    /// Whichever answers, however long Swift waits for one that hangs: there is one form only.
    One,
    /// As [`Self::Newest`], but not for long: a storage node that hangs holds up such a request for as long as Swift waits for it.
    NewestIfSoon,
    /// Whichever answers; so much time has gone by.
    Any { spent: Duration },
}

impl Swift {
    /// An object's bytes, checked against their length (HTTP does that) and their MD5.
    fn object(&self, name: &str, read: Read) -> Result<Option<SecretBytes>, StoreError> {
        self.object_of_at_most(MAX_SEALED_BYTES, name, read)
    }

    /// What stands beside a key.
    pub(super) fn small_object(&self, name: &str, most_bytes: usize) -> Result<Option<SecretBytes>, StoreError> {
        self.object_of_at_most(most_bytes, name, Read::Newest)
    }

    fn object_of_at_most(&self, most_bytes: usize, name: &str, read: Read) -> Result<Option<SecretBytes>, StoreError> {
        let answer = self.send("read from", |urls| {
            let request = Request::new(Method::GET, self.urls(urls, &segments(name)), most_bytes);
            match read {
                Read::Any { spent } => Request { spent, ..request },
                Read::One => Request { patient: true, ..request },
                Read::Newest => {
                    Request { patient: true, ..request }.header("x-newest", HeaderValue::from_static("true"))
                }
                Read::NewestIfSoon => Request { repeat: Repeat::UnlessSlow, ..request }
                    .header("x-newest", HeaderValue::from_static("true")),
            }
        })?;
        if answer.status == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        let answer = self.expect("read from", answer)?;
        // The MD5 of the bytes; of large objects made of segments it is something else, in quotes.
        let digest = answer.header("etag").filter(|etag| etag.len() == 32);
        if digest.is_some_and(|digest| digest != md5(answer.body.expose())) {
            let what = format!("the object {name} does not have the MD5 that its ETag says");
            return Err(StoreError::Answer { action: "read from", at: self.to_string(), what });
        }
        Ok(Some(answer.body))
    }

    /// Writes an object. `None`: whether it was written is not known, and what stands there afterwards decides.
    fn put(&self, name: &str, bytes: &[u8], new: bool) -> Result<Option<HttpAnswer>, StoreError> {
        let digest = HeaderValue::from_str(&md5(bytes)).map_err(|_| self.unusable("the digest is not text"))?;
        let answer = self.send("write to", |urls| {
            let request = Request::new(Method::PUT, self.urls(urls, &segments(name)), MOST_WORDS_BYTES)
                .body("application/jose+json", bytes.to_vec())
                .header("etag", digest.clone());
            // Swift waits for a replica that hangs, and has written the others by then.
            let request = Request { patient: true, ..request };
            if new { request.header("if-none-match", HeaderValue::from_static("*")) } else { request }
        });
        match answer {
            Err(StoreError::Unreachable { source, .. })
                if matches!(*source, SendError::Http(HttpError::TimedOut { .. } | HttpError::Broken { .. })) =>
            {
                tracing::warn!("{}; checking whether {name} was written nevertheless", chain(&*source));
                Ok(None)
            }
            answer => answer.map(Some),
        }
    }

    /// Creates an object. Swift's own "create only" is not atomic, so that what stands there afterwards decides.
    pub(super) fn create_object(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        self.put_new(name, bytes)?;
        self.stands_there(name, bytes)
    }

    /// Likewise a key. Its id was drawn for it, or it is a copy of the key that has the id: two who write it at the same time
    /// write forms that open the same. So where most replicas have taken it as new, one that gives it is enough, and the
    /// others need not be compared.
    pub(super) fn create_key(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        match self.put_new(name, bytes)? && self.object(name, Read::One)?.is_some_and(|stored| stored.expose() == bytes)
        {
            true => Ok(()),
            false => self.stands_there(name, bytes),
        }
    }

    /// Writes what must not be there yet. Whether most replicas have taken it: 202 says that some know a later deletion.
    fn put_new(&self, name: &str, bytes: &[u8]) -> Result<bool, StoreError> {
        match self.put(name, bytes, true)? {
            // 412 also stands for a first try whose answer was lost.
            Some(answer) if answer.status != StatusCode::PRECONDITION_FAILED => {
                Ok(self.expect("write to", answer)?.status == StatusCode::CREATED)
            }
            _ => Ok(false),
        }
    }

    fn stands_there(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        match self.object(name, Read::Newest)? {
            Some(stored) if stored.expose() == bytes => Ok(()),
            Some(_) => Err(StoreError::Exists { id: name.to_owned(), at: self.to_string() }),
            None => Err(self.lost(name)),
        }
    }

    /// Writes it, in place of what is there.
    pub(super) fn put_object(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        if let Some(answer) = self.put(name, bytes, false)? {
            self.expect("write to", answer)?;
        }
        match self.object(name, Read::Newest)? {
            Some(stored) if stored.expose() == bytes => Ok(()),
            _ => Err(self.lost(name)),
        }
    }

    pub(super) fn replace_object(&self, name: &str, key: &SealedKey) -> Result<(), StoreError> {
        let bytes = key.to_json();
        let Some(stored) = self.newest(name)? else { return Err(self.absent(name)) };
        let (old, new) = (generation(&stored), generation(key));
        if new <= old {
            return Err(StoreError::Outdated { id: name.to_owned(), generation: old });
        }
        if let Some(answer) = self.put(name, &bytes, false)? {
            self.expect("write to", answer)?;
        }
        match self.newest(name)? {
            Some(stored) if stored == *key => Ok(()),
            Some(stored) => Err(StoreError::Outdated { id: name.to_owned(), generation: generation(&stored) }),
            None => Err(self.lost(name)),
        }
    }

    pub(super) fn newest(&self, name: &str) -> Result<Option<SealedKey>, StoreError> {
        self.object(name, Read::Newest)?.map(|bytes| self.parse(name, &bytes)).transpose()
    }

    /// The newest form; or if not all replicas answer in time, what one of them has: of one key, all forms open the same.
    pub(super) fn fetch(&self, name: &str) -> Result<SealedKey, StoreError> {
        let start = Instant::now();
        let bytes = match self.object(name, Read::NewestIfSoon) {
            Err(StoreError::Unreachable { source, .. })
                if matches!(*source, SendError::Http(HttpError::TimedOut { .. })) =>
            {
                tracing::warn!("not all replicas of {name} answer in time; using the answer of one replica");
                self.object(name, Read::Any { spent: start.elapsed() })
            }
            outcome => outcome,
        }?;
        bytes.map_or_else(|| Err(self.absent(name)), |bytes| self.parse(name, &bytes))
    }

    fn parse(&self, name: &str, bytes: &SecretBytes) -> Result<SealedKey, StoreError> {
        SealedKey::from_json(bytes.expose()).map_err(|source| self.malformed(name, source))
    }

    pub(super) fn malformed(&self, name: &str, source: MalformedSealedKey) -> StoreError {
        StoreError::Malformed { what: format!("{self}/{name}"), source }
    }

    pub(super) fn not_found(&self, name: &str) -> StoreError {
        StoreError::NotFound { id: name.to_owned(), at: self.to_string() }
    }

    /// Why an object is not there: Swift answers 404 for a container that is not there as well.
    fn absent(&self, name: &str) -> StoreError {
        match self.head() {
            Err(no_container @ StoreError::NoContainer { .. }) => no_container,
            _ => self.not_found(name),
        }
    }

    fn lost(&self, name: &str) -> StoreError {
        let what = format!("it accepted the object {name}, but does not have it");
        StoreError::Answer { action: "write to", at: self.to_string(), what }
    }

    /// Deletes an object, and in a container that keeps old versions, those as well: else nothing would be shredded.
    pub(super) fn delete_object(&self, name: &str) -> Result<(), StoreError> {
        let versioned = self.is_versioned()?;
        let answer = self.send("delete from", |urls| {
            let request = Request::new(Method::DELETE, self.urls(urls, &segments(name)), MOST_WORDS_BYTES);
            Request { patient: true, ..request }
        })?;
        // Sent twice, the first one may have deleted it.
        let found = answer.status != StatusCode::NOT_FOUND || answer.repeated;
        if answer.status != StatusCode::NOT_FOUND {
            self.expect("delete from", answer)?;
        }
        if versioned {
            self.delete_versions(name)?;
        }
        if found { Ok(()) } else { Err(self.absent(name)) }
    }

    /// Whether the container keeps old versions, or did before that was suspended.
    fn is_versioned(&self) -> Result<bool, StoreError> {
        if let Some(versioned) = self.versioned.get() {
            return Ok(*versioned);
        }
        let answer = self.head()?;
        if let Some(mode) =
            ["x-versions-location", "x-history-location"].iter().find(|mode| answer.header(mode).is_some())
        {
            let what = format!(
                "it keeps old versions of deleted keys in another container ({mode}), which cryptattach cannot clear"
            );
            return Err(StoreError::Answer { action: "delete from", at: self.to_string(), what });
        }
        let versioned = answer.header("x-versions-enabled").is_some();
        Ok(*self.versioned.get_or_init(|| versioned))
    }

    fn delete_versions(&self, name: &str) -> Result<(), StoreError> {
        // Each page is deleted before the next is asked for; what comes after a page of one version is another name's.
        for _ in 0..MOST_NAMES / PAGE {
            if self.delete_page_of_versions(name)? < PAGE {
                return Ok(());
            }
        }
        // A store that has never deleted any would never end.
        let what = format!("it has more than {MOST_NAMES} versions of {name}");
        Err(StoreError::Answer { action: "delete from", at: self.to_string(), what })
    }

    fn delete_page_of_versions(&self, name: &str) -> Result<usize, StoreError> {
        let mut deleted = 0;
        for version in self.page(&[("versions", ""), ("prefix", name)])? {
            let (Some(found), Some(version)) = (version.name, version.version_id) else { continue };
            if found != name {
                continue;
            }
            deleted += 1;
            let answer = self.send("delete from", |urls| {
                let mut urls = self.urls(urls, &segments(name));
                for url in &mut urls {
                    url.query_pairs_mut().append_pair("version-id", &version);
                }
                Request::new(Method::DELETE, urls, MOST_WORDS_BYTES)
            })?;
            if answer.status != StatusCode::NOT_FOUND {
                self.expect("delete from", answer)?;
            }
        }
        Ok(deleted)
    }

    /// One page of a listing.
    fn page(&self, query: &[(&str, &str)]) -> Result<Vec<Listed>, StoreError> {
        let limit = PAGE.to_string();
        let answer = self.send("list", |urls| {
            let mut urls = self.urls(urls, &[]);
            for url in &mut urls {
                url.query_pairs_mut().append_pair("format", "json").append_pair("limit", &limit).extend_pairs(query);
            }
            Request::new(Method::GET, urls, MOST_PAGE_BYTES)
        })?;
        let answer = self.expect("list", answer)?;
        serde_json::from_slice(answer.body.expose()).map_err(|error| StoreError::Answer {
            action: "list",
            at: self.to_string(),
            what: format!("its listing is not understood ({:?})", error.classify()),
        })
    }

    /// All names below a prefix, `delimiter` cutting off what is deeper.
    pub(super) fn names(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        let mut names: Vec<String> = Vec::new();
        loop {
            let marker = names.last().cloned().unwrap_or_default();
            let page = self.page(&[("prefix", prefix), ("delimiter", "/"), ("marker", &marker)])?;
            let full = page.len() >= PAGE;
            let before = names.len();
            names.extend(page.into_iter().filter_map(|listed| listed.name).filter(|name| *name > marker));
            // A store that repeats its page would never end.
            if !full || names.len() == before {
                return Ok(names);
            }
            if names.len() > MOST_NAMES {
                let what = format!("it lists more than {MOST_NAMES} objects");
                return Err(StoreError::Answer { action: "list", at: self.to_string(), what });
            }
        }
    }
}

/// `kek/1` is an object one level down; Swift's names are paths.
fn segments(name: &str) -> Vec<&str> {
    name.split('/').collect()
}

fn generation(key: &SealedKey) -> u64 {
    key.claimed_generation().unwrap_or(0)
}

fn md5(bytes: &[u8]) -> String {
    let digest = hash(MessageDigest::md5(), bytes);
    digest.map(|digest| hex::encode(&digest)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::{
        config::Network,
        keys::{
            net::testing::{cloud, serve},
            store::swift::SwiftConfig,
        },
    };

    const OURS: &str = "ours";

    /// Has a server create a key: what comes of it, and what it was asked. It answers PUT with `put`, a plain GET with `one`, and
    /// one for the newest with `newest`; "" is 404.
    fn create(put: u16, one: &'static str, newest: &'static str) -> (Result<(), StoreError>, String) {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let heard = asked.clone();
        let url = serve(move |request| {
            let what = match request.starts_with("put ") {
                true => "put",
                false if request.contains("\nx-newest: true") => "newest",
                false => "one",
            };
            heard.lock().unwrap().push(what);
            match (what, if what == "one" { one } else { newest }) {
                ("put", _) => (put, String::new(), String::new()),
                (_, "") => (404, String::new(), String::new()),
                (_, body) => (200, String::new(), body.to_owned()),
            }
        });
        let url = format!("{url}/v1/AUTH_x");
        let (cloud, _folder) = cloud(&format!("{{auth_type: token, auth: {{auth_url: \"{url}\", token: t}}}}"));
        let config = SwiftConfig { cloud, container: None, urls: vec![url], endpoints: None, caller_token: false };
        let swift = Swift::open(&"s".parse().unwrap(), &config, &Network::default(), None).unwrap();
        let created = swift.create_key("id", OURS.as_bytes());
        let asked = asked.lock().unwrap().join(" ");
        (created, asked)
    }

    #[test]
    fn a_key_that_most_replicas_took_as_new_is_read_back_from_one() {
        let (created, asked) = create(201, OURS, OURS);
        assert!(created.is_ok() && asked == "put one", "{asked}");
    }

    #[test]
    fn what_one_replica_does_not_have_all_are_asked_for() {
        for one in ["", "another's"] {
            let (created, asked) = create(201, one, OURS);
            assert!(created.is_ok() && asked == "put one newest", "{asked}");
        }
        let (created, _) = create(201, "", "");
        assert!(created.unwrap_err().to_string().contains("accepted the object id, but does not have it"));
        let (created, _) = create(201, "another's", "another's");
        assert!(matches!(created, Err(StoreError::Exists { .. })));
    }

    /// A replica that knows of a later deletion has refused it, and another one has it nevertheless.
    #[test]
    fn a_key_that_not_all_took_as_new_is_compared_on_all_replicas() {
        let (created, asked) = create(202, OURS, "");
        assert!(created.is_err() && asked == "put newest", "{asked}");
        let (created, asked) = create(412, OURS, OURS);
        assert!(created.is_ok() && asked == "put newest", "the answer to a first try was lost: {asked}");
        let (created, asked) = create(412, OURS, "another's");
        assert!(matches!(created, Err(StoreError::Exists { .. })) && asked == "put newest", "{asked}");
    }
}
