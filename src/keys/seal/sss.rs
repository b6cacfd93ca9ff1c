//! Shamir's secret sharing over the largest prime of 256 bits, p = 2^256 - 189, in the form of clevis' pin `sss`: a share is
//! `x || y`, 32 bytes each.
//!
//! clevis draws another prime for each split; its splits are combined by libcrypto ([`combine_over`]).
//!
//! The arithmetic takes the same time for all values: it has no branch and no index that depends on one. The `x` of a share
//! and how many there are is no secret.

use openssl::bn::{BigNum, BigNumContext};
use zeroize::Zeroize;

use super::SealError;
use crate::base::key::{SecretBytes, SecretMemoryError};

/// Number of bytes of a coordinate, and of the secret.
pub const BYTES: usize = 32;
/// Number of bytes of a share.
pub const SHARE_BYTES: usize = 2 * BYTES;
/// 2^256 - p.
const GAP: u64 = 189;

/// p, as `p` in a header has it: big-endian.
pub const PRIME: [u8; BYTES] = {
    let mut prime = [0xff; BYTES];
    prime[BYTES - 1] = 0x43;
    prime
};

/// A number below p, the lowest limb first. Wiped on drop.
struct Element([u64; 4]);

impl Drop for Element {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl Element {
    fn small(number: u64) -> Self {
        Self([number, 0, 0, 0])
    }

    /// `None` if it is not below p.
    fn from_bytes(bytes: &[u8; BYTES]) -> Option<Self> {
        let mut limbs = [0; 4];
        for (limb, chunk) in limbs.iter_mut().rev().zip(bytes.chunks_exact(8)) {
            *limb = chunk.iter().fold(0, |limb, byte| limb << 8 | u64::from(*byte));
        }
        let element = Self(limbs);
        // Whether it is a number of the field is no secret: each that we make is one.
        let (_, carry) = add_small(&element.0, GAP);
        (carry == 0).then_some(element)
    }

    fn write(&self, bytes: &mut [u8]) {
        for (limb, chunk) in self.0.iter().rev().zip(bytes.chunks_exact_mut(8)) {
            chunk.copy_from_slice(&limb.to_be_bytes());
        }
    }

    fn random() -> Result<Self, SecretMemoryError> {
        loop {
            let bytes = SecretBytes::random(BYTES)?;
            // It is not below p once in 2^248 times.
            if let Some(element) = bytes.expose().try_into().ok().and_then(Self::from_bytes) {
                return Ok(element);
            }
        }
    }

    fn is_zero(&self) -> bool {
        self.0.iter().fold(0, |all, limb| all | limb) == 0
    }

    /// p is subtracted if the number is not below it. `carry` is worth 2^256.
    fn reduced(limbs: [u64; 4], carry: u64) -> Self {
        let (mut less, over) = add_small(&limbs, GAP);
        let mask = 0_u64.wrapping_sub(over | carry);
        for (less, limb) in less.iter_mut().zip(limbs) {
            *less = *less & mask | limb & !mask;
        }
        Self(less)
    }

    fn plus(&self, other: &Self) -> Self {
        let (mut sum, mut carry) = ([0; 4], 0);
        for (at, sum) in sum.iter_mut().enumerate() {
            let wide = u128::from(self.0[at]) + u128::from(other.0[at]) + carry;
            (*sum, carry) = (wide as u64, wide >> 64);
        }
        Self::reduced(sum, carry as u64)
    }

    /// p less this, or 0.
    fn negated(&self) -> Self {
        let (mut difference, mut borrow) = ([0; 4], false);
        let prime = [u64::MAX - (GAP - 1), u64::MAX, u64::MAX, u64::MAX];
        for (at, difference) in difference.iter_mut().enumerate() {
            let (first, one) = prime[at].overflowing_sub(self.0[at]);
            let (second, two) = first.overflowing_sub(borrow.into());
            (*difference, borrow) = (second, one | two);
        }
        Self::reduced(difference, 0)
    }

