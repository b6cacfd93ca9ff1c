//! HTTP with bounds: on every wait, on every answer, on where a request may go.
//!
//! A request is tried until it is answered for good or its time is over; between tries it waits, with jitter, as long as
//! the server asks for. A try that takes too long is heard beside the next ones. Of several servers the second is asked when
//! the first has not answered after a head start, and the first good answer wins (the idea of RFC 8305, section 5).

mod cancel;
mod error;
mod tries;

use std::{
    collections::BTreeSet,
    net::IpAddr,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use futures_util::future::{Either, join_all, select};
use openssl::x509::X509;
use reqwest::{
    Certificate, Client, ClientBuilder, Identity, Method, StatusCode, Url,
    header::{DATE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER},
    redirect::Policy,
    tls::Version,
};
use tokio::{
    runtime::{Builder, Runtime},
    sync::Semaphore,
    time::timeout,
};
use zeroize::Zeroizing;

pub use cancel::Cancel;
pub use error::{Bottom, HttpError};
use tries::{Outcome, Outcomes, Tries};

use crate::{
    base::{chain::chain, key::SecretBytes},
    config::Network,
};

/// How long the first server may think before the next is asked, too.
const HEAD_START: Duration = Duration::from_millis(250);
/// The first pause between tries; each following one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Of the time of a try.
const MOST_DOUBLINGS: u32 = 5;
/// Requests of one client, each with a connection, as of a browser to one server. More of them would wait in a busy server's queue,
/// while connections that have their answer take its places.
const MOST_AT_ONCE: usize = 6;
/// Of a connection. A server has so many places (Swift's proxy 1,024): who waits for one must not wait for an idle one's end.
const LONGEST_IDLE: Duration = Duration::from_secs(1);
const LONGEST_LIMIT: Duration = Duration::from_secs(24 * 3600);

/// One client for all requests of a store: its connections and its time limits.
pub struct Http {
    client: Client,
    /// There until it is dropped.
    runtime: Option<Runtime>,
    limits: Limits,
    /// How often a try's time has doubled: a server that answered too late for one has much to do, and what it is asked anew
    /// it does anew, for nobody.
    doublings: AtomicU32,
    /// Turns of those that ask again because a try took too long: one at a time, and one more for each answer. A server that answers
    /// nothing is not asked for everything again; one that answers some has lost the rest.
    turns: Semaphore,
    /// What is left of [`MOST_AT_ONCE`].
    places: Semaphore,
    /// The end of what all its requests are part of, if that has one.
    end: Option<Instant>,
}

/// What a client shows of itself in TLS.
pub struct ClientIdentity {
    /// Its certificate, and those that lead to an authority (PEM).
    pub chain: Vec<u8>,
    /// Its private key (PKCS #8, PEM).
    pub key: Zeroizing<Vec<u8>>,
}

#[derive(Clone, Copy)]
struct Limits {
    one_try: Duration,
    total: Duration,
}

/// May a request be sent again if nobody knows whether it was carried out?
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Repeat {
    /// Yes: twice is the same as once.
    Safe,
    /// Likewise; but a server that is too slow is not asked again, for there is another way.
    UnlessSlow,
    /// Only if it never reached the server.
    Unsent,
    /// No: nothing depends on the answer.
    Never,
}

impl Repeat {
    /// Whether it may be sent again to a server that says that it cannot now.
    fn after_an_answer(self) -> bool {
        matches!(self, Self::Safe | Self::UnlessSlow)
    }
}

/// A request.
#[derive(Clone)]
pub struct Request {
    pub method: Method,
    /// The same resource on each server that has it, best first.
    pub urls: Vec<Url>,
    pub headers: HeaderMap,
    pub body: Option<Bytes>,
    /// Whether it may be sent twice.
    pub repeat: Repeat,
    /// The longest answer that is read.
    pub most_bytes: usize,
    /// How much of its time has been spent already, on another way to the same end.
    pub spent: Duration,
    /// One try may take all the time that there is: a server that is busy with it is not helped by being asked again.
    pub patient: bool,
    /// It may be sent without TLS: neither it nor its answer is worth reading or changing to others.
    pub in_clear: bool,
}

/// An answer, whatever its status.
pub struct HttpAnswer {
    /// The server that gave it, as part of its URL.
    pub url: Url,
    pub status: StatusCode,
    pub headers: HeaderMap,
    /// The body. It may be a secret, so it is treated as one.
    pub body: SecretBytes,
    /// The request was sent before, and what came of that is not known.
    pub repeated: bool,
}

impl HttpAnswer {
    /// Whether the server is likely to answer otherwise soon (RFC 9110 section 15, RFC 6585 section 4; 498 is
    /// "Slow down" of Swift's ratelimit middleware).
    fn is_temporary(&self) -> bool {
        matches!(self.status.as_u16(), 408 | 429 | 498 | 500 | 502 | 503 | 504)
    }

    /// A header as text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// How long the server asks to wait (RFC 9110 section 10.2.3): seconds, or until a date of its own clock.
    fn retry_after(&self) -> Option<Duration> {
        let date = |text: &str| httpdate::parse_http_date(text).ok();
        let asked = self.header(RETRY_AFTER.as_str())?.trim();
        if let Ok(seconds) = asked.parse() {
            return Some(Duration::from_secs(seconds));
        }
        let its_now = self.header(DATE.as_str()).and_then(date).unwrap_or_else(SystemTime::now);
        Some(date(asked)?.duration_since(its_now).unwrap_or_default())
    }
}

impl Request {
    /// Whether there is no use in another try, or in another server.
    fn is_settled_by(&self, outcome: &Outcome) -> bool {
        match outcome {
            Ok(answer) => !answer.is_temporary() || self.repeat == Repeat::Unsent,
            Err(error) => !error.may_be_repeated(self.repeat) && self.repeat != Repeat::Never,
        }
    }

    /// A request without body that may be repeated.
    pub fn new(method: Method, urls: Vec<Url>, most_bytes: usize) -> Self {
        Self {
            method,
            urls,
            headers: HeaderMap::new(),
            body: None,
            repeat: Repeat::Safe,
            most_bytes,
            spent: Duration::ZERO,
            patient: false,
            in_clear: false,
        }
    }

    /// One that others may read and change: that is of no use to them.
    pub fn in_clear(self) -> Self {
        Self { in_clear: true, ..self }
    }

    /// With one more header.
    pub fn header(mut self, name: &'static str, value: HeaderValue) -> Self {
        self.headers.insert(HeaderName::from_static(name), value);
        self
    }

    /// With a body.
    pub fn body(mut self, kind: &'static str, body: impl Into<Bytes>) -> Self {
        self.body = Some(body.into());
        self.header("content-type", HeaderValue::from_static(kind))
    }

    /// Not to be sent twice.
    pub fn once(mut self) -> Self {
        self.repeat = Repeat::Unsent;
        self
    }
}

/// Parses a URL and refuses one that would carry secrets in the clear.
pub fn url(text: &str) -> Result<Url, HttpError> {
    let url = Url::parse(text).map_err(|_| HttpError::Url(text.to_owned()))?;
    if is_secure(&url) { Ok(url) } else { Err(HttpError::Insecure(url)) }
}

/// The URL of a server, with nothing else in it: no user, no query.
pub fn server(text: &str) -> Option<Url> {
    let fits = |url: &Url| {
        matches!(url.scheme(), "http" | "https")
            && url.has_host()
            && url.username().is_empty()
            && url.password().is_none()
            && url.query().or(url.fragment()).is_none()
    };
    Url::parse(text).ok().filter(fits)
}

/// The name or address of a URL's server, without brackets.
pub fn host(url: &Url) -> &str {
    url.host_str().unwrap_or_default().trim_matches(['[', ']'])
}

fn is_secure(url: &Url) -> bool {
    let host = host(url);
    let loopback = host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    url.scheme() == "https" || (url.scheme() == "http" && loopback)
}

/// A URL below another: its path with one more segment, escaped.
pub fn below(url: &Url, segments: &[&str]) -> Url {
    let mut below = url.clone();
    if let Ok(mut path) = below.path_segments_mut() {
        path.pop_if_empty().extend(segments);
    }
    below
}

/// Request bodies out of secret memory: wiped when the last copy is sent.
pub fn secret_body(secret: SecretBytes) -> Bytes {
    struct Owner(SecretBytes);
    impl AsRef<[u8]> for Owner {
        fn as_ref(&self) -> &[u8] {
            self.0.expose()
        }
    }
    Bytes::from_owner(Owner(secret))
}

/// A secret as a header's value; `None` if it cannot be one.
pub fn secret_header(secret: SecretBytes) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_maybe_shared(secret_body(secret)).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// Whatever the configuration says, there is a bound, and arithmetic with it does not overflow.
fn limited(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(LONGEST_LIMIT).min(LONGEST_LIMIT)
}

fn failed(error: reqwest::Error) -> HttpError {
    HttpError::Client(error.into())
}

fn builder(network: &Network) -> ClientBuilder {
    Client::builder()
        .user_agent(concat!("cryptattach/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(limited(network.connect_seconds))
        .pool_idle_timeout(LONGEST_IDLE)
        .tls_version_min(Version::TLS_1_2)
        // A proxy from the environment would see every token.
        .no_proxy()
        .redirect(Policy::custom(|attempt| {
            let same = |a: &Url, b: &Url| a.origin() == b.origin();
            let stays = attempt.previous().last().is_some_and(|from| same(from, attempt.url()));
            if stays && attempt.previous().len() <= 3 { attempt.follow() } else { attempt.stop() }
        }))
}

impl Http {
    /// With these limits, trusting these authorities instead of the system's.
    pub fn new(
        network: &Network,
        authorities: Option<Vec<X509>>,
        client: Option<ClientIdentity>,
    ) -> Result<Self, HttpError> {
        Self::trusting(builder(network), network, authorities, client)
    }

    /// Likewise, but a redirect is an answer.
    pub fn without_redirects(
        network: &Network,
        authorities: Option<Vec<X509>>,
        client: Option<ClientIdentity>,
    ) -> Result<Self, HttpError> {
        Self::trusting(builder(network).redirect(Policy::none()), network, authorities, client)
    }

    fn trusting(
        mut builder: ClientBuilder,
        network: &Network,
        authorities: Option<Vec<X509>>,
        client: Option<ClientIdentity>,
    ) -> Result<Self, HttpError> {
        if let Some(authorities) = authorities {
            let der = |authority: &X509| authority.to_der().map_err(|error| HttpError::Client(error.into()));
            let authorities =
                authorities.iter().map(|authority| Certificate::from_der(&der(authority)?).map_err(failed));
            builder = builder.tls_certs_only(authorities.collect::<Result<Vec<_>, _>>()?);
        }
        if let Some(ClientIdentity { chain, key }) = client {
            builder = builder.identity(Identity::from_pkcs8_pem(&chain, &key).map_err(failed)?);
        }
        Self::with(builder.build().map_err(failed)?, network)
    }

    /// For one request, which shows nobody's identity. All of them have one client: making it reads all certificates that the
    /// system has, twice, and that takes longer than the request.
    pub fn for_one_request(network: &Network) -> Result<Self, HttpError> {
        static SHARED: Mutex<Option<(f64, Client)>> = Mutex::new(None);
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        let connect_seconds = network.connect_seconds;
        let client = match &*shared {
            Some((seconds, client)) if *seconds == connect_seconds => client.clone(),
            // A connection ends with the runtime of its request, so none is kept for another.
            _ => builder(network).pool_max_idle_per_host(0).build().map_err(failed)?,
        };
        *shared = Some((connect_seconds, client.clone()));
        Self::with(client, network)
    }

    fn with(client: Client, network: &Network) -> Result<Self, HttpError> {
        Ok(Self {
            client,
            runtime: Some(Builder::new_current_thread().enable_all().build().map_err(|e| HttpError::Client(e.into()))?),
            limits: Limits { one_try: limited(network.try_seconds), total: limited(network.total_seconds) },
            doublings: AtomicU32::new(0),
            turns: Semaphore::new(1),
            places: Semaphore::new(MOST_AT_ONCE),
            end: None,
        })
    }

    /// From now on all requests together have the time that one of them has.
    pub fn as_one(&mut self) {
        self.end = Some(Instant::now() + self.limits.total);
    }

    /// Sends a request until it is answered for good or its time is over.
    ///
    /// The last answer is returned even if it is a temporary one (503): its status says more than a time limit.
    pub fn send(&self, request: &Request) -> Result<HttpAnswer, HttpError> {
        self.runtime().block_on(self.tries(request))
    }

    /// As [`Http::send`], until the answer is not needed any more.
    pub fn send_unless(&self, request: &Request, cancel: &Cancel) -> Result<HttpAnswer, HttpError> {
        self.runtime().block_on(async {
            let (answered, cancelled) = (Box::pin(self.tries(request)), Box::pin(cancel.cancelled()));
            match select(answered, cancelled).await {
                Either::Left((answer, _)) => answer,
                Either::Right(_) => Err(HttpError::NotNeeded),
            }
        })
    }

    /// Sends several requests at once.
    pub fn send_all(&self, requests: &[Request]) -> Vec<Result<HttpAnswer, HttpError>> {
        self.runtime().block_on(join_all(requests.iter().map(|request| self.tries(request))))
    }

    fn runtime(&self) -> &Runtime {
        self.runtime.as_ref().expect("it is taken on drop only")
    }

    async fn tries(&self, request: &Request) -> Outcome {
        if let Some(insecure) = request.urls.iter().find(|url| !request.in_clear && !is_secure(url)) {
            return Err(HttpError::Insecure(insecure.clone()));
        }
        let own_end = Instant::now() + self.limits.total.saturating_sub(request.spent);
        let end = self.end.map_or(own_end, |end| end.min(own_end));
        let place = timeout(end.saturating_duration_since(Instant::now()), self.places.acquire()).await;
        if let Some(url) = request.urls.first().filter(|_| place.is_err() || end <= Instant::now()) {
            return Err(HttpError::NoTime { url: without_query(url) });
        }
        let mut tries = Tries {
            client: &self.client,
            request,
            end,
            late: Outcomes::new(),
            turns: &self.turns,
            reached: false,
            repeated: false,
        };
        let mut pause = FIRST_PAUSE;
        let mut before: Option<Outcome> = None;
        let mut told = BTreeSet::new();
        let mut turn = None;
        loop {
            let doublings = self.doublings.load(Relaxed);
            let one_try = self.limits.one_try.saturating_mul(1 << doublings);
            let cut_short = end.saturating_duration_since(Instant::now()) < one_try;
            let outcome = tries.round(one_try).await;
            let is_late = matches!(outcome, Err(HttpError::TimedOut { .. }));
            if is_late {
                // Once for all requests that were under way.
                self.doublings.fetch_max((doublings + 1).min(MOST_DOUBLINGS), Relaxed);
            }
            // A try that the end cut short says less than what the server said before.
            if cut_short
                && is_late
                && let Some(before) = before
            {
                return before;
            }
            let (why, asked) = match &outcome {
                Ok(answer) if answer.is_temporary() && request.repeat.after_an_answer() => {
                    (format!("{} answers {}", origin(&answer.url), answer.status), answer.retry_after())
                }
                Err(error) if error.may_be_repeated(request.repeat) => (chain(error), None),
                _ => return outcome,
            };
            let left = end.saturating_duration_since(Instant::now());
            let Some(wait) = wait(asked.unwrap_or_default(), pause, left) else { return outcome };
            // Each new state once: a server that starts answers in turn with nothing, 503, and what was asked for.
            if told.contains(&why) {
                tracing::debug!("{why}; next try in {} ms", wait.as_millis());
            } else {
                tracing::warn!(problem = %why, "{why}; trying again for up to {:.0} s", left.as_secs_f32());
                told.insert(why);
            }
            if let Some(answer) = tries.pause(wait).await {
                return answer;
            }
            // Its own goes back first.
            drop(turn.take());
            if is_late {
                match tries.turn().await {
                    Ok(next) => turn = Some(next),
                    Err(Some(answer)) => return answer,
                    Err(None) => return outcome,
                }
            }
            before = Some(outcome);
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}

impl Drop for Http {
    /// Does not wait for what was given up: a name that is still being looked up.
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn without_query(url: &Url) -> Url {
    let mut url = url.clone();
    url.set_query(None);
    url
}

fn origin(url: &Url) -> String {
    url.origin().ascii_serialization()
}

/// How long to wait before the next try, if there is time for one. A server that asks for no pause gets one; and what it asks of
/// many hosts at once is when the first of them may come back.
fn wait(asked: Duration, pause: Duration, left: Duration) -> Option<Duration> {
    let spread = pause.max(asked / 2);
    (asked.max(pause) < left).then(|| (asked + jittered(spread)).min((asked + left) / 2))
}

/// Between half the pause and all of it, so that hosts that failed together do not come back together.
fn jittered(pause: Duration) -> Duration {
    let mut random = [0; 1];
    let _ = openssl::rand::rand_bytes(&mut random);
    pause.mul_f64(0.5 + f64::from(random[0]) / 510.0)
}

/// What a server says of its refusal: OpenStack's or OpenBao's JSON, or a short text.
pub fn reason(answer: &HttpAnswer) -> Option<String> {
    reason_in(answer.body.expose())
}

/// What the body of a refusal says, in at most 300 printable characters.
pub fn reason_in(body: &[u8]) -> Option<String> {
    const LONGEST: usize = 300;
    let body = std::str::from_utf8(body).ok()?;
    let json: serde_json::Value = serde_json::from_str(body).unwrap_or_default();
    let said =
        ["/error/message", "/description", "/message", "/errors/0"].iter().find_map(|at| json.pointer(at)?.as_str());
    // A proxy's HTML page says nothing that its status does not.
    let text = said.or_else(|| (!body.trim_start().starts_with(['<', '{'])).then_some(body))?.trim();
    let clean: String = text.chars().filter(|c| !c.is_control()).take(LONGEST).collect();
    (!clean.is_empty()).then_some(clean)
}

#[cfg(test)]
mod tests;
