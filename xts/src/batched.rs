//! Batches for the `aes` crate, which finds out itself what the processor has; no `unsafe` of our own.
//!
//! The closures run inside the crate's functions that are compiled for AES-NI, VAES or ARMv8's AES instructions, and all
//! that is inlined into them, the tweaks' arithmetic as well, is compiled for those instruction sets.

use aes::{
    Aes128, Aes256, Block,
    cipher::{
        Array, BlockCipherDecBackend, BlockCipherDecClosure, BlockCipherDecrypt, BlockCipherEncBackend,
        BlockCipherEncClosure, BlockCipherEncrypt, BlockSizeUser, KeyInit, consts::U16,
    },
};

use super::{Direction, Engine, Key, Sectors};

/// How many sectors' tweaks are encrypted at once: the crate's largest batch.
const SECTORS: usize = 64;
/// What goes through tweak, cipher, tweak in one go: it stays in the first-level cache, and a multiple of every sector size.
const PASS_BYTES: usize = 4096;

struct Batched<C> {
    data: C,
    tweak: C,
}

/// Expands the key. It stays in its box, and the `aes` crate wipes it on drop.
pub fn new(key: Key<'_>) -> Box<dyn Engine> {
    if key.is_of_aes_128() { Box::new(expand::<Aes128>(key)) } else { Box::new(expand::<Aes256>(key)) }
}

fn expand<C: KeyInit>(key: Key<'_>) -> Batched<C> {
    let expand = |half| C::new_from_slice(half).expect("the caller names the cipher whose keys are half as long");
    Batched { data: expand(key.data), tweak: expand(key.tweak) }
}

impl<C> Engine for Batched<C>
where
    C: BlockSizeUser<BlockSize = U16> + BlockCipherEncrypt + BlockCipherDecrypt + Send + Sync,
{
    fn name(&self) -> &'static str {
        "batched"
    }

    fn apply(&self, direction: Direction, from: Option<&[u8]>, to: &mut [u8], sectors: Sectors) {
        let mut tweaks = [Block::default(); SECTORS];
        let batch_bytes = SECTORS * sectors.bytes;
        for (batch, to) in to.chunks_mut(batch_bytes).enumerate() {
            let from = from.map(|from| &from[batch * batch_bytes..][..to.len()]);
            let sectors = sectors.after(batch * SECTORS);
            let count = to.len() / sectors.bytes;
            for (index, tweak) in tweaks[..count].iter_mut().enumerate() {
                *tweak = sectors.tweak(index).into();
            }
            // A few are cheaper one by one; more are cheapest as one whole batch.
            let padded = if count > 4 { SECTORS } else { count };
            self.tweak.encrypt_blocks(&mut tweaks[..padded]);
            let run = Run { tweaks: &tweaks[..count], sector_bytes: sectors.bytes, from, to };
            match direction {
                Direction::Encrypt => self.data.encrypt_with_backend(Encrypt(run)),
                Direction::Decrypt => self.data.decrypt_with_backend(Decrypt(run)),
            }
        }
    }
}

struct Run<'a> {
    /// Each sector's, encrypted.
    tweaks: &'a [Block],
    sector_bytes: usize,
    from: Option<&'a [u8]>,
    to: &'a mut [u8],
}

struct Encrypt<'a>(Run<'a>);
struct Decrypt<'a>(Run<'a>);

impl BlockSizeUser for Encrypt<'_> {
    type BlockSize = U16;
}

impl BlockSizeUser for Decrypt<'_> {
    type BlockSize = U16;
}

/// Tweak, cipher, tweak over a run; the two directions differ in the backend's trait and methods only.
macro_rules! passes {
    ($run:expr, $backend:ident, $Backend:ident, $blocks:ident, $block:ident) => {{
        let Run { tweaks, sector_bytes, from, to } = $run;
        let sectors = PASS_BYTES / sector_bytes;
        let mut masks = [0; PASS_BYTES / 8];
        for (pass, to) in to.chunks_mut(PASS_BYTES).enumerate() {
            for (tweak, masks) in
                tweaks[pass * sectors..].iter().zip(masks[..to.len() / 8].chunks_exact_mut(sector_bytes / 8))
            {
                powers(u128::from_le_bytes(tweak.0), masks);
            }
            match from {
                Some(from) => xor_into(to, &from[pass * PASS_BYTES..], &masks),
                None => xor(to, &masks),
            }
            let (blocks, _) = Array::<u8, U16>::slice_as_chunks_mut(to);
            let (batches, rest) = Array::<Block, $Backend::ParBlocksSize>::slice_as_chunks_mut(blocks);
            for batch in batches {
                $backend.$blocks(batch.into());
            }
            for block in rest {
                $backend.$block(block.into());
            }
            xor(to, &masks);
        }
    }};
}

impl BlockCipherEncClosure for Encrypt<'_> {
    #[inline(always)]
    fn call<B: BlockCipherEncBackend<BlockSize = U16>>(self, backend: &B) {
        passes!(self.0, backend, B, encrypt_par_blocks, encrypt_block);
    }
}

impl BlockCipherDecClosure for Decrypt<'_> {
    #[inline(always)]
    fn call<B: BlockCipherDecBackend<BlockSize = U16>>(self, backend: &B) {
        passes!(self.0, backend, B, decrypt_par_blocks, decrypt_block);
    }
}

/// `tweak` times 1, x, x^2, ... in GF(2^128) (IEEE 1619 section 5.2), in words of 64 bits, low word first.
///
/// Eight at a time, low and high words apart, so that they are eight lanes of one vector.
#[inline(always)]
fn powers(tweak: u128, masks: &mut [u64]) {
    let (mut low, mut high) = ([0; 8], [0; 8]);
    let (first_low, first_high) = (tweak as u64, (tweak >> 64) as u64);
    for lane in 0..8 {
        low[lane] = (first_low << lane) ^ reduced((first_high >> 1) >> (63 - lane));
        high[lane] = (first_high << lane) | ((first_low >> 1) >> (63 - lane));
    }
    for eight in masks.as_chunks_mut::<16>().0 {
        for lane in 0..8 {
            eight[2 * lane] = low[lane];
            eight[2 * lane + 1] = high[lane];
        }
        for lane in 0..8 {
            let carry = high[lane] >> 56;
            high[lane] = (high[lane] << 8) | (low[lane] >> 56);
            low[lane] = (low[lane] << 8) ^ reduced(carry);
        }
    }
}

/// What is carried out at the top, times x^7 + x^2 + x + 1.
#[inline(always)]
fn reduced(carry: u64) -> u64 {
    carry ^ (carry << 1) ^ (carry << 2) ^ (carry << 7)
}

#[inline(always)]
fn xor(to: &mut [u8], masks: &[u64]) {
    for (to, masks) in to.as_chunks_mut::<64>().0.iter_mut().zip(masks.as_chunks::<8>().0) {
        for (to, mask) in to.as_chunks_mut::<8>().0.iter_mut().zip(masks) {
            *to = (u64::from_le_bytes(*to) ^ mask).to_le_bytes();
        }
    }
}

#[inline(always)]
fn xor_into(to: &mut [u8], from: &[u8], masks: &[u64]) {
    let (to, from) = (to.as_chunks_mut::<64>().0, from.as_chunks::<64>().0);
    for ((to, from), masks) in to.iter_mut().zip(from).zip(masks.as_chunks::<8>().0) {
        for ((to, from), mask) in to.as_chunks_mut::<8>().0.iter_mut().zip(from.as_chunks::<8>().0).zip(masks) {
            *to = (u64::from_le_bytes(*from) ^ mask).to_le_bytes();
        }
    }
}
