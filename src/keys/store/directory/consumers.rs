//! Consumers in a directory: `consumers/KEY-ID.DIGEST.json`.

use std::{fs, io};

use super::{Directory, io_error};
use crate::{
    base::key::{Consumer, KeyId, MAX_SEALED_BYTES},
    keys::store::{
        Consumers, StoreError,
        consumers::{self, PART},
    },
    sys::durable::{self, Folder},
};

const END: &str = ".json";

impl Consumers for Directory {
    fn consumers(&self, id: &KeyId) -> Result<Vec<Consumer>, StoreError> {
        let folder = self.path()?.join(PART);
        if !folder.exists() {
            return Ok(Vec::new());
        }
        let mut found = Vec::new();
        for stem in durable::stems(&folder, END).map_err(io_error("list the consumers in", &folder))? {
            if !stem.starts_with(&consumers::prefix(id)) {
                continue;
            }
            match durable::read_bounded(&folder.join(format!("{stem}{END}")), MAX_SEALED_BYTES) {
                Ok(json) => found.push(consumers::read(&stem, &json)),
                // It went away meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(io_error("read a consumer in", &folder)(error)),
            }
        }
        found.sort_unstable();
        Ok(found)
    }

    fn add_consumer(&self, id: &KeyId, consumer: &Consumer) -> Result<(), StoreError> {
        let folder = self.path()?.join(PART);
        let (name, json) = consumers::named(id, consumer);
        let add = || Folder::make(&folder)?.replace(&format!("{name}{END}"), &json);
        add().map_err(io_error("add a consumer in", &folder))
    }

    fn remove_consumer(&self, id: &KeyId, consumer: &Consumer) -> Result<(), StoreError> {
        let folder = self.path()?.join(PART);
        let file = format!("{}{END}", consumers::named(id, consumer).0);
        if !fs::exists(folder.join(&file)).unwrap_or(true) {
            return Err(consumers::missing(id, consumer));
        }
        let remove = || Folder::lock(&folder)?.remove(&file);
        remove().map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => consumers::missing(id, consumer),
            _ => io_error("remove a consumer from", &folder)(error),
        })
    }
}
