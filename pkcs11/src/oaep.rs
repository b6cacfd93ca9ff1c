//! Takes the padding of `RSA-OAEP-256` off (RFC 8017 section 7.1.2, step 3), for tokens that know OAEP with SHA-1 only or
//! not at all. What was wrong with a padding shows neither in the answer nor in the time that it takes.

use openssl::{memcmp, sha::sha256};
use zeroize::{Zeroize, Zeroizing};

/// SHA-256.
const HASH: usize = 32;
/// A message is a content key or a share of one: its place is known, and nothing has to be searched for its beginning.
pub const MESSAGE: usize = 32;

/// The message in what the private key gave, of as many bytes as the modulus has; `None` if it is padded otherwise.
pub fn unpad(block: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    if block.len() < 2 * HASH + 2 + MESSAGE {
        return None;
    }
    let mut seed = Zeroizing::new(block[1..=HASH].to_vec());
    let mut data = Zeroizing::new(block[1 + HASH..].to_vec());
    mask(&data, &mut seed);
    mask(&seed, &mut data);
    let start = data.len() - MESSAGE;
    let is_label = memcmp::eq(&data[..HASH], &sha256(b""));
    let zeros = data[HASH..start - 1].iter().fold(block[0], |all, byte| all | byte);
    let wrong = zeros | (data[start - 1] ^ 1) | u8::from(!is_label);
    (wrong == 0).then(|| Zeroizing::new(data[start..].to_vec()))
}

/// MGF1 with SHA-256 (RFC 8017 appendix B.2.1), over the bytes that it masks.
fn mask(seed: &[u8], bytes: &mut [u8]) {
    let mut input = Zeroizing::new(seed.to_vec());
    input.extend([0; 4]);
    for (number, part) in (0_u32..).zip(bytes.chunks_mut(HASH)) {
        input[seed.len()..].copy_from_slice(&number.to_be_bytes());
        let mut hash = sha256(&input);
        part.iter_mut().zip(hash).for_each(|(byte, mask)| *byte ^= mask);
        hash.zeroize();
    }
}

#[cfg(test)]
mod tests {
    use base64ct::{Base64UrlUnpadded, Encoding};
    use openssl::{
        encrypt::Encrypter,
        hash::MessageDigest,
        pkey::PKey,
        rsa::{Padding, Rsa},
    };

    use super::*;

    /// What libcrypto pads is unpadded, and every changed byte of the block is noticed.
    #[test]
    fn takes_off_what_libcrypto_put_on_and_nothing_else() {
        let key = PKey::from_rsa(Rsa::generate(2048).unwrap()).unwrap();
        let pad = |message: &[u8], hash: MessageDigest| {
            let mut encrypter = Encrypter::new(&key).unwrap();
            encrypter.set_rsa_padding(Padding::PKCS1_OAEP).unwrap();
            encrypter.set_rsa_oaep_md(hash).unwrap();
            encrypter.set_rsa_mgf1_md(hash).unwrap();
            let mut encrypted = vec![0; encrypter.encrypt_len(message).unwrap()];
            let len = encrypter.encrypt(message, &mut encrypted).unwrap();
            let mut block = vec![0; 256];
            let rsa = key.rsa().unwrap();
            assert_eq!(rsa.private_decrypt(&encrypted[..len], &mut block, Padding::NONE).unwrap(), 256);
            block
        };
        let message: Vec<u8> = (1..33).collect();
        let block = pad(&message, MessageDigest::sha256());
        assert_eq!(unpad(&block).unwrap()[..], message);
        for at in 0..block.len() - MESSAGE {
            let mut changed = block.clone();
            changed[at] ^= 1;
            assert!(unpad(&changed).is_none(), "byte {at}");
        }
        for wrong in [&message[..31], &[message.clone(), vec![1]].concat()] {
            assert!(unpad(&pad(wrong, MessageDigest::sha256())).is_none(), "a message of {} bytes", wrong.len());
        }
        assert!(unpad(&pad(&message, MessageDigest::sha1())).is_none());
        assert!(unpad(&block[..97]).is_none() && unpad(&[]).is_none());
    }

    /// A block that Python's integers and hashlib padded.
    #[test]
    fn takes_off_the_padding_of_others() {
        let block = "AKo6WWRWLpMTgX1ArypblWs2hBQvcexeJCcC3uvp30TYzUM9o1Uo-ZHh2sjcyjPzC9fErFONZONvNf58K2IgCD5aCirPCf0IZTKRG-lp\
                     svvEb4bGeTlHjkhUBNubvJhWGzj6kJh2FpxTg4mdrNnl271eYZPN9jFm5kntu0ZrMHtUh0YurT9GvzDeT7p24-HhB6R0rSpvIuQMs1_L\
                     wDiwOgqkl5BT8hWvj0J5zaMEVVIioIV7T7a9yx8V4boGqd5meI98WvlPPUhfQeAwNgRo3iixYTb3mlwQKMpLfd93w-HPoONDDuPtIIix\
                     M3KXferec_GfZyhhRamyuathJdRTIA";
        let message = unpad(&Base64UrlUnpadded::decode_vec(block).unwrap()).unwrap();
        assert_eq!(Base64UrlUnpadded::encode_string(&message), "OVOVwmxGbJHA-Lq4bFW7mQnfsdxA2UcDZQ70JBub07w");
    }
}
