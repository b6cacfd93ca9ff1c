//! The worker: the process that holds the key of one mapping and encrypts for it.
//!
//! It is started by a client, answers once when the mapping is there or why it is not, and then lives on alone until it
//! is told to detach (over its control socket, or by SIGTERM). What the client does meanwhile does not matter to it.

use std::{
    fs::File,
    io::{self, Read},
    os::{
        fd::AsFd,
        unix::net::{UnixListener, UnixStream},
    },
    process::ExitCode,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use fuser::BackgroundSession;
use nix::{
    fcntl::{Flock, FlockArg},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
    },
};

use super::{
    confine::confine,
    fuse,
    image::Image,
    loop_device::LoopDevice,
    protocol::{Answer, Command, Request, receive, send},
    state::{Folder, Identity, State},
    xts::Xts,
};
use crate::{
    device::{Device, DeviceError},
    holders,
    key::{KeySize, SecretBytes, VolumeKey},
    volume::{Geometry, SectorSize},
};

/// udev and desktop programs open new devices for a moment.
const PATIENCE_WITH_TRANSIENT_USERS: Duration = Duration::from_secs(2);
const PATIENCE_WITH_THE_KERNEL: Duration = Duration::from_secs(5);
const LOOK_AGAIN: Duration = Duration::from_millis(50);
const LONGEST_COMMAND: Duration = Duration::from_secs(5);

/// A mapping that is there.
struct Serving {
    folder: Folder,
    image: Arc<Image>,
    session: BackgroundSession,
    loop_device: LoopDevice,
    control: UnixListener,
    /// Held on a file as O_EXCL is on a block device.
    _claim: Option<Flock<File>>,
}

/// The worker's `main`: the set-up socket is standard input.
pub fn main() -> ExitCode {
    let Ok(client) = io::stdin().as_fd().try_clone_to_owned().map(UnixStream::from) else { return ExitCode::FAILURE };
    let signals = match signals() {
        Ok(signals) => signals,
        Err(error) => {
            let _ = send(&client, &Answer::failed("cannot watch for signals")(error));
            return ExitCode::FAILURE;
        }
    };
    match set_up(&client) {
        Ok(serving) => {
            // A client that has gone does not want to know.
            let _ = send(&client, &Answer::Done);
            drop(client);
            serving.serve(&signals)
        }
        Err(answer) => {
            let _ = send(&client, &answer);
            ExitCode::FAILURE
        }
    }
}

/// SIGTERM and SIGINT as a descriptor. Threads made later inherit the mask.
fn signals() -> io::Result<SignalFd> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGTERM);
    set.add(Signal::SIGINT);
    set.thread_block()?;
    Ok(SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?)
}

fn set_up(client: &UnixStream) -> Result<Serving, Answer> {
    confine().map_err(Answer::failed("cannot lock the worker's memory"))?;
    let request: Request = receive(client).map_err(Answer::failed("cannot read the request"))?;
    let key = receive_key(client, &request)?;

    let _turn = Folder::lock().map_err(Answer::failed("cannot lock /run/cryptattach"))?;
    let folder = Folder::of(&request.name);
    match folder.read() {
        Ok(Some(state)) if state.is_alive() => {
            return Err(Answer::Failed(
                format!("cannot use the name '{}'", request.name),
                "it was taken just now".into(),
            ));
        }
        // What a dead worker left; it is refused if someone still has it open.
        _ => clean_up(&folder)?,
    }
    let serving = map(&request, &key, &folder);
    if serving.is_err() {
        // Whatever was made before the step that failed.
        let _ = clean_up(&folder);
    }
    serving
}

fn receive_key(mut client: &UnixStream, request: &Request) -> Result<VolumeKey, Answer> {
    let failed = |error: io::Error| Answer::failed("cannot receive the volume key")(error);
    let size = KeySize::from_bits(request.key_size_bits).ok_or_else(|| failed(io::ErrorKind::InvalidData.into()))?;
    let mut bytes = SecretBytes::zeroed(size.bytes()).map_err(|error| failed(io::Error::other(error)))?;
    client.read_exact(bytes.expose_mut()).map_err(failed)?;
    VolumeKey::from_secret(bytes).ok_or_else(|| failed(io::ErrorKind::InvalidData.into()))
}

