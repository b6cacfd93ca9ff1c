//! Whose a token is: Keystone is asked, not the one who brings it.
//!
//! Source: OpenStack Identity API v3, "Validate and show information for token"; keystonemiddleware for what a service token
//! is good for.

use reqwest::{Method, StatusCode, Url};
use serde::Deserialize;

use super::{
    AuthError, Caller, Credentials, HeaderValue, HttpAnswer, MOST_TOKEN_BYTES, Request, SendError, Session, accepted,
    header, http, parse,
};
use crate::{
    base::key::{ProjectId, SecretBytes},
    config::{CloudConfig, Network},
    keys::net::CloudsError,
};

/// A Keystone, and the login of a user who may ask it about the tokens of others.
pub struct Verifier {
    session: Session,
    /// Whoever has one of these roles acts for users whose tokens may have expired meanwhile.
    service_roles: Vec<String>,
}

/// Whose a token is.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct TokenOwner {
    pub user: User,
    /// What it is scoped to; `None` for a domain, the whole system, or nothing.
    pub project: Option<Project>,
    #[serde(default)]
    roles: Vec<Role>,
    #[serde(default)]
    system: Option<System>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct User {
    pub id: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Project {
    pub id: ProjectId,
    pub name: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
struct Role {
    name: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
struct System {
    #[serde(default)]
    all: bool,
}

#[derive(Deserialize)]
struct Verified {
    token: TokenOwner,
}

impl TokenOwner {
    /// The first of these roles that the owner has; oslo.policy compares their names without case.
    pub fn role<'a>(&self, roles: impl IntoIterator<Item = &'a String>) -> Option<&'a str> {
        // A role on a domain says nothing of the projects of others.
        if self.project.is_none() && !self.system.as_ref().is_some_and(|system| system.all) {
            return None;
        }
        let has = |role: &&String| self.roles.iter().any(|own| own.name.eq_ignore_ascii_case(role));
        roles.into_iter().find(has).map(String::as_str)
    }
}

impl Verifier {
    /// The Keystone of a cloud. Nothing is sent yet.
    pub fn new(config: &CloudConfig, network: &Network, service_roles: &[String]) -> Result<Self, AuthError> {
        let mut session = Session::new(config, &[], network, "identity", None)?;
        if let Credentials::TempAuth { .. } = session.cloud.credentials {
            return Err(CloudsError::NotKeystone.into());
        }
        // The one that logs in is the one that is asked, whatever its catalogue says.
        session.urls = vec![session.identity_url(&[])?];
        Ok(Self { session, service_roles: service_roles.to_vec() })
    }

    /// Whose the caller's token is. One that has expired counts if a service vouches for it: the operation began in time.
    pub fn owner(&self, caller: &Caller) -> Result<TokenOwner, SendError> {
        if let Some(owner) = self.ask(&caller.token, false)? {
            return Ok(owner);
        }
        let refused = || AuthError::CallerToken(self.session.urls[0].clone());
        let Some(service_token) = &caller.service_token else { return Err(refused().into()) };
        let vouched =
            self.ask(service_token, false)?.is_some_and(|service| service.role(&self.service_roles).is_some());
        let owner = if vouched { self.ask(&caller.token, true)? } else { None };
        Ok(owner.ok_or_else(refused)?)
    }

    /// `None` if Keystone does not know the token, or knows it no longer.
    fn ask(&self, token: &SecretBytes, expired: bool) -> Result<Option<TokenOwner>, SendError> {
        let Ok(subject) = header(token, &self.session.cloud.auth_url) else { return Ok(None) };
        let answer = self.session.send(|urls| request(urls, &subject, expired))?;
        match answer.status {
            StatusCode::NOT_FOUND => Ok(None),
            StatusCode::FORBIDDEN => Err(AuthError::MayNotVerify(answer.url).into()),
            status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
                Err(unavailable(answer).into())
            }
            _ => Ok(Some(parse::<Verified>(&accepted(answer)?)?.token)),
        }
    }
}

