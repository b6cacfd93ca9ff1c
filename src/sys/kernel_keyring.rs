//! The kernel's keyring, in which a secret stays until it is removed or the machine is switched off (keyrings(7)).
//!
//! A secret is a `user` key, for it has to be read back. It is in the user keyring of root (`@u`), which outlives sessions and
//! the change from the initramfs to the system, and is the same for every service, whatever its session keyring is. If the
//! user keyring is unavailable, the session keyring is used, and the secret is lost when the session ends.
//!
//! Only processes of its owner may find and read the key, and nobody may change it. Mere possession gives nothing: a process
//! that was root and gave that up still possesses what its inherited session keyring leads to, and that is root's user keyring
//! if a session of root's was set up in the usual way.

use std::{borrow::Cow, fmt};

use linux_keyutils::{Key, KeyError, KeyPermissionsBuilder, KeyRing, KeyRingIdentifier, Permission};
use serde::Serialize;

use crate::base::{
    advice::Advice,
    exit::Exit,
    key::{SecretBytes, SecretMemoryError},
};

/// Where the kernel keeps a secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeyringKind {
    /// In the user keyring: until power-off.
    User,
    /// In the session keyring: until the session ends.
    Session,
}

impl fmt::Display for KeyringKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::User => "the kernel's keyring of this user, until power-off",
            Self::Session => {
                "the kernel's keyring of this session, until the session ends (the user keyring is unavailable)"
            }
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
        #[source]
        source: KeyError,
    },
    /// No memory for the secret.
    #[error(transparent)]
    Memory(#[from] SecretMemoryError),
}

impl Advice for KeyringError {
    fn exit(&self) -> Exit {
        match self {
            Self::Kernel { .. } => Exit::System,
            Self::Memory(error) => error.exit(),
        }
    }

    fn next_step(&self) -> Option<Cow<'static, str>> {
        match self {
            Self::Kernel { .. } => None,
            Self::Memory(error) => error.next_step(),
        }
    }
}

/// Keeps a secret under a description, in place of the one that is there.
pub fn put(description: &str, secret: &SecretBytes) -> Result<KeyringKind, KeyringError> {
    put_for(description, secret, None)
}

/// Likewise for so many seconds, if any are given. Then the kernel removes it.
pub fn put_for(description: &str, secret: &SecretBytes, seconds: Option<usize>) -> Result<KeyringKind, KeyringError> {
    remove(description)?;
    // Made in this process's own keyring: only who possesses a key may close it, and a service of systemd's possesses nothing of
    // the user keyring (KeyringMode= in systemd.exec(5)).
    let own = KeyRing::from_special_id(KeyRingIdentifier::Process, true).map_err(failed("put a key into"))?;
    let key = own.add_key(description, secret.expose()).map_err(failed("put a key into"))?;
    let link = |kept| ring(kept)?.link_key(key).map(|()| kept);
    let kept = link(KeyringKind::User).or_else(|refused| {
        tracing::debug!("the user keyring is unavailable: {refused}");
        link(KeyringKind::Session)
    });
    // Without SETATTR: nobody widens the permissions again, not even its owner.
    let permissions = Permission::VIEW | Permission::READ | Permission::SEARCH;
    let closed = kept.and_then(|kept| {
        seconds.map_or(Ok(()), |seconds| key.set_timeout(seconds))?;
        key.set_perms(KeyPermissionsBuilder::builder().user(permissions).build())?;
        own.unlink_key(key)?;
        Ok(kept)
    });
    let kept = closed.map_err(|error| {
        let _ = key.invalidate();
        failed("close a key in")(error)
    })?;
    Ok(kept)
}

/// The secret of that description and where it is kept; `None` if there is none. One of more than `most` bytes is not ours
/// and is given as empty.
pub fn get(description: &str, most: usize) -> Result<Option<(SecretBytes, KeyringKind)>, KeyringError> {
    let Some((key, kept)) = find(description)? else { return Ok(None) };
    let mut secret = SecretBytes::zeroed(most)?;
    // The kernel says the length of the whole, even if that does not fit.
    let len = key.read(&mut secret.expose_mut()).map_err(failed("read a key from"))?;
    secret.truncate(if len > most { 0 } else { len });
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

fn find(description: &str) -> Result<Option<(Key, KeyringKind)>, KeyringError> {
    for kept in [KeyringKind::User, KeyringKind::Session] {
        match ring(kept).and_then(|ring| ring.search(description)) {
            Ok(key) => return Ok(Some((key, kept))),
            // Not ours to search: nothing of ours is in there.
            Err(
                KeyError::KeyDoesNotExist
                | KeyError::KeyRevoked
                | KeyError::KeyExpired
                | KeyError::AccessDenied
                | KeyError::PermissionDenied,
            ) => {}
            Err(error) => return Err(failed("look into")(error)),
        }
    }
    Ok(None)
}

fn ring(kept: KeyringKind) -> Result<KeyRing, KeyError> {
    let id = match kept {
        KeyringKind::User => KeyRingIdentifier::User,
        KeyringKind::Session => KeyRingIdentifier::Session,
    };
    KeyRing::from_special_id(id, false)
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
            assert!(get(&description, 2).unwrap().unwrap().0.is_empty());
        }
        let (key, _) = find(&description).unwrap().unwrap();
        assert_eq!(key.metadata().unwrap().get_perms().bits(), 0x000b_0000);
        assert!(key.update(b"three").is_err());
        assert!(key.set_perms(KeyPermissionsBuilder::builder().user(Permission::ALL).build()).is_err());
        assert!(remove(&description).unwrap());
        put_for(&description, &SecretBytes::copy_of(b"soon gone").unwrap(), Some(1)).unwrap();
        assert!(get(&description, 16).unwrap().is_some());
        std::thread::sleep(std::time::Duration::from_millis(2100));
        assert!(get(&description, 16).unwrap().is_none());
        assert!(!remove(&description).unwrap());
        assert!(get(&description, 8).unwrap().is_none());
    }
}
