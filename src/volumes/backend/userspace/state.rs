//! What is written down of a mapping, so that a later command finds it: `state.json` in the mapping's directory.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{export::Exported, paths::Paths, protocol::Attach, ublk::UblkDevice};
use crate::{
    base::mapping_name::MappingName,
    sys::{device::Identity, loop_device::LoopDevice},
    volumes::backend::{BackendError, ExportKind},
};

/// Version of `state.json`.
const VERSION: u32 = 1;

/// One mapping, as its worker wrote it down.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    version: u32,
    pub name: MappingName,
    pub worker: Process,
    /// The encrypted device or file, as it was named.
    pub device: PathBuf,
    /// Which device or file that was, whatever it is called now.
    pub identity: Identity,
    /// UUID of the volume's header.
    pub volume: Option<Uuid>,
    /// Size of the volume key.
    pub key_size_bits: u32,
    /// Encryption sector size.
    pub sector_size_bytes: u32,
    /// Size of the plaintext.
    pub size_bytes: u64,
    /// No writes.
    pub read_only: bool,
    /// How users reach the plaintext.
    #[serde(default)]
    pub export: ExportKind,
    /// The plaintext device of a FUSE export, once there is one.
    pub loop_device: Option<LoopDevice>,
    /// The plaintext device of a ublk export, once there is one.
    #[serde(default)]
    pub ublk_device: Option<UblkDevice>,
    /// It ends when its last user goes. Loop devices know that themselves.
    #[serde(default)]
    pub going: bool,
    /// Why the worker ended without doing all that it should.
    pub fault: Option<String>,
}

impl State {
    /// The state at the begin of an attach, written by the worker itself.
    pub fn begin(request: &Attach) -> io::Result<Self> {
        Ok(Self {
            version: VERSION,
            name: request.name.clone(),
            worker: Process::this()?,
            device: request.device.clone(),
            identity: request.identity,
            volume: request.volume,
            key_size_bits: request.key_size_bits,
            sector_size_bytes: request.sector_size_bytes,
            size_bytes: request.size_bytes,
            read_only: request.read_only,
            export: request.export,
            loop_device: None,
            ublk_device: None,
            going: false,
            fault: None,
        })
    }

    /// Makes the mapping's directory with this state in it, at once: there is never a directory without a state.
    pub fn create(&self, paths: &Paths) -> io::Result<()> {
        let new = tempfile::Builder::new()
            .prefix(&format!(".{}.", self.name))
            .permissions(fs::Permissions::from_mode(0o700))
            .tempdir_in(&paths.state)?;
        fs::create_dir(new.path().join("export"))?;
        self.write(new.path())?;
        fs::rename(new.path(), paths.directory(&self.name))?;
        // The directory has gone from its first path; nothing is left there to be removed.
        let _ = new.keep();
        Ok(())
    }

    /// Writes a new state over the old one.
    pub fn update(&self, paths: &Paths) -> io::Result<()> {
        self.write(&paths.directory(&self.name))
    }

    fn write(&self, directory: &Path) -> io::Result<()> {
        // Renamed into place and so read whole or not at all. No fsync: /run does not outlive the machine's run.
        let mut file = tempfile::NamedTempFile::new_in(directory)?;
        serde_json::to_writer_pretty(&mut file, self)?;
        file.persist(directory.join("state.json")).map(drop).map_err(|error| error.error)
    }

