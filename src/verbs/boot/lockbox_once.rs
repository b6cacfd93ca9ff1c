//! The lockbox of a boot: opened by the first source that needs it, once for all volumes.

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
}

impl Opening {
    /// Opens it, unless that was done; who comes second waits for the first.
    pub fn once(&self, open: impl FnOnce() -> Result<(), Error>) -> Result<(), Error> {
        let mut is = self.lock();
        if matches!(*is, Is::NotWanted) {
            *is = Is::Awaited;
            drop(is);
            let opened = open().map_err(Arc::new);
            *self.lock() = Is::Done(opened.clone());
            self.done.notify_all();
            return opened.map_err(|why| BootError::LockboxClosed(why).into());
        }
        let is = self.done.wait_while(is, |is| !matches!(is, Is::Done(_))).unwrap_or_else(PoisonError::into_inner);
        match &*is {
            Is::Done(Err(why)) => Err(BootError::LockboxClosed(why.clone()).into()),
            _ => Ok(()),
        }
    }

    /// All that it needs is there.
    pub fn asks(&self) {
        *self.lock() = Is::Asked(Instant::now());
    }

    /// Waits until an opening that has begun is done, but not for long.
    pub fn finish(&self) {
        let is = self.lock();
        if let Is::Asked(since) = *is {
            let left = LONGEST_OPENING.saturating_sub(since.elapsed());
            let _ = self.done.wait_timeout_while(is, left, |is| !matches!(is, Is::Done(_)));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Is> {
        self.is.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
