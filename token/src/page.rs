//! A page of locked memory for the passphrase.

use std::{ffi::c_char, io, ptr::NonNull, slice};

/// Room for a passphrase. Those of `cryptattach format` have 64 bytes.
pub const PAGE_BYTES: usize = 4096;

/// Memory that is locked and left out of core dumps as far as the process may, and wiped on drop.
pub struct Page {
    bytes: NonNull<u8>,
    len: usize,
}

impl Page {
    /// An empty page.
    pub fn new() -> io::Result<Self> {
        // SAFETY: an anonymous private mapping at an address of the kernel's choice aliases nothing.
        let bytes = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        let bytes = (bytes != libc::MAP_FAILED).then(|| NonNull::new(bytes.cast::<u8>())).flatten();
        let bytes = bytes.ok_or_else(io::Error::last_os_error)?;
        // The caller's limits are not ours to judge: its other keys lie where this one lies.
        // SAFETY: exactly the mapping made above.
        unsafe {
            libc::mlock(bytes.as_ptr().cast(), PAGE_BYTES);
            libc::madvise(bytes.as_ptr().cast(), PAGE_BYTES, libc::MADV_DONTDUMP);
        }
        Ok(Self { bytes, len: 0 })
    }

    /// Number of bytes in use.
    pub fn len(&self) -> usize {
        self.len
    }

    /// The part that is not in use yet.
    pub fn room(&mut self) -> &mut [u8] {
        // SAFETY: the mapping has PAGE_BYTES bytes, of which `len` are in use, and `&mut self` makes the access exclusive.
        unsafe { slice::from_raw_parts_mut(self.bytes.as_ptr().add(self.len), PAGE_BYTES - self.len) }
    }

    /// Takes `count` more bytes into use, which have been written to [`Page::room`].
    pub fn grow(&mut self, count: usize) {
        self.len = (self.len + count).min(PAGE_BYTES);
    }

    /// Gives the memory out of hand: its address, and the number of bytes in use.
    pub fn into_raw(self) -> (*mut c_char, usize) {
        let raw = (self.bytes.as_ptr().cast(), self.len);
        std::mem::forget(self);
        raw
    }

    /// Takes back what [`Page::into_raw`] gave; `None` for a null pointer.
    ///
    /// # Safety
    /// `bytes` came out of [`Page::into_raw`], and nobody uses it any more.
    pub unsafe fn from_raw(bytes: *mut c_char, len: usize) -> Option<Self> {
        Some(Self { bytes: NonNull::new(bytes.cast())?, len })
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and no reference into it outlives `self`.
        unsafe {
            libc::explicit_bzero(self.bytes.as_ptr().cast(), PAGE_BYTES);
            libc::munmap(self.bytes.as_ptr().cast(), PAGE_BYTES);
        }
    }
}
