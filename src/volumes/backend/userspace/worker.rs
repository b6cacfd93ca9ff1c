//! The worker: the process that holds the key of one mapping and serves it.
//!
//! It is this program again, started with a hidden subcommand, so that it shares no memory with the command. It is told
//! what to do over a socket that it finds as its standard input, and inherits the name's lock as its standard output. When
//! the command dies, at whatever moment, either the mapping gets complete or nothing is left of it.
//!
//! The worker never opens its own file or loop device, nor waits for them otherwise: killed while it waits for its own
//! answer, it would stay for ever, since that wait ends with the answer only. The command does that, see [`super::removal`].
//!
//! It ends when its loop device lets go of its file, whoever cleared that: `detach`, the last user of a device that was
//! detached with `--deferred`, or `losetup -d`; when its ublk device was stopped; or, exporting a socket, when it gets an
//! order over another one ([`super::control`]). Told to end (SIGTERM, SIGINT), it starts a `detach` of itself, which works
//! unless the mapping is in use.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{fs::OpenOptionsExt, net::UnixStream, process::CommandExt},
    },
    path::Path,
    process::{Command, ExitCode, Stdio},
    sync::{
        Arc, Mutex,
        mpsc::{Receiver, Sender, channel},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    libc,
    sys::signal::{SigSet, Signal},
};

use super::{
    control::{self, Order, OrderReply},
    export::{Export, Exported, Happening},
    image::Image,
    memory_lock,
    paths::Paths,
    protocol::{self, Attach, Request, WorkerReply},
    removal,
    state::{Identity, Process, State},
};
use crate::{
    base::{
        key::{SecretBytes, VolumeKey},
        mapping_name::MappingName,
    },
    sys::{
        device::{Device, DeviceError, DeviceKind},
        loop_device::LoopDevice,
    },
    volumes::backend::{BackendError, ExportKind},
};

/// The hidden subcommand that a program with this backend must lead to [`worker_main`].
pub const SUBCOMMAND: &str = "userspace-worker";

/// How long the command may take for its part; it must not hold the name's lock for ever by being stopped.
const COMMAND_PATIENCE: Duration = Duration::from_secs(30);

/// Runs a worker; what the hidden subcommand [`SUBCOMMAND`] does, before anything else is opened or logged.
pub fn worker_main() -> ExitCode {
    memory_lock::close_inherited_files();
    match follow_orders() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Heard only if someone started this by hand; otherwise it has been answered or logged.
            let _ = writeln!(io::stderr(), "cryptattach {SUBCOMMAND}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn follow_orders() -> Result<(), BackendError> {
    let failed = || BackendError::failed("this is run by 'cryptattach attach' only: cannot read its request");
    let socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned().map_err(failed())?);
    let lock = io::stdout().as_fd().try_clone_to_owned().map_err(failed())?;
    let request = protocol::receive(&socket).map_err(failed())?;
    memory_lock::leave_the_parent()?;
    match request {
        Request::Attach(request) => attach(&request, socket, lock),
        Request::Detach { name, paths, worker } => {
            let answer = match removal::detach_worker(&paths, &name, worker) {
                Ok(()) => WorkerReply::Ready,
                Err(error) => WorkerReply::failure(error),
            };
            protocol::send(&socket, &answer).map_err(BackendError::failed("cannot answer"))
        }
    }
}

fn attach(request: &Attach, socket: UnixStream, lock: OwnedFd) -> Result<(), BackendError> {
    let (sender, events) = channel();
    let set_up = memory_lock::guard_memory()
        .and_then(|()| receive_key(request, &socket))
        .and_then(|key| Serving::set_up(request, key, sender));
    let mut serving = match set_up {
        Ok(serving) => serving,
        Err(error) => {
            return protocol::send(&socket, &WorkerReply::failure(error))
                .map_err(BackendError::failed("cannot answer"));
        }
    };
    match &serving.export {
        Export::Fuse(_) => serving.state.loop_device = Some(expect_loop_device(&socket, &serving)?),
        Export::Ublk(export) => serving.state.ublk_device = Some(export.device()),
        Export::Nbd(_) => {}
    }
    let announced = serving.announce();
    // A loop device the command clears, which is the worker's end too. No one would have another export go.
    let ends = announced.is_err() && !matches!(serving.export, Export::Fuse(_));
    let answer = announced.map_or_else(WorkerReply::failure, |()| WorkerReply::Ready);
    // If the command has died, nobody hears it; the mapping is there all the same.
    if let Err(error) = protocol::send(&socket, &answer) {
        tracing::warn!("the command that attached this has gone: {error}");
    }
    if ends {
        return serving.end();
    }
    drop((socket, lock));
    serving.serve(&events)
}

