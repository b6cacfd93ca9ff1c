//! `host admit`: a host's lockbox key, the container keys that are sealed to it, and the answer that lets the host open them.

use std::collections::BTreeSet;

use super::{
    error::Error,
    join::{Letter, record},
};
use crate::{
    base::key::{HostName, StoreName},
    config::Config,
    keys::{seal::Recipient, store::StoreError},
    unlock::{
        container::{Container, Use},
        enrol::{Administrator, Admitted, Answer, Candidate, EnrolError, Request},
        lockbox::{self, LockboxError},
    },
};

/// Where a host may open keys.
pub struct Wish<'a> {
    /// At least one.
    pub stores: &'a [StoreName],
    /// The store for the host's lockbox key.
    pub lockbox_store: Option<&'a StoreName>,
    /// A host that is admitted gets a new lockbox key.
    pub replace: bool,
}

/// The request that a host has left in a store.
pub fn left(config: &Config, stores: &[StoreName], host: &HostName) -> Result<Option<(Request, StoreName)>, Error> {
    for store in stores {
        if let Some((request, _)) = Letter::Request.read(config, store, host)? {
            return Ok(Some((request, store.clone())));
        }
    }
    Ok(None)
}

/// Refuses what could only fail later; whether the host is to be admitted at all.
pub fn may_admit(candidate: &Candidate, wish: &Wish<'_>) -> Result<(), Error> {
    let Some(known) = &candidate.known else { return Ok(()) };
    let (host, admitted) = (known.host.clone(), known.admitted);
    if !candidate.is_admitted() {
        return if wish.replace { Ok(()) } else { Err(EnrolError::Admitted { host, admitted }.into()) };
    }
    // One request admits once, and to what was said then.
    let all_known = wish.stores.iter().all(|store| known.stores.contains(store));
    if all_known { Ok(()) } else { Err(EnrolError::Replayed { host, admitted }.into()) }
}

/// Admits a host, and says what it is to get; the same again for the request that has admitted it.
pub fn admit(config: &Config, candidate: Candidate, wish: &Wish<'_>) -> Result<(Admitted, Answer), Error> {
    may_admit(&candidate, wish)?;
    let administrator = Administrator::of(&config.state);
    if candidate.is_admitted()
        && let Some(known) = candidate.known
    {
        let answer = administrator.answer(&known)?;
        return Ok((known, answer));
    }
    let (host, before) = (candidate.host.clone(), candidate.known.clone());
    let stores = all_stores(wish.stores, before.as_ref());
    // All that can be refused is refused before anything is changed.
    let containers = stores.iter().map(|store| Container::open(config, store, None, Use::Keys));
    let containers = containers.collect::<Result<Vec<_>, _>>()?;
    containers.iter().try_for_each(|container| container.hosts().map(drop))?;
    let before = before.map(|before| before.lockbox_store);
    let keeper_name = wish.lockbox_store.or(before.as_ref()).unwrap_or(&wish.stores[0]).clone();
    let keeper = Container::open(config, &keeper_name, None, Use::Keys)?;

    let (admission, recipient) = candidate.admission()?;
    let mut recipients: Vec<Box<dyn Recipient>> = keeper.escrow()?;
    recipients.push(Box::new(recipient));
    let lockbox = lockbox::admit(keeper.host_keys()?, &host, &recipients)?;
    for container in &containers {
        container.admit_host(&host, &lockbox.recipient)?;
    }
    if let Some(moved) = before.filter(|before| *before != keeper_name) {
        withdraw(config, &moved, &host)?;
    }
    let (admitted, answer) = admission.admitted(&lockbox, keeper_name, stores);
    let admitted = administrator.admitted(admitted, &answer)?;
    record(config, "host admit", &host, Some(names(&admitted.stores)));
    Ok((admitted, answer))
}

/// Those that are named, and those that the host is admitted to already: its lockbox key of before is for neither any more.
fn all_stores(named: &[StoreName], before: Option<&Admitted>) -> Vec<StoreName> {
    let all = named.iter().chain(before.iter().flat_map(|before| &before.stores));
    all.cloned().collect::<BTreeSet<_>>().into_iter().collect()
}

/// Deletes a host's lockbox key; whether there was one.
pub fn withdraw(config: &Config, store: &StoreName, host: &HostName) -> Result<bool, Error> {
    match lockbox::withdraw(Container::open(config, store, None, Use::Keys)?.host_keys()?, host) {
        Ok(()) => Ok(true),
        Err(LockboxError::Store(StoreError::NotFound { .. })) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// "cinder, logs".
pub fn names(stores: &[StoreName]) -> String {
    stores.iter().map(StoreName::as_str).collect::<Vec<_>>().join(", ")
}
