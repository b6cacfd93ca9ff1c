//! AES-256-XTS on one core: our engines, the ceiling (the `aes` crate's ECB), and the peers, interleaved in one run.
//! Prints JSON: [{"name", "sector_bytes", "encrypt": GB/s, "decrypt": GB/s}], medians.

mod peers;

use std::time::Duration;

use aes::{
    Aes256,
    cipher::{Array, BlockCipherDecrypt, BlockCipherEncrypt, KeyInit, consts::U16},
};
use cryptattach_xts::{Direction, Engine, Key, Sectors, engines, reference};
use nix::time::{ClockId, clock_gettime};
use peers::Apply;

/// As one large request; it fits the second-level cache.
const BUFFER_BYTES: usize = 64 * 1024;
const ROUNDS: usize = 15;
const SLICE: Duration = Duration::from_millis(20);

struct Contestant {
    name: String,
    sector_bytes: usize,
    encrypt: Apply,
    decrypt: Apply,
    rates: [Vec<f64>; 2],
}

fn main() {
    let key: [u8; 64] = std::array::from_fn(|at| (at * 7 + 3) as u8);
    let mut all = Vec::new();
    for sector_bytes in [512, 4096] {
        let mut enter = |name: &str, encrypt, decrypt| {
            all.push(Contestant { name: name.to_owned(), sector_bytes, encrypt, decrypt, rates: [vec![], vec![]] });
        };
        enter("ceiling: aes crate, ECB", ecb(&key, true), ecb(&key, false));
        let volume_key = Key::of(&key).unwrap();
        let count = engines(volume_key).len();
        for index in 0..count {
            let engine = || engines(volume_key).swap_remove(index);
            let name = format!("cryptattach {}", engine().name());
            enter(&name, ours(engine(), sector_bytes, true), ours(engine(), sector_bytes, false));
        }
        let xts_mode = || reference::new(volume_key);
        enter("xts-mode", ours(xts_mode(), sector_bytes, true), ours(xts_mode(), sector_bytes, false));
        type Peer = fn(&[u8; 64], usize, bool) -> Apply;
        let openssl = openssl::version::version().split(' ').take(2).collect::<Vec<_>>().join(" ");
        for (name, peer) in [
            (openssl.as_str(), peers::openssl as Peer),
            ("AWS-LC", peers::aws_lc),
            ("GnuTLS", peers::gnutls),
            ("libgcrypt", peers::libgcrypt),
        ] {
            enter(name, peer(&key, sector_bytes, true), peer(&key, sector_bytes, false));
        }
    }
    all_the_same(&mut all);
    let mut buffer = vec![7; BUFFER_BYTES];
    for _ in 0..ROUNDS {
        for contestant in &mut all {
            let Contestant { encrypt, decrypt, rates, .. } = contestant;
            rates[0].push(rate(encrypt, &mut buffer));
            rates[1].push(rate(decrypt, &mut buffer));
        }
    }
    let rows: Vec<_> = all
        .iter_mut()
        .map(|Contestant { name, sector_bytes, rates: [encrypt, decrypt], .. }| {
            serde_json::json!({
                "name": name, "sector_bytes": sector_bytes, "encrypt": median(encrypt), "decrypt": median(decrypt),
            })
        })
        .collect();
    println!("{}", serde_json::to_string_pretty(&rows).unwrap());
}

/// A peer that computes something else is no peer.
fn all_the_same(all: &mut [Contestant]) {
    let plaintext: Vec<u8> = (0..BUFFER_BYTES).map(|at| (at * 31 + at / 7) as u8).collect();
    let mut expected = [Vec::new(), Vec::new()];
    for contestant in all.iter_mut().filter(|contestant| !contestant.name.contains("ECB")) {
        let expected = &mut expected[usize::from(contestant.sector_bytes == 512)];
        let mut buffer = plaintext.clone();
        (contestant.encrypt)(&mut buffer, 1 << 33);
        if expected.is_empty() {
            expected.clone_from(&buffer);
        }
        assert!(*expected == buffer, "{} encrypts otherwise", contestant.name);
        (contestant.decrypt)(&mut buffer, 1 << 33);
        assert!(plaintext == buffer, "{} decrypts otherwise", contestant.name);
    }
}

fn ours(engine: Box<dyn Engine>, bytes: usize, encrypt: bool) -> Apply {
    let direction = if encrypt { Direction::Encrypt } else { Direction::Decrypt };
    Box::new(move |sectors, first| engine.apply(direction, None, sectors, Sectors { bytes, first }))
}

fn ecb(key: &[u8; 64], encrypt: bool) -> Apply {
    let cipher = Aes256::new(key[..32].try_into().unwrap());
    Box::new(move |data, _| {
        let (blocks, _) = Array::<u8, U16>::slice_as_chunks_mut(data);
        if encrypt { cipher.encrypt_blocks(blocks) } else { cipher.decrypt_blocks(blocks) }
    })
}

/// By processor time, so that whoever else is on this machine counts little.
fn rate(apply: &mut Apply, buffer: &mut [u8]) -> f64 {
    let now = || Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap());
    let (start, mut bytes) = (now(), 0);
    while now() - start < SLICE {
        for _ in 0..4 {
            apply(buffer, 1);
        }
        bytes += 4 * buffer.len();
    }
    bytes as f64 / (now() - start).as_secs_f64() / 1e9
}

fn median(rates: &mut [f64]) -> f64 {
    rates.sort_by(f64::total_cmp);
    (rates[rates.len() / 2] * 100.0).round() / 100.0
}
