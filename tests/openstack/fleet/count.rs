//! Requests of this process, as its HTTP client tells of them.

use std::{
    fmt::{self, Write},
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

use serde::{Deserialize, Serialize};
use tracing::{
    Event, Metadata, Subscriber,
    field::{Field, Visit},
    span,
};

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Counts {
    /// To Keystone, answered.
    pub keystone: usize,
    /// For rings, answered.
    pub rings: usize,
    /// For keys, answered.
    pub keys: usize,
    /// Answered by "come back later".
    pub later: usize,
    /// Not answered in time, or at all.
    pub unanswered: usize,
}

static COUNTS: [AtomicUsize; 5] = [const { AtomicUsize::new(0) }; 5];

struct Counter;

/// Counts from now on.
pub fn begin() {
    tracing::subscriber::set_global_default(Counter).unwrap();
}

pub fn so_far() -> Counts {
    let [keystone, rings, keys, later, unanswered] = COUNTS.each_ref().map(|count| count.load(Relaxed));
    Counts { keystone, rings, keys, later, unanswered }
}

/// A request and what came of it.
pub fn count(answered: bool, said: &str) {
    let status = said.split(' ').next().unwrap_or_default();
    let kind = match () {
        () if !answered => 4,
        () if matches!(status, "429" | "498" | "503") => 3,
        () if said.contains("/v3/") => 0,
        () if said.contains("/endpoints/") => 1,
        () => 2,
    };
    COUNTS[kind].fetch_add(1, Relaxed);
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.keystone += other.keystone;
        self.rings += other.rings;
        self.keys += other.keys;
        self.later += other.later;
        self.unanswered += other.unanswered;
    }
}

impl Counts {
    pub fn sent(&self) -> usize {
        self.keystone + self.rings + self.keys + self.later + self.unanswered
    }
}

impl Subscriber for Counter {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().contains("::net::http") && *metadata.level() == tracing::Level::DEBUG
    }

    fn event(&self, event: &Event<'_>) {
        let mut said = Said(String::new());
        event.record(&mut said);
        let Said(said) = said;
        // "STATUS URL in N ms", "WHY after N ms"
        if let Some(said) = said.strip_suffix(" ms").filter(|said| !said.contains("; next try in ")) {
            count(said.rsplit_once(" in ").is_some_and(|(_, took)| took.parse::<u64>().is_ok()), said);
        }
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

struct Said(String);

impl Visit for Said {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            let _ = write!(self.0, "{value:?}");
        }
    }
}
