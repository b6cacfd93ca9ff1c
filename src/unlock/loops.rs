//! Dependency loops: a store that rests on a volume whose key is in that store, or in one that needs it in turn. While all of it is
//! open, all is well. Once it is closed nothing opens it again, and no message of that day could say it in time.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::{Path, PathBuf},
};

use crate::{
    base::{
        advice::Advice,
        exit::Exit,
        key::{KeyReference, Location, Place, Ring, StoreName},
    },
    config::Config,
    keys::store,
    unlock::container::{Container, Use},
    volumes::{
        header::{self, LuksHeader},
        separation::{Hosts, Lineage},
    },
};

/// Where Swift's own default has its devices (object-server.conf, option "devices").
const SWIFT_DEVICES: &str = "/srv/node";

/// A store rests on a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rests {
    store: StoreName,
    /// What of it.
    place: String,
    volume: PathBuf,
    key: KeyReference,
    /// Without this place, and this key, the store has no keys.
    is_certain: bool,
}

/// Stores that need each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loop(Vec<Rests>);

/// A loop that nothing opens once it is closed.
#[derive(Debug, thiserror::Error)]
#[error("a dependency loop: {0}; once that is closed, nothing opens it again")]
pub struct LoopError(Loop);

impl Advice for LoopError {
    fn exit(&self) -> Exit {
        Exit::DependencyLoop
    }

    fn next_step(&self) -> Option<Cow<'static, str>> {
        let Rests { store, key, .. } = self.0.0.first()?;
        Some(format!("keep the keys of '{store}' on a disk that opens without the store '{}'", key.store).into())
    }
}

impl Loop {
    fn is_certain(&self) -> bool {
        self.0.iter().all(|rests| rests.is_certain)
    }
}

impl fmt::Display for Loop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, Rests { store, place, volume, key, .. }) in self.0.iter().enumerate() {
            let and = if index == 0 { "" } else { ", and " };
            write!(f, "{and}the store '{store}' ({place}) rests on {}, whose key is {key}", volume.display())?;
        }
        Ok(())
    }
}

/// Refuses a store that is in a loop for certain, and says where it may be. `places` are those that the store tells of a key: a
/// store on the network has some on this host, maybe.
pub fn check(config: &Config, store: &StoreName, places: &[Place]) -> Result<(), LoopError> {
    for found in of(config, store, places) {
        if found.is_certain() {
            return Err(LoopError(found));
        }
        tracing::warn!("there may be a dependency loop: {found}; try what opens it after a restart");
    }
    Ok(())
}

/// The loops that are met from this store on, as far as this host sees them: one at least of those that a store is in.
pub fn of(config: &Config, store: &StoreName, places: &[Place]) -> Vec<Loop> {
    let mut search = Search {
        config,
        hosts: Hosts::known_here(&config.separation),
        root: volumes_below(Path::new("/")),
        volumes: BTreeMap::new(),
    };
    let (mut found, mut done) = (Vec::new(), BTreeSet::new());
    search.follow(store, places, &mut Vec::new(), &mut done, &mut found);
    found
}

struct Search<'a> {
    config: &'a Config,
    hosts: Hosts,
    /// The volumes of the root file system: what opens these is in the initramfs.
    root: Vec<PathBuf>,
    /// What the header of each volume says, looked at once.
    volumes: BTreeMap<PathBuf, Option<(KeyReference, bool)>>,
}

