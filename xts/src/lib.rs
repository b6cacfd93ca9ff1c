//! AES-XTS (IEEE 1619) over a volume's sectors, with the tweaks of dm-crypt's `aes-xts-plain64`.
//!
//! Several engines do the same: the reference (the `xts-mode` crate, a block at a time), one that hands whole batches to
//! the `aes` crate, and on x86-64 one per vector width. The fastest that this processor has is taken, once it has shown,
//! under the volume's own key, that it agrees with the reference.

mod batched;
pub mod reference;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86;

/// The unit of `plain64` tweaks, whatever the sector size (LUKS2 does not set dm-crypt's `iv_large_sectors`).
const TWEAK_UNIT_BYTES: u64 = 512;

/// A volume's key: one half encrypts data, the other tweaks (IEEE 1619 section 5.1).
#[derive(Clone, Copy)]
pub struct Key<'k> {
    data: &'k [u8],
    tweak: &'k [u8],
}

impl<'k> Key<'k> {
    /// The key of these bytes: 32 for AES-128, 64 for AES-256, no other count.
    pub fn of(bytes: &'k [u8]) -> Option<Self> {
        let (data, tweak) = bytes.split_at(bytes.len() / 2);
        matches!(bytes.len(), 32 | 64).then_some(Self { data, tweak })
    }

    fn is_of_aes_128(self) -> bool {
        self.data.len() == 16
    }
}

/// A volume's cipher: the expanded key and the rule that numbers the sectors.
pub struct Xts {
    engine: Box<dyn Engine>,
    sector_bytes: usize,
    iv_offset_sectors: u64,
}

/// What encrypts and decrypts runs of sectors. It holds the expanded key, in one place, and wipes it on drop.
pub trait Engine: Send + Sync {
    /// What it is called in logs and benchmarks.
    fn name(&self) -> &'static str;
    /// Encrypts or decrypts whole sectors, in place or out of `from`, which is as long as `to`.
    fn apply(&self, direction: Direction, from: Option<&[u8]>, to: &mut [u8], sectors: Sectors);
}

/// Which way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Plaintext to ciphertext.
    Encrypt,
    /// Ciphertext to plaintext.
    Decrypt,
}

/// How the sectors of one run are cut and numbered.
#[derive(Clone, Copy, Debug)]
pub struct Sectors {
    /// Size of each.
    pub bytes: usize,
    /// Number of the first, in units of 512 bytes.
    pub first: u64,
}

impl Sectors {
    /// The tweak of the sector of that index before its encryption: dm-crypt's `plain64`, 64 bits, little-endian, then
    /// zeroes; it wraps where the kernel's 64-bit sector number does.
    fn tweak(&self, index: usize) -> [u8; 16] {
        let step = self.bytes as u64 / TWEAK_UNIT_BYTES;
        u128::from(self.first.wrapping_add(step.wrapping_mul(index as u64))).to_le_bytes()
    }

    /// The same sectors without the first `count`.
    fn after(&self, count: usize) -> Self {
        let step = self.bytes as u64 / TWEAK_UNIT_BYTES;
        Self { first: self.first.wrapping_add(step.wrapping_mul(count as u64)), ..*self }
    }
}

impl Xts {
    /// Expands the key; `iv_offset_sectors` is added to each tweak, in units of 512 bytes.
    pub fn new(key: Key<'_>, sector_bytes: usize, iv_offset_sectors: u64) -> Self {
        Self::with_best_of(engines(key), key, sector_bytes, iv_offset_sectors)
    }

    /// Takes the first engine that agrees with the reference, or else the reference itself.
    fn with_best_of(engines: Vec<Box<dyn Engine>>, key: Key<'_>, sector_bytes: usize, iv_offset_sectors: u64) -> Self {
        let reference = reference::new(key);
        let agreed = engines.into_iter().find(|engine| {
            let agrees = agree(&**engine, &*reference, sector_bytes);
            if !agrees {
                tracing::warn!("the XTS engine '{}' computes wrongly on this machine: it is not used", engine.name());
            }
            agrees
        });
        let engine = agreed.unwrap_or(reference);
        tracing::debug!("XTS engine: {}", engine.name());
        Self { engine, sector_bytes, iv_offset_sectors }
    }

    /// The name of the engine that was chosen.
    pub fn engine_name(&self) -> &'static str {
        self.engine.name()
    }

    /// Encrypts whole sectors of `plaintext` into `ciphertext`, which is as long; the first one lies at `offset` bytes of
    /// the volume's plaintext.
    pub fn encrypt(&self, offset: u64, plaintext: &[u8], ciphertext: &mut [u8]) {
        self.apply(Direction::Encrypt, offset, Some(plaintext), ciphertext);
    }

    /// As [`Self::encrypt`], in place.
    pub fn encrypt_in_place(&self, offset: u64, sectors: &mut [u8]) {
        self.apply(Direction::Encrypt, offset, None, sectors);
    }

    /// Decrypts whole sectors in place; the first one lies at `offset` bytes of the plaintext.
    pub fn decrypt_in_place(&self, offset: u64, sectors: &mut [u8]) {
        self.apply(Direction::Decrypt, offset, None, sectors);
    }

    fn apply(&self, direction: Direction, offset: u64, from: Option<&[u8]>, to: &mut [u8]) {
        let whole_sectors =
            offset.is_multiple_of(self.sector_bytes as u64) && to.len().is_multiple_of(self.sector_bytes);
        assert!(whole_sectors, "the image hands over whole sectors");
        assert!(from.is_none_or(|from| from.len() == to.len()), "both are as long");
        let first = (offset / TWEAK_UNIT_BYTES).wrapping_add(self.iv_offset_sectors);
        self.engine.apply(direction, from, to, Sectors { bytes: self.sector_bytes, first });
    }
}

/// All engines that this processor has, but the reference; the fastest first.
pub fn engines(key: Key<'_>) -> Vec<Box<dyn Engine>> {
    #[cfg(target_arch = "x86_64")]
    let mut engines = x86::engines(key);
    #[cfg(not(target_arch = "x86_64"))]
    let mut engines = Vec::new();
    engines.push(batched::new(key));
    engines
}

/// Whether both compute the same, in both directions and both ways, over runs that fill no batch, one, and several.
fn agree(engine: &dyn Engine, reference: &dyn Engine, sector_bytes: usize) -> bool {
    [(1, 0), (2, 7), (3, u64::MAX - 3), (9, 1 << 33), (35, 8), (66, u64::from(u32::MAX) - 9)].iter().all(
        |(count, first)| {
            let sectors = Sectors { bytes: sector_bytes, first: *first };
            let plaintext: Vec<u8> = (0..count * sector_bytes).map(|at| (at * 31 + at / 251) as u8).collect();
            let mut expected = plaintext.clone();
            reference.apply(Direction::Encrypt, None, &mut expected, sectors);
            let (mut in_place, mut copied) = (plaintext.clone(), vec![0; plaintext.len()]);
            engine.apply(Direction::Encrypt, None, &mut in_place, sectors);
            engine.apply(Direction::Encrypt, Some(&plaintext), &mut copied, sectors);
            let encrypts = in_place == expected && copied == expected;
            engine.apply(Direction::Decrypt, None, &mut in_place, sectors);
            engine.apply(Direction::Decrypt, Some(&expected), &mut copied, sectors);
            encrypts && in_place == plaintext && copied == plaintext
        },
    )
}
