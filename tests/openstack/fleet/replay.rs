//! Requests that were written down, sent again by many hosts: what the other ways to a key ask of their servers.
//!
//! The client is light, and kinder than those whom it stands for: it waits as long as the server takes.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use reqwest::{Certificate, Client, Method};
use serde::{Deserialize, Serialize};
use tokio::{task::JoinSet, time::sleep};

use super::{count, front::Recorded};

/// No host waits longer.
const LONGEST: Duration = Duration::from_secs(600);

/// The requests of one host, one after the other.
#[derive(Clone, Serialize, Deserialize)]
pub struct Stream {
    pub requests: Vec<Request>,
    /// The authority of the server's certificate.
    pub authority: Option<PathBuf>,
    /// A connection serves more than one request.
    pub keep_alive: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Request {
    pub method: String,
    pub url: String,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// The answer has a token: later requests of the host have it in the header of this name.
    pub token_for: Option<String>,
}

impl Request {
    pub fn new(method: &str, url: String, body: &str) -> Self {
        Self { method: method.to_owned(), url, headers: Vec::new(), body: body.into(), token_for: None }
    }

    /// What was written down in front of this server. A log-in is one, and a token is the host's own.
    pub fn of(recorded: &Recorded, server: &str) -> Self {
        let dropped = ["host", "content-length", "connection", "x-auth-token", "accept-encoding"];
        let headers = recorded.headers.iter().filter(|(name, _)| !dropped.contains(&name.as_str())).cloned().collect();
        let is_login = recorded.method == "POST" && recorded.path.ends_with("/auth/tokens");
        Self {
            method: recorded.method.clone(),
            url: format!("{server}{}", recorded.path),
            headers,
            body: recorded.body.clone(),
            token_for: is_login.then(|| "x-auth-token".to_owned()),
        }
    }
}

/// A host for each of these moments.
pub fn play(stream: &Stream, starts: Vec<Instant>, say: &dyn Fn(Result<f64, String>)) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut hosts = JoinSet::new();
        for start in starts {
            let stream = stream.clone();
            hosts.spawn(async move {
                sleep(start.saturating_duration_since(Instant::now())).await;
                let end = start + LONGEST;
                host(&stream, end).await.map(|()| start.elapsed().as_secs_f64())
            });
        }
        while let Some(host) = hosts.join_next().await {
            say(host.unwrap());
        }
    });
}

async fn host(stream: &Stream, end: Instant) -> Result<(), String> {
    let authority = stream.authority.as_ref().map(|path| std::fs::read(path).unwrap());
    let authority = authority.map(|pem| Certificate::from_pem(&pem).unwrap());
    let mut client = Client::builder().no_proxy().tls_certs_only(authority);
    if !stream.keep_alive {
        client = client.pool_max_idle_per_host(0);
    }
    let client = client.build().map_err(|error| error.to_string())?;
    let mut token: Option<(String, String)> = None;
    for request in &stream.requests {
        let mut pause = Duration::from_millis(100);
        loop {
            match send(&client, request, token.as_ref()).await {
                Ok(new) => {
                    token = new.or(token);
                    break;
                }
                Err(error) if Instant::now() + pause > end => return Err(error),
                Err(_) => sleep(pause).await,
            }
            pause = (pause * 2).min(Duration::from_secs(5));
        }
    }
    Ok(())
}

async fn send(
    client: &Client,
    request: &Request,
    token: Option<&(String, String)>,
) -> Result<Option<(String, String)>, String> {
    let mut builder = client.request(Method::from_bytes(request.method.as_bytes()).unwrap(), &request.url);
    for (name, value) in request.headers.iter().chain(token) {
        builder = builder.header(name, value);
    }
    let answer = builder.body(request.body.clone()).send().await.map_err(|error| {
        count::count(false, "");
        error.to_string()
    })?;
    let (status, given) = (answer.status(), answer.headers().get("x-subject-token").cloned());
    count::count(true, &format!("{} {}", status.as_u16(), request.url));
    let body = answer.bytes().await.map_err(|error| error.to_string())?;
    if !status.is_success() && status.as_u16() != 300 {
        return Err(format!("{} answers {status}", request.url));
    }
    let Some(header) = &request.token_for else { return Ok(None) };
    let given = match given {
        Some(given) => given.to_str().unwrap().to_owned(),
        None => {
            let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
            body["auth"]["client_token"].as_str().unwrap().to_owned()
        }
    };
    Ok(Some((header.clone(), given)))
}
