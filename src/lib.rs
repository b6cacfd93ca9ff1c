//! placeholder
pub mod backend;
pub mod device;
pub mod holders;
pub mod key;
pub mod seal;
pub mod separation;
pub mod store;
pub mod volume;
