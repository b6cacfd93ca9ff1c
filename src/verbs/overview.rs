//! This host in one look: its stores, its lockbox, its TPM's latch, what expires, what runs next, what failed. Nothing is
//! changed, and no store is waited for longer than a person looks at an empty screen.

use std::{path::Path, thread, time::Instant};

use serde::Serialize;

use crate::{
    base::{chain::chain, key::StoreName},
    config::Config,
    keys::{store, tpm::Tpm},
    sys::systemd::{self, Timer},
    unlock::{
        container::{Container, Use},
        lockbox::{self, Lockbox},
    },
    verbs::{
        error::Error,
        explain::{self, FOLDER},
    },
};

/// How long a store may take to answer, in seconds.
const PATIENCE: f64 = 5.0;

/// What is known of this host.
#[derive(Debug, Serialize)]
pub struct Overview {
    pub stores: Vec<Reached>,
    /// `None`: none is configured.
    pub lockbox: Option<lockbox::Status>,
    /// `None`: this host has no key in a TPM.
    pub latch: Option<Latch>,
    /// What systemd starts of ours by the clock.
    pub timers: Vec<Timer>,
    /// How many failures 'explain' has.
    pub failures: usize,
}

/// A store, and whether it answers.
#[derive(Debug, Serialize)]
pub struct Reached {
    pub store: StoreName,
    /// Where its keys are, in words.
    pub place: String,
    pub reachable: bool,
    /// Why it is not, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// How long that took.
    pub seconds: f64,
}

/// PCR 15 in this boot.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Latch {
    /// It is extended: the TPM opens this host's keys after the next power-on only.
    Latched,
    /// It is not: whoever is root may use the key in the TPM.
    Open,
    /// In words.
    Unknown(String),
}

/// Looks at everything, the stores all at once.
pub fn overview(config: &Config) -> Overview {
    let mut impatient = config.clone();
    for store in impatient.stores.values_mut() {
        store.network.total_seconds = store.network.total_seconds.min(PATIENCE);
    }
    let stores = thread::scope(|scope| {
        let asked: Vec<_> = impatient.stores.keys().map(|name| scope.spawn(|| reach(&impatient, name))).collect();
        asked.into_iter().flat_map(|store| store.join()).collect()
    });
    let lockbox = config.lockbox.as_ref().and_then(|_| Lockbox::of(config));
    Overview {
        stores,
        lockbox: lockbox.and_then(|lockbox| lockbox.status(config).ok()),
        latch: config.tpm.identity.exists().then(|| latch(config)),
        timers: systemd::timers(),
        failures: explain::all(Path::new(FOLDER)).map_or(0, |failures| failures.len()),
    }
}

fn reach(config: &Config, name: &StoreName) -> Reached {
    let start = Instant::now();
    let asked = || -> Result<(), Error> {
        let container = Container::open(config, name, None, Use::Unlock)?;
        Ok(container.is_there()?)
    };
    let failure = asked().err();
    let place = config.store(name).and_then(|store| Ok(store::kind(store)?.describe()));
    Reached {
        store: name.clone(),
        place: place.unwrap_or_default(),
        reachable: failure.is_none(),
        why: failure.map(|error| chain(&error)),
        seconds: (start.elapsed().as_secs_f64() * 1000.0).round() / 1000.0,
    }
}

fn latch(config: &Config) -> Latch {
    match Tpm::open(&config.tpm).and_then(|tpm| tpm.is_latched()) {
        Ok(true) => Latch::Latched,
        Ok(false) => Latch::Open,
        Err(error) => Latch::Unknown(chain(&error)),
    }
}
