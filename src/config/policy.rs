//! `opens`: what may open a container, as a tree of named leaves with thresholds.
//!
//! The grammar: `NAME`, `any(POLICY, ...)`, `all(POLICY, ...)`, `N of (POLICY, ...)`. What is parsed is kept in one form, so
//! two texts that mean the same are printed as the same.

use std::{collections::BTreeSet, fmt, str::FromStr};

use crate::base::chain::printable;

/// The deepest nesting.
pub const DEEPEST: usize = 4;
/// The most leaves, counted as often as they are named.
pub const MOST_LEAVES: usize = 64;
/// The longest text.
const LONGEST: usize = 4096;
const LONGEST_NAME: usize = 64;
/// Words of the grammar, which name no leaf.
const WORDS: [&str; 3] = ["any", "all", "of"];

/// The name of a leaf.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LeafName(String);

impl LeafName {
    /// The owner's key.
    pub const OWNER: &str = "owner";
    /// The escrow key.
    pub const ESCROW: &str = "escrow";
    /// The hosts that the store's section names, and those that are admitted.
    pub const HOSTS: &str = "hosts";

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it stands for members of the store's section, not for a table `[leaves.NAME]`.
    pub fn is_built_in(&self) -> bool {
        matches!(self.as_str(), Self::OWNER | Self::ESCROW | Self::HOSTS)
    }
}

impl FromStr for LeafName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'_';
        let starts = text.bytes().next().is_some_and(|first| first.is_ascii_lowercase());
        match starts && text.len() <= LONGEST_NAME && text.bytes().all(fits) && !WORDS.contains(&text) {
            true => Ok(Self(text.to_owned())),
            false => Err(format!(
                "a leaf's name has a letter and then letters, digits, '-' or '_' (at most {LONGEST_NAME}), all in lower case, \
                 and is none of: {}",
                WORDS.join(", ")
            )),
        }
    }
}

impl fmt::Display for LeafName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> serde::Deserialize<'de> for LeafName {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// What may open a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Policy {
    /// One leaf.
    Leaf(LeafName),
    /// One of these, two or more; none of them is an `Any`.
    Any(Vec<Policy>),
    /// At least this many of these, two or more. No leaf is part of two of them.
    Threshold { least: usize, of: Vec<Policy> },
}

/// A text that is no policy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("at character {at}: {what}")]
pub struct ParsePolicyError {
    /// Counted from 1.
    pub at: usize,
    pub what: String,
}

impl Policy {
    /// The names of its leaves, each once.
    pub fn leaves(&self) -> BTreeSet<&LeafName> {
        match self {
            Self::Leaf(name) => BTreeSet::from([name]),
            Self::Any(of) | Self::Threshold { of, .. } => of.iter().flat_map(Self::leaves).collect(),
        }
    }

    /// Whether it has a leaf of this name.
    pub fn names(&self, name: &str) -> bool {
        self.leaves().iter().any(|leaf| leaf.as_str() == name)
    }

    /// Whether those leaves that pass are enough.
    pub fn is_met_by(&self, passes: &dyn Fn(&LeafName) -> bool) -> bool {
        match self {
            Self::Leaf(name) => passes(name),
            Self::Any(of) => of.iter().any(|policy| policy.is_met_by(passes)),
            Self::Threshold { least, of } => of.iter().filter(|policy| policy.is_met_by(passes)).count() >= *least,
        }
    }
}

impl Default for Policy {
    /// `any(owner, escrow, hosts)`
    fn default() -> Self {
        let names = [LeafName::OWNER, LeafName::ESCROW, LeafName::HOSTS];
        Self::Any(names.into_iter().map(|name| Self::Leaf(LeafName(name.to_owned()))).collect())
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = match self {
            Self::Leaf(name) => return name.fmt(f),
            Self::Any(of) => {
                f.write_str("any(")?;
                of
            }
            Self::Threshold { least, of } if *least == of.len() => {
                f.write_str("all(")?;
                of
            }
            Self::Threshold { least, of } => {
                write!(f, "{least} of (")?;
                of
            }
        };
        for (number, policy) in of.iter().enumerate() {
            write!(f, "{}{policy}", if number == 0 { "" } else { ", " })?;
        }
        f.write_str(")")
    }
}

