//! The secrets of a container: read, created, replaced, deleted, listed.

use serde_json::{Value, json};

use super::{BaoKv, StoreError};
use crate::{
    base::key::{MAX_SEALED_BYTES, MalformedSealedKey, SealedKey},
    keys::{
        net::{
            bao::{BaoError, Question, json as json_of, unexpected},
            http::{self, Cancel, HttpAnswer},
        },
        store::MOST_NAMES,
    },
};

/// The field of a secret that has the value.
const FIELD: &str = "jwe";
/// A text in JSON may take twice its bytes, and the server adds a few words.
const MOST_BYTES: usize = 2 * MAX_SEALED_BYTES + 4096;
/// How many names a page of a listing has. Vault gives all at once.
const PAGE: usize = 1000;
const MOST_LIST_BYTES: usize = 1 << 20;

/// What is found under a name.
#[derive(Debug)]
pub enum Found {
    Nothing,
    There {
        text: String,
        version: u64,
    },
    /// It can be brought back.
    Deleted {
        version: u64,
    },
}

/// A mount that is not there, or of version 1.
const NO_KV: &str = "has no key-value engine of version 2 there";

impl Found {
    /// What an answer of this status says, or what is wrong with it.
    pub fn of(status: u16, body: &[u8]) -> Result<Self, String> {
        let json: Value =
            serde_json::from_slice(body).map_err(|_| format!("answers {status} with something that is not JSON"))?;
        let version = json.pointer("/data/metadata/version").and_then(Value::as_u64);
        match (status, version) {
            (404, None) if has_no_errors(&json) => Ok(Self::Nothing),
            (404, Some(version)) if json.pointer("/data/metadata/destroyed") == Some(&Value::Bool(true)) => {
                Err(format!("has destroyed version {version}, which is the last one, for ever"))
            }
            (404, Some(version)) => Ok(Self::Deleted { version }),
            (200, Some(version)) => {
                let text = json.pointer("/data/data/jwe").and_then(Value::as_str);
                let text = text.ok_or_else(|| format!("has no field '{FIELD}' there"))?.to_owned();
                Ok(Self::There { text, version })
            }
            _ => Err(refused(status, body)),
        }
    }
}

/// What a refusal says.
fn refused(status: u16, body: &[u8]) -> String {
    let said = http::reason_in(body).map(|said| format!(": {said}")).unwrap_or_default();
    if matches!(status, 200..=299 | 404) { format!("{NO_KV}{said}") } else { format!("answers {status}{said}") }
}

