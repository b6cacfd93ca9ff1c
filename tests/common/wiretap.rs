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
    taken: Arc<Mutex<Taken>>,
    forgery: Forgery,
    swallowed: Swallowed,
}

/// What the TPM was asked to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    pub commands: usize,
    pub policy_sessions: usize,
}

/// What the TPM says, and what is made of it.
type Forgery = Arc<Mutex<Option<(Vec<u8>, Vec<u8>)>>>;

/// The beginning of a command that does not reach the TPM, and what is answered in its place.
type Swallowed = Arc<Mutex<Option<(Vec<u8>, Vec<u8>)>>>;

/// A response of success with an empty session, as many a command's is.
pub const SUCCESS: [u8; 19] = [0x80, 2, 0, 0, 0, 19, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0];
/// TPM2_PCR_Extend of PCR 15, from the command code on.
pub const LATCH: [u8; 8] = [0, 0, 1, 0x82, 0, 0, 0, 15];

impl Wiretap {
    /// In front of this socket and its control channel.
    pub fn on(socket: &Path) -> Self {
        Self::that_is_busy(socket, 0)
    }

    /// That answers so many commands itself: TPM_RC_RETRY.
    pub fn that_is_busy(socket: &Path, times: usize) -> Self {
        let folder = tempfile::Builder::new().prefix("wiretap").tempdir_in("/tmp").unwrap();
        let tap = Self {
            folder,
            heard: Arc::default(),
            taken: Arc::default(),
            forgery: Arc::default(),
            swallowed: Arc::default(),
        };
        for suffix in ["", ".ctrl"] {
            let to = PathBuf::from(format!("{}{suffix}", socket.display()));
            let listener = UnixListener::bind(format!("{}{suffix}", tap.socket().display())).unwrap();
            let (heard, taken) = (tap.heard.clone(), tap.taken.clone());
            let (forgery, swallowed) = (tap.forgery.clone(), tap.swallowed.clone());
            let busy = Arc::new(AtomicUsize::new(if suffix.is_empty() { times } else { 0 }));
            // Ends with the process: the listener has nobody to tell it.
            thread::spawn(move || {
                let clients = listener.incoming().flatten();
                clients.for_each(|client| join(client, &to, &heard, &taken, &busy, &forgery, &swallowed))
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

    /// From now on commands with these bytes from the command code on do not reach the TPM; this is answered.
    pub fn swallow(&self, command: &[u8], answer: &[u8]) {
        *self.swallowed.lock().unwrap() = Some((command.to_vec(), answer.to_vec()));
    }

    /// Swallows the latch, and answers success.
    pub fn swallow_the_latch(&self) {
        self.swallow(&LATCH, &SUCCESS);
    }

    /// Commands since this was asked last.
    pub fn taken(&self) -> Taken {
        std::mem::take(&mut self.taken.lock().unwrap())
    }

    /// Whether these bytes have passed, in either direction.
    pub fn heard(&self, bytes: &[u8]) -> bool {
        self.heard.lock().unwrap().windows(bytes.len()).any(|window| window == bytes)
    }
}

impl Taken {
    /// Counts a command; what goes over the control channel is none.
    fn count(&mut self, bytes: &[u8]) {
        const START_AUTH_SESSION: [u8; 4] = [0, 0, 1, 0x76];
        const POLICY: u8 = 1;
        let is_command =
            matches!(bytes, [0x80, 1 | 2, length @ ..] if length.starts_with(&(bytes.len() as u32).to_be_bytes()));
        if !is_command {
            return;
        }
        self.commands += 1;
        // Header, tpmKey, bind, nonceCaller, encryptedSalt, sessionType (TPM 2.0 Part 3, section 11.1).
        let after_sized = |at: usize| Some(at + 2 + usize::from(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?)));
        let kind = after_sized(18).and_then(after_sized).and_then(|at| bytes.get(at));
        self.policy_sessions += usize::from(bytes[6..].starts_with(&START_AUTH_SESSION) && kind == Some(&POLICY));
    }
}

fn join(
    client: UnixStream,
    to: &Path,
    heard: &Arc<Mutex<Vec<u8>>>,
    taken: &Arc<Mutex<Taken>>,
    busy: &Arc<AtomicUsize>,
    forgery: &Forgery,
    swallowed: &Swallowed,
) {
    // TPM_ST_NO_SESSIONS, ten bytes, TPM_RC_RETRY.
    const RETRY: [u8; 10] = [0x80, 1, 0, 0, 0, 10, 0, 0, 0x09, 0x22];
    let Ok(server) = UnixStream::connect(to) else { return };
    for (from, to, is_command) in [(&client, &server, true), (&server, &client, false)] {
        let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
        let (heard, taken, busy) = (heard.clone(), taken.clone(), busy.clone());
        let (forgery, swallowed) = (forgery.clone(), swallowed.clone());
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(len @ 1..) = from.read(&mut buffer) {
                heard.lock().unwrap().extend(&buffer[..len]);
                if is_command {
                    taken.lock().unwrap().count(&buffer[..len]);
                }
                if let (false, Some((original, forged))) = (is_command, &*forgery.lock().unwrap()) {
                    let at = buffer[..len].windows(original.len()).position(|window| window == original);
                    at.into_iter().for_each(|at| buffer[at..at + forged.len()].copy_from_slice(forged));
                }
                let refused = is_command && busy.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)).is_ok();
                let swallowed = swallowed.lock().unwrap().clone().filter(|(command, _)| {
                    is_command && buffer[..len].get(6..).is_some_and(|rest| rest.starts_with(command))
                });
                let passed = match swallowed {
                    Some((_, answer)) => from.write_all(&answer),
                    None if refused => from.write_all(&RETRY),
                    None => to.write_all(&buffer[..len]),
                };
                if passed.is_err() {
                    break;
                }
            }
            let _ = to.shutdown(Shutdown::Write);
        });
    }
}
