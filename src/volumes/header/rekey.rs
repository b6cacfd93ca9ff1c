//! A new volume key by re-encryption: libcryptsetup rewrites the sectors, and what it lacks before and after is here.
//!
//! Two keyslots under one random passphrase bring both keys to libcryptsetup. The token names both sealed keys before the first
//! sector is written, so that the header alone says how to go on.

#![allow(unsafe_code)] // the callback that libcryptsetup reports to

use std::{
    ffi::{c_int, c_void},
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::Path,
};

use cryptattach_xts::{Key, Xts};
use either::Either;
use libcryptsetup_rs::{
    CryptDevice, CryptInit, CryptParamsLuks2, CryptParamsReencrypt, LibcryptErr, TokenInput,
    consts::{
        flags::{CryptReencrypt, CryptVolumeKey},
        vals::{CryptReencryptDirectionInfo, CryptReencryptModeInfo, EncryptionFormat},
    },
};
use openssl::sha::sha256;
use serde_json::{Value, json};
use uuid::Uuid;

use super::{
    HeaderImage, Volume, VolumeError,
    copies::Copies,
    library,
    luks::{UntrustedHeader, least_pbkdf},
    midway::with_keyslots,
    reencryption::{self, Side, State, area, checksums, hotzone, our_token, strings},
    token::Next,
};
use crate::{
    base::{
        key::{KeyReference, SecretBytes, VolumeKey},
        mapping_name::MappingName,
    },
    sys::device::{Device, DeviceError, Identity},
};

/// Keyslots of LUKS2 (LUKS2_KEYSLOTS_MAX).
const KEYSLOTS: u32 = 32;
/// All keyslots of LUKS2 together have at most so much (LUKS2_MAX_KEYSLOTS_SIZE), whatever a header says of one.
const MOST_AREA_BYTES: u64 = 128 << 20;
/// So much is re-encrypted between two header updates unless asked otherwise: so long a signal waits.
pub const HOTZONE_BYTES: u64 = 64 << 20;
/// No more of a volume that is attached: so long its users wait.
pub const MOST_ONLINE_BYTES: u64 = 8 << 20;

/// A header with both keys, in memory.
pub struct Prepared {
    before: Copies,
    image: HeaderImage,
    /// The volume as it will be: under the new key.
    pub volume: Volume,
}

/// What to ask of libcryptsetup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Run {
    /// Begin, and go on to the end.
    Begin,
    /// Go on to the end.
    GoOn,
    /// Only bring the hotzone in order in which a run was killed.
    Recover,
}

/// What was found of a hotzone in which a run was killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hotzone {
    /// Each block is provably old or new; those that were torn are old again.
    Sound,
    /// Its checksums had not reached the disk, so no block was written; they are right now.
    Mended,
    /// Some blocks are neither.
    Torn { blocks: u64 },
}

/// The header of a device as it is now.
pub fn read(device: &Device) -> Result<Copies, VolumeError> {
    let file = device.reopen()?;
    let copies = Copies::read(&file).map_err(DeviceError::io("read", &device.path))?;
    copies.ok_or_else(|| VolumeError::NoHeader { path: device.path.clone(), found: None })
}

/// Which device or file is at a path, and the UUID of the LUKS2 header there, if one can be read.
pub fn found(path: &Path) -> Option<(Identity, Uuid)> {
    let device = Device::look(path).ok()?;
    Some((device.identity, read(&device).ok()?.uuid()?))
}

/// What opens the volume besides its key: keyslots and tokens that are not ours, in words.
pub fn others(json: &Value) -> Vec<String> {
    let ours = our_token(json);
    let claimed = ours.as_ref().map(|(_, token)| token.keyslots.clone()).unwrap_or_default();
    let members = |name: &str| json[name].as_object().into_iter().flatten();
    let keyslots = members("keyslots").filter(|(number, _)| !claimed.contains(number));
    let tokens = members("tokens").filter(|(number, _)| ours.as_ref().is_none_or(|(our, _)| our != number));
    let kind = |token: &Value| token["type"].as_str().unwrap_or("?").to_owned();
    keyslots
        .map(|(number, _)| format!("keyslot {number}"))
        .chain(tokens.map(|(number, token)| format!("token {number} ({})", kind(token))))
        .collect()
}

