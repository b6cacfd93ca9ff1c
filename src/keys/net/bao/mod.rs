//! OpenBao and Vault: one log-in per run of this program, and requests with its token.
//!
//! Source: OpenBao's HTTP API (`/v1`); what its servers were seen to answer. The token stays in this process.

mod error;
mod login;
#[cfg(test)]
mod tests;

use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use reqwest::{Method, Url, header::HeaderValue};
use serde::Deserialize;
use serde_json::Value;

pub use error::BaoError;
use login::Session;

use super::{
    clouds,
    http::{self, Cancel, Http, HttpAnswer, Request},
};
use crate::{
    base::key::SecretBytes,
    config::{ConfigError, Login, Network, ServerConfig},
    keys::store::{SYSTEM_AUTHORITIES, Server},
};

/// The longest answer that has a token, public keys or a few words.
pub const MOST_WORDS_BYTES: usize = 64 * 1024;

/// What whoever logs in to a server shares, for each server of this process.
static SESSIONS: Mutex<Vec<(ServerConfig, Arc<Mutex<Session>>)>> = Mutex::new(Vec::new());

/// A service, with what it takes to ask it.
pub struct Bao {
    http: Http,
    server: ServerConfig,
    urls: Vec<Url>,
    session: Arc<Mutex<Session>>,
}

/// What is asked.
pub struct Question<'a> {
    method: Method,
    /// Below `/v1/`.
    path: Vec<&'a str>,
    query: &'a [(&'a str, &'a str)],
    body: Option<SecretBytes>,
    most_bytes: usize,
}

impl<'a> Question<'a> {
    /// For what is there.
    pub fn get(path: Vec<&'a str>, most_bytes: usize) -> Self {
        Self { method: Method::GET, path, query: &[], body: None, most_bytes }
    }

    /// With something that it is to take.
    pub fn post(path: Vec<&'a str>, body: &Value) -> Result<Self, BaoError> {
        let body = Some(SecretBytes::copy_of(body.to_string().as_bytes())?);
        Ok(Self { method: Method::POST, body, ..Self::get(path, MOST_WORDS_BYTES) })
    }

    /// To delete it.
    pub fn delete(path: Vec<&'a str>) -> Self {
        Self { method: Method::DELETE, ..Self::get(path, MOST_WORDS_BYTES) }
    }

    /// With a query.
    pub fn query(self, query: &'a [(&'a str, &'a str)]) -> Self {
        Self { query, ..self }
    }

    fn request(self, urls: &[Url]) -> Request {
        let path: Vec<_> = ["v1"].into_iter().chain(self.path).collect();
        let url = |url: &Url| {
            let mut url = http::below(url, &path);
            if !self.query.is_empty() {
                url.query_pairs_mut().extend_pairs(self.query);
            }
            url
        };
        let request = Request::new(self.method, urls.iter().map(url).collect(), self.most_bytes);
        match self.body {
            Some(body) => request.body("application/json", http::secret_body(body)),
            None => request,
        }
    }
}

/// The URLs of a server, if it may be asked as it is configured.
pub fn urls(server: &ServerConfig) -> Result<Vec<Url>, ConfigError> {
    let url = |text: &String| match http::server(text) {
        Some(_) => http::url(text).map_err(|error| server.unusable(error.to_string())),
        None => Err(server.unusable(format!("'{text}' is not a URL of a server"))),
    };
    let urls = server.urls.iter().map(url).collect::<Result<_, _>>()?;
    let fits = |namespace: &String| HeaderValue::from_str(namespace).is_ok();
    match server.namespace.as_ref().is_none_or(fits) {
        true => Ok(urls),
        false => Err(server.unusable("its namespace is not text for a header".to_owned())),
    }
}

/// The servers of a service, for waiting for them.
pub fn servers(server: &ServerConfig) -> Vec<Server> {
    urls(server).unwrap_or_default().iter().map(Server::of).collect()
}

/// The files that trusting its servers and logging in take, but for the one that lets anybody log in.
pub fn files(server: &ServerConfig) -> Vec<&Path> {
    let authorities = server.ca.is_none().then(|| Path::new(SYSTEM_AUTHORITIES));
    server.files().into_iter().chain(authorities).collect()
}

