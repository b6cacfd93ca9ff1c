//! YAML as it stands in clouds.yaml: what is not looked at may be anything, and every text may be a secret.

use std::{collections::BTreeMap, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, SeqAccess, Visitor},
};
use zeroize::Zeroizing;

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

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NodeVisitor)
    }
}

struct NodeVisitor;

impl<'de> Visitor<'de> for NodeVisitor {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("YAML")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Node, E> {
        Ok(text(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Node, E> {
        Ok(text(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Node, E> {
        Ok(text(value))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Node, E> {
        Ok(text(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Node, E> {
        Ok(text(value))
    }

    fn visit_string<E>(self, value: String) -> Result<Node, E> {
        Ok(Node::Text(Zeroizing::new(value)))
    }

    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Null)
    }

    fn visit_none<E>(self) -> Result<Node, E> {
        Ok(Node::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
        Node::deserialize(deserializer)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Node, A::Error> {
        let mut nodes = Vec::new();
        while let Some(node) = list.next_element()? {
            nodes.push(node);
        }
        Ok(Node::List(nodes))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node, A::Error> {
        let mut members = BTreeMap::new();
        // A name may look like a number.
        while let Some(name) = map.next_key::<Node>()? {
            let node = map.next_value()?;
            if let Some(name) = name.text() {
                members.insert(name.to_owned(), node);
            }
        }
        Ok(Node::Map(members))
    }
}

fn text(value: impl ToString) -> Node {
    Node::Text(Zeroizing::new(value.to_string()))
}
