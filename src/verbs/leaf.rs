//! What is done to leaves of policies: confirming which key is a leaf's, and making those that persons open.

use std::path::PathBuf;

use crate::{
    base::{chain::printable, key::SecretBytes},
    config::{Config, LeafName},
    keys::seal::{
        SealError,
        leaves::{
            self, Offer, Pin,
            person::{self, By, Kept},
        },
    },
    unlock::audit::{self, Event},
    verbs::{error::Error, init},
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

/// The person for whom a leaf is made.
pub trait Hands {
    /// Lets the person choose a passphrase.
    fn choose(&self) -> Result<SecretBytes, Error>;
    /// Shows the person a recovery key, this once, and makes sure that it was written down.
    fn hand_over(&self, name: &LeafName, words: &SecretBytes) -> Result<(), Error>;
}

/// Makes a leaf that a person opens; its file, in which there is no secret.
pub fn new(config: &Config, name: &LeafName, hands: &dyn Hands) -> Result<PathBuf, Error> {
    let leaf = leaves::kind(name, config.leaf(name)?, config.network)?;
    let Some((by, file)) = leaf.person() else {
        return Err(Error::Usage(format!(
            "no person opens the leaf '{name}': write recovery = \"FILE\" or passphrase = \"FILE\" in [leaves.{name}]"
        )));
    };
    // Nobody writes down what is then refused.
    if file.exists() {
        return Err(Error::Exists(file.to_owned()));
    }
    let answer = match by {
        By::Recovery => {
            let words = person::new_words()?;
            hands.hand_over(name, &words)?;
            words
        }
        By::Passphrase => {
            let passphrase = hands.choose()?;
            person::check_passphrase(&passphrase)?;
            passphrase
        }
    };
    let json = Kept::new(by, &answer)?.to_json()?;
    if Kept::of(json.as_bytes())?.open(&answer)?.is_none() {
        return Err(SealError::Tampered.into());
    }
    init::keep(file, 0o644, json.as_bytes())?;
    audit::done(config, &Event { action: "leaf new", key: Some(name.to_string()), ..Event::default() });
    Ok(file.to_owned())
}

/// Likewise; one that an interrupted run has made is taken up.
pub fn new_or_left(config: &Config, name: &LeafName, hands: &dyn Hands) -> Result<(), Error> {
    match new(config, name, hands) {
        Err(Error::Exists(file)) => {
            let file = printable(&file.to_string_lossy());
            tracing::warn!("{file} exists already; the recovery key that was shown with it is that of leaf '{name}'");
            Ok(())
        }
        made => made.map(drop),
    }
}
