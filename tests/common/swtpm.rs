//! A TPM of one's own: swtpm with a state that nobody else has, on a Unix socket.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use tempfile::TempDir;

use crate::{manufacture::manufacture, tpm_process};

/// A TPM; gone with the value.
pub struct Swtpm {
    folder: TempDir,
    process: Child,
}

impl Swtpm {
    /// A new TPM, powered on.
    pub fn start() -> Self {
        // A socket's path has 107 characters at most.
        let folder = tempfile::Builder::new().prefix("swtpm").tempdir_in("/tmp").unwrap();
        let process = power_on(&folder);
        Self { folder, process }
    }

    /// One with an endorsement key that an authority, whose folder this is, has certified; it makes the authority if there
    /// is none.
    pub fn certified(authority: &Path) -> Self {
        let folder = tempfile::Builder::new().prefix("swtpm").tempdir_in("/tmp").unwrap();
        manufacture(folder.path(), authority);
        let process = power_on(&folder);
        Self { folder, process }
    }

    /// Off and on again: the PCRs are what they are after power-on. It is told before, as the kernel does: else it takes a
    /// reset after the use of keys under dictionary attack protection for an attack.
    pub fn reboot(&mut self) {
        self.tool(&["tpm2_shutdown", "--clear"]);
        self.power_off();
        self.process = power_on(&self.folder);
    }

    fn power_off(&mut self) {
        let control = format!("{}.ctrl", self.socket().display());
        let asked = Command::new("swtpm_ioctl").args(["--unix", &control, "-s"]).stderr(Stdio::null()).status();
        if !asked.is_ok_and(|status| status.success()) {
            let _ = self.process.kill();
        }
        let _ = self.process.wait();
    }

    /// Its socket; the control channel is beside it, `.ctrl`.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("tpm")
    }

    /// For CRYPTATTACH_TCTI and tpm2-tools.
    pub fn tcti(&self) -> String {
        format!("swtpm:path={}", self.socket().display())
    }

    /// Runs a tool of tpm2-tools, expects success, returns what it prints.
    pub fn tool(&self, arguments: &[&str]) -> String {
        let output = Command::new(arguments[0])
            .args(&arguments[1..])
            .env("TPM2TOOLS_TCTI", self.tcti())
            .current_dir(self.folder.path())
            .output()
            .expect("tpm2-tools are missing: scripts/prerequisites host");
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Measures something.
    pub fn extend(&self, pcr: u8, digit: char) {
        self.tool(&["tpm2_pcrextend", &format!("{pcr}:sha256={}", String::from(digit).repeat(64))]);
    }

    /// Sessions and objects that somebody has left in the TPM.
    pub fn leftovers(&self) -> String {
        ["handles-loaded-session", "handles-transient"].map(|kind| self.tool(&["tpm2_getcap", kind])).concat()
    }
}

fn power_on(folder: &TempDir) -> Child {
    let socket = folder.path().join("tpm");
    let server = format!("type=unixio,path={}", socket.display());
    let control = format!("{server}.ctrl");
    let options = ["--server", &server, "--ctrl", &control, "--flags", "not-need-init,startup-clear"];
    tpm_process::start(folder.path(), &socket, &options)
}

impl Drop for Swtpm {
    fn drop(&mut self) {
        self.power_off();
    }
}
