//! What belongs into an initramfs for this machine's configuration: the hooks of initramfs-tools and dracut ask, and copy.
//!
//! An initramfs rests where anybody who has the disk can read it. So no private key goes into it unless the configuration
//! says so, and then only if it does not rest on the disk of a volume that it opens.

use std::{
    cell::OnceCell,
    collections::BTreeSet,
    env, fmt, fs,
    path::{Path, PathBuf},
};

use super::{Planned, Which, plan};
use crate::{
    base::{
        chain::chain,
        key::{self, KeyReference, Place, StoreName},
    },
    config::{Config, IMAGES, IdentitySpec, SeparationLevel, SeparationPolicy, StoreConfig},
    keys::{
        seal::{identities, leaves::Takes},
        store,
    },
    unlock::{self, pins::Pins},
    verbs::error::Error,
    volumes::{
        header::{self, Volume},
        separation::{self, Inventory, Surroundings},
    },
};

/// What dm-crypt takes for aes-xts-plain64, and libcryptsetup for keyslots; on another architecture some are not known.
const CRYPT_MODULES: [&str; 6] = ["dm_crypt", "xts", "ecb", "aes_generic", "aesni_intel", "algif_skcipher"];

/// Something that an image needs.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// A program, with its libraries.
    Program(PathBuf),
    /// A file.
    File(PathBuf),
    /// A library that is loaded by name when it is needed, with those that it needs.
    Library(PathBuf),
    /// A kernel module, if the kernel has it as a module.
    Module(String),
    /// A program that configures the network before the boot.
    Network,
}

/// As a hook reads it: a word and a name.
impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Program(path) => write!(f, "program {}", path.display()),
            Self::File(path) => write!(f, "file {}", path.display()),
            Self::Library(path) => write!(f, "library {}", path.display()),
            Self::Module(name) => write!(f, "module {name}"),
            Self::Network => f.write_str("network"),
        }
    }
}

/// What an image needs, and what is kept out of it although something in the image would use it.
#[derive(Debug, Default)]
pub struct Image {
    /// What belongs into it.
    pub parts: BTreeSet<Part>,
    /// What does not, and why.
    pub kept_out: Vec<KeptOut>,
    /// It has an identity or a store that needs the TPM.
    uses_tpm: bool,
}

/// A file that stays out.
#[derive(Debug)]
pub struct KeptOut {
    pub path: PathBuf,
    pub why: String,
}

impl std::error::Error for KeptOut {}

impl fmt::Display for KeptOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is not put into the initramfs: {}", self.path.display(), self.why)
    }
}

/// What an image for this configuration needs, if it has this crypttab: nothing, if the boot has nothing to attach.
pub fn image(config: &Config, crypttab: Option<&str>) -> Result<Image, Error> {
    let planned = plan(config, crypttab, Which::Later);
    let mut image = Image::default();
    if planned.is_empty() {
        return Ok(image);
    }
    let volumes = Seen::all(&planned);
    let stores = stores(config, &volumes);
    let program = env::current_exe().map_err(Error::io("find this program's file"))?;
    image.parts.insert(Part::Program(program));
    image.parts.extend(CRYPT_MODULES.iter().map(|name| Part::Module((*name).to_owned())));
    image.file(config, &config.path);
    for file in
        planned.iter().filter_map(|planned| planned.header.as_deref()).chain(config.separation.inventory.as_deref())
    {
        image.file(config, file);
    }
    for mount in &config.boot.mounts {
        image.parts.extend(file_system_modules(&mount.kind).into_iter().map(Part::Module));
    }
    for name in &stores {
        image.store(config, name, config.store(name)?, &volumes)?;
    }
    image.pins(config, &volumes)?;
    image.lockbox(config, &volumes)?;
    image.tpm(config, &volumes)?;
    if needs_network_for(config, &stores)? {
        image.parts.extend(network_modules().into_iter().map(Part::Module).chain([Part::Network]));
    }
    Ok(image)
}

