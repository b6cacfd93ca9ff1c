use std::{
    fs,
    net::TcpListener,
    sync::{Arc, Mutex as StdMutex},
    thread,
};

use serde_json::json;

use super::*;
use crate::{
    base::{advice::Advice, exit::Exit},
    config::Config,
    keys::net::{http::HttpError, testing::serve},
};

/// A configuration of a server, with the files of its log-in.
struct Site {
    folder: tempfile::TempDir,
    config: Config,
}

const APPROLE: &str = "approle = { role_id = 'role_id', secret_id = 'secret_id' }";

impl Site {
    /// It waits longer than any test should take.
    fn new(urls: &[&str], login: &str) -> Self {
        Self::within(30.0, urls, login)
    }

    /// The limit of each way to ask is in seconds.
    fn within(limit: f64, urls: &[&str], login: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for file in ["role_id", "secret_id", "token"] {
            fs::write(folder.path().join(file), format!("the {file}\n")).unwrap();
        }
        let text = format!(
            "[network]\nconnect_seconds = {limit:?}\ntry_seconds = {limit:?}\ntotal_seconds = {limit:?}\n\
             [servers.main]\nbao = {}\n{login}\n",
            json!(urls)
        );
        let config = Config::parse(&text, &folder.path().join("c.toml")).unwrap();
        Self { folder, config }
    }

    fn bao(&self) -> Bao {
        Bao::new(&self.config.servers["main"], &self.config.network).unwrap()
    }

    fn ask(&self) -> Result<HttpAnswer, BaoError> {
        self.bao().ask(Question::get(vec!["kv", "data", "x"], 100), &Cancel::never())
    }
}

fn ok(body: &str) -> (u16, String, String) {
    (200, String::new(), body.to_owned())
}

fn token(seconds: u64) -> (u16, String, String) {
    ok(&format!(r#"{{"auth": {{"client_token": "b.AAAA", "lease_duration": {seconds}}}}}"#))
}

fn is_login(request: &str) -> bool {
    request.starts_with("post /v1/auth/approle/login ")
}

/// A server that logs everybody in, and then says that; and what it is asked.
fn says(status: u16, headers: &str, body: &str) -> (String, Arc<StdMutex<Vec<String>>>) {
    let asked: Arc<StdMutex<Vec<String>>> = Arc::default();
    let (log, headers, body) = (asked.clone(), headers.to_owned(), body.to_owned());
    let url = serve(move |request| {
        log.lock().unwrap().push(request.to_owned());
        if is_login(request) { token(300) } else { (status, headers.clone(), body.clone()) }
    });
    (url, asked)
}

#[test]
fn each_status_is_told_apart() {
    let sealed = r#"{"errors": ["Vault is sealed"]}"#;
    type Is = fn(&BaoError) -> bool;
    let cases: [(u16, &str, Exit, &str, Is); 9] = [
        (403, r#"{"errors": ["permission denied"]}"#, Exit::PermissionDenied, "does not let", |e| {
            matches!(e, BaoError::Denied { .. })
        }),
        (503, sealed, Exit::StoreUnavailable, "Vault is sealed", |e| matches!(e, BaoError::Sealed { .. })),
        (429, "", Exit::StoreUnavailable, "come back later", |e| matches!(e, BaoError::Busy { .. })),
        (307, "", Exit::StoreUnavailable, "is a standby", |e| matches!(e, BaoError::Standby { .. })),
        (412, "", Exit::StoreUnavailable, "is a standby", |e| matches!(e, BaoError::Standby { .. })),
        (472, "", Exit::StoreUnavailable, "is a standby", |e| matches!(e, BaoError::Standby { .. })),
        (473, "", Exit::StoreUnavailable, "is a standby", |e| matches!(e, BaoError::Standby { .. })),
        (500, r#"{"errors": ["disk \u001b[2J"]}"#, Exit::StoreUnavailable, "answers 500", |e| {
            matches!(e, BaoError::Answer { .. })
        }),
        (
            200,
            &"x".repeat(101),
            Exit::NoSealedKey,
            "longer than the limit",
            |e| matches!(e, BaoError::Http(error) if matches!(**error, HttpError::TooLong { .. })),
        ),
    ];
    for (status, body, exit, told, is) in cases {
        let error = Site::within(1.0, &[&says(status, "", body).0], APPROLE).ask().err().unwrap();
        assert!(is(&error) && error.exit() == exit && error.to_string().contains(told), "{status}: {error}");
        assert!(error.next_step().is_some() && !error.to_string().contains('\u{1b}'), "{error}");
    }
    for status in [200, 204, 400, 404] {
        assert_eq!(Site::within(1.0, &[&says(status, "", "").0], APPROLE).ask().unwrap().status.as_u16(), status);
    }
}

