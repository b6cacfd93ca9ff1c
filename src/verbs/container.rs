//! What is done to containers: making one, telling of one, and rotating its container key.

use std::{path::Path, time::Duration};

use crate::{
    base::key::StoreName,
    config::{Config, IdentitySpec},
    keys::{
        seal::{self, Told},
        store::{self, Access, Facts},
    },
    unlock::{
        self,
        audit::{self, Event},
        container::{Container, Rotation, Use},
    },
    verbs::{
        error::Error,
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
}

impl New<'_> {
    fn says_something(&self) -> bool {
        let names_a_place = !matches!(self.place, NewPlace::Swift(_));
        names_a_place || self.owner.or(self.escrow).is_some() || self.identity.is_some()
    }
}

/// Makes a container and its first container key, and configures it as a store. The configuration comes last: a run that
/// failed before can be repeated as it was.
pub fn create(config: &Path, request: &Request<'_>) -> Result<Config, Error> {
    let Request { name, access, new } = request;
    let config = if !setup::is_configured(config, name)? {
        let extended = describe(config, name, new)?;
        make(&extended.config, name, access)?;
        extended.write()?
    } else if new.says_something() {
        return Err(Error::StoreExists((*name).clone()));
    } else {
        let config = setup::configuration(config)?;
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
fn describe(config: &Path, name: &StoreName, new: &New<'_>) -> Result<setup::Extended, Error> {
    let owner = new.owner.ok_or_else(|| Error::Usage("name the keys' owner with --owner".to_owned()))?;
    if new.escrow.is_none() && !new.no_escrow {
        return Err(Error::Usage("name the escrow with --escrow, or use --no-escrow".to_owned()));
    }
    seal::recipients([owner].into_iter().chain(new.escrow))?;
    let (owner, escrow) = (absolute(owner)?, new.escrow.map(absolute).transpose()?);
    let identity = new.identity.map(setup::found).transpose()?;
    let own = new.place.section()?;
    NewStore { name, own, owner: &owner, escrow: escrow.as_deref(), identity: identity.as_ref() }
        .in_configuration(config)
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
pub fn rotate(
    config: &Config,
    name: &StoreName,
    keep: Duration,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<Rotation, Error> {
    let rotation = Container::open(config, name, None, Use::Keys)?.rotate(keep, progress)?;
    record(config, "container rotate", name);
    Ok(rotation)
}

/// Puts on record what was done to a container.
pub(super) fn record(config: &Config, action: &str, name: &StoreName) {
    audit::done(config, &Event { action, key: Some(name.to_string()), ..Event::default() });
}
