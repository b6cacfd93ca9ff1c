//! Aligned memory for requests, lent and taken back: it is locked, so that a new one for each request would cost more than
//! the request.

use std::{
    ops::{Deref, DerefMut, Range},
    sync::{Arc, Mutex, PoisonError},
};

use zeroize::Zeroize;

/// Where buffers for `O_DIRECT` begin in memory: at a multiple of any block size that Linux has.
pub const ALIGNMENT: usize = 4096;
/// Larger requests are rare: their buffers are not kept.
const KEPT_BYTES: usize = 2 << 20;
/// As many as are in use at once under load; more are not kept.
const KEPT: usize = 24;

/// Buffers that are not in use. They hold plaintext: wiped on drop.
#[derive(Default)]
pub struct Buffers {
    free: Mutex<Vec<Vec<u8>>>,
}

/// A buffer on loan, aligned for `O_DIRECT`; what it holds at first is not defined.
pub struct Buffer {
    bytes: Vec<u8>,
    part: Range<usize>,
    home: Arc<Buffers>,
}

impl Buffers {
    /// One of that length; the one that was in use last is the likeliest to be in the cache.
    pub fn take(self: &Arc<Self>, length: usize) -> Buffer {
        let kept = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut bytes = kept.unwrap_or_default();
        if bytes.len() < length + ALIGNMENT {
            bytes.zeroize();
            bytes = vec![0; length + ALIGNMENT];
        }
        let start = bytes.as_ptr().align_offset(ALIGNMENT);
        Buffer { bytes, part: start..start + length, home: Arc::clone(self) }
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        self.free.get_mut().unwrap_or_else(PoisonError::into_inner).iter_mut().for_each(Zeroize::zeroize);
    }
}

impl Buffer {
    /// The same without what lies outside of `range`.
    pub fn narrow(mut self, range: Range<usize>) -> Self {
        let start = self.part.start;
        self.part = start + range.start..start + range.end;
        self
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.part.clone()]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.part.clone()]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut free = self.home.free.lock().unwrap_or_else(PoisonError::into_inner);
        if self.bytes.len() <= KEPT_BYTES + ALIGNMENT && free.len() < KEPT {
            free.push(std::mem::take(&mut self.bytes));
        } else {
            self.bytes.zeroize();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_used_again() {
        let buffers = Arc::new(Buffers::default());
        let mut first = buffers.take(5000);
        assert!(first.len() == 5000 && first.as_ptr().addr().is_multiple_of(ALIGNMENT));
        first.fill(7);
        assert_eq!(*first.narrow(10..13), [7; 3]);
        assert!(buffers.take(300).iter().all(|byte| *byte == 7), "the same one");
        assert!(buffers.take(9000).iter().all(|byte| *byte == 0), "it was too small");
        drop(buffers.take(KEPT_BYTES + 1));
        assert!(buffers.free.lock().unwrap().is_empty(), "it is too large to be kept");
    }
}
