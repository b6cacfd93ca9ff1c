//! The cipher of a volume's data; two while its key is being rotated, of which each has its part.

use cryptattach_xts::{Key, Xts};

use crate::{base::key::VolumeKey, volumes::header::Geometry};

/// What encrypts each byte of a volume.
pub struct Ciphers {
    first: Xts,
    /// From there on, in bytes of the plaintext.
    rest: Option<(u64, Xts)>,
}

impl Ciphers {
    /// One for all data.
    pub fn one(geometry: &Geometry, key: &VolumeKey) -> Self {
        Self { first: xts(geometry, key), rest: None }
    }

    /// With another one from a sector on. The tweak counts from the beginning of the data for both, as the segments of a
    /// header say it (`iv_tweak`).
    pub fn with_rest(self, geometry: &Geometry, from: u64, key: &VolumeKey) -> Self {
        assert!(from.is_multiple_of(geometry.sector_size.bytes().into()), "a sector has one key");
        Self { rest: Some((from, xts(geometry, key))), ..self }
    }

    /// Which implementation of AES it is, in words.
    pub fn engine_name(&self) -> &'static str {
        self.first.engine_name()
    }

    /// As [`Xts::encrypt`].
    pub fn encrypt(&self, offset: u64, plaintext: &[u8], ciphertext: &mut [u8]) {
        let (one, middle) = self.part(offset, plaintext.len());
        let (mine, others) = ciphertext.split_at_mut(middle);
        one.encrypt(offset, &plaintext[..middle], mine);
        if !others.is_empty() {
            self.encrypt(offset + middle as u64, &plaintext[middle..], others);
        }
    }

    /// As [`Xts::decrypt_in_place`].
    pub fn decrypt_in_place(&self, offset: u64, sectors: &mut [u8]) {
        let (one, middle) = self.part(offset, sectors.len());
        let (mine, others) = sectors.split_at_mut(middle);
        one.decrypt_in_place(offset, mine);
        if !others.is_empty() {
            self.decrypt_in_place(offset + middle as u64, others);
        }
    }

    /// The cipher at an offset, and how many of so many bytes it has there.
    fn part(&self, offset: u64, length: usize) -> (&Xts, usize) {
        match &self.rest {
            None => (&self.first, length),
            Some((from, rest)) if offset >= *from => (rest, length),
            Some((from, _)) => (&self.first, usize::try_from(from - offset).map_or(length, |bytes| bytes.min(length))),
        }
    }
}

fn xts(geometry: &Geometry, key: &VolumeKey) -> Xts {
    let key = Key::of(key.expose()).expect("a volume key has the size of an XTS key");
    Xts::new(key, geometry.sector_size.bytes() as usize, geometry.iv_offset_sectors)
}
