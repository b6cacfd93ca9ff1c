//! The image over NBD, on a Unix socket: for qemu, nbdcopy, libnbd, nbd-client. <https://github.com/NetworkBlockDevice/nbd>,
//! doc/proto.md: fixed newstyle negotiation, structured replies.
//!
//! A thread per connection takes requests, a pool per connection does those that come together, and answers them in the
//! order in which they are done. All connections see the same device: what one has written, the others read, and a flush on
//! one is a flush of all (`CAN_MULTI_CONN`).

use std::{
    fs,
    io::{self, BufReader},
    net::Shutdown,
    os::unix::{
        fs::PermissionsExt,
        net::{UnixListener, UnixStream},
    },
    path::Path,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use nix::{
    libc,
    sys::socket::{getsockopt, setsockopt, sockopt},
};

use super::{
    export::{Failures, Happening, bind},
    image::Image,
};

pub mod handshake;
pub mod protocol;
pub mod transmission;

/// More than any client opens; each costs the worker locked memory. Others wait until one goes.
const MAX_CONNECTIONS: usize = 64;
/// How long a client may take for its part of the negotiation.
const HANDSHAKE_PATIENCE: Duration = Duration::from_secs(10);
/// When to accept again after that has failed: it fails at once, and for as long as too many files are open.
const ACCEPT_AGAIN: Duration = Duration::from_millis(200);
/// Requests that are read at once.
const INPUT_BYTES: usize = 256 * 1024;
/// For what is on the way to a client.
const SOCKET_BUFFER_BYTES: usize = 2 << 20;
/// Buffers are on the heap.
const STACK_BYTES: usize = 256 * 1024;

/// The listening socket and its connections. They end on drop.
pub struct Export {
    server: Arc<Server>,
    listener: UnixListener,
    accepting: Option<JoinHandle<()>>,
}

struct Server {
    image: Arc<Image>,
    read_only: bool,
    notify: Box<dyn Fn(Happening) + Send + Sync>,
    connections: Mutex<Vec<Connection>>,
    /// A client has gone, or all are to go.
    room: Condvar,
    ending: AtomicBool,
}

struct Connection {
    stream: UnixStream,
    thread: Option<JoinHandle<()>>,
}

impl Export {
    /// Listens at `socket` and serves whoever connects, in threads of its own. `Happening::Released` says that the last
    /// client has gone.
    pub fn listen<F>(image: Arc<Image>, socket: &Path, read_only: bool, notify: F) -> io::Result<Self>
    where
        F: Fn(Happening) + Send + Sync + 'static,
    {
        let listener = bind(socket)?;
        fs::set_permissions(socket, fs::Permissions::from_mode(0o600))?;
        let server = Arc::new(Server {
            image,
            read_only,
            notify: Box::new(notify),
            connections: Mutex::default(),
            room: Condvar::new(),
            ending: AtomicBool::new(false),
        });
        let (incoming, serving) = (listener.try_clone()?, Arc::clone(&server));
        let accept = move || {
            let failures = Failures::default();
            loop {
                match incoming.accept() {
                    Ok((stream, _)) => Server::welcome(&serving, stream),
                    // The listener was shut down.
                    Err(error) if error.raw_os_error() == Some(libc::EINVAL) => break,
                    // Too many open files, say. Clients that go will make room.
                    Err(error) => {
                        failures.tell("cannot take another client", &error);
                        thread::sleep(ACCEPT_AGAIN);
                    }
                }
            }
        };
        let accepting = Some(thread::Builder::new().name("nbd".to_owned()).spawn(accept)?);
        Ok(Self { server, listener, accepting })
    }

    /// Who is connected, in words.
    pub fn clients(&self) -> Vec<String> {
        self.server.connections().iter().map(|connection| peer(&connection.stream)).collect()
    }

    /// Ends all connections and waits for their last requests; the image is then free again.
    pub fn end(mut self) -> io::Result<()> {
        self.stop()
    }

    fn stop(&mut self) -> io::Result<()> {
        let Some(accepting) = self.accepting.take() else { return Ok(()) };
        {
            // Under the lock, so that whoever waits for room does not miss it.
            let _connections = self.server.connections();
            self.server.ending.store(true, Ordering::Relaxed);
            self.server.room.notify_all();
        }
        nix::sys::socket::shutdown(std::os::fd::AsRawFd::as_raw_fd(&self.listener), nix::sys::socket::Shutdown::Both)?;
        let panicked = |_| io::Error::other("a thread that served NBD has panicked");
        accepting.join().map_err(panicked)?;
        let connections = std::mem::take(&mut *self.server.connections());
        for Connection { stream, thread } in connections {
            // It may have gone by itself.
            stream.shutdown(Shutdown::Both).ok();
            thread.map_or(Ok(()), JoinHandle::join).map_err(panicked)?;
        }
        Ok(())
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            tracing::error!("cannot end the NBD export: {error}");
        }
    }
}

