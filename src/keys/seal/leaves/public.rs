//! `public = "FILE"`: the holder of a public key or certificate. Whoever has the private key among its identities opens it.

use std::path::Path;

use serde::Deserialize;

use super::Kind;
use crate::{
    config::{ConfigError, ConfigPath, LeafConfig, LeafName, Network},
    keys::seal::{OwnerRecipient, Recipient, SealError},
};

/// What tells this kind, in the configuration.
pub(super) const MEMBER: &str = "public";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PublicKey {
    public: ConfigPath,
}

pub(super) fn kind(_: &LeafName, config: &LeafConfig, _: Network) -> Result<Box<dyn Kind>, ConfigError> {
    Ok(Box::new(config.read::<PublicKey>()?))
}

impl Kind for PublicKey {
    fn recipients(&self, _: &Path) -> Result<Vec<Box<dyn Recipient>>, SealError> {
        Ok(vec![Box::new(OwnerRecipient::read(&self.public)?)])
    }

    fn files(&self) -> Vec<&Path> {
        vec![&self.public]
    }
}
