//! Signals that ask the boot to end: it ends as ever, and leaves behind what it has to.

use std::{sync::mpsc::Sender, thread};

use nix::sys::signal::{SigSet, Signal};

use super::Report;
use crate::verbs::error::Error;

/// From now on these signals are reports. To be called while the process has one thread. Programs that are started have them
/// as usual: Rust's library gives a child an empty mask.
pub fn report(sender: Sender<Report>) -> Result<(), Error> {
    let signals: SigSet = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().collect();
    signals.thread_block().map_err(|error| Error::io("block signals")(error.into()))?;
    thread::spawn(move || {
        while signals.wait().is_ok() {
            if sender.send(Report::Terminated).is_err() {
                return;
            }
        }
    });
    Ok(())
}
