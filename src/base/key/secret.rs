//! Secret memory: the one place where raw secret bytes live.
#![allow(unsafe_code)] // mmap, mlock, madvise, munmap and the slice over the mapping

use std::{ffi::c_void, io, num::NonZeroUsize, ptr::NonNull};

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mlock, mmap_anonymous, munmap};
use zeroize::Zeroize;

/// Bytes in pages of their own: locked (mlock(2), never swapped), left out of core dumps and of forked children
/// (madvise(2), `MADV_DONTDUMP`, `MADV_DONTFORK`), wiped on drop.
///
/// It has no `Debug`, `Display`, `Clone` or `Serialize`, so that no log line or file can hold one by accident.
pub struct SecretBytes {
    pages: NonNull<c_void>,
    mapped: NonZeroUsize,
    len: usize,
}

/// Secret memory could not be had.
#[derive(Debug, thiserror::Error)]
pub enum SecretMemoryError {
    /// mmap(2) or madvise(2) failed.
    #[error("cannot map memory for a secret")]
    Map(#[source] nix::Error),
    /// mlock(2) failed, mostly because RLIMIT_MEMLOCK is too low.
    #[error("cannot lock memory for a secret (raise the limit: 'ulimit -l', LimitMEMLOCK= in a unit)")]
    Lock(#[source] nix::Error),
    /// The kernel's random number generator failed.
    #[error("cannot read random bytes for a key")]
    Random(#[source] io::Error),
}

impl SecretBytes {
    /// `len` zero bytes.
    pub fn zeroed(len: usize) -> Result<Self, SecretMemoryError> {
        let mapped = NonZeroUsize::new(len.max(1)).expect("at least one");
        // SAFETY: an anonymous private mapping at an address of the kernel's choice aliases nothing.
        let pages = unsafe {
            mmap_anonymous(None, mapped, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE)
        }
        .map_err(SecretMemoryError::Map)?;
        let secret = Self { pages, mapped, len };
        // SAFETY: the range is exactly the mapping made above, which `secret` owns and unmaps if these fail.
        unsafe {
            mlock(pages, mapped.get()).map_err(SecretMemoryError::Lock)?;
            madvise(pages, mapped.get(), MmapAdvise::MADV_DONTDUMP).map_err(SecretMemoryError::Map)?;
            madvise(pages, mapped.get(), MmapAdvise::MADV_DONTFORK).map_err(SecretMemoryError::Map)?;
        }
        Ok(secret)
    }

    /// `len` random bytes from the kernel's generator.
    pub fn random(len: usize) -> Result<Self, SecretMemoryError> {
        use io::Read;
        let mut secret = Self::zeroed(len)?;
        // getrandom(2) would save an open; /dev/urandom is seeded long before any caller of ours runs.
        io::Read::by_ref(&mut std::fs::File::open("/dev/urandom").map_err(SecretMemoryError::Random)?)
            .read_exact(secret.expose_mut())
            .map_err(SecretMemoryError::Random)?;
        Ok(secret)
    }

    /// Copies `bytes`; wiping the original is the caller's duty.
    pub fn copy_of(bytes: &[u8]) -> Result<Self, SecretMemoryError> {
        let mut secret = Self::zeroed(bytes.len())?;
        secret.expose_mut().copy_from_slice(bytes);
        Ok(secret)
    }

    /// Number of bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes; do not copy them into ordinary memory.
    pub fn expose(&self) -> &[u8] {
        // SAFETY: the mapping is readable, at least `len` long, and lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.pages.as_ptr().cast(), self.len) }
    }

    /// The bytes, to be filled in place.
    pub fn expose_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `expose`, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.pages.as_ptr().cast(), self.len) }
    }

    /// Keeps the first `len` bytes and wipes the rest.
    pub fn truncate(&mut self, len: usize) {
        if len < self.len {
            self.expose_mut()[len..].zeroize();
            self.len = len;
        }
    }
}

impl PartialEq for SecretBytes {
    /// In constant time for equal lengths.
    fn eq(&self, other: &Self) -> bool {
        self.len == other.len && openssl::memcmp::eq(self.expose(), other.expose())
    }
}

impl Drop for SecretBytes {
    fn drop(&mut self) {
        self.expose_mut().zeroize();
        // SAFETY: the mapping is ours and no reference into it outlives `self`. An error would only leak zeroes.
        let _ = unsafe { munmap(self.pages, self.mapped.get()) };
    }
}

// SAFETY: the mapping is owned, not thread-bound, and shared access is read-only.
unsafe impl Send for SecretBytes {}
// SAFETY: as above.
unsafe impl Sync for SecretBytes {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_locked_and_not_dumped() {
        let secret = SecretBytes::random(64).unwrap();
        assert_ne!(secret.expose(), [0; 64]);
        let address = secret.pages.as_ptr() as usize;
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        // The mapping's block of lines starts with "START-END "; its VmFlags line lists lo (locked), dd (do not dump)
        // and dc (do not copy on fork).
        let mut inside = false;
        let flags = smaps
            .lines()
            .find(|line| {
                if let Some((start, end)) = line.split(' ').next().and_then(|range| range.split_once('-')) {
                    let parse = |hex| usize::from_str_radix(hex, 16).unwrap_or(0);
                    inside = (parse(start)..parse(end)).contains(&address);
                }
                inside && line.starts_with("VmFlags:")
            })
            .unwrap();
        for flag in ["lo", "dd", "dc"] {
            assert!(flags.split_whitespace().any(|f| f == flag), "{flag} missing in {flags}");
        }
    }

    #[test]
    fn compares_and_truncates() {
        let mut a = SecretBytes::copy_of(b"abcdef").unwrap();
        assert!(a == SecretBytes::copy_of(b"abcdef").unwrap());
        a.truncate(3);
        assert_eq!(a.expose(), b"abc");
        assert!(a != SecretBytes::copy_of(b"abd").unwrap());
    }
}
