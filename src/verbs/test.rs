//! Trial: would a volume unlock now? The whole way of [`crate::verbs::attach`] but the mapping; nothing is changed.

use std::{
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde::Serialize;

use crate::{
    base::key::{KeyReference, Place},
    config::{Config, LeafName},
    keys::{
        seal::{Told, identities},
        store,
    },
    unlock::{
        case::{Asked, Case, Circumstances, Strictness},
        container::Source,
        loops,
    },
    verbs::{
        as_texts,
        boot::{
            self, BootError, Planned, Which,
            image::{self, Image, KeptOut},
        },
        error::Error,
        rotate,
    },
    volumes::header::{self, PlainParameters, Volume},
};

/// Which volume.
pub struct Request<'a> {
    pub device: &'a Path,
    /// The key; what the LUKS2 token says unless given.
    pub key: Option<KeyReference>,
    /// A detached LUKS header.
    pub header: Option<&'a Path>,
    /// The volume is plain dm-crypt and looks like this.
    pub plain: Option<PlainParameters>,
    /// How strict to be about separation.
    pub separation: Strictness,
    /// Look for what a boot has to mount first, too.
    pub as_boot: bool,
}

/// A volume that would unlock.
#[derive(Debug, Serialize)]
pub struct Passed {
    pub key: KeyReference,
    /// Where that came from: "the lockbox", "store 'cinder' (the directory /mnt/keys)", ...
    pub source: String,
    /// What was done, in order.
    pub steps: Vec<Step>,
    /// What each part of the container's policy said, if it has one of its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy: Option<Told>,
    /// Leaves whose servers have newer keys than those that the container key is sealed to.
    #[serde(skip_serializing_if = "Vec::is_empty", serialize_with = "as_texts")]
    pub outdated: Vec<LeafName>,
    /// How long it took, in seconds.
    pub seconds: f64,
}

/// One step.
#[derive(Debug, Serialize)]
pub struct Step {
    /// "header", "separation", ...
    pub step: &'static str,
    pub found: String,
    /// How long it took, in seconds.
    pub seconds: f64,
}

/// Notes when a step has ended.
struct Clock {
    start: Instant,
    last: Instant,
    steps: Vec<Step>,
}

impl Clock {
    fn done(&mut self, step: &'static str, found: String) {
        let now = Instant::now();
        self.steps.push(Step { step, found, seconds: rounded(now - self.last) });
        self.last = now;
    }
}

/// Goes all the way to the volume key, and compares it with the header's digest.
pub fn try_out(config: &Config, request: Request<'_>) -> Result<Passed, Error> {
    let now = Instant::now();
    let mut clock = Clock { start: now, last: now, steps: Vec::new() };
    let volume = rotate::find_to_map(config, request.device, request.header, request.plain.as_ref())?;
    clock.done("header", header(&volume));
    let case = Case::find(config, volume, Asked { key: request.key, ..Asked::default() })?;
    let reference = case.reference().clone();
    let by_boot = if request.as_boot { opened_by_boot(config, case.volume())? } else { None };
    // What the initramfs has is in memory then.
    let in_image = |place: &Place| by_boot.as_ref().is_some_and(|(_, image)| image.has(place));
    let given = Circumstances { strictness: request.separation, in_memory: Some(&in_image), target: None };
    let proven = case.prove(given)?;
    clock.done("separation", proven.report().verdict.word().to_owned());
    loops::check(config, &reference.store, &proven.report().key_places())?;
    let (_, tried) = proven.try_out()?;
    clock.done("key", tried.found);
    let volume = proven.volume();
    clock.done(
        "volume key",
        match (volume.luks(), &volume.rest) {
            (Some(_), None) => "matches the header's digest",
            (Some(_), Some(_)) => "both keys, the new one and the old one, match the header's digests",
            (None, _) => "has the right size",
        }
        .into(),
    );
    if request.as_boot {
        clock.done("boot", at_boot(config, &reference, by_boot)?);
    }
    proven.record("test");
    let source = named(tried.source, config, &reference)?;
    let (policy, seconds) = (proven.told(), rounded(clock.start.elapsed()));
    // Only then were servers asked.
    let outdated = policy.as_ref().map_or(Vec::new(), |_| proven.outdated_leaves());
    Ok(Passed { key: reference.clone(), source, policy, outdated, steps: clock.steps, seconds })
}

