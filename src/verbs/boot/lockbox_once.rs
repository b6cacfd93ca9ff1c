//! The lockbox of a boot: opened by the first source that needs it, once for all volumes; and by none once the end of the boot
//! has closed it.

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::BootError;
use crate::verbs::error::Error;

/// How long the opening may take after the volumes were attached another way, from its first question on: as long as one try
/// of a store.
const LONGEST_OPENING: Duration = Duration::from_secs(5);

/// How far the opening is.
#[derive(Default)]
pub struct Opening {
    is: Mutex<Is>,
    done: Condvar,
}

#[derive(Default)]
enum Is {
    #[default]
    NotWanted,
    /// What it needs is waited for.
    Awaited,
    /// The store and the TPM are asked, since then.
    Asked(Instant),
    /// It is open; or closed, for this reason.
    Done(Result<(), Arc<Error>>),
    /// The end of the boot has closed it.
    Shut,
}

impl Opening {
    /// Opens it, unless that was done; whoever comes second waits for the first.
    pub fn once(&self, open: impl FnOnce() -> Result<(), Error>) -> Result<(), Error> {
        let mut is = self.lock();
        if matches!(*is, Is::NotWanted) {
            *is = Is::Awaited;
            drop(is);
            let opened = open().map_err(Arc::new);
            self.unless_shut(|is| *is = Is::Done(opened.clone()));
            self.done.notify_all();
            return opened.map_err(|why| BootError::LockboxClosed(why).into());
        }
        let is = self.done.wait_while(is, |is| is.is_under_way()).unwrap_or_else(PoisonError::into_inner);
        match &*is {
            Is::Done(Err(why)) => Err(BootError::LockboxClosed(why.clone()).into()),
            Is::Shut => Err(is_over()),
            _ => Ok(()),
        }
    }

    /// All that it needs is there.
    pub fn asks(&self) {
        self.unless_shut(|is| *is = Is::Asked(Instant::now()));
    }

    /// Hands the opened key to the kernel's keyring, unless the lockbox is closed for this boot.
    pub fn keep<T>(&self, keep: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
        self.unless_shut(|_| keep()).unwrap_or_else(|| Err(is_over()))
    }

    /// Takes the key out of the kernel's keyring; in this boot nothing puts it there again.
    pub fn shut<T>(&self, shut: impl FnOnce() -> T) -> T {
        let mut is = self.lock();
        *is = Is::Shut;
        let shut = shut();
        self.done.notify_all();
        shut
    }

    fn unless_shut<T>(&self, change: impl FnOnce(&mut Is) -> T) -> Option<T> {
        let mut is = self.lock();
        (!matches!(*is, Is::Shut)).then(|| change(&mut is))
    }

    /// Waits until an opening that has begun is done, but not for long.
    pub fn finish(&self) {
        let is = self.lock();
        if let Is::Asked(since) = *is {
            let left = LONGEST_OPENING.saturating_sub(since.elapsed());
            let _ = self.done.wait_timeout_while(is, left, |is| is.is_under_way());
        }
    }

    fn lock(&self) -> MutexGuard<'_, Is> {
        self.is.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Is {
    fn is_under_way(&self) -> bool {
        !matches!(self, Self::Done(_) | Self::Shut)
    }
}

/// Too late for the lockbox of this boot.
fn is_over() -> Error {
    BootError::LockboxShut("the boot has ended".to_owned()).into()
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{atomic::AtomicUsize, atomic::Ordering, mpsc},
        thread,
    };

    use super::*;
    use crate::{
        base::exit::Exit,
        unlock::{self, lockbox::LockboxError},
        verbs::failure::Failure,
    };

    #[test]
    fn is_opened_once_and_who_comes_second_learns_why_it_is_closed() {
        let (opening, opened) = (Opening::default(), AtomicUsize::new(0));
        let open = || {
            opened.fetch_add(1, Ordering::Relaxed);
            Err(unlock::Error::from(LockboxError::Closed("a".parse().unwrap())).into())
        };
        let told: Vec<Failure> = thread::scope(|scope| {
            let threads: Vec<_> =
                (0..3).map(|_| scope.spawn(|| Failure::of(&opening.once(open).unwrap_err()))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(opened.into_inner(), 1);
        let first = &told[0];
        assert!(told.iter().all(|told| told == first), "{told:?}");
        assert!(first.exit_code == u8::from(Exit::KeyRefused) && first.next.is_some(), "{first:?}");
    }

    #[test]
    fn an_opening_that_ends_after_the_boot_puts_no_key_into_the_keyring() {
        let (opening, kept) = (Opening::default(), AtomicUsize::new(0));
        let keep = || {
            kept.fetch_add(1, Ordering::Relaxed);
            Ok(())
        };
        opening.keep(keep).unwrap();
        let opened = opening.once(|| {
            opening.asks();
            opening.shut(|| kept.store(0, Ordering::Relaxed));
            opening.asks();
            opening.keep(keep)
        });
        assert!(opened.is_err() && opening.once(|| opening.keep(keep)).is_err());
        assert_eq!(kept.into_inner(), 0);
    }

    #[test]
    fn the_end_waits_for_an_opening_that_has_begun_only() {
        let opening = Opening::default();
        opening.finish();
        let (begun, go) = (mpsc::channel(), mpsc::channel::<()>());
        thread::scope(|scope| {
            let opening = &opening;
            scope.spawn(move || {
                opening.once(|| {
                    opening.asks();
                    begun.0.send(()).unwrap();
                    go.1.recv().unwrap();
                    Ok(())
                })
            });
            begun.1.recv().unwrap();
            let waiting = scope.spawn(|| opening.finish());
            assert!(!waiting.is_finished());
            go.0.send(()).unwrap();
            waiting.join().unwrap();
            assert!(matches!(*opening.lock(), Is::Done(Ok(()))));
        });
    }
}
