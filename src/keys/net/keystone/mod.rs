//! Logging in: Keystone's v3 tokens and catalogue, and Swift's own TempAuth.
//!
//! Source: OpenStack Identity API v3, "Authentication and token management"; Swift's "Auth system", TempAuth.

mod kept;
mod verify;

use std::{
    borrow::Cow,
    io::Write,
    sync::{Arc, Mutex, PoisonError},
};

use reqwest::{
    Method, StatusCode, Url,
    header::{HeaderMap, HeaderValue},
};
use serde::Deserialize;
use serde_json::{Value, json};

pub use verify::{TokenOwner, Verifier};

use kept::Kept;

use super::{
    clouds::{Cloud, CloudsError, Credentials, Named, Wanted},
    http::{self, Http, HttpAnswer, HttpError, Request},
};
use crate::{
    base::{
        advice::Advice,
        exit::Exit,
        key::{SecretBytes, SecretMemoryError},
    },
    config::{CloudConfig, Network},
};

/// A token with its catalogue; large clouds have large ones.
const MOST_TOKEN_BYTES: usize = 1 << 20;

/// What a hook's caller brings: whoever has it acts as its owner.
pub struct Caller {
    /// The token of the user on whose behalf the caller acts.
    pub token: SecretBytes,
    /// The token of the service that calls. Where tokens are checked, it lets the user's one expire meanwhile.
    pub service_token: Option<SecretBytes>,
}

/// A service, reached with a token that is fetched when it is first needed and again when it is refused.
pub struct Session {
    http: Http,
    cloud: Cloud,
    service: &'static str,
    /// Which of the service's end points is meant.
    wanted: Wanted,
    /// The service's URLs by configuration, in place of the catalogue's.
    urls: Vec<Url>,
    token: Mutex<Option<Arc<Token>>>,
    /// What attaches before this one have left for it, and this one leaves.
    kept: Option<Kept>,
}

struct Token {
    value: HeaderValue,
    /// Seconds that it may be kept for others; `None`: not at all.
    keep: Option<usize>,
    /// Another process has got it.
    is_kept: bool,
    /// Of the service that calls, beside that of its user.
    service: Option<HeaderValue>,
    urls: Vec<Url>,
}