impl Bao {
    /// Nothing is asked yet.
    pub fn new(server: &ServerConfig, network: &Network) -> Result<Self, BaoError> {
        let urls = urls(server)?;
        let file = |source| BaoError::File { server: server.name.clone(), source: Box::new(source) };
        let authorities = server.ca.as_deref().map(clouds::authorities).transpose().map_err(file)?;
        let client = match &server.login {
            Login::Certificate { certificate, key } => Some(clouds::client_identity(certificate, key).map_err(file)?),
            Login::AppRole(_) | Login::Token(_) => None,
        };
        let http = Http::without_redirects(network, authorities, client)?;
        let mut sessions = SESSIONS.lock().unwrap_or_else(PoisonError::into_inner);
        let session = match sessions.iter().find(|(of, _)| of == server) {
            Some((_, session)) => session.clone(),
            None => {
                let session = Arc::default();
                sessions.push((server.clone(), Arc::clone(&session)));
                session
            }
        };
        Ok(Self { http, server: server.clone(), urls, session })
    }

    /// From now on all requests together have the time that one of them has.
    pub fn as_one(&mut self) {
        self.http.as_one();
    }

    /// Asks with a token. What is not there (404) and what it does not take (400) is an answer; other refusals are errors.
    pub fn ask(&self, question: Question<'_>, cancel: &Cancel) -> Result<HttpAnswer, BaoError> {
        let token = self.token(cancel)?;
        let request = question.request(&token.urls).header("x-vault-token", token.value.clone());
        let answer = self.send(request, cancel)?;
        let url = answer.url.to_string();
        match answer.status.as_u16() {
            200..=299 | 400 | 404 => Ok(answer),
            403 => Err(BaoError::Denied { url, server: self.server.name.clone() }),
            _ => Err(refusal(&answer)),
        }
    }

    /// Sends a request to a server that does its work itself.
    fn send(&self, mut request: Request, cancel: &Cancel) -> Result<HttpAnswer, BaoError> {
        let (started, spent) = (Instant::now(), request.spent);
        request = request.header("x-vault-request", HeaderValue::from_static("true"));
        if let Some(Ok(namespace)) = self.server.namespace.as_deref().map(HeaderValue::from_str) {
            request = request.header("x-vault-namespace", namespace);
        }
        loop {
            let answer = self.http.send_unless(&request, cancel)?;
            // A standby names another server, but the configuration decides who is asked.
            let is_standby = answer.status.is_redirection() || matches!(answer.status.as_u16(), 412 | 472 | 473);
            if !is_standby {
                return Ok(answer);
            }
            request.urls.retain(|url| url.origin() != answer.url.origin());
            if request.urls.is_empty() {
                return Err(BaoError::Standby { url: answer.url.into(), status: answer.status });
            }
            request.spent = spent + started.elapsed();
        }
    }
}

/// What a status means that is the same for all requests.
fn refusal(answer: &HttpAnswer) -> BaoError {
    let said = http::reason(answer).map(|said| format!(": {said}")).unwrap_or_default();
    let (url, status) = (answer.url.to_string(), answer.status);
    match status.as_u16() {
        429 => BaoError::Busy { url },
        503 => BaoError::Sealed { url, said },
        _ => BaoError::Answer { url, what: format!("answers {status}{said}") },
    }
}

/// It answers with something else than was asked for.
pub fn unexpected(answer: &HttpAnswer, what: &str) -> BaoError {
    BaoError::Answer { url: answer.url.to_string(), what: what.to_owned() }
}

/// An answer without secrets.
pub fn json(answer: &HttpAnswer) -> Result<Value, BaoError> {
    serde_json::from_slice(answer.body.expose())
        .map_err(|_| unexpected(answer, "answers with something that is not JSON"))
}

/// What an answer has of secrets. They stay in its memory.
#[derive(Default, Deserialize)]
#[serde(default)]
pub struct Secrets<'a> {
    #[serde(borrow)]
    auth: Option<Auth<'a>>,
    #[serde(borrow)]
    data: Option<Data<'a>>,
}

#[derive(Deserialize)]
struct Auth<'a> {
    client_token: &'a str,
    #[serde(default)]
    lease_duration: u64,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Data<'a> {
    secret_id: Option<&'a str>,
    plaintext: Option<&'a str>,
}

impl<'a> Secrets<'a> {
    /// Reads an answer; what is not understood has none.
    pub fn of(body: &'a SecretBytes) -> Self {
        serde_json::from_slice(body.expose()).unwrap_or_default()
    }

    /// What was decrypted, base64.
    pub fn plaintext(&self) -> Option<&'a str> {
        self.data.as_ref()?.plaintext
    }

    fn secret_id(&self) -> Option<&'a str> {
        self.data.as_ref()?.secret_id
    }
}

/// How long a token is used that lives so many seconds: not to its last moment.
fn lifetime(seconds: u64) -> Option<Duration> {
    (seconds > 0).then(|| Duration::from_secs(seconds).mul_f64(0.9))
}
