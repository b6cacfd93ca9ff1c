//! Shell commands, mappings and loop devices, for the layers that run on this host.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use serde_json::Value;

/// Runs a shell command, expects success, returns standard output without its last newline.
#[track_caller]
pub fn sh(script: &str) -> String {
    let output = Command::new("sh").args(["-c", script]).stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
}

/// Detaches the mappings whose names begin with this, by `cryptattach` with the configuration of a site.
pub fn detach_all(beginning: &str, run: impl Fn(&[&str]) -> Output) {
    let mappings: Vec<Value> = serde_json::from_slice(&run(&["list", "--json"]).stdout).unwrap_or_default();
    for name in mappings.iter().filter_map(|mapping| mapping["name"].as_str()) {
        if name.starts_with(beginning) {
            run(&["detach", name]);
        }
    }
}

/// A loop device, freed with the value.
pub struct LoopDevice(PathBuf);

impl LoopDevice {
    pub fn new(file: &Path, options: &str) -> Self {
        Self(sh(&format!("losetup --find --show {options} {}", file.display())).into())
    }

    pub fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("partx").arg("--delete").arg(&self.0).stderr(Stdio::null()).status();
        let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
    }
}
