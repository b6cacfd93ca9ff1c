//! The process of an emulated TPM.

use std::{
    os::unix::net::UnixStream,
    path::Path,
    process::{Child, Command, Stdio},
    thread::sleep,
    time::Duration,
};

/// Starts swtpm on the state in a folder; returns once it listens at the socket, which one of the options names.
pub fn start(state: &Path, socket: &Path, options: &[&str]) -> Child {
    let _ = std::fs::remove_file(socket);
    let mut process = Command::new("swtpm")
        .args(["socket", "--tpm2", &format!("--tpmstate=dir={}", state.display())])
        .args(options)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("swtpm is missing: scripts/prerequisites host vm");
    for _ in 0..1000 {
        if UnixStream::connect(socket).is_ok() {
            return process;
        }
        sleep(Duration::from_millis(10));
    }
    let _ = process.kill();
    let _ = process.wait();
    panic!("swtpm does not listen on {}", socket.display());
}
