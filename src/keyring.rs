//! The kernel's keyring, in which a secret stays until it is removed or the machine is switched off (keyrings(7)).
//!
//! A secret is a `user` key, for it has to be read back. It is in the user keyring of root (`@u`), which outlives sessions and
//! the change from the initramfs to the system, and is the same for every service, whatever its session keyring is. Only who
//! possesses the key may do anything with it: a process of ours links the user keyring into its own process keyring, and the
//! kernel lets nobody do that but processes of the same user. Where the user keyring is not to be had, the session keyring
//! takes its place, and the secret is then gone with the session.

use std::fmt;

use linux_keyutils::{Key, KeyError, KeyPermissionsBuilder, KeyRing, KeyRingIdentifier, Permission};
use serde::Serialize;

use crate::key::{SecretBytes, SecretMemoryError};

/// Where the kernel keeps a secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kept {
    /// In the user keyring: until power-off.
    User,
    /// In the session keyring: until the session ends.
    Session,
}

impl fmt::Display for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::User => "the kernel's keyring of this user, until power-off",
            Self::Session => "the kernel's keyring of this session, until that ends: the user keyring is not to be had",
        })
    }
}

/// The kernel's keyring refuses.
#[derive(Debug, thiserror::Error)]
pub enum KeyringError {
    /// keyctl(2) or add_key(2) failed.
    #[error("cannot {action} the kernel's keyring")]
    Kernel {
        /// "look into", "put a key into", ...
        action: &'static str,
        /// Why.
        #[source]
        source: KeyError,
    },
    /// No memory for the secret.
    #[error(transparent)]
    Memory(#[from] SecretMemoryError),
}

/// Keeps a secret under a description, in place of the one that is there.
pub fn put(description: &str, secret: &SecretBytes) -> Result<Kept, KeyringError> {
    remove(description)?;
    let (ring, kept) = user_ring().map(|ring| (ring, Kept::User)).or_else(|refused| {
        tracing::debug!("the user keyring is not to be had: {refused}");
        session_ring().map(|ring| (ring, Kept::Session)).ok_or(refused)
    })?;
    let key = ring.add_key(description, secret.expose()).map_err(failed("put a key into"))?;
    // Without SETATTR: nobody widens the permissions again, not even its owner.
    let all_but_setattr = Permission::VIEW | Permission::READ | Permission::WRITE | Permission::SEARCH | Permission::LINK;
    let permissions = KeyPermissionsBuilder::builder().posessor(all_but_setattr).build();
    key.set_perms(permissions).map_err(|error| {
        let _ = key.invalidate();
        failed("close a key in")(error)
    })?;
    Ok(kept)
}

/// The secret of that description and where it is kept; `None` if there is none. `most` bytes are read.
pub fn get(description: &str, most: usize) -> Result<Option<(SecretBytes, Kept)>, KeyringError> {
    let Some((key, kept)) = find(description)? else { return Ok(None) };
    let mut secret = SecretBytes::zeroed(most)?;
    // The kernel says the length of the whole, even if that does not fit.
    let len = key.read(&mut secret.expose_mut()).map_err(failed("read a key from"))?;
    secret.truncate(len);
    Ok(Some((secret, kept)))
}

/// Removes the secret of that description; whether there was one. The kernel wipes its memory.
pub fn remove(description: &str) -> Result<bool, KeyringError> {
    let mut found = false;
    while let Some((key, _)) = find(description)? {
        key.invalidate().map_err(failed("remove a key from"))?;
        found = true;
    }
    Ok(found)
}

fn find(description: &str) -> Result<Option<(Key, Kept)>, KeyringError> {
    for (ring, kept) in [(user_ring().ok(), Kept::User), (session_ring(), Kept::Session)] {
        match ring.map(|ring| ring.search(description)) {
            Some(Ok(key)) => return Ok(Some((key, kept))),
            Some(Err(KeyError::KeyDoesNotExist | KeyError::KeyRevoked | KeyError::KeyExpired)) | None => {}
            // Not ours to search: nothing of ours is in there.
            Some(Err(KeyError::AccessDenied | KeyError::PermissionDenied)) => {}
            Some(Err(error)) => return Err(failed("look into")(error)),
        }
    }
    Ok(None)
}

/// The user keyring, possessed by this process. Several threads have one process keyring, if it is there before they are.
fn user_ring() -> Result<KeyRing, KeyringError> {
    let process = KeyRing::from_special_id(KeyRingIdentifier::Process, true).map_err(failed("make"))?;
    process.link_keyring_id(KeyRingIdentifier::User).map_err(failed("possess"))?;
    KeyRing::from_special_id(KeyRingIdentifier::User, false).map_err(failed("possess"))
}

fn session_ring() -> Option<KeyRing> {
    KeyRing::from_special_id(KeyRingIdentifier::Session, false).ok()
}

fn failed(action: &'static str) -> impl FnOnce(KeyError) -> KeyringError {
    move |source| KeyringError::Kernel { action, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_reads_replaces_and_removes() {
        let description = format!("cryptattach:test:{}", std::process::id());
        assert!(get(&description, 8).unwrap().is_none());
        for bytes in [b"one", b"two"] {
            put(&description, &SecretBytes::copy_of(bytes).unwrap()).unwrap();
            let (secret, _) = get(&description, 8).unwrap().unwrap();
            assert_eq!(secret.expose(), bytes);
        }
        // Its owner alone is nobody: possession opens it, which the process keyring of another process does not have.
        let (key, _) = find(&description).unwrap().unwrap();
        assert_eq!(key.metadata().unwrap().get_perms().bits(), 0x1f00_0000);
        assert!(key.set_perms(KeyPermissionsBuilder::builder().user(Permission::ALL).build()).is_err());
        assert!(remove(&description).unwrap());
        assert!(!remove(&description).unwrap());
        assert!(get(&description, 8).unwrap().is_none());
    }
}
