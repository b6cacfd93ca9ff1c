//! Attach: find the volume's key, prove that it rests elsewhere, open it, map the volume.

use std::path::Path;

use crate::{
    audit::{self, Event},
    backend::{self, Activate, BackendKind, Mapping, MappingName},
    config::{Config, SeparationPolicy},
    container::{Container, Fetched},
    error::{Error, chain},
    key::{KeyReference, SecretBytes, VolumeKey},
    seal::{Content, Opened, Payload},
    separation::{self, Inventory, Report, Surroundings, Target},
    store::Released,
    volume::{self, CIPHER, PlainParameters, Volume},
};

/// What to attach, and how.
pub struct Request<'a> {
    /// The encrypted device or file.
    pub device: &'a Path,
    /// The mapping's name; `luks-UUID` unless given.
    pub name: Option<MappingName>,
    /// The key; what the LUKS2 token says unless given.
    pub key: Option<KeyReference>,
    /// A detached LUKS header.
    pub header: Option<&'a Path>,
    /// The volume is plain dm-crypt and looks like this.
    pub plain: Option<PlainParameters>,
    /// The backend; the best that there is unless given.
    pub backend: Option<BackendKind>,
    /// How to map.
    pub options: Options,
    /// How strict to be about separation.
    pub separation: Strictness,
    /// The token of a hook's caller, for stores that are used as the caller.
    pub caller: Option<SecretBytes>,
    /// Who serves the volume, if the caller knows it.
    pub target: Option<Target>,
}

/// Options of the mapping; see [`Activate`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// No writes.
    pub read_only: bool,
    /// Pass discards on.
    pub allow_discards: bool,
    /// No work queue for reads.
    pub no_read_workqueue: bool,
    /// No work queue for writes.
    pub no_write_workqueue: bool,
}

/// What the separation check may let through.
#[derive(Clone, Copy, Debug, Default)]
pub struct Strictness {
    /// Overrides the configuration's policy.
    pub policy: Option<SeparationPolicy>,
    /// Go on although key and data share a device; recorded.
    pub allow_shared: bool,
}

/// Attaches a volume.
pub fn attach(config: &Config, request: Request<'_>) -> Result<Mapping, Error> {
    let volume = volume::find(request.device, request.header, request.plain.as_ref())?;
    let options = activation(&request, &volume)?;
    let backend = backend::choose(request.backend, &volume.device)?;
    if let Some(mapping) = backend.active(&volume, &options)? {
        return Ok(mapping);
    }
    let reference = reference(request.key.clone(), &volume)?;
    let container = Container::open(config, &reference.store, request.caller)?;
    let report = separate(config, &container, &reference, &volume, request.target.as_ref(), request.separation)?;
    let key = open(&container, &reference, &volume)?;
    let mapping = backend.activate(&volume, &key, &options)?;
    record("attach", config, &reference, &volume, Some(&options.name), &report);
    Ok(mapping)
}

/// The key that is asked for, or else the one that the header's token names.
pub fn reference(asked: Option<KeyReference>, volume: &Volume) -> Result<KeyReference, Error> {
    let in_token = || volume.luks().and_then(|header| header.reference.clone());
    asked.or_else(in_token).ok_or_else(|| Error::NoReference(volume.device.path.clone()))
}

fn activation(request: &Request<'_>, volume: &Volume) -> Result<Activate, Error> {
    let name = match (&request.name, volume.uuid()) {
        (Some(name), _) => name.clone(),
        // The name that udisks and dracut give to a LUKS volume.
        (None, Some(uuid)) => format!("luks-{uuid}").parse()?,
        (None, None) => return Err(Error::NoName(volume.device.path.clone())),
    };
    let Options { read_only, allow_discards, no_read_workqueue, no_write_workqueue } = request.options;
    let read_only = read_only || volume.device.read_only;
    Ok(Activate { name, read_only, allow_discards, no_read_workqueue, no_write_workqueue })
}

