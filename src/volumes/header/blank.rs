//! Whether a device has ever been written to, as far as can be told in the time of an attach.

use std::{fs::File, io, os::unix::fs::FileExt};

/// All of the start, where headers, partition tables and file systems begin.
const START_BYTES: u64 = 32 << 20;
/// All of the end: RAID members, GPT's second copy, ZFS labels.
const END_BYTES: u64 = 1 << 20;
/// In between, so many blocks, evenly spread.
const SAMPLES: u64 = 4096;
const BLOCK_BYTES: u64 = 4096;

/// Where the first byte that is not zero was found; `None` if all that was looked at is zero.
pub fn first_data(device: &File, size_bytes: u64) -> io::Result<Option<u64>> {
    let start = 0..size_bytes.min(START_BYTES);
    let end = size_bytes.saturating_sub(END_BYTES).max(start.end)..size_bytes;
    let step = (end.start - start.end) / SAMPLES;
    let blocks = (0..SAMPLES).filter(|_| step > 0).map(|n| start.end + n * step / BLOCK_BYTES * BLOCK_BYTES);
    let between = blocks.map(|at| at..(at + BLOCK_BYTES).min(end.start));
    let mut buffer = vec![0; 1 << 20];
    for range in [start.clone(), end.clone()].into_iter().chain(between) {
        let mut at = range.start;
        while at < range.end {
            let length = usize::try_from(range.end - at).unwrap_or(usize::MAX).min(buffer.len());
            device.read_exact_at(&mut buffer[..length], at)?;
            if let Some(found) = buffer[..length].iter().position(|byte| *byte != 0) {
                return Ok(Some(at + found as u64));
            }
            at += length as u64;
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sees_data_anywhere_that_matters() {
        let size = 1 << 30;
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        assert_eq!(first_data(&file, size).unwrap(), None);
        for at in [0, START_BYTES - 1, size - 1] {
            file.write_all_at(&[1], at).unwrap();
            assert_eq!(first_data(&file, size).unwrap(), Some(at));
            file.write_all_at(&[0], at).unwrap();
        }
        // A volume in use: a run of a few megabytes somewhere.
        file.write_all_at(&[7; 4 << 20], 500 << 20).unwrap();
        assert!(first_data(&file, size).unwrap().is_some());
        let small = tempfile::tempfile().unwrap();
        small.set_len(5000).unwrap();
        small.write_all_at(&[1], 4999).unwrap();
        assert_eq!(first_data(&small, 5000).unwrap(), Some(4999));
    }
}