/// Device, file, loop device, state, in this order: the state says that all the rest is there.
fn map(request: &Request, key: &VolumeKey, folder: &Folder) -> Result<Serving, Answer> {
    let device = Device::look(&request.device).map_err(device_answer)?;
    let (image, claim) = open(request, key, &device)?;
    let image = Arc::new(image);
    let failed = |what: &str| Answer::failed(format!("cannot {what} for '{}'", request.name));

    folder.make().map_err(failed("make the state directory"))?;
    log_to(folder).map_err(failed("open the worker's log"))?;
    let session = fuse::mount(image.clone(), &folder.export(), &request.device, request.read_only)
        .map_err(failed("mount the FUSE export"))?;
    let block_size = request.sector_size_bytes.max(device.logical_block_bytes);
    let loop_device = LoopDevice::attach(&folder.export().join(fuse::FILE), block_size, request.read_only)
        .map_err(failed("set up a loop device"))?;
    let served = || {
        let control = UnixListener::bind(folder.control())?;
        folder.make_link(&loop_device)?;
        folder.write(&State::new(request, Identity::of(&device)?, &loop_device)?)?;
        Ok(control)
    };
    let control = served().map_err(failed("write down the state"))?;
    Ok(Serving { folder: folder.clone(), image, session, loop_device, control, _claim: claim })
}

fn open(request: &Request, key: &VolumeKey, device: &Device) -> Result<(Image, Option<Flock<File>>), Answer> {
    let sector_size = SectorSize::from_bytes(request.sector_size_bytes)
        .ok_or_else(|| Answer::failed("cannot use the sector size")(io::ErrorKind::InvalidData.into()))?;
    let geometry = Geometry {
        sector_size,
        data_offset_bytes: request.data_offset_bytes,
        size_bytes: request.size_bytes,
        iv_offset_sectors: request.iv_offset_sectors,
    };
    let xts = Xts::new(key, sector_size, request.iv_offset_sectors);
    let image = Image::open(device, &geometry, xts, request.read_only)
        .map_err(|error| device_answer(DeviceError::io("open", &device.path)(error)))?;
    if matches!(device.kind, crate::device::DeviceKind::Block(_)) {
        return Ok((image, None));
    }
    let file = image.file().try_clone().map_err(Answer::failed("cannot lock the volume's file"))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(claim) => Ok((image, Some(claim))),
        Err(_) => Err(Answer::DeviceInUse(holders::of_path(&device.path))),
    }
}

fn device_answer(error: DeviceError) -> Answer {
    match error {
        DeviceError::Busy { holders, .. } => Answer::DeviceInUse(holders),
        DeviceError::Missing(_) => Answer::DeviceMissing,
        error => Answer::Failed(error.to_string(), crate::cli::chain(&error)),
    }
}

/// From here on messages go to the mapping's log: the client's terminal is not ours.
fn log_to(folder: &Folder) -> io::Result<()> {
    let log = folder.open_log()?;
    nix::unistd::dup2_stderr(&log)?;
    Ok(())
}

