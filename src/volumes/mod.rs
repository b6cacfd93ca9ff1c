//! What is encrypted, where it rests, and how it is mapped.

pub mod backend;
pub mod filesystem;
pub mod header;
pub mod in_place;
pub mod separation;
mod unlocked;

pub use unlocked::{Authority, Rest, Unlocked};
