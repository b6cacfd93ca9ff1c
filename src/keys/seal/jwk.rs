//! JSON Web Keys (RFC 7517), as far as `epk` and thumbprints need them.

use base64ct::{Base64UrlUnpadded, Encoding};
use openssl::{
    bn::{BigNum, BigNumContext, BigNumRef},
    ec::{EcGroup, EcGroupRef, EcKey, EcKeyRef, EcPointRef},
    error::ErrorStack,
    nid::Nid,
    pkey::{HasPublic, PKey, Public},
    rsa::RsaRef,
    sha::sha256,
};
use serde_json::{Map, Value, json};

const P256: &str = "P-256";
/// Length of a coordinate, and of a private number.
pub const COORDINATE_BYTES: usize = 32;

/// The public key as JWK members (RFC 7518 section 6.2.1).
pub fn of_p256<T: HasPublic>(key: &EcKeyRef<T>) -> Result<Value, ErrorStack> {
    of_point(P256, COORDINATE_BYTES, key.group(), key.public_key())
}

/// The same of a point on the curve of this name, whose coordinates have so many bytes.
pub fn of_point(crv: &str, bytes: usize, group: &EcGroupRef, point: &EcPointRef) -> Result<Value, ErrorStack> {
    let (mut x, mut y, mut context) = (BigNum::new()?, BigNum::new()?, BigNumContext::new()?);
    point.affine_coordinates(group, &mut x, &mut y, &mut context)?;
    let len = i32::try_from(bytes).unwrap_or(i32::MAX);
    let coordinate = |number: BigNum| number.to_vec_padded(len).map(|bytes| Base64UrlUnpadded::encode_string(&bytes));
    Ok(json!({"crv": crv, "kty": "EC", "x": coordinate(x)?, "y": coordinate(y)?}))
}

/// The public key as JWK members (RFC 7518 section 6.3.1).
pub fn of_rsa<T: HasPublic>(key: &RsaRef<T>) -> Value {
    let number = |number: &BigNumRef| Base64UrlUnpadded::encode_string(&number.to_vec());
    json!({"e": number(key.e()), "kty": "RSA", "n": number(key.n())})
}

/// The key's thumbprint (RFC 7638): SHA-256 over the required members, ordered by name, without white space. That is how
/// serde_json prints a map.
pub fn thumbprint(jwk: &Value) -> String {
    Base64UrlUnpadded::encode_string(&sha256(jwk.to_string().as_bytes()))
}

/// A public key on P-256; the point is checked to be on the curve. The error says what is wrong with it.
pub fn p256(jwk: &Map<String, Value>) -> Result<PKey<Public>, String> {
    let text = |name: &str| jwk.get(name).and_then(Value::as_str).unwrap_or("none");
    if (text("kty"), text("crv")) != ("EC", P256) {
        return Err(format!("is a key of type {} on the curve {}, not on P-256", text("kty"), text("crv")));
    }
    let group = || EcGroup::from_curve_name(Nid::X9_62_PRIME256V1);
    let (_, key) = point(jwk, P256, COORDINATE_BYTES, group)?;
    PKey::from_ec_key(key).map_err(|_| format!("is not a point on {P256}"))
}

/// The public key of a JWK that names this curve, whose coordinates have so many bytes. The point is checked to be on the curve.
/// The error says what is wrong with it.
pub fn point(
    jwk: &Map<String, Value>,
    crv: &str,
    bytes: usize,
    group: impl FnOnce() -> Result<EcGroup, ErrorStack>,
) -> Result<(EcGroup, EcKey<Public>), String> {
    let coordinate = |name: &str| {
        let text = jwk.get(name).and_then(Value::as_str).unwrap_or_default();
        let coordinate = Base64UrlUnpadded::decode_vec(text).ok().filter(|coordinate| coordinate.len() == bytes);
        coordinate.ok_or_else(|| format!("has no '{name}' of {bytes} bytes"))
    };
    let (x, y) = (coordinate("x")?, coordinate("y")?);
    let key = || {
        let group = group()?;
        let (x, y) = (BigNum::from_slice(&x)?, BigNum::from_slice(&y)?);
        // EC_KEY_set_public_key_affine_coordinates checks that the point is on the curve.
        let key = EcKey::from_public_key_affine_coordinates(&group, &x, &y)?;
        key.check_key()?;
        Ok((group, key))
    };
    key().map_err(|_: ErrorStack| format!("is not a point on {crv}"))
}

#[cfg(test)]
pub mod tests {
    use openssl::pkey::Private;

    use super::*;

    pub fn public(x: &str, y: &str) -> PKey<Public> {
        p256(json!({"kty": "EC", "crv": "P-256", "x": x, "y": y}).as_object().unwrap()).unwrap()
    }

    pub fn private(x: &str, y: &str, d: &str) -> PKey<Private> {
        let d = BigNum::from_slice(&Base64UrlUnpadded::decode_vec(d).unwrap()).unwrap();
        let public = public(x, y).ec_key().unwrap();
        let key = EcKey::from_private_components(public.group(), &d, public.public_key()).unwrap();
        key.check_key().unwrap();
        PKey::from_ec_key(key).unwrap()
    }

    #[test]
    fn thumbprint_as_in_rfc_7638_section_3_1() {
        let n = "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n\
                 3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgd\
                 AZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur\
                 -kEgU8awapJzKnqDKgw";
        let jwk = json!({"kty": "RSA", "n": n, "e": "AQAB"});
        assert_eq!(thumbprint(&jwk), "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs");
    }

    #[test]
    fn other_curves_and_points_are_refused() {
        let x = "weNJy2HscCSM6AEDTDg04biOvhFhyyWvOHQfeF_PxMQ";
        let off_curve = json!({"kty": "EC", "crv": "P-256", "x": x, "y": x});
        assert!(p256(off_curve.as_object().unwrap()).unwrap_err().contains("not a point"));
        let other = json!({"kty": "EC", "crv": "P-384", "x": x, "y": x});
        assert!(p256(other.as_object().unwrap()).unwrap_err().contains("P-384"));
        let short = json!({"kty": "EC", "crv": "P-256", "x": "AA", "y": x});
        assert!(p256(short.as_object().unwrap()).unwrap_err().contains("'x'"));
    }
}