impl Serving {
    fn serve(self, signals: &SignalFd) -> ExitCode {
        let mut going = false;
        loop {
            if going && self.loop_device.backing_file().is_none() {
                return self.finish(None);
            }
            // Nothing tells when the last user of a loop device has closed it but looking at it.
            let timeout = if going { PollTimeout::from(500_u16) } else { PollTimeout::NONE };
            let mut ready =
                [PollFd::new(self.control.as_fd(), PollFlags::POLLIN), PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
            if poll(&mut ready, timeout).is_err() {
                continue;
            }
            let [asked, signalled] = ready.map(|fd| fd.any().unwrap_or(false));
            let client = if asked { self.control.accept().ok().map(|(client, _)| client) } else { None };
            let command = match (&client, signalled) {
                (Some(client), _) => receive_command(client),
                (None, true) => signals.read_signal().ok().flatten().map(|_| Command::Detach),
                (None, false) => None,
            };
            match command.map(|command| self.take_down(command)) {
                None => {}
                Some(Answer::Done) => return self.finish(client),
                Some(answer) => {
                    going |= matches!(answer, Answer::Later);
                    if let Some(client) = client {
                        let _ = send(&client, &answer);
                    } else {
                        tracing::warn!("not detached on a signal: {answer:?}");
                    }
                }
            }
        }
    }

    /// Clears the loop device, unless it is in use.
    fn take_down(&self, command: Command) -> Answer {
        let _turn = Folder::lock();
        let failed = |action| Answer::failed(format!("cannot {action} {}", self.loop_device.path().display()));
        if let Err(error) = self.loop_device.flush() {
            return failed("flush")(error);
        }
        if let Command::DetachDeferred = command
            && !users(&self.loop_device).is_empty()
        {
            return self.loop_device.clear().map_or_else(failed("clear"), |()| Answer::Later);
        }
        clear(&self.loop_device)
    }

    /// The loop device is clear: unmounts, flushes, forgets; then answers, for now the volume is free.
    fn finish(self, client: Option<UnixStream>) -> ExitCode {
        let Self { folder, image, session, control, _claim, .. } = self;
        let finish = || {
            session.umount_and_join()?;
            image.flush()?;
            drop((image, _claim, control));
            let _turn = Folder::lock()?;
            folder.remove()
        };
        let answer = match finish() {
            Ok(()) => Answer::Done,
            Err(error) => {
                Answer::failed(format!("cannot flush and unmount the export in {}", folder.export().display()))(error)
            }
        };
        if let Some(client) = client {
            let _ = send(&client, &answer);
        }
        ExitCode::SUCCESS
    }
}

/// One that connects and says nothing must not keep the others waiting.
fn receive_command(client: &UnixStream) -> Option<Command> {
    client.set_read_timeout(Some(LONGEST_COMMAND)).ok()?;
    receive(client).ok()
}

/// Takes away what a dead worker left, if nobody uses it any more. There is nobody to flush to: what the worker had not
/// written when it died is lost, as in a power cut.
pub fn clean_up(folder: &Folder) -> Result<(), Answer> {
    if let Some(loop_device) = folder.left_loop_device() {
        match clear(&loop_device) {
            Answer::Done => {}
            refused => return Err(refused),
        }
    }
    folder.remove().map_err(Answer::failed(format!("cannot remove {}", folder.export().display())))
}

/// Clears a flushed loop device that nobody uses. Asked without looking, the kernel would put it off and say that it is done.
fn clear(loop_device: &LoopDevice) -> Answer {
    let deadline = Instant::now() + PATIENCE_WITH_TRANSIENT_USERS;
    loop {
        let users = users(loop_device);
        if users.is_empty() {
            break;
        }
        // Whoever looks at a device for a moment does not claim it; a mount does.
        if Instant::now() > deadline || loop_device.is_claimed().unwrap_or(false) {
            return Answer::InUse(users);
        }
        thread::sleep(LOOK_AGAIN);
    }
    if let Err(error) = loop_device.clear() {
        return Answer::failed(format!("cannot clear {}", loop_device.path().display()))(error);
    }
    let deadline = Instant::now() + PATIENCE_WITH_THE_KERNEL;
    while loop_device.backing_file().is_some() {
        if Instant::now() > deadline {
            return Answer::InUse(users(loop_device));
        }
        thread::sleep(LOOK_AGAIN);
    }
    Answer::Done
}

fn users(loop_device: &LoopDevice) -> Vec<String> {
    let mut users = holders::of_path(loop_device.path());
    if users.is_empty() && loop_device.is_claimed().unwrap_or(false) {
        users.push("someone who has it open exclusively".to_owned());
    }
    users
}
