//! One connection to the TPM over libtss2's ESAPI, and what it lends: sessions and loaded objects that are given back.
//!
//! The `tss-esapi` crate has the types and the bindings. Its `Context` is not used: it has no `TPM2_PolicyNV` and keeps the
//! ESAPI context to itself, waits without a bound, and copies secrets into memory that is not locked.
#![allow(unsafe_code)] // calls into libtss2

use std::{
    cell::Cell,
    ffi::CString,
    fs::OpenOptions,
    io,
    marker::PhantomData,
    ops::Deref,
    ptr::{NonNull, null_mut},
    slice,
    time::{Duration, Instant},
};

use tss_esapi::{constants::tss, tss2_esys as sys};

use super::{TpmError, error::Code};

/// How long a TPM may say that it is busy.
const MOST_BUSY: Duration = Duration::from_secs(10);
/// The pause before a command is sent again to a TPM that was busy. It gives no sign when it is not any more.
const BUSY_PAUSE: Duration = Duration::from_millis(50);
/// `TSS2_BASE_RC_TRY_AGAIN`: no answer within the time, or libtss2 has sent the command again.
const TRY_AGAIN: u32 = 9;

/// Sends a command and waits for its answer: the name of the `_Async` function with its inputs, that of the `_Finish`
/// function with its outputs.
macro_rules! command {
    ($esys:expr, $send:ident ( $($input:expr),* ), $finish:ident ( $($output:expr),* )) => {
        $esys.call(
            stringify!($send).trim_start_matches("Esys_").trim_end_matches("_Async"),
            // SAFETY: the context is live and used by this thread only; libtss2 copies the inputs, which live until then.
            |context| unsafe { sys::$send(context, $($input),*) },
            // SAFETY: as above; the outputs are variables of the caller, written on success only.
            |context| unsafe { sys::$finish(context, $($output),*) },
        )
    };
}
pub(super) use command;

/// A connection.
pub struct Esys {
    context: NonNull<sys::ESYS_CONTEXT>,
    tcti: NonNull<sys::TSS2_TCTI_CONTEXT>,
    sent: Cell<u32>,
    policy_sessions: Cell<u32>,
    /// How long one command may take.
    limit: Duration,
}

/// Keeps libtss2's own messages off standard error: what goes wrong is said by [`TpmError`], once. `TSS2_LOG` in the
/// environment is left alone.
///
/// To be called while the process has one thread.
pub fn silence() {
    if std::env::var_os("TSS2_LOG").is_none() {
        // SAFETY: the caller has no other thread that could read the environment meanwhile.
        unsafe { std::env::set_var("TSS2_LOG", "all+NONE") };
    }
}

impl Esys {
    /// Connects by the TCTI of this name and configuration, as in `device:/dev/tpmrm0`.
    pub fn connect(tcti_name: &str, limit: Duration) -> Result<Self, TpmError> {
        let missing = |code| TpmError::Missing { tcti: tcti_name.to_owned(), source: why_missing(tcti_name, code) };
        let name = CString::new(tcti_name).map_err(|_| missing(Code(0)))?;
        let mut tcti = null_mut();
        // SAFETY: a valid string in, a pointer to a variable of ours out.
        let code = unsafe { sys::Tss2_TctiLdr_Initialize(name.as_ptr(), &mut tcti) };
        let tcti = NonNull::new(tcti).filter(|_| code == 0).ok_or_else(|| missing(Code(code)))?;
        let mut context = null_mut();
        // SAFETY: the TCTI is initialised and outlives the context (`drop`).
        let code = unsafe { sys::Esys_Initialize(&mut context, tcti.as_ptr(), null_mut()) };
        match NonNull::new(context).filter(|_| code == 0) {
            Some(context) => Ok(Self { context, tcti, sent: Cell::new(0), policy_sessions: Cell::new(0), limit }),
            None => {
                // SAFETY: initialised above and not used any more.
                unsafe { sys::Tss2_TctiLdr_Finalize(&mut tcti.as_ptr()) };
                Err(missing(Code(code)))
            }
        }
    }

    pub(super) fn count_policy_session(&self) {
        self.policy_sessions.set(self.policy_sessions.get() + 1);
    }