fn header(volume: &Volume) -> String {
    let Some(luks) = volume.luks() else { return "none: plain dm-crypt".to_owned() };
    let detached = luks.detached.as_ref().map(|path| format!(", detached in {}", path.display())).unwrap_or_default();
    let version = if luks.format == header::Format::Luks1 { 1 } else { 2 };
    let keys = match (&volume.rest, volume.midway()) {
        (None, _) => "",
        (Some(_), Ok(_)) => ", re-encrypting: a part of its data has the old key yet",
        (Some(_), Err(_)) => ", re-encrypting, killed: attaching it recovers the stretch that was being written",
    };
    format!("LUKS{version} {}{detached}{keys}", luks.uuid)
}

/// The keys that a boot asks for at once, if the configuration lists the device among the boot's volumes.
pub fn boot_keys(config: &Config, device: &Path) -> Option<Vec<KeyReference>> {
    planned(config, device).filter(|planned| planned.configured).map(|planned| planned.keys)
}

fn planned(config: &Config, device: &Path) -> Option<Planned> {
    boot::plan(config, None, Which::Later).into_iter().find(|planned| planned.device.is(&[device.to_owned()], None))
}

/// How a boot would open the volume, and what its initramfs has; `None` if that does not open it.
fn opened_by_boot(config: &Config, volume: &Volume) -> Result<Option<(Planned, Image)>, Error> {
    let planned = planned(config, &volume.device.path);
    planned.map(|planned| Ok((planned, image::image(config, None)?))).transpose()
}

/// What a boot has, or has not, of what the key takes.
fn at_boot(config: &Config, reference: &KeyReference, by_boot: Option<(Planned, Image)>) -> Result<String, Error> {
    let Some((planned, image)) = by_boot else { return mounted_first(config, reference) };
    let store = config.store(&reference.store)?;
    let kind = store::kind(store)?;
    let keys = identities::files(&store.sealing.identities);
    let needs = |path: &Path| keys.iter().any(|key| key == path) || kind.paths().contains(&path);
    let lacks: Vec<KeptOut> = image.kept_out.into_iter().filter(|kept_out| needs(&kept_out.path)).collect();
    let is_lacking = |key: &PathBuf| lacks.iter().any(|kept_out| kept_out.path == *key);
    let opens = config.lockbox.is_some() || !keys.iter().all(is_lacking);
    match lacks.into_iter().next() {
        // What crypttab lists may be opened later, by the system.
        Some(source) if planned.configured && !opens => {
            Err(BootError::KeptOut { key: reference.clone(), source }.into())
        }
        Some(kept_out) => Ok(format!("needs help in an initramfs: {kept_out}")),
        None if planned.configured => {
            Ok("everything that it needs is for the initramfs, or on a disk that the boot waits for".into())
        }
        None => mounted_first(config, reference),
    }
}

/// What is on another file system than the root: a boot that mounts it later has no key before.
fn mounted_first(config: &Config, reference: &KeyReference) -> Result<String, Error> {
    let store = config.store(&reference.store)?;
    let (kind, keys) = (store::kind(store)?, identities::files(&store.sealing.identities));
    let files = kind.directory().into_iter().chain(keys.iter().map(PathBuf::as_path)).chain([&*config.path]);
    let mut needed = Vec::new();
    for file in files {
        let at = mount_point(file).map_err(Error::io(format!("find what {} is mounted on", file.display())))?;
        if at != Path::new("/") {
            needed.push(format!(
                "{} is on the file system at {}, which must be mounted first",
                file.display(),
                at.display()
            ));
        }
    }
    Ok(if needed.is_empty() {
        "everything that it needs is on the root file system, in the TPM or in the network".to_owned()
    } else {
        needed.join("; ")
    })
}

/// Where the file system that a file is on is mounted (st_dev changes there).
fn mount_point(file: &Path) -> io::Result<PathBuf> {
    let mut at = file.canonicalize()?;
    let device = at.metadata()?.dev();
    while let Some(parent) = at.parent() {
        if parent.metadata()?.dev() != device {
            break;
        }
        at = parent.to_owned();
    }
    Ok(at)
}

fn named(source: Source, config: &Config, reference: &KeyReference) -> Result<String, Error> {
    if source == Source::Lockbox {
        return Ok("the lockbox".to_owned());
    }
    let what = store::kind(config.store(&reference.store)?)?.describe();
    Ok(format!("store '{}' ({what})", reference.store))
}

/// To a tenth of a millisecond; more would be noise.
fn rounded(time: Duration) -> f64 {
    (time.as_secs_f64() * 10_000.0).round() / 10_000.0
}
