//! What attaches of one boot need not ask a store for again: its container keys, as they are sealed, and where the rows rest that
//! list its keys. Each is asked for once an hour.
//!
//! Nothing of it is secret, and nothing is believed that is not believed of the store: a sealed container key opens by what this
//! host has, each time, and serves only if it is the one that this host trusts. Keys themselves are always asked for: the store
//! is to say each time that they are there, and in which form. The files are root's, in /run, and are for one configuration as
//! it is now and the servers that it leads to.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use nix::unistd::geteuid;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    base::{
        chain::chain,
        clock::now,
        hex,
        key::{Epoch, Location, Place, SealedKey, StoreName},
    },
    config::Config,
    keys::store::Kind,
    sys::state,
};

/// Where they are. Its name begins with a dot, which no mapping's does.
const FOLDER: &str = "/run/cryptattach/.warm";
/// A ring that has changed is known after this.
const SECONDS: u64 = 3600;

/// What earlier attaches have left of one store.
pub(super) struct Warm(PathBuf);

#[derive(Serialize, Deserialize)]
struct Left<T> {
    /// Seconds since 1970-01-01 UTC.
    asked: u64,
    answer: T,
}

impl Warm {
    /// `None` where the store is on this host, or nobody but root could be kept from writing.
    pub fn of(config: &Config, name: &StoreName, kind: &dyn Kind) -> Option<Self> {
        let servers = kind.servers().ok().filter(|servers| !servers.is_empty() && geteuid().is_root())?;
        let file = fs::metadata(&config.path).ok()?;
        let written = (file.ino(), file.mtime(), file.mtime_nsec(), file.size());
        let of = format!("{:?}", (std::path::absolute(&config.path).ok()?, written, &*config.state, name, servers));
        Some(Self::at(Path::new(FOLDER).join(hex::encode(&openssl::sha::sha256(of.as_bytes())))))
    }

    pub fn at(folder: PathBuf) -> Self {
        Self(folder)
    }

    /// A container key.
    pub fn key(&self, epoch: Epoch) -> Option<SealedKey> {
        let json: String = self.read(&format!("kek-{epoch}"))?;
        SealedKey::from_json(json.as_bytes()).ok()
    }

    pub fn keep_key(&self, epoch: Epoch, sealed: &SealedKey) {
        self.write(&format!("kek-{epoch}"), &String::from_utf8_lossy(&sealed.to_json()));
    }

    /// Where the rows rest.
    pub fn rows(&self) -> Option<Vec<Place>> {
        self.read("rows").filter(|places: &Vec<Place>| are_known(places))
    }

    pub fn keep_rows(&self, places: &[Place]) {
        self.write("rows", &places);
    }

    pub fn forget_rows(&self) {
        let _ = state::remove(&self.0.join("rows"));
    }

    fn read<T: DeserializeOwned>(&self, name: &str) -> Option<T> {
        let Left { asked, answer } = state::read(&self.0.join(name)).ok()??;
        // One of the future is of a clock that was set back.
        now().checked_sub(asked).filter(|age| *age < SECONDS).map(|_| answer)
    }

    fn write<T: Serialize>(&self, name: &str, answer: &T) {
        if let Err(error) = state::write(&self.0.join(name), &Left { asked: now(), answer }) {
            tracing::debug!("the next attach asks again: {}", chain(&error));
        }
    }
}

/// Whether the store has said of all where they are.
pub(super) fn are_known(places: &[Place]) -> bool {
    !places.is_empty() && places.iter().all(|place| matches!(place.at, Location::Replica(_)))
}