impl FromStr for Policy {
    type Err = ParsePolicyError;

    fn from_str(text: &str) -> Result<Self, ParsePolicyError> {
        let mut parser = Parser { text, at: 0, leaves: 0 };
        if text.len() > LONGEST {
            return Err(parser.error(format!("it has {} bytes; at most {LONGEST} are read", text.len())));
        }
        let policy = parser.policy(0)?;
        match parser.next() {
            "" => Ok(policy),
            more => Err(parser.error(format!("expected the end, found '{}'", short(more)))),
        }
    }
}

struct Parser<'a> {
    text: &'a str,
    /// The byte to go on from.
    at: usize,
    leaves: usize,
}

impl<'a> Parser<'a> {
    fn error(&self, what: impl Into<String>) -> ParsePolicyError {
        let before = self.text.get(..self.at).unwrap_or(self.text);
        ParsePolicyError { at: before.chars().count() + 1, what: what.into() }
    }

    /// The next word or sign, empty at the end. The parser stays before it.
    fn next(&mut self) -> &'a str {
        let rest = &self.text[self.at..];
        self.at += rest.len() - rest.trim_start_matches([' ', '\t', '\n', '\r']).len();
        let rest = &self.text[self.at..];
        let is_word = |letter: char| letter.is_ascii_alphanumeric() || letter == '-' || letter == '_';
        let len = match rest.find(|letter: char| !is_word(letter)) {
            Some(0) => rest.chars().next().map_or(0, char::len_utf8),
            Some(len) => len,
            None => rest.len(),
        };
        &rest[..len]
    }

    fn pass(&mut self, sign: &str) -> Result<(), ParsePolicyError> {
        match self.next() {
            found if found == sign => {
                self.at += sign.len();
                Ok(())
            }
            "" => Err(self.error(format!("expected '{sign}', found the end"))),
            found => Err(self.error(format!("expected '{sign}', found '{}'", short(found)))),
        }
    }

    fn policy(&mut self, depth: usize) -> Result<Policy, ParsePolicyError> {
        let word = self.next();
        if depth > DEEPEST {
            return Err(self.error(format!("it is nested more than {DEEPEST} deep")));
        }
        if word.bytes().next().is_some_and(|first| first.is_ascii_digit()) {
            return self.threshold(word, depth);
        }
        match word {
            "any" => {
                self.pass("any")?;
                let (_, of) = self.list(depth)?;
                Ok(any(of))
            }
            "all" => {
                self.pass("all")?;
                let (at, of) = self.list(depth)?;
                self.at_least(at, of.len(), of)
            }
            "" => Err(self.error("expected a leaf's name, 'any', 'all' or 'N of', found the end")),
            word => {
                let name = word.parse().map_err(|why| self.error(format!("'{}': {why}", short(word))))?;
                self.leaves += 1;
                if self.leaves > MOST_LEAVES {
                    return Err(self.error(format!("it has more than {MOST_LEAVES} leaves")));
                }
                self.pass(word)?;
                Ok(Policy::Leaf(name))
            }
        }
    }

    fn threshold(&mut self, word: &str, depth: usize) -> Result<Policy, ParsePolicyError> {
        let least: usize = word.parse().map_err(|_| self.error(format!("'{word}' is not a number of shares")))?;
        let number_at = self.at;
        self.pass(word)?;
        self.pass("of")?;
        let (at, of) = self.list(depth)?;
        if !(1..=of.len()).contains(&least) {
            self.at = number_at;
            return Err(self.error(format!("{least} of {} cannot be: expected 1 to {}", of.len(), of.len())));
        }
        self.at_least(at, least, of)
    }

    /// A list in brackets, and where it begins.
    fn list(&mut self, depth: usize) -> Result<(usize, Vec<Policy>), ParsePolicyError> {
        self.pass("(")?;
        let at = self.at;
        let mut of = vec![self.policy(depth + 1)?];
        while self.next() == "," {
            self.pass(",")?;
            of.push(self.policy(depth + 1)?);
        }
        self.pass(")")?;
        Ok((at, of))
    }

    /// One leaf must not count twice: `2 of (a, a)` would look like two and be one.
    fn at_least(&mut self, at: usize, least: usize, of: Vec<Policy>) -> Result<Policy, ParsePolicyError> {
        if least == 1 {
            return Ok(any(of));
        }
        let mut seen = BTreeSet::new();
        for leaf in of.iter().flat_map(Policy::leaves) {
            if !seen.insert(leaf) {
                let what = format!("the leaf '{leaf}' is part of two shares of one threshold, so it would count twice");
                self.at = at;
                return Err(self.error(what));
            }
        }
        Ok(Policy::Threshold { least, of })
    }
}

