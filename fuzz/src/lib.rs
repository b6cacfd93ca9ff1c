//! What several targets have in common.

use std::{
    error::Error,
    fmt::{Debug, Display},
    fs::File,
    os::unix::fs::FileExt,
    str::FromStr,
};

use cryptattach::{
    base::chain::chain,
    sys::device::{Device, DeviceKind, Identity},
    volumes::header::{HeaderImage, Volume, probe_image},
};

/// Size of the device that headers are for.
const DEVICE_BYTES: u64 = 64 << 20;
/// Size of one copy of a LUKS2 header.
const COPY_BYTES: usize = 16 << 10;
/// Size of the binary part of a LUKS2 header, and the checksum in it (LUKS2 On-Disk Format section 2.1).
const BINARY_BYTES: usize = 4096;
const CHECKSUM: std::ops::Range<usize> = 448..512;

/// An error must not move a terminal's cursor.
pub fn check_error(error: &(dyn Error + 'static)) {
    check_text(&chain(error));
}

/// As [`check_error`], for a text.
pub fn check_text(text: &str) {
    assert!(!text.contains(|c: char| c.is_control() && c != '\n'), "{text:?}");
}

/// What is parsed is printed, and parsed to the same again.
pub fn check_word<T: FromStr<Err: Error + 'static> + Display + Debug + PartialEq>(text: &str) {
    match text.parse::<T>() {
        Ok(word) => assert_eq!(word.to_string().parse::<T>().expect("what was printed"), word),
        Err(error) => check_error(&error),
    }
}

/// Both copies of a LUKS2 header, with right checksums.
pub fn luks2(binary: &[u8], json: &[u8]) -> Vec<u8> {
    let mut copy = vec![0; COPY_BYTES];
    let (head, area) = copy.split_at_mut(BINARY_BYTES);
    head[..binary.len()].copy_from_slice(binary);
    head[8..16].copy_from_slice(&(COPY_BYTES as u64).to_be_bytes());
    area[..json.len()].copy_from_slice(json);
    let mut both = copy.clone();
    let second = &mut copy;
    second[..4].copy_from_slice(b"SKUL");
    second[256..264].copy_from_slice(&(COPY_BYTES as u64).to_be_bytes());
    both.extend_from_slice(second);
    for copy in both.chunks_mut(COPY_BYTES) {
        copy[CHECKSUM].fill(0);
        let checksum = openssl::sha::sha256(copy);
        copy[CHECKSUM][..32].copy_from_slice(&checksum);
    }
    both
}

/// The longest JSON that fits into [`luks2`].
pub const MOST_JSON_BYTES: usize = COPY_BYTES - BINARY_BYTES;

/// Reads a header as an attach does. What is let through fits its device.
pub fn probe(header: &[u8]) {
    let image = HeaderImage::empty(DEVICE_BYTES).expect("an image");
    let file = File::options().write(true).open(image.path()).expect("the image");
    file.write_all_at(header, 0).expect("room");
    let device = Device {
        path: "/dev/none".into(),
        identity: Identity::BlockDevice { number: 0, sequence: None },
        kind: DeviceKind::File,
        size_bytes: DEVICE_BYTES,
        read_only: false,
        logical_block_bytes: 512,
        physical_block_bytes: 4096,
    };
    match probe_image(&device, None, &image) {
        Ok(volume) => check_volume(&volume),
        Err(error) => check_error(&error),
    }
}

fn check_volume(volume: &Volume) {
    let geometry = volume.geometry;
    let end = geometry.data_offset_bytes.checked_add(geometry.size_bytes);
    assert!(geometry.size_bytes > 0 && end.is_some_and(|end| end <= DEVICE_BYTES), "{geometry:?}");
    assert!(geometry.size_bytes.is_multiple_of(geometry.sector_size.bytes().into()), "{geometry:?}");
    assert_eq!(geometry.iv_offset_sectors, 0);
}
