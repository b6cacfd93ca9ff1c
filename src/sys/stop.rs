//! A request to end, by SIGTERM, SIGINT or SIGHUP: for work that ends in good order.

use std::{
    io,
    sync::{Condvar, Mutex, MutexGuard, Once, PoisonError},
    thread,
    time::Duration,
};

use nix::sys::signal::{SigSet, Signal};

/// Whether this process has been asked to end.
#[derive(Debug)]
pub struct Stop {
    asked: Mutex<bool>,
    woken: Condvar,
}

static STOP: Stop = Stop { asked: Mutex::new(false), woken: Condvar::new() };

impl Stop {
    /// From now on the signals ask the process to end, and do not end it. Programs that are started have them as usual: Rust's
    /// library gives a child an empty mask.
    pub fn by_signals() -> io::Result<&'static Self> {
        static WAITS: Once = Once::new();
        let signals: SigSet = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().collect();
        signals.thread_block()?;
        WAITS.call_once(|| {
            thread::spawn(move || {
                if signals.wait().is_ok() {
                    *STOP.asked() = true;
                    STOP.woken.notify_all();
                }
            });
        });
        Ok(&STOP)
    }

    /// Whether it has been asked.
    pub fn is_asked(&self) -> bool {
        *self.asked()
    }

    /// Waits so long, or until it is asked; whether it is.
    pub fn wait(&self, patience: Duration) -> bool {
        let waited = self.woken.wait_timeout_while(self.asked(), patience, |asked| !*asked);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }

    fn asked(&self) -> MutexGuard<'_, bool> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