/// Logging in failed.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    /// clouds.yaml.
    #[error(transparent)]
    Clouds(#[from] CloudsError),
    /// The identity service cannot be reached.
    #[error("cannot log in")]
    Http(#[source] Box<HttpError>),
    /// It says no.
    #[error("{url} refuses the log-in ({status}){why}")]
    Refused {
        url: Url,
        status: StatusCode,
        /// What it says, after a colon.
        why: String,
    },
    /// The service refuses the token that the caller gave, and there is no other.
    #[error("{0} refuses the caller's token (401 Unauthorized): it has expired or was withdrawn")]
    CallerToken(Url),
    /// Likewise the one in clouds.yaml.
    #[error("{0} refuses the token in clouds.yaml (401 Unauthorized): it has expired or was withdrawn")]
    ConfiguredToken(Url),
    /// The service refuses a token that is new.
    #[error("{0} refuses the token that this host's own log-in has just got (401 Unauthorized)")]
    NewToken(Url),
    /// Keystone does not tell this user whose a token is.
    #[error("{0} does not let this user verify tokens")]
    MayNotVerify(Url),
    /// It cannot now.
    #[error("{url} cannot verify tokens now ({status})")]
    Unavailable { url: Url, status: StatusCode },
    /// Its answer is not understood.
    #[error("cannot understand the answer of {url} to the log-in: {what}")]
    Answer { url: Url, what: String },
    /// The catalogue does not have the service.
    #[error("the catalogue has no {interface} endpoint of type {service}{region}")]
    NoEndpoint {
        /// Type of the service.
        service: &'static str,
        /// Interface.
        interface: String,
        /// " in region ...", or nothing.
        region: String,
    },
    /// No memory for a secret.
    #[error(transparent)]
    Memory(#[from] SecretMemoryError),
}

impl Advice for AuthError {
    fn exit(&self) -> Exit {
        match self {
            Self::Clouds(error) => error.exit(),
            Self::NoEndpoint { .. } => Exit::Config,
            Self::Http(error) => error.exit(),
            Self::Refused { .. } | Self::CallerToken(_) | Self::ConfiguredToken(_) => Exit::PermissionDenied,
            Self::MayNotVerify(_) => Exit::Config,
            Self::Answer { .. } | Self::Unavailable { .. } | Self::NewToken(_) => Exit::StoreUnavailable,
            Self::Memory(error) => error.exit(),
        }
    }

    fn next_step(&self) -> Option<Cow<'static, str>> {
        let step = match self {
            Self::Http(error) => return error.next_step(),
            Self::Clouds(error) => return error.next_step(),
            Self::Refused { .. } => "check user, project and secret in clouds.yaml, and this host's clock",
            Self::CallerToken(_) => {
                "repeat the request with a new token; a service token beside it has to be valid, too"
            }
            Self::ConfiguredToken(_) => "put a new token there, or a password or an application credential",
            Self::NewToken(_) => {
                "try again; if it stays so, the service cannot verify tokens: see its log, which Keystone it asks, and the clocks"
            }
            Self::MayNotVerify(_) => {
                "give the user of [hooks] keystone a role that may, 'service' by Keystone's own policy"
            }
            Self::Unavailable { .. } => "check that Keystone runs; -v shows every try",
            Self::NoEndpoint { .. } => {
                "check 'regions', 'region_name' and 'interface' in clouds.yaml, or name the service's 'urls' in the configuration"
            }
            Self::Answer { .. } => "check auth_url in clouds.yaml",
            Self::Memory(error) => return error.next_step(),
        };
        Some(step.into())
    }
}

impl From<HttpError> for AuthError {
    fn from(error: HttpError) -> Self {
        Self::Http(Box::new(error))
    }
}

#[derive(Deserialize)]
struct Answered<'a> {
    #[serde(borrow)]
    token: Body<'a>,
}

#[derive(Deserialize)]
struct Body<'a> {
    #[serde(default)]
    catalog: Vec<Service>,
    issued_at: Option<&'a str>,
    expires_at: Option<&'a str>,
}

/// `GET /v3/auth/catalog`
#[derive(Deserialize)]
struct Catalogue {
    catalog: Vec<Service>,
}

#[derive(Deserialize)]
struct Service {
    #[serde(rename = "type")]
    kind: String,
    endpoints: Vec<Endpoint>,
}

#[derive(Deserialize)]
struct Endpoint {
    interface: String,
    url: String,
    region: Option<String>,
}

impl Session {
    /// A session with a service of a cloud. Nothing is sent yet.
    pub fn new(
        config: &CloudConfig,
        urls: &[String],
        network: &Network,
        service: &'static str,
        caller: Option<Arc<Caller>>,
    ) -> Result<Self, AuthError> {
        let cloud = Cloud::find(config, caller)?;
        let http = Http::new(network, cloud.read_authorities()?, cloud.read_client()?)?;
        let wanted = cloud.wanted(service);
        // What the store's configuration says comes before what clouds.yaml says.
        let of_cloud = wanted.url.as_ref().filter(|_| urls.is_empty());
        let urls = urls.iter().chain(of_cloud).map(|text| http::url(text)).collect::<Result<_, _>>()?;
        Ok(Self { http, cloud, service, wanted, urls, token: Mutex::new(None), kept: None })
    }

    /// Goes on with the token of an earlier process of this boot, and leaves its own to the next.
    pub fn warm(&mut self) {
        self.kept = Kept::of(&self.cloud, self.service, &self.wanted, &self.urls);
    }

