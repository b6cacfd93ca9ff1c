//! What the kernel's command line says to systemd-cryptsetup, and so to us (systemd-cryptsetup-generator(8)).

use std::fs;

use crate::config::{DeviceSpec, crypttab::Entry};

/// The words that are about LUKS.
#[derive(Debug, PartialEq, Eq)]
pub struct CommandLine {
    /// `luks=no`: nothing is to be attached.
    pub luks: bool,
    /// `luks.crypttab=no`: crypttab does not count.
    pub crypttab: bool,
    volumes: Vec<Volume>,
    /// Options of volumes that have none of their own.
    options: String,
}

/// What is said of one volume.
#[derive(Debug, Default, PartialEq, Eq)]
struct Volume {
    uuid: String,
    /// It is to be attached, and not only described.
    listed: bool,
    name: Option<String>,
    device: Option<String>,
    options: Option<String>,
}

/// Where the words are read.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// In an initramfs: those with `rd.`, too.
    Initrd,
    /// In the system.
    System,
}

impl CommandLine {
    /// That of this boot.
    pub fn read(stage: Stage) -> Self {
        Self::parse(&fs::read_to_string("/proc/cmdline").unwrap_or_default(), stage)
    }

    /// Of what is said twice the last holds.
    pub fn parse(text: &str, stage: Stage) -> Self {
        let mut said = Self { luks: true, crypttab: true, volumes: Vec::new(), options: String::new() };
        for word in words(text) {
            let (key, value) = word.split_once('=').map_or((&*word, None), |(key, value)| (key, Some(value)));
            let key = match key.strip_prefix("rd.") {
                Some(_) if stage == Stage::System => continue,
                Some(key) => key,
                None => key,
            };
            let of_uuid = value.and_then(|value| value.split_once('=')).filter(|(uuid, _)| is_uuid(uuid));
            match (key, value, of_uuid) {
                ("luks", value, _) => said.luks = boolean(&word, value).unwrap_or(said.luks),
                ("luks.crypttab", value, _) => said.crypttab = boolean(&word, value).unwrap_or(said.crypttab),
                ("luks.uuid", Some(uuid), _) if is_uuid(uuid.strip_prefix("luks-").unwrap_or(uuid)) => {
                    said.volume(uuid.strip_prefix("luks-").unwrap_or(uuid)).listed = true;
                }
                ("luks.name", _, Some((uuid, name))) => {
                    let volume = said.volume(uuid);
                    (volume.listed, volume.name) = (true, Some(name.to_owned()));
                }
                ("luks.data", _, Some((uuid, device))) => said.volume(uuid).device = Some(device.to_owned()),
                ("luks.options", _, Some((uuid, options))) => said.volume(uuid).options = Some(options.to_owned()),
                ("luks.options", Some(options), None) => said.options = options.to_owned(),
                ("luks.uuid" | "luks.name" | "luks.data", ..) => {
                    tracing::warn!("'{word}' on the kernel's command line is not understood, and ignored");
                }
                _ => {}
            }
        }
        said
    }

    fn volume(&mut self, uuid: &str) -> &mut Volume {
        let known = self.volumes.iter().position(|volume| volume.uuid.eq_ignore_ascii_case(uuid));
        let at = known.unwrap_or_else(|| {
            self.volumes.push(Volume { uuid: uuid.to_owned(), ..Volume::default() });
            self.volumes.len() - 1
        });
        &mut self.volumes[at]
    }

    /// Whether it lists volumes. Then those of crypttab that it does not list are not attached.
    pub fn lists(&self) -> bool {
        self.volumes.iter().any(|volume| volume.listed)
    }

    /// Whether it lists the volume of this entry.
    pub fn has(&self, entry: &Entry) -> bool {
        self.volumes.iter().any(|volume| volume.listed && volume.is(entry))
    }

    /// An entry of crypttab with the options that it says instead.
    pub fn amend(&self, entry: Entry) -> Entry {
        match self.volumes.iter().find(|volume| volume.is(&entry)).and_then(|volume| volume.options.as_ref()) {
            Some(options) => entry.with_options(options),
            None => entry,
        }
    }

    /// The volumes that it lists, as entries.
    pub fn entries(&self) -> Vec<Entry> {
        let entry = |volume: &Volume| {
            let by_uuid = format!("UUID={}", volume.uuid);
            let name = volume.name.clone().unwrap_or_else(|| format!("luks-{}", volume.uuid));
            let device = volume.device.as_ref().unwrap_or(&by_uuid).parse::<DeviceSpec>();
            let device = device.map_err(|error| {
                tracing::warn!("the kernel's command line lists {name}, which is left to the system: {error}");
            });
            Some(Entry::new(name, device.ok()?, volume.options.as_ref().unwrap_or(&self.options)))
        };
        self.volumes.iter().filter(|volume| volume.listed).filter_map(entry).collect()
    }

