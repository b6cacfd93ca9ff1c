//! What users see on the terminal, to the letter. Needs no root and no device.

use std::{
    fs::File,
    process::{Command, Stdio},
};

#[test]
fn command_line() {
    trycmd::TestCases::new().case("tests/cli/*.trycmd").insert_var("[VERSION]", env!("CARGO_PKG_VERSION")).unwrap();
}

#[test]
fn the_exit_code_is_right_when_nobody_listens() {
    for arguments in [
        &["--config", "missing.toml", "key", "list"][..],
        &["-vv", "--config", "missing.toml", "separation", "/dev/null"],
    ] {
        let full = || Stdio::from(File::create("/dev/full").unwrap());
        let status =
            Command::new(env!("CARGO_BIN_EXE_cryptattach")).args(arguments).stdout(full()).stderr(full()).status();
        assert_eq!(status.unwrap().code(), Some(78), "{arguments:?}");
    }
}
