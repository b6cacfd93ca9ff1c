//! Bind: a LUKS2 volume that people open by a passphrase opens by itself from then on. And taking that back.
//!
//! Each step is one that another verb has. The journal notes what is made before it is made, so a run that was stopped goes on,
//! and [`unbind`] takes back just that.

pub mod boot;
mod journal;
pub mod machine;
pub mod plan;
mod store;
pub mod thieves;

use std::path::{Path, PathBuf};

use serde::Serialize;
use uuid::Uuid;

use self::{
    boot::{Entry, Maker, crypttab_text},
    journal::{Journal, Made},
    machine::{Machine, is_latched, look, tpm_key},
    plan::{Boot, Plan, Wishes},
    thieves::Thieves,
};
use crate::{
    base::{
        advice::Advice,
        chain::chain,
        exit::Exit,
        key::{KeyReference, SecretBytes},
        mapping_name::MappingName,
        person::Attendant,
    },
    config::{Config, ConfigError, LeafName, crypttab},
    keys::{
        seal::{identities, leaves},
        store::{self as stores, StoreError},
    },
    sys::device::Identity,
    unlock::{
        self,
        case::Strictness,
        container::{self, Container, Use},
    },
    verbs::{edit, error::Error, import, key_file, keys, leaf::Hands, rotate, setup, test},
    volumes::header::{self, Binding, Format, Volume, VolumeError},
};

/// How often a person may type the passphrase.
const TRIES: usize = 3;

/// Says which of the keys that a leaf's server offers is the right one.
pub type Choose = dyn Fn(&LeafName, &dyn leaves::Pin, &dyn leaves::Offer) -> Result<String, Error>;

/// Which volume, how, and who helps.
pub struct Request<'a> {
    /// The configuration's file, which need not be there.
    pub config: &'a Path,
    pub device: &'a Path,
    pub wishes: &'a Wishes,
    /// Reads the file with a passphrase of the volume, which need not be there any more once it is bound; whoever is at the
    /// terminal is asked unless given.
    pub key_file: Option<&'a dyn Fn() -> Result<SecretBytes, Error>>,
    pub ask: &'a dyn Fn(&str) -> Result<SecretBytes, Error>,
    /// Gets the recovery key.
    pub hands: Option<&'a dyn Hands>,
    /// The signing key of a Tang server.
    pub thumbprint: Option<&'a str>,
    pub choose: &'a Choose,
    /// Opens a container whose key the TPM does not open any more in this boot.
    pub attendant: Attendant,
    /// Hears the plan, and what is being done.
    pub tell: &'a dyn Fn(Vec<String>),
}

/// What was done.
#[derive(Debug, Serialize)]
pub struct Bound {
    pub device: PathBuf,
    pub volume: Uuid,
    pub key: KeyReference,
    /// It was bound before; nothing was changed.
    pub already: bool,
    pub plan: Plan,
    /// Whether it was tried as a boot would; not in a boot that has latched the TPM.
    pub tried: bool,
    /// What the initramfs lacks.
    pub lacks: Vec<String>,
    /// What others had bound, and was removed.
    pub replaced: Vec<Binding>,
    pub thieves: Thieves,
}

/// What was taken back.
#[derive(Debug, Serialize)]
pub struct Unbound {
    pub device: PathBuf,
    pub volume: Uuid,
    pub key: Option<KeyReference>,
    /// What stays, and why.
    pub stays: Vec<String>,
}

/// What is going to be done, in words; nothing is changed.
pub fn propose(request: &Request<'_>) -> Result<(Plan, Vec<String>), Error> {
    let config = or_empty(request.config)?;
    let (volume, uuid) = luks2(request.device)?;
    let machine = look(&config, &volume, uuid)?;
    let plan = plan::plan(&machine, request.wishes)?;
    let lines = plan.lines(&machine, request.wishes);
    Ok((plan, lines))
}

