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

mod claim;
mod serving;

use std::{
    fs::OpenOptions,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{fs::OpenOptionsExt, net::UnixStream, process::CommandExt},
    },
    path::Path,
    process::{Command, ExitCode, Stdio},
    sync::{Mutex, mpsc::channel},
    time::Duration,
};

use self::serving::Serving;
use super::{
    export::Export,
    memory_lock,
    protocol::{self, Attach, Request, WorkerReply},
    removal,
};
use crate::{
    base::{
        chain::chain,
        key::{SecretBytes, VolumeKey},
        log::message_only,
    },
    sys::loop_device::LoopDevice,
    volumes::backend::BackendError,
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
            let _ = writeln!(io::stderr(), "cryptattach {SUBCOMMAND}: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn follow_orders() -> Result<(), BackendError> {
    let failed = || BackendError::failed("only 'cryptattach attach' runs this: cannot read its request");
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
        .and_then(|()| Ok((receive_key(request, &socket)?, receive_rest(request, &socket)?)))
        .and_then(|(key, rest)| Serving::set_up(request, key, rest, sender));
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
        tracing::warn!("the command that started this worker has ended: {error}");
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
        LoopDevice::showing(&file).ok_or_else(|| BackendError::failed("the command has ended")(error))
    })
}

fn receive_key(request: &Attach, mut socket: &UnixStream) -> Result<VolumeKey, BackendError> {
    let action = "the worker cannot receive the volume key";
    let mut bytes = SecretBytes::zeroed(request.key_size_bits as usize / 8).map_err(BackendError::failed(action))?;
    socket.read_exact(bytes.expose_mut()).map_err(BackendError::failed(action))?;
    VolumeKey::from_secret(bytes).ok_or_else(|| BackendError::failed(action)("no AES-XTS key has that size"))
}

fn receive_rest(request: &Attach, socket: &UnixStream) -> Result<Option<VolumeKey>, BackendError> {
    request.midway.map(|_| receive_key(request, socket)).transpose()
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
        .fmt_fields(message_only())
        .try_init();
    std::panic::set_hook(Box::new(|panic| {
        tracing::error!("{panic}");
        // A request that is never answered is worse than a device that fails.
        std::process::abort();
    }));
    Ok(())
}
