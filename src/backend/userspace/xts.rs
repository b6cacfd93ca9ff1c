//! AES-XTS (IEEE 1619) over a volume's sectors, with the tweaks of dm-crypt's `aes-xts-plain64`.

use aes::{
    Aes128, Aes256,
    cipher::{BlockCipherDecrypt, BlockCipherEncrypt, BlockSizeUser, KeyInit, consts::U16},
};
use xts_mode::Xts128;

use crate::{
    key::{KeySize, VolumeKey},
    volume::SectorSize,
};

/// The unit of `plain64` tweaks, whatever the sector size (LUKS2 does not set dm-crypt's `iv_large_sectors`).
const TWEAK_UNIT_BYTES: u64 = 512;

/// A volume's cipher: the expanded key and the rule that numbers the sectors.
///
/// The expanded key is boxed, so that it stays in one place, and the `aes` crate wipes it on drop.
pub struct Xts {
    schedule: Box<Schedule>,
    sector_bytes: usize,
    iv_offset_sectors: u64,
}

#[allow(clippy::large_enum_variant)] // there is one per process, in a box
enum Schedule {
    Aes128(Xts128<Aes128>),
    Aes256(Xts128<Aes256>),
}

impl Xts {
    /// Expands the key; `iv_offset_sectors` is added to each tweak, in units of 512 bytes.
    pub fn new(key: &VolumeKey, sector_size: SectorSize, iv_offset_sectors: u64) -> Self {
        let sector_bytes = sector_size.bytes() as usize;
        Self { schedule: Box::new(Schedule::expand(key)), sector_bytes, iv_offset_sectors }
    }

    /// Encrypts whole sectors in place; the first one lies at `offset` bytes of the plaintext.
    pub fn encrypt(&self, offset: u64, sectors: &mut [u8]) {
        self.each_sector(offset, sectors, |sector, tweak| self.schedule.encrypt(sector, tweak));
    }

    /// Decrypts whole sectors in place; the first one lies at `offset` bytes of the plaintext.
    pub fn decrypt(&self, offset: u64, sectors: &mut [u8]) {
        self.each_sector(offset, sectors, |sector, tweak| self.schedule.decrypt(sector, tweak));
    }

    fn each_sector(&self, offset: u64, sectors: &mut [u8], apply: impl Fn(&mut [u8], [u8; 16])) {
        let whole_sectors =
            offset.is_multiple_of(self.sector_bytes as u64) && sectors.len().is_multiple_of(self.sector_bytes);
        assert!(whole_sectors, "the image hands over whole sectors");
        let step = self.sector_bytes as u64 / TWEAK_UNIT_BYTES;
        let mut number = (offset / TWEAK_UNIT_BYTES).wrapping_add(self.iv_offset_sectors);
        for sector in sectors.chunks_exact_mut(self.sector_bytes) {
            apply(sector, plain64(number));
            number = number.wrapping_add(step);
        }
    }
}

/// dm-crypt's `plain64`: 64 bits, little-endian, then zeroes; it wraps where the kernel's 64-bit sector number does.
fn plain64(number: u64) -> [u8; 16] {
    u128::from(number).to_le_bytes()
}

impl Schedule {
    fn expand(key: &VolumeKey) -> Self {
        match key.size() {
            KeySize::Bits256 => Self::Aes128(xts(key)),
            KeySize::Bits512 => Self::Aes256(xts(key)),
        }
    }

    fn encrypt(&self, sector: &mut [u8], tweak: [u8; 16]) {
        match self {
            Self::Aes128(xts) => xts.encrypt_sector(sector, tweak.into()),
            Self::Aes256(xts) => xts.encrypt_sector(sector, tweak.into()),
        }
    }

    fn decrypt(&self, sector: &mut [u8], tweak: [u8; 16]) {
        match self {
            Self::Aes128(xts) => xts.decrypt_sector(sector, tweak.into()),
            Self::Aes256(xts) => xts.decrypt_sector(sector, tweak.into()),
        }
    }
}

/// The first half of the key encrypts data, the second half tweaks (IEEE 1619 section 5.1).
fn xts<C>(key: &VolumeKey) -> Xts128<C>
where
    C: KeyInit + BlockSizeUser<BlockSize = U16> + BlockCipherEncrypt + BlockCipherDecrypt,
{
    let (data, tweak) = key.expose().split_at(key.size().bytes() / 2);
    let expand = |half| C::new_from_slice(half).expect("KeySize names the cipher whose keys are half as long");
    Xts128::new(expand(data), expand(tweak))
}

#[cfg(test)]
mod tests {
    use openssl::symm::Cipher;
    use proptest::prelude::*;

