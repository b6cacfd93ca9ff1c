//! Enrolment: a host proves what its key is before anything is sealed to that key.
//!
//! | step | who, with what | makes |
//! |---|---|---|
//! | [`enrol`] | the host, its TPM | the identity key's file, and a [`Bundle`] that says how the key was made |
//! | [`Administrator::challenge`] | the administrator, no TPM | a [`Challenge`] that only the TPM of the bundle can open |
//! | [`answer`] | the host, its TPM | an [`EnrolAnswer`] |
//! | [`Administrator::verify`] | the administrator | an [`Admission`]: whom to seal to |
//!
//! The links of the proof, each of them checked in software ([`evidence`]):
//!
//! 1. The maker's certificate, or the administrator's word, says that the **endorsement key** is a real TPM's.
//! 2. The challenge is a credential made for that key and the **attestation key's** name: who answers it has both in one TPM.
//! 3. The attestation key, which signs nothing but what its TPM has made up, says that this TPM made the **identity key**, with
//!    a public area that says: never leaves this TPM, nobody has ever known it, usable by its policy only.
//! 4. The **policy** in that public area is what the administrator computes from the site's own configuration.
//!
//! Documents travel as files; nothing in them is secret.

mod administrator;
mod credential;
mod document;
mod endorsement;
mod error;
pub mod evidence;
mod host;
mod register;

pub use administrator::{Administrator, Admission, Issued, Site};
pub use document::{Attestation, Bundle, Challenge, Document, EndorsementKey, EnrolAnswer, Statement};
pub use endorsement::{Trust, Vouched};
pub use error::{EnrolError, Part};
pub use host::{Enrolled, answer, enrol};
pub use register::{Admitted, Enrolment, Register};
