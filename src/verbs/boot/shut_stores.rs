//! Stores that nobody reads any more once a boot has ended ([`Kind::shut`](store::Kind::shut)).

use std::time::{Duration, Instant};

use super::{BootError, record::Record, within};
use crate::{
    base::{chain::chain, key::StoreName},
    config::{Config, StoreConfig},
    keys::store::{self, StoreError},
};

/// How long the end of a boot waits for all of them.
const LONGEST: Duration = Duration::from_secs(10);

/// Shuts those that are to be shut, and tells which are not; none that hangs is waited for.
pub fn shut(config: &Config, record: &mut Record) {
    let until = Instant::now() + LONGEST;
    for (name, store) in &config.stores {
        match in_time(name, store, until) {
            Some(Ok(())) => record.note(&format!("the store '{name}' is shut until the next boot")),
            Some(Err(why)) => {
                record.tell("shut the store", None, &BootError::StoreOpen { store: name.clone(), why }.into())
            }
            None => {}
        }
    }
}

/// What has become of a store; `None` if it stays as it is.
fn in_time(name: &StoreName, store: &StoreConfig, until: Instant) -> Option<Result<(), String>> {
    let (name, store) = (name.clone(), store.clone());
    let shut = within(until.saturating_duration_since(Instant::now()), move || {
        let kind = store::kind(&store).map_err(StoreError::from);
        let shut = kind.map_or_else(|error| Some(Err(error)), |kind| kind.shut(&name, &store));
        shut.map(|shut| shut.map_err(|error| chain(&error)))
    });
    shut.unwrap_or_else(|| Some(Err("it does not answer".to_owned())))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_store_is_shut_only_if_that_is_wanted_and_a_failure_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.toml");
        // Nobody listens there: to ask the TPM is to fail.
        let tpm = "[tpm]\ntcti = 'swtpm:path=/nonexistent'\n[stores.a]\nowner = 'o.pem'\nno_escrow = true\n";
        let shut = |kind: &str| {
            fs::write(&path, format!("{tpm}type = {kind}\n")).unwrap();
            let config = Config::read(&path).unwrap();
            let name = "a".parse().unwrap();
            in_time(&name, config.store(&name).unwrap(), Instant::now() + LONGEST)
        };
        assert_eq!(shut("'directory'\npath = 'a'"), None);
        assert_eq!(shut("'tpm-nv'"), None);
        let told = shut("'tpm-nv'\nread_lock = true").unwrap().unwrap_err();
        assert!(told.contains("cannot use a TPM"), "{told}");
    }
}