    /// Sends a command and waits for its answer, in bounded time. For `command!`.
    pub fn call(
        &self,
        command: &'static str,
        mut send: impl FnMut(*mut sys::ESYS_CONTEXT) -> u32,
        mut finish: impl FnMut(*mut sys::ESYS_CONTEXT) -> u32,
    ) -> Result<(), TpmError> {
        let start = Instant::now();
        loop {
            tracing::trace!("TPM2_{command}");
            self.sent.set(self.sent.get() + 1);
            let code = match send(self.context.as_ptr()) {
                0 => self.answer(command, start, &mut finish)?,
                code => code,
            };
            match Code(code) {
                Code(0) => return Ok(()),
                code if code.is_busy() && start.elapsed() < MOST_BUSY.min(self.limit / 2) => {
                    std::thread::sleep(BUSY_PAUSE)
                }
                code if code.is_busy() => return Err(TpmError::Busy { command }),
                code => return Err(TpmError::Refused { command, code }),
            }
        }
    }

    fn answer(
        &self,
        command: &'static str,
        start: Instant,
        mut finish: impl FnMut(*mut sys::ESYS_CONTEXT) -> u32,
    ) -> Result<u32, TpmError> {
        loop {
            let left = self.limit.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Err(TpmError::TimedOut { command, after: self.limit });
            }
            // SAFETY: the context is live. The TCTI for devices waits no longer (poll(2)).
            unsafe { sys::Esys_SetTimeout(self.context.as_ptr(), left.as_millis() as i32) };
            match finish(self.context.as_ptr()) {
                code if code & 0xFFFF == TRY_AGAIN && code >> 16 != 0 => {}
                code => return Ok(code),
            }
        }
    }

    pub(super) fn context(&self) -> *mut sys::ESYS_CONTEXT {
        self.context.as_ptr()
    }

    /// A loaded object or session that this process has to flush.
    pub(super) fn transient(&self, tr: sys::ESYS_TR) -> Handle<'_> {
        Handle { esys: self, tr, flush: true }
    }

    /// Something that stays in the TPM.
    pub(super) fn resident(&self, tr: sys::ESYS_TR) -> Handle<'_> {
        Handle { esys: self, tr, flush: false }
    }
}

impl Drop for Esys {
    fn drop(&mut self) {
        let (commands, sessions) = (self.sent.get(), self.policy_sessions.get());
        tracing::debug!("the TPM took {commands} commands, with {sessions} policy sessions");
        // SAFETY: both are live, and no handle outlives `self`; the context goes before the TCTI that it uses.
        unsafe {
            sys::Esys_Finalize(&mut self.context.as_ptr());
            sys::Tss2_TctiLdr_Finalize(&mut self.tcti.as_ptr());
        }
    }
}

/// Why there is no connection. libtss2 does not say, but for devices the system does.
fn why_missing(tcti_name: &str, code: Code) -> io::Error {
    let device = tcti_name.strip_prefix("device:");
    let opened = device.map(|path| OpenOptions::new().read(true).write(true).open(path));
    opened.and_then(Result::err).unwrap_or_else(|| io::Error::other(code.to_string()))
}

/// A session, an object or an NV index of a connection. Sessions and objects are flushed on drop: the TPM has room for
/// three of either.
pub struct Handle<'t> {
    pub(super) esys: &'t Esys,
    pub(super) tr: sys::ESYS_TR,
    flush: bool,
}

impl Handle<'_> {
    pub(super) fn tr(&self) -> sys::ESYS_TR {
        self.tr
    }
}

impl Drop for Handle<'_> {
    fn drop(&mut self) {
        if self.flush {
            let (esys, tr) = (self.esys, self.tr);
            let flushed = command!(esys, Esys_FlushContext_Async(tr), Esys_FlushContext_Finish());
            if let Err(error) = flushed {
                tracing::debug!("a session or object stays in the TPM: {}", crate::base::chain::chain(&error));
            }
        } else {
            // SAFETY: the context is live. Only libtss2's own record is closed.
            unsafe { sys::Esys_TR_Close(self.esys.context(), &mut self.tr) };
        }
    }
}

/// What libtss2 has allocated: wiped and freed on drop.
pub struct TpmAnswer<'t, T> {
    value: NonNull<T>,
    context: PhantomData<&'t Esys>,
}

impl<'t, T> TpmAnswer<'t, T> {
    /// Takes an output of a call that succeeded.
    ///
    /// # Safety
    /// `value` must be null or come from libtss2, initialised, and belong to nobody else.
    pub(super) unsafe fn take(_: &'t Esys, command: &'static str, value: *mut T) -> Result<Self, TpmError> {
        let value = NonNull::new(value).ok_or(TpmError::Answer { command })?;
        Ok(Self { value, context: PhantomData })
    }
}

