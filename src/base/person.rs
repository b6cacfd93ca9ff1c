//! Somebody who can be asked for a recovery key or a passphrase. How, the verb says; a verb that nobody watches says nothing.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use super::key::SecretBytes;

/// Who is asked.
pub trait Person: Send + Sync {
    /// Asks, until that `is_over`; `None` if nobody answers.
    fn ask(&self, question: &str, is_over: &dyn Fn() -> bool) -> Option<SecretBytes>;
}

/// Who may be asked; nobody unless a verb says so.
#[derive(Clone, Default)]
pub struct Attendant(Option<Arc<dyn Person>>);

impl Attendant {
    /// This person.
    pub fn of(person: impl Person + 'static) -> Self {
        Self(Some(Arc::new(person)))
    }

    /// Who has given this answer beforehand. It is given once: a second question is one after a wrong answer.
    pub fn answering(answer: SecretBytes) -> Self {
        Self::of(Given(Mutex::new(Some(answer))))
    }

    /// The person, if there is one.
    pub fn person(&self) -> Option<&dyn Person> {
        self.0.as_deref()
    }
}

impl fmt::Debug for Attendant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "somebody" } else { "nobody" })
    }
}

struct Given(Mutex<Option<SecretBytes>>);

impl Person for Given {
    fn ask(&self, _: &str, _: &dyn Fn() -> bool) -> Option<SecretBytes> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}
