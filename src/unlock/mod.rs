//! Between a volume and its key.

pub mod audit;
pub mod case;
pub mod container;
pub mod enrol;
mod error;
pub mod lockbox;
pub mod store_key;

pub use error::Error;
