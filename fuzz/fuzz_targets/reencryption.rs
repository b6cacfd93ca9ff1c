//! Both copies of a LUKS2 header as we read, judge, finish and write them ourselves; the JSON may be any.
#![no_main]
use std::{fs::File, os::unix::fs::FileExt};

use cryptattach::volumes::header::{
    HeaderImage,
    copies::Copies,
    encrypting,
    reencryption::{Side, State, boundary, check_midway, finished, one_side, progress, settled, state},
    rekey,
};
use cryptattach_fuzz::{MOST_JSON_BYTES, check_text, luks2};

/// What is written is read again.
fn check_written(copies: &Copies, file: &File, json: &serde_json::Value) {
    if copies.write(file, json).is_ok() {
        let read = Copies::read(file).expect("memory").expect("what was written");
        assert_eq!(read.json, *json);
    }
}

libfuzzer_sys::fuzz_target!(|json: &[u8]| {
    let mut binary = [0; 512];
    binary[..8].copy_from_slice(b"LUKS\xba\xbe\0\x02");
    binary[23] = 1;
    binary[72..78].copy_from_slice(b"sha256");
    if json.len() > MOST_JSON_BYTES {
        return;
    }
    let image = HeaderImage::empty(64 << 20).expect("an image");
    image.file().write_all_at(&luks2(&binary, json), 0).expect("room");
    let Some(copies) = Copies::read(image.file()).expect("memory") else { return };
    let json = copies.json.clone();
    let _ = (progress(&json, 64 << 20), boundary(&json));
    let _ = rekey::others(&json);
    const DEVICE: u64 = 64 << 20;
    if let Some(progress) = encrypting::progress(&json, DEVICE) {
        let (done, all) = progress.done();
        let ((at, bytes), first) = (progress.behind(), &progress.first);
        assert!(done <= all && progress.wiped <= bytes && at + bytes == first.at && first.at + first.bytes <= DEVICE);
        let shifted = |next: &encrypting::Part| next.at + next.bytes + encrypting::SHIFT_BYTES;
        assert!(progress.next.iter().all(|next| next.at >= first.bytes && shifted(next) <= at));
        let done = encrypting::with(&json, None).expect("it has our token");
        assert_eq!((encrypting::is_begun(&done), encrypting::progress(&done, DEVICE)), (false, None));
        check_written(&copies, image.file(), &encrypting::with(&json, Some(progress)).expect("as it was"));
    }
    if let Err(why) = check_midway(&json) {
        check_text(&why);
    }
    let _ = (one_side(&json, Side::Old), one_side(&json, Side::New));
    for ended in [finished(&json), settled(&json)].into_iter().flatten() {
        assert_eq!(state(&ended), State::None);
        assert_eq!(finished(&ended), None, "it has ended");
        check_written(&copies, image.file(), &ended);
    }
});
