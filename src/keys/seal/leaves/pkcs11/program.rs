//! The program `cryptattach-pkcs11`, which loads a module so that this one does not. `pkcs11/src/main.rs` has the protocol.

use std::{
    cell::Cell,
    collections::BTreeMap,
    env, io,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use serde_json::{Value, json};

use super::TokenError;
use crate::{
    base::{exit::Exit, key::SecretBytes},
    keys::net::http::Cancel,
    sys::programs,
};

/// Its name.
const NAME: &str = "cryptattach-pkcs11";
/// An answer has 32 bytes, a public key 1,500, an error the names of eight tokens.
const MOST_BYTES: usize = 16 * 1024;
/// What it says once the token has taken the PIN.
const LOGIN: &[u8] = b"login\n";

/// A module, and what its program is given besides questions.
pub struct Module {
    pub path: PathBuf,
    pub uri: String,
    /// What the module's own configuration is found by; nothing else is in the program's environment.
    pub environment: BTreeMap<String, String>,
}

/// A question.
pub struct Question<'a> {
    /// What is asked for.
    pub ask: &'a Value,
    pub pin: Option<&'a SecretBytes>,
    /// A person is there.
    pub attended: bool,
    pub patience: Duration,
}

/// What comes back.
pub enum Answer {
    /// What was asked for.
    Done(SecretBytes),
    /// The token wants its PIN.
    NeedsPin(Wanting),
    /// The token has not taken the PIN; or it may not have.
    NotTaken(TokenError),
    /// There is no answer for another reason.
    Failed(TokenError),
}

/// A token that wants its PIN.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Wanting {
    /// Its label.
    pub label: String,
    /// Maker, model and serial number.
    pub is: String,
    /// A wrong PIN was tried before, or one more locks it.
    pub is_low: bool,
    pub final_try: bool,
    /// The PIN is typed on its own keypad.
    pub keypad: bool,
}

/// Where the program is: beside this one, or where Debian has such programs. Both are root's.
pub fn path() -> Result<PathBuf, TokenError> {
    let own = env::current_exe().unwrap_or_default();
    let folders = [own.parent(), own.parent().and_then(Path::parent)];
    let [beside, above] = folders.map(|folder| folder.unwrap_or(Path::new("/")));
    let paths = [above.join("libexec").join(NAME), beside.join(NAME)];
    paths.into_iter().find(|path| path.is_file()).ok_or(TokenError::NoProgram)
}

impl Module {
    /// Asks, until that is not wanted any more. While a PIN is on its way nothing is broken off: whether it was taken has to be
    /// known.
    pub fn ask(&self, question: &Question<'_>, cancel: &Cancel) -> Answer {
        let path = match path() {
            Ok(path) => path,
            Err(error) => return Answer::Failed(error),
        };
        let request = json!({
            "module": self.path, "uri": self.uri, "seconds": question.patience.as_secs() + 1,
            "attended": question.attended, "ask": question.ask,
        });
        let line = format!("{request}\n");
        let input = [line.as_bytes(), question.pin.map(SecretBytes::expose).unwrap_or_default()];
        let mut command = Command::new(path);
        command.env_clear().envs(&self.environment);
        let gives_pin = question.pin.is_some() || question.attended;
        let is_taken = Cell::new(!gives_pin);
        let is_over = |said: &[u8]| {
            is_taken.set(is_taken.get() || said.starts_with(LOGIN));
            cancel.is_cancelled() && is_taken.get()
        };
        let said = programs::converse(&mut command, &input, MOST_BYTES, question.patience, &is_over);
        let (said, status) = match said {
            Ok(said) => said,
            Err(error) => {
                let error = self.error(lost(&error, question.patience));
                return if is_taken.get() { Answer::Failed(error) } else { Answer::NotTaken(error) };
            }
        };
        Answer::read(said.expose()).unwrap_or_else(|logged_in| {
            let how =
                status.map_or("gives no answer".to_owned(), |status| format!("ends without an answer ({status})"));
            let error = self.error(format!("it {how}"));
            if gives_pin && !logged_in { Answer::NotTaken(error) } else { Answer::Failed(error) }
        })
    }