    /// Sends what `build` makes for the service's URLs, with a token; once more with a new one if that is refused.
    pub fn send(&self, build: impl Fn(&[Url]) -> Request) -> Result<HttpAnswer, SendError> {
        let send =
            |token: &Token| self.http.send(&with_tokens(build(&token.urls), &token.value, token.service.as_ref()));
        let token = self.token()?;
        let answer = send(&token)?;
        match answer.status {
            StatusCode::UNAUTHORIZED => {}
            // What the user may do is as it was when the token was made.
            StatusCode::FORBIDDEN if token.is_kept => {}
            _ => return Ok(answer),
        }
        if let Credentials::Token(_) | Credentials::Caller(_) = self.cloud.credentials {
            return Err(self.refused(answer.url).into());
        }
        tracing::debug!("{} refuses the token; logging in again", answer.url);
        self.forget(&token);
        let answer = send(&*self.token()?)?;
        // What the user may do has nothing to do with it.
        match answer.status {
            StatusCode::UNAUTHORIZED => Err(AuthError::NewToken(answer.url).into()),
            _ => Ok(answer),
        }
    }

    /// A token is refused that was not got by logging in.
    fn refused(&self, url: Url) -> AuthError {
        match self.cloud.credentials {
            Credentials::Token(_) => AuthError::ConfiguredToken(url),
            _ => AuthError::CallerToken(url),
        }
    }

    /// Sends requests that need no token, all at once.
    pub fn send_all_without_token(&self, requests: &[Request]) -> Vec<Result<HttpAnswer, HttpError>> {
        self.http.send_all(requests)
    }

    /// From now on all requests together have the time that one of them has.
    pub fn as_one(&mut self) {
        self.http.as_one();
    }

    /// The service's URLs.
    pub fn urls(&self) -> Result<Vec<Url>, AuthError> {
        self.token().map(|token| token.urls.clone())
    }

    fn token(&self) -> Result<Arc<Token>, AuthError> {
        // Held while logging in: of several threads one does it, the others wait for its token.
        let mut slot = self.token.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(token) = &*slot {
            return Ok(token.clone());
        }
        let token = match self.kept.as_ref().and_then(Kept::token) {
            Some(token) => token,
            None => {
                let token = self.log_in()?;
                self.kept.iter().for_each(|kept| kept.keep(&token));
                token
            }
        };
        let token = Arc::new(token);
        *slot = Some(token.clone());
        Ok(token)
    }

    fn forget(&self, refused: &Arc<Token>) {
        let mut slot = self.token.lock().unwrap_or_else(PoisonError::into_inner);
        if slot.as_ref().is_some_and(|token| Arc::ptr_eq(token, refused)) {
            *slot = None;
            self.kept.iter().for_each(Kept::refused);
        }
    }

    fn log_in(&self) -> Result<Token, AuthError> {
        match &self.cloud.credentials {
            Credentials::TempAuth { user, key } => self.temp_auth(user, key),
            Credentials::Token(token) => self.given_token(token, None),
            Credentials::Caller(caller) => self.given_token(&caller.token, caller.service_token.as_ref()),
            Credentials::Password { user, password, project } => {
                let mut user = user.to_json();
                user["password"] = json!(HOLE);
                self.keystone("password", json!({"user": user}), password, Some(project))
            }
            Credentials::ApplicationCredential { id, secret } => {
                let mut details = match id {
                    Ok(id) => json!({"id": id}),
                    Err((name, user)) => json!({"name": name, "user": user.to_json()}),
                };
                details["secret"] = json!(HOLE);
                self.keystone("application_credential", details, secret, None)
            }
        }
    }

