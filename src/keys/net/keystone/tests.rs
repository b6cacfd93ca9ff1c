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
