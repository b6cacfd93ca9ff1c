//! Consumers: who needs a key, so that nobody deletes it under them.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::base::chain::printable;

/// A resource that needs a key (Barbican's API 1.1, castellan's `consumer_data`).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Consumer {
    /// "cinder", "glance", ...
    pub service: String,
    /// "volume", "image", ...
    pub resource_type: String,
    pub resource_id: String,
}

impl Consumer {
    /// Bytes of a member, at most; Barbican's own limit.
    pub const MOST_BYTES: usize = 255;

    /// Whether each member says something, and not too much.
    pub fn is_valid(&self) -> bool {
        let members = [&self.service, &self.resource_type, &self.resource_id];
        members.iter().all(|member| (1..=Self::MOST_BYTES).contains(&member.len()))
    }
}

impl fmt::Display for Consumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = |member| printable(member);
        write!(f, "{} {} {}", text(&self.service), text(&self.resource_type), text(&self.resource_id))
    }
}
