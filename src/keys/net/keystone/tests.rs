use std::sync::atomic::Ordering::SeqCst;

use super::*;
use crate::keys::net::testing::{cloud, serve};

#[test]
fn puts_the_secret_into_its_place() {
    let user = Named::Name { name: "a\"b\u{1}".to_owned(), domain: ("id", "default".to_owned()) };
    let secret = SecretBytes::copy_of("p\"w\u{1}\u{fc}".as_bytes()).unwrap();
    let json = fill(&json!({"password": HOLE, "user": user.to_json()}), &secret).unwrap();
    let json: Value = serde_json::from_slice(json.expose()).unwrap();
    assert_eq!(json["password"], "p\"w\u{1}\u{fc}");
    assert_eq!(json["user"]["name"], "a\"b\u{1}");
}

#[test]
fn a_callers_service_token_goes_along_to_the_store() {
    let (heard, hears) = std::sync::mpsc::channel();
    let url = serve(move |head| {
        heard.send(head.to_owned()).unwrap();
        (200, String::new(), String::new())
    });
    let (config, _folder) = cloud(&format!("{{auth: {{auth_url: \"{url}\"}}}}"));
    let secret = |text: &str| SecretBytes::copy_of(text.as_bytes()).unwrap();
    let caller = Caller { token: secret("of the user"), service_token: Some(secret("of the service")) };
    let network = Network::default();
    let session = Session::new(&config, &[url], &network, "key-manager", Some(Arc::new(caller))).unwrap();
    session.send(|urls| Request::new(Method::GET, urls.to_vec(), 100)).unwrap();
    let head = hears.recv().unwrap();
    assert!(head.contains("x-auth-token: of the user\nx-service-token: of the service"), "{head}");
}

/// A cloud whose Keystone makes the tokens "t1", "t2", ... and whose service answers with this status; what they hear.
fn counting(
    answer: impl Fn(&str) -> u16 + Send + Sync + 'static,
) -> (impl Fn(&str) -> Session, std::sync::mpsc::Receiver<String>) {
    let (heard, hears) = std::sync::mpsc::channel();
    let made = std::sync::atomic::AtomicUsize::new(0);
    let url = serve(move |head| {
        let token = head.lines().find_map(|line| line.strip_prefix("x-auth-token: "));
        let (status, headers) = match token {
            Some(token) => (answer(token), String::new()),
            None => (201, format!("x-subject-token: t{}\r\n", made.fetch_add(1, SeqCst) + 1)),
        };
        heard.send(token.unwrap_or("log-in").to_owned()).unwrap();
        let times = "\"issued_at\":\"2026-11-28T10:15:28.000000Z\",\"expires_at\":\"2026-11-28T11:15:28.000000Z\"";
        (status, headers, format!("{{\"token\":{{\"methods\":[\"password\"],{times}}}}}"))
    });
    let session = move |secret: &str| {
        let auth =
            format!("auth_url: \"{url}\", application_credential_id: \"a\", application_credential_secret: {secret}");
        let (config, _folder) = cloud(&format!("{{auth_type: v3applicationcredential, auth: {{{auth}}}}}"));
        let urls = [format!("{url}/v1/AUTH_a")];
        let mut session = Session::new(&config, &urls, &Network::default(), "object-store", None).unwrap();
        session.warm();
        session
    };
    (session, hears)
}

fn ask(session: &Session) -> StatusCode {
    session.send(|urls| Request::new(Method::GET, urls.to_vec(), 1000)).unwrap().status
}

#[test]
fn the_next_attach_goes_on_with_the_token_and_with_no_other_secret() {
    let (session, hears) = counting(|_| 200);
    assert_eq!(ask(&session("one")), 200);
    assert_eq!(ask(&session("one")), 200);
    assert_eq!(ask(&session("other")), 200);
    assert_eq!(hears.try_iter().collect::<Vec<_>>(), ["log-in", "t1", "t1", "log-in", "t2"]);
    session("other").kept.unwrap().refused();
    ask(&session("other"));
    assert_eq!(hears.try_iter().collect::<Vec<_>>(), ["log-in", "t3"]);
    session("other").kept.unwrap().refused();
}

#[test]
fn a_token_that_is_refused_is_removed_and_the_host_logs_in_once() {
    // Expired or withdrawn; or of a time at which the user might do less.
    for status in [401, 403] {
        let (session, hears) = counting(move |token| if token == "t1" { status } else { 200 });
        let first = session("one");
        assert_eq!(ask(&first), if status == 401 { StatusCode::OK } else { StatusCode::FORBIDDEN });
        assert!(hears.try_iter().count() >= 2);
        first.kept.as_ref().unwrap().keep(&Token {
            value: HeaderValue::from_static("t1"),
            keep: Some(60),
            is_kept: false,
            service: None,
            urls: first.urls.clone(),
        });
        assert_eq!(ask(&session("one")), StatusCode::OK);
        let heard: Vec<_> = hears.try_iter().collect();
        assert_eq!((heard.len(), &*heard[0], &*heard[1]), (3, "t1", "log-in"), "{heard:?}");
        assert_eq!(ask(&session("one")), StatusCode::OK);
        assert_eq!(hears.try_iter().collect::<Vec<_>>(), [&*heard[2]], "the new one is kept");
        session("one").kept.unwrap().refused();
    }
    // No token will do: it ends.
    let (session, hears) = counting(|_| 401);
    let refused = session("one").send(|urls| Request::new(Method::GET, urls.to_vec(), 1000)).err().unwrap();
    assert!(matches!(refused, SendError::Auth(AuthError::NewToken(_))), "{refused:?}");
    assert!(refused.to_string().contains("(401 Unauthorized)") && refused.exit() == Exit::StoreUnavailable);
    assert_eq!(hears.try_iter().collect::<Vec<_>>(), ["log-in", "t1", "log-in", "t2"]);
    session("one").kept.unwrap().refused();
}

#[test]
fn a_token_is_kept_for_less_than_it_is_good_for_and_for_an_hour_at_most() {
    let lifetime = |issued, expires| kept::lifetime(Some(issued), Some(expires));
    assert_eq!(lifetime("2026-11-28T10:15:28.000000Z", "2026-11-28T10:45:28.000000Z"), Some(1740));
    assert_eq!(lifetime("2026-11-28T10:15:28Z", "2027-11-28T10:15:28Z"), Some(3600));
    assert_eq!(lifetime("2026-11-28T10:15:28Z", "2026-11-28T10:16:28Z"), None);
    assert_eq!(lifetime("2026-11-28T10:15:28Z", "2026-11-28T09:15:28Z"), None);
    for wrong in ["", "Z", "tomorrow", "2026-11-28T10:15:28+01:00", "9999999999999999-99Z"] {
        assert_eq!(lifetime("2026-11-28T10:15:28Z", wrong), None, "{wrong}");
    }
    assert_eq!(kept::lifetime(None, Some("2026-11-28T10:15:28Z")), None);
}
