//! The administrator's verbs: `list`, `remove`.

use std::collections::{BTreeMap, BTreeSet};

use clap::Args;
use serde::Serialize;

use super::Global;
use crate::{
    base::{
        chain::chain,
        clock::{date, now},
        hex,
        key::{HostName, StoreName},
    },
    cli::output,
    config::Config,
    keys::store::StoreError,
    unlock::{
        self,
        container::{Container, Use},
        enrol::{Administrator, Admitted, EnrolError},
        lockbox,
    },
    verbs::{
        admit::{names, withdraw},
        error::Error,
        join::record,
    },
};

/// List the hosts that this machine has admitted: since when, by which proof, last seen, and their state in the stores
///
/// A host is seen when its 'lockbox open' reaches the store that keeps its lockbox key, if it may write there. With -v,
/// their keys as well.
#[derive(Args)]
pub struct List {
    /// List removed hosts, too
    #[arg(long)]
    removed: bool,
}

#[derive(Serialize)]
struct Listed {
    #[serde(flatten)]
    admitted: Admitted,
    /// What the store says of its lockbox key.
    store_says: String,
    /// When the host was last there, as the store has it, in seconds since 1970; null if that is not known.
    last_seen: Option<u64>,
}

impl List {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let config = global.config()?;
        let all = Administrator::of(&config.state).register().all()?;
        let shown = all.into_iter().filter(|host| self.removed || host.removed.is_none());
        let mut silent = BTreeMap::new();
        let listed: Vec<_> = shown.map(|admitted| Listed::of(&config, admitted, &mut silent)).collect();
        output::print(global.json, &listed, || match listed.as_slice() {
            // Another user than the one who admits hosts has another register.
            [] => vec![format!("no host is admitted, by what {} has", config.state.display())],
            hosts if global.verbose > 0 => hosts.iter().flat_map(Listed::text).collect(),
            hosts => {
                const HEAD: [&str; 6] = ["HOST", "ADMITTED", "LAST SEEN", "PROOF", "LOCKBOX KEY", "STORES"];
                output::table(HEAD, hosts.iter().map(Listed::row))
            }
        })
    }
}

impl Listed {
    /// A store that fails is asked once, and not for each of its hosts: the waits would have no end.
    fn of(config: &Config, admitted: Admitted, silent: &mut BTreeMap<StoreName, String>) -> Self {
        let store = &admitted.lockbox_store;
        let asked = silent
            .get(store)
            .map_or_else(|| ask(config, &admitted).map_err(|error| chain(&error)), |why| Err(why.clone()));
        let (store_says, last_seen) = asked.unwrap_or_else(|why| {
            let told = format!("unknown ({why})");
            silent.insert(store.clone(), why);
            (told, None)
        });
        Self { store_says, last_seen, admitted }
    }

    fn seen(&self) -> String {
        self.last_seen.map_or_else(|| "not known".to_owned(), date)
    }

    fn row(&self) -> [String; 6] {
        let Admitted { host, lockbox_store, admitted, vouched, stores, .. } = &self.admitted;
        let removed = self.admitted.removed.map(|at| format!(", removed {}", date(at))).unwrap_or_default();
        [
            host.to_string(),
            date(*admitted) + &removed,
            self.seen(),
            vouched.to_string(),
            format!("{lockbox_store}: {}", self.store_says),
            names(stores),
        ]
    }

    fn text(&self) -> Vec<String> {
        let Admitted { host, kid, generation, lockbox_key, lockbox_store, admitted, .. } = &self.admitted;
        let removed = self.admitted.removed.map(|at| format!(", removed on {}", date(at))).unwrap_or_default();
        vec![
            format!("{host}"),
            format!("  admitted on       {}{removed}", date(*admitted)),
            format!("  last seen         {}", self.seen()),
            format!("  endorsement key   {}", hex::encode(&self.admitted.endorsement_key)),
            format!("  trusted by        {}", self.admitted.vouched),
            format!("  identity key      {kid}"),
            format!("  lockbox key       generation {generation}, fingerprint {lockbox_key}"),
            format!("  kept in           {lockbox_store}: {}", self.store_says),
            format!("  stores            {}", names(&self.admitted.stores)),
        ]
    }
}