/// The volume of a half re-encrypted header, or of one that is prepared, as if one of its keys were the only one. For checks of that key only: most of its
/// data may have the other one.
pub fn side(device: &Device, copies: &Copies, side: Side) -> Result<Volume, VolumeError> {
    let has_begun = reencryption::state(&copies.json) != State::None;
    if let Err(why) = if has_begun { reencryption::check_midway(&copies.json) } else { Ok(()) } {
        return Err(VolumeError::NotRotating { path: device.path.clone(), why });
    }
    let json = match side {
        Side::New if !has_begun => reencryption::as_next(&copies.json),
        side => reencryption::one_side(&copies.json, side),
    };
    let damaged = || VolumeError::NotRotating { path: device.path.clone(), why: "it has no such key".to_owned() };
    view(device, copies, &json.ok_or_else(damaged)?)
}

/// The volume of a header in memory, judged as any header is.
pub(super) fn view(device: &Device, copies: &Copies, json: &Value) -> Result<Volume, VolumeError> {
    let image = HeaderImage::of(device.size_bytes, copies, json).map_err(DeviceError::io("read", &device.path))?;
    UntrustedHeader::parse(device.clone(), None, image)?.check()
}

/// Makes the header with both keys in memory.
pub fn prepare(
    volume: &Volume,
    [old, new]: [&VolumeKey; 2],
    passphrase: &SecretBytes,
    next: &KeyReference,
) -> Result<Prepared, VolumeError> {
    let device = &volume.device;
    let io = |source| VolumeError::from(DeviceError::io("read", &device.path)(source));
    let no_token = || VolumeError::NoToken { path: device.path.clone(), why: "it has none of ours".to_owned() };
    let luks = volume.luks().ok_or_else(no_token)?;
    let before = Copies::read(luks.image.file()).map_err(io)?.ok_or_else(no_token)?;
    let image = with_keyslots(device, volume.geometry.data_offset_bytes, &before)?;
    let (token_id, token) = our_token(&before.json).ok_or_else(no_token)?;
    let is_free = |number: &u32| before.json["keyslots"].get(number.to_string()).is_none();
    let mut free = (0..KEYSLOTS).filter(is_free);
    let (Some(for_old), Some(for_new)) = (free.next(), free.next()) else { return Err(no_token()) };
    let failed = |source| VolumeError::Library { action: "make a header for", path: device.path.clone(), source };
    library::call(|| {
        let mut context = open(&image)?;
        for (number, key, flags) in
            [(for_old, old, CryptVolumeKey::empty()), (for_new, new, CryptVolumeKey::NO_SEGMENT)]
        {
            let key = Some(Either::Left(key.expose()));
            context.keyslot_handle().add_by_key(Some(number), key, passphrase.expose(), flags)?;
        }
        let [for_old, for_new] = [for_old, for_new].map(|number| number.to_string());
        let json = context.status_handle().dump_json()?;
        let mut digests = json["digests"].as_object().into_iter().flatten();
        let digest = digests.find(|(_, digest)| strings(&digest["keyslots"]).contains(&for_new.as_str()));
        let digest = digest.map(|(number, _)| number.clone()).unwrap_or_default();
        let stay = if token.keyslots.is_empty() { Vec::new() } else { vec![for_new.clone()] };
        let claimed = token.keyslots.iter().cloned().chain([for_old, for_new]).collect();
        let token = token.clone().with_next(Next::new(next, digest, stay), claimed);
        let token = serde_json::to_value(token).map_err(LibcryptErr::JsonError)?;
        let number = token_id.parse().map_err(|_| LibcryptErr::InvalidConversion)?;
        context.token_handle().json_set(TokenInput::ReplaceToken(number, &token)).map(drop)
    })
    .map_err(failed)?;
    let made = Copies::read(image.file()).map_err(io)?.ok_or_else(no_token)?;
    let volume = view(device, &made, &reencryption::as_next(&made.json).ok_or_else(no_token)?)?;
    Ok(Prepared { before, image, volume })
}

