//! Logging in: AppRole, a TLS certificate, or a token that is there.

use std::{
    path::Path,
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

use reqwest::{Url, header::HeaderValue};
use serde_json::json;

use super::{Bao, BaoError, MOST_WORDS_BYTES, Question, Secrets, lifetime, refusal, unexpected};
use crate::{
    base::key::SecretBytes,
    config::{AppRole, Login},
    keys::net::{
        clouds,
        http::{self, Cancel, HttpAnswer, Request},
        keystone::{HOLE, fill},
    },
};

/// What a log-in gave.
#[derive(Default)]
pub struct Session {
    token: Option<Arc<Token>>,
    /// A SecretID comes out of its wrapping once.
    unwrapped: Option<SecretBytes>,
}

/// A token.
pub struct Token {
    pub value: HeaderValue,
    until: Option<Instant>,
    /// The servers, first the one that was seen alive.
    pub urls: Vec<Url>,
}

impl Bao {
    /// The token of this run.
    pub(super) fn token(&self, cancel: &Cancel) -> Result<Arc<Token>, BaoError> {
        let started = Instant::now();
        // Held while logging in: of several threads one does it, the others wait for its token. That is part of their time.
        let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        let is_good = |token: &&Arc<Token>| token.until.is_none_or(|until| Instant::now() < until);
        if let Some(token) = session.token.as_ref().filter(is_good) {
            return Ok(token.clone());
        }
        let token = Arc::new(self.log_in(&mut session, started.elapsed(), cancel)?);
        session.token = Some(token.clone());
        Ok(token)
    }

    fn log_in(&self, session: &mut Session, spent: Duration, cancel: &Cancel) -> Result<Token, BaoError> {
        let (method, body) = match &self.server.login {
            Login::Token(path) => {
                let value = http::secret_header(self.secret(path)?);
                let value = value.ok_or_else(|| self.server.unusable("its token has line breaks".to_owned()))?;
                return Ok(Token { value, until: None, urls: self.urls.clone() });
            }
            Login::Certificate { .. } => ("cert", SecretBytes::copy_of(b"{}")?),
            Login::AppRole(approle) => ("approle", self.approle(approle, session, spent, cancel)?),
        };
        let urls = self.live_first(spent, cancel)?;
        let question = Question { body: Some(body), ..Question::post(vec!["auth", method, "login"], &json!({}))? };
        // To one: a SecretID may be good for a number of log-ins.
        let answer = self.send(Request { spent, ..question.request(&urls[..1]) }, cancel)?;
        let answer = match answer.status.as_u16() {
            200 => answer,
            400 | 401 | 403 => {
                let said = http::reason(&answer).unwrap_or_else(|| answer.status.to_string());
                return Err(BaoError::LogIn { url: answer.url.into(), server: self.server.name.clone(), said });
            }
            _ => return Err(refusal(&answer)),
        };
        let auth = Secrets::of(&answer.body).auth.ok_or_else(|| unexpected(&answer, "gives no token"))?;
        let value = http::secret_header(SecretBytes::copy_of(auth.client_token.as_bytes())?);
        let value = value.ok_or_else(|| unexpected(&answer, "gives a token that is not text"))?;
        let until = lifetime(auth.lease_duration).and_then(|lifetime| Instant::now().checked_add(lifetime));
        Ok(Token { value, until, urls })
    }

    fn approle(
        &self,
        approle: &AppRole,
        session: &mut Session,
        spent: Duration,
        cancel: &Cancel,
    ) -> Result<SecretBytes, BaoError> {
        let role_id = self.secret(&approle.role_id)?;
        let details = json!({"role_id": String::from_utf8_lossy(role_id.expose()), "secret_id": HOLE});
        if !approle.wrapped {
            return Ok(fill(&details, &self.secret(&approle.secret_id)?)?);
        }
        let secret_id = match session.unwrapped.take() {
            Some(secret_id) => secret_id,
            None => self.unwrap(&approle.secret_id, spent, cancel)?,
        };
        let body = fill(&details, &secret_id);
        session.unwrapped = Some(secret_id);
        Ok(body?)
    }

    /// A SecretID out of its wrapping. Nobody else can have had it, or this fails.
    fn unwrap(&self, path: &Path, spent: Duration, cancel: &Cancel) -> Result<SecretBytes, BaoError> {
        let wrapping = self.secret(path)?;
        let used = |answer: HttpAnswer| match answer.status.as_u16() {
            400 | 403 | 404 => BaoError::Unwrapped { server: self.server.name.clone(), path: path.to_owned() },
            _ => refusal(&answer),
        };
        // Whoever got at it first may have wrapped something of their own.
        let body = Some(fill(&json!({"token": HOLE}), &wrapping)?);
        let question = Question { body, ..Question::post(vec!["sys", "wrapping", "lookup"], &json!({}))? };
        let looked = self.send(Request { spent, ..question.request(&self.urls) }, cancel)?;
        if !looked.status.is_success() {
            return Err(used(looked));
        }
        let facts = super::json(&looked)?;
        let made_by = facts.pointer("/data/creation_path").and_then(|path| path.as_str()).unwrap_or_default();
        if !(made_by.starts_with("auth/") && made_by.ends_with("secret-id")) {
            let (server, made_by) = (self.server.name.clone(), made_by.to_owned());
            return Err(BaoError::NotASecretId { server, path: path.to_owned(), made_by });
        }
        let urls = self.live_first(spent, cancel)?;
        let question = Question::post(vec!["sys", "wrapping", "unwrap"], &json!({}))?;
        let unreadable = || self.server.unusable("its wrapped SecretID has line breaks".to_owned());
        let token = http::secret_header(wrapping).ok_or_else(unreadable)?;
        let request = question.request(&urls[..1]).header("x-vault-token", token).once();
        let answer = self.send(Request { spent, ..request }, cancel)?;
        if !answer.status.is_success() {
            return Err(used(answer));
        }
        let secret_id =
            Secrets::of(&answer.body).secret_id().ok_or_else(|| unexpected(&answer, "gives no SecretID"))?;
        Ok(SecretBytes::copy_of(secret_id.as_bytes())?)
    }

    /// The servers, first one that answers.
    fn live_first(&self, spent: Duration, cancel: &Cancel) -> Result<Vec<Url>, BaoError> {
        if self.urls.len() == 1 {
            return Ok(self.urls.clone());
        }
        let alive = [("standbyok", "true"), ("perfstandbyok", "true")];
        let question = Question::get(vec!["sys", "health"], MOST_WORDS_BYTES).query(&alive);
        // It is of the whole server, so no namespace goes with it.
        let answer = self.http.send_unless(&Request { spent, ..question.request(&self.urls) }, cancel)?;
        if !answer.status.is_success() {
            return Err(refusal(&answer));
        }
        let mut urls = self.urls.clone();
        urls.sort_by_key(|url| url.origin() != answer.url.origin());
        Ok(urls)
    }

    fn secret(&self, path: &Path) -> Result<SecretBytes, BaoError> {
        let file = |source| BaoError::File { server: self.server.name.clone(), source: Box::new(source) };
        clouds::read_secret(path).map_err(file)
    }
}
