//! What the worker does to itself before it touches the key.
#![allow(unsafe_code)] // prctl(2) with an option that nix has no function for

use std::{fs, io};

use nix::{
    libc,
    sys::mman::{MlockAllFlags, mlockall},
    unistd::{chdir, setsid},
};

/// linux/prctl.h, since 5.6
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Leaves the client's session, locks all memory, now and to come, and stands last in the queue of the OOM killer.
///
/// Not dumpable it is already, as every process of ours.
pub fn confine() -> io::Result<()> {
    setsid()?;
    chdir("/")?;
    // The key schedules, and the plaintext in flight, must not be swapped; and a worker that waits for its own pages to
    // come back from a swap file on its own mapping would wait for ever.
    mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE)?;
    // Both need CAP_SYS_RESOURCE; without it the worker is no less correct.
    if let Err(error) = fs::write("/proc/self/oom_score_adj", "-1000") {
        tracing::debug!("cannot change the OOM score: {error}");
    }
    // SAFETY: PR_SET_IO_FLUSHER takes a flag and zeroes (prctl(2)).
    if unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) } != 0 {
        tracing::debug!("cannot become an I/O flusher: {}", io::Error::last_os_error());
    }
    Ok(())
}