impl<T> Deref for TpmAnswer<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: allocated and filled by libtss2 (calloc(3) and unmarshalling), ours until freed.
        unsafe { self.value.as_ref() }
    }
}

impl<T> Drop for TpmAnswer<'_, T> {
    fn drop(&mut self) {
        // SAFETY: the allocation has the size of T (the structures that are taken so have one size in the bindings, in tss2
        // 3.2 and in 4.1) and is ours. T is a plain C structure, for which no value is wrong.
        unsafe {
            let bytes = slice::from_raw_parts_mut(self.value.as_ptr().cast::<u8>(), size_of::<T>());
            zeroize::Zeroize::zeroize(bytes);
            sys::Esys_Free(self.value.as_ptr().cast());
        }
    }
}

/// No session.
pub const NONE: sys::ESYS_TR = sys::ESYS_TR_NONE;
/// The empty password.
pub const PASSWORD: sys::ESYS_TR = sys::ESYS_TR_PASSWORD;
/// The owner hierarchy.
pub const OWNER: sys::ESYS_TR = sys::ESYS_TR_RH_OWNER;
/// The endorsement hierarchy.
pub const ENDORSEMENT: sys::ESYS_TR = sys::ESYS_TR_RH_ENDORSEMENT;
/// SHA-256, the one hash that we use.
pub const SHA256: u16 = tss::TPM2_ALG_SHA256;

/// Has the compiler check that the bindings, which were made beforehand, have libtss2's sizes: an answer is wiped over its whole
/// size. A test asks the headers that are installed.
macro_rules! sizes {
    ($($name:ident = $size:literal),* $(,)?) => {
        $(const _: () = assert!(size_of::<sys::$name>() == $size);)*
        #[cfg(test)]
        const SIZES: &[(&str, usize)] = &[$((stringify!($name), $size)),*];
    };
}

sizes! {
    TPM2B_ATTEST = 2306,
    TPM2B_CREATION_DATA = 412,
    TPM2B_DATA = 66,
    TPM2B_DIGEST = 66,
    TPM2B_ECC_POINT = 262,
    TPM2B_ENCRYPTED_SECRET = 514,
    TPM2B_ID_OBJECT = 134,
    TPM2B_MAX_NV_BUFFER = 2050,
    TPM2B_NAME = 70,
    TPM2B_NV_PUBLIC = 84,
    TPM2B_PRIVATE = 1552,
    TPM2B_PUBLIC = 616,
    TPM2B_PUBLIC_KEY_RSA = 514,
    TPM2B_SENSITIVE_CREATE = 326,
    TPML_DIGEST = 532,
    TPML_DIGEST_VALUES = 1060,
    TPML_PCR_SELECTION = 132,
    TPMS_CAPABILITY_DATA = 1032,
    TPMT_RSA_DECRYPT = 6,
    TPMT_SIGNATURE = 518,
    TPMT_SIG_SCHEME = 6,
    TPMT_SYM_DEF = 6,
    TPMT_TK_CREATION = 76,
    TPMT_TK_VERIFIED = 76,
}

/// A sized buffer.
pub fn buffer(bytes: &[u8]) -> Result<sys::TPM2B_DIGEST, TpmError> {
    let mut buffer = sys::TPM2B_DIGEST { size: bytes.len() as u16, buffer: [0; 64] };
    buffer.buffer.get_mut(..bytes.len()).ok_or(TpmError::TooLong)?.copy_from_slice(bytes);
    Ok(buffer)
}

/// The bytes of a sized buffer, as far as they are there.
pub fn sized(size: u16, buffer: &[u8]) -> &[u8] {
    &buffer[..usize::from(size).min(buffer.len())]
}

#[cfg(test)]
mod tests {
    use std::{fs, process::Command};

    use super::SIZES;

    #[test]
    fn the_installed_headers_have_the_sizes_of_the_bindings() {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("sizes.c");
        let check = |(name, size): &(&str, usize)| format!("_Static_assert(sizeof({name}) == {size}, \"{name}\");\n");
        let checks: String = SIZES.iter().map(check).collect();
        fs::write(&source, format!("#include <tss2/tss2_esys.h>\n{checks}")).unwrap();
        let compiled = Command::new("cc").arg("-fsyntax-only").arg(&source).output().unwrap();
        assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    }
}
