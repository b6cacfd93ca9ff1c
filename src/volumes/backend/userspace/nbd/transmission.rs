//! Requests and replies.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    sync::{Arc, Mutex, PoisonError},
};

use nix::{errno::Errno, libc};
use zeroize::Zeroize;

use super::{
    super::{export::Failures, image::Image, pool::Pool},
    handshake::Agreed,
    protocol::*,
};

/// Requests up to this length go side by side; longer ones, and each in pieces of it, one after the other. It is a multiple
/// of every unit of an image.
const PIECE_BYTES: usize = 1 << 20;
/// Replies up to this length are put together for the socket.
const SHORT_BYTES: usize = 64 * 1024;

/// One client's requests, after the negotiation.
pub struct Session<'a> {
    input: BufReader<&'a UnixStream>,
    client: Arc<Client>,
    pool: Pool,
    payload: Vec<u8>,
}

/// What requests need that are done in other threads.
struct Client {
    /// Locked for one whole reply.
    output: Mutex<UnixStream>,
    image: Arc<Image>,
    read_only: bool,
    agreed: Agreed,
    failures: Failures,
}

impl<'a> Session<'a> {
    /// `input` may hold requests already.
    pub fn new(
        input: BufReader<&'a UnixStream>,
        image: Arc<Image>,
        read_only: bool,
        agreed: Agreed,
    ) -> io::Result<Self> {
        let output = Mutex::new(input.get_ref().try_clone()?);
        let client = Arc::new(Client { output, image, read_only, agreed, failures: Failures::default() });
        Ok(Self { input, client, pool: Pool::default(), payload: Vec::new() })
    }

    /// Serves until the client goes. Its requests are done then.
    pub fn run(mut self) -> io::Result<()> {
        let mut header = [0; Request::BYTES];
        loop {
            self.input.read_exact(&mut header)?;
            let request =
                Request::parse(&header).ok_or_else(|| io::Error::other("a request has the wrong magic number"))?;
            match request.command {
                // Its data is taken first.
                CMD_WRITE => self.write(request)?,
                CMD_DISC => return Ok(()),
                _ if request.has_unknown_flags() => self.client.refuse(request, &Errno::EINVAL.into()),
                CMD_READ if request.length as usize <= PIECE_BYTES => {
                    self.run_beside(move |client| client.read(request))
                }
                CMD_READ => self.client.read(request),
                CMD_FLUSH => self.run_beside(move |client| client.reply(request, client.image.flush())),
                CMD_TRIM | CMD_WRITE_ZEROES => {
                    self.run_beside(move |client| client.reply(request, client.change(request)))
                }
                CMD_BLOCK_STATUS => self.client.status(request),
                _ => self.client.refuse(request, &Errno::EINVAL.into()),
            }
        }
    }

    fn run_beside(&self, request: impl FnOnce(&Client) + Send + 'static) {
        let client = Arc::clone(&self.client);
        self.pool.run(self.input.buffer().is_empty(), move || request(&client));
    }

    fn write(&mut self, request: Request) -> io::Result<()> {
        if request.length > MAX_PAYLOAD_BYTES {
            return Err(io::Error::other(format!("a write of {} bytes", request.length)));
        }
        let (mut offset, mut rest) = (request.offset, request.length as usize);
        let mut done = self.client.may_write(request);
        // All of the data must be taken, wanted or not: the next request is behind it.
        loop {
            let piece = rest.min(PIECE_BYTES - (offset % PIECE_BYTES as u64) as usize);
            let buffered = self.input.buffer().len() >= piece;
            if !buffered {
                self.payload.resize(piece, 0);
                self.input.read_exact(&mut self.payload)?;
            }
            let data = if buffered { &self.input.buffer()[..piece] } else { &self.payload[..] };
            let prepared = done.and_then(|()| self.client.image.prepare(offset, data));
            if buffered {
                self.input.consume(piece);
            }
            offset = offset.wrapping_add(piece as u64);
            rest -= piece;
            if rest == 0 {
                self.run_beside(move |client| {
                    let done = prepared.and_then(|write| client.image.commit(write));
                    client.reply(request, done.and_then(|()| client.force(request)));
                });
                return Ok(());
            }
            done = prepared.and_then(|write| self.client.image.commit(write));
        }
    }
}

impl Client {
    fn read(&self, request: Request) {
        let Request { cookie, offset, length, .. } = request;
        let fits = length <= MAX_PAYLOAD_BYTES && self.fits(request);
        let read = match fits {
            true => self.image.read_at(offset, length as usize),
            false => Err(Errno::EINVAL.into()),
        };
        let mut head = Vec::with_capacity(64);
        match read {
            // The specification has no chunk without data.
            Ok(data) if self.agreed.structured_replies && !data.is_empty() => {
                chunk(&mut head, cookie, REPLY_TYPE_OFFSET_DATA, 8 + length);
                head.extend(offset.to_be_bytes());
                self.send(head, &data);
            }
            Ok(_) if self.agreed.structured_replies => {
                chunk(&mut head, cookie, 0, 0);
                self.send(head, &[]);
            }
            Ok(data) => {
                simple(&mut head, cookie, 0);
                self.send(head, &data);
            }
            Err(error) => self.refuse(request, &error),
        }
    }

