//! Locks between commands: files that only their owner can open, waited for with an end.
//!
//! A lock on what others may read would be theirs to hold: flock(2) asks for no more than an open file.

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    libc,
    sys::stat::{major, minor},
};

use super::users;

/// How long one command waits for another.
pub const PATIENCE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(20);

/// Locks the file, which is made for those who may write to its folder. After `patience` the error is `TimedOut`, and says
/// who holds the lock.
pub fn lock(path: &Path, patience: Duration) -> io::Result<Flock<File>> {
    wait(path, FlockArg::LockExclusiveNonblock, patience)
}

/// The same for one of several that only read: they do not wait for each other.
pub fn share(path: &Path, patience: Duration) -> io::Result<Flock<File>> {
    wait(path, FlockArg::LockSharedNonblock, patience)
}

/// The same for a file that is open already; `path` is its name for people. Whoever can open it can hold it.
pub fn lock_open(file: File, path: &Path, patience: Duration) -> io::Result<Flock<File>> {
    wait_for(file, path, FlockArg::LockExclusiveNonblock, patience)
}

/// Whether somebody has it, as far as the kernel says. It is not tried: whoever comes meanwhile would be refused.
pub fn is_held(path: &Path) -> bool {
    File::open(path).is_ok_and(|file| holder_of(&file).is_some())
}

fn wait(path: &Path, how: FlockArg, patience: Duration) -> io::Result<Flock<File>> {
    wait_for(open(path)?, path, how, patience)
}

fn wait_for(mut file: File, path: &Path, how: FlockArg, patience: Duration) -> io::Result<Flock<File>> {
    let deadline = Instant::now() + patience;
    loop {
        match Flock::lock(file, how) {
            Ok(lock) => return Ok(lock),
            Err((same, Errno::EWOULDBLOCK)) if Instant::now() < deadline => file = same,
            Err((file, Errno::EWOULDBLOCK)) => {
                let why = format!("{} is locked by {}", path.display(), holder(&file));
                return Err(io::Error::new(io::ErrorKind::TimedOut, why));
            }
            Err((_, errno)) => return Err(errno.into()),
        }
        thread::sleep(POLL);
    }
}

fn open(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_CLOEXEC | libc::O_NOFOLLOW);
    match options.open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        opened => return opened,
    }
    match options.clone().create_new(true).mode(0o600).open(path) {
        // Another command was faster.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => options.open(path),
        Err(error) => Err(error),
        Ok(file) => {
            let folder = fs::metadata(super::durable::folder_of(path))?;
            let writers = folder.mode() & 0o222;
            if writers & 0o022 != 0 {
                fchown(&file, None, Some(folder.gid()))?;
                file.set_permissions(Permissions::from_mode(writers | writers << 1 | 0o600))?;
            }
            Ok(file)
        }
    }
}

/// "flock (pid 412)", as far as the kernel says (proc_locks(5)).
fn holder(file: &File) -> String {
    holder_of(file).map_or_else(|| "another process".to_owned(), users::process)
}

fn holder_of(file: &File) -> Option<u32> {
    let table = fs::read_to_string("/proc/locks").unwrap_or_default();
    let metadata = file.metadata().ok()?;
    let (on, inode) = (metadata.dev(), metadata.ino());
    holder_in(&table, &format!("{:02x}:{:02x}:{inode}", major(on), minor(on)))
}

/// `1: FLOCK  ADVISORY  WRITE 412 08:01:12345 0 EOF`; lines of those who wait have `->` behind the number.
fn holder_in(table: &str, file: &str) -> Option<u32> {
    table.lines().find_map(|line| {
        let words: Vec<_> = line.split_ascii_whitespace().collect();
        let [_, "FLOCK", _, _, pid, at, ..] = words[..] else { return None };
        (at == file).then(|| pid.parse().ok()).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_waited_for_with_an_end_and_its_holder_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join(".lock");
        let held = lock(&path, PATIENCE).expect("free");
        assert_eq!(fs::metadata(&path).expect("there").mode() & 0o777, 0o600);
        assert!(is_held(&path));
        let error = lock(&path, Duration::from_millis(50)).expect_err("held");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(error.to_string().contains(&format!("(pid {})", std::process::id())), "{error}");
        drop(held);
        assert!(!is_held(&path));
        lock(&path, Duration::ZERO).expect("free again");
    }

    #[test]
    fn whoever_may_write_to_the_folder_may_lock_it_and_nobody_else() {
        let folder = tempfile::tempdir().expect("a folder");
        for (mode, expected) in [(0o755, 0o600), (0o775, 0o660), (0o770, 0o660), (0o700, 0o600)] {
            fs::set_permissions(folder.path(), Permissions::from_mode(mode)).expect("changed");
            let path = folder.path().join(format!(".{mode}"));
            drop(lock(&path, Duration::ZERO).expect("free"));
            assert_eq!(fs::metadata(&path).expect("there").mode() & 0o777, expected, "{mode:o}");
        }
    }

    #[test]
    fn reads_the_kernels_table() {
        let table = "1: POSIX  ADVISORY  WRITE 7 08:01:99 0 EOF\n2: -> FLOCK  ADVISORY  WRITE 8 08:01:99 0 EOF\n\
                     3: FLOCK  ADVISORY  WRITE 9 08:01:99 0 EOF\n";
        assert_eq!(holder_in(table, "08:01:99"), Some(9));
        assert_eq!(holder_in(table, "08:01:98"), None);
    }
}
