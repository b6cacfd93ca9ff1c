//! Admission: an administrator makes a host's lockbox key, and takes it away again.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use super::LockboxError;
use crate::{
    base::key::{HostName, LockboxKeyId},
    keys::{
        seal::{LockboxKey, OwnerRecipient, Recipient},
        store::{HostKeys, StoreError},
    },
};

/// How far the clocks of two administrators may be apart: a day, in milliseconds.
const LONGEST_AHEAD: u64 = 24 * 3600 * 1000;

/// A host's new lockbox key, which the administrator does not keep.
#[derive(Serialize)]
pub struct Admission {
    pub host: HostName,
    pub generation: u64,
    /// For people to compare with what `lockbox open` says on the host.
    pub fingerprint: String,
    /// Whom container keys are to be sealed to for this host.
    #[serde(skip)]
    pub recipient: OwnerRecipient,
}

/// Makes a host's lockbox key, seals it to its identity and to the escrow (`recipients`) and stores it, in place of the one
/// that the host may have had before.
pub fn admit(
    store: &dyn HostKeys,
    host: &HostName,
    recipients: &[Box<dyn Recipient>],
) -> Result<Admission, LockboxError> {
    let previous = match store.get(host) {
        Ok(sealed) => Some(sealed.claimed_generation().unwrap_or(0)),
        Err(StoreError::NotFound { .. }) => None,
        // The first host of all: the part of the store that has them is made with it.
        Err(StoreError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => return Err(error.into()),
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map(|age| age.as_millis()).unwrap_or(0);
    let now = u64::try_from(now).unwrap_or(u64::MAX);
    // Nothing could follow the last generation, and what the store says is only claimed.
    if previous.is_some_and(|previous| previous > now.saturating_add(LONGEST_AHEAD)) {
        return Err(LockboxError::OfTheFuture(host.clone()));
    }
    let key = LockboxKey::random(host, previous, now)?;
    let sealed = key.seal_to(recipients)?;
    match previous {
        None => store.create(host, &sealed)?,
        Some(_) => store.replace(host, &sealed)?,
    }
    // Container keys are sealed to it next: the store has to have it.
    if store.get(host)? != sealed {
        return Err(LockboxError::ReadBack(host.clone()));
    }
    let LockboxKeyId { host, generation } = key.id().clone();
    Ok(Admission { host, generation, fingerprint: key.fingerprint().to_owned(), recipient: key.recipient()? })
}

/// Takes a host's lockbox key away: its next `lockbox open` fails and wipes what the host has.
pub fn withdraw(store: &dyn HostKeys, host: &HostName) -> Result<(), LockboxError> {
    Ok(store.delete(host)?)
}
