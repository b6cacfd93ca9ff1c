//! What an NBD client says after the negotiation. The first byte says whether the image is read-only.
#![no_main]
use std::{
    io::{BufReader, Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    sync::{Arc, LazyLock},
    thread,
};

use cryptattach::{
    base::key::{KeySize, VolumeKey},
    volumes::backend::userspace::{
        ciphers::Ciphers,
        image::Image,
        nbd::{handshake::Agreed, protocol::*, transmission::Session},
    },
    volumes::header::{Geometry, SectorSize},
};

const SIZE: u64 = 256 << 10;

static IMAGE: LazyLock<Arc<Image>> = LazyLock::new(|| {
    let file = tempfile::tempfile().expect("a file");
    file.set_len(SIZE).expect("room");
    let sector_size = SectorSize::B512;
    let geometry = Geometry { sector_size, data_offset_bytes: 0, size_bytes: SIZE, iv_offset_sectors: 0 };
    let key = VolumeKey::random(KeySize::Bits512).expect("a key");
    Arc::new(Image::new(file, &geometry, Ciphers::one(&geometry, &key), 512))
});

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Some((flags, data)) = data.split_first() else { return };
    let (mut ours, theirs) = UnixStream::pair().expect("a pair");
    ours.write_all(data).expect("room in the socket");
    ours.shutdown(Shutdown::Write).expect("an open socket");
    let client = thread::spawn(move || {
        let mut replies = Vec::new();
        ours.read_to_end(&mut replies).map(|_| replies)
    });
    let agreed = Agreed { structured_replies: true, allocation: true };
    let session = Session::new(BufReader::new(&theirs), IMAGE.clone(), flags & 1 != 0, agreed).expect("a session");
    // Ends as all clients do that hang up.
    session.run().ok();
    drop(theirs);
    let replies = client.join().expect("no panic").expect("replies");
    assert_eq!(count_replies(&replies), count_requests(data));
});

/// The whole requests up to where the connection must end.
fn count_requests(mut data: &[u8]) -> usize {
    let mut count = 0;
    while let Some((header, rest)) = data.split_first_chunk() {
        let Some(request) = Request::parse(header) else { break };
        data = rest;
        if request.command == CMD_WRITE {
            let Some(rest) = rest.get(request.length as usize..) else { break };
            data = rest;
        } else if request.command == CMD_DISC {
            break;
        }
        count += 1;
    }
    count
}

/// Reads are answered by one chunk, all else by a reply without data.
fn count_replies(mut data: &[u8]) -> usize {
    let mut count = 0;
    while let Some((magic, _)) = data.split_first_chunk() {
        let length = match u32::from_be_bytes(*magic) {
            SIMPLE_REPLY_MAGIC => 16,
            STRUCTURED_REPLY_MAGIC => 20 + u32::from_be_bytes(data[16..20].try_into().expect("4 bytes")) as usize,
            other => panic!("a reply begins with {other:#x}"),
        };
        data = &data[length..];
        count += 1;
    }
    assert!(data.is_empty(), "half a reply");
    count
}
