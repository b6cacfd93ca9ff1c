//! The volumes of a boot.

use std::{
    ops::{Index, IndexMut},
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use super::{
    Planned,
    key_source::OpenedBy,
    opened::{Evidence, Opened},
};
use crate::{
    base::{chain::chain, mapping_name::MappingName},
    unlock::pins::Pins,
    verbs::{attach::Options, error::Error},
    volumes::{
        Unlocked,
        backend::{Activate, Backends, ThisHost},
        header::Volume,
    },
};

/// The number of a volume in the plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VolumeNo(usize);

impl VolumeNo {
    /// Of a volume that a test makes up.
    #[cfg(test)]
    pub const FIRST: Self = Self(0);

    /// Its position in a list that has an element for each planned volume.
    pub fn index(self) -> usize {
        self.0
    }
}

/// A volume that this boot attaches, and how far it is.
pub struct Awaited {
    /// What was planned.
    pub planned: Planned,
    /// How far it is.
    pub state: State,
    /// What has neither attached it nor failed.
    pub pending: Vec<OpenedBy>,
    /// When its device was found, or else when the boot began.
    pub since: Instant,
}

/// How far a volume is.
pub enum State {
    /// Its device is not there yet.
    Absent,
    /// Its device is there, its key is not.
    Found(Arc<FoundVolume>),
    /// All sources have failed: only a person could open it now.
    GaveUp(Option<Arc<FoundVolume>>),
    /// Attached.
    Attached(Evidence),
    /// None of ours.
    NotOurs,
}

impl Awaited {
    /// Nothing has happened yet.
    pub fn new(planned: Planned, start: Instant) -> Self {
        Self { planned, state: State::Absent, pending: vec![OpenedBy::Device], since: start }
    }

    /// It has neither been attached nor given up.
    pub fn is_pending(&self) -> bool {
        matches!(self.state, State::Absent | State::Found(_))
    }

    /// The boot does not wait for its device, and the device is not there.
    pub fn may_stay_absent(&self) -> bool {
        self.planned.optional && matches!(self.state, State::Absent)
    }

    /// What is known of it, if it is attached.
    pub fn evidence(&self) -> Option<&Evidence> {
        match &self.state {
            State::Attached(evidence) => Some(evidence),
            _ => None,
        }
    }

    /// The volume, if a passphrase could open it now.
    pub fn for_a_person(&self) -> Option<&Arc<FoundVolume>> {
        match &self.state {
            State::Found(found) | State::GaveUp(Some(found)) => Some(found).filter(|found| found.asks_people()),
            _ => None,
        }
    }
}

/// All volumes of a boot, in the order of the plan.
pub struct Volumes(Vec<Awaited>);

impl Volumes {
    /// The planned ones.
    pub fn new(planned: Vec<Planned>, start: Instant) -> Self {
        Self(planned.into_iter().map(|planned| Awaited::new(planned, start)).collect())
    }

    /// Each with its number.
    pub fn iter(&self) -> impl Iterator<Item = (VolumeNo, &Awaited)> {
        self.0.iter().enumerate().map(|(number, awaited)| (VolumeNo(number), awaited))
    }
}

impl Index<VolumeNo> for Volumes {
    type Output = Awaited;

    fn index(&self, number: VolumeNo) -> &Awaited {
        &self.0[number.0]
    }
}

impl IndexMut<VolumeNo> for Volumes {
    fn index_mut(&mut self, number: VolumeNo) -> &mut Awaited {
        &mut self.0[number.0]
    }
}

/// A volume whose device is there. The first thread that gets its key attaches it.
pub struct FoundVolume {
    pub volume: Volume,
    options: Activate,
    /// Its header has the digest that this host has pinned.
    pinned: bool,
    attached: Mutex<Option<Opened>>,
}

impl FoundVolume {
    /// This volume, to be mapped as planned.
    pub fn new(volume: Volume, planned: &Planned, pins: &Pins) -> Self {
        let Options { read_only, export, allow_discards, no_read_workqueue, no_write_workqueue } = planned.options;
        let (name, read_only) = (planned.name.clone(), read_only || volume.device.read_only);
        let options = Activate { name, read_only, export, allow_discards, no_read_workqueue, no_write_workqueue };
        let known = volume.luks().zip(volume.uuid()).map(|(luks, uuid)| pins.have(uuid, &luks.digest));
        let pinned = known.transpose().unwrap_or_else(|error| {
            tracing::warn!("{}", chain(&error));
            None
        });
        Self { volume, options, pinned: pinned.unwrap_or_default(), attached: Mutex::default() }
    }

    /// The name of its mapping.
    pub fn name(&self) -> &MappingName {
        &self.options.name
    }

    /// Whether it is a volume that this host has opened before.
    pub fn is_pinned(&self) -> bool {
        self.pinned
    }

    /// Whether a passphrase may open it.
    pub fn asks_people(&self) -> bool {
        self.volume.luks().is_some_and(|luks| luks.asks_people)
    }

    /// Whether another program has attached it.
    pub fn is_attached(&self) -> bool {
        let backend = ThisHost.choose(None, &self.volume.device);
        let active = backend.and_then(|backend| backend.active(&self.volume, &self.options));
        active.is_ok_and(|mapping| mapping.is_some())
    }

    /// Attaches the volume, unless another thread has; what attached it. `ready` makes the last preparations, for one thread only.
    pub fn attach(
        &self,
        unlocked: Unlocked,
        by: OpenedBy,
        ready: impl FnOnce(Unlocked, bool) -> Result<Unlocked, Error>,
    ) -> Result<Opened, Error> {
        let mut attached = self.attached.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(opened) = &*attached {
            return Ok(opened.clone());
        }
        let backend = ThisHost.choose(None, &self.volume.device)?;
        let opened = if backend.active(&self.volume, &self.options)?.is_some() {
            Opened { by: OpenedBy::Before, evidence: Evidence::default() }
        } else {
            let unlocked = ready(unlocked, self.options.read_only)?;
            backend.activate(&unlocked, &self.options)?;
            Opened { by, evidence: Evidence::of(&unlocked, self) }
        };
        Ok(attached.insert(opened).clone())
    }
}
