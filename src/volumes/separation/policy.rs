//! What a verdict leads to.

use std::borrow::Cow;

use super::{Report, SameBy, SharedDevice, Surroundings, Verdict, check};
use crate::{
    base::{
        advice::Advice,
        exit::Exit,
        key::{KeyReference, Place},
    },
    config::SeparationPolicy,
    sys::device::{Device, DeviceError},
    volumes::header::Volume,
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
    /// What was compared is another device than the one whose header was read.
    #[error(transparent)]
    Exchanged(DeviceError),
}

/// The policy lets one key open one volume. Only [`prove`] leads to one, and without one there is no
/// [`Unlocked`](crate::volumes::Unlocked) by a stored key.
///
/// ```compile_fail,E0451
/// # use cryptattach::{base::key::KeyReference, sys::device::Device, volumes::separation::{Report, Separated}};
/// fn by_a_report_of_ones_own(report: Report, device: Device, key: KeyReference) -> Separated {
///     Separated { report, device, key } // the members are private
/// }
/// ```
#[derive(Debug)]
pub struct Separated {
    report: Report,
    device: Device,
    key: KeyReference,
}

/// What was compared, and why the key is not to open the volume.
#[derive(Debug)]
pub struct Refused {
    pub refusal: Refusal,
    separated: Separated,
}

/// Compares where a volume rests with the places of its key, and judges by the policy.
pub fn prove(
    volume: &Volume,
    key: &KeyReference,
    places: &[Place],
    surroundings: &Surroundings<'_>,
    policy: SeparationPolicy,
) -> Result<Separated, Box<Refused>> {
    let header = volume.luks().and_then(|header| header.detached.as_deref());
    let report = check(&volume.device.path, header, places, surroundings);
    let judged = volume.device.still_there().map_err(Refusal::Exchanged).and_then(|()| report.judge(policy));
    let separated = Separated { report, device: volume.device.clone(), key: key.clone() };
    match judged {
        Ok(()) => Ok(separated),
        Err(refusal) => Err(Box::new(Refused { refusal, separated })),
    }
}

impl Separated {
    /// The report.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// The key that may open the volume.
    pub fn key(&self) -> &KeyReference {
        &self.key
    }

    /// Whether this is the device that was compared.
    pub fn is_of(&self, device: &Device) -> bool {
        (&self.device.path, self.device.identity) == (&device.path, device.identity)
    }
}

impl Refused {
    /// The report.
    pub fn report(&self) -> &Report {
        &self.separated.report
    }

    /// Lets what is shared through: a person has said so, and `record` puts that on record. Nothing else can be let through.
    pub fn overridden<E: From<Refusal>>(self, record: impl FnOnce(&Self) -> Result<(), E>) -> Result<Separated, E> {
        if !self.refusal.is_shared() {
            return Err(self.refusal.into());
        }
        record(&self)?;
        Ok(self.separated)
    }
}

impl Report {
    /// Judges by the policy: shared is refused, unproven warns or is refused.
    pub fn judge(&self, policy: SeparationPolicy) -> Result<(), Refusal> {
        match (&self.verdict, policy) {
            (Verdict::Apart(_), _) => Ok(()),
            (Verdict::Shared(devices), _) => Err(Refusal::Shared { within: nearest(devices), how: positions(devices) }),
            (Verdict::Unproven(gaps), SeparationPolicy::Strict) => Err(Refusal::Unproven(join(gaps))),
            (Verdict::Unproven(gaps), SeparationPolicy::Warn) => {
                gaps.iter().for_each(|gap| tracing::warn!("separation of key and data is not proven: {gap}"));
                Ok(())
            }
        }
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

/// What is where; of several things in one position, the position once.
fn positions(shared: &[SharedDevice]) -> String {
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
        places => format!("{position}: {}", places.join(", ")),
    };
    positions.iter().map(told).collect::<Vec<_>>().join("; ")
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
        match self {
            Self::Shared { .. } | Self::Unproven(_) => Exit::NotSeparate,
            Self::Exchanged(error) => error.exit(),
        }
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
            Self::Exchanged(error) => return error.next_step(),
        };
        Some(step.into())
    }
}
