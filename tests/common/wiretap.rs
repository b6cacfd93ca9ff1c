//! Somebody between the CPU and the TPM, who writes down all that passes.

use std::{
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread,
};

use tempfile::TempDir;

/// A proxy for a TPM's socket.
pub struct Wiretap {
    folder: TempDir,
    heard: Arc<Mutex<Vec<u8>>>,
    forgery: Forgery,
}

/// What the TPM says, and what is made of it.
type Forgery = Arc<Mutex<Option<(Vec<u8>, Vec<u8>)>>>;

impl Wiretap {
    /// In front of this socket and its control channel.
    pub fn on(socket: &Path) -> Self {
        Self::that_is_busy(socket, 0)
    }

    /// That answers so many commands itself: TPM_RC_RETRY.
    pub fn that_is_busy(socket: &Path, times: usize) -> Self {
        let folder = tempfile::Builder::new().prefix("wiretap").tempdir_in("/tmp").unwrap();
        let tap = Self { folder, heard: Arc::default(), forgery: Arc::default() };
        for suffix in ["", ".ctrl"] {
            let to = PathBuf::from(format!("{}{suffix}", socket.display()));
            let listener = UnixListener::bind(format!("{}{suffix}", tap.socket().display())).unwrap();
            let (heard, forgery) = (tap.heard.clone(), tap.forgery.clone());
            let busy = Arc::new(AtomicUsize::new(if suffix.is_empty() { times } else { 0 }));
            // Ends with the process: the listener has nobody to tell it.
            thread::spawn(move || {
                listener.incoming().flatten().for_each(|client| join(client, &to, &heard, &busy, &forgery))
            });
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

    /// From now on these bytes in the TPM's answers are replaced by as many others.
    pub fn forge(&self, original: &[u8], forged: &[u8]) {
        assert_eq!(original.len(), forged.len());
        *self.forgery.lock().unwrap() = Some((original.to_vec(), forged.to_vec()));
    }

    /// Whether these bytes have passed, in either direction.
    pub fn heard(&self, bytes: &[u8]) -> bool {
        self.heard.lock().unwrap().windows(bytes.len()).any(|window| window == bytes)
    }
}

fn join(client: UnixStream, to: &Path, heard: &Arc<Mutex<Vec<u8>>>, busy: &Arc<AtomicUsize>, forgery: &Forgery) {
    // TPM_ST_NO_SESSIONS, ten bytes, TPM_RC_RETRY.
    const RETRY: [u8; 10] = [0x80, 1, 0, 0, 0, 10, 0, 0, 0x09, 0x22];
    let Ok(server) = UnixStream::connect(to) else { return };
    for (from, to, is_command) in [(&client, &server, true), (&server, &client, false)] {
        let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
        let (heard, busy, forgery) = (heard.clone(), busy.clone(), forgery.clone());
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(len @ 1..) = from.read(&mut buffer) {
                heard.lock().unwrap().extend(&buffer[..len]);
                if let (false, Some((original, forged))) = (is_command, &*forgery.lock().unwrap()) {
                    let at = buffer[..len].windows(original.len()).position(|window| window == original);
                    at.into_iter().for_each(|at| buffer[at..at + forged.len()].copy_from_slice(forged));
                }
                let refused = is_command && busy.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)).is_ok();
                let passed = if refused { from.write_all(&RETRY) } else { to.write_all(&buffer[..len]) };
                if passed.is_err() {
                    break;
                }
            }
            let _ = to.shutdown(Shutdown::Write);
        });
    }
}
