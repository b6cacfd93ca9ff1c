//! What a worker writes down of its mapping, for everyone else: `/run/cryptattach/NAME/`.
//!
//! - `state.json`: what is mapped, by which process, as which loop device
//! - `export/`: the mount point of the FUSE file
//! - `control`: the worker's socket
//! - `worker.log`

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{Flock, FlockArg},
    mount::{MntFlags, umount2},
};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::loop_device::LoopDevice;
use crate::{
    backend::MappingName,
    device::{Device, DeviceKind},
};

const ROOT: &str = "/run/cryptattach";
/// Stable names of the plaintext devices.
const LINKS: &str = "/dev/disk/by-cryptattach";
const VERSION: u32 = 1;

/// What is mapped, and by whom.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    version: u32,
    pub pid: i32,
    /// Clock ticks since boot; a process id alone may have been given to another process since.
    pid_start_time: u64,
    /// The encrypted device, as the user named it but absolute.
    pub device: PathBuf,
    /// Which one that is, whatever its name.
    pub identity: Identity,
    pub volume: Option<Uuid>,
    pub key_size_bits: u32,
    pub sector_size_bytes: u32,
    pub size_bytes: u64,
    pub read_only: bool,
    pub loop_device: PathBuf,
}

/// Which device or file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Identity {
    Block(u64),
    File { device: u64, inode: u64 },
}

impl Identity {
    pub fn of(device: &Device) -> io::Result<Self> {
        Ok(match device.kind {
            DeviceKind::Block(number) => Self::Block(number),
            DeviceKind::File => {
                let metadata = fs::metadata(&device.path)?;
                Self::File { device: metadata.dev(), inode: metadata.ino() }
            }
        })
    }
}

/// The folder of one mapping.
#[derive(Clone, Debug)]
pub struct Folder {
    path: PathBuf,
    name: MappingName,
}

impl Folder {
    pub fn of(name: &MappingName) -> Self {
        Self { path: Path::new(ROOT).join(name.as_str()), name: name.clone() }
    }

    /// The names of all mappings, dead ones included.
    pub fn all() -> io::Result<Vec<MappingName>> {
        let entries = match fs::read_dir(ROOT) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let named = |entry: io::Result<fs::DirEntry>| entry.ok()?.file_name().to_str()?.parse().ok();
        let mut names: Vec<_> = entries.filter_map(named).filter(|name| Self::of(name).state().is_file()).collect();
        names.sort();
        Ok(names)
    }

    /// Setting up and taking down take turns, over all names: both look at what is there before they change it.
    pub fn lock() -> io::Result<Flock<File>> {
        DirBuilder::new().recursive(true).mode(0o700).create(ROOT)?;
        Flock::lock(File::open(ROOT)?, FlockArg::LockExclusive).map_err(|(_, errno)| errno.into())
    }

    fn state(&self) -> PathBuf {
        self.path.join("state.json")
    }

    pub fn export(&self) -> PathBuf {
        self.path.join("export")
    }

    pub fn control(&self) -> PathBuf {
        self.path.join("control")
    }

    /// The stable name of the plaintext device.
    pub fn link(&self) -> PathBuf {
        Path::new(LINKS).join(self.name.as_str())
    }

    pub fn make(&self) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(self.export())
    }

    pub fn open_log(&self) -> io::Result<File> {
        OpenOptions::new().append(true).create(true).open(self.path.join("worker.log"))
    }

    pub fn read(&self) -> io::Result<Option<State>> {
        match fs::read(self.state()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            bytes => Ok(Some(serde_json::from_slice(&bytes?)?)),
        }
    }

    /// Appears whole: whoever finds a state finds everything that it speaks of.
    pub fn write(&self, state: &State) -> io::Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(&self.path)?;
        file.write_all(&serde_json::to_vec(state)?)?;
        file.persist(self.state())?;
        Ok(())
    }

    pub fn make_link(&self, loop_device: &LoopDevice) -> io::Result<()> {
        fs::create_dir_all(LINKS)?;
        self.remove_link();
        std::os::unix::fs::symlink(loop_device.path(), self.link())
    }

    fn remove_link(&self) {
        let _ = fs::remove_file(self.link());
    }

    /// Takes away what a worker made, in the reverse order, as far as it is there. The loop device must be clear by now.
    pub fn remove(&self) -> io::Result<()> {
        self.remove_link();
        // Lazily: of a dead worker's mount nothing can be waited for.
        let _ = umount2(&self.export(), MntFlags::MNT_DETACH);
        match fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed,
        }
    }

    /// The loop device that stands for this mapping's file, if a worker that died early or late left one.
    pub fn left_loop_device(&self) -> Option<LoopDevice> {
        let file = self.export().join(super::fuse::FILE);
        let names = fs::read_dir("/sys/block").ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let loops = names.filter(|name| name.starts_with("loop"));
        loops
            .map(|name| LoopDevice::at(Path::new("/dev").join(name)))
            .find(|device| device.backing_file().as_ref() == Some(&file))
    }
}

impl State {
    /// Of this process.
    pub fn new(request: &super::protocol::Request, identity: Identity, loop_device: &LoopDevice) -> io::Result<Self> {
        let pid = nix::unistd::getpid().as_raw();
        Ok(Self {
            version: VERSION,
            pid,
            pid_start_time: start_time(pid)?,
            device: request.device.clone(),
            identity,
            volume: request.volume,
            key_size_bits: request.key_size_bits,
            sector_size_bytes: request.sector_size_bytes,
            size_bytes: request.size_bytes,
            read_only: request.read_only,
            loop_device: loop_device.path().to_owned(),
        })
    }

    /// Whether its worker lives.
    pub fn is_alive(&self) -> bool {
        start_time(self.pid).is_ok_and(|start| start == self.pid_start_time)
    }
}

/// When a process started (proc_pid_stat(5), field 22). A zombie has ended.
fn start_time(pid: i32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field is the command in parentheses, and may contain anything.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
    match (fields.first(), fields.get(19).and_then(|field| field.parse().ok())) {
        (Some(&"Z" | &"X"), _) | (_, None) => Err(io::ErrorKind::NotFound.into()),
        (_, Some(start)) => Ok(start),
    }
}
