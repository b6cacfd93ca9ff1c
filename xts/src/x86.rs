//! AES-XTS in x86-64's vector instructions: AES-NI with AVX's encoding (one block per register), VAES with 256 bits (two) and 512 bits (four).
//!
//! One kernel, written once as a macro, over the three widths: eight registers are in flight, which hides the latency of
//! the AES instructions, and the tweaks of the next eight are computed beside them.
#![allow(unsafe_code)] // calls of functions for detected instruction sets, and unaligned loads and stores

use std::arch::x86_64::*;

use zeroize::Zeroize;

use super::{Direction, Engine, Key, Sectors};

/// How many registers are in flight.
const REGISTERS: usize = 8;
/// Room for the 15 round keys of AES-256; AES-128 has 11.
type RoundKeys = [[u8; 16]; 15];

/// The expanded key; wiped on drop.
struct Schedule {
    rounds: usize,
    encrypt: RoundKeys,
    decrypt: RoundKeys,
    tweak: RoundKeys,
}

/// The engines that this processor has, the fastest first.
pub fn engines(key: Key<'_>) -> Vec<Box<dyn Engine>> {
    let mut engines: Vec<Box<dyn Engine>> = Vec::new();
    let basics = is_x86_feature_detected!("aes") && is_x86_feature_detected!("pclmulqdq");
    if !(basics && is_x86_feature_detected!("avx")) {
        return engines;
    }
    let vaes = is_x86_feature_detected!("vaes") && is_x86_feature_detected!("vpclmulqdq");
    if vaes && is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
        engines.push(Box::new(Vaes512(Schedule::boxed(key))));
    }
    if vaes && is_x86_feature_detected!("avx2") {
        engines.push(Box::new(Vaes256(Schedule::boxed(key))));
    }
    engines.push(Box::new(AesNi(Schedule::boxed(key))));
    engines
}

impl Drop for Schedule {
    fn drop(&mut self) {
        [&mut self.encrypt, &mut self.decrypt, &mut self.tweak].into_iter().for_each(Zeroize::zeroize);
    }
}

impl Schedule {
    /// To be called where AES-NI has been detected.
    fn boxed(key: Key<'_>) -> Box<Self> {
        let rounds = if key.is_of_aes_128() { 10 } else { 14 };
        let zero = [[0; 16]; 15];
        let mut schedule = Box::new(Self { rounds, encrypt: zero, decrypt: zero, tweak: zero });
        // SAFETY: the only caller has detected AES-NI; SSE2 is part of x86-64.
        unsafe {
            expand(key.data, &mut schedule.encrypt, rounds);
            expand(key.tweak, &mut schedule.tweak, rounds);
            let Self { encrypt, decrypt, .. } = &mut *schedule;
            invert(encrypt, decrypt, rounds);
        }
        schedule
    }
}

/// FIPS 197 section 5.2, for 128 and 256 bits. Each new round key is a running XOR over the words of the one a key's
/// length before, and a word that depends on the last one.
#[target_feature(enable = "aes")]
fn expand(key: &[u8], round_keys: &mut RoundKeys, rounds: usize) {
    let words = key.len() / 16;
    for (round_key, half) in round_keys.iter_mut().zip(key.as_chunks::<16>().0) {
        *round_key = *half;
    }
    let mut constant = 1;
    for round in words..=rounds {
        let (before, last) = (load128(&round_keys[round - words]), load128(&round_keys[round - 1]));
        let substituted = _mm_aeskeygenassist_si128::<0>(last);
        let word = if words == 2 && round % 2 == 1 {
            // AES-256 substitutes the word in the middle of a key's length without rotating it.
            _mm_shuffle_epi32::<0b10_10_10_10>(substituted)
        } else {
            let rotated = _mm_shuffle_epi32::<0b11_11_11_11>(substituted);
            let word = _mm_xor_si128(rotated, _mm_set1_epi32(constant));
            constant = (constant << 1) ^ (if constant & 0x80 == 0 { 0 } else { 0x11b });
            word
        };
        let mut running = _mm_xor_si128(before, _mm_slli_si128::<4>(before));
        running = _mm_xor_si128(running, _mm_slli_si128::<8>(running));
        store128(&mut round_keys[round], _mm_xor_si128(running, word));
    }
}

