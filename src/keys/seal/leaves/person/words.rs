//! Recovery keys: 132 random bits as twelve words, and two more by which a wrong word is found.
//!
//! A word is a number of 11 bits: its place in the English list of BIP 39, in which four letters tell each word from all
//! others. The two last words are a code over GF(2^11) of distance 3: it tells which of the words is wrong if one is.

use miniz_oxide::inflate::decompress_to_vec_with_limit;
use zeroize::Zeroizing;

use crate::base::key::{SecretBytes, SecretMemoryError};

/// How many words a recovery key has.
pub const WORDS: usize = 14;
/// How many of them are random.
const RANDOM: usize = WORDS - 2;
const LIST: usize = 2048;
/// The longest word of the list.
const LONGEST: usize = 8;
/// So many letters tell a word from all others.
const TELLING: usize = 4;
/// x^11 = x^2 + 1.
const REDUCED: u16 = 0b101;

/// The list: of each word a digit, how many letters it shares with the word before it, and the others. Deflated: it is in
/// each initramfs.
const ENGLISH: &[u8] = include_bytes!("english.deflate");
/// What that is at most when it is inflated.
const MOST_ENGLISH: usize = 16 * 1024;

/// A text that is no recovery key. Neither error says a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WordsError {
    /// It has another number of words.
    #[error("it has {0} words; a recovery key has {WORDS}")]
    Number(usize),
    /// A word that is not in the list.
    #[error("word {0} is not in the list of words")]
    Unknown(usize),
    /// By the check words, this one is wrong.
    #[error("word {0} is wrong")]
    Wrong(usize),
    /// By the check words: the sum of the words is right, but not their order.
    #[error("word {WORDS} is wrong, or two words are exchanged")]
    Exchanged,
    /// By the check words.
    #[error("more than one word is wrong")]
    Several,
}

type Numbers = Zeroizing<[u16; WORDS]>;

fn list() -> Vec<String> {
    let text = decompress_to_vec_with_limit(ENGLISH, MOST_ENGLISH).unwrap_or_default();
    let (mut words, mut word) = (Vec::with_capacity(LIST), String::new());
    for letter in text.into_iter().map(char::from) {
        match letter.to_digit(10) {
            Some(shared) => {
                words.push(word.clone());
                word.truncate(shared as usize);
            }
            None => word.push(letter),
        }
    }
    words.push(word);
    // What stands before the first digit.
    words.remove(0);
    words
}

/// Times x.
fn times_x(number: u16) -> u16 {
    let shifted = number << 1;
    if shifted & 0x800 == 0 { shifted } else { shifted & 0x7ff ^ REDUCED }
}

/// What the check words of the others are.
fn checks(random: &[u16]) -> (u16, u16) {
    let sum = random.iter().fold(0, |sum, number| sum ^ number);
    (sum, random.iter().rev().fold(0, |sum, number| times_x(sum ^ number)))
}

/// A new recovery key, in the form that a key is derived from.
pub fn random() -> Result<SecretBytes, SecretMemoryError> {
    let bytes = SecretBytes::random(2 * RANDOM)?;
    let mut numbers = Numbers::default();
    for (number, bytes) in numbers.iter_mut().zip(bytes.expose().chunks_exact(2)) {
        *number = u16::from_le_bytes([bytes[0], bytes[1]]) & 0x7ff;
    }
    (numbers[RANDOM], numbers[RANDOM + 1]) = checks(&numbers[..RANDOM]);
    text(&numbers)
}

/// The words in lower case with a space between them.
fn text(numbers: &Numbers) -> Result<SecretBytes, SecretMemoryError> {
    let list = list();
    let (mut text, mut len) = (SecretBytes::zeroed(WORDS * (LONGEST + 1))?, 0);
    for number in &numbers[..] {
        let word = list.get(usize::from(*number)).map_or("", String::as_str).as_bytes();
        text.expose_mut()[len..len + word.len()].copy_from_slice(word);
        len += word.len();
        text.expose_mut()[len] = b' ';
        len += 1;
    }
    text.truncate(len - 1);
    Ok(text)
}

/// What somebody typed, in the form that a key is derived from. Case, digits, and whatever else stands between words say
/// nothing; four letters of a word are enough.
pub fn read(typed: &SecretBytes) -> Result<Result<SecretBytes, WordsError>, SecretMemoryError> {
    Ok(match numbers(typed.expose()) {
        Ok(numbers) => Ok(text(&numbers)?),
        Err(error) => Err(error),
    })
}

fn numbers(typed: &[u8]) -> Result<Numbers, WordsError> {
    let (list, mut numbers) = (list(), Numbers::default());
    let words = || typed.split(|letter| !letter.is_ascii_alphabetic()).filter(|word| !word.is_empty());
    if words().count() != WORDS {
        return Err(WordsError::Number(words().count()));
    }
    for (at, word) in words().enumerate() {
        numbers[at] = number(&list, word).ok_or(WordsError::Unknown(at + 1))?;
    }
    check(&numbers).map(|()| numbers)
}

