//! libcryptsetup's context: its messages go to our log, and its last error becomes the cause of ours.
#![allow(unsafe_code)] // the callback that libcryptsetup-rs's macro makes reads a C string

use std::{cell::RefCell, fmt, sync::Once};

use libcryptsetup_rs::{LibcryptErr, c_logging_callback, consts::vals::CryptLogLevel, set_log_callback};

thread_local! {
    static LAST_MESSAGE: RefCell<Option<String>> = const { RefCell::new(None) };
}

fn log(level: CryptLogLevel, message: &str, _: Option<&mut ()>) {
    match level {
        CryptLogLevel::Error => {
            tracing::debug!("libcryptsetup: {message}");
            LAST_MESSAGE.set(Some(message.to_owned()));
        }
        CryptLogLevel::Debug | CryptLogLevel::DebugJson => tracing::trace!("libcryptsetup: {message}"),
        _ => tracing::debug!("libcryptsetup: {message}"),
    }
}

c_logging_callback!(log_from_c, (), log);

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
    LOGGING.call_once(|| set_log_callback::<()>(Some(log_from_c), None));
    LAST_MESSAGE.set(None);
    run().map_err(|error| LibraryError { message: LAST_MESSAGE.take(), error })
}
