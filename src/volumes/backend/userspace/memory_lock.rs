//! What keeps the worker's memory from the disk and from other processes, and the worker from what it does not need.
#![allow(unsafe_code)] // close_range(2), which nix does not wrap

use std::{fs, os::fd::AsFd};

use nix::{
    libc,
    sys::{
        prctl,
        resource::{Resource, setrlimit},
        stat::{Mode, umask},
    },
    unistd::{chdir, dup2_stderr, dup2_stdin, dup2_stdout, setsid},
};

use crate::{sys::precedence, volumes::backend::BackendError};

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
    precedence::lock_memory().map_err(BackendError::failed(
        "cannot lock the worker's memory, which would keep the key from swap \
         (it needs CAP_IPC_LOCK or a high RLIMIT_MEMLOCK, 'ulimit -l')",
    ))
}