/// Asks the command for a loop device. One that died may have made it all the same.
fn expect_loop_device(socket: &UnixStream, serving: &Serving) -> Result<LoopDevice, BackendError> {
    let mounted = WorkerReply::Mounted { block_size_bytes: serving.image.unit_bytes() };
    let told = socket
        .set_read_timeout(Some(COMMAND_PATIENCE))
        .and_then(|()| protocol::send(socket, &mounted))
        .and_then(|()| protocol::receive(socket));
    told.or_else(|error| {
        let file = serving.paths.file(&serving.state.name);
        LoopDevice::showing(&file).ok_or_else(|| BackendError::failed("the command has gone")(error))
    })
}

fn receive_key(request: &Attach, mut socket: &UnixStream) -> Result<VolumeKey, BackendError> {
    let action = "the worker cannot receive the volume key";
    let mut bytes = SecretBytes::zeroed(request.key_size_bits as usize / 8).map_err(BackendError::failed(action))?;
    socket.read_exact(bytes.expose_mut()).map_err(BackendError::failed(action))?;
    VolumeKey::from_secret(bytes).ok_or_else(|| BackendError::failed(action)("no AES-XTS key has that size"))
}

fn failed(error: io::Error) -> OrderReply {
    OrderReply::Failed(error.raw_os_error().unwrap_or(libc::EIO))
}

enum Event {
    Export(Happening),
    Order(Order, UnixStream),
    Signal(Signal),
}

/// A mapping that is being served.
struct Serving {
    state: State,
    paths: Paths,
    export: Export,
    image: Arc<Image>,
    directory: Directory,
    /// At a signal's request.
    detaching: Option<JoinHandle<()>>,
    /// A file's exclusive lock; a block device is open exclusively.
    _claim: Option<Flock<File>>,
}

impl Serving {
    /// Makes all but the loop device, or nothing: what was made before a failure is dropped, and so undone.
    fn set_up(request: &Attach, key: VolumeKey, events: Sender<Event>) -> Result<Self, BackendError> {
        let (name, paths) = (&request.name, request.paths.clone());
        let unknown = || cannot(request, "understand its geometry")("no such key or sector size");
        let geometry = request.geometry().ok_or_else(unknown)?;
        let (device, backing, claim) = open(request)?;

        let state = State::begin(request).map_err(cannot(request, "read /proc/self/stat"))?;
        let directory = Directory::create(&state, &paths).map_err(cannot(request, "make the mapping's directory"))?;
        log_to(&paths.directory(name).join("worker.log")).map_err(cannot(request, "open its log"))?;
        memory_lock::ask_for_precedence();
        forward_signals(events.clone()).map_err(cannot(request, "wait for signals"))?;

        let image = Image::new(backing, &geometry, &key, device.logical_block_bytes);
        let image = Arc::new(image.with_discards(request.allow_discards));
        drop(key);
        if request.export != ExportKind::Fuse {
            let orders = events.clone();
            let take = move |order, stream| drop(orders.send(Event::Order(order, stream)));
            control::listen(&paths.control(name), take).map_err(cannot(request, "listen for orders"))?;
        }
        let notify = move |happening| drop(events.send(Event::Export(happening)));
        let export = Export::start(request, Arc::clone(&image), notify).map_err(cannot(
            request,
            match request.export {
                ExportKind::Fuse => "mount its FUSE file system (is there a /dev/fuse?)",
                ExportKind::Ublk => "make a ublk device (Linux 6.4 or newer; is ublk_drv loaded?)",
                ExportKind::Nbd => "listen for NBD clients",
            },
        ))?;
        Ok(Self { state, paths, export, image, directory, detaching: None, _claim: claim })
    }

    /// Writes down that the mapping is complete and makes its link. From here on its directory is there until its export
    /// goes, even if this fails.
    fn announce(&mut self) -> Result<(), BackendError> {
        self.directory.keep();
        let (name, exported) = (&self.state.name, self.state.exported(&self.paths));
        let path = exported.as_ref().map(Exported::path).unwrap_or_default();
        tracing::info!(
            "{name}: {} on {}, XTS by {}",
            path.display(),
            self.state.device.display(),
            self.image.engine_name()
        );
        let link = match exported {
            Some(Exported::Socket(_)) | None => Ok(()),
            Some(_) => self.paths.make_link(name, &path),
        };
        self.state.update(&self.paths).and(link).map_err(BackendError::failed(format!("cannot make '{name}' known")))
    }

