//! A backup of a container, before its author is known.
#![no_main]
use cryptattach::unlock::container::backup::BackupFile;
use cryptattach_fuzz::check_error;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    match BackupFile::parse(data.to_vec()) {
        Ok(file) => assert_eq!(file.bytes(), data),
        Err(error) => check_error(&error),
    }
});
