//! Failures as they are printed, and the table of exit codes.

use std::fmt::Write as _;

use super::output;
use crate::{
    base::exit,
    verbs::{error::Error, failure::Failure},
};

/// The files that the program uses, as `--help` and the man page show them.
pub const FILES: &str = "Files:
  /etc/cryptattach/cryptattach.toml   configuration (--config, CRYPTATTACH_CONFIG)
  /var/log/cryptattach.jsonl          audit record
  /var/lib/cryptattach/               the container keys that this host trusts, its enrolment and lockbox; the hosts that it admitted
  /run/cryptattach/                   userspace mappings; boot.json and boot.log of this boot; failures, for 'explain'";

/// What `--help` and the man page show after the options.
pub fn after_help() -> String {
    let mut text = "Exit codes:\n".to_owned();
    for (code, meaning) in exit::table() {
        let _ = writeln!(text, "  {code:>2}  {meaning}");
    }
    text + "\n" + FILES
}

/// Prints an error.
pub fn print(error: &Error, json: bool) {
    let failure = Failure::of(error);
    if json { output::say_json(&failure) } else { output::say(failure.lines()) }
}
