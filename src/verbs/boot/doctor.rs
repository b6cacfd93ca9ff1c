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
    image::{self, Image, Part},
    initrd::Initrd,
    latch,
};
use crate::{
    config::Config,
    keys::seal::{identities, leaves},
    verbs::error::Error,
};

/// What the doctor says of one thing.
#[derive(Debug, Serialize)]
pub struct Finding {
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
    /// The image is fit without it, and the machine is better off with it.
    Advised,
}

impl Finding {
    /// Whether nothing has to be done.
    pub fn is_well(&self) -> bool {
        matches!(self.is, Health::Well | Health::Advised)
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
            Health::Advised => "ADVISED",
        };
        write!(f, "{is:<10} {}", self.what)?;
        self.why.iter().try_for_each(|why| write!(f, ": {why}"))
    }
}

/// Compares an image with what the configuration needs, if the image has this crypttab; else the machine's.
pub fn examine(config: &Config, path: &Path, crypttab: Option<&str>) -> Result<Vec<Finding>, Error> {
    let failed = |source| BootError::Image { path: path.to_owned(), source };
    let initrd = Initrd::list(path).map_err(failed)?;
    // initramfs-tools leaves it empty in an image that opens no volume.
    let is_empty = initrd.find(Path::new("/cryptroot/crypttab")) == Some(Some(0));
    let crypttab = crypttab.or(is_empty.then_some(""));
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
    findings.push(one_of(&initrd, "a script that starts cryptattach", &STARTS, "nothing calls cryptattach"));
    findings.push(one_of(&initrd, "a program that asks for a passphrase", &ASKS, "a person could not help"));
    findings.extend(wanted.kept_out.iter().map(|kept_out| {
        let is = if initrd.find(&kept_out.path).is_some() { Health::Misplaced } else { Health::Missing };
        Finding::new(format!("file {}", kept_out.path.display()), is, Some(&kept_out.why))
    }));
    findings.extend(misplaced(config, &initrd, &wanted));
    findings.extend(outdated(config));
    if latch::identity(config).is_some() {
        let is_systemd = initrd.find(Path::new(STARTS[1])).is_some();
        let command_line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
        findings.extend(advice(&command_line, is_systemd));
    }
    let mode = fs::metadata(path).map_err(failed)?.permissions().mode();
    if mode & 0o004 != 0 {
        let why = "everybody on this machine can read it, credentials included (set UMASK=0077 in initramfs.conf; dracut keeps the mode of the file that it replaces: chmod 600)";
        findings.push(Finding::new(format!("the image's mode {:o}", mode & 0o777), Health::Misplaced, Some(why)));
    }
    Ok(findings)
}

/// What calls us: initramfs-tools' script, the unit of dracut and mkinitcpio, or mkinitcpio's hook where it has no systemd.
const STARTS: [&str; 3] =
    ["/scripts/local-top/cryptattach", "/usr/lib/systemd/system/cryptattach-boot.service", "/hooks/cryptattach"];
/// The last is mkinitcpio's own, which asks after us.
const ASKS: [&str; 3] = ["/lib/cryptsetup/askpass", "/usr/bin/systemd-ask-password", "/hooks/encrypt"];
const NETWORKS: [&str; 5] = [
    "/bin/ipconfig",
    "/usr/bin/ipconfig",
    "/usr/lib/systemd/systemd-networkd",
    "/usr/sbin/NetworkManager",
    "/usr/sbin/dhclient",
];

/// Servers of leaves that have newer keys than those that this host seals to, if they can be asked now.
fn outdated(config: &Config) -> Vec<Finding> {
    let of = |(name, leaf)| {
        let kind = leaves::kind(name, leaf, config.network).ok()?;
        let pinned = kind.pin(&config.state)?.pinned()?;
        Some((name, kind, pinned))
    };
    let kinds: Vec<_> = config.leaves.iter().filter_map(of).collect();
    let pinned: Vec<_> = kinds.iter().map(|(name, kind, kid)| (*name, &**kind, kid.clone())).collect();
    let why = "its server has new keys; before the old ones are deleted there: 'cryptattach leaf pin', then 'cryptattach container rotate'";
    let outdated = leaves::outdated(&pinned).into_iter();
    outdated.map(|name| Finding::new(format!("leaf {name}"), Health::Advised, Some(why))).collect()
}

