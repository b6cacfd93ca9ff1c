//! When a host was last seen: what it has left in the store that keeps its lockbox key.
//!
//! That is for people, and nothing depends on it: whoever may write to the store may write it. A host that may not, or cannot,
//! goes on without.

use super::Lockbox;
use crate::{
    base::{chain::chain, clock::now, key::HostName},
    config::Config,
    keys::store::{self, HostKeys, StoreError},
};

/// Digits of a time in seconds since 1970.
const MOST_BYTES: usize = 12;

fn name(host: &HostName) -> String {
    format!("join/{host}.seen")
}

impl Lockbox {
    /// Tells the store that this host was here.
    pub fn leave_time(&self, config: &Config) {
        let leave = || -> Result<(), StoreError> {
            let section = config.store(&self.config.store)?;
            let store = store::open(&*store::kind(section)?, &self.config.store, section, None)?;
            let Some(letters) = store.host_keys().and_then(HostKeys::letters) else { return Ok(()) };
            letters.put(&name(&self.config.host), now().to_string().as_bytes())
        };
        if let Err(error) = leave() {
            tracing::info!("the store was not told that this host is here: {}", chain(&error));
        }
    }
}

/// When a host was here, as the store has it; `None` if that is not known.
pub fn last_seen(keys: &dyn HostKeys, host: &HostName) -> Option<u64> {
    let text = keys.letters()?.read(&name(host)).ok()??;
    let text = std::str::from_utf8(&text).ok().filter(|text| text.len() <= MOST_BYTES)?;
    // No host was seen tomorrow.
    text.trim().parse().ok().filter(|seen| *seen <= now() + 24 * 3600)
}