    fn times(&self, other: &Self) -> Self {
        let mut product = [0_u64; 8];
        for (i, one) in self.0.iter().enumerate() {
            let mut carry = 0;
            for (j, other) in other.0.iter().enumerate() {
                let wide = u128::from(*one) * u128::from(*other) + u128::from(product[i + j]) + carry;
                (product[i + j], carry) = (wide as u64, wide >> 64);
            }
            product[i + 4] = carry as u64;
        }
        // 2^256 is 189, so the upper half counts 189 times.
        let (mut sum, mut carry) = ([0; 4], 0);
        for (at, sum) in sum.iter_mut().enumerate() {
            let wide = u128::from(product[at + 4]) * u128::from(GAP) + u128::from(product[at]) + carry;
            (*sum, carry) = (wide as u64, wide >> 64);
        }
        product.zeroize();
        // The carry is at most 189, and once more 2^256 is 189.
        let (sum, over) = add_small(&sum, carry as u64 * GAP);
        Self::reduced(sum, over)
    }

    /// By Fermat: to the power of p - 2.
    fn inverted(&self) -> Self {
        let mut inverse = Self::small(1);
        let exponent: [u64; 4] = [u64::MAX - GAP - 1, u64::MAX, u64::MAX, u64::MAX];
        for limb in exponent.iter().rev() {
            for bit in (0..64).rev() {
                inverse = inverse.times(&inverse);
                if limb >> bit & 1 == 1 {
                    inverse = inverse.times(self);
                }
            }
        }
        inverse
    }
}

fn add_small(limbs: &[u64; 4], number: u64) -> ([u64; 4], u64) {
    let (mut sum, mut carry) = ([0; 4], number);
    for (sum, limb) in sum.iter_mut().zip(limbs) {
        let (added, over) = limb.overflowing_add(carry);
        (*sum, carry) = (added, over.into());
    }
    (sum, carry)
}

/// A new random secret of 32 bytes and its shares, any `least` of which give it back.
pub fn split(least: usize, shares: usize) -> Result<(SecretBytes, Vec<SecretBytes>), SealError> {
    let coefficients = (0..least).map(|_| Element::random()).collect::<Result<Vec<_>, _>>()?;
    Ok(shares_of(&coefficients, shares)?)
}

fn shares_of(coefficients: &[Element], shares: usize) -> Result<(SecretBytes, Vec<SecretBytes>), SecretMemoryError> {
    let mut secret = SecretBytes::zeroed(BYTES)?;
    if let Some(constant) = coefficients.first() {
        constant.write(secret.expose_mut());
    }
    let share = |x: u64| {
        let x = Element::small(x);
        let y = coefficients.iter().rev().fold(Element::small(0), |y, coefficient| y.times(&x).plus(coefficient));
        let mut share = SecretBytes::zeroed(SHARE_BYTES)?;
        x.write(&mut share.expose_mut()[..BYTES]);
        y.write(&mut share.expose_mut()[BYTES..]);
        Ok(share)
    };
    Ok((secret, (1..).take(shares).map(share).collect::<Result<_, _>>()?))
}

/// The secret of as many shares as are needed: the polynomial's value at 0 (Lagrange). Shares that do not belong together
/// give another secret, which unwraps nothing.
pub fn combine(shares: &[SecretBytes]) -> Result<SecretBytes, SealError> {
    let not_a_share = || SealError::Unsupported("a share of its threshold has the wrong form".to_owned());
    let points = shares.iter().map(|share| {
        let (x, y) = share.expose().split_at_checked(BYTES)?;
        let element = |bytes: &[u8]| bytes.try_into().ok().and_then(Element::from_bytes);
        Some((element(x)?, element(y)?))
    });
    let points = points.collect::<Option<Vec<_>>>().ok_or_else(not_a_share)?;
    let mut secret = Element::small(0);
    for (at, (x, y)) in points.iter().enumerate() {
        let mut part = Element(y.0);
        for (_, (other, _)) in points.iter().enumerate().filter(|(other, _)| *other != at) {
            let difference = other.plus(&x.negated());
            // Twice the same share; and at 0 is the secret itself.
            if difference.is_zero() || other.is_zero() {
                return Err(not_a_share());
            }
            part = part.times(other).times(&difference.inverted());
        }
        secret = secret.plus(&part);
    }
    let mut bytes = SecretBytes::zeroed(BYTES)?;
    secret.write(bytes.expose_mut());
    Ok(bytes)
}

/// The same over a modulus that somebody else has drawn, as clevis does for each split; it is odd. The coefficients are
/// computed of what is no secret, so a secret number meets libcrypto's arithmetic once in each multiplication and addition.
pub fn combine_over(modulus: &[u8; BYTES], shares: &[SecretBytes]) -> Result<SecretBytes, SealError> {
    let not_a_share = || SealError::Unsupported("a share of its threshold has the wrong form".to_owned());
    let number = |bytes: &[u8]| BigNum::from_slice(bytes);
    let (modulus, mut context) = (number(modulus)?, BigNumContext::new()?);
    let xs = shares.iter().map(|share| share.expose().get(..BYTES).ok_or_else(not_a_share));
    let xs = xs.map(|x| Ok(number(x?)?)).collect::<Result<Vec<_>, SealError>>()?;
    let mut secret = BigNum::new()?;
    for (at, share) in shares.iter().enumerate() {
        let (mut coefficient, mut factor, mut inverse) = (BigNum::from_u32(1)?, BigNum::new()?, BigNum::new()?);
        for (_, other) in xs.iter().enumerate().filter(|(other, _)| *other != at) {
            factor.mod_sub(other, &xs[at], &modulus, &mut context)?;
            // There is no inverse if a share comes twice, or if the modulus is no prime.
            inverse.mod_inverse(&factor, &modulus, &mut context).map_err(|_| not_a_share())?;
            factor.mod_mul(&inverse, other, &modulus, &mut context)?;
            inverse.mod_mul(&coefficient, &factor, &modulus, &mut context)?;
            std::mem::swap(&mut coefficient, &mut inverse);
        }
        let y = share.expose().get(BYTES..SHARE_BYTES).filter(|_| share.len() == SHARE_BYTES);
        let (mut y, mut part) = (number(y.ok_or_else(not_a_share)?)?, BigNum::new()?);
        part.mod_mul(&y, &coefficient, &modulus, &mut context)?;
        inverse.mod_add(&secret, &part, &modulus, &mut context)?;
        std::mem::swap(&mut secret, &mut inverse);
        [&mut y, &mut part, &mut inverse].into_iter().for_each(|number| number.clear());
    }
    let mut bytes = secret.to_vec_padded(BYTES as i32)?;
    secret.clear();
    let secret = SecretBytes::copy_of(&bytes);
    bytes.zeroize();
    Ok(secret?)
}

#[cfg(test)]
mod tests {
    use base64ct::{Base64UrlUnpadded, Encoding};
    use proptest::prelude::*;

