//! placeholder
pub mod audit;
pub mod backend;
pub mod config;
pub mod device;
pub mod holders;
pub mod key;
pub mod seal;
pub mod separation;
pub mod store;
pub mod volume;
