//! Backups of a container: written apart from the volumes that their keys open, and restored.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use uuid::Uuid;

use super::{container::record, error::Error};
use crate::{
    base::key::{Place, StoreName},
    config::Config,
    sys::{device::by_uuid, durable::folder_of},
    unlock::{
        audit::{self, Event},
        container::{
            Progress,
            backup::{self, BackedUp, BackupError, How, Restored},
        },
    },
    volumes::{
        backend::Backends,
        header,
        separation::{self, Inventory, Surroundings},
    },
};

/// Writes all that a container has into a new file.
pub fn back_up(
    config: &Config,
    backends: &dyn Backends,
    name: &StoreName,
    file: &Path,
    progress: &Progress<'_>,
) -> Result<BackedUp, Error> {
    backup::require_new(file)?;
    let backup = backup::collect(config, name, progress)?;
    for (device, volume) in in_sight(config, backends, &backup.volumes) {
        check_apart(config, file, &device, volume)?;
    }
    let done = backup.write(file)?;
    record(config, "container backup", name);
    Ok(done)
}

/// Where this host sees these volumes: attached, configured, or by their UUID.
fn in_sight(config: &Config, backends: &dyn Backends, volumes: &BTreeSet<Uuid>) -> BTreeMap<PathBuf, Uuid> {
    let attached = backends.available().into_iter().flat_map(|(_, backend)| {
        let names = backend.list().unwrap_or_default();
        names.into_iter().filter_map(|name| backend.status(&name).ok().flatten()).collect::<Vec<_>>()
    });
    let attached = attached.filter_map(|status| Some((status.source, status.volume?)));
    let configured = config.volumes.values().filter_map(|volume| {
        let (device, header) = (volume.device.path(), volume.header.as_deref());
        Some((device.to_owned(), header::probe(device, header).ok()?.uuid()?))
    });
    let by_uuid = volumes.iter().map(|uuid| (by_uuid(*uuid), *uuid));
    let all = attached.chain(configured).chain(by_uuid.filter(|(path, _)| path.exists()));
    all.filter(|(_, uuid)| volumes.contains(uuid)).collect()
}

/// A backup opens a volume like the store does, so it has to be apart from it as well.
fn check_apart(config: &Config, file: &Path, device: &Path, volume: Uuid) -> Result<(), Error> {
    let inventory = Inventory::of(&config.separation)?;
    let surroundings = Surroundings { inventory: &inventory, level: config.separation.level, target: None };
    let place = Place::path("backup", folder_of(file), true);
    let report = separation::check(device, None, &[place], &surroundings);
    report.judge(config.separation.policy).map_err(|refusal| {
        let (device, refusal) = (device.to_owned(), Box::new(refusal));
        BackupError::Beside { volume, device, refusal }.into()
    })
}

/// Writes what a backup has and the store lacks.
pub fn restore(
    config: &Config,
    name: &StoreName,
    file: &Path,
    how: How,
    progress: &Progress<'_>,
) -> Result<Restored, Error> {
    let flags = [(how.older, "--older"), (how.replace, "--replace")];
    let flags: Vec<_> = flags.into_iter().filter_map(|(given, flag)| given.then_some(flag)).collect();
    let flags = (!flags.is_empty()).then(|| flags.join(" "));
    let restored = backup::restore(config, name, file, how, progress)?;
    let (action, key) = ("container restore", Some(name.to_string()));
    audit::done(config, &Event { action, key, overridden: flags.as_deref(), ..Event::default() });
    Ok(restored)
}
