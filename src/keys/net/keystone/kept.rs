//! A token that outlives the command which has logged in: the next attach of this boot need not.
//!
//! Whoever has the token acts as this host, so it is nowhere but in the kernel's keyring, where this user alone can read it, and
//! not for longer than it is good. It serves the same user with the same secret only, at the same cloud. One that is refused is
//! removed, and the host logs in once.

use std::sync::atomic::{AtomicBool, Ordering};

use openssl::{asn1::Asn1Time, sha::Sha256};
use reqwest::{Url, header::HeaderValue};
use serde::Deserialize;
use serde_json::json;

use super::{Cloud, Credentials, HOLE, Token, Wanted, fill};
use crate::{
    base::{chain::chain, hex, key::SecretBytes},
    keys::net::http,
    sys::kernel_keyring,
};

/// A token with the URLs of its service.
const MOST_BYTES: usize = 16 << 10;
/// A withdrawal that the service is not told of ends with this.
const LONGEST_SECONDS: u64 = 3600;
/// So much less than it is good for: what is under way is not to be refused.
const SPARE_SECONDS: u64 = 60;

/// Where the kernel keeps it.
pub(super) struct Kept {
    description: String,
    /// Digest of all that it is for, the secret among it.
    of: String,
    /// It is not taken again: the service has refused one.
    refused: AtomicBool,
}

/// What the kernel keeps.
#[derive(Deserialize)]
struct Written<'a> {
    of: &'a str,
    urls: Vec<String>,
    token: &'a str,
}

impl Kept {
    /// `None` for a token that this host does not get by itself.
    pub fn of(cloud: &Cloud, service: &str, wanted: &Wanted, urls: &[Url]) -> Option<Self> {
        let (user, secret) = match &cloud.credentials {
            Credentials::Password { user, password, project } => (json!([user.to_json(), project.to_json()]), password),
            Credentials::ApplicationCredential { id: Ok(id), secret } => (json!(id), secret),
            Credentials::ApplicationCredential { id: Err((name, user)), secret } => {
                (json!([name, user.to_json()]), secret)
            }
            Credentials::Token(_) | Credentials::Caller(_) | Credentials::TempAuth { .. } => return None,
        };
        let urls: Vec<_> = urls.iter().map(Url::as_str).collect();
        let what = json!([cloud.auth_url, service, format!("{wanted:?}"), urls, user]).to_string();
        let digest = |secret: &[u8]| {
            let mut digest = Sha256::new();
            digest.update(what.as_bytes());
            digest.update(secret);
            hex::encode(&digest.finish())
        };
        let description = format!("cryptattach:token:{}", &digest(&[])[..32]);
        Some(Self { description, of: digest(secret.expose()), refused: AtomicBool::default() })
    }

    /// What an earlier process has left.
    pub fn token(&self) -> Option<Token> {
        if self.refused.load(Ordering::Relaxed) {
            return None;
        }
        let (kept, _) = kernel_keyring::get(&self.description, MOST_BYTES).ok()??;
        let written: Written<'_> = serde_json::from_slice(kept.expose()).ok()?;
        if written.of != self.of {
            return None;
        }
        let value = http::secret_header(SecretBytes::copy_of(written.token.as_bytes()).ok()?)?;
        let urls = written.urls.iter().map(|url| http::url(url).ok()).collect::<Option<_>>()?;
        Some(Token { value, keep: None, is_kept: true, service: None, urls })
    }

    /// Leaves it to the next. Without it that one logs in.
    pub fn keep(&self, token: &Token) {
        let Some(seconds) = token.keep else { return };
        let urls: Vec<_> = token.urls.iter().map(Url::as_str).collect();
        let json = json!({"of": self.of, "urls": urls, "token": HOLE});
        let written = secret(&token.value).and_then(|token| fill(&json, &token).ok());
        let Some(written) = written.filter(|written| written.len() <= MOST_BYTES) else { return };
        if let Err(error) = kernel_keyring::put_for(&self.description, &written, Some(seconds)) {
            tracing::debug!("the token is not kept: {}", chain(&error));
        }
    }

    /// The service refuses it.
    pub fn refused(&self) {
        self.refused.store(true, Ordering::Relaxed);
        if let Err(error) = kernel_keyring::remove(&self.description) {
            tracing::debug!("the refused token stays: {}", chain(&error));
        }
    }
}

fn secret(value: &HeaderValue) -> Option<SecretBytes> {
    SecretBytes::copy_of(value.as_bytes()).ok()
}

/// How many seconds a new token may be kept, by Keystone's own clock; `None` if it does not say.
pub(super) fn lifetime(issued: Option<&str>, expires: Option<&str>) -> Option<usize> {
    // 2026-11-28T10:15:28.000000Z
    let time = |text: &str| {
        let whole = text.strip_suffix('Z')?.split('.').next()?;
        let digits: String = whole.chars().filter(char::is_ascii_digit).collect();
        Asn1Time::from_str(&format!("{digits}Z")).ok()
    };
    let (issued, expires) = (time(issued?)?, time(expires?)?);
    let good = issued.diff(&expires).ok()?;
    let seconds = i64::from(good.days) * 86_400 + i64::from(good.secs);
    let seconds = u64::try_from(seconds).ok()?.min(LONGEST_SECONDS + SPARE_SECONDS).saturating_sub(SPARE_SECONDS);
    usize::try_from(seconds).ok().filter(|seconds| *seconds > 0)
}
