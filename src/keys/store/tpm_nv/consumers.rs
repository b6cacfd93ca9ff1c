//! Consumers in NV memory: all of a key's in one value, for a TPM has few indices. Writers of this host take turns, so that none
//! undoes what another does.

use serde::{Deserialize, Serialize};

use super::{TpmNv, value::Label, value::Value, values::Values};
use crate::{
    base::key::{Consumer, KeyId, MalformedSealedKey},
    keys::store::{Consumers, StoreError, consumers},
};

/// Who needs a key.
#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Listed {
    generation: u64,
    consumers: Vec<Consumer>,
}

/// The consumers of a key, in order. A value that is not understood hides some: then nothing is known of them.
fn listed(values: &Values<'_>, id: &KeyId) -> Result<Listed, StoreError> {
    let Some(found) = values.get(Label::consumers(id))? else { return Ok(Listed::default()) };
    serde_json::from_slice(&found.json()?).map_err(|source| found.malformed(MalformedSealedKey::Json(source)))
}

impl TpmNv {
    fn change_consumers(
        &self,
        id: &KeyId,
        change: impl FnOnce(&mut Vec<Consumer>) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        self.write(|values, writer| {
            let Listed { generation, mut consumers } = listed(values, id)?;
            change(&mut consumers)?;
            let label = Label::consumers(id);
            if consumers.is_empty() {
                return writer.remove(label);
            }
            consumers.sort_unstable();
            let later = Listed { generation: generation.saturating_add(1), consumers };
            let value = Value { label, json: serde_json::to_vec(&later).expect("texts always serialize") };
            if generation > 0 { writer.replace(&value) } else { writer.create(&value).map(drop) }
        })
    }
}

impl Consumers for TpmNv {
    fn consumers(&self, id: &KeyId) -> Result<Vec<Consumer>, StoreError> {
        self.read(|values| Ok(listed(values, id)?.consumers))
    }

    fn add_consumer(&self, id: &KeyId, consumer: &Consumer) -> Result<(), StoreError> {
        self.change_consumers(id, |consumers| {
            if !consumers.contains(consumer) {
                consumers.push(consumer.clone());
            }
            Ok(())
        })
    }

    fn remove_consumer(&self, id: &KeyId, consumer: &Consumer) -> Result<(), StoreError> {
        self.change_consumers(id, |consumers| {
            let at = consumers.iter().position(|other| other == consumer);
            consumers.remove(at.ok_or_else(|| consumers::missing(id, consumer))?);
            Ok(())
        })
    }
}
