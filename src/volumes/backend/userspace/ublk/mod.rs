//! The image as a ublk device: the kernel's block requests come over io_uring (Documentation/block/ublk.rst).
//!
//! A thread per queue takes the requests, in buffers that are locked like all memory of the worker, and answers them. One that
//! comes alone it does itself; those that come together are done by a pool.

mod queue;

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use libublk::{
    UblkError, UblkFlags,
    ctrl::{UblkCtrl, UblkCtrlBuilder},
    io::UblkDev,
    sys,
};
use nix::libc;
use serde::{Deserialize, Serialize};

use super::{export::Happening, image::Image};
use crate::sys::{
    loop_device::{Cleared, Flush},
    users,
};

const CONTROL: &str = "/dev/ublk-control";
const MAX_QUEUES: usize = 2;
const DEPTH: u16 = 32;
/// Buffers are locked memory: this times depth times queues.
const MAX_REQUEST_BYTES: u32 = 512 * 1024;
/// At once; the request itself is served in smaller pieces.
const MAX_DISCARD_BYTES: u32 = 1 << 30;
const POLL: Duration = Duration::from_millis(20);
/// How long the kernel may take to notice that a device's worker has died.
const SWEEP_PATIENCE: Duration = Duration::from_secs(5);

/// Whether the kernel has ublk, and its driver is loaded.
pub fn is_available() -> bool {
    Path::new(CONTROL).exists()
}

/// A ublk device by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct UblkDevice {
    number: u32,
}

impl UblkDevice {
    /// Its node in `/dev`.
    pub fn path(&self) -> PathBuf {
        format!("/dev/ublkb{}", self.number).into()
    }

    /// Writes out what was written to it and has its worker `stop` it, unless someone else has it open for all of `patience`.
    ///
    /// The kernel would take it from its users, so that they are looked for first; one that comes in between and does not
    /// open it exclusively, as a mount does, finds a device that has gone.
    pub fn clear(
        &self,
        patience: Duration,
        flush: Flush,
        stop: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<Cleared> {
        let deadline = Instant::now() + patience;
        let node = loop {
            match self.open_exclusively() {
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Cleared::Gone),
                node => {
                    let node = node?;
                    // By others than this process.
                    if users::of_path(&self.path()).is_empty() {
                        break node;
                    }
                }
            }
            if Instant::now() >= deadline {
                return Ok(Cleared::InUse);
            }
            thread::sleep(POLL);
        };
        flush.carry_out(&node, &self.path())?;
        // Still open: nobody can mount it now.
        stop()?;
        Ok(Cleared::Gone)
    }

    /// Takes it from its users. Its worker then sees it end.
    pub fn stop(&self) -> io::Result<()> {
        self.control()?.kill_dev().map(drop).map_err(error)
    }

    /// Removes what a worker that died, the process `pid`, has left of it.
    pub fn sweep(&self, pid: u32) -> io::Result<()> {
        let deadline = Instant::now() + SWEEP_PATIENCE;
        while Path::new(&format!("/dev/ublkc{}", self.number)).exists() {
            let control = self.control()?;
            let info = control.dev_info();
            if info.state == sys::UBLK_S_DEV_DEAD as u16 {
                return control.del_dev().map(drop).map_err(error);
            }
            // One that lives is another's, which has got the number since, unless the kernel has not noticed yet.
            if info.ublksrv_pid.unsigned_abs() != pid || Instant::now() >= deadline {
                break;
            }
            thread::sleep(POLL);
        }
        Ok(())
    }

    /// Makes it larger, where the kernel can do that (Linux 6.16).
    pub fn grow(&self, size_bytes: u64) -> io::Result<()> {
        self.control()?.update_size(size_bytes / 512).map(drop).map_err(error)
    }

    fn control(&self) -> io::Result<UblkCtrl> {
        // The library's note about the device. Where there is none, it says so on standard error.
        guard_run_directory()?;
        let note = PathBuf::from(UblkCtrl::run_dir()).join(format!("{:04}.json", self.number));
        if !note.exists() {
            fs::write(note, "{}")?;
        }
        UblkCtrl::new_simple(self.number.cast_signed()).map_err(error)
    }

    fn open_exclusively(&self) -> io::Result<File> {
        let read_only = fs::read_to_string(format!("/sys/block/ublkb{}/ro", self.number)).is_ok_and(|ro| ro == "1\n");
        OpenOptions::new().read(true).write(!read_only).custom_flags(libc::O_EXCL).open(self.path())
    }
}

/// A device that is being served. It goes on drop.
pub struct Export {
    device: UblkDevice,
    /// It has been deleted: its number may be another device's by now.
    gone: Arc<AtomicBool>,
    serving: Option<JoinHandle<()>>,
}