/// Binds a volume, or goes on with it.
pub fn bind(request: &Request<'_>) -> Result<Bound, Error> {
    let config = or_empty(request.config)?;
    let (volume, uuid) = luks2(request.device)?;
    let _alone = (journal::claim(&config)?, rotate::claim(&config, uuid)?);
    let mut job = Job { request, uuid, journal: journal::read(&config, uuid)?.unwrap_or_default(), config };
    let machine = look(&job.config, &volume, uuid)?;
    let plan = plan::plan(&machine, request.wishes)?;
    if let Some(key) = volume.reference().filter(|_| job.journal.done)
        && !request.wishes.replace
    {
        let tried = job.try_out(&plan)?;
        return Ok(Bound { tried, ..job.bound(machine, plan, key.clone(), true)? });
    }
    (request.tell)(plan.lines(&machine, request.wishes));
    let secret = match volume.reference() {
        Some(_) => None,
        None => job.secret(&volume)?,
    };
    job.prepare(&plan)?;
    let key = job.seal(&volume, &plan, secret)?;
    job.set_up_boot(&volume, &plan)?;
    let lacks = job.make_image(plan.initramfs)?;
    let tried = job.try_out(&plan)?;
    let replaced = if request.wishes.replace { job.replace(tried)? } else { Vec::new() };
    job.note(|journal| journal.done = true)?;
    let machine = Machine { key: tpm_key(&job.config), ..machine };
    Ok(Bound { tried, lacks, replaced, ..job.bound(machine, plan, key, false)? })
}

struct Job<'a> {
    request: &'a Request<'a>,
    config: Config,
    uuid: Uuid,
    journal: Journal,
}

