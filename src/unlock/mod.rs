//! Between a volume and its key.

#[cfg(test)]
mod attacks;
pub mod audit;
pub mod case;
pub mod container;
mod deletions;
pub mod enrol;
mod error;
pub mod lockbox;
pub mod loops;
pub mod pins;
pub mod receipt;
pub mod tenant;
#[cfg(test)]
pub mod testing;

pub use error::Error;
