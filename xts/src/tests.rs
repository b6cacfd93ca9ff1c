//! Vectors of the standards for every engine, and every engine against the reference and OpenSSL.

use aes::{Aes128, Aes256};
use openssl::symm::Cipher;
use proptest::prelude::*;

use super::*;

fn unhex(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn key(bytes: &[u8]) -> Key<'_> {
    Key::of(bytes).unwrap()
}

/// Every engine of this machine.
fn all(key: Key<'_>) -> Vec<Box<dyn Engine>> {
    engines(key).into_iter().chain([reference::new(key)]).collect()
}

fn with(engine: Box<dyn Engine>, sector_bytes: usize, iv_offset_sectors: u64) -> Xts {
    Xts { engine, sector_bytes, iv_offset_sectors }
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
        for engine in all(key(&unhex(key_hex))) {
            let xts = with(engine, 512, data_unit);
            let mut sector = counting();
            xts.encrypt_in_place(0, &mut sector);
            assert_eq!(hex(&sector), ciphertext, "{}", xts.engine_name());
            xts.decrypt_in_place(0, &mut sector);
            assert_eq!(sector, counting(), "{}", xts.engine_name());
        }
    }
}

/// NIST XTSVS, XTSGenAES128.rsp and XTSGenAES256.rsp, the first vectors: their tweaks are not sector numbers and their data
/// are shorter than a sector, so that they are for the reference only, with which the others are compared.
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
        let key_bytes = unhex(key_hex);
        let key = key(&key_bytes);
        let tweak: [u8; 16] = unhex(tweak).try_into().unwrap();
        let mut data = unhex(plaintext);
        if key.is_of_aes_128() {
            reference::expand::<Aes128>(key).0.encrypt_sector(&mut data, tweak.into());
        } else {
            reference::expand::<Aes256>(key).0.encrypt_sector(&mut data, tweak.into());
        }
        assert_eq!(hex(&data), ciphertext);
    }
}

/// What dm-crypt wrote for a LUKS2 volume whose key is 64 times 'k' and whose plaintext is 0xab throughout. Byte 4096
/// has tweak 8 for both sector sizes.
#[test]
fn agrees_with_dm_crypt() {
    for sector_bytes in [512, 4096] {
        for engine in all(key(&[b'k'; 64])) {
            let mut data = [0xab; 8192];
            with(engine, sector_bytes, 0).encrypt_in_place(0, &mut data);
            assert_eq!(hex(&data[..16]), "2c951acdebe3ebf1a3b177ba37d1856b");
            assert_eq!(hex(&data[4096..4112]), "a6fa1c50534656da11f055771afbd90d");
        }
    }
}

/// The kernel's sector number has 64 bits; a carry into the tweak's upper half would be another cipher.
#[test]
fn tweaks_wrap_at_64_bits() {
    let bytes = counting();
    let key = key(&bytes[..64]);
    for (engine, same) in all(key).into_iter().zip(all(key)) {
        let (mut wrapped, mut zero) = ([7; 1024], [7; 512]);
        with(engine, 512, u64::MAX).encrypt_in_place(0, &mut wrapped);
        with(same, 512, 0).encrypt_in_place(0, &mut zero);
        assert_eq!(wrapped[512..], zero);
    }
}

/// On the machines that this is for. Elsewhere the tests below compare less, and should not pass unnoticed.
#[test]
#[cfg(target_arch = "x86_64")]
fn this_machine_has_more_than_one_engine() {
    let names: Vec<_> = engines(key(&counting()[..64])).iter().map(|engine| engine.name()).collect();
    assert!(names.ends_with(&["AES-NI", "batched"]), "{names:?}");
}

/// An engine that errs in one bit of one sector.
struct Wrong(Box<dyn Engine>, usize);

impl Engine for Wrong {
    fn name(&self) -> &'static str {
        "wrong"
    }

    fn apply(&self, direction: Direction, from: Option<&[u8]>, to: &mut [u8], sectors: Sectors) {
        self.0.apply(direction, from, to, sectors);
        if let Some(byte) = to.get_mut(self.1) {
            *byte ^= 0x10;
        }
    }
}

