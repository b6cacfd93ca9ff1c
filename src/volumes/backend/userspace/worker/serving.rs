//! The mapping of a worker, from its making to its end.

use std::{
    io,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::Path,
    process::Stdio,
    sync::{
        Arc,
        mpsc::{Receiver, Sender},
    },
    thread::{self, JoinHandle},
};

use nix::{
    errno::Errno,
    libc,
    sys::signal::{SigSet, Signal},
};

use super::{
    super::{
        ciphers::Ciphers,
        control::{self, Order, OrderReply},
        export::{Export, Exported, Happening},
        image::Image,
        paths::Paths,
        protocol::{self, Attach, Request, WorkerReply},
        state::{Process, State},
    },
    claim, command, log_to,
};
use crate::{
    base::{key::VolumeKey, mapping_name::MappingName},
    sys::precedence,
    volumes::backend::{BackendError, ExportKind},
};

fn failed(error: io::Error) -> OrderReply {
    OrderReply::Failed(error.raw_os_error().unwrap_or(libc::EIO))
}

/// What the worker waits for.
pub enum Event {
    Export(Happening),
    Order(Order, UnixStream),
    Signal(Signal),
}

/// A mapping that is being served.
pub struct Serving {
    pub state: State,
    pub paths: Paths,
    pub export: Export,
    pub image: Arc<Image>,
    directory: Directory,
    /// At a signal's request.
    detaching: Option<JoinHandle<()>>,
}

impl Serving {
    /// Makes all but the loop device, or nothing: what was made before a failure is dropped, and so undone.
    pub fn set_up(
        request: &Attach,
        key: VolumeKey,
        rest: Option<VolumeKey>,
        events: Sender<Event>,
    ) -> Result<Self, BackendError> {
        let (name, paths) = (&request.name, request.paths.clone());
        let unknown = || cannot(request, "understand its geometry")("no such key or sector size");
        let geometry = request.geometry().ok_or_else(unknown)?;
        let (device, backing) = claim::open(request)?;

        let state = State::begin(request).map_err(cannot(request, "read /proc/self/stat"))?;
        let directory = Directory::create(&state, &paths).map_err(cannot(request, "make the mapping's directory"))?;
        log_to(&paths.directory(name).join("worker.log")).map_err(cannot(request, "open its log"))?;
        precedence::ask_for_precedence();
        forward_signals(events.clone()).map_err(cannot(request, "wait for signals"))?;

        let mut ciphers = Ciphers::one(&geometry, &key);
        if let (Some(midway), Some(rest)) = (request.midway, &rest) {
            ciphers = ciphers.with_rest(&geometry, midway.from_bytes, rest);
        }
        let image = Image::new(backing, &geometry, ciphers, device.logical_block_bytes);
        let image = Arc::new(image.with_discards(request.allow_discards));
        drop((key, rest));
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
        Ok(Self { state, paths, export, image, directory, detaching: None })
    }

    /// Writes down that the mapping is complete and makes its link. From here on its directory is there until its export
    /// goes, even if this fails.
    pub fn announce(&mut self) -> Result<(), BackendError> {
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
        self.state.update(&self.paths).and(link).map_err(BackendError::failed(format!("cannot announce '{name}'")))
    }

    /// Serves until the export is gone.
    pub fn serve(mut self, events: &Receiver<Event>) -> Result<(), BackendError> {
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
    pub fn end(self) -> Result<(), BackendError> {
        let Self { mut state, paths, export, image, directory: _, detaching: _ } = self;
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
    pub paths: Paths,
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
