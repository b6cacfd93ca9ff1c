//! Consumers in a container: an object `consumers/KEY-ID.DIGEST` each.

use super::Swift;
use crate::{
    base::key::{Consumer, KeyId},
    keys::store::{
        Consumers, StoreError,
        consumers::{self, MOST_BYTES, PART},
    },
};

impl Consumers for Swift {
    fn consumers(&self, id: &KeyId) -> Result<Vec<Consumer>, StoreError> {
        let mut found = Vec::new();
        for name in self.names(&format!("{PART}/{}", consumers::prefix(id)))? {
            // A listing may be older than a deletion.
            if let Some(json) = self.small_object(&name, MOST_BYTES)? {
                found.push(consumers::read(&name, json.expose()));
            }
        }
        found.sort_unstable();
        Ok(found)
    }

    fn add_consumer(&self, id: &KeyId, consumer: &Consumer) -> Result<(), StoreError> {
        let (name, json) = consumers::named(id, consumer);
        match self.create_object(&format!("{PART}/{name}"), &json) {
            // What has its name is the same one.
            Err(StoreError::Exists { .. }) => Ok(()),
            added => added,
        }
    }

    fn remove_consumer(&self, id: &KeyId, consumer: &Consumer) -> Result<(), StoreError> {
        let (name, _) = consumers::named(id, consumer);
        self.delete_object(&format!("{PART}/{name}")).map_err(|error| match error {
            StoreError::NotFound { .. } => consumers::missing(id, consumer),
            error => error,
        })
    }
}
