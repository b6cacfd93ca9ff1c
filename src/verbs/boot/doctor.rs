//! The doctor: holds an image against what this machine's configuration needs.

use std::{
    collections::BTreeSet,
    fmt, fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use serde::Serialize;

use super::{
    BootError,
    image::{self, Part},
    initrd::{Contents, Entry, Initrd},
};
use crate::{config::Config, verbs::error::Error};

/// What the doctor says of one thing.
#[derive(Debug, Serialize)]
pub struct Finding {
    /// The thing.
    pub what: String,
    /// How it is.
    pub is: Health,
    /// Why that matters, if it is not well.
    pub why: Option<String>,
}

/// How something in an image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Health {
    /// As it should be.
    Well,
    /// Not there.
    Missing,
    /// Not the one that this machine has.
    Outdated,
    /// There, and should not be.
    Misplaced,
}

impl Finding {
    /// Whether nothing is to be done.
    pub fn is_well(&self) -> bool {
        self.is == Health::Well
    }

    fn new(what: impl Into<String>, is: Health, why: Option<&str>) -> Self {
        Self { what: what.into(), is, why: why.map(str::to_owned) }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is = match self.is {
            Health::Well => "well",
            Health::Missing => "MISSING",
            Health::Outdated => "OUTDATED",
            Health::Misplaced => "MISPLACED",
        };
        write!(f, "{is:<10} {}", self.what)?;
        self.why.iter().try_for_each(|why| write!(f, ": {why}"))
    }
}

/// Holds an image against the configuration.
pub fn examine(config: &Config, path: &Path) -> Result<Vec<Finding>, Error> {
    let failed = |source| BootError::Image { path: path.to_owned(), source };
    let initrd = Initrd::read(path).map_err(failed)?;
    let crypttab = initrd.crypttab();
    let wanted = image::image(config, crypttab)?;
    if wanted.parts.is_empty() {
        return Ok(vec![Finding::new(
            "nothing to attach: neither [[boot.volumes]] nor the image's crypttab names a volume",
            Health::Well,
            None,
        )]);
    }
    let mut findings: Vec<Finding> = wanted.parts.iter().map(|part| examine_part(&initrd, part)).collect();
    findings.extend(libraries().iter().map(|library| examine_file(&initrd, "library", library)));
    findings.push(one_of(&initrd, "what starts it", &STARTS, "nothing calls cryptattach"));
    findings.push(one_of(&initrd, "a program that asks for a passphrase", &ASKS, "a person could not help"));
    if image::needs_network(config, crypttab)? {
        findings.push(one_of(&initrd, "what configures the network", &NETWORKS, "no store would be reached"));
    }
    findings.extend(wanted.kept_out.iter().map(|kept_out| {
        Finding::new(format!("file {}", kept_out.path.display()), Health::Missing, Some(&kept_out.why))
    }));
    findings.extend(secrets(&initrd, &wanted.parts));
    let mode = fs::metadata(path).map_err(failed)?.permissions().mode();
    if mode & 0o004 != 0 {
        let why = "everybody on this machine can read it, credentials included (UMASK=0077 in initramfs.conf; dracut keeps the mode of the file that it replaces: chmod 600)";
        findings.push(Finding::new(format!("the image's mode {:o}", mode & 0o777), Health::Misplaced, Some(why)));
    }
    Ok(findings)
}

/// What calls us: initramfs-tools' script, or the unit of dracut and others.
const STARTS: [&str; 2] = ["/scripts/local-top/cryptattach", "/usr/lib/systemd/system/cryptattach-boot.service"];
const ASKS: [&str; 2] = ["/lib/cryptsetup/askpass", "/usr/bin/systemd-ask-password"];
const NETWORKS: [&str; 5] = [
    "/bin/ipconfig",
    "/usr/bin/ipconfig",
    "/usr/lib/systemd/systemd-networkd",
    "/usr/sbin/NetworkManager",
    "/usr/sbin/dhclient",
];

fn one_of(initrd: &Initrd, what: &str, paths: &[&str], why: &str) -> Finding {
    match paths.iter().find(|path| initrd.find(Path::new(path)).is_some()) {
        Some(path) => Finding::new(format!("{what} ({path})"), Health::Well, None),
        None => Finding::new(what, Health::Missing, Some(why)),
    }
}

fn examine_part(initrd: &Initrd, part: &Part) -> Finding {
    match part {
        Part::Program(path) => examine_file(initrd, "program", path),
        Part::File(path) => examine_file(initrd, "file", path),
        Part::Library(path) => examine_file(initrd, "library", path),
        Part::Module(name) => {
            let is = if has_module(initrd, name) { Health::Well } else { Health::Missing };
            Finding::new(part.to_string(), is, (is != Health::Well).then_some("the kernel cannot load it"))
        }
    }
}

fn examine_file(initrd: &Initrd, kind: &str, path: &Path) -> Finding {
    let what = format!("{kind} {}", path.display());
    let Ok(bytes) = fs::read(path) else {
        return Finding::new(what, Health::Missing, Some("this machine does not have it either"));
    };
    match initrd.find(path) {
        Some(Entry::File(contents)) if contents.digest == Contents::of(&bytes).digest => {
            Finding::new(what, Health::Well, None)
        }
        Some(Entry::File(_)) => Finding::new(what, Health::Outdated, Some("this machine has another one now")),
        _ => Finding::new(what, Health::Missing, None),
    }
}

/// Whether the image has a module, or its kernel none of that name: then it is built in, or of another architecture.
fn has_module(initrd: &Initrd, name: &str) -> bool {
    // "kernel/drivers/net/virtio_net.ko.xz: ..."; `-` and `_` are one (kmod, modules.dep(5)).
    let is = |path: &str| {
        let file = path.rsplit('/').next().unwrap_or(path);
        file.split_once(".ko").is_some_and(|(stem, _)| stem.replace('-', "_") == name.replace('-', "_"))
    };
    let lists = initrd.files().filter(|(path, _)| path.file_name().is_some_and(|name| name == "modules.dep"));
    let known = lists.filter_map(|(path, _)| fs::read_to_string(Path::new("/").join(path)).ok());
    initrd.files().any(|(path, _)| path.to_str().is_some_and(is))
        || !known.into_iter().any(|list| list.lines().filter_map(|line| line.split(':').next()).any(is))
}

/// The libraries of this very process: it is the program that goes into the image. Not OpenSSL's module of outdated algorithms,
/// which libcryptsetup has loaded if it is there, and does without.
fn libraries() -> BTreeSet<PathBuf> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let paths = maps.lines().filter_map(|line| line.split_once('/').map(|(_, path)| format!("/{path}")));
    paths.filter(|path| path.contains(".so") && !path.contains("/ossl-modules/")).map(PathBuf::from).collect()
}

/// Private keys that nothing has put there on purpose.
fn secrets(initrd: &Initrd, wanted: &BTreeSet<Part>) -> Vec<Finding> {
    let keys = initrd.files().filter(|(_, contents)| contents.private_key).map(|(path, _)| Path::new("/").join(path));
    let misplaced = keys.filter(|path| !wanted.contains(&Part::File(path.clone())));
    let why = "it is a private key, and whoever has the disk can read the image";
    misplaced.map(|path| Finding::new(format!("file {}", path.display()), Health::Misplaced, Some(why))).collect()
}
