//! The types that everything else speaks in: the volume key, its name, its sealed form.
//!
//! No module here reaches a store, a device or a network; every other folder may use this one.

mod consumer;
mod epoch;
mod host;
mod id;
mod object;
mod place;
mod project;
mod reference;
mod sealed;
mod secret;
mod volume_key;

pub use consumer::Consumer;
pub use epoch::{ContainerKeyId, Epoch, ParseEpochError};
pub use host::{HostName, LockboxKeyId, ParseHostNameError};
pub use id::{KeyId, ParseKeyIdError};
pub use object::{ManagedObject, ObjectFacts, ObjectKind, hex};
pub(crate) use place::is_device_name;
pub use place::{Location, Place, Replica, Ring};
pub use project::{ParseProjectIdError, ProjectId};
pub use reference::{KeyReference, ParseKeyReferenceError, StoreName};
pub use sealed::{
    BoundContext, JoseHeader, JweRecipient, MAX_RECIPIENTS, MAX_SEALED_BYTES, MalformedSealedKey, SealedKey,
};
pub use secret::{SecretBytes, SecretMemoryError};
pub use volume_key::{KeySize, VolumeKey};

/// Serde for a type whose one text form is its `Display` and `FromStr`.
macro_rules! serde_as_str {
    ($type:ty) => {
        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = <std::borrow::Cow<'de, str>>::deserialize(d)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}
pub(crate) use serde_as_str;
