//! Another policy for a container: the configuration says it, and the next container key is sealed by it.

use std::{collections::BTreeSet, path::Path, time::Duration};

use crate::{
    base::{key::StoreName, person::Attendant},
    config::{LeafName, Policy},
    unlock::container::{Container, Progress, Rotation, Use},
    verbs::{as_texts, container::record, edit, error::Error, setup},
};

/// What was changed.
#[derive(serde::Serialize)]
pub struct Changed {
    #[serde(serialize_with = "as_text")]
    pub policy: Policy,
    #[serde(serialize_with = "as_text")]
    pub before: Policy,
    /// Leaves of the former policy that the new one has no more.
    #[serde(serialize_with = "as_texts")]
    pub former: BTreeSet<LeafName>,
    #[serde(flatten)]
    pub rotation: Rotation,
}

fn as_text<S: serde::Serializer>(policy: &Policy, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(policy)
}

/// Changes `opens` of a store and seals all keys anew. Run again after an interruption, it goes on: the configuration has the
/// new policy first, and a rotation that is under way for another one is begun anew.
pub fn change(
    config: &Path,
    name: &StoreName,
    policy: &Policy,
    keep: Duration,
    attendant: &Attendant,
    progress: &Progress<'_>,
) -> Result<Changed, Error> {
    let old = setup::configuration(config)?;
    let before = old.store(name)?.sealing.policy.clone();
    let new = edit::edited(config, name, &[("opens", policy.to_string().into())])?;
    // Whom it is sealed to has to be known before anything is written.
    Container::open(&new.config, name, None, Use::Keys)?.can_be_sealed()?;
    let mut new = if before == *policy { old } else { new.write()? };
    new.attendant = attendant.clone();
    let rotation = Container::open(&new, name, None, Use::Keys)?.rotate(keep, progress)?;
    record(&new, "container policy", name);
    let leaves = policy.leaves();
    let former = before.leaves().into_iter().filter(|leaf| !leaves.contains(leaf)).cloned().collect();
    Ok(Changed { policy: policy.clone(), before, former, rotation })
}
