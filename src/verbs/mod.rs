//! What a verb does. Each takes typed requests and gives typed answers; [`crate::cli`] has the words.

pub mod admit;
pub mod attach;
pub mod audit;
pub mod backup;
pub mod bind;
pub mod boot;
pub mod clevis;
pub mod container;
pub mod detach;
mod edit;
pub mod encrypt;
pub mod erase;
pub mod error;
pub mod explain;
pub mod failure;
pub mod format;
pub mod generator;
pub mod header;
pub mod holder;
pub mod hook;
pub mod hotplug;
pub mod import;
pub mod init;
pub mod join;
mod key_file;
pub mod keys;
pub mod leaf;
pub mod metrics;
pub mod r#move;
pub mod new_passphrase;
pub mod overview;
pub mod passphrase;
pub mod policy;
pub mod resize;
pub mod rotate;
pub mod setup;
pub mod test;
#[cfg(test)]
mod tests;

use crate::config::LeafName;

/// Names of leaves, for JSON.
fn as_texts<'a, S: serde::Serializer>(
    names: impl IntoIterator<Item = &'a LeafName>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(names.into_iter().map(LeafName::as_str))
}
