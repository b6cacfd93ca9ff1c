//! A process that block devices wait for, and that must not wait for them.
#![allow(unsafe_code)] // prctl(PR_SET_IO_FLUSHER), which nix does not wrap

use std::fs;

use nix::{
    libc,
    sys::mman::{MlockAllFlags, mlockall},
};

/// linux/prctl.h, since Linux 5.6
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Has all memory of this process, its program's too, stay where it is, now and later: no page of it is read from a disk again.
pub fn lock_memory() -> nix::Result<()> {
    mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE)
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
