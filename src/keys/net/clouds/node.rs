//! YAML as it stands in clouds.yaml: what is not looked at may be anything, and every text may be a secret.

use std::{collections::BTreeMap, fmt, str::FromStr};

use granit_parser::{Event, Marker, Parser, ScalarStyle, StrInput};
use zeroize::Zeroizing;

/// What a plain text has to be for no value.
const NULLS: [&str; 5] = ["", "~", "null", "Null", "NULL"];
/// In one file, aliases counted as what they stand for.
const MOST_NODES: usize = 100_000;

/// A value.
#[derive(Clone, Default)]
pub(super) enum Node {
    #[default]
    Null,
    /// Text, a number or a truth value: a password may look like either.
    Text(Zeroizing<String>),
    List(Vec<Self>),
    Map(BTreeMap<String, Self>),
}

impl Node {
    /// The members of a map; `None` if it is something else.
    pub fn map(&self) -> Option<&BTreeMap<String, Self>> {
        match self {
            Self::Map(members) => Some(members),
            _ => None,
        }
    }

    /// A member of a map, unless it is null.
    pub fn get(&self, name: &str) -> Option<&Self> {
        self.map()?.get(name).filter(|node| !matches!(node, Self::Null))
    }

    /// Text that says something.
    pub fn text(&self) -> Option<&str> {
        match self {
            Self::Text(text) if !text.is_empty() => Some(text),
            _ => None,
        }
    }

    /// One text, or several in a list.
    pub fn texts(&self) -> Option<Vec<String>> {
        match self {
            Self::List(nodes) => nodes.iter().map(|node| node.text().map(str::to_owned)).collect(),
            node => Some(vec![node.text()?.to_owned()]),
        }
    }

    /// It and all that is in it.
    fn count(&self) -> usize {
        match self {
            Self::Null | Self::Text(_) => 1,
            Self::List(nodes) => 1 + nodes.iter().map(Self::count).sum::<usize>(),
            Self::Map(members) => 1 + members.values().map(Self::count).sum::<usize>(),
        }
    }

    /// Takes over what another one says; of maps, member by member.
    pub fn merge(&mut self, other: &Self) {
        match (self, other) {
            (_, Self::Null) => {}
            (Self::Map(own), Self::Map(others)) => {
                others.iter().for_each(|(name, node)| own.entry(name.clone()).or_default().merge(node));
            }
            (own, other) => *own = other.clone(),
        }
    }

    /// With the names of members as openstacksdk knows them: `_` for `-`, at each level.
    pub fn normalized(self) -> Self {
        match self {
            Self::Map(members) => {
                Self::Map(members.into_iter().map(|(name, node)| (name.replace('-', "_"), node.normalized())).collect())
            }
            other => other,
        }
    }
}

impl FromStr for Node {
    type Err = Place;

    /// The one document of a file. Aliases and merged maps (`<<`) are as PyYAML has them; nothing else of a tag is looked at.
    fn from_str(text: &str) -> Result<Self, Place> {
        let events = Parser::new_from_str(text);
        let mut reader = Reader { events, at: Place { line: 1, column: 1 }, named: BTreeMap::new(), nodes: 0 };
        let mut document = Self::Null;
        loop {
            match reader.next()? {
                Event::StreamStart | Event::DocumentEnd => {}
                Event::DocumentStart(..) if matches!(document, Self::Null) => {
                    let event = reader.next()?;
                    document = reader.node(event)?;
                }
                Event::StreamEnd => return Ok(document),
                _ => return Err(reader.at),
            }
        }
    }
}

/// Where a text is no YAML, or more than is read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    line: usize,
    column: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "see line {}, column {}", self.line, self.column)
    }
}

struct Reader<'a> {
    events: Parser<'a, StrInput<'a>>,
    at: Place,
    named: BTreeMap<usize, Node>,
    nodes: usize,
}

