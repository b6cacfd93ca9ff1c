//! Locks on ranges of bytes: a sector that is being written is neither read nor written by anyone else.
//!
//! A device promises nothing for two requests that overlap: it may mix them, block by block, and half of one ciphertext
//! with half of another is noise. On plain disks the same mix would be harmless.

use std::{
    ops::Range,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
};

/// The ranges that requests under way have claimed.
#[derive(Default)]
pub struct Ranges {
    claims: Mutex<Claims>,
    released: Condvar,
}

#[derive(Default)]
struct Claims {
    /// In the order in which they came, those that wait as well: as many as there are requests under way, few.
    all: Vec<Claim>,
    next: u64,
    waiting: usize,
}

struct Claim {
    number: u64,
    range: Range<u64>,
    access: Access,
}

/// What a claim is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Others may read as well.
    Read,
    /// None but the one who claims it.
    Write,
}

/// A claimed range; released on drop.
pub struct Claimed<'a> {
    ranges: &'a Ranges,
    number: u64,
}

impl Ranges {
    /// Waits until no earlier claim is in the way. To be held for one request, and one at a time.
    ///
    /// Those that wait are in the way of later ones: a write would never come to its turn while reads of its range overlap
    /// one another.
    pub fn claim(&self, range: Range<u64>, access: Access) -> Claimed<'_> {
        let mut claims = self.lock();
        let number = claims.next;
        claims.next += 1;
        claims.all.push(Claim { number, range, access });
        while claims.must_wait(number) {
            claims.waiting += 1;
            claims = self.released.wait(claims).unwrap_or_else(PoisonError::into_inner);
            claims.waiting -= 1;
        }
        Claimed { ranges: self, number }
    }

    /// A panic ends the worker, so that nobody sees claims half changed.
    fn lock(&self) -> MutexGuard<'_, Claims> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Claims {
    fn must_wait(&self, number: u64) -> bool {
        let (earlier, claim) = self.all.split_at(self.position(number));
        earlier.iter().any(|other| other.is_in_the_way_of(&claim[0]))
    }

    fn position(&self, number: u64) -> usize {
        self.all.iter().position(|claim| claim.number == number).expect("claimed until now")
    }
}

impl Claim {
    fn is_in_the_way_of(&self, other: &Self) -> bool {
        let overlap = self.range.start < other.range.end && other.range.start < self.range.end;
        overlap && (self.access, other.access) != (Access::Read, Access::Read)
    }
}

impl Drop for Claimed<'_> {
    fn drop(&mut self) {
        let mut claims = self.ranges.lock();
        let at = claims.position(self.number);
        claims.all.remove(at);
        if claims.waiting > 0 {
            self.ranges.released.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_overlapping_writes_are_in_the_way() {
        let claim = |range, access| Claim { number: 0, range, access };
        let read = claim(0..10, Access::Read);
        for (range, access, waits) in [
            (5..15, Access::Read, false),
            (5..15, Access::Write, true),
            (10..20, Access::Write, false),
            (9..10, Access::Write, true),
        ] {
            assert_eq!(read.is_in_the_way_of(&claim(range.clone(), access)), waits, "{range:?} {access:?}");
        }
        assert!(claim(0..1, Access::Write).is_in_the_way_of(&read));
    }

    #[test]
    fn a_claim_waits_for_the_one_in_its_way() {
        let ranges = Ranges::default();
        let events = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            let first = ranges.claim(0..8, Access::Write);
            let waiter = scope.spawn(|| {
                let _claimed = ranges.claim(4..12, Access::Read);
                events.lock().unwrap().push("second");
            });
            while ranges.lock().waiting == 0 {
                std::thread::yield_now();
            }
            events.lock().unwrap().push("first");
            drop(first);
            waiter.join().unwrap();
        });
        assert_eq!(*events.lock().unwrap(), ["first", "second"]);
        assert!(ranges.lock().all.is_empty());
    }

    /// Two readers of one block, each of which begins before the other ends, would keep a writer out for ever.
    #[test]
    fn a_write_is_not_overtaken_by_later_reads() {
        let ranges = Ranges::default();
        let events = Mutex::new(Vec::new());
        let wait_for = |waiting| {
            while ranges.lock().waiting < waiting && events.lock().unwrap().is_empty() {
                std::thread::yield_now();
            }
        };
        std::thread::scope(|scope| {
            let first = ranges.claim(0..8, Access::Read);
            let later = |name, access| {
                let (ranges, events) = (&ranges, &events);
                move || {
                    let _claimed = ranges.claim(4..12, access);
                    events.lock().unwrap().push(name);
                }
            };
            scope.spawn(later("write", Access::Write));
            wait_for(1);
            scope.spawn(later("read", Access::Read));
            wait_for(2);
            drop(first);
        });
        assert_eq!(*events.lock().unwrap(), ["write", "read"]);
    }
}
