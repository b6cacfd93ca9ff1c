//! A Tang server of one's own: tangd, a process per connection as its socket unit starts it, on a port that nobody else has.

use std::{
    fs,
    net::{TcpListener, TcpStream},
    os::fd::OwnedFd,
    path::PathBuf,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    thread::{self, JoinHandle},
};

use tempfile::TempDir;

const TANGD: &str = "/usr/libexec/tangd";

/// A server; gone with the value.
pub struct Tangd {
    database: TempDir,
    pub url: String,
    up: Arc<AtomicBool>,
    asked: Arc<AtomicUsize>,
    stopped: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Tangd {
    /// A new server with new keys.
    pub fn start() -> Self {
        let database = tempfile::tempdir().unwrap();
        let made = Command::new(format!("{TANGD}-keygen")).arg(database.path()).output();
        assert!(made.expect("tang is missing: scripts/prerequisites host").status.success());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (up, stopped) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicBool::new(false)));
        let asked = Arc::new(AtomicUsize::new(0));
        let (is_up, is_stopped, count, keys) = (up.clone(), stopped.clone(), asked.clone(), database.path().to_owned());
        let thread = thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if is_stopped.load(SeqCst) {
                    break;
                }
                // One that is down closes what it takes.
                if is_up.load(SeqCst) {
                    count.fetch_add(1, SeqCst);
                    serve(stream, &keys);
                }
            }
        });
        Self { database, url, up, asked, stopped, thread: Some(thread) }
    }

    /// From now on it answers, or does not.
    pub fn set_up(&self, up: bool) {
        self.up.store(up, SeqCst);
    }

    /// How many connections it has served.
    pub fn asked(&self) -> usize {
        self.asked.load(SeqCst)
    }

    /// What `tang-show-keys` prints for it.
    pub fn thumbprint(&self) -> String {
        let script = "for key in \"$1\"/*.jwk; do jose fmt -j \"$key\" -g key_ops -Af- | grep -q verify && \
                      jose jwk thp -a S256 -i \"$key\" && exit; done; exit 1";
        let output = Command::new("sh").args(["-c", script, "sh"]).arg(self.database.path()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// New keys; the old ones go on to answer.
    pub fn rotate(&self) {
        let rotated =
            Command::new(format!("{TANGD}-rotate-keys")).arg("-d").arg(self.database.path()).output().unwrap();
        assert!(rotated.status.success(), "{}", String::from_utf8_lossy(&rotated.stderr));
    }

    /// The old keys are gone for ever.
    pub fn delete_old_keys(&self) {
        for entry in fs::read_dir(self.database.path()).unwrap().flatten() {
            if entry.file_name().to_string_lossy().starts_with('.') {
                fs::remove_file(entry.path()).unwrap();
            }
        }
    }
}

fn serve(stream: TcpStream, keys: &PathBuf) {
    let (input, output) = (OwnedFd::from(stream.try_clone().unwrap()), OwnedFd::from(stream));
    let child = Command::new(TANGD).arg(keys).stdin(input).stdout(output).stderr(Stdio::null()).spawn();
    // It is waited for, but nobody else has to.
    thread::spawn(move || drop(child.map(|mut child| child.wait())));
}

impl Drop for Tangd {
    fn drop(&mut self) {
        self.stopped.store(true, SeqCst);
        let _ = TcpStream::connect(self.url.trim_start_matches("http://"));
        self.thread.take().map(JoinHandle::join);
    }
}