/// Checks that nothing which opens the volume rests on the volume's device, and judges by the policy.
pub fn separate(
    config: &Config,
    container: &Container,
    reference: &KeyReference,
    volume: &Volume,
    target: Option<&Target>,
    strictness: Strictness,
) -> Result<Report, Error> {
    let header = volume.luks().and_then(|header| header.detached.as_deref());
    let places = container.places(&reference.key)?;
    let inventory = Inventory::of(&config.separation)?;
    let surroundings = Surroundings { target, inventory: &inventory, level: config.separation.level };
    let report = separation::check(&volume.device.path, header, &places, &surroundings);
    match report.judge(strictness.policy.unwrap_or(config.separation.policy)) {
        Err(refusal) if refusal.is_shared() && strictness.allow_shared => {
            tracing::warn!("{refusal}; going on, as --allow-shared demands");
            let event = Event {
                action: "override",
                device: Some(&volume.device.path),
                key: Some(reference.to_string()),
                name: None,
                separation: serde_json::to_value(&report).ok(),
                overridden: Some("--allow-shared"),
            };
            audit::record(&config.audit.file, &event)?;
        }
        judged => judged?,
    }
    Ok(report)
}

/// Fetches the key, opens it, and checks what it says against what the header says.
///
/// Equal digests are not yet a right key: whoever uses it compares it with the digest, as both backends do.
pub fn open(container: &Container, reference: &KeyReference, volume: &Volume) -> Result<VolumeKey, Error> {
    match container.fetch(&reference.key, Some(volume.uuid()))? {
        Fetched::Sealed(Opened { content: Content::VolumeKey(payload), .. }) => {
            fit(reference, &payload, volume)?;
            Ok(payload.volume_key)
        }
        Fetched::Sealed(Opened { content: Content::Object(object), .. })
        | Fetched::Released(Released { object, .. }) => Ok(volume.unlock(&object.passphrase()?)?),
    }
}

/// Refuses a key whose sealed form says something else of the volume than the header does.
pub fn fit(reference: &KeyReference, sealed: &Payload, volume: &Volume) -> Result<(), Error> {
    let mismatch = |what| Error::Mismatch { reference: reference.clone(), device: volume.device.path.clone(), what };
    fits(sealed, volume).map_err(mismatch)
}

/// Whether the header says what was sealed: neither is believed alone.
fn fits(sealed: &Payload, volume: &Volume) -> Result<(), String> {
    let geometry = &volume.geometry;
    let differ = |what: &str, sealed: String, header: String| {
        if sealed == header {
            Ok(())
        } else {
            Err(format!("{what} {header} in the header, {sealed} in the sealed key"))
        }
    };
    let digest = volume.luks().map(|header| header.digest.as_str());
    differ("cipher", sealed.cipher.clone(), CIPHER.to_owned())?;
    differ("sector size", sealed.sector_size_bytes.to_string(), geometry.sector_size.to_string())?;
    differ("IV offset", sealed.iv_offset_sectors.to_string(), geometry.iv_offset_sectors.to_string())?;
    differ("data offset", sealed.data_offset_bytes.to_string(), geometry.data_offset_bytes.to_string())?;
    if let Some(size) = volume.key_size {
        differ("key size", sealed.volume_key.size().bits().to_string(), size.bits().to_string())?;
    }
    if sealed.digest.as_deref() != digest {
        return Err(
            "the digest of the volume key differs (was the volume re-encrypted or its header exchanged?)".into()
        );
    }
    Ok(())
}

/// Writes the audit record of what was done. It is done: a record that cannot be written is a warning.
pub fn record(
    action: &str,
    config: &Config,
    reference: &KeyReference,
    volume: &Volume,
    name: Option<&MappingName>,
    report: &Report,
) {
    let event = Event {
        action,
        device: Some(&volume.device.path),
        key: Some(reference.to_string()),
        name: name.map(ToString::to_string),
        separation: serde_json::to_value(report).ok(),
        overridden: None,
    };
    if let Err(error) = audit::record(&config.audit.file, &event) {
        tracing::warn!("{}", chain(&error));
    }
}
