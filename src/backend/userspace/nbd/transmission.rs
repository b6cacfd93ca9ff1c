//! Requests and replies.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
};

use nix::{errno::Errno, libc};

use super::{
    super::image::{Image, Scratch},
    handshake::Agreed,
    protocol::*,
};

/// Data of a write is taken in pieces of this size; it is a multiple of every unit of an image.
const PIECE_BYTES: usize = 1 << 20;
/// Replies are collected up to this length, as long as more requests are there.
const OUTPUT_BYTES: usize = 256 * 1024;

/// One client, after the negotiation.
pub struct Session<'a> {
    input: BufReader<&'a UnixStream>,
    stream: &'a UnixStream,
    image: &'a Image,
    read_only: bool,
    agreed: Agreed,
    output: Vec<u8>,
    payload: Vec<u8>,
    scratch: Scratch,
    failures: u64,
}

impl<'a> Session<'a> {
    /// `input` may hold requests already.
    pub fn new(
        input: BufReader<&'a UnixStream>,
        stream: &'a UnixStream,
        image: &'a Image,
        read_only: bool,
        agreed: Agreed,
    ) -> Self {
        let output = Vec::with_capacity(OUTPUT_BYTES + 4096);
        let scratch = Scratch::default();
        Self { input, stream, image, read_only, agreed, output, payload: Vec::new(), scratch, failures: 0 }
    }

    /// Serves until the client goes.
    pub fn run(mut self) -> io::Result<()> {
        let mut header = [0; Request::BYTES];
        loop {
            self.before_reading(header.len())?;
            self.input.read_exact(&mut header)?;
            let request = Request::parse(&header).ok_or_else(|| io::Error::other("a request does not begin as one"))?;
            match request.command {
                CMD_READ => self.read(request)?,
                CMD_WRITE => self.write(request)?,
                CMD_DISC => return self.send(),
                CMD_FLUSH => {
                    let done = self.image.flush();
                    self.reply(request, done);
                }
                CMD_TRIM | CMD_WRITE_ZEROES => {
                    let done = self.change(request);
                    self.reply(request, done);
                }
                _ => self.reply(request, Err(Errno::EINVAL.into())),
            }
        }
    }

    /// Sends what is collected, if reading so many bytes may have to wait for the client.
    fn before_reading(&mut self, bytes: usize) -> io::Result<()> {
        if self.input.buffer().len() < bytes || self.output.len() >= OUTPUT_BYTES { self.send() } else { Ok(()) }
    }

    fn send(&mut self) -> io::Result<()> {
        self.stream.write_all(&self.output)?;
        self.output.clear();
        Ok(())
    }

    fn read(&mut self, request: Request) -> io::Result<()> {
        let Request { cookie, offset, length, .. } = request;
        let fits = length <= MAX_PAYLOAD_BYTES && self.fits(request);
        let read = match fits {
            true => self.image.read_at(offset, length as usize, &mut self.scratch),
            false => Err(Errno::EINVAL.into()),
        };
        match read {
            // The specification has no chunk without data.
            Ok(data) if self.agreed.structured_replies && !data.is_empty() => {
                chunk(&mut self.output, cookie, REPLY_TYPE_OFFSET_DATA, 8 + length);
                self.output.extend(offset.to_be_bytes());
                deliver(&mut self.output, self.stream, data)
            }
            Ok(_) if self.agreed.structured_replies => {
                chunk(&mut self.output, cookie, 0, 0);
                Ok(())
            }
            Ok(data) => {
                simple(&mut self.output, cookie, 0);
                deliver(&mut self.output, self.stream, data)
            }
            Err(error) if self.agreed.structured_replies => {
                let (number, message) = (self.failed(request, &error), error.to_string());
                let length = u16::try_from(message.len()).unwrap_or(0);
                chunk(&mut self.output, cookie, REPLY_TYPE_ERROR, 6 + u32::from(length));
                self.output.extend(number.to_be_bytes());
                self.output.extend(length.to_be_bytes());
                self.output.extend(&message.as_bytes()[..usize::from(length)]);
                Ok(())
            }
            Err(error) => {
                let number = self.failed(request, &error);
                simple(&mut self.output, cookie, number);
                Ok(())
            }
        }
    }

