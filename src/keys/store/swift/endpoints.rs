//! What an object store says of where its replicas are: the answer of Swift's list_endpoints middleware.

use serde_json::Value;

use crate::base::{
    address::HostAddress,
    key::{Replica, Ring, is_device_name},
};

/// More than any ring has replicas, handoffs included.
const MOST_REPLICAS: usize = 256;
/// As many URLs of the greatest length: an object's name may have 1024 bytes, each written as three.
const MOST_BYTES: usize = MOST_REPLICAS * 8192;

/// An answer that does not say where the replicas are.
#[derive(Debug, thiserror::Error)]
pub enum MalformedEndpoints {
    /// It is longer than any such answer.
    #[error("the list of endpoints has {0} bytes, too many for a ring")]
    TooLong(usize),
    /// It is not JSON.
    #[error("the list of endpoints is not JSON")]
    NotJson(#[from] serde_json::Error),
    /// It is JSON of another form.
    #[error("the list of endpoints is neither a list of URLs nor an object with such a list, 'endpoints'")]
    NotAList,
    /// It has no replica.
    #[error("the list of endpoints is empty")]
    Empty,
    /// It has more replicas than any ring.
    #[error("the list of endpoints has {0} entries, too many for a ring")]
    TooMany(usize),
    /// One of the URLs is not that of a replica.
    #[error("{url:?} in the list of endpoints is not the URL of a replica: {why}")]
    Url {
        /// The URL, or its beginning.
        url: String,
        why: &'static str,
    },
}

/// The replicas that an answer of list_endpoints names, each device once.
///
/// Version 1 is a list of URLs, `http://HOST:PORT/DEVICE/PARTITION/ACCOUNT[/CONTAINER[/OBJECT]]`; version 2 an object with
/// that list as `endpoints` (swift.common.middleware.list_endpoints). IPv6 addresses may stand in brackets or, as Swift
/// writes them, without.
pub fn parse_endpoints(json: &[u8], ring: Ring) -> Result<Vec<Replica>, MalformedEndpoints> {
    if json.len() > MOST_BYTES {
        return Err(MalformedEndpoints::TooLong(json.len()));
    }
    let urls = match serde_json::from_slice(json)? {
        Value::Array(urls) => urls,
        Value::Object(mut answer) => match answer.remove("endpoints") {
            Some(Value::Array(urls)) => urls,
            _ => return Err(MalformedEndpoints::NotAList),
        },
        _ => return Err(MalformedEndpoints::NotAList),
    };
    match urls.len() {
        0 => return Err(MalformedEndpoints::Empty),
        1..=MOST_REPLICAS => {}
        more => return Err(MalformedEndpoints::TooMany(more)),
    }
    let mut replicas = Vec::new();
    for url in &urls {
        let url = url.as_str().ok_or(MalformedEndpoints::NotAList)?;
        let wrong = |why| MalformedEndpoints::Url { url: url.chars().take(80).collect(), why };
        let replica = replica(url, ring).map_err(wrong)?;
        if !replicas.contains(&replica) {
            replicas.push(replica);
        }
    }
    Ok(replicas)
}

fn replica(url: &str, ring: Ring) -> Result<Replica, &'static str> {
    let rest = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://")).ok_or("it is not HTTP")?;
    let mut parts = rest.split('/');
    let server = parts.next().unwrap_or_default();
    let device = parts.next().ok_or("it has no device")?;
    let partition = parts.next().ok_or("it has no partition")?;
    if parts.next().is_none_or(str::is_empty) {
        return Err("it has no account");
    }
    if partition.is_empty() || !partition.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err("its partition is not a number");
    }
    let (host, port) = server.rsplit_once(':').ok_or("it has no port")?;
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let host: HostAddress = host.parse().map_err(|_| "it has no host")?;
    let port = port.parse().map_err(|_| "its port is not a number")?;
    if !is_device_name(device) {
        return Err("its device's name is not allowed in a ring");
    }
    Ok(Replica { ring, host: host.to_string(), port, device: device.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(json: &str) -> Vec<String> {
        let replicas = parse_endpoints(json.as_bytes(), Ring::Object).expect(json);
        replicas.iter().map(|replica| format!("{}|{}|{}", replica.host, replica.port, replica.device)).collect()
    }

    #[test]
    fn both_versions_of_the_answer_are_read() {
        let urls = r#"["http://10.0.0.5:6200/sdb1/12/AUTH_x/c/o", "http://10.0.0.6:6210/sdc1/12/AUTH_x/c/o%2Fp"]"#;
        let expected = ["10.0.0.5|6200|sdb1", "10.0.0.6|6210|sdc1"];
        assert_eq!(parsed(urls), expected);
        let headers = r#"{"X-Backend-Storage-Policy-Index": "1"}"#;
        assert_eq!(parsed(&format!(r#"{{"headers": {headers}, "endpoints": {urls}}}"#)), expected);
    }

    #[test]
    fn accounts_names_and_ipv6_with_and_without_brackets_are_read() {
        let urls = r#"["http://[fd00::5]:6202/d1/9/AUTH_x", "http://fd00::6:6202/d1/9/AUTH_x", "http://Node1:80/d-2/9/A",
                       "http://[::ffff:10.0.0.5]:6202/d1/9/AUTH_x", "http://10.0.0.5:6202/d1/9/AUTH_y"]"#;
        assert_eq!(parsed(urls), ["fd00::5|6202|d1", "fd00::6|6202|d1", "node1|80|d-2", "10.0.0.5|6202|d1"]);
    }

    #[test]
    fn urls_that_name_no_replica_are_refused() {
        for url in [
            "",
            "ftp://10.0.0.5:6200/sdb1/12/a",
            "http://10.0.0.5/sdb1/12/a",
            "http://10.0.0.5:6200",
            "http://10.0.0.5:6200/sdb1",
            "http://10.0.0.5:6200/sdb1/12",
            "http://10.0.0.5:6200/sdb1/12/",
            "http://10.0.0.5:6200/../12/a",
            "http://10.0.0.5:6200//12/a",
            "http://10.0.0.5:6200/%2e%2e/12/a",
            "http://10.0.0.5:6200/sd b1/12/a",
            "http://10.0.0.5:6200/sdb1/x/a",
            "http://10.0.0.5:66666/sdb1/12/a",
            "http://user@10.0.0.5:6200/sdb1/12/a",
            "http://:6200/sdb1/12/a",
            "http://[fd00::5:6200/sdb1/12/a",
        ] {
            let json = serde_json::to_vec(&[url]).expect("JSON");
            let error = parse_endpoints(&json, Ring::Object).expect_err(url);
            assert!(matches!(&error, MalformedEndpoints::Url { .. }), "{url}: {error}");
        }
    }

    #[test]
    fn other_answers_are_refused() {
        let url = "http://10.0.0.5:6200/sdb1/12/a";
        let many = serde_json::to_string(&vec![url; MOST_REPLICAS + 1]).expect("JSON");
        for (json, begins) in [
            ("", "the list of endpoints is not JSON"),
            ("{\"endpoints\": 1}", "the list of endpoints is neither"),
            ("{}", "the list of endpoints is neither"),
            ("[1]", "the list of endpoints is neither"),
            ("\"http://10.0.0.5:6200/sdb1/12/a\"", "the list of endpoints is neither"),
            ("[]", "the list of endpoints is empty"),
            (&many, "the list of endpoints has 257 entries"),
            (&" ".repeat(MOST_BYTES + 1), "the list of endpoints has 2097153 bytes"),
        ] {
            let error = parse_endpoints(json.as_bytes(), Ring::Object).expect_err(begins).to_string();
            assert!(error.starts_with(begins), "{error}");
        }
    }
}