    /// Serves until the export is gone.
    fn serve(mut self, events: &Receiver<Event>) -> Result<(), BackendError> {
        loop {
            match events.recv() {
                Ok(Event::Export(Happening::Released)) if self.is_wanted() => {}
                Ok(Event::Export(Happening::Released)) => return self.end(),
                // Its device was cleared.
                Ok(Event::Export(Happening::Ended(result))) if matches!(self.export, Export::Ublk(_)) => {
                    if let Err(error) = result {
                        tracing::error!("the ublk device has ended: {error}");
                    }
                    return self.end();
                }
                Ok(Event::Order(order, stream)) => {
                    let reply = self.obey(order);
                    let ends = matches!((order, &reply), (Order::End { .. }, OrderReply::Done));
                    let ends = ends && matches!(self.export, Export::Nbd(_));
                    if let Err(error) = protocol::send(&stream, &reply) {
                        tracing::warn!("cannot answer: {error}");
                    }
                    if ends {
                        return self.end();
                    }
                }
                Ok(Event::Signal(signal)) => {
                    tracing::info!("{signal}: detaching");
                    if self.detaching.as_ref().is_none_or(JoinHandle::is_finished) {
                        let State { name, worker, .. } = &self.state;
                        self.detaching = Some(detach_from_outside(name.clone(), self.paths.clone(), *worker));
                    }
                }
                // Someone has aborted the connection (umount -f, fusectl). The state stays: `status` tells, `detach` cleans.
                Ok(Event::Export(Happening::Ended(result))) => {
                    tracing::error!("the kernel has closed the FUSE connection: {result:?}");
                    return Err(BackendError::Unavailable("the kernel has closed the FUSE connection".to_owned()));
                }
                Err(_) => unreachable!("the thread that waits for signals keeps a sender"),
            }
        }
    }

    /// Whether it goes on when someone has let go of it.
    fn is_wanted(&self) -> bool {
        match &self.export {
            Export::Fuse(_) => self.state.bound_loop_device(&self.paths).is_some(),
            Export::Ublk(_) => true,
            Export::Nbd(export) => !(self.state.going && export.clients().is_empty()),
        }
    }

    fn obey(&mut self, order: Order) -> OrderReply {
        let done = match (order, &self.export) {
            (Order::End { deferred }, Export::Nbd(export)) => {
                let clients = export.clients();
                if clients.is_empty() {
                    return OrderReply::Done;
                }
                self.state.going |= deferred;
                return self.state.update(&self.paths).map_or_else(failed, |()| OrderReply::InUse(clients));
            }
            (Order::Users, Export::Nbd(export)) => return OrderReply::InUse(export.clients()),
            // The kernel knows.
            (Order::Users, _) => return OrderReply::InUse(Vec::new()),
            // The command has made sure that nobody uses it. What follows is an event of the export.
            (Order::End { .. }, Export::Ublk(export)) => export.device().stop(),
            (Order::End { .. }, Export::Fuse(_)) => Err(Errno::EINVAL.into()),
            (Order::Grow { size_bytes }, export) => self.image.grow(size_bytes).and_then(|()| {
                if let Export::Ublk(export) = export {
                    export.device().grow(size_bytes)?;
                }
                self.state.size_bytes = size_bytes;
                self.state.update(&self.paths)
            }),
        };
        done.map_or_else(failed, |()| OrderReply::Done)
    }

    /// Brings all to the device and leaves nothing behind, except the reason if that fails.
    fn end(self) -> Result<(), BackendError> {
        let Self { mut state, paths, export, image, directory: _, detaching: _, _claim } = self;
        let ended = export.end().map_err(|error| format!("cannot end the export of {}: {error}", state.name));
        let flushed = image.flush().map_err(|error| format!("cannot flush {}: {error}", state.device.display()));
        let cleaned = match ended.and(flushed) {
            Ok(()) => paths.remove_link(&state.name).and_then(|()| paths.remove_directory(&state.name)),
            Err(fault) => {
                tracing::error!("{fault}");
                state.fault = Some(fault);
                state.update(&paths)
            }
        };
        cleaned.map_err(BackendError::failed(format!("cannot clean up after '{}'", state.name)))
    }
}

/// A mapping's directory, removed on drop unless kept.
struct Directory {
    paths: Paths,
    name: Option<MappingName>,
}

impl Directory {
    fn create(state: &State, paths: &Paths) -> io::Result<Self> {
        state.create(paths)?;
        Ok(Self { paths: paths.clone(), name: Some(state.name.clone()) })
    }

    fn keep(&mut self) {
        self.name = None;
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.name.as_ref().map(|name| self.paths.remove_directory(name)) {
            tracing::error!("cannot remove the mapping's directory: {error}");
        }
    }
}

