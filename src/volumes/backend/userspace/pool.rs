//! Threads that do requests beside the one that takes them, so that a device with a latency is asked for many things at once.

use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
};

/// As many requests are under way at the device at once, and one for each thread that takes them.
const THREADS: usize = 16;
/// As many wait for a thread; who takes more requests waits himself.
const WAITING: usize = 64;
/// Buffers are on the heap. Stacks are locked memory.
const STACK_BYTES: usize = 256 * 1024;

type Request = Box<dyn FnOnce() + Send>;

/// Threads that are started when there is something to do for them. On drop they end what was given to them.
#[derive(Default)]
pub struct Pool {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    given: Condvar,
    taken: Condvar,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Request>,
    /// Waiting or being done, here or by the thread that took it.
    under_way: usize,
    idle: usize,
    ends: bool,
}

impl Pool {
    /// Does the request: at once if it is `alone` (its taker knows of none that follows) and nothing else is under way, for
    /// handing over takes as long as a fast device; else in another thread.
    pub fn run(&self, alone: bool, request: impl FnOnce() + Send + 'static) {
        let mut state = self.shared.lock();
        while state.waiting.len() >= WAITING {
            state = self.shared.taken.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.under_way += 1;
        let at_once = alone && state.under_way == 1 || state.idle <= state.waiting.len() && !self.add_thread();
        if at_once {
            drop(state);
            request();
            self.shared.lock().under_way -= 1;
        } else {
            state.waiting.push_back(Box::new(request));
            drop(state);
            self.shared.given.notify_one();
        }
    }

    /// Starts another thread, or says whether there is any.
    fn add_thread(&self) -> bool {
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        if threads.len() < THREADS {
            let shared = Arc::clone(&self.shared);
            match thread::Builder::new().name("io".to_owned()).stack_size(STACK_BYTES).spawn(move || shared.serve()) {
                Ok(thread) => threads.push(thread),
                Err(error) => tracing::warn!("cannot start another thread: {error}"),
            }
        }
        !threads.is_empty()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().ends = true;
        self.shared.given.notify_all();
        for thread in self.threads.get_mut().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // A panic has ended the worker.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self) {
        let mut state = self.lock();
        loop {
            let Some(request) = state.waiting.pop_front() else {
                if state.ends {
                    return;
                }
                state.idle += 1;
                state = self.given.wait(state).unwrap_or_else(PoisonError::into_inner);
                state.idle -= 1;
                continue;
            };
            drop(state);
            self.taken.notify_one();
            request();
            state = self.lock();
            state.under_way -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Barrier,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    };

    use super::*;

    #[test]
    fn one_alone_is_done_by_its_taker() {
        let pool = Pool::default();
        let (sender, done) = mpsc::channel();
        pool.run(true, move || sender.send(thread::current().id()).unwrap());
        assert_eq!(done.recv(), Ok(thread::current().id()));
        assert!(pool.threads.lock().unwrap().is_empty());
    }

    #[test]
    fn as_many_as_there_are_threads_are_under_way_at_once() {
        let (pool, meeting) = (Pool::default(), Arc::new(Barrier::new(THREADS + 1)));
        for _ in 0..THREADS {
            let meeting = Arc::clone(&meeting);
            pool.run(false, move || {
                meeting.wait();
            });
        }
        meeting.wait();
    }

    #[test]
    fn all_is_done_before_it_ends() {
        let (pool, done) = (Pool::default(), Arc::new(AtomicUsize::new(0)));
        for _ in 0..1000 {
            let done = Arc::clone(&done);
            pool.run(false, move || {
                done.fetch_add(1, Ordering::Relaxed);
            });
        }
        drop(pool);
        assert_eq!(done.load(Ordering::Relaxed), 1000);
    }
}