#[test]
fn a_refused_log_in_is_told_and_no_secret_with_it() {
    let cases = [
        (400, r#"{"errors": ["invalid role or secret ID"]}"#, "refuses the log-in: invalid role or secret ID"),
        (403, r#"{"errors": ["permission denied"]}"#, "refuses the log-in: permission denied"),
        (200, "{}", "gives no token"),
        (200, r#"{"auth": {"client_token": "a\u000ab"}}"#, "gives no token"),
        (503, r#"{"errors": ["Vault is sealed"]}"#, "Vault is sealed"),
    ];
    for (status, body, told) in cases {
        let url = serve(move |_| (status, String::new(), body.to_owned()));
        let error = Site::within(1.0, &[&url], APPROLE).ask().err().unwrap().to_string();
        assert!(error.contains(told) && !error.contains("the secret_id"), "{error}");
    }
    let (url, _) = says(200, "", "");
    let site = Site::within(1.0, &[&url], APPROLE);
    fs::remove_file(site.folder.path().join("secret_id")).unwrap();
    let error = site.ask().err().unwrap();
    assert!(matches!(&error, BaoError::File { server, .. } if server == "main") && error.exit() == Exit::Config);
}

#[test]
fn one_run_logs_in_once_whoever_asks() {
    let (url, asked) = says(200, "", "{}");
    let site = Site::new(&[&url], &format!("namespace = 'team'\n{APPROLE}"));
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| site.ask().unwrap());
        }
    });
    let asked = asked.lock().unwrap();
    assert_eq!(asked.iter().filter(|request| is_login(request)).count(), 1);
    assert!(asked[0].ends_with("\n\n{\"role_id\":\"the role_id\",\"secret_id\":\"the secret_id\"}"), "{}", asked[0]);
    assert_eq!(asked.len(), 5);
    for request in asked.iter() {
        assert!(request.contains("\nx-vault-request: true") && request.contains("\nx-vault-namespace: team"));
        assert_eq!(request.contains("\nx-vault-token: b.aaaa"), !is_login(request), "{request}");
    }
}

#[test]
fn a_token_that_is_over_is_replaced() {
    let logins = StdMutex::new(0);
    let url = serve(move |request| {
        if is_login(request) {
            *logins.lock().unwrap() += 1;
            return token(3);
        }
        ok(&logins.lock().unwrap().to_string())
    });
    let site = Site::new(&[&url], APPROLE);
    let bao = site.bao();
    let number = || {
        let answer = bao.ask(Question::get(vec!["x"], 100), &Cancel::never()).unwrap();
        String::from_utf8(answer.body.expose().to_vec()).unwrap()
    };
    assert_eq!((number(), number()), ("1".to_owned(), "1".to_owned()));
    thread::sleep(Duration::from_secs(3));
    assert_eq!(number(), "2");
}

#[test]
fn a_token_file_is_used_as_it_is_and_its_lines_are_no_headers() {
    let (url, asked) = says(200, "", "{}");
    let site = Site::new(&[&url], "token_file = 'token'");
    site.ask().unwrap();
    assert!(asked.lock().unwrap()[0].contains("\nx-vault-token: the token"));
    let other = Site::new(&[&url], "token_file = 'token'\nnamespace = 'x'");
    fs::write(other.folder.path().join("token"), "one\nX-Vault-Namespace: root").unwrap();
    assert!(matches!(other.ask(), Err(BaoError::Config(_))));
    assert_eq!(asked.lock().unwrap().len(), 1);
}

#[test]
fn no_redirect_is_followed_and_the_next_server_is_asked() {
    let (elsewhere, lured) = says(200, "", "lured");
    let (standby, _) = says(307, &format!("Location: {elsewhere}/v1/kv/data/x\r\n"), "");
    let (active, _) = says(200, "", "active");
    let site = Site::new(&[&standby, &active], "token_file = 'token'");
    assert_eq!(site.ask().unwrap().body.expose(), b"active");
    // One server that sends around in itself is not followed either.
    let (round, asked) = says(307, "Location: /v1/other\r\n", "");
    let site = Site::new(&[&round], "token_file = 'token'");
    assert!(matches!(site.ask(), Err(BaoError::Standby { .. })));
    assert_eq!((asked.lock().unwrap().len(), lured.lock().unwrap().len()), (1, 0));
}

#[test]
fn dead_sealed_and_silent_servers_are_passed_over() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = format!("http://{}", silent.local_addr().unwrap());
    let (sealed, _) = says(503, "", r#"{"errors": ["Vault is sealed"]}"#);
    for first in ["http://127.0.0.1:1", &silent, &sealed] {
        let (good, asked) = says(200, "", "good");
        let site = Site::new(&[first, &good], APPROLE);
        assert_eq!(site.ask().unwrap().body.expose(), b"good", "{first}");
        let asked = asked.lock().unwrap();
        assert!(asked[0].starts_with("get /v1/sys/health?"), "{}", asked[0]);
        assert_eq!(asked.iter().filter(|request| is_login(request)).count(), 1);
    }
}

