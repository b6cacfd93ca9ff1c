//! What it takes to try a passphrase, and which keyslots are tried: key derivation is bounded over the whole header.
//!
//! Whoever tries a passphrase pays what the header asks for, and a header may be an attacker's. So the work is added up
//! from the numbers before anything is computed. docs/formats.md has these limits.

use super::{
    Refusal,
    allow_list::{Kind, refused},
    metadata::{Kdf, Keyslot as Described},
};
use crate::sys::memory;

/// The work of one header, in units that take a slow machine about a microsecond: an iteration of PBKDF2 for each block of
/// its hash, or a pass of Argon2 over a KiB.
///
/// cryptsetup makes keyslots of two seconds. One of ten seconds, made on the fastest machine of today, takes 80 million.
const MOST_WORK: u64 = 100_000_000;
/// cryptsetup never makes a keyslot of more (MAX_PBKDF_MEMORY, MAX_PBKDF_THREADS).
const MOST_MEMORY_KIB: u64 = 4 << 20;
const MOST_THREADS: u64 = 4;
/// Twice what cryptsetup takes unless told otherwise (DEFAULT_LUKS2_MEMORY_KB).
const MOST_MEMORY_TRIED_KIB: u64 = 2 << 20;

/// A keyslot that holds the key of the data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keyslot {
    number: u32,
    rank: Rank,
    cost: Cost,
}

/// The order in which libcryptsetup tries them (LUKS2_keyslot_open_priority).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    Preferred,
    Normal,
    OnlyByNumber,
}

/// What trying a passphrase takes.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Cost {
    work: u64,
    memory_kib: u64,
    threads: u64,
    /// "200000000 iterations", "4 passes over 1048576 KiB of memory"
    words: String,
}

impl Keyslot {
    /// Its number.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// A keyslot of LUKS2; each trial ends with the digest, which takes `digest_work`.
    pub fn luks2(number: &str, described: &Described, key_bytes: u32, digest_work: u64) -> Result<Self, Refusal> {
        let kdf = described.kdf.as_ref().ok_or_else(|| refused(format!("keyslot {number} has no key derivation")))?;
        let rank = match described.priority {
            Some(0) => Rank::OnlyByNumber,
            Some(2) => Rank::Preferred,
            _ => Rank::Normal,
        };
        let number = number.parse().map_err(|_| refused(format!("a keyslot has the number '{number}'")))?;
        Ok(Self { number, rank, cost: Cost::of(kdf, key_bytes).and(digest_work) })
    }

    /// A keyslot of LUKS1.
    pub fn luks1(number: u32, hash: &str, iterations: u32, key_bytes: u32, digest_work: u64) -> Self {
        let cost = Cost::pbkdf2(hash, iterations.into(), key_bytes).and(digest_work);
        Self { number, rank: Rank::Normal, cost }
    }

    /// Refuses what no keyslot of cryptsetup's takes, and what is more than the whole header may take.
    pub fn check(&self) -> Result<(), Refusal> {
        let Cost { work, memory_kib, threads, words } = &self.cost;
        let over = |limit: String| Err(too_much(format!("keyslot {} takes {words} ({limit})", self.number)));
        match () {
            () if *memory_kib > MOST_MEMORY_KIB => over(format!("at most {MOST_MEMORY_KIB} KiB")),
            () if *threads > MOST_THREADS => over(format!("in {threads} threads; at most {MOST_THREADS}")),
            () if *work > MOST_WORK => over(format!("the work of {work} units; at most {MOST_WORK}")),
            () => Ok(()),
        }
    }
}

impl Cost {
    fn of(kdf: &Kdf, key_bytes: u32) -> Self {
        if kdf.kind == "pbkdf2" {
            return Self::pbkdf2(&kdf.hash, kdf.iterations, key_bytes);
        }
        let Kdf { time, memory, cpus, .. } = *kdf;
        let words = format!("{time} passes over {memory} KiB of memory");
        Self { work: time.saturating_mul(memory), memory_kib: memory, threads: cpus, words }
    }

