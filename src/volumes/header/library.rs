//! libcryptsetup's context: its messages go to our log, and its last error becomes the cause of ours.
#![allow(unsafe_code)] // the callback reads a C string

use std::{
    cell::RefCell,
    ffi::{CStr, c_char, c_int, c_void},
    fmt,
    sync::Once,
};

use libcryptsetup_rs::{LibcryptErr, consts::vals::CryptLogLevel, set_log_callback};

use crate::base::chain::printable;

thread_local! {
    static LAST_MESSAGE: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Its messages quote the header of a disk that may be anybody's: they need not be UTF-8 (libcryptsetup-rs's own macro panics
/// then), and move a terminal's cursor.
extern "C" fn log(level: c_int, message: *const c_char, _: *mut c_void) {
    // SAFETY: a NUL-terminated text that lives as long as this call.
    let message = unsafe { CStr::from_ptr(message) }.to_string_lossy();
    let message = message.trim().split('\n').map(printable).collect::<Vec<_>>().join("; ");
    match CryptLogLevel::try_from(level) {
        Ok(CryptLogLevel::Error) => {
            tracing::debug!("libcryptsetup: {message}");
            LAST_MESSAGE.set(Some(message));
        }
        Ok(CryptLogLevel::Debug | CryptLogLevel::DebugJson) => tracing::trace!("libcryptsetup: {message}"),
        _ => tracing::debug!("libcryptsetup: {message}"),
    }
}

/// What libcryptsetup said when a call failed.
#[derive(Debug)]
pub struct LibraryError {
    message: Option<String>,
    error: LibcryptErr,
}

impl LibraryError {
    /// The call's error code, if it gave one.
    pub fn errno(&self) -> Option<i32> {
        match &self.error {
            LibcryptErr::IOError(error) => error.raw_os_error(),
            _ => None,
        }
    }
}

impl fmt::Display for LibraryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.message, &self.error) {
            (Some(message), _) => write!(f, "libcryptsetup: {message}"),
            (None, LibcryptErr::IOError(error)) => write!(f, "libcryptsetup: {error}"),
            (None, error) => write!(f, "libcryptsetup: {error}"),
        }
    }
}

impl std::error::Error for LibraryError {}

/// Runs calls into libcryptsetup and keeps the message of the one that failed.
pub fn call<T>(run: impl FnOnce() -> Result<T, LibcryptErr>) -> Result<T, LibraryError> {
    static LOGGING: Once = Once::new();
    LOGGING.call_once(|| set_log_callback::<()>(Some(log), None));
    LAST_MESSAGE.set(None);
    run().map_err(|error| LibraryError { message: LAST_MESSAGE.take(), error })
}
