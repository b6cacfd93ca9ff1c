//! What is done to leaves of policies: confirming which key is a leaf's.

use crate::{
    config::{Config, LeafName},
    keys::seal::{
        SealError,
        leaves::{self, Offer, Pin},
    },
    unlock::audit::{self, Event},
    verbs::error::Error,
};

/// Fetches the public key that a leaf's server or token offers, and remembers it if it is vouched for by the key that is
/// expected: `choose` says which that is to be, if nothing does so far.
pub fn pin(
    config: &Config,
    name: &LeafName,
    thumbprint: Option<&str>,
    choose: impl FnOnce(&dyn Pin, &dyn Offer) -> Result<String, Error>,
) -> Result<String, Error> {
    let leaf = leaves::kind(name, config.leaf(name)?, config.network)?;
    let Some(pin) = leaf.pin(&config.state) else {
        return Err(Error::Usage(format!("the leaf '{name}' asks nobody, so it has nothing to pin")));
    };
    let expected = match thumbprint {
        Some(thumbprint) => Some(thumbprint.to_owned()),
        None => pin.expected().map_err(SealError::from)?,
    };
    let offer = pin.fetch().map_err(SealError::from)?;
    let chosen = expected.map_or_else(|| choose(&*pin, &*offer), Ok)?;
    offer.keep(&chosen).map_err(SealError::from)?;
    audit::done(config, &Event { action: "leaf pin", key: Some(name.to_string()), ..Event::default() });
    Ok(chosen)
}
