//! What commands ask of a worker that they cannot ask of the kernel: an NBD export's end, growth where there is no file.
//!
//! A socket in the mapping's directory, which is root's; one order and one answer per connection.

use std::{io, os::unix::net::UnixStream, path::Path, thread, time::Duration};

use serde::{Deserialize, Serialize};

use super::{export, protocol};

/// How long either side waits for the other; the worker has a device to flush.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a command wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub enum Order {
    /// End, unless someone uses the mapping.
    End {
        /// Then end when the last user goes.
        deferred: bool,
    },
    /// Say who uses the mapping.
    Users,
    /// Show so many bytes.
    Grow { size_bytes: u64 },
}

/// What comes of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub enum OrderReply {
    /// It is done, or the worker is about to end.
    Done,
    /// These use it, if any.
    InUse(Vec<String>),
    /// It could not be done: an error number.
    Failed(i32),
}

/// Gives an order to the worker that listens at `socket`.
pub fn give(socket: &Path, order: Order) -> io::Result<OrderReply> {
    let stream = export::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    protocol::send(&stream, &order)?;
    protocol::receive(&stream)
}

/// Listens at `socket`, in a thread of its own; `take` gets each order with where its reply goes.
pub fn listen(socket: &Path, take: impl Fn(Order, UnixStream) + Send + 'static) -> io::Result<()> {
    let listener = export::bind(socket)?;
    let accept = move || {
        for stream in listener.incoming() {
            let received = stream.and_then(|stream| {
                stream.set_read_timeout(Some(PATIENCE))?;
                Ok((protocol::receive(&stream)?, stream))
            });
            match received {
                Ok((order, stream)) => take(order, stream),
                Err(error) => tracing::warn!("cannot read an order: {error}"),
            }
        }
    };
    thread::Builder::new().name("control".to_owned()).spawn(accept).map(drop)
}
