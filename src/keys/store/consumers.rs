//! Who needs the keys of a store. Barbican keeps that itself; in our own stores it stands beside the key.
//!
//! Each consumer is a file or object of its own, named by its key and its digest. So two services that come or go at the same time
//! do not undo each other, without compare-and-swap.

use openssl::hash::{MessageDigest, hash};

use super::StoreError;
use crate::base::{
    hex,
    key::{Consumer, KeyId},
};

/// The part of a store that has them.
pub(super) const PART: &str = "consumers";

/// The most bytes of a consumer that are read: three members, each escaped as JSON.
pub(super) const MOST_BYTES: usize = 8 * 1024;

/// Who needs the keys of a store.
pub trait Consumers {
    /// The consumers of a key, in order.
    fn consumers(&self, id: &KeyId) -> Result<Vec<Consumer>, StoreError>;
    /// Adds one, unless it is there.
    fn add_consumer(&self, id: &KeyId, consumer: &Consumer) -> Result<(), StoreError>;
    /// Removes one; `NoConsumer` if it is not there.
    fn remove_consumer(&self, id: &KeyId, consumer: &Consumer) -> Result<(), StoreError>;
}

/// What the names of a key's consumers begin with.
pub(super) fn prefix(id: &KeyId) -> String {
    format!("{id}.")
}

/// The name of a consumer of a key, and what stands under it.
pub(super) fn named(id: &KeyId, consumer: &Consumer) -> (String, Vec<u8>) {
    let json = serde_json::to_vec(consumer).expect("texts always serialize");
    let digest = hash(MessageDigest::sha256(), &json).map(|digest| hex::encode(&digest)).unwrap_or_default();
    (format!("{}{digest}", prefix(id)), json)
}

/// What stands under a name. One that is not understood is a consumer all the same: somebody needs the key.
pub(super) fn read(name: &str, json: &[u8]) -> Consumer {
    serde_json::from_slice(json).unwrap_or_else(|_| Consumer {
        service: "unknown".to_owned(),
        resource_type: "unknown".to_owned(),
        resource_id: name.to_owned(),
    })
}

/// There is no such consumer.
pub(super) fn missing(id: &KeyId, consumer: &Consumer) -> StoreError {
    StoreError::NoConsumer { id: id.to_string(), consumer: consumer.to_string() }
}
