use std::time::{Duration, Instant};

use super::*;
use crate::{
    base::{advice::Advice, exit::Exit, key::SecretBytes},
    config::Network,
    keys::seal::leaves::tang::tests::{Manner, Server, Site},
};

/// It waits longer than any test should take.
const MEANS: Means<'static> = within(30.0);

const fn within(seconds: f64) -> Means<'static> {
    Means { network: Network { connect_seconds: seconds, try_seconds: seconds, total_seconds: seconds }, tcti: "none" }
}

fn jwe(header: &Value) -> String {
    format!(
        "{}..AAAAAAAAAAAAAAAA.AAAA.AAAAAAAAAAAAAAAAAAAAAA",
        Base64UrlUnpadded::encode_string(header.to_string().as_bytes())
    )
}

fn prime() -> String {
    Base64UrlUnpadded::encode_string(&sss::PRIME)
}

fn threshold(least: usize, of: &[String]) -> Value {
    let pin = json!({"pin": "sss", "sss": {"t": least, "p": prime(), "jwe": of}});
    json!({"alg": "dir", "enc": "A256GCM", "clevis": pin})
}

fn foreign(pin: &str) -> String {
    jwe(&json!({"alg": "dir", "enc": "A256GCM", "clevis": {"pin": pin, pin: {}}}))
}

/// Servers, and whom clevis seals to for each.
fn servers<const N: usize>(manners: [Manner; N]) -> ([Server; N], Vec<Whom>) {
    let servers = manners.map(Server::start);
    let whom = |server: &Server| {
        let site = Site::new();
        let leaf = site.leaf_at(&[&server.url], &server.keys.thumbprint());
        leaf.clevis(site.folder.path()).unwrap().unwrap()
    };
    let whom = servers.iter().map(whom).collect();
    (servers, whom)
}

fn secret() -> SecretBytes {
    SecretBytes::copy_of(b"a passphrase").unwrap()
}

#[test]
fn what_is_sealed_is_opened_with_enough_servers_and_the_silent_ones_are_not_waited_for() {
    let ([one, two, silent], mut of) = servers([Manner::Honest, Manner::Honest, Manner::Silent]);
    let third = of.pop().unwrap();
    let nested = Whom::Threshold { least: 1, of: vec![third] };
    let whom = Whom::Threshold { least: 2, of: of.into_iter().chain([nested]).collect() };
    let binding = Binding::of_text(seal(&whom, &secret()).unwrap()).unwrap();
    assert_eq!(binding.to_string(), format!("2 of ({}/, {}/, {}/)", one.url, two.url, silent.url));
    let started = Instant::now();
    assert!(binding.open(&MEANS).unwrap() == secret());
    assert!(started.elapsed() < Duration::from_secs(15), "{:?}", started.elapsed());
    // Its members are the same.
    let members = to_members(&binding.jwe).unwrap();
    assert_eq!(Binding::of_members(&members).unwrap().jwe, binding.jwe);

    *two.manner.lock().unwrap() = Manner::Echo;
    let error = binding.open(&within(1.0)).err().unwrap();
    let told = error.to_string();
    assert!(told.contains("does not open the leaf") && told.contains("did not answer within"), "{told}");
    assert_eq!(error.exit(), Exit::StoreUnavailable);
}

#[test]
fn one_server_is_asked_for_the_key_that_the_header_names() {
    let ([server], of) = servers([Manner::Honest]);
    let text = seal(&of[0], &secret()).unwrap();
    let binding = Binding::of_text(text.clone()).unwrap();
    assert!(binding.open(&MEANS).unwrap() == secret());
    assert_eq!(server.asked().iter().filter(|line| line.starts_with("POST /rec/")).count(), 1);
    let mut thumbprints = Vec::new();
    binding.expression(&mut |leaf| match leaf {
        Leaf::Tang { thumbprint, .. } => {
            thumbprints.push(thumbprint.map(str::to_owned));
            String::new()
        }
        Leaf::Foreign(_) => unreachable!("there is one server"),
    });
    assert_eq!(thumbprints, [Some(server.keys.thumbprint())]);

    // Each letter of it is authenticated, or is no part of it.
    let [protected, _, iv, ciphertext, tag] = parts(&text).unwrap();
    for wrong in [
        [protected, "", iv, &ciphertext.replace(&ciphertext[..1], "-"), tag],
        [protected, "", iv, ciphertext, &tag[..4]],
        [protected, "", &iv[..8], ciphertext, tag],
    ] {
        assert!(Binding::of_text(wrong.join(".")).unwrap().open(&MEANS).is_err(), "{wrong:?}");
    }
    let mut header: Value = serde_json::from_slice(&Base64UrlUnpadded::decode_vec(protected).unwrap()).unwrap();
    header["clevis"]["tang"]["url"] = json!(server.url.trim_start_matches("http://"));
    let other = Base64UrlUnpadded::encode_string(header.to_string().as_bytes());
    let other = Binding::of_text([&other, "", iv, ciphertext, tag].join(".")).unwrap();
    assert_eq!(other.to_string(), format!("{}/", server.url), "as curl reads it");
    assert!(other.open(&MEANS).is_err(), "somebody has changed its header");
}