/// What is missing on the kernel's command line of a machine whose TPM opens its keys.
fn advice(command_line: &str, is_systemd: bool) -> Vec<Finding> {
    let words: Vec<&str> = command_line.split_whitespace().collect();
    // initramfs-tools(7), dracut.cmdline(7)
    let no_shell = if is_systemd { "rd.shell=0" } else { "panic=" };
    let has_shell = !words.iter().any(|word| word.starts_with(no_shell));
    let by_tag = words.iter().find(|word| {
        word.strip_prefix("root=").is_some_and(|root| root.contains('=') || root.starts_with("/dev/disk/by-"))
    });
    let shell = has_shell.then(|| {
        let why = "without it an initramfs that does not find its root gives a shell to whoever sits there";
        Finding::new(format!("{no_shell} on the kernel's command line"), Health::Advised, Some(why))
    });
    let root = by_tag.map(|root| {
        let why = format!("instead of {root}, which any disk can claim to be, beside this host's own");
        Finding::new("root=/dev/mapper/NAME on the kernel's command line", Health::Advised, Some(&why))
    });
    shell.into_iter().chain(root).collect()
}

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
        Part::Network => {
            one_of(initrd, "a program that configures the network", &NETWORKS, "no store could be reached")
        }
        Part::Module(name) => {
            let is = if has_module(initrd, name) { Health::Well } else { Health::Missing };
            Finding::new(part.to_string(), is, (is != Health::Well).then_some("the kernel cannot load it"))
        }
    }
}

fn examine_file(initrd: &Initrd, kind: &str, path: &Path) -> Finding {
    let what = format!("{kind} {}", path.display());
    let Ok(here) = fs::metadata(path) else {
        return Finding::new(what, Health::Missing, Some("this machine does not have it either"));
    };
    match initrd.find(path) {
        None => Finding::new(what, Health::Missing, None),
        Some(Some(bytes)) if bytes != here.len() => {
            Finding::new(what, Health::Outdated, Some("this machine's file has another size"))
        }
        Some(_) => Finding::new(what, Health::Well, None),
    }
}

/// Whether the image has a module, or its kernel none of that name: then it is built in, or of another architecture.
fn has_module(initrd: &Initrd, name: &str) -> bool {
    // "kernel/drivers/net/virtio_net.ko.xz: ..."; `-` and `_` are one (kmod, modules.dep(5)).
    let is = |path: &str| {
        let file = path.rsplit('/').next().unwrap_or(path);
        file.split_once(".ko").is_some_and(|(stem, _)| stem.replace('-', "_") == name.replace('-', "_"))
    };
    let lists = initrd.files().filter(|path| path.file_name().is_some_and(|name| name == "modules.dep"));
    let known = lists.filter_map(|path| fs::read_to_string(Path::new("/").join(path)).ok());
    initrd.files().any(|path| path.to_str().is_some_and(is))
        || !known.into_iter().any(|list| list.lines().filter_map(|line| line.split(':').next()).any(is))
}

/// The libraries of this very process: it is the program that goes into the image. Not OpenSSL's module of outdated algorithms,
/// which libcryptsetup loads if it is there, but does not need.
fn libraries() -> BTreeSet<PathBuf> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let paths = maps.lines().filter_map(|line| line.split_once('/').map(|(_, path)| format!("/{path}")));
    // What libcryptsetup loads where it finds a token is for others, and no boot of ours needs it.
    let is_needed = |path: &String| !["/ossl-modules/", "/libcryptsetup-token-"].iter().any(|part| path.contains(part));
    paths.filter(|path| path.contains(".so") && is_needed(path)).map(PathBuf::from).collect()
}

/// The configuration's private keys that are in the image, although no boot needs them there. They are known by their paths: what
/// is in other files is not looked at.
fn misplaced(config: &Config, initrd: &Initrd, wanted: &Image) -> Vec<Finding> {
    let of_stores = config.stores.values().flat_map(|store| &store.sealing.identities);
    let specs = of_stores.chain(config.lockbox.iter().flat_map(|lockbox| &lockbox.identities));
    let secret: BTreeSet<_> =
        identities::files(specs.filter(|spec| identities::kind(spec).is_secret())).into_iter().collect();
    let is_known = |path: &Path| {
        wanted.parts.contains(&Part::File(path.to_owned())) || wanted.kept_out.iter().any(|kept| kept.path == path)
    };
    let keys = secret.iter().filter(|path| initrd.find(path).is_some());
    let why = "it is a private key, and whoever has the disk can read the image";
    keys.filter(|path| !is_known(path))
        .map(|path| Finding::new(format!("file {}", path.display()), Health::Misplaced, Some(why)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_bound_to_its_tpm_is_advised_to_give_no_shell_and_to_name_its_root() {
        let advised = |command_line, is_systemd| {
            advice(command_line, is_systemd).iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        let missing = |found: &[String], word: &str| matches!(found, [only] if only.starts_with(word));
        assert!(advised("quiet root=/dev/mapper/root panic=10", false).is_empty());
        assert!(advised("quiet root=/dev/mapper/root rd.shell=0", true).is_empty());
        assert!(missing(&advised("quiet root=/dev/mapper/root", false), "ADVISED    panic= on"));
        assert!(missing(&advised("quiet panic=10", true), "ADVISED    rd.shell=0 on"));
        let by_tag = "ADVISED    root=/dev/mapper/NAME on the kernel's command line: instead of root=UUID=ab,";
        assert!(missing(&advised("root=UUID=ab panic=10", false), by_tag));
        assert!(advice("quiet", false)[0].is_well(), "the image is fit all the same");
    }
}
