//! Enrolment: a host proves what its key is before anything is sealed to that key.
//!
//! | step | who, with what | makes |
//! |---|---|---|
//! | [`request`] | the host, its TPM | the identity key's file, and a [`Request`] that says how the key was made |
//! | [`Administrator::examine`] | the administrator, no TPM | a [`Candidate`], which may be admitted |
//! | [`Candidate::admission`] | the administrator, no TPM | an [`Admission`]: whom to seal to, and an [`Answer`] |
//! | [`take`] | the host, its TPM | the share without which what was sealed does not open |
//!
//! The links of the proof, each of them checked in software ([`evidence`]):
//!
//! 1. The maker's certificate, or the administrator's word, says that the **endorsement key** is a real TPM's.
//! 2. The answer is a credential made for that key and the **attestation key's** name: who opens it has both in one TPM.
//!    Nobody has to come back with that proof, for without what is in the credential nothing opens.
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

pub use administrator::{Administrator, Admission, Candidate, Site};
pub use document::{Answer, Attestation, Document, EndorsementKey, Request, Statement};
pub use endorsement::{Trust, Vouched};
pub use error::{EnrolError, Part};
pub use host::{Asked, Joined, asked, request, take};
pub use register::{Admitted, Enrolment, Register};
