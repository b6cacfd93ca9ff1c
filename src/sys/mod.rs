//! What the kernel and systemd say and take.

pub mod announce;
pub mod block;
pub mod device;
pub mod durable;
pub mod journal;
pub mod kernel_files;
pub mod kernel_keyring;
pub mod lock;
pub mod loop_device;
pub mod memory;
pub mod mounts;
pub mod precedence;
pub mod process;
pub mod programs;
pub mod state;
pub mod stop;
pub mod stores;
pub mod sysfs;
pub mod systemd;
pub mod terminal;
pub mod users;
