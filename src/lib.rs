//! cryptattach sets up dm-crypt/LUKS when a block device is attached: it fetches or unseals the volume key, proves that
//! key and data rest on different devices, and maps the volume, in the kernel or, where that has no device-mapper, in
//! userspace.
//!
//! # Seven floors
//!
//! A floor uses the floors below it, never one above; [`keys`] and [`volumes`] do not know each other. The test
//! `tests/floors.rs` reads the imports and fails on an arrow that goes up.
//!
//! | floor | what it holds |
//! |---|---|
//! | [`cli`] | words in, words out: one file per verb |
//! | [`verbs`] | what a verb does: attach, detach, format, boot, the hooks, ... |
//! | [`unlock`] | between a volume and its key: the case, containers, the lockbox, enrolment, the audit record |
//! | [`keys`] | what keeps and opens keys: sealing, stores, the network, the TPM |
//! | [`volumes`] | what is encrypted, where it rests, how it is mapped: headers, separation, backends |
//! | [`config`] | pure data and paths |
//! | [`sys`] | what the kernel and systemd say and take |
//! | [`base`] | the types that every floor speaks |

pub mod base;
pub mod cli;
pub mod config;
pub mod keys;
pub mod sys;
pub mod unlock;
pub mod verbs;
pub mod volumes;
