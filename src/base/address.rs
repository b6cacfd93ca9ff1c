//! Addresses of hosts, as configurations and protocols write them. Nothing is looked up.

use std::{fmt, net::IpAddr, str::FromStr};

use serde::{Serialize, Serializer};

/// How a host is addressed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostAddress {
    /// By its IP address; an IPv4 address in an IPv6 one is the IPv4 address, and no zone is kept.
    Ip(IpAddr),
    /// By a name, in lower case and without the dot at its end.
    Name(String),
}

/// A host, and the port at which it serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    pub host: HostAddress,
    /// The port, if it is known.
    pub port: Option<u16>,
}

/// A text that addresses no host.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not a host address")]
pub struct ParseAddressError(String);

impl FromStr for HostAddress {
    type Err = ParseAddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let name = text.strip_suffix('.').unwrap_or(text);
        // The zone tells links of the host that wrote it, not hosts (RFC 4007 section 11).
        let address = name.split_once('%').map_or(name, |(address, _zone)| address);
        if let Ok(address) = address.parse::<IpAddr>() {
            return Ok(Self::Ip(address.to_canonical()));
        }
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
        // 253: the longest name (RFC 1035 section 2.3.4).
        if name.split('.').any(str::is_empty) || name.len() > 253 || !name.bytes().all(fits) {
            return Err(ParseAddressError(text.chars().take(80).collect()));
        }
        Ok(Self::Name(name.to_ascii_lowercase()))
    }
}

impl FromStr for Endpoint {
    type Err = ParseAddressError;

    /// `HOST`, `HOST:PORT`, `[IPV6]` or `[IPV6]:PORT`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Ok(host) = text.parse() {
            return Ok(Self { host, port: None });
        }
        let wrong = || ParseAddressError(text.chars().take(80).collect());
        let (host, port) = match text.strip_prefix('[').map(|rest| rest.split_once(']').ok_or_else(wrong)) {
            Some(bracketed) => bracketed?,
            None => text.split_at(text.rfind(':').ok_or_else(wrong)?),
        };
        let port = match port {
            "" => None,
            port => Some(port.strip_prefix(':').and_then(|port| port.parse().ok()).ok_or_else(wrong)?),
        };
        Ok(Self { host: host.parse().map_err(|_| wrong())?, port })
    }
}

impl fmt::Display for HostAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(address) => address.fmt(f),
            Self::Name(name) => f.write_str(name),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.host, self.port) {
            (host, None) => host.fmt(f),
            (HostAddress::Ip(IpAddr::V6(address)), Some(port)) => write!(f, "[{address}]:{port}"),
            (host, Some(port)) => write!(f, "{host}:{port}"),
        }
    }
}

impl Serialize for Endpoint {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_brought_to_one_form() {
        for (text, expected) in [
            ("10.0.0.5", "10.0.0.5"),
            ("10.0.0.5:3260", "10.0.0.5:3260"),
            ("::ffff:10.0.0.5", "10.0.0.5"),
            ("[::ffff:10.0.0.5]:3260", "10.0.0.5:3260"),
            ("FD00::0005", "fd00::5"),
            ("[fd00:0::5]:3260", "[fd00::5]:3260"),
            ("[fe80::1%eth0]:3260", "[fe80::1]:3260"),
            ("[fd00::5]", "fd00::5"),
            ("Storage1.Example.:3260", "storage1.example:3260"),
        ] {
            assert_eq!(text.parse::<Endpoint>().expect(text).to_string(), expected);
        }
    }

    #[test]
    fn what_addresses_no_host_is_refused() {
        for text in ["", ":", ":3260", "a:", "a:65536", "a:-1", "[fd00::5", "[fd00::5]3260", "a b", "a/b:1", "u@a:1"] {
            assert!(text.parse::<Endpoint>().is_err(), "{text}");
        }
        assert!("a".repeat(300).parse::<HostAddress>().is_err());
        // Each dot at the end would make another name of the same host.
        for text in [".", "..", "a..", ".a", "a..b", "10.0.0.5.."] {
            assert!(text.parse::<HostAddress>().is_err(), "{text}");
        }
    }
}
