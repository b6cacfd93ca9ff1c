//! Whether a key opens here.

use cryptattach::{
    base::key::KeyId,
    unlock::{self, container::Container},
};

/// A volume key is not given out: that it has no passphrase is told once it is open.
pub fn opens(container: &Container, id: &KeyId) -> bool {
    matches!(container.object(id), Ok(_) | Err(unlock::Error::NoPassphrase(_)))
}
