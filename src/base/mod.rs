//! The types that every floor speaks. Nothing here reaches a store, a device or a network.

pub mod address;
pub mod advice;
pub mod chain;
pub mod clock;
pub mod exit;
pub mod hex;
pub mod key;
pub mod log;
pub mod mapping_name;
pub mod pcr_set;
pub mod person;
pub mod plain_hash;
