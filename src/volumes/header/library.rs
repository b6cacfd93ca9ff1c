//! libcryptsetup's context: its messages go to our log, and its last error becomes the cause of ours. Its version is in there.
#![allow(unsafe_code)] // the callback reads a C string

use std::{
    cell::RefCell,
    ffi::{CStr, c_char, c_int, c_void},
    fmt,
    path::Path,
    sync::{Once, OnceLock},
};

use libcryptsetup_rs::{
    CryptInit, LibcryptErr,
    consts::vals::{CryptDebugLevel, CryptLogLevel, EncryptionFormat},
    set_debug_level, set_log_callback,
};

use crate::base::chain::printable;

thread_local! {
    static LAST_MESSAGE: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// What it says of itself, once, when it is first used.
static VERSION: OnceLock<String> = OnceLock::new();

/// Its version, "2.6.1"; it has to look at a device for that. No call tells it, and its soname is the same for 2.7.0 and 2.7.5.
pub fn version(device: &Path) -> Option<&'static str> {
    if VERSION.get().is_none() {
        let load = || CryptInit::init(device)?.context_handle().load::<()>(Some(EncryptionFormat::Luks2), None);
        // Whether there is a volume is another question.
        let _ = call(load);
    }
    VERSION.get().map(String::as_str)
}

/// `Crypto backend (...) initialized in cryptsetup library version 2.6.1.` (lib/setup.c, init_crypto)
fn version_in(message: &str) -> Option<&str> {
    let (_, version) = message.split_once("initialized in cryptsetup library version ")?;
    version.split_ascii_whitespace().next().map(|version| version.trim_end_matches('.'))
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
        Ok(CryptLogLevel::Debug | CryptLogLevel::DebugJson) => {
            if let Some(version) = version_in(&message) {
                VERSION.get_or_init(|| version.to_owned());
            }
            tracing::trace!("libcryptsetup: {message}");
        }
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
    static KNOWN: Once = Once::new();
    LOGGING.call_once(|| {
        set_log_callback::<()>(Some(log), None);
        set_debug_level(CryptDebugLevel::All);
    });
    LAST_MESSAGE.set(None);
    let ran = run();
    if VERSION.get().is_some() {
        KNOWN.call_once(|| set_debug_level(CryptDebugLevel::None));
    }
    ran.map_err(|error| LibraryError { message: LAST_MESSAGE.take(), error })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_says_its_version_when_it_is_first_used() {
        let said = "Crypto backend (OpenSSL 3.0.17 1 Jul 2025) initialized in cryptsetup library version 2.7.0.";
        assert_eq!(version_in(said), Some("2.7.0"));
        assert_eq!(version_in("Kernel version 6.1.0 x86_64."), None);
        let file = tempfile::NamedTempFile::new().unwrap();
        let numbers: Vec<_> = version(file.path()).unwrap().split('.').map(str::parse::<u32>).collect();
        assert!(numbers.len() >= 2 && numbers.iter().all(Result::is_ok), "{numbers:?}");
    }
}
