//! The page with a recovery key, as a person reads it.

/// The words on a page.
pub fn words_of(page: &str) -> String {
    let words = page.split_whitespace().collect::<Vec<_>>();
    let numbered = (1..=14).map(|number| {
        let at = words.windows(2).position(|pair| pair[0] == number.to_string() && pair[1].bytes().all(is_letter));
        words[at.expect("the word of this number") + 1]
    });
    numbered.collect::<Vec<_>>().join(" ")
}

fn is_letter(byte: u8) -> bool {
    byte.is_ascii_lowercase()
}
