//! What a boot needs besides the key: that it knows the volume, and an initramfs that has all of it.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::{
    config::{Config, crypttab},
    sys::{durable, programs},
    verbs::{
        boot::doctor::{self, Finding},
        error::Error,
    },
};

/// Making the images of all kernels takes minutes.
const LONGEST: Duration = Duration::from_secs(1800);

/// What makes the initramfs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Maker {
    InitramfsTools,
    Dracut,
}

impl Maker {
    /// The one that is installed.
    pub fn here() -> Option<Self> {
        let is_there =
            |name: &str| ["/usr/sbin", "/usr/bin"].iter().any(|folder| Path::new(folder).join(name).exists());
        [Self::InitramfsTools, Self::Dracut].into_iter().find(|maker| is_there(maker.command()[0]))
    }

    /// Makes the images of all kernels: any of them may boot next.
    pub fn command(self) -> &'static [&'static str] {
        match self {
            Self::InitramfsTools => &["update-initramfs", "-u", "-k", "all"],
            Self::Dracut => &["dracut", "--force", "--regenerate-all"],
        }
    }

    /// The option of crypttab that has a volume opened in the initramfs: Debian's crypttab(5), and systemd's.
    fn option(self) -> &'static str {
        match self {
            Self::InitramfsTools => "initramfs",
            Self::Dracut => "x-initrd.attach",
        }
    }

    /// Makes them.
    pub fn make(self) -> Result<(), Error> {
        let [program, arguments @ ..] = self.command() else { return Ok(()) };
        let failed = || Error::io(format!("make the initramfs anew by '{}'", self.command().join(" ")));
        let said = programs::output_of(programs::bare(program).args(arguments), LONGEST).map_err(failed())?;
        if !said.status.success() {
            let words = String::from_utf8_lossy(&said.stderr).trim().lines().last().unwrap_or_default().to_owned();
            return Err(failed()(io::Error::other(format!("it ended with {}: {words}", said.status))));
        }
        Ok(())
    }

    /// Makes them; what the one for the kernel that runs lacks.
    pub fn make_checked(self, config: &Config) -> Result<Vec<Finding>, Error> {
        self.make()?;
        let Some(image) = image().filter(|image| image.exists()) else { return Ok(Vec::new()) };
        let findings = doctor::examine(config, &image, None)?;
        Ok(findings.into_iter().filter(|finding| !finding.is_well()).collect())
    }
}

/// Where Debian has the image of the kernel that runs.
fn image() -> Option<PathBuf> {
    let kernel = nix::sys::utsname::uname().ok()?.release().to_str()?.to_owned();
    Some(Path::new(crate::config::IMAGES).join(format!("initrd.img-{kernel}")))
}

/// A line of crypttab that was added or changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// `None`: there was none.
    pub before: Option<String>,
    pub after: String,
}

impl Entry {
    /// The line with which the initramfs opens a volume; `None` if crypttab has it. `new` begins a line of its own.
    pub fn wanted(
        text: &str,
        is_it: &dyn Fn(&crypttab::Entry) -> bool,
        new: &str,
        maker: Option<Maker>,
    ) -> Option<Self> {
        // Another maker's image is made by hand, and systemd is what it mostly has.
        let option = maker.unwrap_or(Maker::Dracut).option();
        let found = |line: &&str| crypttab::parse(line).first().is_some_and(is_it);
        let Some(line) = text.lines().find(found) else {
            return Some(Self { before: None, after: format!("{new} none luks,nofail,{option}") });
        };
        if crypttab::parse(line).first().is_some_and(|entry| entry.has(&[option])) {
            return None;
        }
        let mut fields = line.split_ascii_whitespace();
        let mut field = |default| fields.next().unwrap_or(default);
        let (name, device, key, options) = (field(""), field(""), field("none"), field("luks"));
        let after = format!("{name} {device} {key} {options},{option}");
        Some(Self { before: Some(line.to_owned()), after })
    }

    /// Writes it; one that is there is left.
    pub fn set(&self) -> Result<(), Error> {
        rewrite(|text| match &self.before {
            _ if has(text, &self.after) => None,
            Some(before) => Some(exchanged(text, before, Some(&self.after))),
            None if text.is_empty() || text.ends_with('\n') => Some(format!("{text}{}\n", self.after)),
            None => Some(format!("{text}\n{}\n", self.after)),
        })
    }

    /// Takes it back; a line that somebody has changed since stays.
    pub fn take_back(&self) -> Result<(), Error> {
        rewrite(|text| has(text, &self.after).then(|| exchanged(text, &self.after, self.before.as_deref())))
    }
}

fn has(text: &str, line: &str) -> bool {
    text.lines().any(|other| other == line)
}

fn exchanged(text: &str, old: &str, new: Option<&str>) -> String {
    let line = |line: &str| match line == old {
        true => new.map(|new| format!("{new}\n")),
        false => Some(format!("{line}\n")),
    };
    text.lines().filter_map(line).collect()
}

/// The file's lines, each byte a character, so that they go back as they were: a comment may be Latin-1. `None` if there is none.
pub fn crypttab_text() -> Result<Option<String>, Error> {
    match fs::read(crypttab::PATH) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io(format!("read {}", crypttab::PATH))(error)),
        Ok(bytes) => Ok(Some(bytes.into_iter().map(char::from).collect())),
    }
}

fn rewrite(change: impl FnOnce(&str) -> Option<String>) -> Result<(), Error> {
    let text = crypttab_text()?;
    let Some(changed) = change(text.as_deref().unwrap_or_default()) else { return Ok(()) };
    let bytes: Vec<u8> = changed.chars().filter_map(|byte| u8::try_from(byte).ok()).collect();
    let path = Path::new(crypttab::PATH);
    let written = match text {
        None => durable::create(path, &bytes),
        Some(_) => durable::replace_content(path, &bytes),
    };
    written.map_err(Error::io(format!("write {}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# mine\nroot UUID=aa none luks,discard\ndata\tUUID=bb\n";

    fn wanted(device: &str, maker: Option<Maker>) -> Option<Entry> {
        Entry::wanted(TEXT, &|entry| entry.device.to_string() == device, "x UUID=cc", maker)
    }

    #[test]
    fn a_volume_is_opened_in_the_initramfs_by_the_option_of_its_maker() {
        let added = wanted("UUID=cc", Some(Maker::InitramfsTools)).unwrap();
        assert_eq!(added, Entry { before: None, after: "x UUID=cc none luks,nofail,initramfs".to_owned() });
        let changed = wanted("UUID=bb", None).unwrap();
        assert_eq!(changed.before.as_deref(), Some("data\tUUID=bb"));
        assert_eq!(changed.after, "data UUID=bb none luks,x-initrd.attach");
        let text = exchanged(TEXT, "data\tUUID=bb", Some(&changed.after));
        let is_it = |entry: &crypttab::Entry| entry.device.to_string() == "UUID=bb";
        assert_eq!(Entry::wanted(&text, &is_it, "", Some(Maker::Dracut)), None, "it is there");
        assert_eq!(exchanged(&text, &changed.after, changed.before.as_deref()), TEXT, "and it is taken back");
        assert_eq!(exchanged(TEXT, "data\tUUID=bb", None), "# mine\nroot UUID=aa none luks,discard\n");
    }
}
