//! Points on the curves that Tang servers have keys on: P-521, and P-256 and P-384. Keys of ours stay on P-256.

use openssl::{
    bn::{BigNum, BigNumContext},
    ec::{EcGroup, EcKey, EcPoint, EcPointRef},
    error::ErrorStack,
    hash::MessageDigest,
    nid::Nid,
    pkey::Public,
};
use serde_json::{Map, Value};
use zeroize::Zeroize;

use crate::{base::key::SecretBytes, keys::seal::jwk};

/// A curve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Curve {
    P256,
    P384,
    P521,
}

impl Curve {
    const ALL: [Self; 3] = [Self::P256, Self::P384, Self::P521];

    /// `crv`
    pub fn name(self) -> &'static str {
        match self {
            Self::P256 => "P-256",
            Self::P384 => "P-384",
            Self::P521 => "P-521",
        }
    }

    /// Number of bytes of a coordinate.
    pub fn bytes(self) -> usize {
        match self {
            Self::P256 => 32,
            Self::P384 => 48,
            Self::P521 => 66,
        }
    }

    /// `alg` of a signature by a key on it, and its hash (RFC 7518 section 3.4).
    pub fn signature(self) -> (&'static str, MessageDigest) {
        match self {
            Self::P256 => ("ES256", MessageDigest::sha256()),
            Self::P384 => ("ES384", MessageDigest::sha384()),
            Self::P521 => ("ES512", MessageDigest::sha512()),
        }
    }

    /// Its group.
    pub fn group(self) -> Result<EcGroup, ErrorStack> {
        EcGroup::from_curve_name(match self {
            Self::P256 => Nid::X9_62_PRIME256V1,
            Self::P384 => Nid::SECP384R1,
            Self::P521 => Nid::SECP521R1,
        })
    }

    /// The JWK of a point.
    pub fn jwk(self, group: &EcGroup, point: &EcPointRef) -> Result<Value, ErrorStack> {
        jwk::of_point(self.name(), self.bytes(), group, point)
    }

    /// The x coordinate of a secret point, and nothing else of it.
    pub fn secret_x(self, group: &EcGroup, point: &EcPointRef) -> Result<SecretBytes, super::SealError> {
        let (mut x, mut y, mut context) = (BigNum::new()?, BigNum::new()?, BigNumContext::new()?);
        point.affine_coordinates(group, &mut x, &mut y, &mut context)?;
        let mut bytes = x.to_vec_padded(i32::try_from(self.bytes()).unwrap_or(i32::MAX))?;
        let secret = SecretBytes::copy_of(&bytes);
        bytes.zeroize();
        x.clear();
        y.clear();
        Ok(secret?)
    }
}

/// A public key that a JWK has. libcrypto checks that it is on the curve: else an answer would tell of our secrets.
pub struct Point {
    pub curve: Curve,
    pub group: EcGroup,
    pub key: EcKey<Public>,
}

impl Point {
    /// The error says what is wrong with it, after "it".
    pub fn of_jwk(jwk: &Map<String, Value>) -> Result<Self, String> {
        let text = |name: &str| jwk.get(name).and_then(Value::as_str).unwrap_or_default();
        let curve = Curve::ALL.into_iter().find(|curve| text("kty") == "EC" && curve.name() == text("crv"));
        let curve = curve.ok_or("is on no curve that is supported")?;
        let (group, key) = jwk::point(jwk, curve.name(), curve.bytes(), || curve.group())?;
        Ok(Self { curve, group, key })
    }

    /// Its JWK, of the required members.
    pub fn jwk(&self) -> Result<Value, ErrorStack> {
        self.curve.jwk(&self.group, self.key.public_key())
    }
}

/// Overwrites a secret point: what frees it does not.
pub fn forget(point: &mut EcPoint, group: &EcGroup, context: &mut BigNumContext) -> Result<(), ErrorStack> {
    let one = BigNum::from_u32(1)?;
    point.mul_generator2(group, &one, context)
}