#[test]
fn an_engine_that_computes_wrongly_is_not_used() {
    let bytes = counting();
    let key = key(&bytes[..64]);
    for at in [0, 511, 65 * 512 + 17] {
        let wrong = || -> Box<dyn Engine> { Box::new(Wrong(batched::new(key), at)) };
        let next = Xts::with_best_of(vec![wrong(), batched::new(key)], key, 512, 0);
        assert_eq!(next.engine_name(), "batched");
        let none_left = Xts::with_best_of(vec![wrong()], key, 512, 0);
        assert_eq!(none_left.engine_name(), "xts-mode");
    }
    let first = engines(key).remove(0);
    assert_eq!(Xts::new(key, 4096, 0).engine_name(), first.name(), "the fastest is right, and is used");
}

fn keys() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![prop::collection::vec(any::<u8>(), 32), prop::collection::vec(any::<u8>(), 64)]
}

fn data(length: usize, seed: u64) -> Vec<u8> {
    (0..length as u64).map(|at| ((at ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever the key, the size of run and sector, the first number, the place in memory, and the way of calling.
    #[test]
    fn all_engines_agree(
        key_bytes in keys(),
        sector_bytes in prop::sample::select(vec![512_usize, 1024, 2048, 4096]),
        count in 1_usize..140,
        first in prop_oneof![any::<u64>(), (u64::MAX - 1000)..],
        from_at in 0_usize..65,
        to_at in 0_usize..65,
        seed in any::<u64>(),
    ) {
        let key = key(&key_bytes);
        let (sectors, length) = (Sectors { bytes: sector_bytes, first }, count * sector_bytes);
        let plaintext = data(from_at + length, seed);
        let mut expected = plaintext[from_at..].to_vec();
        reference::new(key).apply(Direction::Encrypt, None, &mut expected, sectors);
        for engine in engines(key) {
            // What lies before and behind must stay.
            let mut buffer = vec![0xee; to_at + length + 64];
            engine.apply(Direction::Encrypt, Some(&plaintext[from_at..]), &mut buffer[to_at..to_at + length], sectors);
            prop_assert!(buffer[to_at..to_at + length] == expected, "{} encrypts", engine.name());
            engine.apply(Direction::Decrypt, None, &mut buffer[to_at..to_at + length], sectors);
            prop_assert!(buffer[to_at..to_at + length] == plaintext[from_at..], "{} decrypts", engine.name());
            engine.apply(Direction::Encrypt, None, &mut buffer[to_at..to_at + length], sectors);
            prop_assert!(buffer[to_at..to_at + length] == expected, "{} encrypts in place", engine.name());
            let mut out = vec![0; length];
            engine.apply(Direction::Decrypt, Some(&buffer[to_at..to_at + length]), &mut out, sectors);
            prop_assert!(out == plaintext[from_at..], "{} decrypts out of place", engine.name());
            prop_assert!(buffer[..to_at].iter().chain(&buffer[to_at + length..]).all(|byte| *byte == 0xee));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn agrees_with_openssl(
        key_bytes in keys(),
        sector_bytes in prop::sample::select(vec![512_usize, 1024, 2048, 4096]),
        sectors in 1_usize..5,
        first_sector in 0_u64..1 << 40,
        iv_offset_sectors in any::<u64>(),
        seed in any::<u64>(),
    ) {
        // OpenSSL refuses equal halves.
        prop_assume!(key_bytes[..key_bytes.len() / 2] != key_bytes[key_bytes.len() / 2..]);
        let offset = first_sector * sector_bytes as u64;
        let plaintext = data(sectors * sector_bytes, seed);

        let xts = Xts::new(key(&key_bytes), sector_bytes, iv_offset_sectors);
        let mut data = vec![0; plaintext.len()];
        xts.encrypt(offset, &plaintext, &mut data);

        let cipher = if key_bytes.len() == 32 { Cipher::aes_128_xts() } else { Cipher::aes_256_xts() };
        for (index, sector) in plaintext.chunks(sector_bytes).enumerate() {
            let number = ((offset + (index * sector_bytes) as u64) / 512).wrapping_add(iv_offset_sectors);
            let expected = openssl::symm::encrypt(cipher, &key_bytes, Some(&u128::from(number).to_le_bytes()), sector).unwrap();
            prop_assert_eq!(&data[index * sector_bytes..][..sector_bytes], &expected[..]);
        }
        xts.decrypt_in_place(offset, &mut data);
        prop_assert_eq!(data, plaintext);
    }
}
