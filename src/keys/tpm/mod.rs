//! The TPM: a host's identity, usable only in a trusted boot state.
//!
//! | module | what |
//! |---|---|
//! | [`Tpm`] | the connection, the storage root key whose name is pinned, the PCRs |
//! | [`Policy`] | in which state a key may be used: computed in software, satisfied in the TPM |
//! | [`PcrSignatures`] | a site's word for boot states that are still to come: `tpm2-pcr-signature.json` |
//! | [`IdentityFile`] | a key in its file, "TSS2 PRIVATE KEY" |
//! | [`Tpm::create_identity`], [`Tpm::identity`] | a key made, and used |
//! | [`latch()`] | the end of a key's use in this boot: PCR 15, extended and read back |
//! | [`Counter`] | the NV counter that retires old signatures |
//! | [`NvMemory`] | NV indices that hold bytes: the key store `tpm-nv` |
//! | [`AuditIndex`] | the NV index that anchors the audit record |
//! | [`Vendor`] | who made the TPM, and whether it is a chip |
//! | [`EndorsementKind`], [`Certified`] | how a TPM proves what it is and what it holds |
//! | [`EventLog`] | what the firmware and the boot loader say they have measured |
//!
//! Every session is salted to the storage root key, so that whoever listens between CPU and TPM learns no key of it, and
//! encrypts parameters. Sessions and loaded objects are given back when their values are dropped.

mod attestation;
mod audit_index;
mod boot;
mod commands;
mod connection;
mod counter;
mod endorsement;
mod error;
mod esys;
mod event_log;
mod identity;
mod key_file;
mod latch;
mod mismatch;
mod name;
mod nv;
mod pcr;
mod pin;
mod policy;
mod policy_session;
pub mod public;
mod signature;
mod vendor;

pub use attestation::Certified;
pub use audit_index::AuditIndex;
pub use boot::{BootChain, Exposure, exposures};
pub use commands::{Created, SessionKind};
pub use connection::{StorageRoot, Tpm};
pub use counter::{Counter, CounterValue};
pub use endorsement::{EndorsementKind, attestation_attributes, attestation_templates, with_unique_of};
pub use error::{Code, TpmError};
pub use esys::{Esys, Handle, silence};
pub use event_log::{Event, EventLog, parse as parse_event_log};
pub use identity::{Identity, NewIdentity};
pub use key_file::{IdentityFile, Share};
pub use latch::{KEYS_WERE_OPENED, latch, pcr_after};
pub use mismatch::{Explanation, Finding};
pub use name::Name;
pub use nv::{NvIndex, NvMemory, NvOwner};
pub use pcr::PcrValues;
pub use pin::{ask, ask_until, first_line, pin};
pub use policy::{EPOCHS, Policy, Revocation, SignedPcrs};
pub use policy_session::Satisfiable;
pub use signature::{PcrSignature, PcrSignatures, SiteKey, SiteSigner};
pub use vendor::Vendor;

/// A SHA-256 digest.
pub type Digest = [u8; 32];