/// Whether a store that this very boot may ask is reached over the network. Of a later boot, [`image`] tells.
pub fn needs_network(config: &Config, crypttab: Option<&str>) -> Result<bool, Error> {
    needs_network_for(config, &stores(config, &Seen::all(&plan(config, crypttab, Which::This))))
}

fn needs_network_for(config: &Config, stores: &BTreeSet<StoreName>) -> Result<bool, Error> {
    if stores.is_empty() {
        return Ok(false);
    }
    for name in stores.iter().chain(config.lockbox.as_ref().map(|lockbox| &lockbox.store)) {
        let store = config.store(name)?;
        if !store::kind(store)?.servers()?.is_empty()
            || !unlock::container::servers_to_open(config, store, false)?.is_empty()
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The stores that the boot may ask: those of the volumes' keys, or all while a volume's header cannot be read.
fn stores(config: &Config, volumes: &[Seen<'_>]) -> BTreeSet<StoreName> {
    let of = |volume: &Seen<'_>| -> Vec<StoreName> {
        match volume.keys() {
            Some(keys) => keys.into_iter().map(|key| key.store).collect(),
            None => config.stores.keys().cloned().collect(),
        }
    };
    volumes.iter().flat_map(of).filter(|name| config.stores.contains_key(name)).collect()
}

/// A planned volume as it is seen now. Its header is read once.
struct Seen<'p> {
    planned: &'p Planned,
    header: OnceCell<Option<Volume>>,
}

impl<'p> Seen<'p> {
    fn all(planned: &'p [Planned]) -> Vec<Self> {
        planned.iter().map(|planned| Self { planned, header: OnceCell::new() }).collect()
    }

    fn header(&self) -> Option<&Volume> {
        let probe = || header::find_to_map(self.planned.device.path(), self.planned.header.as_deref(), None).ok();
        self.header.get_or_init(probe).as_ref()
    }

    /// Its keys, both of them in the middle of a rotation; `None` while its header cannot be read.
    fn keys(&self) -> Option<Vec<KeyReference>> {
        let both = self.header().map(|volume| {
            let rest = volume.rest.as_ref().map(|rest| &*rest.volume);
            [Some(volume), rest].into_iter().flatten().filter_map(Volume::reference).cloned().collect::<Vec<_>>()
        });
        match (&self.planned.keys[..], both) {
            ([], both) => both,
            (planned, Some(both)) if both.len() > 1 => Some([planned, &both].concat()),
            (planned, _) => Some(planned.to_vec()),
        }
    }
}

impl Image {
    /// Whether the image has the file at this place.
    pub fn has(&self, place: &Place) -> bool {
        matches!(&place.at, key::Location::Path(path) if self.parts.contains(&Part::File(path.clone())))
    }

    /// A file, unless it is on a file system that the boot mounts.
    fn file(&mut self, config: &Config, path: &Path) {
        if config.boot.mount_of(path).is_none() {
            self.parts.insert(Part::File(path.to_owned()));
        }
    }

    fn store(
        &mut self,
        config: &Config,
        name: &StoreName,
        store: &StoreConfig,
        volumes: &[Seen<'_>],
    ) -> Result<(), Error> {
        // What logs in to Barbican is given keys that open volumes.
        let kind = store::kind(store)?;
        self.uses_tpm |= kind.needs_tpm();
        let releases = kind.may_keep_unsealed_keys() && !store.sealing.seals();
        let (logins, opens) = unlock::container::logins(store)?;
        for file in kind.files()?.into_iter().filter(|file| !logins.contains(file)) {
            let is_secret = releases && !is_public(&file);
            self.secret_or_file(config, &file, is_secret, "a log-in there releases unsealed keys", volumes)?;
        }
        for file in &logins {
            let what = "any machine in the network opens the container with it";
            self.secret_or_file(config, file, opens, what, volumes)?;
        }
        for identity in &store.sealing.identities {
            self.identity(config, identity, volumes)?;
        }
        for file in unlock::container::public_keys(store)? {
            self.file(config, &file);
        }
        for takes in unlock::container::taken_by_leaves(store)? {
            self.leaf(config, takes, volumes)?;
        }
        // What this host has seen of the store, so that the store cannot show the boot something older.
        for folder in ["generations", "containers"] {
            for file in files_below(&config.state.join(folder).join(name.as_str())) {
                self.file(config, &file);
            }
        }
        Ok(())
    }

    /// What a leaf of a policy is asked with.
    fn leaf(&mut self, config: &Config, takes: Takes, volumes: &[Seen<'_>]) -> Result<(), Error> {
        self.parts.extend(takes.programs.into_iter().map(Part::Program));
        self.parts.extend(takes.libraries.into_iter().map(Part::Library));
        takes.files.iter().flat_map(|path| files_below(path)).for_each(|file| self.file(config, &file));
        for (path, what) in takes.secrets {
            // What is not there yet is named by itself.
            let files = if path.is_dir() { files_below(&path) } else { vec![path] };
            for file in files {
                self.secret_or_file(config, &file, true, what, volumes)?;
            }
        }
        Ok(())
    }

    /// The volumes that this host has opened before: the boot opens no others in their place.
    fn pins(&mut self, config: &Config, volumes: &[Seen<'_>]) -> Result<(), Error> {
        for volume in volumes.iter().filter_map(|volume| volume.header()?.uuid()) {
            let pin = Pins::of(config).take_over(volume).map_err(unlock::Error::from)?;
            pin.into_iter().for_each(|file| self.file(config, &file));
        }
        Ok(())
    }

    fn identity(&mut self, config: &Config, spec: &IdentitySpec, volumes: &[Seen<'_>]) -> Result<(), Error> {
        let kind = identities::kind(spec);
        kind.check()?;
        self.uses_tpm |= kind.needs_tpm();
        for path in kind.files() {
            let what = "it is a private key that any machine can use";
            self.secret_or_file(config, path, kind.is_secret(), what, volumes)?;
        }
        Ok(())
    }

    /// What opens the lockbox, what this host remembers of it, and its entries for the volumes of the boot.
    fn lockbox(&mut self, config: &Config, volumes: &[Seen<'_>]) -> Result<(), Error> {
        let Some(lockbox) = &config.lockbox else { return Ok(()) };
        for identity in &lockbox.identities {
            self.identity(config, identity, volumes)?;
        }
        self.parts.extend(
            files_below(&config.state.join("host").join(format!("{}.json", lockbox.host))).into_iter().map(Part::File),
        );
        // Sealed, but of use to whoever has this host: they are not to rest on the disk of what they open.
        let copy = lockbox.offline.then(|| lockbox.offline_copy(&config.state));
        let entries = volumes.iter().filter_map(Seen::keys).flatten().flat_map(|key| {
            files_below(&lockbox.path.join(key.store.as_str())).into_iter().filter(move |path| {
                path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&key.key.to_string()))
            })
        });
        for path in entries.chain(copy.filter(|path| path.exists())) {
            if config.boot.mount_of(&path).is_some() {
                continue;
            }
            match shares_disk(config, volumes)? {
                None => self.file(config, &path),
                Some(why) => self.kept_out.push(KeptOut { path, why: format!("it helps to open a volume, and {why}") }),
            }
        }
        Ok(())
    }

    /// What the TPM takes: its driver, the library that talks to it, and the files of the policy.
    fn tpm(&mut self, config: &Config, volumes: &[Seen<'_>]) -> Result<(), Error> {
        if !self.uses_tpm {
            return Ok(());
        }
        let tcti = config.tpm.tcti();
        let name = tcti.split(':').next().unwrap_or_default();
        self.parts.extend(library(&format!("libtss2-tcti-{name}.so.0")).map(Part::Library));
        self.parts.extend(tpm_modules().into_iter().map(Part::Module));
        for file in config.tpm.signatures.iter().chain(&config.tpm.site_key) {
            if file.exists() && !file.starts_with("/run") {
                self.file(config, file);
            }
        }
        if let Some(pin) = &config.tpm.pin {
            self.secret_or_file(config, pin, true, "it is the PIN of this host's key", volumes)?;
        }
        Ok(())
    }

    fn secret_or_file(
        &mut self,
        config: &Config,
        path: &Path,
        is_secret: bool,
        what: &str,
        volumes: &[Seen<'_>],
    ) -> Result<(), Error> {
        if !is_secret || config.boot.mount_of(path).is_some() {
            self.file(config, path);
            return Ok(());
        }
        let keep_out = |why| KeptOut { path: path.to_owned(), why };
        if !config.boot.secrets_in_image {
            let why = format!("{what} ('secrets_in_image' in [boot] would put it there)");
            self.kept_out.push(keep_out(why));
        } else if let Some(why) = shares_disk(config, volumes)? {
            self.kept_out.push(keep_out(format!("{what}, and {why}")));
        } else {
            self.file(config, path);
        }
        Ok(())
    }
}

/// Whether images rest on the disk of a volume, in words.
fn shares_disk(config: &Config, volumes: &[Seen<'_>]) -> Result<Option<String>, Error> {
    let places = [Place::path("the initramfs", IMAGES, true)];
    let inventory = Inventory::of(&config.separation)?;
    let surroundings = Surroundings { target: None, inventory: &inventory, level: SeparationLevel::Device };
    for Seen { planned, .. } in volumes {
        let report = separation::check(planned.device.path(), planned.header.as_deref(), &places, &surroundings);
        if let Err(refusal) = report.judge(SeparationPolicy::Warn) {
            return Ok(Some(chain(&refusal)));
        }
    }
    Ok(None)
}

/// Certificates hide nothing.
fn is_public(path: &Path) -> bool {
    fs::read_to_string(path)
        .is_ok_and(|pem| pem.contains("-----BEGIN CERTIFICATE-----") && !pem.contains("PRIVATE KEY"))
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    if folder.is_file() {
        return vec![folder.to_owned()];
    }
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.flat_map(|entry| files_below(&entry.path())).collect()
}

/// The modules of a file system; vfat's names are decoded by others (Debian's defaults).
fn file_system_modules(kind: &str) -> Vec<String> {
    let others: &[&str] = if kind == "vfat" { &["nls_cp437", "nls_ascii", "nls_utf8"] } else { &[] };
    [kind].iter().chain(others).map(|name| (*name).to_owned()).collect()
}

/// A library beside those of libtss2 that this process has loaded.
fn library(name: &str) -> Option<PathBuf> {
    let maps = fs::read_to_string("/proc/self/maps").ok()?;
    let tss = maps.lines().find_map(|line| line.split_once('/').filter(|(_, path)| path.contains("libtss2-")))?;
    let path = Path::new("/").join(tss.1).with_file_name(name);
    path.exists().then_some(path)
}

/// The modules that drive this machine's TPM; the usual ones where none is seen.
fn tpm_modules() -> BTreeSet<String> {
    let found = driver_modules("/sys/class/tpm");
    if found.is_empty() { ["tpm_tis", "tpm_crb"].map(str::to_owned).into() } else { found }
}

/// The modules that drive this machine's network interfaces, and the buses that they are on.
fn network_modules() -> BTreeSet<String> {
    driver_modules("/sys/class/net")
}

fn driver_modules(class: &str) -> BTreeSet<String> {
    let interfaces = fs::read_dir(class).into_iter().flatten().flatten();
    let devices = interfaces.filter_map(|interface| fs::canonicalize(interface.path().join("device")).ok());
    let drivers = devices.flat_map(|device| {
        let above: Vec<PathBuf> =
            device.ancestors().take_while(|path| path.starts_with("/sys/devices")).map(Into::into).collect();
        above.into_iter().filter_map(|device| fs::canonicalize(device.join("driver/module")).ok())
    });
    drivers.filter_map(|module| Some(module.file_name()?.to_str()?.to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(folder: &Path, boot: &str) -> Config {
        let path = folder.join("c.toml");
        fs::write(folder.join("owner.key"), "-----BEGIN PRIVATE KEY-----\n").unwrap();
        fs::write(folder.join("tpm.key"), "-----BEGIN TSS2 PRIVATE KEY-----\n").unwrap();
        let store = "type = 'directory'\nowner = 'o.pem'\nno_escrow = true\n";
        fs::write(
            &path,
            format!(
                "[stores.a]\n{store}path = '/mnt/keys/a'\nidentities = ['owner.key', 'tpm:tpm.key']\n\
                 [stores.b]\n{store}path = '/mnt/keys/b'\nidentities = ['/mnt/keys/b.key']\n[boot]\n{boot}\n\
                 [[boot.volumes]]\nname = 'root'\ndevice = '/dev/null'\n\
                 keys = ['a/3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de', 'b/3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de']\n\
                 [[boot.mounts]]\ndevice = 'LABEL=keys'\nat = '/mnt/keys'\ntype = 'vfat'\n"
            ),
        )
        .unwrap();
        Config::read(&path).unwrap()
    }

    #[test]
    fn keeps_private_keys_out_unless_told_otherwise() {
        let folder = tempfile::tempdir().unwrap();
        let has = |image: &Image, name: &str| image.parts.contains(&Part::File(folder.path().join(name)));
        let without = image(&config(folder.path(), ""), None).unwrap();
        assert!(has(&without, "c.toml") && has(&without, "tpm.key") && !has(&without, "owner.key"));
        assert_eq!(without.kept_out.len(), 1, "the key on the mounted file system is no matter of the image");
        assert!(without.kept_out[0].to_string().contains("owner.key is not put into the initramfs"));
        let with = image(&config(folder.path(), "secrets_in_image = true"), None).unwrap();
        assert!(has(&with, "owner.key") && with.kept_out.is_empty());
        assert!(with.parts.contains(&Part::Module("nls_cp437".to_owned())));
    }

    #[test]
    fn keys_in_the_tpm_need_its_driver_and_no_network() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.toml");
        let config = |kind: &str| {
            let store = format!("[stores.a]\ntype = {kind}\nowner = 'o.pem'\nno_escrow = true\n");
            let volume = "[[boot.volumes]]\nname = 'root'\ndevice = '/dev/null'\n\
                          keys = ['a/3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de']\n";
            fs::write(&path, store + volume).unwrap();
            Config::read(&path).unwrap()
        };
        let with_tpm = |config: &Config| {
            let image = image(config, None).unwrap();
            tpm_modules().into_iter().all(|module| image.parts.contains(&Part::Module(module)))
        };
        let (chip, directory) = (config("'tpm-nv'"), config("'directory'\npath = 'a'"));
        assert!(with_tpm(&chip) && !with_tpm(&directory));
        assert!(!needs_network(&chip, None).unwrap());
    }

    #[test]
    fn a_leaf_that_asks_a_server_needs_the_network() {
        let folder = tempfile::tempdir().unwrap();
        let of = |opens: &str| {
            let config = config(folder.path(), "");
            let text = fs::read_to_string(&config.path).unwrap() + "[leaves.t]\ntang = 'http://10.0.0.5'\n";
            let section = text.find("[stores.").unwrap();
            let line = section + text[section..].find('\n').unwrap() + 1;
            let text = format!("{}opens = '{opens}'\n{}", &text[..line], &text[line..]);
            let config = Config::parse(&text, &config.path).unwrap();
            let has_owner = || image(&config, None).unwrap().parts.contains(&Part::File(folder.path().join("o.pem")));
            assert!(has_owner(), "it tells whether this host opens the policy by itself");
            let needs = image(&config, None).unwrap().parts.contains(&Part::Network);
            assert_eq!(needs, needs_network(&config, None).unwrap(), "this boot is as the next one");
            needs
        };
        assert!(of("any(hosts, t)") && !of("any(owner, hosts)"));
    }

    #[test]
    fn a_directory_needs_no_network() {
        let folder = tempfile::tempdir().unwrap();
        assert!(!needs_network(&config(folder.path(), ""), None).unwrap());
    }
}
