//! What a verdict leads to.

use super::{Report, Verdict};
use crate::config::SeparationPolicy;

/// Key and data are not proven to be apart.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// They are on the same device.
    #[error("key and data are on the same device: {0}")]
    Shared(String),
    /// Nothing proves that they are not, and the policy is strict.
    #[error("nothing proves that key and data are on different devices: {0}")]
    Unproven(String),
}

impl Report {
    /// Judges by the policy: shared is refused, unproven warns or is refused.
    pub fn judge(&self, policy: SeparationPolicy) -> Result<(), Refusal> {
        match (&self.verdict, policy) {
            (Verdict::Apart(_), _) => Ok(()),
            (Verdict::Shared(devices), _) => Err(Refusal::Shared(join(devices))),
            (Verdict::Unproven(gaps), SeparationPolicy::Strict) => Err(Refusal::Unproven(join(gaps))),
            (Verdict::Unproven(gaps), SeparationPolicy::Warn) => {
                gaps.iter().for_each(|gap| tracing::warn!("separation of key and data is not proven: {gap}"));
                Ok(())
            }
        }
    }
}

fn join<T: ToString>(items: &[T]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

impl Refusal {
    /// Whether they are on the same device, which `--allow-shared` overrides.
    pub fn is_shared(&self) -> bool {
        matches!(self, Self::Shared(_))
    }

    /// What the user can do about it.
    pub fn next_step(&self) -> &'static str {
        match self {
            Self::Shared(_) => {
                "move the key store (or what opens it) to another device; --allow-shared goes on all the same, and is recorded"
            }
            Self::Unproven(_) => "'cryptattach separation DEVICE' explains; --separation warn lets it pass",
        }
    }
}
