//! Errors with their causes, and texts that are not ours.

use std::error::Error as StdError;

/// Somebody else's words, without what moves a terminal's cursor.
pub fn printable(text: &str) -> String {
    text.replace(char::is_control, "\u{fffd}")
}

/// An error and its causes in one line.
pub fn chain(error: &(dyn StdError + 'static)) -> String {
    causes(error).map(message).collect::<Vec<_>>().join(": ")
}

/// What an error says, without its causes. It may quote a store, a disk or another host: each of its lines is [`printable`].
pub fn message(error: &(dyn StdError + 'static)) -> String {
    error.to_string().split('\n').map(printable).collect::<Vec<_>>().join("\n")
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
        assert_eq!(message(&std::io::Error::other("two\nlines\u{9b}")), "two\nlines\u{fffd}");
    }
}
