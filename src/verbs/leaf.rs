//! What is done to leaves of policies: confirming which key is a server's.

use crate::{
    config::{Config, LeafName},
    keys::seal::{
        SealError,
        leaves::{self, Advertisement},
    },
    unlock::audit::{self, Event},
    verbs::error::Error,
};

/// Fetches what a leaf's server advertises, and remembers it if one of its signing keys is the one that is expected:
/// `choose` gets what is expected so far, and says which it is to be.
pub fn pin(
    config: &Config,
    name: &LeafName,
    choose: impl FnOnce(&Advertisement, Option<&str>) -> Result<String, Error>,
) -> Result<String, Error> {
    let leaf = leaves::kind(name, config.leaf(name)?, config.network)?;
    let Some(pinned) = leaf.pinned(&config.state) else {
        return Err(Error::Usage(format!("the leaf '{name}' asks no server, so it has nothing to pin")));
    };
    let expected = pinned.thumbprint().map_err(SealError::from)?;
    let advertisement = pinned.fetch().map_err(SealError::from)?;
    let chosen = choose(&advertisement, expected.as_deref())?;
    pinned.keep(&advertisement, &chosen).map_err(SealError::from)?;
    audit::done(config, &Event { action: "leaf pin", key: Some(name.to_string()), ..Event::default() });
    Ok(chosen)
}
