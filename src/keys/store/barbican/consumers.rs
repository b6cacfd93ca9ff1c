//! Barbican's own consumers (API 1.1): `secrets/ID/consumers`.

use reqwest::{Method, StatusCode};
use serde::Deserialize;
use serde_json::json;

use super::{Barbican, MOST_BYTES};
use crate::{
    base::key::{Consumer, KeyId},
    keys::{
        net::http::{HttpAnswer, Request},
        store::{Consumers, StoreError, consumers},
    },
};

const PAGE: usize = 100;

impl Barbican {
    fn change_consumer(
        &self,
        action: &'static str,
        method: &Method,
        id: &KeyId,
        consumer: &Consumer,
    ) -> Result<HttpAnswer, StoreError> {
        let body = json!(consumer).to_string();
        self.send(action, |urls| {
            let urls = Self::urls(urls, &["secrets", &id.to_string(), "consumers"]);
            Request::new(method.clone(), urls, MOST_BYTES).body("application/json", body.clone())
        })
    }
}

impl Consumers for Barbican {
    fn consumers(&self, id: &KeyId) -> Result<Vec<Consumer>, StoreError> {
        #[derive(Deserialize)]
        struct Page {
            consumers: Vec<Consumer>,
            total: usize,
        }
        let mut found: Vec<Consumer> = Vec::new();
        loop {
            let (offset, limit) = (found.len().to_string(), PAGE.to_string());
            let answer = self.send("read from", |urls| {
                let mut urls = Self::urls(urls, &["secrets", &id.to_string(), "consumers"]);
                for url in &mut urls {
                    url.query_pairs_mut().append_pair("limit", &limit).append_pair("offset", &offset);
                }
                Request::new(Method::GET, urls, MOST_BYTES)
            })?;
            // Before API 1.1 there were none. Whether there is the secret is another question.
            if answer.status == StatusCode::NOT_FOUND {
                return Ok(found);
            }
            let page: Page = self.parse(&self.expect("read from", answer)?)?;
            let more = !page.consumers.is_empty();
            found.extend(page.consumers);
            if !more || found.len() >= page.total {
                found.sort_unstable();
                return Ok(found);
            }
        }
    }

    fn add_consumer(&self, id: &KeyId, consumer: &Consumer) -> Result<(), StoreError> {
        let answer = self.change_consumer("write to", &Method::POST, id, consumer)?;
        if answer.status == StatusCode::NOT_FOUND {
            return Err(self.not_found(id));
        }
        self.expect("write to", answer).map(drop)
    }

    fn remove_consumer(&self, id: &KeyId, consumer: &Consumer) -> Result<(), StoreError> {
        let answer = self.change_consumer("delete from", &Method::DELETE, id, consumer)?;
        match answer.status {
            // Sent twice, the first one may have removed it.
            StatusCode::NOT_FOUND if answer.repeated => Ok(()),
            StatusCode::NOT_FOUND => Err(consumers::missing(id, consumer)),
            _ => self.expect("delete from", answer).map(drop),
        }
    }
}
