//! Consumers in KV: a secret `consumers/KEY-ID/DIGEST` each.

use super::{BaoKv, objects::Found};
use crate::{
    base::key::{Consumer, KeyId},
    keys::store::{
        Consumers, StoreError,
        consumers::{self, PART},
    },
};

/// A folder for each key: KV lists whole folders.
fn named(id: &KeyId, consumer: &Consumer) -> (String, Vec<u8>) {
    let (name, json) = consumers::named(id, consumer);
    (format!("{PART}/{}", name.replacen('.', "/", 1)), json)
}

impl Consumers for BaoKv {
    fn consumers(&self, id: &KeyId) -> Result<Vec<Consumer>, StoreError> {
        let (id, mut found) = (id.to_string(), Vec::new());
        for name in self.names(&[PART, &id])? {
            match self.read(&format!("{PART}/{id}/{name}"))? {
                Found::There { text, .. } => found.push(consumers::read(&name, text.as_bytes())),
                Found::Nothing | Found::Deleted { .. } => {}
            }
        }
        found.sort_unstable();
        Ok(found)
    }

    fn add_consumer(&self, id: &KeyId, consumer: &Consumer) -> Result<(), StoreError> {
        let (name, json) = named(id, consumer);
        match self.create_object(&name, json) {
            // What has its name is the same one.
            Err(StoreError::Exists { .. }) => Ok(()),
            added => added,
        }
    }

    fn remove_consumer(&self, id: &KeyId, consumer: &Consumer) -> Result<(), StoreError> {
        self.delete_object(&named(id, consumer).0).map_err(|error| match error {
            StoreError::NotFound { .. } => consumers::missing(id, consumer),
            error => error,
        })
    }
}
