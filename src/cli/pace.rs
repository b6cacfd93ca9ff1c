//! How fast something goes, and when it will be done.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// As long ago is what counts: a disk that others use is now faster, now slower.
const WINDOW: Duration = Duration::from_secs(30);

/// What was done at the moments before.
#[derive(Default)]
pub struct Pace {
    moments: VecDeque<(Instant, u64)>,
    told: Option<Instant>,
}

impl Pace {
    /// What is done in a second over the last 30 s, and the seconds that are left; `None` if nothing was done in that time.
    pub fn at(&mut self, now: Instant, done: u64, all: u64) -> Option<(u64, u64)> {
        // One that is older has to do if there is no other.
        while self.moments.len() > 1 && self.moments[1].0 + WINDOW <= now {
            self.moments.pop_front();
        }
        self.moments.push_back((now, done));
        let (since, first) = self.moments[0];
        let seconds = now.saturating_duration_since(since).as_secs_f64();
        let rate = done.saturating_sub(first) as f64 / seconds;
        let is_known = seconds > 0.0 && rate > 0.0;
        is_known.then(|| (rate as u64, (all.saturating_sub(done) as f64 / rate).ceil() as u64))
    }

    /// Whether a program is to be told: once a second, and at the end.
    pub fn is_due(&mut self, now: Instant, is_end: bool) -> bool {
        let is_due = is_end || self.told.is_none_or(|told| now.duration_since(told) >= Duration::from_secs(1));
        self.told = if is_due { Some(now) } else { self.told };
        is_due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_of_the_last_half_minute() {
        let (start, mut pace) = (Instant::now(), Pace::default());
        let mut at = |seconds, done| pace.at(start + Duration::from_secs(seconds), done, 10_000);
        assert_eq!(at(0, 1000), None, "what was done before says nothing");
        assert_eq!(at(10, 2000), Some((100, 80)));
        assert_eq!(at(20, 2000), Some((50, 160)));
        assert_eq!(at(40, 4000), Some((66, 90)), "since second 10");
        assert_eq!(at(400, 4000), None, "it stands still");
    }
}