/// What a server does with wrapping tokens: who made it, and whether it is still there.
fn wrapping(made_by: Option<&'static str>, unwrap: u16) -> (String, Arc<StdMutex<Vec<String>>>) {
    let asked: Arc<StdMutex<Vec<String>>> = Arc::default();
    let log = asked.clone();
    let url = serve(move |request| {
        log.lock().unwrap().push(request.to_owned());
        let used = (400, String::new(), r#"{"errors": ["wrapping token is not valid or does not exist"]}"#.to_owned());
        match (request.split(' ').nth(1).unwrap(), made_by) {
            ("/v1/sys/wrapping/lookup", Some(by)) => ok(&format!(r#"{{"data": {{"creation_path": "{by}"}}}}"#)),
            ("/v1/sys/wrapping/unwrap", _) if unwrap == 200 => ok(r#"{"data": {"secret_id": "inner"}}"#),
            ("/v1/auth/approle/login", _) => token(3),
            ("/v1/kv/data/x", _) => ok("{}"),
            _ => used,
        }
    });
    (url, asked)
}

#[test]
fn a_secret_id_comes_out_of_its_wrapping_once() {
    let wrapped = "approle = { role_id = 'role_id', secret_id = 'secret_id', wrapped = true }";
    let role = "auth/approle/role/compute-7/secret-id";
    let (url, asked) = wrapping(Some(role), 200);
    let site = Site::new(&[&url], wrapped);
    site.ask().unwrap();
    // The token is over, the SecretID is kept.
    thread::sleep(Duration::from_secs(3));
    site.ask().unwrap();
    let asked = asked.lock().unwrap();
    let of = |path: &str| asked.iter().filter(|request| request.split(' ').nth(1) == Some(path)).collect::<Vec<_>>();
    assert_eq!((of("/v1/sys/wrapping/unwrap").len(), of("/v1/auth/approle/login").len()), (1, 2));
    assert!(of("/v1/auth/approle/login")[1].ends_with("\"secret_id\":\"inner\"}"));
    assert!(of("/v1/sys/wrapping/unwrap")[0].contains("\nx-vault-token: the secret_id"));

    let unwrapped: fn(&BaoError) -> bool = |error| matches!(error, BaoError::Unwrapped { .. });
    let strange: fn(&BaoError) -> bool = |error| matches!(error, BaoError::NotASecretId { .. });
    for (made_by, unwrap, is) in [
        (None, 200, unwrapped),
        (Some(role), 400, unwrapped),
        (Some("sys/wrapping/wrap"), 200, strange),
        (Some("auth/approle/login"), 200, strange),
    ] {
        let (url, asked) = wrapping(made_by, unwrap);
        let error = Site::new(&[&url], wrapped).ask().err().unwrap();
        assert!(is(&error) && error.exit() == Exit::ProofRefused, "{error}");
        assert!(asked.lock().unwrap().iter().all(|request| !is_login(request)));
    }
}

#[test]
fn what_is_not_needed_any_more_ends_at_once() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let site = Site::new(&[&format!("http://{}", silent.local_addr().unwrap())], APPROLE);
    let cancel = Cancel::never().below();
    let started = Instant::now();
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(100));
            cancel.cancel();
        });
        let refused = site.bao().ask(Question::get(vec!["x"], 100), &cancel);
        assert!(matches!(refused, Err(BaoError::Http(error)) if matches!(*error, HttpError::NotNeeded)));
    });
    assert!(started.elapsed() < Duration::from_secs(15), "{:?}", started.elapsed());
}

#[test]
fn a_server_in_the_configuration_is_checked() {
    let parse = |text: &str| Config::parse(text, "c.toml".as_ref());
    let two = format!("{APPROLE}\ntoken_file = 't'");
    for (login, told) in [
        ("", "expected exactly one of"),
        (&*two, "expected exactly one of"),
        ("certificate = 'c'", "expected exactly one of"),
        ("approle = { role_id = 'r' }", "missing field `secret_id`"),
        ("password = 'p'", "unknown field `password`"),
    ] {
        let error = parse(&format!("[servers.main]\nbao = ['https://a']\n{login}\n")).map(drop).unwrap_err();
        let error = crate::base::chain::chain(&error);
        assert!(error.contains(told) && (error.contains("[servers.main]") || error.contains(login)), "{error}");
    }
    for url in ["http://10.0.0.1", "http://bao.example", "ftp://a", "https://u@a", "https://a?b", "a"] {
        let config = parse(&format!("[servers.main]\nbao = ['{url}']\ntoken_file = 't'\n")).unwrap();
        let error = urls(&config.servers["main"]).unwrap_err();
        assert!(error.to_string().starts_with("server 'main' in c.toml cannot be used"), "{error}");
    }
    let unknown = parse("[leaves.v]\ntransit = 'k'\nserver = 'other'\n").map(drop).unwrap_err();
    assert!(crate::base::chain::chain(&unknown).contains("there is no [servers.other]"));
    let unknown = parse("[stores.s]\ntype = 'bao'\nserver = 'other'\npath = 'a/b'\nno_escrow = true\nowner = 'o'\n");
    assert!(crate::base::chain::chain(&unknown.map(drop).unwrap_err()).contains("store 's'"));
}
