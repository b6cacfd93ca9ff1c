//! cryptattach sets up dm-crypt/LUKS when a block device is attached: it fetches or unseals the volume key, proves that
//! key and data rest on different devices, and maps the volume, in the kernel or, where that has no device-mapper, in
//! userspace.
//!
//! # The map
//!
//! A verb is one straight line: [`attach`], [`detach`], [`mod@format`], [`import`], [`resize`]; [`hook`] is what OpenStack asks
//! for in the same words. Each noun on that line is one module:
//!
//! | module | noun |
//! |---|---|
//! | [`key`] | the volume key, its id and reference, its sealed form, secret memory |
//! | [`seal`] | recipients seal, identities open |
//! | [`store`] | dictionaries from key id to sealed key: directory, Swift, Barbican |
//! | [`container`] | a store with whom its keys are sealed to and what opens them here |
//! | [`lockbox`] | this host's cache of keys, and the key that it opens once per boot |
//! | [`volume`] | headers, checked against an allow-list |
//! | [`tpm`] | the host's identity in its TPM, and the boot states that it opens in |
//! | [`enrol`] | how a host proves by its TPM what its key is, and how an administrator checks it |
//! | [`separation`] | lineage of devices and places of keys; the verdict |
//! | [`backend`] | mappings, by dm-crypt or in userspace |
//!
//! Dependencies point one way: `cli -> attach/format/... -> container -> {store, seal, volume, separation, backend} -> {tpm, key}`,
//! with [`lockbox`] between [`container`] and {[`store`], [`seal`]}.

pub mod attach;
pub mod audit;
pub mod backend;
pub mod boot;
pub mod cli;
pub mod clock;
pub mod config;
pub mod container;
pub mod crypttab;
pub mod detach;
pub mod device;
pub mod durable;
pub mod enrol;
pub mod error;
pub mod format;
pub mod hex;
pub mod holders;
pub mod hook;
pub mod hotplug;
pub mod import;
pub mod keep;
pub mod key;
pub mod keyring;
pub mod last_failure;
pub mod lockbox;
pub mod release;
pub mod resize;
pub mod seal;
pub mod separation;
pub mod state;
pub mod store;
pub mod systemd;
pub mod tpm;
pub mod trial;
pub mod volume;
