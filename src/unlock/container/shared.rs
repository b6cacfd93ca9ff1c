//! One answer for all threads that ask the same at once.
//!
//! An answer serves only those who came before its question was sent. So nobody gets an older one than by asking alone.

use std::sync::{
    Mutex,
    atomic::{AtomicU64, Ordering},
};

use super::lock;

/// A question that many threads ask.
#[derive(Default)]
pub(super) struct Shared<T> {
    /// How often it was sent.
    sent: AtomicU64,
    last: Mutex<Last<T>>,
}

#[derive(Default)]
struct Last<T> {
    /// The latest answer, and to which question.
    answer: Option<(u64, T)>,
    has_failed: bool,
}

impl<T: Copy> Shared<T> {
    /// An answer to a question that is sent after this began.
    pub fn ask<E>(&self, ask: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        self.ask_after(self.sent(), ask)
    }

    fn sent(&self) -> u64 {
        self.sent.load(Ordering::SeqCst)
    }

    /// An answer to a later question than so many.
    fn ask_after<E>(&self, before: u64, ask: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        // Held while asking: the others wait for the answer.
        let last = lock(&self.last);
        if let Some((number, answer)) = last.answer
            && number > before
        {
            return Ok(answer);
        }
        let number = self.sent.fetch_add(1, Ordering::SeqCst) + 1;
        // A failure may have taken long: nobody waits for a second one before he asks himself.
        let held = Some(last).filter(|last| !last.has_failed);
        let answer = ask();
        let mut last = held.unwrap_or_else(|| lock(&self.last));
        last.has_failed = answer.is_err();
        if let Ok(answer) = answer
            && last.answer.is_none_or(|(before, _)| before < number)
        {
            last.answer = Some((number, answer));
        }
        answer
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Barrier, thread};

    use super::*;

    fn unasked() -> Result<u32, &'static str> {
        panic!("there is an answer already")
    }

    #[test]
    fn who_came_before_a_question_was_sent_has_its_answer() {
        let shared = Shared::default();
        let (one, two) = (shared.sent(), shared.sent());
        assert_eq!(shared.ask_after(one, || Ok::<_, &str>(1)), Ok(1));
        assert_eq!(shared.ask_after(two, unasked), Ok(1));
    }

    #[test]
    fn who_came_while_a_question_was_under_way_has_the_answer_to_a_later_one() {
        let shared = Shared::default();
        let mut meanwhile = [0; 2];
        let first = shared.ask(|| {
            meanwhile = [shared.sent(); 2];
            Ok::<_, &str>(1)
        });
        assert_eq!(first, Ok(1));
        assert_eq!(shared.ask_after(meanwhile[0], || Ok::<_, &str>(2)), Ok(2));
        assert_eq!(shared.ask_after(meanwhile[1], unasked), Ok(2));
        assert_eq!(shared.ask(|| Ok::<_, &str>(3)), Ok(3));
    }

    #[test]
    fn a_failure_is_nobody_elses_and_then_all_ask_at_once() {
        let shared = Shared::<u32>::default();
        let waited = shared.sent();
        assert_eq!(shared.ask(|| Err("down")), Err("down"));
        // Each of them comes to its end only if all are asking.
        let asking = Barrier::new(4);
        let ask = || {
            asking.wait();
            Ok::<_, &str>(1)
        };
        thread::scope(|scope| {
            let all = [(); 4].map(|()| scope.spawn(|| shared.ask_after(waited + 1, ask)));
            assert!(all.into_iter().all(|one| one.join().unwrap() == Ok(1)));
        });
        let two = [shared.sent(); 2];
        assert_eq!(two.map(|sent| shared.ask_after(sent, || Ok::<_, &str>(sent as u32 + 1))), [Ok(6); 2]);
    }
}