    fn keystone(
        &self,
        method: &str,
        details: Value,
        secret: &SecretBytes,
        project: Option<&Named>,
    ) -> Result<Token, AuthError> {
        let mut auth = json!({"identity": {"methods": [method], method: details}});
        if let Some(project) = project {
            auth["scope"] = json!({"project": project.to_json()});
        }
        let body = http::secret_body(fill(&json!({"auth": auth}), secret)?);
        let url = self.identity_url(&["auth", "tokens"])?;
        let request = Request::new(Method::POST, vec![url], MOST_TOKEN_BYTES).body("application/json", body);
        let answer = self.ask(&request)?;
        let Answered { token: body } = parse(&answer)?;
        let value = answer.headers.get("x-subject-token").cloned();
        let mut value = value.ok_or_else(|| wrong(&answer.url, "it has no X-Subject-Token"))?;
        value.set_sensitive(true);
        let keep = kept::lifetime(body.issued_at, body.expires_at);
        Ok(Token { value, keep, is_kept: false, service: None, urls: self.endpoint(body.catalog)? })
    }

    /// Someone else's token says nothing of its catalogue, which is asked for only where it is needed.
    fn given_token(&self, token: &SecretBytes, service: Option<&SecretBytes>) -> Result<Token, AuthError> {
        let value = header(token, &self.cloud.auth_url)?;
        let service = service.map(|token| header(token, &self.cloud.auth_url)).transpose()?;
        if !self.urls.is_empty() {
            return Ok(Token { value, keep: None, is_kept: false, service, urls: self.urls.clone() });
        }
        let url = self.identity_url(&["auth", "catalog"])?;
        let request = Request::new(Method::GET, vec![url], MOST_TOKEN_BYTES);
        let answer = self.http.send(&with_tokens(request, &value, service.as_ref()))?;
        if answer.status == StatusCode::UNAUTHORIZED {
            return Err(self.refused(answer.url));
        }
        let body: Catalogue = parse(&accepted(answer)?)?;
        Ok(Token { value, keep: None, is_kept: false, service, urls: self.endpoint(body.catalog)? })
    }

    fn temp_auth(&self, user: &str, key: &SecretBytes) -> Result<Token, AuthError> {
        let url = http::url(&self.cloud.auth_url)?;
        let user = HeaderValue::from_str(user).map_err(|_| wrong(&url, "the user name is not a valid header value"))?;
        let mut headers = HeaderMap::new();
        headers.insert("x-auth-user", user);
        headers.insert("x-auth-key", header(key, url.as_str())?);
        let request = Request { headers, ..Request::new(Method::GET, vec![url], MOST_TOKEN_BYTES) };
        let answer = self.ask(&request)?;
        let given = |name| answer.headers.get(name).cloned().ok_or_else(|| wrong(&answer.url, "no token or URL"));
        let (mut value, storage) = (given("x-auth-token")?, given("x-storage-url")?);
        value.set_sensitive(true);
        let storage = storage.to_str().map_err(|_| wrong(&answer.url, "its X-Storage-Url is not text"))?;
        let urls = if self.urls.is_empty() { vec![http::url(storage)?] } else { self.urls.clone() };
        Ok(Token { value, keep: None, is_kept: false, service: None, urls })
    }

    fn ask(&self, request: &Request) -> Result<HttpAnswer, AuthError> {
        accepted(self.http.send(request)?)
    }

    /// `auth_url` with or without its version.
    fn identity_url(&self, segments: &[&str]) -> Result<Url, AuthError> {
        let url = http::url(&self.cloud.auth_url)?;
        let versioned = url.path().trim_end_matches('/').ends_with("/v3");
        let url = if versioned { url } else { http::below(&url, &["v3"]) };
        Ok(http::below(&url, segments))
    }

    fn endpoint(&self, catalogue: Vec<Service>) -> Result<Vec<Url>, AuthError> {
        if !self.urls.is_empty() {
            return Ok(self.urls.clone());
        }
        let Wanted { region, interfaces, .. } = &self.wanted;
        let ours = catalogue.into_iter().filter(|service| service.kind == self.service);
        let endpoints: Vec<Endpoint> = ours.flat_map(|service| service.endpoints).collect();
        let of = |interface: &String| {
            endpoints
                .iter()
                .find(|endpoint| endpoint.interface == *interface && (region.is_none() || *region == endpoint.region))
        };
        let endpoint = interfaces.iter().find_map(of).ok_or_else(|| AuthError::NoEndpoint {
            service: self.service,
            interface: interfaces.join(" or "),
            region: region.as_ref().map(|region| format!(" in region {region}")).unwrap_or_default(),
        })?;
        Ok(vec![http::url(&endpoint.url)?])
    }
}

