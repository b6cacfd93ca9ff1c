//! What is done to containers: making one, telling of one, and rotating its container key.

use std::{path::Path, time::Duration};

use crate::{
    base::key::StoreName,
    config::{Config, IdentitySpec, LeafConfig, LeafName, StoreConfig},
    keys::{
        seal::{self, Told, leaves},
        store::{self, Access, Facts},
    },
    sys::durable::folder_of,
    unlock::{
        self,
        audit::{self, Event},
        container::{self, By, Container, Progress, Rehearsal, Rotation, Use},
        loops,
    },
    verbs::{
        error::Error,
        leaf::{self, Hands},
        setup::{self, NewPlace, NewStore, absolute},
    },
};

/// A container, for a store that is configured by that name or is going to be.
pub struct Request<'a> {
    pub name: &'a StoreName,
    /// Who may use it besides its account's operators.
    pub access: Access<'a>,
    /// What is to be configured.
    pub new: New<'a>,
}

/// What the configuration says of a new store.
pub struct New<'a> {
    pub place: NewPlace<'a>,
    pub owner: Option<&'a Path>,
    pub escrow: Option<&'a Path>,
    pub no_escrow: bool,
    pub identity: Option<&'a IdentitySpec>,
    /// A recovery key is made for this person.
    pub recovery: Option<&'a dyn Hands>,
}

impl New<'_> {
    fn says_something(&self) -> bool {
        let names_a_place = !matches!(self.place, NewPlace::Swift(_));
        names_a_place || self.owner.or(self.escrow).is_some() || self.identity.is_some() || self.recovery.is_some()
    }
}

/// Makes a container and its first container key, and configures it as a store. The configuration comes last: a run that
/// failed before can be repeated as it was.
pub fn create(config: &Path, request: &Request<'_>) -> Result<Config, Error> {
    let Request { name, access, new } = request;
    let config = if !setup::is_configured(config, name)? {
        let (extended, leaf) = describe(config, name, new)?;
        if let Some((hands, leaf)) = new.recovery.zip(leaf) {
            leaf::new_or_left(&extended.config, &leaf, hands)?;
        }
        make(&extended.config, name, access)?;
        extended.write()?
    } else if new.says_something() {
        return Err(Error::StoreExists((*name).clone()));
    } else {
        let config = setup::configuration(config)?;
        loops::check(&config, name, &[])?;
        make(&config, name, access)?;
        config
    };
    record(&config, "container create", name);
    Ok(config)
}

fn make(config: &Config, name: &StoreName, access: &Access<'_>) -> Result<(), Error> {
    let store_config = config.store(name)?;
    let kind = store::kind(store_config)?;
    let lets_in = !access.readers.is_empty() || !access.writers.is_empty();
    if let Some(why) = kind.no_access_lists().filter(|_| lets_in) {
        return Err(Error::Usage(why.to_owned()));
    }
    let made = kind.make(name, store_config, access);
    made.ok_or_else(|| unlock::Error::NoContainerKeys(name.clone()))??;
    Ok(Container::open(config, name, None, Use::Keys)?.make_first_key()?)
}

/// The configuration with the new store.
fn describe(config: &Path, name: &StoreName, new: &New<'_>) -> Result<(setup::Extended, Option<LeafName>), Error> {
    let owner = new.owner.ok_or_else(|| Error::Usage("name the keys' owner with --owner".to_owned()))?;
    if new.escrow.is_none() && !new.no_escrow && new.recovery.is_none() {
        return Err(Error::Usage("name the escrow with --escrow, or use --recovery or --no-escrow".to_owned()));
    }
    seal::recipients([owner].into_iter().chain(new.escrow))?;
    let (owner, escrow) = (absolute(owner)?, new.escrow.map(absolute).transpose()?);
    let identity = new.identity.map(setup::found).transpose()?;
    let own = new.place.section()?;
    let leaf = || setup::new_leaf(config, &absolute(folder_of(config))?);
    let recovery = new.recovery.map(|_| leaf()).transpose()?;
    let (identity, escrow) = (identity.as_ref(), escrow.as_deref());
    let store = NewStore { name, own, owner: &owner, escrow, identity, recovery: recovery.as_ref() };
    Ok((store.in_configuration(config)?, recovery.map(|(leaf, _)| leaf)))
}

/// What a container says of itself; and if it has a policy of its own, what each part of that says now.
pub fn facts(config: &Config, name: &StoreName) -> Result<(Facts, Option<Told>), Error> {
    let store_config = config.store(name)?;
    let facts = store::kind(store_config)?.facts(name, store_config);
    let facts = facts.ok_or_else(|| unlock::Error::NoContainerKeys(name.clone()))??;
    let ask = || Container::open(config, name, None, Use::Keys)?.ask_policy();
    let told = if store_config.sealing.has_policy() { ask()? } else { None };
    Ok((facts, told))
}

/// Makes the next container key and seals all keys under it.
pub fn rotate(config: &Config, name: &StoreName, keep: Duration, progress: &Progress<'_>) -> Result<Rotation, Error> {
    let rotation = Container::open(config, name, None, Use::Keys)?.rotate(keep, progress)?;
    record(config, "container rotate", name);
    Ok(rotation)
}

/// The leaf of a container's policy that a recovery key opens, if it has just one.
pub fn recovery_leaf(config: &Config, name: &StoreName) -> Result<LeafName, Error> {
    let StoreConfig { sealing, network, .. } = config.store(name)?;
    let is_recovery = |(leaf, config): (&LeafName, &LeafConfig)| {
        let by = leaves::kind(leaf, config, *network).ok()?.person().map(|(by, _)| by);
        (by == Some(leaves::person::By::Recovery)).then(|| leaf.clone())
    };
    let mut found = sealing.leaves.iter().filter_map(is_recovery);
    match (found.next(), found.next()) {
        (Some(leaf), None) => Ok(leaf),
        _ => Err(Error::Usage(format!(
            "say what the recovery of '{name}' is to be by: --identity with the escrow's private key, or --with a leaf that a \
             person opens"
        ))),
    }
}

/// Tries whether this alone opens each key of a container, or of a backup of it. Nothing is changed in the store.
pub fn rehearse(
    config: &Config,
    name: &StoreName,
    by: &By<'_>,
    backup: Option<&Path>,
    progress: &Progress<'_>,
) -> Result<Rehearsal, Error> {
    let rehearsal = container::rehearse(config, name, by, backup, progress)?;
    record(config, "container rehearse", name);
    Ok(rehearsal)
}

/// Puts on record what was done to a container.
pub(super) fn record(config: &Config, action: &str, name: &StoreName) {
    audit::done(config, &Event { action, key: Some(name.to_string()), ..Event::default() });
}