    /// Which blocks are allocated: all.
    fn status(&self, request: Request) {
        if !self.agreed.allocation || request.length == 0 || !self.fits(request) {
            return self.refuse(request, &Errno::EINVAL.into());
        }
        let mut head = Vec::with_capacity(64);
        chunk(&mut head, request.cookie, REPLY_TYPE_BLOCK_STATUS, 12);
        head.extend([ALLOCATION_ID, request.length, 0].map(u32::to_be_bytes).concat());
        self.send(head, &[]);
    }

    /// An error, in the form that was agreed on.
    fn refuse(&self, request: Request, error: &io::Error) {
        let mut head = Vec::with_capacity(64);
        let number = self.failed(request, error);
        if !self.agreed.structured_replies {
            simple(&mut head, request.cookie, number);
            return self.send(head, &[]);
        }
        let message = error.to_string();
        let length = u16::try_from(message.len()).unwrap_or(0);
        chunk(&mut head, request.cookie, REPLY_TYPE_ERROR, 6 + u32::from(length));
        head.extend(number.to_be_bytes());
        head.extend(length.to_be_bytes());
        self.send(head, &message.as_bytes()[..usize::from(length)]);
    }

    fn change(&self, request: Request) -> io::Result<()> {
        self.may_write(request)?;
        let (offset, length) = (request.offset, request.length.into());
        if request.command == CMD_TRIM {
            self.image.discard(offset, length)?;
        } else if request.flags & CMD_FLAG_FAST_ZERO != 0 {
            // Zeroes are written like other data.
            return Err(Errno::ENOTSUP.into());
        } else {
            self.image.write_zeroes(offset, length)?;
        }
        self.force(request)
    }

    fn may_write(&self, request: Request) -> io::Result<()> {
        match (self.read_only, self.fits(request), request.command) {
            _ if request.has_unknown_flags() => Err(Errno::EINVAL.into()),
            (true, ..) => Err(Errno::EPERM.into()),
            // There is nothing to make room for.
            (_, false, CMD_TRIM) => Err(Errno::EINVAL.into()),
            (_, false, _) => Err(Errno::ENOSPC.into()),
            _ => Ok(()),
        }
    }

    fn fits(&self, request: Request) -> bool {
        request.offset.checked_add(request.length.into()).is_some_and(|end| end <= self.image.size())
    }

    fn force(&self, request: Request) -> io::Result<()> {
        if request.flags & CMD_FLAG_FUA == 0 { Ok(()) } else { self.image.flush() }
    }

    fn reply(&self, request: Request, done: io::Result<()>) {
        let number = done.err().map_or(0, |error| self.failed(request, &error));
        let mut head = Vec::with_capacity(16);
        simple(&mut head, request.cookie, number);
        self.send(head, &[]);
    }

    /// A client that cannot be answered has gone: nothing more is read from it.
    fn send(&self, mut head: Vec<u8>, data: &[u8]) {
        let mut output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        let sent = if data.len() <= SHORT_BYTES {
            head.extend(data);
            output.write_all(&head)
        } else {
            output.write_all(&head).and_then(|()| output.write_all(data))
        };
        // Plaintext.
        head.zeroize();
        if let Err(error) = sent {
            tracing::debug!("cannot answer: {error}");
            output.shutdown(Shutdown::Both).ok();
        }
    }

    /// Says what went wrong; the error's number in the protocol, which knows but a few.
    fn failed(&self, request: Request, error: &io::Error) -> u32 {
        let number = match error.raw_os_error() {
            Some(number @ (libc::EPERM | libc::ENOMEM | libc::EINVAL | libc::ENOSPC | libc::ENOTSUP)) => number,
            _ => libc::EIO,
        };
        if number == libc::EIO {
            let Request { command, offset, length, .. } = request;
            self.failures.tell(format_args!("command {command}, {length} bytes at {offset}"), error);
        }
        number.unsigned_abs()
    }
}

fn simple(output: &mut Vec<u8>, cookie: u64, error: u32) {
    output.extend(SIMPLE_REPLY_MAGIC.to_be_bytes());
    output.extend(error.to_be_bytes());
    output.extend(cookie.to_be_bytes());
}

/// The header of a reply's only chunk.
fn chunk(output: &mut Vec<u8>, cookie: u64, kind: u16, length: u32) {
    output.extend(STRUCTURED_REPLY_MAGIC.to_be_bytes());
    output.extend(REPLY_FLAG_DONE.to_be_bytes());
    output.extend(kind.to_be_bytes());
    output.extend(cookie.to_be_bytes());
    output.extend(length.to_be_bytes());
}