impl Search<'_> {
    fn follow(
        &mut self,
        store: &StoreName,
        places: &[Place],
        way: &mut Vec<Rests>,
        done: &mut BTreeSet<StoreName>,
        found: &mut Vec<Loop>,
    ) {
        for rests in self.rests(store, places) {
            let next = rests.key.store.clone();
            way.push(rests);
            match way.iter().position(|rests| rests.store == next) {
                Some(start) => found.push(Loop(way[start..].to_vec())),
                None if self.config.stores.contains_key(&next) && !done.contains(&next) => {
                    self.follow(&next, &[], way, done, found);
                }
                None => {}
            }
            way.pop();
        }
        done.insert(store.clone());
    }

    /// The volumes that a store rests on, each once.
    fn rests(&mut self, store: &StoreName, places: &[Place]) -> Vec<Rests> {
        let mut found: Vec<Rests> = Vec::new();
        for (place, is_needed) in self.places(store, places) {
            let (path, place) = place;
            for volume in volumes_below(&path) {
                if !is_needed && self.root.contains(&volume) {
                    continue;
                }
                let Some((key, is_alone)) = self.volume(&volume) else { continue };
                // A lockbox opens the volume while the store is away.
                let is_certain = is_needed && is_alone && self.config.lockbox.is_none();
                match found.iter_mut().find(|rests| rests.volume == volume) {
                    Some(known) if known.is_certain || !is_certain => {}
                    Some(known) => (known.place, known.is_certain) = (place.clone(), true),
                    None => found.push(Rests { store: store.clone(), place: place.clone(), volume, key, is_certain }),
                }
            }
        }
        found
    }

    /// What a store has on this host, in words, and whether it is nothing without that.
    fn places(&self, store: &StoreName, told: &[Place]) -> Vec<((PathBuf, String), bool)> {
        let Ok(kind) = self.config.store(store).and_then(store::kind) else { return Vec::new() };
        let named = |what: &str, path: PathBuf| (path.clone(), format!("{what} {}", path.display()));
        let mut all: Vec<_> =
            kind.directory().map(|path| (named("sealed keys", path.to_owned()), true)).into_iter().collect();
        all.extend(self.replicas(told));
        // Another identity, or a leaf, may do in place of each.
        let container = Container::open(self.config, store, None, Use::Keys);
        let own = container.iter().flat_map(Container::own_places).filter(|place| place.opens);
        all.extend(own.flat_map(paths).map(|(what, path)| (named(what, path.clone()), false)));
        let is_here = kind.servers().is_ok_and(|servers| servers.iter().any(|server| self.hosts.is_here(&server.host)));
        if is_here {
            let devices = std::fs::read_dir(SWIFT_DEVICES).into_iter().flatten().flatten();
            all.extend(devices.map(|device| (named("its server's device", device.path()), false)));
        }
        all
    }

    /// The replicas on this host. A ring whose replicas are all on such volumes is gone with them.
    fn replicas(&self, told: &[Place]) -> Vec<((PathBuf, String), bool)> {
        let replicas =
            || told.iter().filter_map(|place| if let Location::Replica(one) = &place.at { Some(one) } else { None });
        let mut all = Vec::new();
        for ring in [Ring::Object, Ring::Container, Ring::Account] {
            let of_ring: Vec<_> = replicas().filter(|replica| replica.ring == ring).collect();
            let here = |replica| self.hosts.directory(replica).filter(|path| !volumes_below(path).is_empty());
            let on_volumes: Vec<_> =
                of_ring.iter().filter_map(|replica| Some((here(replica)?, replica.to_string()))).collect();
            let is_all = on_volumes.len() == of_ring.len();
            all.extend(on_volumes.into_iter().map(|place| (place, is_all)));
        }
        all
    }

    /// The key of a volume, and whether nothing else opens it.
    fn volume(&mut self, volume: &Path) -> Option<(KeyReference, bool)> {
        let look = || {
            let found = header::find_to_map(volume, None, None).ok()?;
            let luks: &LuksHeader = found.luks()?;
            Some((luks.reference.clone()?, !luks.asks_people && luks.clevis.is_empty()))
        };
        self.volumes.entry(volume.to_owned()).or_insert_with(look).clone()
    }
}

/// The encrypted devices below a path.
fn volumes_below(path: &Path) -> Vec<PathBuf> {
    Lineage::of(path).encrypted()
}

/// The paths of a place, or of its parts.
fn paths(place: &Place) -> Vec<(&str, &PathBuf)> {
    match &place.at {
        Location::Path(path) => vec![(&place.what, path)],
        Location::Threshold { of, .. } => of.iter().flat_map(paths).collect(),
        Location::Replica(_) | Location::Chip { .. } | Location::Server { .. } | Location::Elsewhere { .. } => {
            Vec::new()
        }
    }
}
