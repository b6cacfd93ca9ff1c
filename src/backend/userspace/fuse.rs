//! The export: a FUSE file system with one file, the plaintext.

use std::{
    cell::RefCell,
    ffi::OsStr,
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use fuser::{
    BackgroundSession, BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, KernelConfig, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry,
    ReplyOpen, ReplyWrite, Request, Session, TimeOrNow, WriteFlags,
};
use nix::libc;

use super::image::{Buffer, Image};

/// Name of the file.
pub const FILE: &str = "volume";

const ROOT: INodeNo = INodeNo(1);
const VOLUME: INodeNo = INodeNo(2);
/// Nothing ever changes but the content.
const ATTRIBUTES_VALID: Duration = Duration::from_secs(3600);
const LARGEST_WRITE: u32 = 1 << 20;
/// So many I/O errors are logged; /run has little room.
const MOST_LOGGED_ERRORS: u32 = 100;

struct Export {
    image: Arc<Image>,
    read_only: bool,
    errors: AtomicU32,
}

thread_local! {
    static BUFFER: RefCell<Buffer> = RefCell::default();
}

/// Mounts the export. `source` shows in mountinfo, so that what is on the volume can be followed to its device.
pub fn mount(image: Arc<Image>, at: &Path, source: &Path, read_only: bool) -> io::Result<BackgroundSession> {
    let mut config = Config::default();
    // A comma would end the option in the kernel's eyes.
    let source = source.to_str().filter(|path| !path.contains([',', '\\'])).unwrap_or("cryptattach");
    config.mount_options = vec![
        MountOption::FSName(source.to_owned()),
        // Not MountOption::Subtype, which a direct mount drops.
        MountOption::CUSTOM("subtype=cryptattach".to_owned()),
        MountOption::NoDev,
        MountOption::NoSuid,
        MountOption::NoExec,
    ];
    config.n_threads = Some(2);
    config.clone_fd = true;
    Session::new(Export { image, read_only, errors: AtomicU32::new(0) }, at, &config)?.spawn()
}

impl Export {
    fn attributes(&self, inode: INodeNo) -> FileAttr {
        let (size, kind, perm) = match inode {
            VOLUME => (self.image.size(), FileType::RegularFile, if self.read_only { 0o400 } else { 0o600 }),
            _ => (0, FileType::Directory, 0o500),
        };
        FileAttr {
            ino: inode,
            size,
            blocks: size / 512,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }

    /// The caller gets the error's own number; the log says which device it was on.
    fn failed(&self, action: &str, at: u64, error: &io::Error) -> Errno {
        if self.errors.fetch_add(1, Ordering::Relaxed) < MOST_LOGGED_ERRORS {
            tracing::error!("cannot {action} at byte {at} of the data: {error}");
        }
        Errno::from_i32(error.raw_os_error().unwrap_or(libc::EIO))
    }
}

impl Filesystem for Export {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Each is a wish: an older kernel gives less.
        let _ = config.set_max_write(LARGEST_WRITE);
        let _ = config.set_max_readahead(LARGEST_WRITE);
        for wish in [InitFlags::FUSE_ASYNC_READ, InitFlags::FUSE_MAX_PAGES, InitFlags::FUSE_ASYNC_DIO] {
            let _ = config.add_capabilities(wish);
        }
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match (parent, name == FILE) {
            (ROOT, true) => reply.entry(&ATTRIBUTES_VALID, &self.attributes(VOLUME), Generation(0)),
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&ATTRIBUTES_VALID, &self.attributes(inode));
    }

    // The loop driver sets times when it closes the file.
    fn setattr(
        &self,
        _: &Request,
        inode: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        match size {
            Some(size) if size != self.image.size() => reply.error(Errno::EPERM),
            _ => reply.attr(&ATTRIBUTES_VALID, &self.attributes(inode)),
        }
    }

    fn open(&self, _: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let writes = flags.0 & libc::O_ACCMODE != libc::O_RDONLY;
        match inode {
            VOLUME if writes && self.read_only => reply.error(Errno::EROFS),
            // Plaintext is cached once, above the loop device, and not here again.
            VOLUME => {
                reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES)
            }
            _ => reply.error(Errno::EISDIR),
        }
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
        BUFFER.with_borrow_mut(|buffer| match self.image.read(offset, size as usize, buffer) {
            Ok(data) => reply.data(data),
            Err(error) => reply.error(self.failed("read", offset, &error)),
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
        if self.read_only {
            return reply.error(Errno::EROFS);
        }
        BUFFER.with_borrow_mut(|buffer| match self.image.write(offset, data, buffer) {
            Ok(()) => reply.written(data.len() as u32),
            Err(error) => reply.error(self.failed("write", offset, &error)),
        });
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        match self.image.flush() {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(self.failed("flush", 0, &error)),
        }
    }
}