    use super::*;
    use crate::key::SecretBytes;

    fn unhex(hex: &str) -> Vec<u8> {
        (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn key(bytes: &[u8]) -> VolumeKey {
        VolumeKey::from_secret(SecretBytes::copy_of(bytes).unwrap()).unwrap()
    }

    fn counting() -> Vec<u8> {
        (0..512).map(|byte| byte as u8).collect()
    }

    /// IEEE 1619-2007 annex B, vectors 4 (AES-128, data unit 0) and 10 (AES-256, data unit 0xff).
    #[test]
    fn agrees_with_ieee_1619() {
        let vectors = [
            (
                "2718281828459045235360287471352631415926535897932384626433832795",
                0,
                "27a7479befa1d476489f308cd4cfa6e2a96e4bbe3208ff25287dd3819616e89cc78cf7f5e543445f8333d8fa7f560000\
                 05279fa5d8b5e4ad40e736ddb4d35412328063fd2aab53e5ea1e0a9f332500a5df9487d07a5c92cc512c8866c7e860ce\
                 93fdf166a24912b422976146ae20ce846bb7dc9ba94a767aaef20c0d61ad02655ea92dc4c4e41a8952c651d33174be51\
                 a10c421110e6d81588ede82103a252d8a750e8768defffed9122810aaeb99f9172af82b604dc4b8e51bcb08235a6f434\
                 1332e4ca60482a4ba1a03b3e65008fc5da76b70bf1690db4eae29c5f1badd03c5ccf2a55d705ddcd86d449511ceb7ec3\
                 0bf12b1fa35b913f9f747a8afd1b130e94bff94effd01a91735ca1726acd0b197c4e5b03393697e126826fb6bbde8ecc\
                 1e08298516e2c9ed03ff3c1b7860f6de76d4cecd94c8119855ef5297ca67e9f3e7ff72b1e99785ca0a7e7720c5b36dc6\
                 d72cac9574c8cbbc2f801e23e56fd344b07f22154beba0f08ce8891e643ed995c94d9a69c9f1b5f499027a78572aeebd\
                 74d20cc39881c213ee770b1010e4bea718846977ae119f7a023ab58cca0ad752afe656bb3c17256a9f6e9bf19fdd5a38\
                 fc82bbe872c5539edb609ef4f79c203ebb140f2e583cb2ad15b4aa5b655016a8449277dbd477ef2c8d6c017db738b18d\
                 eb4a427d1923ce3ff262735779a418f20a282df920147beabe421ee5319d0568",
            ),
            (
                "27182818284590452353602874713526624977572470936999595749669676273141592653589793238462643383279502884197169399375105820974944592",
                0xff,
                "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b5d31e276f8fe4a8d66b317f9ac683f44\
                 680a86ac35adfc3345befecb4bb188fd5776926c49a3095eb108fd1098baec70aaa66999a72a82f27d848b21d4a741b0\
                 c5cd4d5fff9dac89aeba122961d03a757123e9870f8acf1000020887891429ca2a3e7a7d7df7b10355165c8b9a6d0a7d\
                 e8b062c4500dc4cd120c0f7418dae3d0b5781c34803fa75421c790dfe1de1834f280d7667b327f6c8cd7557e12ac3a0f\
                 93ec05c52e0493ef31a12d3d9260f79a289d6a379bc70c50841473d1a8cc81ec583e9645e07b8d9670655ba5bbcfecc6\
                 dc3966380ad8fecb17b6ba02469a020a84e18e8f84252070c13e9f1f289be54fbc481457778f616015e1327a02b140f1\
                 505eb309326d68378f8374595c849d84f4c333ec4423885143cb47bd71c5edae9be69a2ffeceb1bec9de244fbe15992b\
                 11b77c040f12bd8f6a975a44a0f90c29a9abc3d4d893927284c58754cce294529f8614dcd2aba991925fedc4ae74ffac\
                 6e333b93eb4aff0479da9a410e4450e0dd7ae4c6e2910900575da401fc07059f645e8b7e9bfdef33943054ff84011493\
                 c27b3429eaedb4ed5376441a77ed43851ad77f16f541dfd269d50d6a5f14fb0aab1cbb4c1550be97f7ab4066193c4caa\
                 773dad38014bd2092fa755c824bb5e54c4f36ffda9fcea70b9c6e693e148c151",
            ),
        ];
        for (key_hex, data_unit, ciphertext) in vectors {
            let xts = Xts::new(&key(&unhex(key_hex)), SectorSize::B512, data_unit);
            let mut sector = counting();
            xts.encrypt(0, &mut sector);
            assert_eq!(hex(&sector), ciphertext);
            xts.decrypt(0, &mut sector);
            assert_eq!(sector, counting());
        }
    }

    /// NIST XTSVS, XTSGenAES128.rsp and XTSGenAES256.rsp, the first vectors: their tweaks are not sector numbers.
    #[test]
    fn agrees_with_nist_xtsvs() {
        let vectors = [
            (
                "a1b90cba3f06ac353b2c343876081762090923026e91771815f29dab01932f2f",
                "4faef7117cda59c66e4b92013e768ad5",
                "ebabce95b14d3c8d6fb350390790311c",
                "778ae8b43cb98d5a825081d5be471c63",
            ),
            (
                "1ea661c58d943a0e4801e42f4b0947149e7f9f8e3e68d0c7505210bd311a0e7cd6e13ffdf2418d8d1911c004cda58da3d619b7e2b9141e58318eea392cf41b08",
                "adf8d92627464ad2f0428e84a9f87564",
                "2eedea52cd8215e1acc647e810bbc3642e87287f8d2e57e36c0a24fbc12a202e",
                "cbaad0e2f6cea3f50b37f934d46a9b130b9d54f07e34f36af793e86f73c6d7db",
            ),
        ];
        for (key_hex, tweak, plaintext, ciphertext) in vectors {
            let schedule = Schedule::expand(&key(&unhex(key_hex)));
            let tweak: [u8; 16] = unhex(tweak).try_into().unwrap();
            let mut data = unhex(plaintext);
            schedule.encrypt(&mut data, tweak);
            assert_eq!(hex(&data), ciphertext);
            schedule.decrypt(&mut data, tweak);
            assert_eq!(hex(&data), plaintext);
        }
    }

    /// What dm-crypt wrote for a LUKS2 volume whose key is 64 times 'k' and whose plaintext is 0xab throughout. Byte 4096
    /// has tweak 8 for both sector sizes.
    #[test]
    fn agrees_with_dm_crypt() {
        for sector_size in [SectorSize::B512, SectorSize::B4096] {
            let mut data = [0xab; 8192];
            Xts::new(&key(&[b'k'; 64]), sector_size, 0).encrypt(0, &mut data);
            assert_eq!(hex(&data[..16]), "2c951acdebe3ebf1a3b177ba37d1856b");
            assert_eq!(hex(&data[4096..4112]), "a6fa1c50534656da11f055771afbd90d");
        }
    }

    /// The kernel's sector number has 64 bits; a carry into the tweak's upper half would be another cipher.
    #[test]
    fn tweaks_wrap_at_64_bits() {
        let key = key(&counting()[..64]);
        let (mut wrapped, mut zero) = ([7; 1024], [7; 512]);
        Xts::new(&key, SectorSize::B512, u64::MAX).encrypt(0, &mut wrapped);
        Xts::new(&key, SectorSize::B512, 0).encrypt(0, &mut zero);
        assert_eq!(wrapped[512..], zero);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn agrees_with_openssl(
            key_bytes in prop_oneof![prop::collection::vec(any::<u8>(), 32), prop::collection::vec(any::<u8>(), 64)],
            sector_bytes in prop::sample::select(vec![512_u32, 1024, 2048, 4096]),
            sectors in 1_usize..5,
            first_sector in 0_u64..1 << 40,
            iv_offset_sectors in any::<u64>(),
            seed in any::<u8>(),
        ) {
            // OpenSSL refuses equal halves.
            prop_assume!(key_bytes[..key_bytes.len() / 2] != key_bytes[key_bytes.len() / 2..]);
            let sector_size = SectorSize::from_bytes(sector_bytes).unwrap();
            let sector_bytes = sector_bytes as usize;
            let offset = first_sector * sector_bytes as u64;
            let plaintext: Vec<u8> =
                (0..sectors * sector_bytes).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed)).collect();

            let xts = Xts::new(&key(&key_bytes), sector_size, iv_offset_sectors);
            let mut data = plaintext.clone();
            xts.encrypt(offset, &mut data);

            let cipher = if key_bytes.len() == 32 { Cipher::aes_128_xts() } else { Cipher::aes_256_xts() };
            for (index, sector) in plaintext.chunks(sector_bytes).enumerate() {
                let number = ((offset + (index * sector_bytes) as u64) / 512).wrapping_add(iv_offset_sectors);
                let expected = openssl::symm::encrypt(cipher, &key_bytes, Some(&plain64(number)), sector).unwrap();
                prop_assert_eq!(&data[index * sector_bytes..][..sector_bytes], &expected[..]);
            }
            xts.decrypt(offset, &mut data);
            prop_assert_eq!(data, plaintext);
        }
    }
}
