//! What a verdict leads to.

use std::borrow::Cow;

use super::{Report, SameBy, SharedDevice, Verdict};
use crate::{
    base::{advice::Advice, exit::Exit},
    config::SeparationPolicy,
};

/// Key and data are not proven to be apart.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// They are on the same device, or nearer to each other than the level allows.
    #[error("key and data are on the same {within}: {how}")]
    Shared {
        /// "device", "host" or "rack".
        within: &'static str,
        /// What is where.
        how: String,
    },
    /// Nothing proves that they are not, and the policy is strict.
    #[error("nothing proves that key and data are on different devices: {0}")]
    Unproven(String),
}

/// A report that the policy lets through. Only [`Report::judge`] makes one, and without one there is no
/// [`Unlocked`](crate::volumes::Unlocked) by a stored key.
#[derive(Debug)]
pub struct Separated(Report);

impl Separated {
    /// The report.
    pub fn report(&self) -> &Report {
        &self.0
    }
}

impl Report {
    /// Judges by the policy: shared is refused, unproven warns or is refused. What is refused comes back with the refusal.
    pub fn judge(self, policy: SeparationPolicy) -> Result<Separated, (Refusal, Box<Self>)> {
        let refusal = match (&self.verdict, policy) {
            (Verdict::Apart(_), _) => return Ok(Separated(self)),
            (Verdict::Shared(devices), _) => Refusal::Shared { within: nearest(devices), how: tree(devices) },
            (Verdict::Unproven(gaps), SeparationPolicy::Strict) => Refusal::Unproven(join(gaps)),
            (Verdict::Unproven(gaps), SeparationPolicy::Warn) => {
                gaps.iter().for_each(|gap| tracing::warn!("separation of key and data is not proven: {gap}"));
                return Ok(Separated(self));
            }
        };
        Err((refusal, Box::new(self)))
    }

    /// Lets a refused report through: a person has said so, and that is on record.
    pub(crate) fn overridden(self) -> Separated {
        Separated(self)
    }
}

fn nearest(shared: &[SharedDevice]) -> &'static str {
    let all_by = |ways: &[SameBy]| shared.iter().all(|shared| ways.contains(&shared.same_by));
    match () {
        () if all_by(&[SameBy::Rack]) => "rack",
        () if all_by(&[SameBy::Rack, SameBy::Host]) => "host",
        () => "device",
    }
}

/// What is where; of several things in one position, the position once and the things below it.
fn tree(shared: &[SharedDevice]) -> String {
    let mut positions: Vec<(String, Vec<String>)> = Vec::new();
    for device in shared {
        let (position, place) = (device.position(), device.place().to_string());
        match positions.iter_mut().find(|(known, _)| *known == position) {
            Some((_, places)) if places.contains(&place) => {}
            Some((_, places)) => places.push(place),
            None => positions.push((position, vec![place])),
        }
    }
    let told = |(position, places): &(String, Vec<String>)| match &places[..] {
        [only] => format!("{only} is {position}"),
        places => format!("{position}:\n    {}", places.join("\n    ")),
    };
    let several = positions.iter().any(|(_, places)| places.len() > 1);
    positions.iter().map(told).collect::<Vec<_>>().join(if several { "\n  " } else { "; " })
}

fn join<T: ToString>(items: &[T]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

impl Refusal {
    /// Whether they are on the same device (host, rack), which `--allow-shared` overrides.
    pub fn is_shared(&self) -> bool {
        matches!(self, Self::Shared { .. })
    }
}

impl Advice for Refusal {
    fn exit(&self) -> Exit {
        Exit::NotSeparate
    }

    fn next_step(&self) -> Option<Cow<'static, str>> {
        let step = match self {
            Self::Shared { within: "device", .. } => {
                "move the key store (or what opens it) to another device; --allow-shared continues nevertheless and is \
                 recorded (a boot does not have it, and neither do hooks)"
            }
            Self::Shared { .. } => {
                "move the replica or the volume to another host; if one host has both on purpose, level = \"device\" in \
                 [separation] of the configuration asks for different devices only: whoever takes the host then has key \
                 and data; --allow-shared continues once and is recorded (a boot does not have it, and neither do hooks)"
            }
            Self::Unproven(_) => "'cryptattach separation DEVICE' explains; --separation warn lets it pass",
        };
        Some(step.into())
    }
}
