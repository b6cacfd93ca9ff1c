//! Messages between the command and its worker.
#![no_main]
use std::{io::Cursor, path::Path};

use cryptattach::volumes::backend::userspace::protocol::{Request, WorkerReply, receive, send};
use cryptattach_fuzz::check_error;
use serde::{Serialize, de::DeserializeOwned};

/// What is received is sent, and received to the same again. Not one byte behind the message is taken: it is the key's.
fn check<M: Serialize + DeserializeOwned>(data: &[u8]) -> Option<M> {
    let mut wire = Cursor::new(data);
    let message: M = receive(&mut wire).ok()?;
    let length = u32::from_le_bytes(*data.first_chunk().expect("a length"));
    assert_eq!(wire.position(), 4 + u64::from(length));
    let mut sent = Vec::new();
    // Characters that need no escape may come with one and go without, and the other way round.
    send(&mut sent, &message).ok()?;
    let mut again = Vec::new();
    send(&mut again, &receive::<M>(&sent[..]).expect("what was sent")).expect("as before");
    assert_eq!(again, sent);
    Some(message)
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Some(Request::Attach(attach)) = check::<Request>(data) {
        attach.geometry();
    }
    let result = check::<WorkerReply>(data).map(|answer| answer.into_result(Path::new("/dev/vdb")));
    if let Some(Err(error)) = result {
        check_error(&error);
    }
});