/// One of these: without those that are there already.
fn any(of: Vec<Policy>) -> Policy {
    let mut flat: Vec<Policy> = Vec::new();
    let inner = of.into_iter().flat_map(|policy| match policy {
        Policy::Any(of) => of,
        one => vec![one],
    });
    for policy in inner {
        if !flat.contains(&policy) {
            flat.push(policy);
        }
    }
    if flat.len() == 1 { flat.remove(0) } else { Policy::Any(flat) }
}

/// A word of somebody else's, as far as a message needs it.
fn short(word: &str) -> String {
    printable(&word.chars().take(LONGEST_NAME).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(text: &str) -> String {
        let policy: Policy = text.parse().unwrap();
        let printed = policy.to_string();
        assert_eq!(printed.parse::<Policy>().unwrap(), policy, "{printed}");
        printed
    }

    #[test]
    fn what_means_the_same_is_printed_as_the_same() {
        let cases = [
            ("any(escrow,all(tpm,2 of(t1,t2,t3)))", "any(escrow, all(tpm, 2 of (t1, t2, t3)))"),
            (" 2 of ( a , b ) ", "all(a, b)"),
            ("1 of (a, b)", "any(a, b)"),
            ("any(a, any(b, 1 of (c, a)))", "any(a, b, c)"),
            ("all(any(a))", "a"),
            ("any(all(tpm, t1), all(tpm, t2))", "any(all(tpm, t1), all(tpm, t2))"),
        ];
        for (text, expected) in cases {
            assert_eq!(printed(text), expected);
        }
        assert_eq!(Policy::default().to_string(), "any(owner, escrow, hosts)");
        assert_eq!("any(owner, escrow, hosts)".parse::<Policy>().unwrap(), Policy::default());
    }

    #[test]
    fn a_text_that_is_no_policy_is_told_with_its_place() {
        let deep = format!("{}a{}", "any(".repeat(5), ")".repeat(5));
        let many = format!("any({})", vec!["a"; 65].join(", "));
        let cases = [
            ("", 1, "found the end"),
            ("any(a", 6, "expected ')'"),
            ("any(a b)", 7, "found 'b'"),
            ("any()", 5, "a leaf's name"),
            ("4 of (a, b, c)", 1, "expected 1 to 3"),
            ("0 of (a, b)", 1, "expected 1 to 2"),
            ("99999999999999999999999 of (a, b)", 1, "not a number"),
            ("2x of (a, b)", 1, "not a number"),
            ("any(a, of)", 8, "none of: any, all, of"),
            ("any(a, Bee)", 8, "lower case"),
            ("ä", 1, "lower case"),
            ("2 of (a, b) c", 13, "expected the end"),
            ("2 of (a, a)", 7, "count twice"),
            ("2 of (a, any(b, a))", 7, "count twice"),
            (deep.as_str(), 21, "more than 4 deep"),
            (many.as_str(), 197, "more than 64 leaves"),
        ];
        for (text, at, what) in cases {
            let error = text.parse::<Policy>().unwrap_err();
            assert_eq!(error.at, at, "{text}: {error}");
            assert!(error.what.contains(what), "{text}: {error}");
        }
        assert!(" ".repeat(5000).parse::<Policy>().unwrap_err().what.contains("4096"));
    }

    #[test]
    fn a_policy_is_met_by_enough_leaves() {
        let policy: Policy = "any(escrow, all(tpm, 2 of (t1, t2, t3)))".parse().unwrap();
        let met = |leaves: &[&str]| policy.is_met_by(&|leaf| leaves.contains(&leaf.as_str()));
        assert!(met(&["escrow"]) && met(&["tpm", "t1", "t3"]));
        assert!(!met(&["t1", "t2", "t3"]) && !met(&["tpm", "t2"]) && !met(&[]));
    }
}
