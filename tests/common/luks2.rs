//! LUKS2 headers taken apart and put together again by hand, to make hostile ones (LUKS2 On-Disk Format section 2).

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::FileExt,
    path::Path,
};

use serde_json::Value;

const BINARY_HEADER: usize = 4096;
const CHECKSUM: std::ops::Range<usize> = 448..512;

/// Changes the JSON area of both copies of the header and mends their checksums.
pub fn change(path: &Path, change: impl Fn(&mut Value)) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let copy_size = header_size(&file);
    for copy in [0, copy_size as u64] {
        let mut bytes = vec![0; copy_size];
        file.read_exact_at(&mut bytes, copy).unwrap();
        let (binary, area) = bytes.split_at_mut(BINARY_HEADER);
        let end = area.iter().position(|byte| *byte == 0).unwrap();
        let mut json: Value = serde_json::from_slice(&area[..end]).unwrap();
        change(&mut json);
        let text = serde_json::to_vec(&json).unwrap();
        area.fill(0);
        area[..text.len()].copy_from_slice(&text);
        binary[CHECKSUM].fill(0);
        let checksum = openssl::sha::sha256(&bytes);
        bytes[CHECKSUM][..32].copy_from_slice(&checksum);
        file.write_all_at(&bytes, copy).unwrap();
    }
}

/// Size of one copy of binary header and JSON area.
pub fn header_size(file: &File) -> usize {
    let mut size = [0; 8];
    file.read_exact_at(&mut size, 8).unwrap();
    u64::from_be_bytes(size) as usize
}