    fn pbkdf2(hash: &str, iterations: u64, key_bytes: u32) -> Self {
        let words = format!("{iterations} iterations");
        Self { work: iterations.saturating_mul(per_iteration(hash, key_bytes)), memory_kib: 0, threads: 1, words }
    }

    fn and(self, more_work: u64) -> Self {
        Self { work: self.work.saturating_add(more_work), ..self }
    }
}

/// The blocks of the hash that one iteration computes (RFC 8018 section 5.2); hashes without fast code count fourfold.
fn per_iteration(hash: &str, key_bytes: u32) -> u64 {
    let (hash_bytes, weight) = match hash {
        "sha1" => (20, 1),
        "sha224" => (28, 1),
        "sha256" => (32, 1),
        "sha384" => (48, 1),
        "sha512" => (64, 1),
        _ => (20, 4),
    };
    u64::from(key_bytes.div_ceil(hash_bytes)) * weight
}

/// The numbers of the keyslots that a passphrase is tried on, in order: as many as the header's budget and this host's
/// memory allow. What is left out is said. If some are named, only those, also if they are tried by their number only.
pub fn to_be_tried(keyslots: &[Keyslot], only: Option<&[u32]>) -> Result<Vec<u32>, Refusal> {
    let available_kib = memory::available_kib().unwrap_or(u64::MAX);
    let Some(only) = only else { return choose(keyslots, available_kib) };
    let named = keyslots.iter().filter(|keyslot| only.contains(&keyslot.number));
    let named: Vec<_> = named.map(|keyslot| Keyslot { rank: Rank::Normal, ..keyslot.clone() }).collect();
    choose(&named, available_kib)
}

fn choose(keyslots: &[Keyslot], available_kib: u64) -> Result<Vec<u32>, Refusal> {
    let mut all: Vec<_> = keyslots.iter().filter(|keyslot| keyslot.rank != Rank::OnlyByNumber).collect();
    all.sort_by_key(|keyslot| (keyslot.rank, keyslot.number));
    let (mut tried, mut left_out, mut work) = (Vec::new(), Vec::new(), 0);
    let most_memory_kib = available_kib.min(MOST_MEMORY_TRIED_KIB);
    for Keyslot { number, cost, .. } in all {
        let with_it = cost.work.saturating_add(work);
        if cost.memory_kib > most_memory_kib {
            left_out.push(format!("keyslot {number} takes {} (at most {most_memory_kib} KiB here)", cost.words));
        } else if with_it > MOST_WORK {
            left_out.push(format!("keyslot {number} takes {} (too much for one header)", cost.words));
        } else {
            tried.push(*number);
            work = with_it;
        }
    }
    match left_out.is_empty() {
        false if tried.is_empty() => Err(too_much(left_out.join(", "))),
        false => {
            tracing::warn!("the passphrase is not tried on all keyslots: {}", left_out.join(", "));
            Ok(tried)
        }
        true => Ok(tried),
    }
}

