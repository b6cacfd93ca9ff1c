//! What QEMU is told: over its monitor, and of a TPM on the board.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use serde_json::{Value, json};

/// QEMU's monitor, behind the socket of `-qmp`.
pub struct Qmp(BufReader<UnixStream>);

impl Qmp {
    /// Each answer may take that long.
    pub fn new(socket: UnixStream, patience: Duration) -> Self {
        socket.set_read_timeout(Some(patience)).unwrap();
        let mut qmp = Self(BufReader::new(socket));
        qmp.run("qmp_capabilities", json!({}));
        qmp
    }

    pub fn run(&mut self, command: &str, arguments: Value) {
        let request = json!({"execute": command, "arguments": arguments});
        self.0.get_mut().write_all(request.to_string().as_bytes()).unwrap();
        // The greeting and events come in between.
        let answer = self.await_line(|line| line.get("return").or(line.get("error")).is_some());
        assert!(answer.get("error").is_none(), "{command}: {answer}");
    }

    /// Reads on until this is true of a line.
    pub fn await_line(&mut self, is_awaited: impl Fn(&Value) -> bool) -> Value {
        loop {
            let mut line = String::new();
            self.0.read_line(&mut line).unwrap();
            let line = serde_json::from_str(&line).unwrap();
            if is_awaited(&line) {
                return line;
            }
        }
    }
}

/// Options that put a TPM on the board; swtpm serves it at this control socket.
pub fn tpm(control: &Path) -> [String; 6] {
    let chardev = format!("socket,id=chip,path={}", control.display());
    ["-chardev", &chardev, "-tpmdev", "emulator,id=tpm,chardev=chip", "-device", "tpm-tis,tpmdev=tpm"]
        .map(str::to_owned)
}
