//! The commands of TPM 2.0 Part 3 that we send, each with the values of this crate.

mod keys;
mod memory;
mod policy;

pub use keys::Created;
pub use memory::NvPublic;
pub use policy::SessionKind;

/// Takes what libtss2 has allocated.
macro_rules! take {
    ($esys:expr, $command:literal, $value:expr) => {
        // SAFETY: an output of the call just above, which has succeeded; it is in no other hands.
        unsafe { TpmAnswer::take($esys, $command, $value) }
    };
}
use take;
