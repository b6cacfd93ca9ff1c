//! The image as a file: a FUSE file system with nothing else in it.

use std::{
    ffi::OsStr,
    fs::{self, OpenOptions},
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use fuser::{
    BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry,
    ReplyOpen, ReplyWrite, Request, Session, SessionACL, TimeOrNow, WriteFlags,
};
use nix::{
    libc,
    mount::{MntFlags, MsFlags},
    sys::stat::minor,
    unistd::{getgid, getuid},
};

use super::{
    export::{Failures, Happening},
    image::Image,
    pool::Pool,
};
use crate::sys::{kernel_files::KernelFile, mounts, sysfs::Sysfs};

/// The file's name.
pub const FILE_NAME: &str = "volume";

/// How long the kernel may take to end a connection that nobody needs any more.
const COPY_PATIENCE: Duration = Duration::from_millis(500);

const FILE: INodeNo = INodeNo(2);

/// Nothing changes but the file's content, and its size at the kernel's own request: it need not ask again.
const FOR_EVER: Duration = Duration::from_secs(u32::MAX as u64);
const MAX_REQUEST_BYTES: u32 = 1 << 20;
/// Number of threads that take requests: while one does a request itself, the other takes the next. Each has 16 MiB of
/// locked memory for requests.
const THREADS: usize = 2;

/// The mounted file system. Unmounts on drop.
pub struct Export {
    mount_point: PathBuf,
    /// What the kernel calls the connection, if it says.
    connection: Option<u32>,
    session: Option<JoinHandle<()>>,
}

impl Export {
    /// Mounts the file system and serves it, in threads of its own, until it is unmounted. `source` is what mount(8) and
    /// /proc/self/mountinfo show as its device.
    pub fn mount<F>(
        image: Arc<Image>,
        source: &Path,
        mount_point: &Path,
        read_only: bool,
        notify: F,
    ) -> io::Result<Self>
    where
        F: Fn(Happening) + Clone + Send + Sync + 'static,
    {
        KernelFile::Fuse.require().map_err(io::Error::other)?;
        let fuse = OpenOptions::new().read(true).write(true).open("/dev/fuse")?;
        // Without `allow_other`, none but processes of this user and group can so much as look at it.
        let (fd, user, group) = (fuse.as_raw_fd(), getuid(), getgid());
        let options = format!("fd={fd},rootmode=40000,user_id={user},group_id={group},default_permissions");
        let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
        let flags = if read_only { flags | MsFlags::MS_RDONLY } else { flags };
        nix::mount::mount(Some(source), mount_point, Some("fuse.cryptattach"), flags, Some(options.as_str()))?;
        let connection = connection_of(mount_point);
        let mut export = Self { mount_point: mount_point.to_owned(), connection, session: None };

        let mut config = Config::default();
        config.n_threads = Some(THREADS);
        config.clone_fd = true;
        let released = notify.clone();
        let volume = Volume {
            served: Arc::new(Served { image, failures: Failures::default() }),
            pool: Pool::default(),
            read_only,
            released: Box::new(move || released(Happening::Released)),
        };
        let session = Session::from_fd(volume, OwnedFd::from(fuse), SessionACL::Owner, config)?;
        let serve = move || notify(Happening::Ended(session.run()));
        export.session = Some(thread::Builder::new().name("export".to_owned()).spawn(serve)?);
        Ok(export)
    }

    /// Unmounts it and waits until its last request is done. Whoever else has a copy of the mount, in another mount namespace,
    /// has nothing of it any more: the volume was let go of, and the connection ends.
    pub fn unmount(mut self) -> io::Result<()> {
        self.end()
    }

    fn end(&mut self) -> io::Result<()> {
        let Some(session) = self.session.take() else { return Ok(()) };
        match nix::mount::umount(&self.mount_point) {
            Ok(()) => {
                if !ends(&session, COPY_PATIENCE) {
                    tracing::info!("{} is mounted elsewhere, too: ending it there", self.mount_point.display());
                    self.abort();
                }
                // Otherwise it ends with this process.
                if ends(&session, COPY_PATIENCE) {
                    session.join().map_err(|_| io::Error::other("the thread that served it has panicked"))?;
                }
                Ok(())
            }
            // Someone looks at it. It goes out of sight now, and ends with this process.
            Err(nix::errno::Errno::EBUSY) => unmount_lazily(&self.mount_point),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl Export {
    /// Documentation/filesystems/fuse.rst, "Control filesystem"; it need not be mounted.
    fn abort(&self) {
        let Some(connection) = self.connection else { return };
        if let Err(error) = fs::write(format!("/sys/fs/fuse/connections/{connection}/abort"), "1") {
            tracing::debug!("cannot abort the FUSE connection {connection}: {error}");
        }
    }
}

/// The minor number of the mount, by which the control file system calls its connection. Not by looking at the mount: this
/// process would have to answer itself.
fn connection_of(mount_point: &Path) -> Option<u32> {
    let mounts = mounts::seen_by(&Sysfs::this(), "self");
    let mount = mounts.into_iter().rfind(|mount| mount.point == mount_point)?;
    u32::try_from(minor(mount.number.0)).ok()
}

fn ends(session: &JoinHandle<()>, patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
    while !session.is_finished() {
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(Duration::from_millis(2));
    }
    true
}

impl Drop for Export {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::error!("cannot unmount {}: {error}", self.mount_point.display());
        }
    }
}

/// Takes the file system out of sight, whoever uses it.
pub fn unmount_lazily(mount_point: &Path) -> io::Result<()> {
    match nix::mount::umount2(mount_point, MntFlags::MNT_DETACH) {
        // Not mounted (here).
        Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

struct Volume {
    served: Arc<Served>,
    pool: Pool,
    read_only: bool,
    released: Box<dyn Fn() + Send + Sync>,
}

/// What requests need that are done in other threads.
struct Served {
    image: Arc<Image>,
    failures: Failures,
}

impl Volume {
    fn attributes(&self, inode: INodeNo) -> Option<FileAttr> {
        let (kind, perm, size) = match inode {
            INodeNo::ROOT => (FileType::Directory, 0o500, 0),
            FILE if self.read_only => (FileType::RegularFile, 0o400, self.served.image.size()),
            FILE => (FileType::RegularFile, 0o600, self.served.image.size()),
            _ => return None,
        };
        Some(FileAttr {
            ino: inode,
            size,
            blocks: size.div_ceil(512),
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm,
            nlink: 1,
            uid: getuid().as_raw(),
            gid: getgid().as_raw(),
            rdev: 0,
            blksize: self.served.image.unit_bytes(),
            flags: 0,
        })
    }
}

impl Served {
    /// Says what went wrong, and passes it on.
    fn failed(&self, what: &str, offset: u64, length: usize, error: &io::Error) -> Errno {
        self.failures.tell(format_args!("cannot {what} {length} bytes at {offset}"), error);
        // What has no number of its own (the device ends early) is an I/O error too.
        Errno::from_i32(error.raw_os_error().unwrap_or(libc::EIO))
    }
}

impl Filesystem for Volume {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Each is an offer: what the kernel does not know or allow stays at its default.
        let _ = config.set_max_write(MAX_REQUEST_BYTES);
        let _ = config.set_max_readahead(MAX_REQUEST_BYTES);
        let _ = config.set_max_background(64);
        let _ = config.add_capabilities(InitFlags::FUSE_ASYNC_DIO);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.attributes(FILE).filter(|_| parent == INodeNo::ROOT && name == FILE_NAME) {
            Some(attributes) => reply.entry(&FOR_EVER, &attributes, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(inode) {
            Some(attributes) => reply.attr(&FOR_EVER, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    /// truncate(2): the file grows with its device, and in no other way.
    fn setattr(
        &self,
        _: &Request,
        inode: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let grown = match size.filter(|_| inode == FILE) {
            Some(size) => {
                self.served.image.grow(size).map_err(|error| Errno::from_i32(error.raw_os_error().unwrap_or(libc::EIO)))
            }
            None => Err(Errno::EPERM),
        };
        match (grown, self.attributes(inode)) {
            (Ok(()), Some(attributes)) => reply.attr(&FOR_EVER, &attributes),
            (Err(errno), _) => reply.error(errno),
            (_, None) => reply.error(Errno::ENOENT),
        }
    }

    fn readdir(&self, _: &Request, _: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let entries = [
            (INodeNo::ROOT, FileType::Directory, "."),
            (INodeNo::ROOT, FileType::Directory, ".."),
            (FILE, FileType::RegularFile, FILE_NAME),
        ];
        let skip = usize::try_from(offset).unwrap_or(usize::MAX);
        for (next, (inode, kind, name)) in (1..).zip(entries).skip(skip) {
            if reply.add(inode, next, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        // Direct: the plaintext is cached once, in the loop device, and not a second time here.
        let flags = FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
        reply.opened(FileHandle(0), flags);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let (served, length) = (Arc::clone(&self.served), size as usize);
        self.pool.run(true, move || match served.image.read_at(offset, length) {
            Ok(data) => reply.data(&data),
            Err(error) => reply.error(served.failed("read", offset, length, &error)),
        });
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let (served, length) = (Arc::clone(&self.served), data.len());
        let prepared = served.image.prepare(offset, data);
        self.pool.run(true, move || match prepared.and_then(|write| served.image.commit(write)) {
            Ok(()) => reply.written(u32::try_from(length).expect("no longer than max_write")),
            Err(error) => reply.error(served.failed("write", offset, length, &error)),
        });
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let served = Arc::clone(&self.served);
        self.pool.run(true, move || match served.image.flush() {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(served.failed("flush", 0, 0, &error)),
        });
    }

    /// Refuses discards, for they would be wrong, not just slow: the loop device asks to punch a hole for a discard and
    /// for writing zeroes alike (drivers/block/loop.c, `lo_req_*`), and a hole in the ciphertext is noise in the
    /// plaintext. Told so once, the kernel writes zeroes itself.
    fn fallocate(&self, _: &Request, _: INodeNo, _: FileHandle, _: u64, _: u64, _: i32, reply: ReplyEmpty) {
        reply.error(Errno::EOPNOTSUPP);
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        reply.ok();
        (self.released)();
    }
}
