//! What keeps the worker's memory from the disk and from other processes, and the worker from what it does not need.
#![allow(unsafe_code)] // close_range(2) and prctl(PR_SET_IO_FLUSHER), which nix does not wrap

use std::{fs, os::fd::AsFd};

use nix::{
    libc,
    sys::{
        mman::{MlockAllFlags, mlockall},
        prctl,
        resource::{Resource, setrlimit},
        stat::{Mode, umask},
    },
    unistd::{chdir, dup2_stderr, dup2_stdin, dup2_stdout, setsid},
};

use crate::volumes::backend::BackendError;

/// linux/prctl.h, since Linux 5.6
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Closes all files but standard input, output and error: a worker lives on, and would hold pipes and locks of the
/// script that started it.
///
/// To be called before this process has opened anything itself.
pub fn close_inherited_files() {
    // SAFETY: as the worker's first step this runs in its only thread, when no value owns a descriptor above 2.
    if unsafe { libc::close_range(3, libc::c_uint::MAX, 0) } != 0 {
        tracing::debug!("close_range: {}", std::io::Error::last_os_error());
    }
}

/// Leaves the session, the working directory and the standard streams of the process that started this one.
pub fn leave_the_parent() -> Result<(), BackendError> {
    let action = "the worker cannot leave the process that started it";
    let null = fs::OpenOptions::new().read(true).write(true).open("/dev/null").map_err(BackendError::failed(action))?;
    // It fails only for the leader of a session, who has nothing to leave.
    let _ = setsid();
    // What is not for everyone says so itself; the links in /dev/disk are.
    umask(Mode::from_bits_truncate(0o022));
    chdir("/")
        .and_then(|()| dup2_stdin(null.as_fd()))
        .and_then(|()| dup2_stdout(null.as_fd()))
        .and_then(|()| dup2_stderr(null.as_fd()))
        .map_err(BackendError::failed(action))
}

/// Has all memory of this process, now and later, stay out of swap, core dumps and other processes' reach.
///
/// Nothing secret may be in this process before.
pub fn guard_memory() -> Result<(), BackendError> {
    prctl::set_dumpable(false).map_err(BackendError::failed("cannot make the worker undumpable"))?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(BackendError::failed("cannot forbid core dumps"))?;
    mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE).map_err(BackendError::failed(
        "cannot lock the worker's memory, which would keep the key from swap \
         (it needs CAP_IPC_LOCK or a high RLIMIT_MEMLOCK, 'ulimit -l')",
    ))
}

/// Where allowed: memory allocations never wait for pages that only this process can write, and the out-of-memory killer
/// looks elsewhere. Both need CAP_SYS_RESOURCE, which containers often lack.
pub fn ask_for_precedence() {
    // SAFETY: the call has integer arguments only and changes a flag of this task.
    if unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) } != 0 {
        tracing::info!("PR_SET_IO_FLUSHER: {}", std::io::Error::last_os_error());
    }
    if let Err(error) = fs::write("/proc/self/oom_score_adj", "-1000") {
        tracing::info!("oom_score_adj: {error}");
    }
}
