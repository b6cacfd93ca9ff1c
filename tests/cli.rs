//! What users see on the terminal, to the letter. Needs no root and no device.

#[test]
fn command_line() {
    trycmd::TestCases::new().case("tests/cli/*.trycmd").insert_var("[VERSION]", env!("CARGO_PKG_VERSION")).unwrap();
}