impl BaoKv {
    /// `MOUNT/PART/PREFIX/NAME`; a name may have several segments.
    fn path<'a>(&'a self, part: &'a str, name: &'a str) -> Vec<&'a str> {
        let prefix = self.path.prefix.iter().map(String::as_str);
        [&*self.path.mount, part].into_iter().chain(prefix).chain(name.split('/')).collect()
    }

    fn ask(&self, question: Question<'_>) -> Result<HttpAnswer, StoreError> {
        Ok(self.bao.ask(question, &Cancel::never())?)
    }

    pub(super) fn read(&self, name: &str) -> Result<Found, StoreError> {
        let answer = self.ask(Question::get(self.path("data", name), MOST_BYTES))?;
        let found = Found::of(answer.status.as_u16(), answer.body.expose());
        found.map_err(|what| unexpected(&answer, &what).into())
    }

    /// Writes what replaces that version; 0: what is new. Whether it was the one that was there.
    pub(super) fn write(&self, name: &str, text: Vec<u8>, replaced: u64) -> Result<bool, StoreError> {
        let text = String::from_utf8(text).unwrap_or_default();
        let body = json!({"options": {"cas": replaced}, "data": {FIELD: text}});
        let answer = self.ask(Question::post(self.path("data", name), &body).map_err(StoreError::from)?)?;
        let said = http::reason(&answer).unwrap_or_default();
        match answer.status.as_u16() {
            400 if said.contains("check-and-set") => Ok(false),
            200..=299 if json_of(&answer).is_ok_and(|json| json.pointer("/data/version").is_some()) => Ok(true),
            _ => Err(Self::refused(&answer)),
        }
    }

    /// Creates it. Sent twice, what stands there afterwards decides.
    pub(super) fn create_object(&self, name: &str, bytes: Vec<u8>) -> Result<(), StoreError> {
        if self.write(name, bytes.clone(), 0)? {
            return Ok(());
        }
        match self.read(name)? {
            Found::There { text, .. } if text.as_bytes() == bytes => Ok(()),
            Found::Deleted { version } => Err(self.deleted(name, version)),
            Found::There { .. } | Found::Nothing => {
                Err(StoreError::Exists { id: name.to_owned(), at: self.to_string() })
            }
        }
    }

    /// A sealed key, and its version.
    pub(super) fn sealed_version(&self, name: &str) -> Result<(SealedKey, u64), StoreError> {
        match self.read(name)? {
            Found::Nothing => Err(self.not_found(name)),
            Found::Deleted { version } => Err(self.deleted(name, version)),
            Found::There { text, version } => {
                let key = SealedKey::from_json(text.as_bytes()).map_err(|source| self.malformed(name, source))?;
                Ok((key, version))
            }
        }
    }

    /// Only by a later generation.
    pub(super) fn replace_sealed(&self, name: &str, key: &SealedKey) -> Result<(), StoreError> {
        let (stored, version) = self.sealed_version(name)?;
        let outdated =
            |stored: &SealedKey| StoreError::Outdated { id: name.to_owned(), generation: generation(stored) };
        if generation(key) <= generation(&stored) {
            return Err(outdated(&stored));
        }
        if !self.write(name, key.to_json(), version)? {
            let (stored, _) = self.sealed_version(name)?;
            return if stored == *key { Ok(()) } else { Err(outdated(&stored)) };
        }
        self.destroy(name, version);
        Ok(())
    }

    /// What was replaced still opens for those whom it was sealed to. That it stays is told, but the new one is there.
    fn destroy(&self, name: &str, version: u64) {
        let question = Question::post(self.path("destroy", name), &json!({"versions": [version]}));
        let gone = question.map_err(StoreError::from).and_then(|question| self.ask(question));
        match gone {
            Ok(answer) if answer.status.is_success() => {}
            other => {
                let why = other.err().map(|error| format!(" ({error})")).unwrap_or_default();
                tracing::warn!(
                    "version {version} of {self}/{name} stays in the server{why}; allow 'update' on {}/destroy/{}/*",
                    self.path.mount,
                    self.path.prefix.join("/")
                );
            }
        }
    }

    /// Deletes it for ever, in all versions.
    pub(super) fn delete_object(&self, name: &str) -> Result<(), StoreError> {
        // The deletion of nothing succeeds, too.
        if let Found::Nothing = self.read(name)? {
            return Err(self.not_found(name));
        }
        let answer = self.ask(Question::delete(self.path("metadata", name)))?;
        if answer.status.is_success() { Ok(()) } else { Err(Self::refused(&answer)) }
    }

    /// The names in a folder; folders in it end in '/'.
    pub(super) fn names(&self, folder: &[&str]) -> Result<Vec<String>, StoreError> {
        let (limit, mut names) = (PAGE.to_string(), Vec::<String>::new());
        let mut path = self.path("metadata", "");
        path.pop();
        path.extend(folder);
        loop {
            let after = names.last().cloned().unwrap_or_default();
            let query = [("list", "true"), ("limit", &*limit), ("after", &*after)];
            let query = if after.is_empty() { &query[..2] } else { &query };
            let answer = self.ask(Question::get(path.clone(), MOST_LIST_BYTES).query(query))?;
            let json = json_of(&answer)?;
            if answer.status.as_u16() == 404 && has_no_errors(&json) {
                return Ok(names);
            }
            let page = json.pointer("/data/keys").and_then(Value::as_array).filter(|_| answer.status.is_success());
            let page = page.ok_or_else(|| Self::refused(&answer))?;
            let before = names.len();
            names.extend(page.iter().filter_map(Value::as_str).filter(|name| **name > *after).map(str::to_owned));
            // A server that repeats its page would never end.
            if page.len() < PAGE || names.len() == before {
                return Ok(names);
            }
            if names.len() > MOST_NAMES {
                return Err(unexpected(&answer, &format!("lists more than {MOST_NAMES} secrets")).into());
            }
        }
    }

    fn refused(answer: &HttpAnswer) -> StoreError {
        unexpected(answer, &refused(answer.status.as_u16(), answer.body.expose())).into()
    }

    pub(super) fn malformed(&self, name: &str, source: MalformedSealedKey) -> StoreError {
        StoreError::Malformed { what: format!("{self}/{name}"), source }
    }

    pub(super) fn not_found(&self, name: &str) -> StoreError {
        StoreError::NotFound { id: name.to_owned(), at: self.to_string() }
    }

    pub(super) fn deleted(&self, name: &str, version: u64) -> StoreError {
        BaoError::Deleted { id: name.to_owned(), at: self.to_string(), version }.into()
    }
}

fn has_no_errors(json: &Value) -> bool {
    json.get("errors").and_then(Value::as_array).is_some_and(Vec::is_empty)
}

fn generation(key: &SealedKey) -> u64 {
    key.claimed_generation().unwrap_or(0)
}
