//! A container's first key, opened as the product opens it.

use std::path::Path;

use cryptattach::{
    base::key::{ContainerKeyId, Epoch, SealedKey},
    config::{IdentitySpec, TpmConfig},
    keys::seal::{ContainerKey, Identities},
};

/// By the private key in the file `owner`.
pub fn first(container: &str, sealed: &SealedKey, owner: &Path) -> ContainerKey {
    let id = ContainerKeyId { container: container.parse().unwrap(), epoch: Epoch::FIRST };
    let owner = Identities::read(&[IdentitySpec::of("", owner)], &TpmConfig::default()).unwrap();
    ContainerKey::open(sealed, &owner, &id).unwrap()
}