/// A request of a session failed.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// There is no token.
    #[error(transparent)]
    Auth(#[from] AuthError),
    /// There is no answer.
    #[error(transparent)]
    Http(#[from] HttpError),
}

impl Advice for SendError {
    fn exit(&self) -> Exit {
        match self {
            Self::Auth(error) => error.exit(),
            Self::Http(error) => error.exit(),
        }
    }

    fn next_step(&self) -> Option<Cow<'static, str>> {
        match self {
            Self::Auth(error) => error.next_step(),
            Self::Http(error) => error.next_step(),
        }
    }
}

/// Stands for a secret in JSON until it is filled in.
pub const HOLE: &str = "\u{1}";

/// JSON with the secret in place of [`HOLE`], in secret memory: serde has none of it.
pub fn fill(json: &Value, secret: &SecretBytes) -> Result<SecretBytes, SecretMemoryError> {
    let text = json.to_string();
    // serde_json escapes control characters, so a hole looks like this, and no name of a user can.
    let (before, after) = text.split_once("\"\\u0001\"").unwrap_or((&text, ""));
    let text = std::str::from_utf8(secret.expose()).unwrap_or_default();
    // Six bytes at most for each ("\u0000"), and the quotes.
    let mut whole = SecretBytes::zeroed(before.len() + text.len() * 6 + 2 + after.len())?;
    let room = whole.len();
    let mut rest = whole.expose_mut();
    let written = rest
        .write_all(before.as_bytes())
        .and_then(|()| Ok(serde_json::to_writer(&mut rest, text)?))
        .and_then(|()| rest.write_all(after.as_bytes()));
    let left = rest.len();
    debug_assert!(written.is_ok(), "there is room for all");
    whole.truncate(room - left);
    Ok(whole)
}

impl Named {
    fn to_json(&self) -> Value {
        match self {
            Self::Id(id) => json!({"id": id}),
            Self::Name { name, domain: (by, domain) } => json!({"name": name, "domain": {*by: domain}}),
        }
    }
}

/// A request of the owner of a token, and of the service that calls beside its user.
fn with_tokens(request: Request, value: &HeaderValue, service: Option<&HeaderValue>) -> Request {
    let request = request.header("x-auth-token", value.clone());
    match service {
        Some(service) => request.header("x-service-token", service.clone()),
        None => request,
    }
}

fn header(secret: &SecretBytes, url: &str) -> Result<HeaderValue, AuthError> {
    let url = || Url::parse(url).unwrap_or_else(|_| Url::parse("http://localhost").expect("a URL"));
    let value = http::secret_header(SecretBytes::copy_of(secret.expose())?);
    value.ok_or_else(|| wrong(&url(), "the token or key is not a valid header value"))
}

fn accepted(answer: HttpAnswer) -> Result<HttpAnswer, AuthError> {
    if answer.status.is_success() {
        return Ok(answer);
    }
    let why = http::reason(&answer).map(|why| format!(": {why}")).unwrap_or_default();
    Err(AuthError::Refused { url: answer.url, status: answer.status, why })
}

fn parse<'a, T: Deserialize<'a>>(answer: &'a HttpAnswer) -> Result<T, AuthError> {
    serde_json::from_slice(answer.body.expose()).map_err(|error| wrong(&answer.url, &format!("{:?}", error.classify())))
}

fn wrong(url: &Url, what: &str) -> AuthError {
    AuthError::Answer { url: url.clone(), what: what.to_owned() }
}

#[cfg(test)]
mod tests;
