//! Taking a mapping away, from the command's side: it flushes and clears the loop device, which the worker must not wait
//! for (see [`super::worker`]). The worker sees that its file was let go, cleans up and ends.

use std::{
    io,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use super::{
    control::{self, Order, OrderReply},
    export::Exported,
    fuse,
    paths::Paths,
    state::{Process, State},
    ublk::UblkDevice,
};
use crate::{
    base::mapping_name::MappingName,
    sys::{
        lock,
        loop_device::{Cleared, Flush, LoopDevice},
        users,
    },
    volumes::backend::{BackendError, Deferred},
};

/// Programs that look at every device (udev's, say) have it open for moments; a real user, for longer than this.
const BUSY_PATIENCE: Duration = Duration::from_secs(2);
/// A worker that is dying closes its files before it has died.
const DEATH_PATIENCE: Duration = Duration::from_millis(500);
/// With the loop device gone, the worker has at most the backing device's cache left to flush.
const END_PATIENCE: Duration = Duration::from_secs(30);

/// Removes a mapping. All its data is on the volume, and the volume is free, when this returns; with
/// [`Deferred::Yes`] and users left, that is when the last of them has closed it.
pub fn detach(paths: &Paths, name: &MappingName, deferred: Deferred) -> Result<(), BackendError> {
    detach_if(paths, name, deferred, |_| true)
}

/// As [`detach`], if it is that worker's.
pub fn detach_worker(paths: &Paths, name: &MappingName, worker: Process) -> Result<(), BackendError> {
    detach_if(paths, name, Deferred::No, |state| state.worker == worker)
}

fn detach_if(
    paths: &Paths,
    name: &MappingName,
    deferred: Deferred,
    meant: impl Fn(&State) -> bool,
) -> Result<(), BackendError> {
    let not_active = || BackendError::NotActive(name.clone());
    State::load(paths, name)?.ok_or_else(not_active)?;
    let _lock = paths.lock(name, lock::PATIENCE)?;
    let state = State::load(paths, name)?.filter(meant).ok_or_else(not_active)?;
    remove(paths, &state, deferred)
}

/// As [`detach`], for whoever has the name's lock.
pub fn remove(paths: &Paths, state: &State, deferred: Deferred) -> Result<(), BackendError> {
    let (mut worker_lives, mut died) = (state.worker.is_alive(), false);
    let gone = match let_go(paths, state, deferred, worker_lives) {
        // It ended while it was asked: what it leaves is let go of in another way.
        Err(BackendError::Failed { .. }) if worker_lives && ends_within(state, DEATH_PATIENCE) => {
            // One that came to its own end has left nothing, unless it says why.
            died = State::load(paths, &state.name)?.is_some();
            worker_lives = false;
            let_go(paths, state, deferred, worker_lives)?
        }
        gone => gone?,
    };
    // The worker sees its last user go. A dead one's device goes by itself.
    if !gone && worker_lives {
        return Ok(());
    }
    wait_for_end(state)?;
    if let Some(device) = state.ublk_device {
        device
            .sweep(state.worker.pid)
            .map_err(BackendError::failed(format!("cannot remove {}", device.path().display())))?;
    }
    sweep(paths, &state.name)?;
    if died { Err(not_all_went_well(&state.name, "its worker died before all was written")) } else { Ok(()) }
}

/// Has its device or socket go. Whether it has gone; otherwise it will, with its last user.
fn let_go(paths: &Paths, state: &State, deferred: Deferred, worker_lives: bool) -> Result<bool, BackendError> {
    match state.exported(paths) {
        Some(Exported::Loop(device)) => clear_loop(device, paths, state, worker_lives, deferred),
        Some(Exported::Ublk(device)) if worker_lives => clear_ublk(device, paths, state, deferred),
        Some(Exported::Socket(_)) if worker_lives => end_socket(paths, state, deferred),
        // Without its worker a ublk device goes by itself.
        Some(Exported::Ublk(_) | Exported::Socket(_)) | None => Ok(true),
    }
}

/// Whether it has gone; otherwise it will, with its last user.
fn clear_loop(
    device: LoopDevice,
    paths: &Paths,
    state: &State,
    worker_lives: bool,
    deferred: Deferred,
) -> Result<bool, BackendError> {
    let cleared = match deferred {
        Deferred::No => clear(device, paths, state, worker_lives)?,
        Deferred::Yes => device
            .clear_when_unused(Duration::from_millis(200))
            .map_err(BackendError::failed(format!("cannot have the kernel remove {}", device.path().display())))?,
    };
    match (cleared, deferred) {
        (Cleared::Gone, _) => Ok(true),
        (Cleared::InUse, Deferred::No) => Err(busy(state, &Exported::Loop(device))),
        (Cleared::InUse, Deferred::Yes) => Ok(false),
    }
}

fn clear_ublk(device: UblkDevice, paths: &Paths, state: &State, deferred: Deferred) -> Result<bool, BackendError> {
    let path = device.path();
    let stop = || match control::give(&paths.control(&state.name), Order::End { deferred: false })? {
        OrderReply::Failed(number) => Err(io::Error::from_raw_os_error(number)),
        OrderReply::Done | OrderReply::InUse(_) => Ok(()),
    };
    let cleared = device.clear(BUSY_PATIENCE, flush(state), stop).map_err(cannot_write(paths, state, &path))?;
    match (cleared, deferred) {
        (Cleared::Gone, _) => Ok(true),
        (Cleared::InUse, Deferred::No) => Err(busy(state, &Exported::Ublk(device))),
        (Cleared::InUse, Deferred::Yes) => Err(BackendError::Unavailable(format!(
            "cannot remove {} when its last user closes it: ublk does not know its users",
            path.display()
        ))),
    }
}

fn end_socket(paths: &Paths, state: &State, deferred: Deferred) -> Result<bool, BackendError> {
    let order = Order::End { deferred: deferred == Deferred::Yes };
    let action = || format!("cannot end the worker of '{}'", state.name);
    let deadline = Instant::now() + BUSY_PATIENCE;
    loop {
        match control::give(&paths.control(&state.name), order).map_err(BackendError::failed(action()))? {
            OrderReply::Done => return Ok(true),
            OrderReply::InUse(_) if deferred == Deferred::Yes => return Ok(false),
            // A client that has just ended is there until the worker has noticed.
            OrderReply::InUse(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(20)),
            OrderReply::InUse(holders) => return Err(BackendError::Busy { name: state.name.clone(), holders }),
            OrderReply::Failed(number) => {
                return Err(BackendError::failed(action())(io::Error::from_raw_os_error(number)));
            }
        }
    }
}

/// Waits until the worker has ended.
pub fn wait_for_end(state: &State) -> Result<(), BackendError> {
    if ends_within(state, END_PATIENCE) {
        return Ok(());
    }
    let reason = format!("process {} still runs, see worker.log", state.worker.pid);
    Err(BackendError::failed(format!("the worker of '{}' does not end", state.name))(reason))
}

fn ends_within(state: &State, patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
    while state.worker.is_alive() {
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(Duration::from_millis(5));
    }
    true
}

fn clear(device: LoopDevice, paths: &Paths, state: &State, worker_lives: bool) -> Result<Cleared, BackendError> {
    let path = device.path();
    if worker_lives {
        device.clear(BUSY_PATIENCE, flush(state)).map_err(cannot_write(paths, state, &path))
    } else {
        device
            .clear(BUSY_PATIENCE, Flush::Attempted)
            .map_err(BackendError::failed(format!("cannot clear {}", path.display())))
    }
}

/// A disk that has gone takes no flush, however often it is asked.
fn flush(state: &State) -> Flush {
    if state.fault.is_none() { Flush::Required } else { Flush::Attempted }
}

/// Records the fault, so that the next `detach` gives up the data that cannot be written.
fn cannot_write(paths: &Paths, state: &State, path: &Path) -> impl FnOnce(io::Error) -> BackendError {
    move |error| {
        let mut failed = state.clone();
        failed.fault = Some(format!("cannot write all data to {}: {error}", state.device.display()));
        if let Err(error) = failed.update(paths) {
            tracing::debug!("cannot record that '{}' cannot be flushed: {error}", state.name);
        }
        BackendError::failed(format!(
            "cannot write all data of '{}' ({}) to {}; run 'detach' again to give up that data",
            state.name,
            path.display(),
            state.device.display()
        ))(error)
    }
}

fn busy(state: &State, exported: &Exported) -> BackendError {
    let path = exported.path();
    let mut holders = users::of_path(&path);
    if holders.is_empty() {
        holders.push(format!("someone who has {} mounted or open", path.display()));
    }
    BackendError::Busy { name: state.name.clone(), holders }
}

/// Removes what a worker that is no more has left behind, and tells if it could not end well.
fn sweep(paths: &Paths, name: &MappingName) -> Result<(), BackendError> {
    let fault = State::load(paths, name)?.and_then(|left| left.fault);
    let swept = fuse::unmount_lazily(&paths.export(name))
        .and_then(|()| paths.remove_link(name))
        .and_then(|()| paths.remove_directory(name));
    swept.map_err(BackendError::failed(format!("cannot remove {}", paths.directory(name).display())))?;
    fault.map_or(Ok(()), |fault| Err(not_all_went_well(name, &fault)))
}

fn not_all_went_well(name: &MappingName, fault: &str) -> BackendError {
    BackendError::failed(format!("'{name}' is detached, but with errors"))(fault)
}
