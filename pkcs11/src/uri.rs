//! URIs of PKCS#11 objects (RFC 7512), strictly read: an attribute that would be ignored could have named the right key.

use std::{fmt, path::PathBuf};

/// The longest URI that is read.
const MOST_BYTES: usize = 4096;

/// Which token and which of its keys is meant. What is not said fits any.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Uri {
    /// The token's label.
    pub token: Option<String>,
    /// The token's serial number.
    pub serial: Option<String>,
    /// Who made the token.
    pub manufacturer: Option<String>,
    /// The token's model.
    pub model: Option<String>,
    /// The slot's number.
    pub slot: Option<u64>,
    /// The key's label.
    pub object: Option<String>,
    /// The key's id, which is bytes.
    pub id: Option<Vec<u8>>,
    /// The module's file.
    pub module_path: Option<PathBuf>,
    /// The module's name, without folder, "lib" and ".so".
    pub module_name: Option<String>,
    /// The file that has the PIN.
    pub pin_source: Option<PathBuf>,
}

/// Why a text is not such a URI.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadUri(String);

impl fmt::Display for BadUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Uri {
    /// Reads one.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn parse(text: &str) -> Result<Self, BadUri> {
        let rest = text.strip_prefix("pkcs11:").ok_or_else(|| bad("it does not begin with 'pkcs11:'"))?;
        if text.len() > MOST_BYTES {
            return Err(bad("it is too long"));
        }
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (mut uri, mut seen) = (Self::default(), Vec::new());
        let of = |text: &'_ str, end: char, in_query: bool| {
            let parts = text.split(end).filter(|_| !text.is_empty()).map(|part| (part.to_owned(), in_query));
            parts.collect::<Vec<_>>()
        };
        for (part, in_query) in of(path, ';', false).into_iter().chain(of(query, '&', true)) {
            let (name, value) = part.split_once('=').ok_or_else(|| bad(&format!("'{part}' is no NAME=VALUE")))?;
            if seen.iter().any(|before| before == name) {
                return Err(bad(&format!("it has '{name}' twice")));
            }
            uri.take(name, in_query, decode(value)?)?;
            seen.push(name.to_owned());
        }
        if uri.module_path.is_some() && uri.module_name.is_some() {
            return Err(bad("it has both 'module-path' and 'module-name'"));
        }
        Ok(uri)
    }

    fn take(&mut self, name: &str, in_query: bool, bytes: Vec<u8>) -> Result<(), BadUri> {
        if name == "pin-value" {
            return Err(bad("it has a PIN ('pin-value'): anyone could read it here; name a file by 'pin-source'"));
        }
        if name == "id" && !in_query {
            self.id = Some(bytes);
            return Ok(());
        }
        let text = String::from_utf8(bytes).ok().filter(|text| !text.contains('\0'));
        let text = text.ok_or_else(|| bad(&format!("'{name}' is not text")))?;
        match (name, in_query) {
            ("token", false) => self.token = Some(text),
            ("serial", false) => self.serial = Some(text),
            ("manufacturer", false) => self.manufacturer = Some(text),
            ("model", false) => self.model = Some(text),
            ("object", false) => self.object = Some(text),
            ("slot-id", false) => self.slot = Some(text.parse().map_err(|_| bad("'slot-id' is not a number"))?),
            ("type", false) if text == "private" => {}
            ("type", false) => return Err(bad("'type' must be 'private', or be left out")),
            ("module-path", true) => self.module_path = Some(absolute(name, &text)?),
            ("module-name", true) => self.module_name = Some(module_name(text)?),
            ("pin-source", true) => {
                self.pin_source = Some(absolute(name, text.strip_prefix("file:").unwrap_or(&text))?);
            }
            _ => return Err(bad(&format!("'{name}' is not supported here"))),
        }
        Ok(())
    }
}

fn bad(why: &str) -> BadUri {
    BadUri(why.to_owned())
}