#[test]
fn a_binding_that_is_none_of_clevis_is_refused_before_anybody_is_asked() {
    let ([server], of) = servers([Manner::Honest]);
    let good = seal(&of[0], &secret()).unwrap();
    let header: Value = {
        let [protected, ..] = parts(&good).unwrap();
        serde_json::from_slice(&Base64UrlUnpadded::decode_vec(protected).unwrap()).unwrap()
    };
    let with = |pointer: &str, value: Value| {
        let mut header = header.clone();
        *header.pointer_mut(pointer).unwrap() = value;
        jwe(&header)
    };
    let url = |url: &str| with("/clevis/tang/url", json!(url));
    let even = {
        let mut even = sss::PRIME;
        even[31] = 0x42;
        Base64UrlUnpadded::encode_string(&even)
    };
    let sss = |member: &str, value: Value| {
        let mut header = threshold(1, &[foreign("tpm2"), foreign("tpm2")]);
        header["clevis"]["sss"][member] = value;
        jwe(&header)
    };
    let nested = |depth: usize| (0..depth).fold(foreign("tpm2"), |inner, _| jwe(&threshold(1, &[inner])));
    let leaves = |number: usize| jwe(&threshold(1, &vec![foreign("tpm2"); number]));
    assert!(Binding::of_text(nested(4)).is_ok() && Binding::of_text(leaves(64)).is_ok());
    let mut zipped = header.clone();
    zipped["zip"] = json!("DEF");
    let asked = server.asked().len();
    for (text, told) in [
        (String::new(), "five parts"),
        ("a.b.c.d.e.f".to_owned(), "five parts"),
        ("!.b.c.d.e".to_owned(), "not base64url"),
        ("AAAA.b.c.d.e".to_owned(), "not JSON"),
        (jwe(&json!({})), "no member 'clevis'"),
        (jwe(&json!({"clevis": {}})), "names no pin"),
        (jwe(&json!({"clevis": {"pin": "tang"}})), "no member of its pin's name"),
        (foreign("../sh"), "no name of a pin"),
        (foreign(""), "no name of a pin"),
        (foreign(&"x".repeat(33)), "no name of a pin"),
        (with("/alg", json!("dir")), "not its pin's"),
        (with("/enc", json!("A128CBC-HS256")), "unsupported 'A128CBC-HS256'"),
        (jwe(&zipped), "unsupported member 'zip'"),
        (with("/kid", json!("AAAA")), "without the key"),
        (with("/clevis/tang/adv", json!({})), "no advertisement"),
        (url("file:///etc/shadow"), "is not an http or https URL"),
        (url("ftp://10.0.0.5"), "is not an http or https URL"),
        (url("http://user:secret@10.0.0.5"), "is not an http or https URL"),
        (url("http://10.0.0.5/?x=1"), "is not an http or https URL"),
        (url(""), "is not an http or https URL"),
        (sss("p", json!(even)), "no prime of 256 bits"),
        (sss("p", json!("AQ")), "no prime of 256 bits"),
        (sss("p", json!(prime() + "AAAA")), "no prime of 256 bits"),
        (sss("t", json!(0)), "'t' that is not from 1"),
        (sss("t", json!(3)), "'t' that is not from 1"),
        (sss("t", json!(-1)), "'t' that is not from 1"),
        (sss("jwe", json!([])), "'t' that is not from 1"),
        (sss("jwe", json!([1])), "no text"),
        (sss("jwe", json!(["a.b"])), "five parts"),
        (nested(5), "more than 4 levels"),
        (leaves(65), "more than 64 pins"),
        (leaves(100), "more than 64 pins"),
        (jwe(&threshold(1, &[leaves(33), leaves(32)])), "more than 64 pins"),
        (format!("{good}{}", "A".repeat(MAX_SEALED_BYTES)), "more than"),
    ] {
        let error = Binding::of_text(text.clone()).err().map(|error| error.to_string());
        assert!(error.as_ref().is_some_and(|error| error.contains(told)), "{told}: {error:?}");
    }
    assert_eq!(server.asked().len(), asked);
}

#[test]
fn a_tree_is_told_as_a_policy_is_written() {
    let pins = ["a", "b", "c"].map(foreign);
    let all = jwe(&threshold(2, &pins[..2]));
    let any = jwe(&threshold(1, &[all, pins[2].clone()]));
    let one = jwe(&threshold(1, &[any]));
    let told = Binding::of_text(jwe(&threshold(2, &[one, pins[0].clone(), pins[1].clone()]))).unwrap().to_string();
    assert_eq!(told, "2 of (any(all(pin a, pin b), pin c), pin a, pin b)");
}

#[test]
fn a_pin_that_clevis_has_no_program_for_is_named() {
    let binding = Binding::of_text(foreign("no-such-pin")).unwrap();
    let error = binding.open(&MEANS).err().unwrap();
    assert!(error.to_string().starts_with("clevis' pin 'no-such-pin' "), "{error}");
    assert_eq!(error.exit(), Exit::KeyRefused);
    assert!(error.next_step().unwrap().contains("clevis luks unlock"));
}