impl Job<'_> {
    fn note(&mut self, change: impl FnOnce(&mut Journal)) -> Result<(), Error> {
        change(&mut self.journal);
        journal::write(&self.config, self.uuid, &self.journal)
    }

    /// A passphrase that opens a keyslot, known before anything is made; `None` if clevis has it, whose place is to be taken.
    fn secret(&self, volume: &Volume) -> Result<Option<SecretBytes>, Error> {
        let Request { key_file, ask, device, .. } = self.request;
        if let Some(read) = key_file {
            let mut secret = read()?;
            key_file::open(volume, &mut secret)?;
            return Ok(Some(secret));
        }
        if self.request.wishes.replace && volume.luks().is_some_and(|luks| !luks.clevis.is_empty()) {
            return Ok(None);
        }
        let mut tries = 1;
        loop {
            let secret = ask(&format!("A passphrase of {} (nothing is shown): ", device.display()))?;
            match volume.open_keyslot(&secret) {
                Ok(_) => return Ok(Some(secret)),
                Err(error @ VolumeError::WrongPassphrase { .. }) if tries < TRIES => {
                    (self.request.tell)(vec![chain(&error)]);
                    tries += 1;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The key in the TPM, and the store.
    fn prepare(&mut self, plan: &Plan) -> Result<(), Error> {
        let path = self.request.config;
        let mut made = journal::made(&self.config)?;
        if plan.new_tpm_key {
            made.tpm_key = Some(self.config.tpm.identity.to_path_buf());
            journal::note_made(&self.config, &made)?;
            store::make_tpm_key(&self.config, plan.pcrs)?;
        }
        if plan.new_store {
            made.store = Some(plan.store.clone());
            made.config |= !path.exists();
            journal::note_made(&self.config, &made)?;
        }
        if made.store.as_ref() == Some(&plan.store) {
            store::make(self.request, plan)?;
        }
        self.config = setup::configuration(path)?;
        self.config.attendant = self.request.attendant.clone();
        Ok(())
    }

    /// Seals and stores the key, and has the header name it.
    fn seal(&mut self, volume: &Volume, plan: &Plan, secret: Option<SecretBytes>) -> Result<KeyReference, Error> {
        if let Some(reference) = volume.reference() {
            return Ok(reference.clone());
        }
        if let Some(unused) = self.journal.key.clone() {
            delete(&self.config, &unused)?;
        }
        let announce = |reference: &KeyReference| {
            let journal = Journal { key: Some(reference.clone()), ..self.journal.clone() };
            journal::write(&self.config, self.uuid, &journal)
        };
        let request = import::Request {
            device: self.request.device,
            store: Some(plan.store.clone()),
            header: None,
            plain: None,
            secret,
            token: true,
            separation: Strictness::default(),
            announce: &announce,
        };
        let reference = import::import(&self.config, request)?;
        self.journal.key = Some(reference.clone());
        Ok(reference)
    }

    fn set_up_boot(&mut self, volume: &Volume, plan: &Plan) -> Result<(), Error> {
        let default = || format!("luks-{}", self.uuid).parse().ok();
        let name = self.request.wishes.name.clone().or_else(default);
        let Some(name) = name else { return Ok(()) };
        match plan.boot {
            Boot::File | Boot::Known => Ok(()),
            Boot::Crypttab => {
                let (text, path) = (crypttab_text()?.unwrap_or_default(), [volume.device.path.clone()]);
                let is_it = |entry: &crypttab::Entry| entry.device.is(&path, Some(self.uuid));
                let new = format!("{name} UUID={}", self.uuid);
                if let Some(entry) = Entry::wanted(&text, &is_it, &new, Maker::here()) {
                    self.note(|journal| journal.crypttab = Some(entry.clone()))?;
                    entry.set()?;
                }
                Ok(())
            }
            Boot::Section => self.add_section(name),
        }
    }

    fn add_section(&mut self, name: MappingName) -> Result<(), Error> {
        let is_listed = self.config.volumes.values().any(|listed| listed.device.is(&[], Some(self.uuid)));
        if is_listed {
            return Ok(());
        }
        if self.config.volumes.contains_key(&name) {
            return Err(Error::Usage(format!(
                "the configuration has another volume '{name}': choose a name with --name"
            )));
        }
        self.note(|journal| journal.volume = Some(name.clone()))?;
        let table = format!("[volumes.\"{name}\"]\ndevice = \"UUID={}\"\n", self.uuid);
        let attendant = self.config.attendant.clone();
        self.config = Config { attendant, ..edit::with_table(self.request.config, &table)?.write()? };
        Ok(())
    }

    fn make_image(&self, maker: Option<Maker>) -> Result<Vec<String>, Error> {
        let Some(maker) = maker else { return Ok(Vec::new()) };
        (self.request.tell)(vec![format!("making the initramfs anew: {}", maker.command().join(" "))]);
        Ok(maker.make_checked(&self.config)?.iter().map(ToString::to_string).collect())
    }

    /// Opens the volume's key with what a boot has; whether that can be told now.
    fn try_out(&self, plan: &Plan) -> Result<bool, Error> {
        if plan.by_tpm && is_latched(&self.config) {
            tracing::warn!(
                "PCR 15 has been extended in this boot, so the TPM opens nothing until the next power-on: what was bound could not be \
                 tried"
            );
            return Ok(false);
        }
        // As a boot has it: nobody is asked.
        let config = setup::configuration(self.request.config)?;
        let request = test::Request {
            device: self.request.device,
            key: None,
            header: None,
            plain: None,
            separation: Strictness::default(),
            as_boot: true,
        };
        test::try_out(&config, request).map(|_| true)
    }

    /// Removes what clevis and systemd have bound, now that it is not needed. A passphrase that a person knows stays.
    fn replace(&self, tried: bool) -> Result<Vec<Binding>, Error> {
        let mut replaced = Vec::new();
        let is_taken_over = |binding: &Binding| ["clevis", "systemd-tpm2"].contains(&&*binding.kind);
        while let Some(binding) = luks2(self.request.device)?.0.bindings()?.into_iter().find(is_taken_over) {
            let (volume, _) = luks2(self.request.device)?;
            if !tried || !volume.luks().is_some_and(|luks| luks.asks_people) {
                let why =
                    if tried { "no passphrase of a person opens the volume" } else { "the new way was not tried" };
                tracing::warn!("{binding} stays: {why}");
                break;
            }
            volume.remove_binding(&binding)?;
            replaced.push(binding);
        }
        Ok(replaced)
    }

    fn bound(&self, machine: Machine, plan: Plan, key: KeyReference, already: bool) -> Result<Bound, Error> {
        let config = setup::configuration(self.request.config)?;
        let store = config.store(&key.store)?;
        let kind = stores::kind(store)?;
        let is_in_tpm = kind.needs_tpm();
        let place = if is_in_tpm { "the TPM".to_owned() } else { kind.describe() };
        let by_tpm = machine.key.filter(|_| identities::need_tpm(&store.sealing.identities));
        let needs_servers = kind.needs_network() || !container::servers_to_open(&config, store, false)?.is_empty();
        let thieves = thieves::thieves(&place, is_in_tpm, by_tpm, machine.tpm, needs_servers);
        let device = self.request.device.to_owned();
        let (lacks, replaced) = (Vec::new(), Vec::new());
        Ok(Bound { device, volume: self.uuid, key, already, plan, tried: false, lacks, replaced, thieves })
    }
}

/// Takes back what [`bind`] has made for a volume: first that the boot and the header name it, and last what may be for others, too.
pub fn unbind(path: &Path, device: &Path, no_initramfs: bool, tell: &dyn Fn(Vec<String>)) -> Result<Unbound, Error> {
    let config = or_empty(path)?;
    let (volume, uuid) = luks2(device)?;
    let _alone = (journal::claim(&config)?, rotate::claim(&config, uuid)?);
    let Some(mut journal) = journal::read(&config, uuid)? else { return Err(Error::NotBound(device.to_owned())) };
    let mut stays = Vec::new();
    if let Some(noted) = journal.key.clone() {
        require_another_way(&volume)?;
        // What the header names now: a rotation or a move has put another one in its place.
        let now = volume.reference().cloned().unwrap_or(noted);
        journal = Journal { key: Some(now.clone()), done: false, ..journal };
        journal::write(&config, uuid, &journal)?;
        if volume.reference().is_some() {
            volume.remove_token(&now)?;
        }
        stays.extend(unless_cleared(delete(&config, &now).map(|()| None))?);
    }
    journal.crypttab.as_ref().map(Entry::take_back).transpose()?;
    if let Some(name) = journal.volume.as_ref().filter(|name| config.volumes.contains_key(name)) {
        edit::without_tables(path, &[("volumes", name.as_str())])?.write()?;
    }
    let mut made = journal::made(&config)?;
    match unless_cleared(store::unmake(path, &made))? {
        Some(why) => stays.push(why),
        None => made = Made { store: None, config: false, ..made },
    }
    match store::unmake_tpm_key(path, &made)? {
        Some(why) => stays.push(why),
        None => made.tpm_key = None,
    }
    journal::note_made(&config, &made)?;
    let is_node = matches!(volume.device.identity, Identity::BlockDevice { .. });
    if let Some(maker) = Maker::here().filter(|_| is_node && !no_initramfs && journal.volume.is_none()) {
        tell(vec![format!("making the initramfs anew: {}", maker.command().join(" "))]);
        maker.make()?;
    }
    journal::remove(&config, uuid)?;
    Ok(Unbound { device: device.to_owned(), volume: uuid, key: journal.key, stays })
}

/// Why something stays. A TPM that is not the one of then, or was cleared, has nothing to be taken back.
fn unless_cleared(stays: Result<Option<String>, Error>) -> Result<Option<String>, Error> {
    match stays {
        Err(error) if error.exit() == Exit::Tpm => Ok(Some(format!("the TPM could not be asked: {}", chain(&error)))),
        stays => stays,
    }
}

/// Refuses to take the last key away: whatever else opens a keyslot is not ours.
fn require_another_way(volume: &Volume) -> Result<(), Error> {
    let Some(reference) = volume.reference() else { return Ok(()) };
    let claimed = volume.claimed_keyslots()?;
    let has_other =
        volume.luks().is_some_and(|luks| luks.keyslots.iter().any(|slot| !claimed.contains(&slot.number())));
    match has_other {
        true => Ok(()),
        false => Err(Error::LastWay { device: volume.device.path.clone(), key: reference.clone() }),
    }
}

/// Deletes a key that no header names any more.
fn delete(config: &Config, key: &KeyReference) -> Result<(), Error> {
    if !config.stores.contains_key(&key.store) {
        return Ok(());
    }
    let container = Container::open(config, &key.store, None, Use::Keys)?;
    match keys::delete(config, &container, key, true) {
        Err(Error::Unlock(unlock::Error::Store(StoreError::NotFound { .. }))) => Ok(()),
        deleted => deleted,
    }
}

/// The configuration, or what counts where there is none.
fn or_empty(path: &Path) -> Result<Config, Error> {
    match setup::configuration(path) {
        Err(ConfigError::Missing(_)) => Ok(Config::parse("", path)?),
        config => Ok(config?),
    }
}

fn luks2(device: &Path) -> Result<(Volume, Uuid), Error> {
    let volume = header::probe(device, None)?;
    match volume.luks().filter(|luks| luks.format == Format::Luks2).map(|luks| luks.uuid) {
        Some(uuid) => Ok((volume, uuid)),
        None => Err(VolumeError::NotLuks2 { path: device.to_owned() }.into()),
    }
}
