//! The time of day, in seconds since 1970-01-01 UTC.

use std::time::{SystemTime, UNIX_EPOCH};

use openssl::asn1::Asn1Time;

/// The present time.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map(|age| age.as_secs()).unwrap_or(0)
}

/// A time for people: "Nov 23 14:35:24 2026 GMT".
pub fn date(seconds: u64) -> String {
    let date = i64::try_from(seconds).ok().and_then(|seconds| Asn1Time::from_unix(seconds).ok());
    date.map_or_else(|| format!("second {seconds}"), |date| date.to_string())
}

#[cfg(test)]
mod tests {
    #[test]
    fn prints_dates() {
        assert_eq!(super::date(1_795_444_524), "Nov 23 14:35:24 2026 GMT");
        assert_eq!(super::date(u64::MAX), "second 18446744073709551615");
    }
}