    use super::*;

    fn bytes(text: &str) -> SecretBytes {
        SecretBytes::copy_of(&Base64UrlUnpadded::decode_vec(text).unwrap()).unwrap()
    }

    fn element(text: &str) -> Element {
        Element::from_bytes(bytes(text).expose().try_into().unwrap()).unwrap()
    }

    /// Made without libcrypto and without this code, by Python's integers.
    #[test]
    fn shares_and_secret_are_those_that_python_computes() {
        let coefficients = [
            element("rqVkcA5Gz49zYqRG830LPEq0cpymbqLe46y8Yv6x5f0"),
            element("VSg9a8Kf6RRoF6x9HnnwHLX9k_4bgWLK2oVGnAUE52k"),
        ];
        let expected = [
            "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAEDzaHb0Oa4o9t6UMQR9vtZALIGmsHwBam-MgL_A7bOIw",
            "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAJY9d9Hk4ahuEOR_UEwcOt1tq-amN1xaHSYt0mbCLu1jA",
            "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAOuHhyzViaKzKupqb5O6tuSbK0ulvjyyz9zPJA3DcCc9Q",
        ];
        let (secret, shares) = shares_of(&coefficients, 3).unwrap();
        assert!(secret == bytes("rqVkcA5Gz49zYqRG830LPEq0cpymbqLe46y8Yv6x5f0"));
        assert!(shares.iter().zip(expected).all(|(share, expected)| *share == bytes(expected)));
        for pair in [[0, 1], [1, 2], [2, 0]] {
            assert!(combine(&pair.map(|at| bytes(expected[at]))).unwrap() == secret);
        }
        assert_eq!(Base64UrlUnpadded::encode_string(&PRIME), "_________________________________________0M");
    }

