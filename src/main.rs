//! The command: parse, run, print the error, exit with its code.

use std::process::ExitCode;

fn main() -> ExitCode {
    cryptattach::cli::main()
}
