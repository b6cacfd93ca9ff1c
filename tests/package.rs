//! What the Debian package's scripts do when it goes.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

struct Root(tempfile::TempDir);

impl Root {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn write(&self, path: &str, text: &str) -> PathBuf {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path
    }

    /// What the script says.
    fn run(&self, script: &str, argument: &str) -> String {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("debian").join(script);
        let path = format!("{}/bin:/usr/bin:/bin", self.0.path().display());
        let ran = Command::new("sh")
            .arg(script)
            .arg(argument)
            .env("DPKG_ROOT", self.0.path())
            .env("PATH", path)
            .output()
            .unwrap();
        assert!(ran.status.success(), "{ran:?}");
        String::from_utf8(ran.stderr).unwrap()
    }
}

#[test]
fn a_purge_removes_no_key_no_pin_no_register_and_no_record_and_says_so() {
    let root = Root::new();
    assert_eq!(root.run("postrm", "purge"), "");
    let kept = [
        root.write("etc/cryptattach/cinder.owner.key", ""),
        root.write("var/lib/cryptattach/keys/3f2a9c1e.jwe", ""),
        root.write("var/lib/cryptattach/register/compute-7.json", ""),
        root.write("var/log/cryptattach.jsonl", ""),
    ];
    assert_eq!(root.run("postrm", "remove"), "");
    let said = root.run("postrm", "purge");
    for left in ["/etc/cryptattach", "/var/lib/cryptattach", "/var/log/cryptattach.jsonl"] {
        assert!(said.contains(&format!("{left} stays")), "{said}");
    }
    assert!(kept.iter().all(|path| path.exists()));
}

#[test]
fn a_removal_names_what_stays_attached() {
    let root = Root::new();
    assert_eq!(root.run("prerm", "remove"), "");
    // As 'list' prints it, a volume in the middle of a rotation included.
    let listed = "\
NAME  DEVICE            SOURCE    BACKEND   SIZE   STATE
data  /dev/mapper/data  /dev/vdb  dm-crypt  1 GiB  attached
-     -                 /dev/vdc  -         -      re-encrypting, 37 %, paused
";
    let program = root.write("bin/cryptattach", &format!("#!/bin/sh\ncat <<'END'\n{listed}END\n"));
    fs::set_permissions(program, fs::Permissions::from_mode(0o755)).unwrap();
    let said = root.run("prerm", "remove");
    assert!(said.contains("'data' (/dev/mapper/data) stays attached"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert_eq!(root.run("prerm", "upgrade"), "");
}