/// The round keys of the equivalent inverse cipher (FIPS 197 section 5.3.5).
#[target_feature(enable = "aes")]
fn invert(encrypt: &RoundKeys, decrypt: &mut RoundKeys, rounds: usize) {
    decrypt[0] = encrypt[rounds];
    for round in 1..rounds {
        store128(&mut decrypt[round], _mm_aesimc_si128(load128(&encrypt[rounds - round])));
    }
    decrypt[rounds] = encrypt[0];
}

#[inline]
fn load128(bytes: &[u8; 16]) -> __m128i {
    // SAFETY: 16 bytes are there to be read, and the instruction asks for no alignment.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[inline]
fn store128(bytes: &mut [u8; 16], value: __m128i) {
    // SAFETY: 16 bytes are there to be written, and the instruction asks for no alignment.
    unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), value) }
}

/// An engine of one width.
macro_rules! engine {
    (
        $(#[$doc:meta])*
        $Engine:ident, $kernel:ident, $name:literal, features: $features:literal, register: $Register:ident, blocks: $BLOCKS:literal,
        load: $load:ident, store: $store:ident, broadcast: $broadcast:expr, xor: $xor:ident,
        encrypt: $encrypt:ident, encrypt_last: $encrypt_last:ident, decrypt: $decrypt:ident, decrypt_last: $decrypt_last:ident,
        shift_bytes_left: $bytes_left:ident, shift_bytes_right: $bytes_right:ident, multiply: $multiply:ident,
        set64: $set64:ident, shifts: $shifts:expr $(,)?
    ) => {
        $(#[$doc])*
        struct $Engine(Box<Schedule>);

        impl Engine for $Engine {
            fn name(&self) -> &'static str {
                $name
            }

            fn apply(&self, direction: Direction, from: Option<&[u8]>, to: &mut [u8], sectors: Sectors) {
                let keys = &self.0;
                // SAFETY: an engine is made only where all these instruction sets have been detected.
                unsafe {
                    match direction {
                        Direction::Encrypt => $kernel::run::<false>(keys, from, to, sectors),
                        Direction::Decrypt => $kernel::run::<true>(keys, from, to, sectors),
                    }
                }
            }
        }

        mod $kernel {
            use super::*;

            const BLOCKS: usize = $BLOCKS;
            const REGISTER_BYTES: usize = 16 * BLOCKS;
            const GROUP_BYTES: usize = REGISTERS * REGISTER_BYTES;
            /// Registers that hold eight consecutive powers; the next eight are these times x^8.
            const STRIDE: usize = 8 / BLOCKS;
            /// Sectors whose tweaks are encrypted at once.
            const BATCH: usize = REGISTERS * BLOCKS;

            #[target_feature(enable = $features)]
            pub(super) fn run<const DECRYPT: bool>(
                keys: &Schedule,
                from: Option<&[u8]>,
                to: &mut [u8],
                sectors: Sectors,
            ) {
                let (data_keys, tweak_keys) =
                    (broadcast(if DECRYPT { &keys.decrypt } else { &keys.encrypt }), broadcast(&keys.tweak));
                // As many as there are, and not known to the compiler: it would unroll the rounds, and take the registers
                // through them one after the other, not side by side.
                let (data_keys, tweak_keys) = (&data_keys[..=keys.rounds], &tweak_keys[..=keys.rounds]);
                let mut tweaks = [[0; 16]; BATCH];
                let batch_bytes = BATCH * sectors.bytes;
                for (batch, to) in to.chunks_mut(batch_bytes).enumerate() {
                    let sectors = sectors.after(batch * BATCH);
                    let count = to.len() / sectors.bytes;
                    for (index, tweak) in tweaks[..count].iter_mut().enumerate() {
                        *tweak = sectors.tweak(index);
                    }
                    let (registers, _) = tweaks.as_flattened_mut().as_chunks_mut::<REGISTER_BYTES>();
                    if count <= BLOCKS {
                        encrypt_tweaks::<1>((&mut registers[..1]).try_into().expect("one"), tweak_keys);
                    } else {
                        encrypt_tweaks::<REGISTERS>(registers.try_into().expect("all"), tweak_keys);
                    }
                    for (index, to) in to.chunks_exact_mut(sectors.bytes).enumerate() {
                        // Not by `Option::map`, into which no code for other instruction sets is inlined.
                        let from = match from {
                            Some(from) => Some(from[batch * batch_bytes + index * sectors.bytes..][..sectors.bytes].as_chunks().0),
                            None => None,
                        };
                        sector::<DECRYPT>(data_keys, &tweaks[index], from, to.as_chunks_mut().0);
                    }
                }
            }

            #[inline]
            #[target_feature(enable = $features)]
            fn encrypt_tweaks<const N: usize>(
                tweaks: &mut [[u8; REGISTER_BYTES]; N],
                keys: &[$Register],
            ) {
                let [first, middle @ .., last] = keys else { return };
                let mut state: [_; N] = std::array::from_fn(|at| $xor(load(&tweaks[at]), *first));
                for key in middle {
                    for state in &mut state {
                        *state = $encrypt(*state, *key);
                    }
                }
                for (tweak, state) in tweaks.iter_mut().zip(state) {
                    store(tweak, $encrypt_last(state, *last));
                }
            }

            #[inline]
            #[target_feature(enable = $features)]
            fn sector<const DECRYPT: bool>(
                keys: &[$Register],
                tweak: &[u8; 16],
                from: Option<&[[u8; GROUP_BYTES]]>,
                to: &mut [[u8; GROUP_BYTES]],
            ) {
                let [whitening, rounds @ .., last] = keys else { return };
                let first = $broadcast(load128(tweak));
                let mut next: [_; STRIDE] = std::array::from_fn(|at| first_powers(first, (at * BLOCKS) as i64));
                for (index, to) in to.iter_mut().enumerate() {
                    let mut masks = [next[0]; REGISTERS];
                    for at in 0..REGISTERS {
                        masks[at] = if at < STRIDE { next[at] } else { times_x8(masks[at - STRIDE]) };
                    }
                    next = std::array::from_fn(|at| times_x8(masks[REGISTERS - STRIDE + at]));

                    let source = match from {
                        Some(from) => &from[index],
                        None => &*to,
                    };
                    let source = source.as_chunks::<REGISTER_BYTES>().0;
                    let mut state: [_; REGISTERS] =
                        std::array::from_fn(|at| $xor($xor(load(&source[at]), masks[at]), *whitening));
                    for key in rounds {
                        for state in &mut state {
                            *state = if DECRYPT { $decrypt(*state, *key) } else { $encrypt(*state, *key) };
                        }
                    }
                    let to = to.as_chunks_mut::<REGISTER_BYTES>().0;
                    for at in 0..REGISTERS {
                        let done = if DECRYPT { $decrypt_last(state[at], *last) } else { $encrypt_last(state[at], *last) };
                        store(&mut to[at], $xor(done, masks[at]));
                    }
                }
            }

            #[inline]
            #[target_feature(enable = $features)]
            fn broadcast(keys: &RoundKeys) -> [$Register; 15] {
                std::array::from_fn(|round| $broadcast(load128(&keys[round])))
            }

            /// x^7 + x^2 + x + 1, in all halves.
            #[inline]
            #[target_feature(enable = $features)]
            fn polynomial() -> $Register {
                $set64(0x87)
            }

            /// The tweak, the same in all blocks, times x to the power of `exponent`, `exponent` + 1, ...; below 8.
            #[inline]
            #[target_feature(enable = $features)]
            fn first_powers(tweak: $Register, exponent: i64) -> $Register {
                // Both halves of 64 bits are shifted; what falls out of the lower goes to the upper, what falls out of the
                // upper is reduced into the lower.
                let (shifted, carries) = $shifts(tweak, exponent);
                $xor($xor(shifted, $bytes_left::<8>(carries)), $multiply::<0x01>(carries, polynomial()))
            }

            #[inline]
            #[target_feature(enable = $features)]
            fn times_x8(tweak: $Register) -> $Register {
                $xor($bytes_left::<1>(tweak), $multiply::<0x00>($bytes_right::<15>(tweak), polynomial()))
            }

            #[inline]
            #[target_feature(enable = $features)]
            fn load(bytes: &[u8; REGISTER_BYTES]) -> $Register {
                // SAFETY: a register's bytes are there to be read, and the instruction asks for no alignment.
                unsafe { $load(bytes.as_ptr().cast()) }
            }

            #[inline]
            #[target_feature(enable = $features)]
            fn store(bytes: &mut [u8; REGISTER_BYTES], value: $Register) {
                // SAFETY: a register's bytes are there to be written, and the instruction asks for no alignment.
                unsafe { $store(bytes.as_mut_ptr().cast(), value) }
            }
        }
    };
}

engine! {
    /// Four blocks per register.
    Vaes512, vaes512, "VAES-512", features: "avx512f,avx512bw,vaes,vpclmulqdq,aes", register: __m512i, blocks: 4,
    load: _mm512_loadu_si512, store: _mm512_storeu_si512, broadcast: _mm512_broadcast_i32x4, xor: _mm512_xor_si512,
    encrypt: _mm512_aesenc_epi128, encrypt_last: _mm512_aesenclast_epi128,
    decrypt: _mm512_aesdec_epi128, decrypt_last: _mm512_aesdeclast_epi128,
    shift_bytes_left: _mm512_bslli_epi128, shift_bytes_right: _mm512_bsrli_epi128, multiply: _mm512_clmulepi64_epi128,
    set64: _mm512_set1_epi64,
    shifts: |tweak, exponent| {
        let left = _mm512_add_epi64(_mm512_set1_epi64(exponent), _mm512_set_epi64(3, 3, 2, 2, 1, 1, 0, 0));
        let right = _mm512_sub_epi64(_mm512_set1_epi64(64), left);
        (_mm512_sllv_epi64(tweak, left), _mm512_srlv_epi64(tweak, right))
    },
}

engine! {
    /// Two blocks per register.
    Vaes256, vaes256, "VAES-256", features: "avx2,vaes,vpclmulqdq,aes", register: __m256i, blocks: 2,
    load: _mm256_loadu_si256, store: _mm256_storeu_si256, broadcast: _mm256_broadcastsi128_si256, xor: _mm256_xor_si256,
    encrypt: _mm256_aesenc_epi128, encrypt_last: _mm256_aesenclast_epi128,
    decrypt: _mm256_aesdec_epi128, decrypt_last: _mm256_aesdeclast_epi128,
    shift_bytes_left: _mm256_bslli_epi128, shift_bytes_right: _mm256_bsrli_epi128, multiply: _mm256_clmulepi64_epi128,
    set64: _mm256_set1_epi64x,
    shifts: |tweak, exponent| {
        let left = _mm256_add_epi64(_mm256_set1_epi64x(exponent), _mm256_set_epi64x(1, 1, 0, 0));
        let right = _mm256_sub_epi64(_mm256_set1_epi64x(64), left);
        (_mm256_sllv_epi64(tweak, left), _mm256_srlv_epi64(tweak, right))
    },
}

engine! {
    /// One block per register.
    AesNi, aes_ni, "AES-NI", features: "avx,aes,pclmulqdq", register: __m128i, blocks: 1,
    load: _mm_loadu_si128, store: _mm_storeu_si128, broadcast: std::convert::identity, xor: _mm_xor_si128,
    encrypt: _mm_aesenc_si128, encrypt_last: _mm_aesenclast_si128,
    decrypt: _mm_aesdec_si128, decrypt_last: _mm_aesdeclast_si128,
    shift_bytes_left: _mm_bslli_si128, shift_bytes_right: _mm_bsrli_si128, multiply: _mm_clmulepi64_si128,
    set64: _mm_set1_epi64x,
    shifts: |tweak, exponent| {
        let (left, right) = (_mm_cvtsi64_si128(exponent), _mm_cvtsi64_si128(64 - exponent));
        (_mm_sll_epi64(tweak, left), _mm_srl_epi64(tweak, right))
    },
}
