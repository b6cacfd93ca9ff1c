//! Giving up what is not needed any more.

use std::sync::Arc;

use futures_util::future::select_all;
use tokio::sync::watch;

/// Whether some work is still wanted. Work that is part of other work ends with it.
#[derive(Clone)]
pub struct Cancel {
    /// The outermost first.
    levels: Vec<Arc<watch::Sender<bool>>>,
}

impl Cancel {
    /// Of work that nothing ends.
    pub fn never() -> Self {
        Self { levels: Vec::new() }
    }

    /// Of work that is part of this.
    pub fn below(&self) -> Self {
        let own = Arc::new(watch::Sender::new(false));
        Self { levels: self.levels.iter().cloned().chain([own]).collect() }
    }

    /// Ends it, but not what it is part of.
    pub fn cancel(&self) {
        if let Some(own) = self.levels.last() {
            own.send_replace(true);
        }
    }

    /// Whether it is not wanted any more.
    pub fn is_cancelled(&self) -> bool {
        self.levels.iter().any(|level| *level.borrow())
    }

    /// Returns once it is not wanted any more.
    pub(super) async fn cancelled(&self) {
        if self.levels.is_empty() {
            return std::future::pending().await;
        }
        let wait = |level: &Arc<watch::Sender<bool>>| {
            let mut receiver = level.subscribe();
            Box::pin(async move { drop(receiver.wait_for(|cancelled| *cancelled).await) })
        };
        select_all(self.levels.iter().map(wait)).await;
    }
}
