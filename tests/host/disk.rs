//! A disk that fails: a file in memory behind FUSE with a volatile cache, as disks have it. What was written is durable once
//! it was flushed; a power cut loses the rest. Regions of it can be made to fail.

use std::{
    ffi::OsStr,
    fs::{self, OpenOptions},
    os::fd::{AsRawFd, OwnedFd},
    path::PathBuf,
    sync::{Arc, Mutex},
    thread::JoinHandle,
    time::{Duration, UNIX_EPOCH},
};

use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, LockOwner, OpenFlags,
    ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request, Session, SessionACL, WriteFlags,
};
use nix::mount::MsFlags;
use tempfile::TempDir;

/// The disk; unplugged with the value.
pub struct Disk {
    state: Arc<Mutex<State>>,
    folder: TempDir,
    session: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct State {
    /// With what was not flushed yet.
    content: Vec<u8>,
    durable: Vec<u8>,
    flushes: u64,
    /// What reads and writes beyond this offset end with.
    failure: Option<(usize, Errno)>,
    /// Flushes fail.
    cannot_flush: bool,
}

impl Disk {
    pub fn new(bytes: usize) -> Self {
        let state = State { content: vec![0; bytes], durable: vec![0; bytes], ..State::default() };
        let state = Arc::new(Mutex::new(state));
        let folder = tempfile::Builder::new().prefix("cryptattach-disk").tempdir_in("/var/tmp").unwrap();
        let fuse = OpenOptions::new().read(true).write(true).open("/dev/fuse").unwrap();
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", fuse.as_raw_fd());
        let source = Some("disk");
        nix::mount::mount(source, folder.path(), Some("fuse.disk"), MsFlags::empty(), Some(options.as_str())).unwrap();
        let served = Served(Arc::clone(&state));
        let session = Session::from_fd(served, OwnedFd::from(fuse), SessionACL::Owner, Config::default()).unwrap();
        let session = Some(std::thread::spawn(move || session.run().unwrap()));
        Self { state, folder, session }
    }

    /// The disk as a file.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("disk")
    }

    /// All that was not flushed is lost.
    pub fn cut_power(&self) {
        let mut state = self.state.lock().unwrap();
        state.content = state.durable.clone();
    }

    /// Reads and writes behind that offset fail, or work again.
    pub fn fail_behind(&self, failure: Option<(usize, Errno)>) {
        self.state.lock().unwrap().failure = failure;
    }

    /// Flushes fail, as they do without end on a disk that was unplugged.
    pub fn fail_flushes(&self) {
        self.state.lock().unwrap().cannot_flush = true;
    }

    /// How often it was flushed.
    pub fn flushes(&self) -> u64 {
        self.state.lock().unwrap().flushes
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        nix::mount::umount2(self.folder.path(), nix::mount::MntFlags::MNT_DETACH).unwrap();
        // It ends with its last user, who may be a worker that the test has left.
        if let Some(session) = self.session.take().filter(JoinHandle::is_finished) {
            session.join().unwrap();
        }
        let _ = fs::remove_dir(self.folder.path());
    }
}

struct Served(Arc<Mutex<State>>);

const FILE: INodeNo = INodeNo(2);
const MOMENT: Duration = Duration::from_secs(1);

impl Served {
    fn attributes(&self, inode: INodeNo) -> FileAttr {
        let size = self.0.lock().unwrap().content.len() as u64;
        let (kind, perm, size) = match inode {
            FILE => (FileType::RegularFile, 0o600, size),
            _ => (FileType::Directory, 0o700, 0),
        };
        let time = UNIX_EPOCH;
        let (ino, blocks, nlink, uid, gid, rdev, blksize, flags) = (inode, size / 512, 1, 0, 0, 0, 4096, 0);
        let (atime, mtime, ctime, crtime) = (time, time, time, time);
        FileAttr { ino, size, blocks, atime, mtime, ctime, crtime, kind, perm, nlink, uid, gid, rdev, blksize, flags }
    }
}

impl Filesystem for Served {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match name == "disk" {
            true => reply.entry(&MOMENT, &self.attributes(FILE), Generation(0)),
            false => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&MOMENT, &self.attributes(inode));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        // No cache but the disk's own.
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
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
        let state = self.0.lock().unwrap();
        let start = (offset as usize).min(state.content.len());
        let end = (start + size as usize).min(state.content.len());
        match state.failure {
            Some((behind, errno)) if end > behind && i32::from(errno) != nix::libc::ENOSPC => reply.error(errno),
            _ => reply.data(&state.content[start..end]),
        }
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
        let mut state = self.0.lock().unwrap();
        let end = offset as usize + data.len();
        match state.failure {
            Some((behind, errno)) if end > behind => reply.error(errno),
            _ => {
                state.content[offset as usize..end].copy_from_slice(data);
                reply.written(data.len() as u32);
            }
        }
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let mut state = self.0.lock().unwrap();
        if state.cannot_flush {
            return reply.error(Errno::EIO);
        }
        state.durable = state.content.clone();
        state.flushes += 1;
        reply.ok();
    }
}
