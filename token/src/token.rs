//! The token itself: where the key is, never what it is.

use std::fmt;

use serde::Deserialize;

/// `{"type":"cryptattach","keyslots":["0"],"store":"cinder","key":"3f2a..."}`, as `cryptattach format` writes it.
#[derive(Deserialize)]
pub struct Token {
    #[serde(rename = "type")]
    kind: String,
    keyslots: Vec<String>,
    store: String,
    key: String,
}

impl Token {
    /// Reads a token; `None` if it is not ours, or cannot be what `cryptattach` wrote.
    pub fn parse(json: &str) -> Option<Self> {
        let token: Self = serde_json::from_str(json).ok()?;
        // What is printed reaches a terminal, so it is checked, though the program checks it again.
        let harmless =
            |word: &String| !word.is_empty() && word.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        let whole = harmless(&token.store) && harmless(&token.key) && token.keyslots.iter().all(harmless);
        (token.kind == "cryptattach" && whole).then_some(token)
    }
}

impl fmt::Display for Token {
    /// As luksDump's own lines look; it adds the keyslots.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\tKey:        {}/{}", self.store, self.key)?;
        match self.keyslots[..] {
            [] => writeln!(f, "\tOpens with: cryptattach attach (strict: there is no keyslot)"),
            _ => writeln!(f, "\tOpens with: cryptattach, or any program on libcryptsetup"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: &str =
        r#"{"type":"cryptattach","keyslots":["0"],"store":"cinder","key":"3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de"}"#;

    #[test]
    fn reads_what_format_writes() {
        let token = Token::parse(OURS).unwrap();
        let key = "\tKey:        cinder/3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de\n";
        assert!(token.to_string().starts_with(key), "{token}");
        assert!(Token::parse(&OURS.replace("[\"0\"]", "[]")).unwrap().to_string().contains("no keyslot"));
    }

    #[test]
    fn refuses_what_is_not_ours() {
        let refused = [
            OURS.replace("\"cryptattach\"", "\"systemd-tpm2\""),
            OURS.replace("\"store\":\"cinder\",", ""),
            OURS.replace("cinder", "cin\\u001b[2Jder"),
            OURS.replace("cinder", ""),
            OURS.replace("[\"0\"]", "0"),
            String::new(),
        ];
        for json in refused {
            assert!(Token::parse(&json).is_none(), "{json}");
        }
    }
}