    #[test]
    fn any_shares_are_enough_and_fewer_are_not() {
        for (least, all) in [(1, 1), (1, 3), (2, 3), (3, 5), (7, 7)] {
            let (secret, shares) = split(least, all).unwrap();
            assert!(combine(&shares[all - least..]).unwrap() == secret);
            assert!(combine_over(&PRIME, &shares[all - least..]).unwrap() == secret);
            assert!(combine(&shares[..least]).unwrap() == secret);
            assert!(least == 1 || combine(&shares[..least - 1]).unwrap() != secret);
        }
    }

    #[test]
    fn shares_that_are_none_are_refused() {
        let (_, shares) = split(2, 2).unwrap();
        let twice = [0, 0].map(|at: usize| SecretBytes::copy_of(shares[at].expose()).unwrap());
        assert!(combine(&twice).is_err());
        let share = |x: &[u8], y: &[u8]| SecretBytes::copy_of(&[x, y].concat()).unwrap();
        let one = || SecretBytes::copy_of(shares[0].expose()).unwrap();
        for strange in [share(&[0; 32], &[1; 32]), share(&PRIME, &[1; 32]), share(&[2; 32], &[0xff; 32])] {
            assert!(combine(&[one(), strange]).is_err());
        }
        assert!(combine_over(&PRIME, &twice).is_err());
        assert!(combine_over(&PRIME, &[one(), share(&[2; 32], &[1; 31])]).is_err());
        assert!(combine_over(&PRIME, &[one(), share(&[2; 32], &[1; 33])]).is_err());
        assert!(combine_over(&PRIME, &[share(&[2; 16], &[])]).is_err());
        assert!(combine(&[one(), share(&[2; 32], &[1; 31])]).is_err());
        assert!(combine(&[one(), share(&[2; 32], &[1; 33])]).is_err());
    }

    proptest! {
        #[test]
        fn computes_as_libcrypto_does(a in any::<[u8; 32]>(), b in any::<[u8; 32]>(), high in any::<bool>()) {
            let spread = |mut bytes: [u8; 32]| {
                // Numbers near p are where a carry is lost.
                if high { bytes[..31].fill(0xff) }
                bytes
            };
            let (a, b) = (spread(a), spread(b));
            let (Some(x), Some(y)) = (Element::from_bytes(&a), Element::from_bytes(&b)) else { return Ok(()) };
            let (prime, mut context) = (BigNum::from_slice(&PRIME).unwrap(), BigNumContext::new().unwrap());
            let [a, b] = [a, b].map(|bytes| BigNum::from_slice(&bytes).unwrap());
            let mut expected = BigNum::new().unwrap();
            let is = |element: Element, expected: &BigNum| {
                let mut bytes = [0; 32];
                element.write(&mut bytes);
                assert_eq!(bytes.to_vec(), expected.to_vec_padded(32).unwrap());
            };
            expected.mod_mul(&a, &b, &prime, &mut context).unwrap();
            is(x.times(&y), &expected);
            expected.mod_add(&a, &b, &prime, &mut context).unwrap();
            is(x.plus(&y), &expected);
            expected.mod_sub(&a, &b, &prime, &mut context).unwrap();
            is(x.plus(&y.negated()), &expected);
            if !x.is_zero() {
                expected.mod_inverse(&a, &prime, &mut context).unwrap();
                is(x.inverted(), &expected);
            }
        }
    }
}