/// Whether the store still has the lockbox key that the host was admitted with, and when the host was last there.
fn ask(config: &Config, admitted: &Admitted) -> Result<(String, Option<u64>), Error> {
    let keeper = Container::open(config, &admitted.lockbox_store, None, Use::Keys)?;
    let keys = keeper.host_keys()?;
    let says = match keys.get(&admitted.host).map(|sealed| sealed.claimed_generation().unwrap_or(0)) {
        Ok(generation) if generation == admitted.generation => "there".to_owned(),
        Ok(generation) => format!("ANOTHER, of generation {generation}"),
        Err(StoreError::NotFound { .. }) => "missing".to_owned(),
        Err(error) => return Err(error.into()),
    };
    Ok((says, lockbox::last_seen(keys, &admitted.host)))
}

/// Remove a host: delete its lockbox key, and rotate each of its stores to a container key without it
///
/// The host opens no key after its next boot, and no key that is sealed from now on. It keeps the keys that it has open
/// now: switch it off. Encrypt its volumes anew if it may have copied their keys.
#[derive(Args)]
#[command(after_help = "Resumes if interrupted.")]
pub struct Remove {
    /// The host
    host: HostName,
    /// Another store that the host may be admitted to, besides those in the register; repeatable
    #[arg(long = "store", value_name = "STORE")]
    stores: Vec<StoreName>,
}

#[derive(Serialize)]
struct Removed {
    host: HostName,
    lockbox_keys_deleted: Vec<StoreName>,
    container_keys: Vec<String>,
    /// Whom those are for. A host that could write to the store may have admitted others.
    still_admitted: BTreeSet<HostName>,
}

impl Remove {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let config = global.config()?;
        let administrator = Administrator::of(&config.state);
        let known = administrator.register().get(&self.host)?.filter(|known| known.removed.is_none());
        if known.is_none() && self.stores.is_empty() {
            return Err(EnrolError::NotAdmitted(self.host.clone()).into());
        }
        let keepers = self.stores.iter().chain(known.iter().map(|known| &known.lockbox_store));
        let deleted = self.delete_lockbox_keys(&config, keepers.collect())?;
        let stores = self.stores.iter().chain(known.iter().flat_map(|known| &known.stores));
        let (container_keys, still_admitted) = self.shut_out(&config, stores.collect())?;
        if let Some(known) = known {
            administrator.register().put(&Admitted { removed: Some(now()), ..known })?;
        }
        record(&config, "host remove", &self.host, Some(names(&deleted)));
        let (host, lockbox_keys_deleted) = (self.host.clone(), deleted);
        self.show(Removed { host, lockbox_keys_deleted, container_keys, still_admitted }, global.json)
    }

    /// First of all: from now on the host's next boot opens nothing.
    fn delete_lockbox_keys(&self, config: &Config, stores: BTreeSet<&StoreName>) -> Result<Vec<StoreName>, Error> {
        let mut deleted = Vec::new();
        for store in stores {
            if withdraw(config, store, &self.host)? {
                deleted.push(store.clone());
            }
        }
        Ok(deleted)
    }

    fn shut_out(
        &self,
        config: &Config,
        stores: BTreeSet<&StoreName>,
    ) -> Result<(Vec<String>, BTreeSet<HostName>), Error> {
        let (mut container_keys, mut still_admitted) = (Vec::new(), BTreeSet::new());
        for store in stores {
            let container = Container::open(config, store, None, Use::Keys)?;
            let rotation = container.remove_host(&self.host, &|_| {})?;
            match rotation.failed.len() {
                0 => container_keys.push(format!("{store}/kek/{}", rotation.epoch)),
                left => return Err(unlock::Error::Unfinished { container: store.clone(), left }.into()),
            }
            still_admitted.extend(container.hosts()?);
        }
        Ok((container_keys, still_admitted))
    }

    fn show(&self, removed: Removed, as_json: bool) -> Result<(), Error> {
        output::print(as_json, &removed, || {
            let deleted = removed
                .lockbox_keys_deleted
                .iter()
                .map(|store| format!("  deleted           {store}/host/{}", self.host));
            let next = removed.container_keys.iter().map(|id| format!("  next key          {id}"));
            let still = removed.still_admitted.iter().map(|host| format!("  still admitted    {host}"));
            [format!("removed '{}'", self.host)].into_iter().chain(deleted).chain(next).chain(still).collect::<Vec<_>>()
        })
    }
}