impl Export {
    /// Makes a device and serves it, in threads of its own, until it is cleared.
    pub fn start<F>(image: Arc<Image>, read_only: bool, notify: F) -> io::Result<Self>
    where
        F: Fn(Happening) + Send + Sync + 'static,
    {
        guard_run_directory()?;
        let (started, starting) = mpsc::channel();
        let (failed, gone) = (started.clone(), Arc::new(AtomicBool::new(false)));
        let deleted = Arc::clone(&gone);
        let serve = move || {
            // The library's rings belong to their thread: all is done in this one.
            let ran = run(&image, read_only, move |device| started.send(Ok(device)).unwrap_or_default());
            deleted.store(true, Ordering::Release);
            match ran {
                Ok(()) => notify(Happening::Ended(Ok(()))),
                // Nobody waits for the start any more: it has been served.
                Err(error) => {
                    if let Err(mpsc::SendError(ended)) = failed.send(Err(error)) {
                        notify(Happening::Ended(ended.map(drop)));
                    }
                }
            }
        };
        let serving = thread::Builder::new().name("ublk".to_owned()).spawn(serve)?;
        let device = starting.recv().map_err(|_| io::Error::other("the thread that serves it has panicked"))??;
        Ok(Self { device, gone, serving: Some(serving) })
    }

    /// The device.
    pub fn device(&self) -> UblkDevice {
        self.device
    }

    /// Waits for the end of a device that was cleared, and has it go if it was not.
    pub fn end(mut self) -> io::Result<()> {
        self.stop()
    }

    fn stop(&mut self) -> io::Result<()> {
        let Some(serving) = self.serving.take() else { return Ok(()) };
        if !self.gone.load(Ordering::Acquire) {
            self.device.stop().ok();
        }
        serving.join().map_err(|_| io::Error::other("the thread that served it has panicked"))
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            tracing::error!("cannot end {}: {error}", self.device.path().display());
        }
    }
}

/// Makes the device, says so, serves it until it is cleared, and deletes it.
fn run(
    image: &Arc<Image>,
    read_only: bool,
    started: impl FnOnce(UblkDevice) + Send + Sync + 'static,
) -> io::Result<()> {
    let queues = thread::available_parallelism().map_or(1, usize::from).min(MAX_QUEUES);
    let control = UblkCtrlBuilder::default()
        .name("cryptattach")
        .nr_queues(u16::try_from(queues).expect("a few"))
        .depth(DEPTH)
        .io_buf_bytes(MAX_REQUEST_BYTES)
        .dev_flags(UblkFlags::UBLK_DEV_F_ADD_DEV)
        .build()
        .map_err(error)?;
    let (shape, serving) = (Arc::clone(image), Arc::clone(image));
    let describe = move |device: &mut UblkDev| {
        device.tgt.dev_size = shape.size();
        device.tgt.params = parameters(&shape, read_only);
        Ok(())
    };
    let queue = move |number: u16, device: &UblkDev| {
        if let Err(error) = queue::serve(number, device, &serving) {
            tracing::error!("queue {number} of the ublk device cannot be served: {error}");
            // A device with a dead queue would keep its users waiting for ever.
            std::process::abort();
        }
    };
    let announce = move |control: &UblkCtrl| started(UblkDevice { number: control.dev_info().dev_id });
    control.run_target(describe, queue, announce).map(drop).map_err(error)
}

fn parameters(image: &Image, read_only: bool) -> sys::ublk_params {
    let unit = image.unit_bytes();
    let shift = |bytes: u32| u8::try_from(bytes.ilog2()).expect("at most 31");
    let mut parameters = sys::ublk_params {
        types: sys::UBLK_PARAM_TYPE_BASIC,
        basic: sys::ublk_param_basic {
            attrs: sys::UBLK_ATTR_VOLATILE_CACHE
                | sys::UBLK_ATTR_FUA
                | if read_only { sys::UBLK_ATTR_READ_ONLY } else { 0 },
            logical_bs_shift: shift(unit),
            physical_bs_shift: shift(unit.max(4096)),
            io_opt_shift: shift(unit.max(4096)),
            io_min_shift: shift(unit),
            max_sectors: MAX_REQUEST_BYTES / 512,
            dev_sectors: image.size() / 512,
            ..Default::default()
        },
        ..Default::default()
    };
    if image.passes_discards() {
        parameters.types |= sys::UBLK_PARAM_TYPE_DISCARD;
        parameters.discard = sys::ublk_param_discard {
            discard_granularity: unit,
            max_discard_sectors: MAX_DISCARD_BYTES / 512,
            max_discard_segments: 1,
            ..Default::default()
        };
    }
    parameters
}

/// The library writes a note about each device into a directory that it would make writable for everyone; following a
/// link in there, it would overwrite any file. So it is made here, and one that others may write to is refused.
fn guard_run_directory() -> io::Result<()> {
    let directory = PathBuf::from(UblkCtrl::run_dir());
    match DirBuilder::new().mode(0o700).create(&directory) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        result => return result,
    }
    let metadata = fs::symlink_metadata(&directory)?;
    if metadata.is_dir() && metadata.uid() == 0 && metadata.mode() & 0o022 == 0 {
        return Ok(());
    }
    Err(io::Error::other(format!("users other than root can write to {} (chmod go-w)", directory.display())))
}

fn error(error: UblkError) -> io::Error {
    match error {
        UblkError::IOError(error) => error,
        UblkError::UringIOError(number) | UblkError::OtherError(number) if number < 0 => {
            io::Error::from_raw_os_error(-number)
        }
        error => io::Error::other(error),
    }
}
