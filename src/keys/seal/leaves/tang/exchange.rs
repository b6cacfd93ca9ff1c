//! McCallum-Relyea key exchange: the server multiplies a blinded point by its key. It learns neither the point nor the
//! result, and whoever listens learns nothing of use.

use openssl::{
    bn::BigNumContext,
    ec::{EcKey, EcPoint},
    pkey::Private,
};
use serde_json::{Value, json};

use super::curve::{Point, forget};
use crate::{base::key::SecretBytes, keys::seal::SealError};

/// A question to a server: X = C + E, where E = eG hides C.
pub struct Question {
    blind: EcKey<Private>,
    /// What is sent.
    pub jwk: Value,
}

impl Question {
    /// With a new blind; `sender` is C, on the curve of `server`.
    pub fn new(server: &Point, sender: &Point) -> Result<Self, SealError> {
        Self::blinded(server, sender, EcKey::generate(&server.group)?)
    }

    fn blinded(server: &Point, sender: &Point, blind: EcKey<Private>) -> Result<Self, SealError> {
        let (group, mut context) = (&server.group, BigNumContext::new()?);
        let mut x = EcPoint::new(group)?;
        x.add(group, sender.key.public_key(), blind.public_key(), &mut context)?;
        let mut jwk = server.curve.jwk(group, &x)?;
        jwk["alg"] = json!("ECMR");
        Ok(Self { blind, jwk })
    }

    /// Z, the x coordinate of K = Y - eS. The server vouches for nothing: a wrong Y gives a key that unwraps nothing.
    pub fn answered(&self, server: &Point, answer: &Point) -> Result<SecretBytes, SealError> {
        let (group, mut context) = (&server.group, BigNumContext::new()?);
        let (mut blinding, mut shared) = (EcPoint::new(group)?, EcPoint::new(group)?);
        blinding.mul2(group, server.key.public_key(), self.blind.private_key(), &mut context)?;
        blinding.invert2(group, &mut context)?;
        shared.add(group, answer.key.public_key(), &blinding, &mut context)?;
        let z = server.curve.secret_x(group, &shared);
        for secret in [&mut blinding, &mut shared] {
            forget(secret, group, &mut context)?;
        }
        z
    }
}

#[cfg(test)]
mod tests {
    use base64ct::{Base64UrlUnpadded, Encoding};
    use openssl::bn::BigNum;

    use super::*;
    use crate::keys::seal::ecdh_es;

    fn point(x: &str, y: &str) -> Point {
        Point::of_jwk(json!({"kty": "EC", "crv": "P-521", "x": x, "y": y}).as_object().unwrap()).unwrap()
    }

    /// All numbers were computed by Python's integers, and jose agrees.
    #[test]
    fn an_exchange_on_p521_gives_the_numbers_of_others() {
        let server = point(
            "AT2OEks57yO959O_DRj9T3K_FgZ8SnAEJsvqRYzaiktyOSBOfDpYRO9RonWZikHs0ZphgJFu9DVyFQAfFAT6UXTe",
            "AC9r1NglYbAohv1UbZW7IeOMbJ97XaS-mTDPj8TK27Q3n4NNjBddEJpBAT5Ks0ygermtqaz26ctdqc9mvqVBvZXG",
        );
        let sender = point(
            "AKG0UzbrWI9cXLX5QWo6nw6Q22gyWbacoasQbcpD3WlGvN8sPCPozXWfAKsA144s7sFKsQZREThMEHAdgxpnNr_N",
            "AQazG24gjDjlaosd3nvCBPnWGZ6xl_dWhmeJGeZIsy7PlG1K6P5o33bkbvyVYCMxYOv29sAn5w8VGedkkL488oPm",
        );
        let blind = point(
            "ABJdOve7c4BJwGWMb6o54GFOAkA7sBE97_6YNMlZK_4Z8_KDxstWuY_uqvk6M7b5FZE3_mV6JjKvnYg3LsRXkC7c",
            "AAauEFdTdeqJlB4hZ1zhPgBopNX5ylRi5kFZc6lW0FovcvGNhfmbBfEVNpNqqqoegTm62vBuJjrQxZIaQbvo2vDG",
        );
        let e = "AAB9-55GnsYe8qAqrNrMChm54yxsRGcd8EvYG8Qfu8RG6fnZOEtGIMco_xwN9ao8-kAcvyo20CAiiVxZA_La8wLL";
        let e = BigNum::from_slice(&Base64UrlUnpadded::decode_vec(e).unwrap()).unwrap();
        let blind = EcKey::from_private_components(&blind.group, &e, blind.key.public_key()).unwrap();
        let question = Question::blinded(&server, &sender, blind).unwrap();
        assert_eq!(
            question.jwk["x"],
            "ANRhH2ZTmuFBhN9oG7pjRQUumXP6NMjJCWDjy0H0laCycdYoWbI4yiu7KDMy1NFY9PMGrl8RSICXhHEDusLBOBRb"
        );
        assert_eq!(question.jwk["alg"], "ECMR");
        let answer = point(
            "ANqnub8Ejg5tjNP2COqWzIsDr4GbeQcmUtKoqbf9Vb-HlyTYQQrEfxublfpC4c2gAc1yrWqHdoNjmQ8ztwOYqyZn",
            "AKxsK81KsOPMB8fYpchnEdO8UompU6FOUoklBsK7N_V0WaSoNR2f8OUgMD2gp4Qrl1ocILVQ2Jzx9WGIpAaFNDb4",
        );
        let z = question.answered(&server, &answer).unwrap();
        let expected = "AMUDp__-zMFcw_HSaG8KYqcfl8jhGxJg24WSuFBYtEywsbL3_HI7RU3Tj69tp7hy3dIFK5DS2qxdFjVYCtlbTwKL";
        assert_eq!(Base64UrlUnpadded::encode_string(z.expose()), expected);
        let key = ecdh_es::wrapping_key(&z, &Default::default()).unwrap();
        assert_eq!(Base64UrlUnpadded::encode_string(key.expose()), "L5DYQJrsYK3nglmAFOGJsxRwrRU8HPrnb66xTFw8ldo");
    }
}