fn too_much(why: String) -> Refusal {
    Refusal::new(Kind::TooMuchWork, &why)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn argon2(number: u32, time: u64, memory: u64) -> Keyslot {
        let kdf = Kdf { kind: "argon2id".into(), hash: String::new(), iterations: 0, time, memory, cpus: 4 };
        Keyslot { number, rank: Rank::Normal, cost: Cost::of(&kdf, 64) }
    }

    fn pbkdf2(number: u32, hash: &str, iterations: u32) -> Keyslot {
        Keyslot::luks1(number, hash, iterations, 64, 1_000_000)
    }

    const GIB: u64 = 1 << 20;

    #[test]
    fn what_cryptsetup_makes_is_tried() {
        // Two seconds on a slow and on a fast machine, eight times; ten seconds on the fastest, once.
        for keyslots in [
            (0..8).map(|n| argon2(n, 4, GIB)).collect::<Vec<_>>(),
            (0..8).map(|n| argon2(n, 10, GIB)).collect(),
            (0..32).map(|n| argon2(n, 4, GIB / 2)).collect(),
            (0..8).map(|n| pbkdf2(n, "sha256", 4_500_000)).collect(),
            vec![argon2(0, 50, GIB)],
            vec![pbkdf2(0, "sha256", 40_000_000)],
        ] {
            keyslots.iter().for_each(|keyslot| keyslot.check().expect("passes"));
            assert_eq!(choose(&keyslots, 8 * GIB).expect("tried").len(), keyslots.len());
        }
    }

    #[test]
    fn the_work_of_all_keyslots_together_is_bounded() {
        let hostile: Vec<_> = (0..32).map(|n| pbkdf2(n, "sha512", 60_000_000)).collect();
        hostile.iter().for_each(|keyslot| keyslot.check().expect("each alone would do"));
        assert_eq!(choose(&hostile, GIB).expect("one is tried"), [0]);
        let hostile: Vec<_> = (0..32).map(|n| argon2(n, 20, 2 * GIB)).collect();
        assert_eq!(choose(&hostile, 8 * GIB).expect("two are tried"), [0, 1]);
        // A cheap one behind a dear one is tried all the same.
        let mixed = [pbkdf2(0, "sha256", 45_000_000), pbkdf2(1, "sha256", 45_000_000), pbkdf2(2, "sha256", 1000)];
        assert_eq!(choose(&mixed, GIB).expect("tried"), [0, 2]);
    }

    #[test]
    fn one_keyslot_beyond_the_budget_is_refused_whatever_its_hash() {
        for keyslot in [
            pbkdf2(0, "sha512", 200_000_000),
            pbkdf2(0, "sha1", 30_000_000),
            pbkdf2(0, "whirlpool", 10_000_000),
            argon2(0, 1, 5 * GIB),
            argon2(0, 120, GIB),
            argon2(0, u64::MAX, u64::MAX),
        ] {
            let refusal = keyslot.check().unwrap_err().to_string();
            assert!(refusal.starts_with("keyslot 0 takes "), "{refusal}");
        }
        let mut threads = argon2(0, 4, GIB);
        threads.cost.threads = 1 << 20;
        assert!(threads.check().is_err());
    }

    #[test]
    fn a_keyslot_that_takes_more_memory_than_there_is_is_not_tried() {
        let refusal = choose(&[argon2(0, 4, GIB)], GIB / 2).unwrap_err().to_string();
        assert!(refusal.contains("at most 524288 KiB here"), "{refusal}");
        assert_eq!(choose(&[argon2(0, 4, GIB), argon2(1, 4, GIB / 4)], GIB / 2).expect("one"), [1]);
        assert!(choose(&[], GIB).expect("a strict header").is_empty());
    }

    #[test]
    fn preferred_keyslots_come_first_and_some_only_by_their_number() {
        let mut keyslots = [pbkdf2(0, "sha256", 1000), pbkdf2(1, "sha256", 1000), pbkdf2(2, "sha256", 1000)];
        keyslots[0].rank = Rank::OnlyByNumber;
        keyslots[2].rank = Rank::Preferred;
        assert_eq!(choose(&keyslots, GIB).expect("tried"), [2, 1]);
    }

    #[test]
    fn those_that_are_named_are_tried_and_no_others() {
        let mut keyslots = [pbkdf2(0, "sha256", 1000), pbkdf2(1, "sha256", 1000), pbkdf2(2, "sha256", 1000)];
        keyslots[1].rank = Rank::OnlyByNumber;
        assert_eq!(to_be_tried(&keyslots, None).expect("tried"), [0, 2]);
        assert_eq!(to_be_tried(&keyslots, Some(&[1, 9])).expect("tried"), [1]);
        assert!(to_be_tried(&keyslots, Some(&[])).expect("none").is_empty());
        let dear = [pbkdf2(0, "sha512", 200_000_000)];
        assert!(to_be_tried(&dear, Some(&[0])).is_err(), "a name is no way around the bounds");
    }
}