    /// The options of volumes that nothing else describes.
    pub fn options(&self) -> &str {
        &self.options
    }
}

impl Volume {
    fn is(&self, entry: &Entry) -> bool {
        let of_data = || self.device.as_ref().and_then(|device| device.parse::<DeviceSpec>().ok());
        let by_uuid = format!("UUID={}", self.uuid).parse::<DeviceSpec>().ok();
        by_uuid.into_iter().chain(of_data()).any(|device| device.path() == entry.device.path())
    }
}

fn is_uuid(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|letter| letter.is_ascii_hexdigit() || letter == b'-')
}

/// systemd's words for yes and no; without a value it is yes.
fn boolean(word: &str, value: Option<&str>) -> Option<bool> {
    match value.map(str::to_ascii_lowercase).as_deref() {
        None | Some("1" | "yes" | "y" | "true" | "t" | "on") => Some(true),
        Some("0" | "no" | "n" | "false" | "f" | "off") => Some(false),
        Some(_) => {
            tracing::warn!("'{word}' on the kernel's command line is neither yes nor no, and ignored");
            None
        }
    }
}

/// The words, without the quotes that blanks are written in; the kernel knows double ones, systemd single ones as well.
fn words(text: &str) -> Vec<String> {
    let (mut words, mut word, mut quote) = (Vec::new(), String::new(), None);
    for letter in text.chars() {
        match (letter, quote) {
            (letter, Some(open)) if letter == open => quote = None,
            ('"' | '\'', None) => quote = Some(letter),
            (letter, None) if letter.is_ascii_whitespace() => words.push(std::mem::take(&mut word)),
            (letter, _) => word.push(letter),
        }
    }
    words.push(word);
    words.retain(|word| !word.is_empty());
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str) -> Vec<String> {
        CommandLine::parse(text, Stage::Initrd).entries().into_iter().map(|entry| entry.name).collect()
    }

    #[test]
    fn lists_volumes_by_name_and_by_uuid() {
        assert_eq!(
            names("quiet rd.luks.name=aa-bb=root rd.luks.uuid=luks-aa-bb rd.luks.uuid=cc rd.luks=1"),
            ["root", "luks-cc"]
        );
        assert_eq!(names("luks.name=aa=root luks.uuid=bb"), ["root", "luks-bb"], "for the initramfs, too");
        assert_eq!(names("luks.uuid=AA luks.name=aa=root"), ["root"]);
        assert!(names("luks.name=root luks.uuid=xyz luks.data=aa=/dev/vdb luks.options=aa=discard").is_empty());
    }

    #[test]
    fn what_is_off_is_off_and_the_last_word_holds() {
        let luks = |text| CommandLine::parse(text, Stage::Initrd).luks;
        assert!(["", "luks", "luks=yes", "luks=no rd.luks=1", "luks=maybe"].into_iter().all(luks));
        assert!(
            ["luks=no", "rd.luks=0", "rd.luks=off", "luks=yes luks=\"no\"", "luks=FALSE"]
                .into_iter()
                .all(|text| !luks(text))
        );
        assert!(CommandLine::parse("rd.luks=no rd.luks.crypttab=no", Stage::System).luks);
        assert!(!CommandLine::parse("rd.luks.crypttab=no", Stage::Initrd).crypttab);
    }

    #[test]
    fn options_are_of_one_volume_or_of_those_without() {
        let said = CommandLine::parse(
            "luks.uuid=aa rd.luks.uuid=bb \"rd.luks.options=aa=read-only,header=/boot/my header\" luks.options='discard,nofail'",
            Stage::Initrd,
        );
        let entries = said.entries();
        assert!(entries[0].has(&["read-only"]) && !entries[0].has(&["discard"]));
        assert_eq!(entries[0].header(), Some("/boot/my header".as_ref()));
        assert!(entries[1].has(&["discard"]) && entries[1].has(&["nofail"]) && !entries[1].has(&["read-only"]));
        let data = CommandLine::parse("luks.name=aa=root luks.data=aa=/dev/vdb", Stage::Initrd).entries();
        assert_eq!(data[0].device.path(), "/dev/vdb");
    }
}
