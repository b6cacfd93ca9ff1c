//! What users see on the terminal, to the letter. Needs no root and no device.

use std::{
    fs::File,
    path::Path,
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

#[test]
fn bash_completes_verbs_for_people_and_the_names_of_this_host() {
    let (folder, program) = (tempfile::tempdir().unwrap(), Path::new(env!("CARGO_BIN_EXE_cryptattach")));
    assert!(Command::new(program).arg("completions").arg(folder.path()).status().unwrap().success());
    let completed = |words: &str, config: &str| {
        let script = format!(
            "source {}/cryptattach.bash; COMP_WORDS=(cryptattach {words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); \
             _cryptattach_named cryptattach \"${{COMP_WORDS[COMP_CWORD]}}\" \"${{COMP_WORDS[COMP_CWORD-1]}}\"; \
             echo \"${{COMPREPLY[@]}}\"",
            folder.path().display()
        );
        let path = format!("{}:/usr/bin:/bin", program.parent().unwrap().display());
        let bash =
            Command::new("bash").arg("-c").arg(script).env("PATH", path).env("CRYPTATTACH_CONFIG", config).output();
        let bash = bash.unwrap();
        assert!(bash.status.success() && bash.stderr.is_empty(), "{bash:?}");
        String::from_utf8(bash.stdout).unwrap().trim_end().to_owned()
    };
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cli/errors.in/store.toml");
    assert_eq!(completed("container show ci", config), "cinder");
    assert_eq!(completed("container show ci", "missing.toml"), "");
    assert!(completed("format --store \"\"", config).contains("cinder"));
    let verbs = completed("\"\"", config);
    let verbs: Vec<_> = verbs.split(' ').collect();
    assert!(
        verbs.contains(&"attach") && !verbs.iter().any(|verb| verb.contains("udev") || *verb == "names"),
        "{verbs:?}"
    );
    assert!(!verbs.iter().any(|word| word.starts_with(['<', '['])), "{verbs:?}");
    assert_eq!(completed("key s", config), "show");
}
