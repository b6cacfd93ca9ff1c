//! The image as a ublk device: the kernel's block requests come over io_uring (Documentation/block/ublk.rst).
//!
//! A thread per queue takes the requests, in buffers that are locked like all memory of the worker, and answers them. One that
//! comes alone it does itself; those that come together are done by a pool.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle, ThreadId},
    time::{Duration, Instant},
};

use io_uring::{opcode, types};
use libublk::{
    BufDesc, UblkError, UblkFlags, UblkIORes,
    ctrl::{UblkCtrl, UblkCtrlBuilder},
    io::{BufDescList, UblkDev, UblkIOCtx, UblkQueue},
    sys,
};
use nix::{
    libc,
    poll::PollFlags,
    sys::eventfd::{EfdFlags, EventFd},
};
use serde::{Deserialize, Serialize};

use super::{
    buffers::Buffer,
    export::{Failures, Happening},
    image::{Image, Write},
    pool::Pool,
};
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
        if let Err(error) = serve(number, device, &serving) {
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

/// Serves one queue until its device goes: takes its requests, and answers them, for both belong to one thread.
fn serve(number: u16, device: &UblkDev, image: &Arc<Image>) -> io::Result<()> {
    let mut buffers = device.alloc_queue_io_bufs();
    let (pool, done) = (Pool::default(), Arc::new(Done::new()?));
    let failures = Failures::default();
    let queue = UblkQueue::new(number, device).map_err(error)?;
    let queue = queue.submit_fetch_commands_unified(BufDescList::Slices(Some(&buffers))).map_err(error)?;
    done.announce_next(&queue)?;
    queue.wait_and_handle_io(|queue, tag, context| {
        if !context.is_tgt_io() {
            let request = Request::of(queue.get_iod(tag), image, buffers[usize::from(tag)].as_slice());
            let (image, done) = (Arc::clone(image), Arc::clone(&done));
            let alone = context.is_first_cqe() && context.is_last_cqe();
            pool.run(alone, move || done.give(tag, request.and_then(|request| request.run(&image))));
        } else {
            // First: what comes after that announces itself anew.
            done.hear();
        }
        for (tag, outcome) in done.take() {
            let buffer = &mut buffers[usize::from(tag)];
            let result = outcome.map(|outcome| outcome.deliver(buffer.as_mut_slice())).unwrap_or_else(|error| {
                failures.tell("a request failed", &error);
                -error.raw_os_error().unwrap_or(libc::EIO)
            });
            let buffer = BufDesc::Slice(buffer.as_slice());
            if let Err(error) = queue.complete_io_cmd_unified(tag, buffer, Ok(UblkIORes::Result(result))) {
                tracing::error!("cannot complete a request: {error}");
            }
        }
        if context.is_tgt_io()
            && let Err(error) = done.announce_next(queue)
        {
            tracing::error!("cannot read the results of requests: {error}");
            std::process::abort();
        }
    });
    Ok(())
}

/// A request, with the data that it writes.
struct Request {
    what: What,
    /// It is over when the device's own cache has it.
    forced: bool,
}

enum What {
    Read { offset: u64, length: usize },
    Write(Write),
    Flush,
    Discard { offset: u64, length: u64 },
    WriteZeroes { offset: u64, length: u64 },
}

/// What became of a request.
enum Outcome {
    Read(Buffer),
    Written(u32),
    Done,
}

impl Request {
    fn of(request: &sys::ublksrv_io_desc, image: &Image, buffer: &[u8]) -> io::Result<Self> {
        // A flush has no place: its sector is the highest number. Any other that lies so far behind the end fails.
        let (offset, length) = (request.start_sector.saturating_mul(512), u64::from(request.nr_sectors) * 512);
        let data = usize::try_from(length).ok().filter(|length| *length <= buffer.len());
        let data = data.ok_or(io::Error::from_raw_os_error(libc::EINVAL));
        let what = match request.op_flags & 0xff {
            sys::UBLK_IO_OP_READ => What::Read { offset, length: data? },
            sys::UBLK_IO_OP_WRITE => What::Write(image.prepare(offset, &buffer[..data?])?),
            sys::UBLK_IO_OP_FLUSH => What::Flush,
            sys::UBLK_IO_OP_DISCARD => What::Discard { offset, length },
            sys::UBLK_IO_OP_WRITE_ZEROES => What::WriteZeroes { offset, length },
            _ => return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)),
        };
        Ok(Self { what, forced: request.op_flags & sys::UBLK_IO_F_FUA != 0 })
    }

    fn run(self, image: &Image) -> io::Result<Outcome> {
        let outcome = match self.what {
            What::Read { offset, length } => {
                let data = image.read_at(offset, length)?;
                if data.len() < length {
                    return Err(io::Error::from_raw_os_error(libc::ENOSPC));
                }
                Outcome::Read(data)
            }
            What::Write(write) => {
                let bytes = u32::try_from(write.length()).expect("no longer than a buffer");
                image.commit(write).map(|()| Outcome::Written(bytes))?
            }
            What::Flush => image.flush().map(|()| Outcome::Done)?,
            What::Discard { offset, length } => image.discard(offset, length).map(|()| Outcome::Done)?,
            What::WriteZeroes { offset, length } => image.write_zeroes(offset, length).map(|()| Outcome::Done)?,
        };
        if self.forced {
            image.flush()?;
        }
        Ok(outcome)
    }
}

impl Outcome {
    /// Hands over what was read; the number of bytes that were read or written.
    fn deliver(self, buffer: &mut [u8]) -> i32 {
        let bytes = match self {
            Self::Read(data) => {
                buffer[..data.len()].copy_from_slice(&data);
                u32::try_from(data.len()).expect("no longer than a buffer")
            }
            Self::Written(bytes) => bytes,
            Self::Done => 0,
        };
        bytes.cast_signed()
    }
}

/// What other threads have done, for the queue's thread, which waits for nothing but its ring.
struct Done {
    finished: Mutex<Vec<(u16, io::Result<Outcome>)>>,
    event: EventFd,
    queue: ThreadId,
}

impl Done {
    /// For the queue of this thread.
    fn new() -> io::Result<Self> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self { finished: Mutex::default(), event, queue: thread::current().id() })
    }

    fn give(&self, tag: u16, outcome: io::Result<Outcome>) {
        self.finished.lock().unwrap_or_else(PoisonError::into_inner).push((tag, outcome));
        // It will see itself what it has done itself.
        if thread::current().id() != self.queue {
            self.event.write(1).expect("an event's counter has 64 bits");
        }
    }

    fn take(&self) -> Vec<(u16, io::Result<Outcome>)> {
        std::mem::take(&mut self.finished.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Ends the announcement. There may be none.
    fn hear(&self) {
        let _ = self.event.read();
    }

    /// Has the ring say when there is something, once.
    fn announce_next(&self, queue: &UblkQueue) -> io::Result<()> {
        let poll = opcode::PollAdd::new(
            types::Fd(self.event.as_fd().as_raw_fd()),
            u32::from(PollFlags::POLLIN.bits().cast_unsigned()),
        );
        let poll = poll.build().user_data(UblkIOCtx::build_user_data(0, 0, 0, true));
        queue.ublk_submit_sqe_sync(poll).map_err(error)
    }
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
