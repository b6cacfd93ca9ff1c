//! A volume and its key: where the key is, the proof that it rests elsewhere, and the key itself.

use crate::{
    base::{
        chain::chain,
        key::{KeyReference, Place, VolumeKey},
        mapping_name::MappingName,
    },
    config::{Config, SeparationPolicy},
    keys::seal::{Content, Opened, Payload},
    unlock::{
        Error,
        audit::{self, Event},
        container::{Container, Fetched},
    },
    volumes::{
        header::{CIPHER, Volume},
        separation::{self, Inventory, Report, Surroundings, Target},
    },
};

/// A volume and its key, and what the audit record says of them.
pub struct Case<'a> {
    /// The configuration.
    pub config: &'a Config,
    /// The key's container.
    pub container: &'a Container,
    /// The key.
    pub reference: &'a KeyReference,
    /// The volume.
    pub volume: &'a Volume,
    /// The mapping's name, if there is to be one.
    pub name: Option<&'a MappingName>,
    /// What the caller of a hook calls the volume.
    pub volume_id: Option<&'a str>,
}

/// What the separation check may let through.
#[derive(Clone, Copy, Debug, Default)]
pub struct Strictness {
    /// Overrides the configuration's policy.
    pub policy: Option<SeparationPolicy>,
    /// Go on although key and data share a device; recorded.
    pub allow_shared: bool,
}

/// The key that is asked for, or else the one that the header's token names.
pub fn reference(asked: Option<KeyReference>, volume: &Volume) -> Result<KeyReference, Error> {
    let in_token = || volume.luks().and_then(|header| header.reference.clone());
    asked.or_else(in_token).ok_or_else(|| Error::NoReference(volume.device.path.clone()))
}

impl<'a> Case<'a> {
    /// Without a mapping and a hook's caller.
    pub fn new(config: &'a Config, container: &'a Container, reference: &'a KeyReference, volume: &'a Volume) -> Self {
        Self { config, container, reference, volume, name: None, volume_id: None }
    }

    /// Checks that nothing which opens the volume rests on the volume's device, and judges by the policy.
    pub fn separate(&self, target: Option<&Target>, strictness: Strictness) -> Result<Report, Error> {
        self.judge(&self.container.places(&self.reference.key)?, target, strictness)
    }

    /// The same, with all that opens the volume in these places.
    pub fn judge(&self, places: &[Place], target: Option<&Target>, strictness: Strictness) -> Result<Report, Error> {
        let Self { config, volume, .. } = *self;
        let header = volume.luks().and_then(|header| header.detached.as_deref());
        let inventory = Inventory::of(&config.separation)?;
        let surroundings = Surroundings { target, inventory: &inventory, level: config.separation.level };
        let report = separation::check(&volume.device.path, header, places, &surroundings);
        match report.judge(strictness.policy.unwrap_or(config.separation.policy)) {
            Err(refusal) if refusal.is_shared() && strictness.allow_shared => {
                tracing::warn!("{refusal}; going on, as --allow-shared demands");
                let event = Event { overridden: Some("--allow-shared"), ..self.event("override", &report) };
                audit::record(&config.audit.file, &event)?;
            }
            Err(refusal) => {
                self.record("refused", &report);
                return Err(refusal.into());
            }
            Ok(()) => {}
        }
        Ok(report)
    }

    /// Writes the audit record of what was done. It is done: a record that cannot be written is a warning.
    pub fn record(&self, action: &str, report: &Report) {
        if let Err(error) = audit::record(&self.config.audit.file, &self.event(action, report)) {
            tracing::warn!("{}", chain(&error));
        }
    }

    fn event<'e>(&'e self, action: &'e str, report: &Report) -> Event<'e> {
        Event {
            action,
            device: Some(&self.volume.device.path),
            key: Some(self.reference.to_string()),
            name: self.name.map(ToString::to_string),
            volume_id: self.volume_id,
            separation: serde_json::to_value(report).ok(),
            overridden: None,
        }
    }
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
        object => {
            let passphrase = object.passphrase()?.ok_or_else(|| Error::NoPassphrase(reference.clone()))?;
            let key = volume.unlock(&passphrase)?;
            spend(container, reference, &object, volume);
            Ok(key)
        }
    }
}

/// Has a key that is for one volume count as used. The volume is there: that it still counts as unused is no reason to
/// withhold it.
pub fn spend(container: &Container, reference: &KeyReference, key: &Fetched, volume: &Volume) {
    let what = volume.uuid().map_or_else(|| "a plain volume".to_owned(), |uuid| uuid.to_string());
    if let Err(error) = container.spend(&reference.key, key, &what) {
        tracing::warn!("the key {reference} still counts as unused: {}", chain(&error));
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
