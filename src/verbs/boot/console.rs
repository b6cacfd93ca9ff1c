//! The log's way to the console while a boot runs. What the stores and the TPM warn of is told by the boot, as one of its own
//! lines: in its record, in the kernel's log, and not where a person is typing.

use std::{
    io::{self, Write},
    sync::{Mutex, PoisonError, mpsc::Sender},
};

use super::Report;

/// The boot that runs in this process.
static BOOT: Mutex<Option<Sender<Report>>> = Mutex::new(None);

/// From now on lines of the log are for this boot; with `None` for standard error again.
pub fn tell(boot: Option<Sender<Report>>) {
    *BOOT.lock().unwrap_or_else(PoisonError::into_inner) = boot;
}

/// Where the log writes one event to.
#[derive(Default)]
pub struct Console(Vec<u8>);

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let text = String::from_utf8_lossy(&self.0);
        match &*BOOT.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(boot) => {
                let _ = boot.send(Report::Logged(text.trim().to_owned()));
            }
            None => {
                let _ = io::stderr().write_all(&self.0);
            }
        }
    }
}
