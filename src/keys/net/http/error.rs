//! Why there was no answer.

use std::{borrow::Cow, time::Duration};

use reqwest::Url;

use super::Repeat;
use crate::base::{
    advice::Advice,
    chain::{causes, chain},
    exit::Exit,
    key::SecretMemoryError,
};

/// There was no answer.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// Without TLS, to another host than this.
    #[error("{0} is not https; only a server on this host may be used without TLS")]
    Insecure(Url),
    /// That is no URL.
    #[error("'{0}' is not a URL")]
    Url(String),
    /// No connection.
    #[error("cannot connect to {url}")]
    Connect {
        /// Where to.
        url: Url,
        #[source]
        source: Bottom,
    },
    /// It took too long.
    #[error("{url} did not answer within {:.1} s", .after.as_secs_f32())]
    TimedOut { url: Url, after: Duration },
    /// It was not even asked.
    #[error("did not ask {url}: no time was left")]
    NoTime { url: Url },
    /// Others were faster.
    #[error("the answer is not needed any more")]
    NotNeeded,
    /// The connection broke.
    #[error("the connection to {url} broke during the answer")]
    Broken {
        url: Url,
        #[source]
        source: Bottom,
    },
    /// It did not end.
    #[error("the answer of {url} is longer than the limit of {most_bytes} bytes")]
    TooLong { url: Url, most_bytes: usize },
    /// The client could not be set up.
    #[error("cannot set up the HTTP client")]
    Client(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// No memory for an answer.
    #[error(transparent)]
    Memory(#[from] SecretMemoryError),
}

impl Advice for HttpError {
    fn exit(&self) -> Exit {
        match self {
            Self::Insecure(_) | Self::Url(_) => Exit::Config,
            Self::TooLong { .. } => Exit::NoSealedKey,
            Self::Client(_) => Exit::System,
            Self::Memory(error) => error.exit(),
            Self::Connect { .. }
            | Self::TimedOut { .. }
            | Self::NoTime { .. }
            | Self::NotNeeded
            | Self::Broken { .. } => Exit::StoreUnavailable,
        }
    }

    fn next_step(&self) -> Option<Cow<'static, str>> {
        let step = match self {
            error if error.is_certificate() => {
                "check the server's certificate, this host's clock, and 'cacert' in clouds.yaml (the authority that signed it)"
            }
            Self::Insecure(_) => "use an https URL",
            Self::Connect { .. } | Self::TimedOut { .. } | Self::NoTime { .. } | Self::Broken { .. } => {
                "check that the server runs and that this host can reach it; -v shows every try"
            }
            Self::TooLong { .. } => {
                "check the URL: another server than the key store may answer there, or the key store may lie"
            }
            Self::Url(_) => "check the URLs in clouds.yaml and in the configuration",
            Self::Client(_) | Self::NotNeeded => return None,
            Self::Memory(error) => return error.next_step(),
        };
        Some(step.into())
    }
}

/// What is at the bottom of an HTTP library's error: the layers above it only say that they passed it on.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Bottom(String);

impl Bottom {
    pub(super) fn of(error: &reqwest::Error) -> Self {
        // By the kernel, a timer or TLS: each says it in other words.
        if error.is_timeout() {
            return Self("operation timed out".to_owned());
        }
        let texts: Vec<String> = causes(error).map(ToString::to_string).collect();
        // OpenSSL repeats itself at the end, less the reason.
        let last = texts.windows(2).rev().find(|pair| !pair[0].contains(&pair[1])).map(|pair| &pair[1]);
        let text = last.or(texts.first()).cloned().unwrap_or_default();
        Self(openssl_reason(&text).unwrap_or(text))
    }
}

/// "error:CODE:LIBRARY:FUNCTION:REASON:FILE:LINE:MORE" -> "REASON MORE": the rest says where in OpenSSL it was noticed.
fn openssl_reason(text: &str) -> Option<String> {
    let mut fields = text.strip_prefix("error:")?.splitn(7, ':');
    let reason = fields.nth(3)?;
    let more = fields.nth(2)?.trim();
    Some(format!("{reason} {more}").trim_end().to_owned())
}

impl HttpError {
    /// Whether another try may have more luck.
    pub(super) fn is_temporary(&self) -> bool {
        matches!(self, Self::Connect { .. } | Self::TimedOut { .. } | Self::Broken { .. }) && !self.is_certificate()
    }

    pub(super) fn may_be_repeated(&self, repeat: Repeat) -> bool {
        self.is_temporary()
            && match repeat {
                Repeat::Safe => true,
                Repeat::UnlessSlow => !matches!(self, Self::TimedOut { .. }),
                // Without a connection the server never saw it.
                Repeat::Unsent => matches!(self, Self::Connect { .. }),
                Repeat::Never => false,
            }
    }

    /// Whether the server's certificate is at fault.
    pub fn is_certificate(&self) -> bool {
        matches!(self, Self::Connect { .. }) && chain(self).contains("certificate")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_openssls_errors_the_reason_is_told() {
        let text = "error:0A000086:SSL routines:tls_post_process_server_certificate:certificate verify failed:\
            ../ssl/statem/statem_clnt.c:1889: (IP address mismatch)";
        assert_eq!(openssl_reason(text).unwrap(), "certificate verify failed (IP address mismatch)");
        let text = "error:0A00010B:SSL routines:ssl3_get_record:wrong version number:../ssl/record/ssl3_record.c:354:";
        assert_eq!(openssl_reason(text).unwrap(), "wrong version number");
        assert_eq!(openssl_reason("error: something else"), None);
    }
}
