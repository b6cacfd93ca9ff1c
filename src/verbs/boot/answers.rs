//! The prompt of a boot, for those who wait for what a person has on paper or in mind. It is the one prompt of the boot: what
//! is typed is tried on keyslots and on leaves of policies alike.

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc::Sender},
    time::Duration,
};

use super::{Report, progress::Change};
use crate::base::{key::SecretBytes, person::Person};

/// So often it is looked whether an answer is still wanted.
const LOOK: Duration = Duration::from_millis(100);

/// What persons have answered.
pub struct Answers {
    last: Mutex<Last>,
    given: Condvar,
    reports: Sender<Report>,
}

#[derive(Default)]
struct Last {
    /// How many there were.
    number: usize,
    /// `None` also if nobody can answer.
    answer: Option<Arc<SecretBytes>>,
}

impl Answers {
    /// Nobody has answered yet.
    pub(super) fn new(reports: Sender<Report>) -> Arc<Self> {
        Arc::new(Self { last: Mutex::default(), given: Condvar::new(), reports })
    }

    /// Gives an answer to all who wait; or tells them that nobody answers.
    pub fn give(&self, answer: Option<Arc<SecretBytes>>) {
        let mut last = self.lock();
        *last = Last { number: last.number + 1, answer };
        self.given.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Last> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn report(&self, change: Change) {
        let _ = self.reports.send(Report::Changed(change));
    }
}

impl Person for Arc<Answers> {
    fn ask(&self, question: &str, is_over: &dyn Fn() -> bool) -> Option<SecretBytes> {
        let mut last = self.lock();
        let before = last.number;
        self.report(Change::Wanted(question.to_owned()));
        while last.number == before {
            if is_over() {
                self.report(Change::NotWanted(question.to_owned()));
                return None;
            }
            (last, _) = self.given.wait_timeout(last, LOOK).unwrap_or_else(PoisonError::into_inner);
        }
        SecretBytes::copy_of(last.answer.as_ref()?.expose()).ok()
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, thread};

    use super::*;

    #[test]
    fn an_answer_reaches_all_who_wait_and_is_given_once() {
        let (sender, reports) = mpsc::channel();
        let answers = Answers::new(sender);
        let asks = |answers: &Arc<Answers>| {
            let answers = answers.clone();
            thread::spawn(move || answers.ask("words?", &|| false).map(|answer| answer.expose().to_vec()))
        };
        let wanted =
            || matches!(reports.recv().unwrap(), Report::Changed(Change::Wanted(question)) if question == "words?");
        let both = [asks(&answers), asks(&answers)];
        assert!(wanted() && wanted());
        answers.give(Some(Arc::new(SecretBytes::copy_of(b"typed").unwrap())));
        assert!(both.into_iter().all(|asked| asked.join().unwrap().unwrap() == b"typed"));
        let nobody = asks(&answers);
        assert!(wanted());
        answers.give(None);
        assert_eq!(nobody.join().unwrap(), None);
        assert!(answers.ask("words?", &|| true).is_none());
        assert!(wanted() && matches!(reports.recv().unwrap(), Report::Changed(Change::NotWanted(_))));
    }
}
