//! The same for many keys of a container: several at once, and what is told meanwhile.

use std::{
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use crate::base::key::KeyId;

/// A key's work waits for the store most of the time.
const WORKERS: usize = 8;

/// What is told while it happens.
pub enum Step<'a> {
    /// So many are done, of so many.
    Done(usize, usize),
    /// A key that has failed or is left alone, and why.
    Not(&'static str, &'a KeyId, &'a str),
}

/// Who hears it.
pub type Progress<'a> = dyn Fn(Step<'_>) + Sync + 'a;

/// Does this for each, several at once.
pub fn for_each<T: Sync>(keys: &[T], progress: &Progress<'_>, work: &(dyn Fn(&T) + Sync)) {
    let (next, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    progress(Step::Done(0, keys.len()));
    let all = || {
        while let Some(key) = keys.get(next.fetch_add(1, Ordering::Relaxed)) {
            work(key);
            progress(Step::Done(done.fetch_add(1, Ordering::Relaxed) + 1, keys.len()));
        }
    };
    thread::scope(|scope| (0..WORKERS.min(keys.len())).for_each(|_| drop(scope.spawn(all))));
}

/// Likewise, until one fails: none is begun after that.
pub(super) fn try_for_each<T: Sync, E: Send>(
    keys: &[T],
    progress: &Progress<'_>,
    work: &(dyn Fn(&T) -> Result<(), E> + Sync),
) -> Result<(), E> {
    let failed = Mutex::new(None);
    for_each(keys, progress, &|key| {
        let is_over = lock(&failed).is_some();
        if !is_over && let Err(error) = work(key) {
            *lock(&failed) = Some(error);
        }
    });
    failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

/// What several threads write to, also after one of them has ended by a defect.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