    fn write(&mut self, request: Request) -> io::Result<()> {
        if request.length > MAX_PAYLOAD_BYTES {
            return Err(io::Error::other(format!("a write of {} bytes", request.length)));
        }
        let mut done = self.may_write(request);
        let (mut offset, mut rest) = (request.offset, request.length as usize);
        // All of the data must be taken, wanted or not: the next request is behind it.
        while rest > 0 {
            let piece = rest.min(PIECE_BYTES - (offset % PIECE_BYTES as u64) as usize);
            self.before_reading(piece)?;
            let buffered = self.input.buffer().len() >= piece;
            if !buffered {
                self.payload.resize(piece, 0);
                self.input.read_exact(&mut self.payload)?;
            }
            let data = if buffered { &self.input.buffer()[..piece] } else { &self.payload[..] };
            if done.is_ok() {
                done = self.image.write_at(offset, data, &mut self.scratch);
            }
            if buffered {
                self.input.consume(piece);
            }
            offset = offset.wrapping_add(piece as u64);
            rest -= piece;
        }
        let done = done.and_then(|()| self.force(request));
        self.reply(request, done);
        Ok(())
    }

    fn change(&mut self, request: Request) -> io::Result<()> {
        self.may_write(request)?;
        let (offset, length) = (request.offset, request.length.into());
        if request.command == CMD_TRIM {
            self.image.discard(offset, length)?;
        } else if request.flags & CMD_FLAG_FAST_ZERO != 0 {
            // Zeroes are written like other data.
            return Err(Errno::ENOTSUP.into());
        } else {
            self.image.write_zeroes(offset, length, &mut self.scratch)?;
        }
        self.force(request)
    }

    fn may_write(&self, request: Request) -> io::Result<()> {
        match (self.read_only, self.fits(request)) {
            (true, _) => Err(Errno::EPERM.into()),
            (_, false) => Err(Errno::ENOSPC.into()),
            _ => Ok(()),
        }
    }

    fn fits(&self, request: Request) -> bool {
        request.offset.checked_add(request.length.into()).is_some_and(|end| end <= self.image.size())
    }

    fn force(&self, request: Request) -> io::Result<()> {
        if request.flags & CMD_FLAG_FUA == 0 { Ok(()) } else { self.image.flush() }
    }

    fn reply(&mut self, request: Request, done: io::Result<()>) {
        let number = done.err().map_or(0, |error| self.failed(request, &error));
        simple(&mut self.output, request.cookie, number);
    }

    /// Says what went wrong, not for every request of a device that has gone; the error's number in the protocol, which
    /// knows but a few.
    fn failed(&mut self, request: Request, error: &io::Error) -> u32 {
        let number = match error.raw_os_error() {
            Some(number @ (libc::EPERM | libc::ENOMEM | libc::EINVAL | libc::ENOSPC | libc::ENOTSUP)) => number,
            _ => libc::EIO,
        };
        if number == libc::EIO {
            self.failures += 1;
            if self.failures.is_power_of_two() {
                let Request { command, offset, length, .. } = request;
                tracing::error!("command {command}, {length} bytes at {offset}: {error} (failure {})", self.failures);
            }
        }
        number.unsigned_abs()
    }
}

/// Behind what is collected; what is long goes without being copied first.
fn deliver(output: &mut Vec<u8>, mut stream: &UnixStream, data: &[u8]) -> io::Result<()> {
    if data.len() <= OUTPUT_BYTES / 4 {
        output.extend(data);
        return Ok(());
    }
    stream.write_all(output)?;
    output.clear();
    stream.write_all(data)
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
