//! What is asked for.

use std::{io::Read, path::PathBuf};

use base64ct::{Base64UrlUnpadded, Encoding};
use serde::{Deserialize, Deserializer, de};
use zeroize::{Zeroize, Zeroizing};

use crate::refusal::{Refusal, Why};
use cryptattach_pkcs11::Uri;

/// The longest request, PIN included.
const MOST_BYTES: usize = 16 * 1024;
/// The longest PIN.
const MOST_PIN_BYTES: usize = 255;

/// A PIN.
pub type Pin = Zeroizing<Vec<u8>>;

/// One request.
#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// The module's file.
    pub module: PathBuf,
    /// Which token and key.
    #[serde(deserialize_with = "uri")]
    pub uri: Uri,
    /// Seconds after which nobody waits any more.
    pub seconds: u32,
    /// A person has typed the PIN, or is there to use the token's own keypad.
    pub attended: bool,
    /// What is wanted.
    pub ask: Ask,
}

/// What is wanted.
#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ask {
    /// The public key, and whether the token is hardware.
    Public,
    /// The message of `RSA-OAEP-256` in this.
    Decrypt(Data),
    /// The x coordinate of the point that is shared with the owner of this one on P-256, uncompressed.
    Agree(Data),
}

/// Bytes, as base64url.
#[derive(Debug, PartialEq, Eq)]
pub struct Data(pub Vec<u8>);

impl<'de> Deserialize<'de> for Data {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Base64UrlUnpadded::decode_vec(&text).map(Self).map_err(de::Error::custom)
    }
}

fn uri<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Uri, D::Error> {
    Uri::parse(&String::deserialize(deserializer)?).map_err(de::Error::custom)
}

impl Request {
    /// Reads one, and the PIN behind it, if there is one.
    pub fn read(from: impl Read) -> Result<(Self, Option<Pin>), Refusal> {
        let wrong = |why: String| Refusal::new(Why::System, format!("the request cannot be read: {why}"), "");
        // All of it is allocated at once: growing would leave copies behind.
        let mut input = Zeroizing::new(Vec::with_capacity(MOST_BYTES + 1));
        from.take(MOST_BYTES as u64 + 1).read_to_end(&mut input).map_err(|error| wrong(error.to_string()))?;
        if input.len() > MOST_BYTES {
            return Err(wrong("it is too long".to_owned()));
        }
        let end = input.iter().position(|byte| *byte == b'\n').ok_or_else(|| wrong("it has no end".to_owned()))?;
        let request = serde_json::from_slice(&input[..end]).map_err(|error| wrong(error.to_string()))?;
        let pin = Zeroizing::new(input[end + 1..].to_vec());
        input.zeroize();
        if pin.len() > MOST_PIN_BYTES {
            return Err(wrong(format!("the PIN has more than {MOST_PIN_BYTES} bytes")));
        }
        Ok((request, (!pin.is_empty()).then_some(pin)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(input: &str) -> Result<(Request, Option<Pin>), String> {
        Request::read(input.as_bytes()).map_err(|refusal| String::from_utf8(refusal.to_json()).unwrap())
    }

    #[test]
    fn is_a_line_and_the_pin_behind_it() {
        let line = r#"{"module":"/m.so","uri":"pkcs11:token=a","seconds":10,"attended":false,"ask":{"decrypt":"AQI"}}"#;
        let (request, pin) = read(&format!("{line}\n12\n34")).unwrap();
        assert_eq!((request.ask, &pin.unwrap()[..]), (Ask::Decrypt(Data(vec![1, 2])), &b"12\n34"[..]));
        let (request, pin) = read(&format!("{}\n", line.replace(r#"{"decrypt":"AQI"}"#, r#""public""#))).unwrap();
        assert_eq!((request.ask, pin), (Ask::Public, None));

        let wrong = [
            (line.to_owned(), "no end"),
            (line.replace("token=a", "token=a;token=b") + "\n", "'token' twice"),
            (line.replace("AQI", "A+I") + "\n", "cannot be read"),
            (line.replace("seconds", "minutes") + "\n", "unknown field"),
            (format!("{line}\n{}", "1".repeat(256)), "the PIN has more than 255"),
            ("a".repeat(MOST_BYTES + 1), "too long"),
        ];
        for (input, why) in wrong {
            let told = read(&input).unwrap_err();
            assert!(told.contains(why), "{told}");
        }
    }
}
