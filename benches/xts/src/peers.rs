//! AES-256-XTS of other libraries, sector by sector, as a block device has it.

use std::{
    ffi::{c_char, c_int, c_uint, c_void},
    ptr::{null, null_mut},
};

use openssl::{cipher::Cipher, cipher_ctx::CipherCtx};

/// One peer in one direction: whole sectors in place, the first one's number.
pub type Apply = Box<dyn FnMut(&mut [u8], u64)>;

fn each(sectors: &mut [u8], bytes: usize, first: u64, mut apply: impl FnMut(&mut [u8], [u8; 16])) {
    for (index, sector) in sectors.chunks_exact_mut(bytes).enumerate() {
        apply(sector, u128::from(first + (index * bytes / 512) as u64).to_le_bytes());
    }
}

/// OpenSSL, through its crate.
pub fn openssl(key: &[u8; 64], bytes: usize, encrypt: bool) -> Apply {
    let mut context = CipherCtx::new().unwrap();
    let cipher = Some(Cipher::aes_256_xts());
    if encrypt {
        context.encrypt_init(cipher, Some(key), Some(&[0; 16])).unwrap();
    } else {
        context.decrypt_init(cipher, Some(key), Some(&[0; 16])).unwrap();
    }
    Box::new(move |sectors, first| {
        each(sectors, bytes, first, |sector, tweak| {
            if encrypt {
                context.encrypt_init(None, None, Some(&tweak)).unwrap();
            } else {
                context.decrypt_init(None, None, Some(&tweak)).unwrap();
            }
            context.cipher_update_inplace(sector, bytes).unwrap();
        });
    })
}

/// AWS-LC.
pub fn aws_lc(key: &[u8; 64], bytes: usize, encrypt: bool) -> Apply {
    use aws_lc_sys::{EVP_CIPHER_CTX_new, EVP_CipherInit_ex, EVP_CipherUpdate, EVP_aes_256_xts};
    // SAFETY: plain calls of a C library with valid pointers; the context lives as long as the process.
    let context = unsafe {
        let context = EVP_CIPHER_CTX_new();
        assert_eq!(EVP_CipherInit_ex(context, EVP_aes_256_xts(), null_mut(), key.as_ptr(), null(), encrypt.into()), 1);
        context
    };
    Box::new(move |sectors, first| {
        each(sectors, bytes, first, |sector, tweak| {
            let (mut written, length) = (0, c_int::try_from(sector.len()).unwrap());
            // SAFETY: as above; it works in place.
            unsafe {
                EVP_CipherInit_ex(context, null(), null_mut(), null(), tweak.as_ptr(), -1);
                assert_eq!(EVP_CipherUpdate(context, sector.as_mut_ptr(), &mut written, sector.as_ptr(), length), 1);
            }
        });
    })
}

unsafe extern "C" {
    fn gcry_check_version(version: *const c_char) -> *const c_char;
    fn gcry_cipher_open(handle: *mut *mut c_void, algorithm: c_int, mode: c_int, flags: c_uint) -> c_uint;
    fn gcry_cipher_setkey(handle: *mut c_void, key: *const u8, length: usize) -> c_uint;
    fn gcry_cipher_setiv(handle: *mut c_void, iv: *const u8, length: usize) -> c_uint;
    fn gcry_cipher_encrypt(h: *mut c_void, out: *mut u8, size: usize, from: *const u8, length: usize) -> c_uint;
    fn gcry_cipher_decrypt(h: *mut c_void, out: *mut u8, size: usize, from: *const u8, length: usize) -> c_uint;

    fn gnutls_cipher_init(handle: *mut *mut c_void, cipher: c_int, key: *const Datum, iv: *const Datum) -> c_int;
    fn gnutls_cipher_set_iv(handle: *mut c_void, iv: *const u8, length: usize);
    fn gnutls_cipher_encrypt(handle: *mut c_void, data: *mut u8, length: usize) -> c_int;
    fn gnutls_cipher_decrypt(handle: *mut c_void, data: *mut u8, length: usize) -> c_int;
    fn gnutls_cipher_get_id(name: *const c_char) -> c_int;
}

/// libgcrypt (gcrypt.h: GCRY_CIPHER_AES256, GCRY_CIPHER_MODE_XTS).
pub fn libgcrypt(key: &[u8; 64], bytes: usize, encrypt: bool) -> Apply {
    let mut handle = null_mut();
    // SAFETY: plain calls of a C library with valid pointers; the handle lives as long as the process.
    unsafe {
        assert!(!gcry_check_version(null()).is_null());
        assert_eq!(gcry_cipher_open(&mut handle, 9, 13, 0), 0);
        assert_eq!(gcry_cipher_setkey(handle, key.as_ptr(), 64), 0);
    }
    Box::new(move |sectors, first| {
        each(sectors, bytes, first, |sector, tweak| {
            let apply = if encrypt { gcry_cipher_encrypt } else { gcry_cipher_decrypt };
            // SAFETY: as above; without an input it works in place.
            unsafe {
                gcry_cipher_setiv(handle, tweak.as_ptr(), 16);
                assert_eq!(apply(handle, sector.as_mut_ptr(), bytes, null(), 0), 0);
            }
        });
    })
}

#[repr(C)]
struct Datum {
    data: *const u8,
    size: c_uint,
}

/// GnuTLS.
pub fn gnutls(key: &[u8; 64], bytes: usize, encrypt: bool) -> Apply {
    let mut handle = null_mut();
    let iv = [0; 16];
    let (key, iv) = (Datum { data: key.as_ptr(), size: 64 }, Datum { data: iv.as_ptr(), size: 16 });
    // SAFETY: plain calls of a C library with valid pointers; the handle lives as long as the process.
    unsafe {
        assert_eq!(gnutls_cipher_init(&mut handle, gnutls_cipher_get_id(c"AES-256-XTS".as_ptr()), &key, &iv), 0);
    }
    Box::new(move |sectors, first| {
        each(sectors, bytes, first, |sector, tweak| {
            let apply = if encrypt { gnutls_cipher_encrypt } else { gnutls_cipher_decrypt };
            // SAFETY: as above; it works in place.
            unsafe {
                gnutls_cipher_set_iv(handle, tweak.as_ptr(), 16);
                assert_eq!(apply(handle, sector.as_mut_ptr(), bytes), 0);
            }
        });
    })
}
