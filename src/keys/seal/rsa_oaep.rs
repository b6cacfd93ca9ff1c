//! `RSA-OAEP-256` (RFC 7518 section 4.3): OAEP with SHA-256 for both its hash and MGF1.

use std::iter;

use openssl::{
    bn::BigNumRef,
    error::ErrorStack,
    md::Md,
    pkey::{PKeyRef, Private, Public},
    pkey_ctx::{PkeyCtx, PkeyCtxRef},
    rsa::Padding,
};

use super::{ContentKey, SealError};
use crate::base::key::SecretBytes;

/// Value of `alg`.
pub const ALG: &str = "RSA-OAEP-256";
/// RFC 7518 section 4.3: "A key of size 2048 bits or larger MUST be used".
pub const LEAST_BITS: u32 = 2048;

/// The primes of the ROCA fingerprint: Nemec et al., "The Return of Coppersmith's Attack" (CCS 2017), section 3.1.
const ROCA_PRIMES: [u32; 38] = [
    3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101, 103, 107, 109,
    113, 127, 131, 137, 139, 149, 151, 157, 163, 167,
];
const ROCA_GENERATOR: u32 = 65537;

/// Whether a flawed generator in TPMs and smart cards made this modulus, from which the private key can be computed
/// (CVE-2017-15361): modulo each of the small primes it is a power of 65537. One in 2^27 others is, too.
pub fn is_roca(modulus: &BigNumRef) -> Result<bool, ErrorStack> {
    for prime in ROCA_PRIMES {
        let residue = modulus.mod_word(prime)?;
        let powers = iter::successors(Some(1), |power| Some(power * (ROCA_GENERATOR % prime) % prime));
        let mut group = powers.take(prime as usize).map(u64::from);
        if !group.any(|power| power == residue) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Encrypts a content key.
pub fn encrypt(key: &PKeyRef<Public>, content_key: &ContentKey) -> Result<Vec<u8>, SealError> {
    let mut context = PkeyCtx::new(key)?;
    context.encrypt_init()?;
    oaep_256(&mut context)?;
    let mut encrypted = Vec::new();
    context.encrypt_to_vec(content_key.expose(), &mut encrypted)?;
    Ok(encrypted)
}

/// Decrypts a content key; `None` if the padding is wrong: the wrong key, or damage.
pub fn decrypt(key: &PKeyRef<Private>, encrypted: &[u8]) -> Result<Option<ContentKey>, SealError> {
    let mut context = PkeyCtx::new(key)?;
    context.decrypt_init()?;
    oaep_256(&mut context)?;
    let mut content_key = SecretBytes::zeroed(key.size())?;
    let Ok(len) = context.decrypt(encrypted, Some(content_key.expose_mut())) else { return Ok(None) };
    content_key.truncate(len);
    Ok(ContentKey::from_secret(content_key))
}

fn oaep_256<T>(context: &mut PkeyCtxRef<T>) -> Result<(), SealError> {
    context.set_rsa_padding(Padding::PKCS1_OAEP)?;
    context.set_rsa_oaep_md(Md::sha256())?;
    context.set_rsa_mgf1_md(Md::sha256())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use openssl::{
        bn::{BigNum, BigNumContext},
        rsa::Rsa,
    };

    use super::*;

    /// A modulus as the flawed generator made them: k * M + 65537^a mod M, with the product M of the primes.
    #[test]
    fn knows_what_the_flawed_generator_made() {
        let mut context = BigNumContext::new().unwrap();
        let word = |value| BigNum::from_u32(value).unwrap();
        let product = ROCA_PRIMES.iter().fold(word(1), |product, prime| &product * &word(*prime));
        let mut power = BigNum::new().unwrap();
        power.mod_exp(&word(ROCA_GENERATOR), &word(123_456_789), &product, &mut context).unwrap();
        let mut k = BigNum::new().unwrap();
        k.rand(1800, openssl::bn::MsbOption::ONE, false).unwrap();
        let flawed = &(&k * &product) + &power;
        assert!(is_roca(&flawed).unwrap());
        assert!(!is_roca(&(&flawed + &word(1))).unwrap());
        assert!(!is_roca(Rsa::generate(2048).unwrap().n()).unwrap());
    }
}
