//! The tries of one request: what is under way, and what of it counts.

use std::{
    pin::Pin,
    time::{Duration, Instant},
};

use futures_util::{
    future::{Either, pending, ready, select},
    stream::{self, FuturesUnordered, StreamExt},
};
use reqwest::{Client, Url};
use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::timeout,
};

use super::{Bottom, HEAD_START, HttpAnswer, HttpError, Repeat, Request, without_query};
use crate::base::{chain::chain, key::SecretBytes};

/// The tries of one request. One that takes longer than its time stays under way beside the next: a server that has much to do
/// carries it out in any case, and its answer is as good as a later one.
pub(super) struct Tries<'a> {
    pub(super) client: &'a Client,
    pub(super) request: &'a Request,
    pub(super) end: Instant,
    pub(super) late: Outcomes<'a>,
    pub(super) turns: &'a Semaphore,
    /// A server may have carried it out, and no answer was taken.
    pub(super) reached: bool,
    /// It was sent again after that.
    pub(super) repeated: bool,
}

pub(super) type Outcome = Result<HttpAnswer, HttpError>;
pub(super) type Outcomes<'a> = FuturesUnordered<Pin<Box<dyn Future<Output = Outcome> + Send + 'a>>>;

impl<'a> Tries<'a> {
    /// Asks each server once, the later ones after a head start.
    pub(super) async fn round(&mut self, one_try: Duration) -> Outcome {
        let Self { client, request, end, .. } = *self;
        let left = || end.saturating_duration_since(Instant::now());
        let one_try = if request.patient { left() } else { one_try.min(left()) };
        // Only what may be sent twice is sent to two servers.
        let head_start = if request.repeat == Repeat::Unsent { Duration::MAX } else { HEAD_START };
        let (mut waiting, mut asked, mut last) = (request.urls.iter(), Outcomes::new(), None);
        let (mut newest, mut until) = (None, Instant::now());
        loop {
            if let Some(url) = waiting.next() {
                self.repeated |= self.reached || !asked.is_empty() || !self.late.is_empty();
                asked.push(Box::pin(once(client, request, url, left())));
                (newest, until) = (Some(url), Instant::now() + one_try);
            }
            let Some(newest) = newest.filter(|_| !asked.is_empty()) else {
                return last.unwrap_or_else(|| Err(HttpError::Url("no URL".to_owned())));
            };
            let its_time = until.saturating_duration_since(Instant::now());
            let patience = if waiting.len() > 0 { head_start.min(its_time) } else { its_time };
            let outcome = timeout(patience, stream::select(&mut asked, &mut self.late).next()).await;
            let Ok(Some(outcome)) = outcome else {
                if patience < its_time {
                    continue;
                }
                self.late.extend(asked);
                return Err(HttpError::TimedOut { url: without_query(newest), after: one_try });
            };
            if request.is_settled_by(&outcome) {
                return self.taken(outcome);
            }
            self.reached |= !matches!(&outcome, Err(error) if error.may_be_repeated(Repeat::Unsent));
            last = Some(outcome);
        }
    }

    /// Waits, unless a late try settles it.
    pub(super) async fn pause(&mut self, wait: Duration) -> Option<Outcome> {
        timeout(wait, self.settled()).await.ok()
    }

    /// The leave to ask again, unless a late try settles it; nothing, if time is over.
    pub(super) async fn turn(&mut self) -> Result<SemaphorePermit<'a>, Option<Outcome>> {
        let (turns, left) = (self.turns, self.end.saturating_duration_since(Instant::now()));
        let either = select(Box::pin(turns.acquire()), Box::pin(self.settled()));
        match timeout(left, either).await {
            Ok(Either::Left((Ok(turn), _))) => Ok(turn),
            Ok(Either::Right((outcome, _))) => Err(Some(outcome)),
            Ok(Either::Left((Err(_), _))) | Err(_) => Err(None),
        }
    }

    /// What settles it, of the late tries.
    async fn settled(&mut self) -> Outcome {
        let request = self.request;
        let mut settles = self.late.by_ref().filter(|outcome| ready(request.is_settled_by(outcome)));
        match settles.next().await {
            Some(outcome) => self.taken(outcome),
            None => pending().await,
        }
    }

    fn taken(&self, outcome: Outcome) -> Outcome {
        if outcome.is_ok() {
            self.turns.add_permits(1);
        }
        outcome.map(|answer| HttpAnswer { repeated: self.repeated, ..answer })
    }
}

/// A request that was sent: what came of it is told in any case.
struct Sent<'a> {
    url: &'a Url,
    at: Instant,
    is_told: bool,
}

impl Drop for Sent<'_> {
    fn drop(&mut self) {
        if !self.is_told {
            tracing::debug!("{}: given up after {} ms", self.url, self.at.elapsed().as_millis());
        }
    }
}

async fn once(client: &Client, request: &Request, url: &Url, limit: Duration) -> Outcome {
    let mut sent = Sent { url, at: Instant::now(), is_told: false };
    let answer = timeout(limit, exchange(client, request, url)).await;
    let answer = answer.unwrap_or_else(|_| Err(HttpError::TimedOut { url: without_query(url), after: limit }));
    let took = sent.at.elapsed().as_millis();
    match &answer {
        Ok(answer) => tracing::debug!("{} {} in {took} ms", answer.status.as_u16(), answer.url),
        Err(error) => tracing::debug!("{} after {took} ms", chain(error)),
    }
    sent.is_told = true;
    answer
}

async fn exchange(client: &Client, request: &Request, url: &Url) -> Outcome {
    let most_bytes = request.most_bytes;
    let mut builder = client.request(request.method.clone(), url.clone()).headers(request.headers.clone());
    if let Some(body) = request.body.clone() {
        builder = builder.body(body);
    }
    let failed = |error: reqwest::Error| {
        let (is_timeout, is_connect) = (error.is_timeout(), error.is_connect());
        let (url, source) = (without_query(url), Bottom::of(&error.without_url()));
        match (is_connect, is_timeout) {
            (true, _) => HttpError::Connect { url, source },
            _ => HttpError::Broken { url, source },
        }
    };
    let mut response = builder.send().await.map_err(failed)?;
    let too_long = || HttpError::TooLong { url: without_query(url), most_bytes };
    if response.content_length().is_some_and(|length| length > most_bytes as u64) {
        return Err(too_long());
    }
    let (status, headers) = (response.status(), response.headers().clone());
    let expected = response.content_length().and_then(|length| usize::try_from(length).ok());
    let mut body = SecretBytes::zeroed(expected.unwrap_or(4096).max(1))?;
    let mut len = 0;
    while let Some(chunk) = response.chunk().await.map_err(failed)? {
        let end = len + chunk.len();
        if end > most_bytes {
            return Err(too_long());
        }
        if end > body.len() {
            let mut larger = SecretBytes::zeroed((end * 2).min(most_bytes))?;
            larger.expose_mut()[..len].copy_from_slice(&body.expose()[..len]);
            body = larger;
        }
        body.expose_mut()[len..end].copy_from_slice(&chunk);
        len = end;
    }
    body.truncate(len);
    Ok(HttpAnswer { url: url.clone(), status, headers, body, repeated: false })
}