/// `file:///PATH` has an empty host.
fn absolute(name: &str, text: &str) -> Result<PathBuf, BadUri> {
    let path = PathBuf::from(if text.starts_with("///") { &text[2..] } else { text });
    if path.is_absolute() { Ok(path) } else { Err(bad(&format!("'{name}' is not an absolute path"))) }
}

/// A name is looked for in folders of the system only.
fn module_name(text: String) -> Result<String, BadUri> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    let is_name = text.bytes().all(fits) && !text.starts_with('.') && !text.is_empty();
    if is_name { Ok(text) } else { Err(bad("'module-name' is not the name of a module")) }
}

fn decode(text: &str) -> Result<Vec<u8>, BadUri> {
    let (mut bytes, mut decoded) = (text.bytes(), Vec::with_capacity(text.len()));
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'%' => {
                let mut digit = || bytes.next().and_then(|digit| char::from(digit).to_digit(16));
                let (high, low) = (digit(), digit());
                let value = high.zip(low).and_then(|(high, low)| u8::try_from(high * 16 + low).ok());
                value.ok_or_else(|| bad("it has a '%' without two hexadecimal digits"))?
            }
            byte => byte,
        });
    }
    Ok(decoded)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> String {
        Uri::parse(text).unwrap_err().to_string()
    }

    #[test]
    fn reads_what_p11tool_prints() {
        let uri = Uri::parse(
            "pkcs11:model=SoftHSM%20v2;manufacturer=SoftHSM%20project;serial=7b2c;token=owner;id=%01%ff;object=own-rsa;\
             type=private?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:/run/pin",
        );
        let text = |text: &str| Some(text.to_owned());
        let expected = Uri {
            token: text("owner"),
            serial: text("7b2c"),
            manufacturer: text("SoftHSM project"),
            model: text("SoftHSM v2"),
            slot: None,
            object: text("own-rsa"),
            id: Some(vec![1, 255]),
            module_path: Some("/usr/lib/softhsm/libsofthsm2.so".into()),
            module_name: None,
            pin_source: Some("/run/pin".into()),
        };
        assert_eq!(uri.unwrap(), expected);
        assert_eq!(Uri::parse("pkcs11:").unwrap(), Uri::default());
        let uri = Uri::parse("pkcs11:slot-id=7?module-name=opensc-pkcs11&pin-source=/p").unwrap();
        assert_eq!((uri.slot, uri.module_name.as_deref()), (Some(7), Some("opensc-pkcs11")));
        assert_eq!(uri.pin_source, Uri::parse("pkcs11:?pin-source=file:///p").unwrap().pin_source);
    }

    #[test]
    fn refuses_what_it_would_have_to_guess() {
        let cases = [
            ("pkcs12:token=a", "does not begin"),
            ("pkcs11:token=a;token=a", "'token' twice"),
            ("pkcs11:token", "'token' is no NAME=VALUE"),
            ("pkcs11:token=a;", "'' is no NAME=VALUE"),
            ("pkcs11:token=%4", "two hexadecimal"),
            ("pkcs11:token=%ff", "not text"),
            ("pkcs11:token=a%00", "not text"),
            ("pkcs11:tocken=a", "'tocken' is not supported"),
            ("pkcs11:token=a?object=b", "'object' is not supported"),
            ("pkcs11:module-path=/m", "'module-path' is not supported"),
            ("pkcs11:type=cert", "must be 'private'"),
            ("pkcs11:slot-id=x", "not a number"),
            ("pkcs11:?pin-value=1234", "it has a PIN"),
            ("pkcs11:?pin-source=pin", "not an absolute path"),
            ("pkcs11:?pin-source=|/bin/cat", "not an absolute path"),
            ("pkcs11:?module-path=../m.so", "not an absolute path"),
            ("pkcs11:?module-name=../m", "not the name"),
            ("pkcs11:?module-name=m&module-path=/m", "both"),
        ];
        for (text, why) in cases {
            assert!(refused(text).contains(why), "{text}: {}", refused(text));
        }
        assert_eq!(refused(&format!("pkcs11:token={}", "a".repeat(MOST_BYTES))), "it is too long");
    }
}
