//! AES-XTS as dm-crypt's `aes-xts-plain64` does it (IEEE 1619; kernel: crypto/xts.c, drivers/md/dm-crypt.c).

use aes::{
    Aes128, Aes256,
    cipher::{Array, KeyInit},
};
use xts_mode::Xts128;

use crate::{
    key::{KeySize, VolumeKey},
    volume::SectorSize,
};

/// The cipher of one volume. Its key schedules are wiped on drop.
pub struct Xts {
    /// Boxed: a schedule that is moved leaves copies of itself behind.
    cipher: Box<Cipher>,
    sector_size: usize,
    iv_offset_sectors: u64,
}

enum Cipher {
    Aes128(Xts128<Aes128>),
    Aes256(Xts128<Aes256>),
}

impl Xts {
    /// A cipher with this key, for sectors of this size; `iv_offset_sectors` is added to the tweak.
    pub fn new(key: &VolumeKey, sector_size: SectorSize, iv_offset_sectors: u64) -> Self {
        let (data, tweak) = key.expose().split_at(key.size().bytes() / 2);
        let cipher = Box::new(match key.size() {
            KeySize::Bits256 => Cipher::Aes128(Xts128::new(half(data), half(tweak))),
            KeySize::Bits512 => Cipher::Aes256(Xts128::new(half(data), half(tweak))),
        });
        Self { cipher, sector_size: sector_size.bytes() as usize, iv_offset_sectors }
    }

    /// Encrypts whole sectors in place; `at` is where they begin in the plaintext, in bytes.
    pub fn encrypt(&self, sectors: &mut [u8], at: u64) {
        for (sector, tweak) in self.sectors(sectors, at) {
            match &*self.cipher {
                Cipher::Aes128(xts) => xts.encrypt_sector(sector, tweak),
                Cipher::Aes256(xts) => xts.encrypt_sector(sector, tweak),
            }
        }
    }

    /// Decrypts whole sectors in place; `at` is where they begin in the plaintext, in bytes.
    pub fn decrypt(&self, sectors: &mut [u8], at: u64) {
        for (sector, tweak) in self.sectors(sectors, at) {
            match &*self.cipher {
                Cipher::Aes128(xts) => xts.decrypt_sector(sector, tweak),
                Cipher::Aes256(xts) => xts.decrypt_sector(sector, tweak),
            }
        }
    }

    /// Each sector with its tweak: plain64, the little-endian number of the sector in units of 512 bytes, whatever the
    /// sector size. LUKS2 does not set dm-crypt's `iv_large_sectors`.
    fn sectors<'a>(
        &self,
        bytes: &'a mut [u8],
        at: u64,
    ) -> impl Iterator<Item = (&'a mut [u8], Array<u8, aes::cipher::consts::U16>)> + use<'a> {
        debug_assert!(bytes.len().is_multiple_of(self.sector_size) && at.is_multiple_of(self.sector_size as u64));
        let first = (at / 512).wrapping_add(self.iv_offset_sectors);
        let step = self.sector_size as u64 / 512;
        bytes.chunks_exact_mut(self.sector_size).zip(0..).map(move |(sector, number): (_, u64)| {
            let iv = first.wrapping_add(number * step);
            (sector, Array(u128::from(iv).to_le_bytes()))
        })
    }
}

fn half<C: KeyInit>(key: &[u8]) -> C {
    C::new_from_slice(key).expect("KeySize is two AES keys")
}

#[cfg(test)]
mod tests {
    use openssl::symm;
    use proptest::prelude::*;

    use super::*;
    use crate::key::SecretBytes;

    fn key(bytes: &[u8]) -> VolumeKey {
        VolumeKey::from_secret(SecretBytes::copy_of(bytes).unwrap()).unwrap()
    }

    fn hex(text: &str) -> Vec<u8> {
        let digits: String = text.split_whitespace().collect();
        (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect()
    }

    /// IEEE 1619-2007 annex B, vector 4: XTS-AES-128, data unit 0 of 512 bytes, plaintext 00..ff twice.
    #[test]
    fn ieee_1619_vector_4() {
        let xts = Xts::new(
            &key(&hex("27182818284590452353602874713526 31415926535897932384626433832795")),
            SectorSize::B512,
            0,
        );
        let plaintext: Vec<u8> = (0..=255).chain(0..=255).collect();
        let mut sector = plaintext.clone();
        xts.encrypt(&mut sector, 0);
        assert_eq!(sector[..32], hex("27a7479befa1d476489f308cd4cfa6e2 a96e4bbe3208ff25287dd3819616e89c"));
        xts.decrypt(&mut sector, 0);
        assert_eq!(sector, plaintext);
    }

    /// IEEE 1619-2007 annex B, vector 10: XTS-AES-256, data unit 0xff of 512 bytes.
    #[test]
    fn ieee_1619_vector_10() {
        let xts = Xts::new(
            &key(&hex("2718281828459045235360287471352662497757247093699959574966967627 \
                 3141592653589793238462643383279502884197169399375105820974944592")),
            SectorSize::B512,
            0xff,
        );
        let mut sector: Vec<u8> = (0..=255).chain(0..=255).collect();
        xts.encrypt(&mut sector, 0);
        assert_eq!(sector[..32], hex("1c3b3a102f770386e4836c99e370cf9b ea00803f5e482357a4ae12d414a3e63b"));
    }

    /// Seen on real dm-crypt (LUKS2, Linux 6.1) with sectors of 512 and of 4096 bytes: both number the IV in 512 bytes.
    #[test]
    fn the_tweak_counts_512_bytes_as_dm_crypt_does() {
        for size in [SectorSize::B512, SectorSize::B4096] {
            let xts = Xts::new(&key(&[b'k'; 64]), size, 0);
            let mut data = vec![0xab; 8192];
            xts.encrypt(&mut data, 0);
            assert_eq!(data[..16], hex("2c951acdebe3ebf1a3b177ba37d1856b"), "{size}");
            assert_eq!(data[4096..][..16], hex("a6fa1c50534656da11f055771afbd90d"), "{size}");
        }
    }

    proptest! {
        #[test]
        fn agrees_with_libcrypto(
            bytes in proptest::collection::vec(any::<u8>(), 64),
            large in any::<bool>(),
            size in prop::sample::select(vec![512_u32, 1024, 2048, 4096]),
            number in 0..1_u64 << 40,
            iv_offset_sectors in any::<u64>(),
            fill in any::<u8>(),
        ) {
            let (key_bytes, cipher) = match large {
                true => (&bytes[..], symm::Cipher::aes_256_xts()),
                false => (&bytes[..32], symm::Cipher::aes_128_xts()),
            };
            let sector_size = SectorSize::from_bytes(size).unwrap();
            let xts = Xts::new(&key(key_bytes), sector_size, iv_offset_sectors);
            let at = number * u64::from(size);
            let plaintext = vec![fill; 2 * size as usize];
            let mut data = plaintext.clone();
            xts.encrypt(&mut data, at);
            for (sector, encrypted) in data.chunks(size as usize).enumerate() {
                let iv = (at / 512 + sector as u64 * u64::from(size / 512)).wrapping_add(iv_offset_sectors);
                let tweak = u128::from(iv).to_le_bytes();
                let expected = symm::encrypt(cipher, key_bytes, Some(&tweak), &plaintext[..size as usize]).unwrap();
                prop_assert_eq!(encrypted, &expected[..]);
            }
            xts.decrypt(&mut data, at);
            prop_assert_eq!(data, plaintext);
        }
    }
}
