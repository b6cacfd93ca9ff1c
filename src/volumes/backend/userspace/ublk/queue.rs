//! The requests of one queue of a ublk device, and what becomes of them.

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
    sync::{Arc, Mutex, PoisonError},
    thread::{self, ThreadId},
};

use io_uring::{opcode, types};
use libublk::{
    BufDesc, UblkIORes,
    io::{BufDescList, UblkDev, UblkIOCtx, UblkQueue},
    sys,
};
use nix::{
    libc,
    poll::PollFlags,
    sys::eventfd::{EfdFlags, EventFd},
};

use super::{
    super::{
        buffers::Buffer,
        export::Failures,
        image::{Image, Write},
        pool::Pool,
    },
    error,
};

/// Serves one queue until its device goes: takes its requests, and answers them, for both belong to one thread.
pub fn serve(number: u16, device: &UblkDev, image: &Arc<Image>) -> io::Result<()> {
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
