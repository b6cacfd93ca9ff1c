//! A backend in memory for unit tests: it maps nothing, compares keys as the others do, and remembers.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use uuid::Uuid;

use super::{
    Activate, Backend, BackendError, BackendKind, Backends, Deferred, Mapping, MappingStatus,
    once::{self, Occupied},
};
use crate::{
    base::mapping_name::MappingName,
    sys::{device::Device, stores::Footing},
    volumes::{
        Authority, Unlocked,
        header::{CIPHER, Volume},
    },
};

/// What was mapped. Clones share it, so a test keeps one and hands the other in.
#[derive(Clone, Debug, Default)]
pub struct Memory(Arc<Mutex<BTreeMap<MappingName, Mapped>>>);

#[derive(Clone, Debug)]
struct Mapped {
    source: PathBuf,
    footing: Footing,
    volume: Option<Uuid>,
    size_bytes: u64,
    read_only: bool,
    by: Authority,
}

impl Memory {
    /// The names of what is mapped.
    pub fn names(&self) -> Vec<String> {
        self.mapped().keys().map(ToString::to_string).collect()
    }

    /// What unlocked a mapping.
    pub fn by(&self, name: &str) -> Option<Authority> {
        self.mapped().get(&name.parse().expect("a name")).map(|mapped| mapped.by.clone())
    }

    fn mapped(&self) -> MutexGuard<'_, BTreeMap<MappingName, Mapped>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Backends for Memory {
    fn choose(&self, _: Option<BackendKind>, _: &Device) -> Result<Box<dyn Backend>, BackendError> {
        Ok(Box::new(self.clone()))
    }

    fn of(&self, _: BackendKind) -> Result<Box<dyn Backend>, BackendError> {
        Ok(Box::new(self.clone()))
    }

    fn available(&self) -> Vec<(BackendKind, Box<dyn Backend>)> {
        vec![(BackendKind::Userspace, Box::new(self.clone()))]
    }
}

impl Backend for Memory {
    fn active(&self, volume: &Volume, options: &Activate) -> Result<Option<Mapping>, BackendError> {
        let Some(found) = self.mapped().get(&options.name).cloned() else {
            return once::require_free(&[self], &volume.device, Some(&options.name)).map(|()| None);
        };
        if found.volume != volume.uuid() || found.source != volume.device.path {
            let by = format!("{} is attached under it", found.source.display());
            return Err(BackendError::Foreign { name: options.name.clone(), by });
        }
        Ok(Some(mapping(&options.name, true)))
    }

    fn activate(&self, unlocked: &Unlocked, options: &Activate) -> Result<Mapping, BackendError> {
        let volume = unlocked.volume();
        volume.midway()?;
        let mapped = Mapped {
            source: volume.device.path.clone(),
            footing: Footing::of(volume.device.identity),
            volume: volume.uuid(),
            size_bytes: volume.geometry.size_bytes,
            read_only: options.read_only,
            by: unlocked.by().clone(),
        };
        self.mapped().insert(options.name.clone(), mapped);
        Ok(mapping(&options.name, false))
    }

    fn resize(&self, name: &MappingName, unlocked: &Unlocked) -> Result<u64, BackendError> {
        let mut mapped = self.mapped();
        let found = mapped.get_mut(name).ok_or_else(|| BackendError::NotActive(name.clone()))?;
        found.size_bytes = unlocked.volume().geometry.size_bytes;
        Ok(found.size_bytes)
    }

    fn deactivate(&self, name: &MappingName, _: Deferred) -> Result<(), BackendError> {
        self.mapped().remove(name).map(drop).ok_or_else(|| BackendError::NotActive(name.clone()))
    }

    fn status(&self, name: &MappingName) -> Result<Option<MappingStatus>, BackendError> {
        Ok(self.mapped().get(name).map(|mapped| MappingStatus {
            name: name.clone(),
            backend: BackendKind::Userspace,
            device: mapping(name, true).device,
            export: None,
            source: mapped.source.clone(),
            volume: mapped.volume,
            cipher: CIPHER.to_owned(),
            key_size_bits: 512,
            sector_size_bytes: 4096,
            size_bytes: mapped.size_bytes,
            read_only: mapped.read_only,
            trouble: None,
            holders: Vec::new(),
        }))
    }

    fn device(&self, name: &MappingName) -> Result<Option<PathBuf>, BackendError> {
        Ok(self.mapped().get(name).map(|_| mapping(name, true).device))
    }

    fn occupied(&self) -> Result<Vec<Occupied>, BackendError> {
        let occupied =
            |(name, mapped): (&MappingName, &Mapped)| Occupied { name: name.clone(), footing: mapped.footing.clone() };
        Ok(self.mapped().iter().map(occupied).collect())
    }

    fn list(&self) -> Result<Vec<MappingName>, BackendError> {
        Ok(self.mapped().keys().cloned().collect())
    }
}

fn mapping(name: &MappingName, already_active: bool) -> Mapping {
    let device = PathBuf::from(format!("/memory/{name}"));
    Mapping { name: name.clone(), device, uri: None, backend: BackendKind::Userspace, already_active }
}
