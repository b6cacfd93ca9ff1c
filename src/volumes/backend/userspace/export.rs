//! How users reach the plaintext: three thin fronts of one [`Image`].

use std::{
    fmt,
    fs::File,
    io,
    os::{
        fd::AsRawFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use super::{fuse, image::Image, nbd, protocol::Attach, ublk};
use crate::{sys::loop_device::LoopDevice, volumes::backend::ExportKind};

/// What happens to an export without our doing.
#[derive(Debug)]
pub enum Happening {
    /// Someone, perhaps the last user, let go of it.
    Released,
    /// It has come to its end.
    Ended(io::Result<()>),
}

/// An export that is being served, in threads of its own, until it ends or is dropped.
pub enum Export {
    /// A file, for a loop device.
    Fuse(fuse::Export),
    /// A block device.
    Ublk(ublk::Export),
    /// A socket.
    Nbd(nbd::Export),
}

impl Export {
    /// Begins to serve.
    pub fn start<F>(request: &Attach, image: Arc<Image>, notify: F) -> io::Result<Self>
    where
        F: Fn(Happening) + Clone + Send + Sync + 'static,
    {
        let (paths, name, read_only) = (&request.paths, &request.name, request.read_only);
        Ok(match request.export {
            ExportKind::Fuse => {
                Self::Fuse(fuse::Export::mount(image, &request.device, &paths.export(name), read_only, notify)?)
            }
            ExportKind::Ublk => Self::Ublk(ublk::Export::start(image, read_only, notify)?),
            ExportKind::Nbd => Self::Nbd(nbd::Export::listen(image, &paths.socket(name), read_only, notify)?),
        })
    }

    /// Ends it and waits until its last request is done; the image is then free again.
    pub fn end(self) -> io::Result<()> {
        match self {
            Self::Fuse(export) => export.unmount(),
            Self::Ublk(export) => export.end(),
            Self::Nbd(export) => export.end(),
        }
    }
}

/// The requests that failed, counted: not every one of a device that has gone is worth a line of the log.
#[derive(Default)]
pub struct Failures(AtomicU64);

impl Failures {
    /// Says what went wrong, of the first, the second, the fourth, the eighth, ...
    pub fn tell(&self, what: impl fmt::Display, error: &io::Error) {
        let count = self.0.fetch_add(1, Ordering::Relaxed) + 1;
        if count.is_power_of_two() {
            tracing::error!("{what}: {error} (failure {count})");
        }
    }
}

/// What an export looks like from outside of its worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exported {
    /// A loop device over the FUSE file.
    Loop(LoopDevice),
    /// A ublk device.
    Ublk(ublk::UblkDevice),
    /// A Unix socket that speaks NBD.
    Socket(PathBuf),
}

impl Exported {
    /// The device's node or the socket.
    pub fn path(&self) -> PathBuf {
        match self {
            Self::Loop(device) => device.path(),
            Self::Ublk(device) => device.path(),
            Self::Socket(path) => path.clone(),
        }
    }
}

/// As `UnixListener::bind`, for paths of any length: the kernel's addresses have 108 bytes.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    through_its_folder(path, |short| UnixListener::bind(short))
}

/// As `UnixStream::connect`, for paths of any length.
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    through_its_folder(path, |short| UnixStream::connect(short))
}

fn through_its_folder<T>(path: &Path, open: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let folder = File::open(folder)?;
    open(&Path::new("/proc/self/fd").join(folder.as_raw_fd().to_string()).join(name))
}

/// Where an NBD client finds the socket. What a URI does not allow in its query is escaped (RFC 3986 section 3.4).
pub fn nbd_uri(socket: &Path) -> String {
    let path = socket.to_string_lossy();
    let escaped: String = path
        .chars()
        .map(|c| match c {
            'A'..='Z' | 'a'..='z' | '0'..='9' | '/' | '-' | '.' | '_' | '~' | ':' | '@' => c.to_string(),
            c => c.to_string().bytes().map(|byte| format!("%{byte:02X}")).collect(),
        })
        .collect();
    format!("nbd+unix:///?socket={escaped}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_are_escaped() {
        let uri = nbd_uri(Path::new("/run/cryptattach/a#1+b=c/nbd.sock"));
        assert_eq!(uri, "nbd+unix:///?socket=/run/cryptattach/a%231%2Bb%3Dc/nbd.sock");
    }

    #[test]
    fn sockets_may_have_long_paths() {
        let folder = tempfile::tempdir().unwrap();
        let long = folder.path().join("x".repeat(120));
        std::fs::create_dir(&long).unwrap();
        let path = long.join("nbd.sock");
        assert!(UnixListener::bind(&path).is_err());
        let listener = bind(&path).unwrap();
        connect(&path).unwrap();
        listener.accept().unwrap();
    }
}