impl Prepared {
    /// Writes it: the keyslots, then the header, copy by copy.
    pub fn write(&self, file: &File) -> Result<(), VolumeError> {
        let path = &self.volume.device.path;
        let write = || -> io::Result<bool> {
            let (on_device, made) = (Copies::read(file)?, Copies::read(self.image.file())?);
            let (Some(on_device), Some(made)) = (on_device, made) else { return Ok(false) };
            if !on_device.is(&self.before) {
                return Ok(false);
            }
            for (number, keyslot) in made.json["keyslots"].as_object().into_iter().flatten() {
                if self.before.json["keyslots"].get(number).is_none() {
                    let (at, bytes) = bounded(&made, keyslot)?;
                    let mut material = vec![0; bytes];
                    self.image.file().read_exact_at(&mut material, at)?;
                    file.write_all_at(&material, at)?;
                }
            }
            file.sync_all()?;
            on_device.write(file, &made.json).map(|()| true)
        };
        match write().map_err(DeviceError::io("write the header of", path))? {
            true => Ok(()),
            false => Err(VolumeError::HeaderChanged { path: path.clone() }),
        }
    }
}

/// Re-encrypts, below the mapping if there is one: `tell` hears how many bytes are done and how many there are, and says whether
/// to go on.
pub fn run(
    device: &Device,
    mapping: Option<&MappingName>,
    passphrase: &SecretBytes,
    run: Run,
    hotzone_bytes: u64,
    tell: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<(), VolumeError> {
    let json = read(device)?.json;
    device.still_there()?;
    // Ours are the last two, for the old key and for the new one. The first ones may be a person's way to the old key.
    let slots = our_token(&json).map(|(_, token)| token.keyslots).unwrap_or_default();
    let slot = |from_end: usize| slots.iter().rev().nth(from_end).and_then(|number| number.parse().ok());
    let (for_old, for_new) = (slot(1), slot(0));
    let flags = match run {
        Run::Begin => CryptReencrypt::empty(),
        Run::GoOn => CryptReencrypt::RESUME_ONLY,
        Run::Recover => CryptReencrypt::RECOVERY,
    };
    let sector_size = json["segments"]["0"]["sector_size"].as_u64().and_then(|bytes| bytes.try_into().ok());
    let luks2 = CryptParamsLuks2 {
        pbkdf: Some(least_pbkdf()),
        integrity: None,
        integrity_params: None,
        data_alignment: 0,
        data_device: None,
        sector_size: sector_size.unwrap_or(512),
        label: None,
        subsystem: None,
    };
    let parameters = CryptParamsReencrypt {
        mode: CryptReencryptModeInfo::Reencrypt,
        direction: CryptReencryptDirectionInfo::Forward,
        // Not "journal": a stale journal is copied over the data (fault C in docs/rotation.md).
        resilience: "checksum".to_owned(),
        hash: "sha256".to_owned(),
        data_shift: 0,
        max_hotzone_size: hotzone_bytes / 512,
        device_size: 0,
        luks2: Some(luks2),
        flags,
    };
    library::call(|| {
        let mut context = CryptInit::init(&device.path)?;
        context.context_handle().load::<()>(Some(EncryptionFormat::Luks2), None)?;
        context.settings_handle().set_pbkdf_type(&least_pbkdf())?;
        let cipher = Some(("aes", "xts-plain64"));
        let mut handle = context.reencrypt_handle();
        let mapping = mapping.map(MappingName::as_str);
        handle.reencrypt_init_by_passphrase(mapping, passphrase.expose(), for_old, for_new, cipher, parameters)?;
        match run {
            Run::Recover => Ok(()),
            Run::Begin | Run::GoOn => handle.reencrypt2(Some(watch), Some(&mut Watch { tell })),
        }
    })
    .map_err(|source| VolumeError::Library { action: "re-encrypt", path: device.path.clone(), source })
}

struct Watch<'a> {
    tell: &'a mut dyn FnMut(u64, u64) -> bool,
}

