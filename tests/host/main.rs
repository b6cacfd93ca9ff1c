//! The host layer: the built binary on real loop devices and FUSE. Needs root; run by `scripts/test host`.

#[path = "../common/luks2.rs"]
mod luks2;
#[path = "../common/shell.rs"]
mod shell;
mod site;

mod attach;
mod busy;
mod foreign;
mod format;
mod refusals;
mod secrets;
mod separation;
mod trial;
