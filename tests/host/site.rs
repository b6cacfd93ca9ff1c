//! A site to test on: a key disk in memory, volumes on disk, a configuration, and the binary.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use serde_json::Value;
use tempfile::TempDir;

use crate::shell::detach_all;
pub use crate::shell::{LoopDevice, sh};

/// Files on disk, keys in a tmpfs; all of it goes with the value.
pub struct Site {
    folder: TempDir,
    number: u32,
}

/// Something mounted, unmounted with the value.
pub struct Mounted(PathBuf);

impl Site {
    /// With a store `cinder` on a tmpfs, sealed to a new owner and a new escrow key.
    pub fn new() -> Self {
        let site = Self::bare();
        site.ok(&["init", "--store", "cinder", "--path", site.keys("cinder"), "--escrow", site.keys("escrow.pem")]);
        site
    }

    /// Without any store.
    pub fn bare() -> Self {
        assert!(nix::unistd::geteuid().is_root(), "the host layer needs root: run scripts/test host");
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        // /var/tmp, for /tmp may be in memory, and volume and key would share that.
        let folder = tempfile::Builder::new().prefix("cryptattach-test").tempdir_in("/var/tmp").unwrap();
        let site = Self { folder, number: NUMBER.fetch_add(1, Ordering::Relaxed) };
        fs::create_dir(site.path("keys")).unwrap();
        fs::create_dir(site.path("mnt")).unwrap();
        sh(&format!("mount -t tmpfs -o mode=0700,size=16m keys {}", site.keys("")));
        sh(&format!(
            "cd {} && openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out escrow.key 2>/dev/null && \
             openssl pkey -in escrow.key -pubout -out escrow.pem",
            site.keys("")
        ));
        // What a machine remembers of stores is its own, too: tests run at the same time, and their stores have the same names.
        fs::write(site.keys("cryptattach.toml"), "state = \"site-state\"\n[audit]\nfile = \"audit\"\n").unwrap();
        site
    }

    /// A path on disk.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A path in the key disk, as text for arguments.
    pub fn keys(&self, name: &str) -> &'static str {
        let path = self.path("keys").join(name);
        Box::leak(path.into_os_string().into_string().unwrap().into_boxed_str())
    }

    /// A mapping name that no other test uses.
    pub fn name(&self, name: &str) -> String {
        format!("cat-{}-{}-{name}", std::process::id(), self.number)
    }

    /// A new sparse file on disk.
    pub fn file(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.path(name);
        fs::File::create_new(&path).unwrap().set_len(bytes).unwrap();
        path
    }

    /// A new sparse file for a volume, as text for arguments.
    pub fn volume_file(&self, name: &str) -> String {
        self.file(name, 64 << 20).into_os_string().into_string().unwrap()
    }

    /// The command with this site's configuration.
    pub fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cryptattach"));
        command.env("CRYPTATTACH_CONFIG", self.keys("cryptattach.toml"));
        command
    }

    pub fn run<S: AsRef<std::ffi::OsStr>>(&self, arguments: &[S]) -> Output {
        self.command().args(arguments).stdin(Stdio::null()).output().unwrap()
    }

    /// Runs it, expects success, returns standard output without its last newline.
    pub fn ok<S: AsRef<std::ffi::OsStr>>(&self, arguments: &[S]) -> String {
        let output = self.run(arguments);
        let words: Vec<_> = arguments.iter().map(|a| a.as_ref().to_string_lossy().into_owned()).collect();
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
    }

    /// Runs it with --json.
    pub fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.ok(&[arguments, &["--json"]].concat())).unwrap()
    }

    /// Runs it, expects this exit code, returns standard error.
    #[track_caller]
    pub fn fails(&self, code: i32, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {text}");
        println!("$ cryptattach {}\n{text}  -> {code}\n", arguments.join(" "));
        text
    }

    /// Formats a new volume in a file: its path and its key's reference.
    pub fn volume(&self, name: &str, arguments: &[&str]) -> (String, String) {
        let path = self.file(name, 64 << 20).into_os_string().into_string().unwrap();
        let reference = self.ok(&[&["format", &path], arguments].concat());
        (path, reference)
    }

    /// Attaches in userspace: the plaintext device.
    pub fn attach(&self, volume: &str, name: &str, arguments: &[&str]) -> PathBuf {
        PathBuf::from(self.ok(&[&["attach", volume, name, "--backend", "userspace"], arguments].concat()))
    }

    /// Attaches, detaches again: the volume's key can be had.
    pub fn attaches(&self, volume: &str) {
        let name = self.name("once");
        self.attach(volume, &name, &[]);
        self.ok(&["detach", &name]);
    }

    /// Mounts a device at `mnt`.
    pub fn mount(&self, device: &Path) -> Mounted {
        let at = self.path("mnt");
        sh(&format!("mount {} {}", device.display(), at.display()));
        Mounted(at)
    }

    /// The file of a sealed key.
    pub fn sealed(&self, reference: &str) -> PathBuf {
        self.path("keys").join(format!("{reference}.jwe"))
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        detach_all(&self.name(""), |arguments| self.run(arguments));
        let _ = Command::new("umount").arg(self.path("keys")).status();
    }
}

impl Mounted {
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}