fn request(urls: &[Url], subject: &HeaderValue, expired: bool) -> Request {
    let url = |base: &Url| {
        let mut url = http::below(base, &["auth", "tokens"]);
        url.set_query(Some(if expired { "nocatalog&allow_expired=1" } else { "nocatalog" }));
        url
    };
    let urls = urls.iter().map(url).collect();
    Request::new(Method::GET, urls, MOST_TOKEN_BYTES).header("x-subject-token", subject.clone())
}

fn unavailable(answer: HttpAnswer) -> AuthError {
    AuthError::Unavailable { url: answer.url, status: answer.status }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::keys::net::testing::{cloud, serve};

    fn owner(json: &str) -> TokenOwner {
        serde_json::from_str::<Verified>(json).unwrap().token
    }

    #[test]
    fn a_role_counts_on_a_project_or_the_system_and_not_on_a_domain() {
        let roles = ["admin".to_owned(), "service".to_owned()];
        let role = |json: &str| owner(json).role(&roles).map(str::to_owned);
        let project = r#""project": {"id": "7ed2", "name": "keys", "domain": {"id": "default"}}"#;
        let with = |scope: &str, role: &str| {
            format!(r#"{{"token": {{"user": {{"id": "u"}}, "roles": [{{"id": "1", "name": "{role}"}}], {scope}}}}}"#)
        };
        assert_eq!(role(&with(project, "Admin")).as_deref(), Some("admin"));
        assert_eq!(role(&with(project, "service")).as_deref(), Some("service"));
        assert_eq!(role(&with(project, "member")), None);
        assert_eq!(role(&with(r#""system": {"all": true}"#, "admin")).as_deref(), Some("admin"));
        assert_eq!(role(&with(r#""domain": {"id": "d"}"#, "admin")), None);
        assert_eq!(owner(r#"{"token": {"user": {"id": "u"}}}"#).role(&roles), None);
        assert_eq!(owner(&with(project, "member")).project.unwrap().id.as_str(), "7ed2");
    }

    /// A Keystone that knows the tokens "user" (expired), "service" and "member"; it is asked with the token "own".
    fn keystone() -> (Verifier, mpsc::Receiver<String>, tempfile::TempDir) {
        let (heard, hears) = mpsc::channel();
        let url = serve(move |head| {
            heard.send(head.to_owned()).unwrap();
            let asks_with_own = head.contains("x-auth-token: own");
            let subject = head.lines().find_map(|line| line.strip_prefix("x-subject-token: ")).unwrap_or_default();
            let role = match subject {
                _ if !asks_with_own => return (403, String::new(), "{}".to_owned()),
                "user" if head.contains("allow_expired=1") => "member",
                "service" => "service",
                "member" => "member",
                _ => return (404, String::new(), r#"{"error": {"message": "Could not find token"}}"#.to_owned()),
            };
            let body = format!(
                r#"{{"token": {{"user": {{"id": "{subject}"}}, "roles": [{{"name": "{role}"}}], "project": {{"id": "p", "name": "n"}}}}}}"#
            );
            (200, String::new(), body)
        });
        let (config, folder) = cloud(&format!("{{auth_type: v3token, auth: {{auth_url: \"{url}\", token: own}}}}"));
        (Verifier::new(&config, &Network::default(), &["service".to_owned()]).unwrap(), hears, folder)
    }

    #[test]
    fn a_token_that_has_expired_counts_only_if_a_service_vouches_for_it() {
        let (verifier, heard, _folder) = keystone();
        let secret = |text: &str| SecretBytes::copy_of(text.as_bytes()).unwrap();
        let owner = |token: &str, service: Option<&str>| {
            verifier.owner(&Caller { token: secret(token), service_token: service.map(secret) })
        };
        assert_eq!(owner("user", Some("service")).unwrap().user.id, "user");
        assert_eq!(owner("member", None).unwrap().user.id, "member");
        for (token, service) in [("user", None), ("user", Some("member")), ("user", Some("x")), ("x", Some("service"))]
        {
            let refused = owner(token, service).err().unwrap();
            assert!(matches!(refused, SendError::Auth(AuthError::CallerToken(_))), "{token} {service:?}: {refused:?}");
        }
        let first = heard.try_iter().next().unwrap();
        assert!(first.starts_with("get /v3/auth/tokens?nocatalog "), "{first}");
    }
}