fn number(list: &[String], typed: &[u8]) -> Option<u16> {
    let starts = |word: &str| word.as_bytes().get(..typed.len()).is_some_and(|start| start.eq_ignore_ascii_case(typed));
    let fits = |word: &String| starts(word) && (typed.len() >= TELLING || typed.len() == word.len());
    u16::try_from(list.iter().position(fits)?).ok()
}

fn check(numbers: &Numbers) -> Result<(), WordsError> {
    let (sum, weighted) = checks(&numbers[..RANDOM]);
    let off = (sum ^ numbers[RANDOM], weighted ^ numbers[RANDOM + 1]);
    match off {
        (0, 0) => Ok(()),
        (_, 0) => Err(WordsError::Wrong(RANDOM + 1)),
        (0, _) => Err(WordsError::Exchanged),
        (difference, weighted) => {
            let weights = std::iter::successors(Some(times_x(difference)), |last| Some(times_x(*last)));
            let at = weights.take(RANDOM).position(|weight| weight == weighted);
            Err(at.map_or(WordsError::Several, |at| WordsError::Wrong(at + 1)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::hex;

    fn typed(text: &str) -> Result<String, WordsError> {
        let secret = SecretBytes::copy_of(text.as_bytes()).unwrap();
        read(&secret).unwrap().map(|text| String::from_utf8(text.expose().to_vec()).unwrap())
    }

    fn fresh() -> Vec<String> {
        let key = random().unwrap();
        std::str::from_utf8(key.expose()).unwrap().split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn the_list_is_that_of_bip_39() {
        let list = list();
        let text: String = list.iter().map(|word| format!("{word}\n")).collect();
        let digest = hex::encode(&openssl::sha::sha256(text.as_bytes()));
        assert_eq!(digest, "2f5eed53a4727b4bf8880d8f3f199efc90e58503646d9ff8eff3a2ed3b24dbda");
        let starts: std::collections::BTreeSet<_> = list.iter().map(|word| &word[..word.len().min(TELLING)]).collect();
        assert_eq!((list.len(), starts.len()), (LIST, LIST));
        assert!(list.iter().all(|word| word.len() <= LONGEST));
    }

    #[test]
    fn x_has_each_weight_once() {
        let powers = std::iter::successors(Some(1), |last| Some(times_x(*last)));
        let distinct: std::collections::BTreeSet<_> = powers.take(2047).collect();
        assert_eq!(distinct.len(), 2047, "x generates the field");
    }

    #[test]
    fn case_spaces_dashes_numbers_and_endings_say_nothing() {
        let words = fresh();
        let plain = words.join(" ");
        assert_eq!(words.len(), WORDS);
        assert_eq!(typed(&plain).unwrap(), plain);
        let numbered = words.iter().enumerate().map(|(at, word)| format!(" {}. {}", at + 1, word.to_uppercase()));
        assert_eq!(typed(&numbered.collect::<Vec<_>>().join("\n")).unwrap(), plain);
        let short: Vec<_> = words.iter().map(|word| &word[..word.len().min(TELLING)]).collect();
        assert_eq!(typed(&short.join("-")).unwrap(), plain);
        assert_ne!(fresh(), words);
    }

    #[test]
    fn any_one_wrong_word_is_found() {
        let (words, list) = (fresh(), list());
        for at in 0..WORDS {
            for other in list.iter().step_by(401).filter(|other| **other != words[at]) {
                let mut wrong = words.clone();
                wrong[at].clone_from(other);
                let found = if at == WORDS - 1 { WordsError::Exchanged } else { WordsError::Wrong(at + 1) };
                assert_eq!(typed(&wrong.join(" ")).unwrap_err(), found);
            }
            let mut unknown = words.clone();
            unknown[at] = "abandom".to_owned();
            assert_eq!(typed(&unknown.join(" ")).unwrap_err(), WordsError::Unknown(at + 1));
            unknown[at] = "aban donx".to_owned();
            assert_eq!(typed(&unknown.join(" ")).unwrap_err(), WordsError::Number(WORDS + 1));
        }
        let mut exchanged = words.clone();
        exchanged.swap(2, 9);
        let found = typed(&exchanged.join(" ")).err();
        assert_eq!(found, (words[2] != words[9]).then_some(WordsError::Exchanged));
        assert_eq!(typed("").unwrap_err(), WordsError::Number(0));
        assert_eq!(typed(&"é ".repeat(WORDS)).unwrap_err(), WordsError::Number(0));
        assert_eq!(typed(&vec!["abandonabandon"; WORDS].join(" ")).unwrap_err(), WordsError::Unknown(1));
    }
}