/// libcryptsetup ends the run in good order if this is not 0.
unsafe extern "C" fn watch(size: u64, offset: u64, data: *mut c_void) -> c_int {
    // SAFETY: `run` gives a `Watch` that outlives the call, and libcryptsetup has one thread there.
    let watch = unsafe { &mut *data.cast::<Watch<'_>>() };
    c_int::from(!(watch.tell)(offset, size))
}

/// Looks at the hotzone in which a run was killed, before libcryptsetup recovers it: that takes whatever does not have its
/// stored checksum for written. Checksums and the header that refers to them share one fsync, so that need not be true.
pub fn mend(file: &File, copies: &Copies, [old, new]: [&VolumeKey; 2]) -> io::Result<Hotzone> {
    const SUM: u64 = 32;
    const AT_ONCE: u64 = 1 << 20;
    let odd = || io::Error::new(io::ErrorKind::InvalidData, "its hotzone is not described");
    let (at, bytes, in_data, sector) = hotzone(&copies.json).ok_or_else(odd)?;
    let (keyslot, block) = checksums(&copies.json).ok_or_else(odd)?;
    let (sums_at, room) = bounded(copies, keyslot)?;
    let room = room as u64;
    let is_right = [512, 1024, 2048, 4096].contains(&sector) && block.is_multiple_of(sector) && block <= AT_ONCE;
    if !is_right
        || block == 0
        || !AT_ONCE.is_multiple_of(block)
        || !bytes.is_multiple_of(block)
        || bytes / block > room / SUM
    {
        return Err(odd());
    }
    let (Some(old), Some(new)) = (Key::of(old.expose()), Key::of(new.expose())) else { return Err(odd()) };
    let [old, new] = [old, new].map(|key| Xts::new(key, sector as usize, 0));
    let (mut written, mut neither, mut right_sums) = (0, 0, Vec::new());
    for chunk in (0..bytes).step_by(AT_ONCE as usize) {
        let mut data = vec![0; AT_ONCE.min(bytes - chunk) as usize];
        file.read_exact_at(&mut data, at + chunk)?;
        let mut stored = vec![0; data.len() / block as usize * SUM as usize];
        file.read_exact_at(&mut stored, sums_at + chunk / block * SUM)?;
        let blocks = data.chunks(block as usize).zip(stored.chunks(SUM as usize));
        for (index, (data, stored)) in blocks.enumerate() {
            let sum = sha256(data);
            right_sums.extend_from_slice(&sum);
            if sum == *stored {
                continue;
            }
            let place = chunk + index as u64 * block;
            let mut before = data.to_vec();
            new.decrypt_in_place(in_data + place, &mut before);
            old.encrypt_in_place(in_data + place, &mut before);
            if sha256(&before) == *stored {
                written += 1;
            } else if let Some(before) = untorn(data, &before, stored) {
                file.write_all_at(&before, at + place)?;
                written += 1;
            } else {
                neither += 1;
            }
        }
    }
    file.sync_all()?;
    match (neither, written) {
        (0, _) => Ok(Hotzone::Sound),
        // Had any been written, the checksums would have been on the disk before.
        (_, 0) => {
            file.write_all_at(&right_sums, sums_at)?;
            file.sync_all()?;
            Ok(Hotzone::Mended)
        }
        (blocks, _) => Ok(Hotzone::Torn { blocks }),
    }
}

/// A block of which only some sectors of 512 bytes were written, as it was before: XTS encrypts each 16 bytes by
/// themselves, so each sector is in `now` if it was not written, or else in `before`. The checksum says which of the 256
/// ways it is.
fn untorn(now: &[u8], before: &[u8], sum: &[u8]) -> Option<Vec<u8>> {
    const SECTOR: usize = 512;
    let sectors = now.len() / SECTOR;
    let ways = (2..=8).contains(&sectors).then(|| 1..(1_u32 << sectors) - 1)?;
    let mut block = now.to_vec();
    ways.into_iter().find_map(|written| {
        for sector in 0..sectors {
            let from = if written >> sector & 1 == 1 { before } else { now };
            block[sector * SECTOR..][..SECTOR].copy_from_slice(&from[sector * SECTOR..][..SECTOR]);
        }
        (sha256(&block) == *sum).then(|| block.clone())
    })
}

/// Gives a header whose data is all under the new key its last form; the key material that goes is wiped before. Nothing is
/// done if it has that form. It takes neither key nor libcryptsetup.
pub fn settle(device: &Device, file: &File) -> Result<(), VolumeError> {
    let settle = || -> io::Result<()> {
        let Some(copies) = Copies::read(file)? else { return Ok(()) };
        let json = &copies.json;
        let Some(settled) = reencryption::settled(json).or_else(|| reencryption::finished(json)) else { return Ok(()) };
        for (number, keyslot) in json["keyslots"].as_object().into_iter().flatten() {
            if keyslot["type"] == "luks2" && settled["keyslots"].get(number).is_none() {
                let (at, bytes) = bounded(&copies, keyslot)?;
                let mut noise = vec![0; bytes];
                openssl::rand::rand_bytes(&mut noise).map_err(io::Error::other)?;
                file.write_all_at(&noise, at)?;
            }
        }
        file.sync_all()?;
        copies.write(file, &settled)
    };
    Ok(settle().map_err(DeviceError::io("write the header of", &device.path))?)
}

/// Where a keyslot's key material stands: behind both copies of the header, and before the data.
fn bounded(copies: &Copies, keyslot: &Value) -> io::Result<(u64, usize)> {
    let (at, bytes) = area(keyslot);
    let data = area(&json!({ "area": copies.json["segments"]["0"] })).0;
    let end = at.checked_add(bytes).filter(|end| at >= 2 * copies.size() && *end <= data && bytes <= MOST_AREA_BYTES);
    let bytes = end.and_then(|_| usize::try_from(bytes).ok());
    Ok((at, bytes.ok_or(io::ErrorKind::InvalidData)?))
}

/// The state of the header on a device, for who is about to go on.
pub fn state(device: &Device) -> Result<State, VolumeError> {
    Ok(reencryption::state(&read(device)?.json))
}

fn open(image: &HeaderImage) -> Result<CryptDevice, LibcryptErr> {
    let mut context = CryptInit::init(&image.path())?;
    context.context_handle().load::<()>(Some(EncryptionFormat::Luks2), None)?;
    context.settings_handle().set_pbkdf_type(&least_pbkdf())?;
    Ok(context)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::key::KeySize;

    const DATA: u64 = 1 << 20;
    const SUMS: u64 = 65536;
    const BLOCKS: usize = 64;

    /// A hotzone in which the first `new` blocks were written, and what stands in the place of its checksums.
    fn hotzone(new: usize, stale: bool) -> (File, Copies, [VolumeKey; 2]) {
        let keys = [(); 2].map(|()| VolumeKey::random(KeySize::Bits512).unwrap());
        let [old, next] = [&keys[0], &keys[1]].map(|key| Xts::new(Key::of(key.expose()).unwrap(), 512, 0));
        let file = tempfile::tempfile().unwrap();
        file.set_len(2 << 20).unwrap();
        for index in 0..BLOCKS {
            let at = index as u64 * 4096;
            let (mut before, mut after) = (vec![index as u8; 4096], vec![index as u8; 4096]);
            // The hotzone is not the first one.
            old.encrypt_in_place(8192 + at, &mut before);
            next.encrypt_in_place(8192 + at, &mut after);
            file.write_all_at(if index < new { &after } else { &before }, DATA + 8192 + at).unwrap();
            if !stale {
                file.write_all_at(&sha256(&before), SUMS + index as u64 * 32).unwrap();
            }
        }
        let json = json!({
            "keyslots": {"2": {"type": "reencrypt", "area": {
                "type": "checksum", "hash": "sha256", "offset": SUMS.to_string(), "size": "65536", "sector_size": 4096,
            }}},
            "segments": {
                "0": {"offset": DATA.to_string(), "size": "8192"},
                "1": {"offset": (DATA + 8192).to_string(), "size": (BLOCKS * 4096).to_string(), "sector_size": 512,
                      "flags": ["in-reencryption"]},
                "2": {"offset": DATA.to_string(), "flags": ["backup-final"]},
            },
        });
        let mut bytes = vec![0; 16 << 10];
        bytes[..8].copy_from_slice(b"LUKS\xba\xbe\0\x02");
        bytes[8..16].copy_from_slice(&(16_u64 << 10).to_be_bytes());
        bytes[72..78].copy_from_slice(b"sha256");
        let text = serde_json::to_vec(&json).unwrap();
        bytes[4096..][..text.len()].copy_from_slice(&text);
        let sum = sha256(&bytes);
        bytes[448..480].copy_from_slice(&sum);
        file.write_all_at(&bytes, 0).unwrap();
        let copies = Copies::read(&file).unwrap().unwrap();
        (file, copies, keys)
    }

    fn mended((file, copies, keys): &(File, Copies, [VolumeKey; 2])) -> Hotzone {
        mend(file, copies, [&keys[0], &keys[1]]).unwrap()
    }

    #[test]
    fn a_hotzone_is_proved_block_by_block() {
        for new in [0, 1, 40, BLOCKS] {
            assert_eq!(mended(&hotzone(new, false)), Hotzone::Sound, "{new}");
        }
        // The checksums never came: no block can have been written, so the right ones are made.
        let late = hotzone(0, true);
        assert_eq!(mended(&late), Hotzone::Mended);
        assert_eq!(mended(&late), Hotzone::Sound);
    }

    fn bytes(file: &File, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    #[test]
    fn a_torn_block_is_put_together_again() {
        // One of the blocks, or all of them, of which none is whole: that is not a hotzone without checksums.
        for torn in [40..41, 0..BLOCKS] {
            let (file, copies, keys) = hotzone(0, false);
            let [old, next] = [&keys[0], &keys[1]].map(|key| Xts::new(Key::of(key.expose()).unwrap(), 512, 0));
            let before = bytes(&file, DATA + 8192, BLOCKS * 4096);
            for index in torn {
                let at = index as u64 * 4096;
                let mut after = bytes(&file, DATA + 8192 + at, 4096);
                old.decrypt_in_place(8192 + at, &mut after);
                next.encrypt_in_place(8192 + at, &mut after);
                for sector in (0..8).filter(|sector| (index * 37 + 90) >> sector & 1 == 1) {
                    file.write_all_at(&after[sector * 512..][..512], DATA + 8192 + at + sector as u64 * 512).unwrap();
                }
            }
            let torn = (file, copies, keys);
            assert_eq!(mended(&torn), Hotzone::Sound);
            assert!(bytes(&torn.0, DATA + 8192, BLOCKS * 4096) == before, "as it was before");
        }
    }

    #[test]
    fn a_damaged_block_is_told_and_nothing_is_written() {
        let damaged = hotzone(40, false);
        damaged.0.write_all_at(&[0; 100], DATA + 8192 + 41 * 4096).unwrap();
        let before = bytes(&damaged.0, 0, 2 << 20);
        assert_eq!(mended(&damaged), Hotzone::Torn { blocks: 1 });
        assert!(bytes(&damaged.0, 0, 2 << 20) == before);
    }

    #[test]
    fn checksums_in_a_place_that_is_not_theirs_are_refused() {
        let (file, mut copies, keys) = hotzone(0, true);
        for (offset, size) in [("1048576", "65536"), ("0", "65536"), ("65536", "18446744073709551615"), ("65536", "64")]
        {
            copies.json["keyslots"]["2"]["area"]["offset"] = offset.into();
            copies.json["keyslots"]["2"]["area"]["size"] = size.into();
            assert!(mend(&file, &copies, [&keys[0], &keys[1]]).is_err(), "{offset} {size}");
        }
        // Nor is as much memory taken as a header says that a keyslot has.
        copies.json["segments"]["0"]["offset"] = (1_u64 << 42).to_string().into();
        for (bytes, is_right) in [(MOST_AREA_BYTES, true), (MOST_AREA_BYTES + 1, false), (1 << 40, false)] {
            let keyslot = json!({"area": {"offset": "65536", "size": bytes.to_string()}});
            assert_eq!(bounded(&copies, &keyslot).is_ok(), is_right, "{bytes}");
        }
    }
}
