//! Errors with their causes, and texts that are not ours.

use std::error::Error as StdError;

/// Somebody else's words, without what moves a terminal's cursor, begins a line, or changes the order of letters.
pub fn printable(text: &str) -> String {
    text.replace(is_harmful, "\u{fffd}")
}

fn is_harmful(letter: char) -> bool {
    let is_layout = matches!(letter, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    letter.is_control() || is_layout
}

/// An error and its causes in one line.
pub fn chain(error: &(dyn StdError + 'static)) -> String {
    causes(error).map(message).collect::<Vec<_>>().join(": ")
}

/// What an error says, without its causes. It may quote a store, a disk or another host, so it is one [`printable`] line;
/// except that toml shows a part of the configuration.
pub fn message(error: &(dyn StdError + 'static)) -> String {
    let text = error.to_string();
    match error.is::<toml::de::Error>() || error.is::<Box<toml::de::Error>>() {
        true => text.trim_end().split('\n').map(printable).collect::<Vec<_>>().join("\n"),
        false => printable(&text),
    }
}

/// The error itself, its cause, that one's cause, ...
pub fn causes<'a>(error: &'a (dyn StdError + 'static)) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |error| {
        let error: &'a (dyn StdError + 'static) = *error;
        error.source()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// serde_json repeats the member's name as it is; a store, or another host's document, chooses it.
    #[test]
    fn what_an_error_quotes_moves_no_cursor() {
        #[derive(Debug, serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Nothing {}
        let error = serde_json::from_str::<Nothing>(r#"{"\u001b[2J": 1}"#).unwrap_err();
        assert!(error.to_string().contains('\u{1b}'));
        assert!(chain(&error).contains("unknown field `\u{fffd}[2J`"), "{}", chain(&error));
        assert_eq!(
            message(&std::io::Error::other("one\nWARN all is well\u{9b}")),
            "one\u{fffd}WARN all is well\u{fffd}"
        );
        let toml = toml::from_str::<Nothing>("a = 1").unwrap_err();
        assert!(message(&toml).lines().count() > 2);
    }

    #[test]
    fn no_text_changes_the_order_of_what_is_shown() {
        assert_eq!(printable("a\u{202e}b\u{2066}c\u{2028}d\u{85}e Ü"), "a\u{fffd}b\u{fffd}c\u{fffd}d\u{fffd}e Ü");
    }
}
