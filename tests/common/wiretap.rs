//! Somebody between the CPU and the TPM, who writes down all that passes.

use std::{
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    thread,
};

use tempfile::TempDir;

/// A proxy for a TPM's socket.
pub struct Wiretap {
    folder: TempDir,
    heard: Arc<Mutex<Vec<u8>>>,
}

impl Wiretap {
    /// In front of this socket and its control channel.
    pub fn on(socket: &Path) -> Self {
        let folder = tempfile::Builder::new().prefix("wiretap").tempdir_in("/tmp").unwrap();
        let tap = Self { folder, heard: Arc::default() };
        for suffix in ["", ".ctrl"] {
            let to = PathBuf::from(format!("{}{suffix}", socket.display()));
            let listener = UnixListener::bind(format!("{}{suffix}", tap.socket().display())).unwrap();
            let heard = tap.heard.clone();
            // Ends with the process: the listener has nobody to tell it.
            thread::spawn(move || listener.incoming().flatten().for_each(|client| join(client, &to, &heard)));
        }
        tap
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("tpm")
    }

    /// The way over the tap.
    pub fn tcti(&self) -> String {
        format!("swtpm:path={}", self.socket().display())
    }

    /// Whether these bytes have passed, in either direction.
    pub fn heard(&self, bytes: &[u8]) -> bool {
        self.heard.lock().unwrap().windows(bytes.len()).any(|window| window == bytes)
    }
}

fn join(client: UnixStream, to: &Path, heard: &Arc<Mutex<Vec<u8>>>) {
    let Ok(server) = UnixStream::connect(to) else { return };
    for (from, to) in [(&client, &server), (&server, &client)] {
        let (mut from, mut to, heard) = (from.try_clone().unwrap(), to.try_clone().unwrap(), heard.clone());
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(len @ 1..) = from.read(&mut buffer) {
                heard.lock().unwrap().extend(&buffer[..len]);
                if to.write_all(&buffer[..len]).is_err() {
                    break;
                }
            }
            let _ = to.shutdown(Shutdown::Write);
        });
    }
}