impl Server {
    fn connections(&self) -> MutexGuard<'_, Vec<Connection>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn welcome(server: &Arc<Self>, stream: UnixStream) {
        let mut connections = server.connections();
        if connections.len() >= MAX_CONNECTIONS {
            tracing::info!("{MAX_CONNECTIONS} clients are connected already; {} waits", peer(&stream));
        }
        while connections.len() >= MAX_CONNECTIONS {
            if server.ending.load(Ordering::Relaxed) {
                return;
            }
            connections = server.room.wait(connections).unwrap_or_else(PoisonError::into_inner);
        }
        let serve = || {
            let (registered, serving) = (stream.try_clone()?, Arc::clone(server));
            // It starts with a lock that is held until it is registered.
            let session = move || serving.serve(&stream);
            let thread = thread::Builder::new().name("nbd-client".to_owned()).stack_size(STACK_BYTES).spawn(session)?;
            connections.push(Connection { stream: registered, thread: Some(thread) });
            io::Result::Ok(())
        };
        if let Err(error) = serve() {
            tracing::error!("cannot serve another client: {error}");
        }
    }

    fn serve(&self, stream: &UnixStream) {
        match self.talk(stream) {
            Ok(()) => {}
            // The usual end of clients that do not say good-bye.
            Err(error) if matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset) => {}
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            Err(error) => tracing::warn!("the connection of {} ends: {error}", peer(stream)),
        }
        // The registry's copy keeps the socket open.
        stream.shutdown(Shutdown::Both).ok();
        let mut connections = self.connections();
        let me = thread::current().id();
        connections.retain(|connection| connection.thread.as_ref().is_none_or(|thread| thread.thread().id() != me));
        self.room.notify_all();
        if connections.is_empty() {
            (self.notify)(Happening::Released);
        }
    }

    fn talk(&self, stream: &UnixStream) -> io::Result<()> {
        setsockopt(stream, sockopt::SndBuf, &SOCKET_BUFFER_BYTES)?;
        stream.set_read_timeout(Some(HANDSHAKE_PATIENCE))?;
        let mut input = BufReader::with_capacity(INPUT_BYTES, stream);
        let offer = handshake::Offer::new(self.image.size(), self.image.unit_bytes(), self.read_only);
        let Some(agreed) = handshake::negotiate(&mut input, stream, &offer)? else { return Ok(()) };
        stream.set_read_timeout(None)?;
        transmission::Session::new(input, Arc::clone(&self.image), self.read_only, agreed)?.run()
    }
}

/// "process 412", whoever that is.
fn peer(stream: &UnixStream) -> String {
    match getsockopt(stream, sockopt::PeerCredentials) {
        Ok(credentials) => {
            let pid = credentials.pid();
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            format!("connected: {} (pid {pid})", name.trim_end())
        }
        Err(_) => "connected: an unknown process".to_owned(),
    }
}
