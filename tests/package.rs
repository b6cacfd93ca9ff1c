//! What the Debian package's scripts do when it goes, and what mkinitcpio's hook puts into an image.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Output},
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

/// What mkinitcpio offers to hooks, as far as ours uses it: says what it was asked for.
const MKINITCPIO: &str = r#"
for name in add_binary add_file add_module add_symlink add_udev_rule add_runscript; do
    eval "$name() { echo $name \"\$*\"; }"
done
error() { echo "$*" >&2; return 1; }
warning() { echo "$*" >&2; }
map() { local does=$1 each; shift; for each; do "$does" "$each"; done; }
BUILDROOT=$ROOT/image
"#;
/// What its hook systemd adds to that.
const SYSTEMD: &str = r#"add_systemd_unit() { echo add_systemd_unit "$*"; }"#;

/// Our hook with the real program, on a machine whose root is another folder.
fn mkinitcpio(root: &Root, more: &str) -> Output {
    let folder = root.0.path().to_str().unwrap();
    let hook = include_str!("../initramfs/mkinitcpio/install/cryptattach").replace("/etc/", &format!("{folder}/etc/"));
    let program = root.write(
        "bin/cryptattach",
        &format!(
            "#!/bin/sh\nexec {} --config {folder}/etc/cryptattach/cryptattach.toml \"$@\"\n",
            env!("CARGO_BIN_EXE_cryptattach")
        ),
    );
    fs::set_permissions(program, fs::Permissions::from_mode(0o755)).unwrap();
    Command::new("bash")
        .args(["-c", &format!("{MKINITCPIO}\n{more}\n{hook}\nbuild")])
        .env("ROOT", folder)
        .env("PATH", format!("{folder}/bin:/usr/bin:/bin"))
        .output()
        .unwrap()
}

/// A machine whose boot opens a volume.
fn machine(store: &str) -> Root {
    let root = Root::new();
    root.write("etc/cryptattach/owner.pem", "");
    let volume = "[[boot.volumes]]\nname = \"root\"\ndevice = \"UUID=11111111-2222-3333-4444-555555555555\"\n";
    let volume = format!("{volume}keys = [\"keys/3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de\"]\n");
    root.write("etc/cryptattach/cryptattach.toml", &format!("state = \"state\"\n[stores.keys]\n{store}{volume}"));
    root
}

const DIRECTORY: &str = "type = \"directory\"\npath = \"keys\"\nowner = \"owner.pem\"\nno_escrow = true\n";

#[test]
fn mkinitcpios_image_has_what_a_boot_needs_with_systemd_and_without() {
    let root = machine(DIRECTORY);
    root.write("etc/crypttab.initramfs", "root UUID=11111111-2222-3333-4444-555555555555 none luks\n");
    let etc = format!("{}/etc", root.0.path().display());
    let common = [
        format!("add_binary {}", env!("CARGO_BIN_EXE_cryptattach")),
        format!("add_file {etc}/cryptattach/cryptattach.toml"),
        format!("add_file {etc}/crypttab.initramfs {etc}/crypttab"),
        "add_module dm_crypt?".to_owned(),
    ];
    for (more, runs, runs_not) in [
        ("", "add_runscript", "add_systemd_unit"),
        (
            SYSTEMD,
            "add_file /usr/lib/initcpio/cryptattach/cryptattach-boot.service /usr/lib/systemd/system/cryptattach-boot.service",
            "add_runscript",
        ),
    ] {
        let made = mkinitcpio(&root, more);
        let told = String::from_utf8(made.stdout).unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let has = |line: &str| told.lines().any(|other| other.trim_end() == line);
        for line in common.iter().map(String::as_str).chain([runs]) {
            assert!(has(line), "{line} is not in\n{told}");
        }
        assert!(!told.contains(runs_not), "{told}");
        // systemd-cryptsetup@ comes after it, and so after us.
        assert_eq!(has("add_systemd_unit cryptsetup-pre.target"), more == SYSTEMD, "{told}");
    }
}

#[test]
fn mkinitcpios_image_is_incomplete_without_the_network_or_with_a_broken_configuration_and_says_so() {
    let swift = "type = \"swift\"\ncontainer = \"keys\"\ncloud = \"net\"\nclouds = \"clouds.yaml\"\nowner = \"owner.pem\"\nno_escrow = true\n";
    let root = machine(swift);
    root.write("etc/cryptattach/clouds.yaml", "clouds: {net: {auth_type: v1password, auth: {auth_url: 'https://10.0.0.1/auth/v1.0', username: us, password: secret}}}\n");
    let made = mkinitcpio(&root, "");
    let said = String::from_utf8_lossy(&made.stderr).into_owned();
    assert!(!made.status.success() && said.contains("put the hook net"), "{said}");
    // What a hook that configures the network leaves.
    root.write("image/usr/bin/ipconfig", "");
    let made = mkinitcpio(&root, "");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));

    root.write("etc/cryptattach/cryptattach.toml", "stores = 1");
    let made = mkinitcpio(&root, "");
    let said = String::from_utf8_lossy(&made.stderr).into_owned();
    assert!(!made.status.success() && said.contains("will not open volumes by itself"), "{said}");
    fs::remove_file(root.0.path().join("etc/cryptattach/cryptattach.toml")).unwrap();
    let made = mkinitcpio(&root, "");
    assert!(made.status.success() && made.stdout.is_empty() && made.stderr.is_empty(), "{made:?}");
}