    /// Reads the state of a mapping, if there is one.
    pub fn load(paths: &Paths, name: &MappingName) -> Result<Option<Self>, BackendError> {
        let path = paths.directory(name).join("state.json");
        let action = format!("cannot read {}", path.display());
        match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(BackendError::failed(action)(error)),
            Ok(json) => Self::parse(&json, &path, action).map(Some),
        }
    }

    /// The version is looked at first: another one may have other members.
    fn parse(json: &[u8], path: &Path, action: String) -> Result<Self, BackendError> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        match serde_json::from_slice(json) {
            Ok(Versioned { version: VERSION }) => serde_json::from_slice(json).map_err(BackendError::failed(action)),
            Ok(Versioned { version }) => {
                Err(BackendError::OtherVersion { path: path.to_owned(), version, ours: VERSION })
            }
            Err(error) => Err(BackendError::failed(action)(error)),
        }
    }

    /// What users reach the plaintext by, as long as it is there.
    pub fn exported(&self, paths: &Paths) -> Option<Exported> {
        match self.export {
            ExportKind::Fuse => self.bound_loop_device(paths).map(Exported::Loop),
            ExportKind::Ublk => self.ublk_device.filter(|device| device.path().exists()).map(Exported::Ublk),
            ExportKind::Nbd => Some(paths.socket(&self.name)).filter(|path| path.exists()).map(Exported::Socket),
        }
    }

    /// The loop device, as long as the mapping's file is what it shows.
    pub fn bound_loop_device(&self, paths: &Paths) -> Option<LoopDevice> {
        let file = paths.file(&self.name);
        match self.loop_device {
            Some(device) => device.shows(&file).then_some(device),
            None => LoopDevice::showing(&file),
        }
    }
}

/// A process, told from a later one of the same number by its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Process {
    pub pid: u32,
    start_ticks: u64,
}

impl Process {
    fn this() -> io::Result<Self> {
        let pid = std::process::id();
        let (_, start_ticks) = look(pid).ok_or_else(|| io::Error::other("cannot read /proc/self/stat"))?;
        Ok(Self { pid, start_ticks })
    }

    /// Whether it still runs. One that has ended and waits for its parent has closed all its files: it does not count.
    pub fn is_alive(&self) -> bool {
        look(self.pid)
            .is_some_and(|(state, start_ticks)| start_ticks == self.start_ticks && !matches!(state, 'Z' | 'X'))
    }
}

/// A process's state letter and start time, the fields 3 and 22 of proc_pid_stat(5).
fn look(pid: u32) -> Option<(char, u64)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command's name, field 2, is in parentheses and may contain any character.
    let mut fields = stat[stat.rfind(')')? + 1..].split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_living_processes() {
        let me = Process::this().unwrap();
        assert!(me.is_alive());
        assert!(!Process { start_ticks: me.start_ticks + 1, ..me }.is_alive());
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let (_, start_ticks) = look(child.id()).unwrap();
        let ended = Process { pid: child.id(), start_ticks };
        for _ in 0..500 {
            if !ended.is_alive() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        assert!(!ended.is_alive(), "a zombie counts as dead");
        child.wait().unwrap();
    }

    #[test]
    fn is_written_and_read_back() {
        let root = tempfile::tempdir().unwrap();
        let paths = Paths { state: root.path().into(), links: root.path().join("links") };
        let name: MappingName = "data".parse().unwrap();
        assert!(State::load(&paths, &name).unwrap().is_none());
        let request = Attach {
            name: name.clone(),
            paths: paths.clone(),
            device: "/dev/vdb".into(),
            identity: Identity::BlockDevice { number: 7, sequence: Some(1) },
            volume: Some(Uuid::nil()),
            export: ExportKind::Ublk,
            read_only: true,
            allow_discards: false,
            key_size_bits: 512,
            sector_size_bytes: 4096,
            data_offset_bytes: 0,
            size_bytes: 1 << 30,
            iv_offset_sectors: 0,
            midway: None,
        };
        let state = State::begin(&request).unwrap();
        state.create(&paths).unwrap();
        assert!(state.create(&paths).is_err(), "the name is taken");
        let read = State::load(&paths, &name).unwrap().unwrap();
        assert_eq!((read.identity, read.worker, read.size_bytes), (state.identity, state.worker, 1 << 30));
        assert_eq!(paths.names().unwrap(), std::slice::from_ref(&name));
        let file = paths.directory(&name).join("state.json");
        let mut of_another: serde_json::Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        (of_another["version"], of_another["more"]) = (2.into(), "what only version 2 has".into());
        fs::write(&file, of_another.to_string()).unwrap();
        let error = State::load(&paths, &name).unwrap_err();
        assert!(matches!(error, BackendError::OtherVersion { version: 2, ours: 1, .. }), "{error}");
        paths.remove_directory(&name).unwrap();
        assert!(paths.names().unwrap().is_empty());
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0, "nothing is left");
    }
}
