//! The end of this process.
#![allow(unsafe_code)] // _exit(2)

use std::io::{self, Write};

/// Ends the process while its threads may still run. What exit(3) calls at the end frees what libcrypto's users in other
/// threads still read, so nothing of that is called.
pub fn leave(code: u8) -> ! {
    let _ = io::stdout().flush();
    let _ = io::stderr().flush();
    // SAFETY: it takes any number, and does not return.
    unsafe { nix::libc::_exit(code.into()) }
}