/// "cannot attach /dev/vdb: the worker cannot ..."
fn cannot<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
    request: &Attach,
    what: &str,
) -> impl FnOnce(E) -> BackendError {
    BackendError::failed(format!("cannot attach {}: the worker cannot {what}", request.device.display()))
}

/// Opens the encrypted device such that no second worker, mount or mapping has it.
fn open(request: &Attach) -> Result<(Device, File, Option<Flock<File>>), DeviceError> {
    let path = &request.device;
    let device = Device::look(path)?;
    // At least one sector, or there is nothing to attach.
    let data_bytes = request.size_bytes.max(request.sector_size_bytes.into());
    let needed_bytes = request.data_offset_bytes.saturating_add(data_bytes);
    if device.size_bytes < needed_bytes {
        return Err(DeviceError::TooSmall { path: path.clone(), size_bytes: device.size_bytes, needed_bytes });
    }
    let exclusive = if matches!(device.kind, DeviceKind::Block(_)) { libc::O_EXCL } else { 0 };
    let opened = if request.read_only {
        OpenOptions::new().read(true).custom_flags(exclusive).open(path).map_err(DeviceError::io("open", path))
    } else {
        device.open_exclusive()
    };
    let backing = opened.map_err(|error| blame(error, request))?;
    let metadata = backing.metadata().map_err(DeviceError::io("stat", path))?;
    if Identity::of(&metadata) != request.identity {
        // Another device has got that name since the header was read.
        return Err(DeviceError::Missing(path.clone()));
    }
    let claim = match device.kind {
        DeviceKind::Block(_) => None,
        DeviceKind::File => {
            let same = backing.try_clone().map_err(DeviceError::io("open", path))?;
            let lock = Flock::lock(same, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
                Errno::EWOULDBLOCK => blame(DeviceError::Busy { path: path.clone(), holders: Vec::new() }, request),
                errno => DeviceError::io("lock", path)(errno.into()),
            });
            Some(lock?)
        }
    };
    Ok((device, backing, claim))
}

/// Names the mapping that has the device, if it is one of ours.
fn blame(error: DeviceError, request: &Attach) -> DeviceError {
    let DeviceError::Busy { path, mut holders } = error else { return error };
    let states = request.paths.names().unwrap_or_default();
    let mut states = states.iter().filter_map(|name| State::load(&request.paths, name).ok()?);
    if let Some(other) = states.find(|state| state.identity == request.identity && state.worker.is_alive()) {
        holders = vec![format!("the mapping '{}'", other.name)];
    }
    DeviceError::Busy { path, holders }
}

/// Has the signals that ask for an end arrive as events, in a thread that waits for nothing else.
fn forward_signals(events: Sender<Event>) -> io::Result<()> {
    let ends = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    let mut blocked = ends;
    // There is no terminal that could hang up.
    blocked.add(Signal::SIGHUP);
    blocked.thread_block()?;
    let forward = move || {
        while let Ok(signal) = ends.wait() {
            if events.send(Event::Signal(signal)).is_err() {
                break;
            }
        }
    };
    thread::Builder::new().name("signals".to_owned()).spawn(forward).map(drop)
}

/// Detaches this mapping as a user would, in another process; see [`removal`] for the reason.
fn detach_from_outside(name: MappingName, paths: Paths, worker: Process) -> JoinHandle<()> {
    let ask = move || -> io::Result<WorkerReply> {
        let (socket, theirs) = UnixStream::pair()?;
        let this_program = Path::new("/proc/self/exe");
        let mut child = command(this_program).stdin(OwnedFd::from(theirs)).stdout(Stdio::null()).spawn()?;
        protocol::send(&socket, &Request::Detach { name, paths, worker })?;
        let answer = protocol::receive(&socket);
        child.wait()?;
        answer
    };
    thread::spawn(move || match ask() {
        Ok(WorkerReply::Ready | WorkerReply::Mounted { .. }) => {}
        Ok(WorkerReply::Failed { action, .. }) => tracing::error!("not detached: {action}"),
        Err(error) => tracing::error!("cannot detach: {error}"),
    })
}

/// A worker to be started: nothing of the parent's environment, a plain name in `ps`, no secret on the command line.
pub fn command(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.arg0("cryptattach").arg(SUBCOMMAND).env_clear().stderr(Stdio::null());
    command
}

fn log_to(path: &Path) -> io::Result<()> {
    let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
    // A program that logs already keeps its own way.
    let _ = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_max_level(tracing::Level::INFO)
        .with_writer(Mutex::new(file))
        .try_init();
    std::panic::set_hook(Box::new(|panic| {
        tracing::error!("{panic}");
        // A request that is never answered is worse than a device that fails.
        std::process::abort();
    }));
    Ok(())
}