impl<'a> Reader<'a> {
    fn next(&mut self) -> Result<Event<'a>, Place> {
        let place = |marker: &Marker| Place { line: marker.line(), column: marker.col() + 1 };
        let (event, span) = self.events.next().ok_or(self.at)?.map_err(|error| place(error.marker()))?;
        self.at = place(&span.start);
        Ok(event)
    }

    fn node(&mut self, event: Event<'_>) -> Result<Node, Place> {
        let (node, name) = match event {
            Event::Alias(name) => {
                // A few aliases of aliases would be millions of nodes.
                self.count(self.named.get(&name).map_or(0, Node::count))?;
                (self.named.get(&name).cloned().ok_or(self.at)?, 0)
            }
            Event::Scalar(text, style, name, tag) => {
                let is_null = style == ScalarStyle::Plain && tag.is_none() && NULLS.contains(&&*text);
                (if is_null { Node::Null } else { Node::Text(Zeroizing::new(text.into_owned())) }, name)
            }
            Event::SequenceStart(_, name, _) => (self.list()?, name),
            Event::MappingStart(_, name, _) => (self.members()?, name),
            _ => return Err(self.at),
        };
        self.count(1)?;
        if name != 0 {
            self.named.insert(name, node.clone());
        }
        Ok(node)
    }

    fn count(&mut self, more: usize) -> Result<(), Place> {
        self.nodes += more;
        if self.nodes > MOST_NODES { Err(self.at) } else { Ok(()) }
    }

    fn list(&mut self) -> Result<Node, Place> {
        let mut nodes = Vec::new();
        loop {
            match self.next()? {
                Event::SequenceEnd => return Ok(Node::List(nodes)),
                event => nodes.push(self.node(event)?),
            }
        }
    }

    fn members(&mut self) -> Result<Node, Place> {
        let (mut members, mut merged) = (BTreeMap::new(), Vec::new());
        loop {
            let name = match self.next()? {
                Event::MappingEnd => break,
                event => self.node(event)?,
            };
            let event = self.next()?;
            match (name.text(), self.node(event)?) {
                (Some("<<"), Node::List(nodes)) => merged.extend(nodes),
                (Some("<<"), node) => merged.push(node),
                (Some(name), node) => drop(members.insert(name.to_owned(), node)),
                (None, _) => {}
            }
        }
        for (name, node) in merged.iter().filter_map(Node::map).flatten() {
            members.entry(name.clone()).or_insert_with(|| node.clone());
        }
        Ok(Node::Map(members))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Node {
        text.parse().unwrap_or_else(|place| panic!("{place}"))
    }

    #[test]
    fn a_text_is_what_stands_there() {
        let node = read("a: 0123\nb: 2.10\nc: 'null'\nd: null\ne: ~\nf:\ng: No\nh: !!str null\ni: ''\n7: seven\n");
        let texts = [("a", "0123"), ("b", "2.10"), ("c", "null"), ("g", "No"), ("h", "null"), ("7", "seven")];
        for (name, text) in texts {
            assert_eq!(node.get(name).and_then(Node::text), Some(text), "{name}");
        }
        assert!(["d", "e", "f"].iter().all(|name| node.get(name).is_none()));
        assert!(node.get("i").is_some_and(|node| node.text().is_none()));
    }

    #[test]
    fn a_map_is_merged_under_what_it_says_itself() {
        let node = read("base: &base {a: 1, b: 2}\none: {<<: *base, b: 3}\ntwo:\n  <<: [*base, {c: 4}]\n");
        let text = |map: &str, name: &str| node.get(map)?.get(name)?.text().map(str::to_owned);
        assert_eq!((text("one", "a").as_deref(), text("one", "b").as_deref()), (Some("1"), Some("3")));
        assert_eq!((text("two", "b").as_deref(), text("two", "c").as_deref()), (Some("2"), Some("4")));
    }

    #[test]
    fn what_is_no_yaml_or_too_much_is_refused_with_its_place() {
        let place = |text: &str| text.parse::<Node>().map(|_| ()).unwrap_err().to_string();
        assert_eq!(place("a: 1\nb: ]\n"), "see line 2, column 4");
        assert!(place("a: *missing\n").starts_with("see line 1"));
        assert!(place("a: 1\n---\nb: 2\n").starts_with("see line 2"));
        let mut laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for level in 1..12 {
            let aliases = vec![format!("*a{}", level - 1); 10].join(", ");
            laughs += &format!("a{level}: &a{level} [{aliases}]\n");
        }
        assert!(place(&laughs).starts_with("see line 5"), "{}", place(&laughs));
        assert!(place(&"[".repeat(100_000)).starts_with("see line 1"));
    }
}