    /// It cannot be asked for this reason.
    pub fn error(&self, why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> TokenError {
        TokenError::Program { module: self.path.clone(), source: io::Error::other(why) }
    }
}

/// Why no answer came, in words.
fn lost(error: &io::Error, patience: Duration) -> String {
    match error.kind() {
        io::ErrorKind::TimedOut => format!("it does not answer within {:.0} seconds", patience.as_secs_f32()),
        io::ErrorKind::InvalidData => "its answer is too long".to_owned(),
        _ => error.to_string(),
    }
}

impl Answer {
    /// Reads an answer. If it is none: whether the token had taken the PIN by then.
    pub fn read(said: &[u8]) -> Result<Self, bool> {
        let rest = said.strip_prefix(LOGIN);
        let (said, logged_in) = (rest.unwrap_or(said), rest.is_some());
        if let Some(bytes) = said.strip_prefix(b"done\n") {
            return SecretBytes::copy_of(bytes).map(Self::Done).map_err(|_| logged_in);
        }
        let refusal = said.strip_prefix(b"failed\n").and_then(|json| serde_json::from_slice::<Value>(json).ok());
        let refusal = refusal.ok_or(logged_in)?;
        let text = |value: &Value, name: &str| value[name].as_str().unwrap_or_default().to_owned();
        let exit = match refusal["why"].as_str().unwrap_or_default() {
            "needs-pin" => {
                let token = &refusal["token"];
                let is = |name: &str| token[name].as_bool() == Some(true);
                let final_try = is("final_try");
                return Ok(Self::NeedsPin(Wanting {
                    label: text(token, "label"),
                    is: text(token, "is"),
                    is_low: final_try || is("count_low"),
                    final_try,
                    keypad: is("keypad"),
                }));
            }
            "system" => Exit::System,
            "config" => Exit::Config,
            "key" => Exit::KeyRefused,
            "wrong-pin" | "locked" => Exit::PermissionDenied,
            _ => Exit::StoreUnavailable,
        };
        let error = TokenError::Refused { text: text(&refusal, "text"), next: text(&refusal, "next"), exit };
        Ok(if exit == Exit::PermissionDenied { Self::NotTaken(error) } else { Self::Failed(error) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(said: &str) -> String {
        match Answer::read(said.as_bytes()) {
            Ok(Answer::Done(bytes)) => format!("done {}", String::from_utf8_lossy(bytes.expose())),
            Ok(Answer::NeedsPin(token)) => format!("needs-pin {token:?}"),
            Ok(Answer::NotTaken(error)) => format!("not taken: {error}"),
            Ok(Answer::Failed(error)) => format!("failed: {error}"),
            Err(logged_in) => format!("nothing, {logged_in}"),
        }
    }

    #[test]
    fn an_answer_is_one_of_the_programs_own() {
        assert_eq!(told("done\nabc"), "done abc");
        assert_eq!(told("login\ndone\nlogin\n"), "done login\n");
        assert_eq!(told("failed\n{\"why\":\"token\",\"text\":\"gone\"}"), "failed: gone");
        assert_eq!(told("failed\n{\"why\":\"what\",\"text\":7}"), "failed: ");
        assert_eq!(told("failed\n{\"why\":\"wrong-pin\",\"text\":\"no\"}"), "not taken: no");
        assert_eq!(told("login\nfailed\n{\"why\":\"key\",\"text\":\"no\"}"), "failed: no");
        for nothing in ["", "done", "failed\n", "failed\n{", "hello\ndone\nabc", "login\r\ndone\n"] {
            assert_eq!(told(nothing), "nothing, false", "{nothing:?}");
        }
        assert_eq!(told("login\n"), "nothing, true");
        let wanting = told(
            "failed\n{\"why\":\"needs-pin\",\"token\":{\"label\":\"a\",\"is\":\"m\\u0000s\",\"final_try\":true,\"keypad\":1}}",
        );
        let expected =
            Wanting { label: "a".to_owned(), is: "m\0s".to_owned(), is_low: true, final_try: true, keypad: false };
        assert_eq!(wanting, format!("needs-pin {expected:?}"));
    }
}
