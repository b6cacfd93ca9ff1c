//! A rotation that leaves the disk to others: it waits between two stretches, while nothing is half done.

use std::time::{Duration, Instant};

/// How long to wait, so that no more than a rate is written.
pub struct Throttle {
    bytes_per_second: Option<u64>,
    /// When it began, and how much was done then.
    begun: Option<(Instant, u64)>,
}

impl Throttle {
    pub fn new(bytes_per_second: Option<u64>) -> Self {
        Self { bytes_per_second, begun: None }
    }

    /// The stretch that is written between two waits: about a second's, for a long one would be written at full speed, and
    /// then nothing for long.
    pub fn stretch(&self, most: u64) -> u64 {
        self.bytes_per_second.map_or(most, |rate| rate.min(most))
    }

    /// How long to wait now that so much of all is done.
    pub fn pause(&mut self, now: Instant, done: u64, all: u64) -> Duration {
        let (start, first) = *self.begun.get_or_insert((now, done));
        let Some(rate) = self.bytes_per_second.filter(|_| done < all) else { return Duration::ZERO };
        let due = Duration::from_secs_f64(done.saturating_sub(first) as f64 / rate.max(1) as f64);
        due.saturating_sub(now.saturating_duration_since(start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_waits_for_what_it_has_written_and_not_for_what_was_done_before() {
        let (start, mib) = (Instant::now(), 1 << 20);
        let mut throttle = Throttle::new(Some(2 * mib));
        assert_eq!(throttle.stretch(64 * mib), 2 * mib);
        assert_eq!(throttle.pause(start, 10 * mib, 20 * mib), Duration::ZERO);
        let later = |tenths: u64| start + Duration::from_millis(tenths * 100);
        assert_eq!(throttle.pause(later(4), 12 * mib, 20 * mib), Duration::from_millis(600));
        assert_eq!(throttle.pause(later(30), 14 * mib, 20 * mib), Duration::ZERO, "the disk is slower than that");
        assert_eq!(throttle.pause(later(30), 20 * mib, 20 * mib), Duration::ZERO, "nothing is left to be written");
        let mut unbounded = Throttle::new(None);
        assert_eq!(unbounded.stretch(64 * mib), 64 * mib);
        unbounded.pause(start, 0, 20 * mib);
        assert_eq!(unbounded.pause(start, 10 * mib, 20 * mib), Duration::ZERO);
    }
}
