//! Why there is no answer, in words, and by what cryptattach decides on.

use serde::Serialize;

/// Why there is no answer.
#[derive(Debug, Serialize)]
pub struct Refusal {
    /// What kind of failure it is.
    pub why: Why,
    /// In words: who did what.
    pub text: String,
    /// What to do, if there is something.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub next: String,
    /// The token that wants a PIN.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token: Option<Wanting>,
}

/// What kind of failure it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Why {
    /// Something here: memory, the request.
    System,
    /// The configuration: no such module, an ambiguous URI, no such key.
    Config,
    /// The token is not there, or cannot do it now.
    Token,
    /// The token opens nothing by this key: another key, or changed data.
    Key,
    /// The token wants its PIN.
    NeedsPin,
    /// The PIN was wrong.
    WrongPin,
    /// The PIN cannot be tried.
    Locked,
}

/// A token that wants its PIN.
#[derive(Debug, Serialize)]
pub struct Wanting {
    /// Its label, for people.
    pub label: String,
    /// What it is, for remembering a try: maker, model and serial number.
    pub is: String,
    /// Wrong PINs were tried before; some more lock it.
    pub count_low: bool,
    /// One more wrong PIN locks it.
    pub final_try: bool,
    /// The PIN is typed on its own keypad.
    pub keypad: bool,
}

impl Refusal {
    /// For this reason.
    pub fn new(why: Why, text: impl Into<String>, next: impl Into<String>) -> Self {
        Self { why, text: text.into(), next: next.into(), token: None }
    }

    /// As it is written.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }
}
