//! libcryptsetup's plug-in for tokens of type `cryptattach`: with it, `cryptsetup open --token-only`, systemd-cryptsetup and
//! everything else on libcryptsetup open compatible volumes (`cryptattach format --keyslot`) like any other.
//!
//! It fetches nothing itself. It runs `/usr/bin/cryptattach key passphrase --for DEVICE`, which checks the header, proves that
//! key and data are apart, opens the sealed key for this very volume, and writes the keyslot's passphrase to a pipe. A program
//! and no socket: it works in an initramfs, where no service listens, and with the caller's rights, no others.
//!
//! The functions are those of libcryptsetup.h, "LUKS2 token handlers"; `token.map` gives them their symbol version.
#![allow(unsafe_code)] // the C interface

mod child;
mod page;
mod token;

use std::{
    ffi::{CStr, CString, OsStr, c_char, c_int, c_void},
    io::{self, Write},
    os::unix::ffi::OsStrExt,
    path::Path,
};

use page::Page;
use token::Token;

/// libcryptsetup's context, of which only libcryptsetup knows the inside.
#[repr(C)]
pub struct CryptDevice {
    opaque: [u8; 0],
}

const CRYPT_LOG_NORMAL: c_int = 0;

#[link(name = "cryptsetup")]
unsafe extern "C" {
    fn crypt_get_device_name(context: *mut CryptDevice) -> *const c_char;
    fn crypt_get_metadata_device_name(context: *mut CryptDevice) -> *const c_char;
    fn crypt_log(context: *mut CryptDevice, level: c_int, message: *const c_char);
}

/// The plug-in's version.
#[unsafe(no_mangle)]
pub extern "C" fn cryptsetup_token_version() -> *const c_char {
    const VERSION: &CStr = match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
        Ok(version) => version,
        Err(_) => unreachable!(),
    };
    VERSION.as_ptr()
}

/// Hands the passphrase of the token's keyslot over, in memory that [`cryptsetup_token_buffer_free`] takes back.
///
/// 0, or `-EAGAIN` if the key store cannot be reached now, or `-ENOENT`: libcryptsetup goes on with the next token, or asks a
/// person. Any other error would end its search. Why it failed, the program has said on standard error by then.
///
/// # Safety
/// libcryptsetup calls it: `context` is its own, `buffer` and `buffer_len` can be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cryptsetup_token_open(
    context: *mut CryptDevice,
    _token: c_int,
    buffer: *mut *mut c_char,
    buffer_len: *mut usize,
    _usrptr: *mut c_void,
) -> c_int {
    // SAFETY: the names are libcryptsetup's, NUL-terminated, and live as long as the context.
    let (device, header) =
        unsafe { (path(crypt_get_device_name(context)), path(crypt_get_metadata_device_name(context))) };
    let Some(device) = device else { return -libc::ENOENT };
    match child::passphrase(device, header.filter(|header| *header != device)) {
        Ok(passphrase) => {
            let (bytes, len) = passphrase.into_raw();
            // SAFETY: both point to variables of the caller.
            unsafe {
                *buffer = bytes;
                *buffer_len = len;
            }
            0
        }
        Err(failure) => {
            if let Some(message) = &failure.message {
                // A panic would be the end of the program that this is in. The message names a device, whose name may be anything.
                let _ = writeln!(io::stderr(), "cryptattach: {}", message.replace(char::is_control, "\u{fffd}"));
            }
            -failure.errno
        }
    }
}

/// Wipes and frees what [`cryptsetup_token_open`] gave.
///
/// # Safety
/// libcryptsetup calls it, once, with what it got from [`cryptsetup_token_open`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cryptsetup_token_buffer_free(buffer: *mut c_void, buffer_len: usize) {
    // SAFETY: it came out of `Page::into_raw`, and nobody uses it any more.
    drop(unsafe { Page::from_raw(buffer.cast(), buffer_len) });
}

/// 0 if the token is one of ours and whole, else `-EINVAL`.
///
/// # Safety
/// libcryptsetup calls it: `json` is NUL-terminated or null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cryptsetup_token_validate(_context: *mut CryptDevice, json: *const c_char) -> c_int {
    // SAFETY: as above.
    match unsafe { text(json) }.and_then(Token::parse) {
        Some(_) => 0,
        None => -libc::EINVAL,
    }
}

/// Prints the token, for `cryptsetup luksDump`.
///
/// # Safety
/// libcryptsetup calls it: `context` is its own, `json` is NUL-terminated or null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cryptsetup_token_dump(context: *mut CryptDevice, json: *const c_char) {
    // SAFETY: as above.
    let lines = match unsafe { text(json) }.and_then(Token::parse) {
        Some(token) => token.to_string(),
        None => "\t(malformed)\n".to_owned(),
    };
    let Ok(lines) = CString::new(lines) else { return };
    // SAFETY: a NUL-terminated text; libcryptsetup copies it.
    unsafe { crypt_log(context, CRYPT_LOG_NORMAL, lines.as_ptr()) };
}

/// # Safety
/// `name` is null or NUL-terminated, and outlives what is returned.
unsafe fn path<'a>(name: *const c_char) -> Option<&'a Path> {
    // SAFETY: the caller's promise.
    (!name.is_null()).then(|| Path::new(OsStr::from_bytes(unsafe { CStr::from_ptr(name) }.to_bytes())))
}

/// # Safety
/// `json` is null or NUL-terminated, and outlives what is returned.
unsafe fn text<'a>(json: *const c_char) -> Option<&'a str> {
    // SAFETY: the caller's promise.
    if json.is_null() { None } else { unsafe { CStr::from_ptr(json) }.to_str().ok() }
}
