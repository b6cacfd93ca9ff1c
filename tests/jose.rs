//! Interoperability with independent implementations of JWE: they open what we seal, and we open what they seal.
//!
//! José (Debian package `jose`) does the P-256 entries; it has no RSA-OAEP-256 (`jose alg`), so JWCrypto (Debian package
//! `python3-jwcrypto`) does both.

use std::{
    fs,
    io::Write,
    path::PathBuf,
    process::{Command, Stdio},
    sync::Arc,
};

use base64ct::{Base64UrlUnpadded, Encoding};
use cryptattach::{
    base::key::{BoundContext, HostName, KeySize, SealedKey, VolumeKey},
    config::{IdentitySpec, TpmConfig},
    keys::seal::{
        ContainerKey, Content, EntryContext, Expected, For, Identities, LockboxKey, OwnerKey, Recipient, seal,
    },
};
use openssl::{
    bn::{BigNum, BigNumContext, BigNumRef},
    pkey::{PKey, Private},
    rsa::Rsa,
};
use serde_json::{Value, json};
use tempfile::TempDir;
use uuid::Uuid;

#[path = "common/sealing.rs"]
mod sealing;

struct Party {
    folder: TempDir,
    key: OwnerKey,
}

impl Party {
    fn ec() -> Self {
        Self::of(OwnerKey::generate().unwrap().private_pem().unwrap().expose())
    }

    fn rsa() -> Self {
        Self::of(&Rsa::generate(3072).unwrap().private_key_to_pem().unwrap())
    }

    fn of(pem: &[u8]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("pem"), pem).unwrap();
        fs::write(folder.path().join("jwk"), jwk(&PKey::private_key_from_pem(pem).unwrap()).to_string()).unwrap();
        let key = OwnerKey::read(&folder.path().join("pem")).unwrap();
        Self { folder, key }
    }

    fn recipient(&self) -> Box<dyn Recipient> {
        Box::new(self.key.recipient().unwrap())
    }

    fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::write(&path, content).unwrap();
        path
    }

    fn jwk_file(&self) -> String {
        self.folder.path().join("jwk").into_os_string().into_string().unwrap()
    }

    fn jwk(&self) -> String {
        fs::read_to_string(self.jwk_file()).unwrap()
    }

    fn identities(&self) -> Identities {
        Identities::read(&[IdentitySpec::of("", self.folder.path().join("pem"))], &TpmConfig::default()).unwrap()
    }
}

/// A private key as JWK (RFC 7518 section 6).
fn jwk(key: &PKey<Private>) -> Value {
    let text = |number: &BigNumRef| Base64UrlUnpadded::encode_string(&number.to_vec());
    if let Ok(rsa) = key.rsa() {
        let part = |part: Option<&BigNumRef>| text(part.unwrap());
        return json!({
            "kty": "RSA", "n": text(rsa.n()), "e": text(rsa.e()), "d": text(rsa.d()), "p": part(rsa.p()),
            "q": part(rsa.q()), "dp": part(rsa.dmp1()), "dq": part(rsa.dmq1()), "qi": part(rsa.iqmp()),
        });
    }
    let ec = key.ec_key().unwrap();
    let (mut x, mut y, mut context) = (BigNum::new().unwrap(), BigNum::new().unwrap(), BigNumContext::new().unwrap());
    ec.public_key().affine_coordinates(ec.group(), &mut x, &mut y, &mut context).unwrap();
    let padded = |number: &BigNumRef| Base64UrlUnpadded::encode_string(&number.to_vec_padded(32).unwrap());
    json!({"kty": "EC", "crv": "P-256", "x": padded(&x), "y": padded(&y), "d": padded(ec.private_key())})
}

fn jose(arguments: &[&str]) -> Vec<u8> {
    let output = Command::new("jose").args(arguments).output().expect("jose is missing: scripts/prerequisites unit");
    assert!(output.status.success(), "jose {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// Runs Python's JWCrypto; `input` and the party's private JWK are on standard input, one JSON value per line.
fn jwcrypto(script: &str, lines: &[&str]) -> Vec<u8> {
    let script =
        format!("import sys, json\nfrom jwcrypto import jwe, jwk\nlines = sys.stdin.read().splitlines()\n{script}");
    let mut python = Command::new("/usr/bin/python3")
        .args(["-c", &script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3-jwcrypto is missing: scripts/prerequisites unit");
    python.stdin.take().unwrap().write_all(lines.join("\n").as_bytes()).unwrap();
    let output = python.wait_with_output().unwrap();
    assert!(output.status.success(), "jwcrypto failed (see above)");
    output.stdout
}

fn context() -> BoundContext {
    BoundContext { volume: Some(Uuid::new_v4()), ..sealing::context() }
}

fn expected(context: &BoundContext) -> Expected {
    Expected { key_id: context.key_id, container: context.container.clone(), volume: For::volume(context.volume) }
}

fn content(volume_key: &VolumeKey) -> Content {
    Content::VolumeKey(sealing::payload(volume_key))
}

/// docs/recovery.md: the escrow key opens the container key, and that one the key.
#[test]
fn jose_opens_a_key_under_a_container_key() {
    let (escrow, volume_key) = (Party::ec(), VolumeKey::random(KeySize::Bits512).unwrap());
    let container_key = Arc::new(ContainerKey::random(&"cinder".parse().unwrap(), None).unwrap());
    let kek = escrow.file("kek", &container_key.seal_to(vec![escrow.recipient()], 0).unwrap().to_json());
    let opened = jose(&["jwe", "dec", "-i", kek.to_str().unwrap(), "-k", &escrow.jwk_file()]);
    let opened: Value = serde_json::from_slice(&opened).unwrap();
    let jwk =
        escrow.file("jwk", json!({"kty": "oct", "alg": "A256KW", "k": opened["container_key"]}).to_string().as_bytes());

    let sealed = seal(&context(), &content(&volume_key), &[Box::new(container_key)]).unwrap();
    let sealed = escrow.file("key", &sealed.to_json());
    let opened = jose(&["jwe", "dec", "-i", sealed.to_str().unwrap(), "-k", jwk.to_str().unwrap()]);
    let opened: Value = serde_json::from_slice(&opened).unwrap();
    let key = Base64UrlUnpadded::decode_vec(opened["volume_key"].as_str().unwrap()).unwrap();
    assert_eq!(key, volume_key.expose());
}

/// docs/architecture.md: with the escrow key and the two derivations of a lockbox key, others open what a host's lockbox has
/// and what is sealed to that host.
#[test]
fn others_open_a_lockbox_entry_and_a_hosts_container_key() {
    let (escrow, volume_key) = (Party::rsa(), VolumeKey::random(KeySize::Bits512).unwrap());
    let host: HostName = "compute-7".parse().unwrap();
    let lockbox = Arc::new(LockboxKey::random(&host, None, 1_700_000_000_000).unwrap());
    let sealed = lockbox.seal_to(&[escrow.recipient()]).unwrap();
    let entry = EntryContext { version: 1, added: 1, expires: 2, key: context(), places: Vec::new() };
    let entry = lockbox.close_entry(&entry, &content(&volume_key)).unwrap();
    let kek = ContainerKey::random(&"cinder".parse().unwrap(), None).unwrap();
    let kek = kek.with_host(&host, &lockbox.recipient().unwrap()).unwrap();
    let kek = kek.seal_to(kek.host_recipients().unwrap(), 0).unwrap();
    let script = r#"
from base64 import urlsafe_b64encode as encode, urlsafe_b64decode as decode
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
def opened(sealed, key):
    token = jwe.JWE()
    token.deserialize(sealed, key)
    return json.loads(token.payload)
key = decode(opened(lines[0], jwk.JWK.from_json(lines[3]))["lockbox_key"] + "=")
of = " of lockbox/compute-7/1700000000000"
derived = lambda what, n: HKDF(hashes.SHA256(), n, None, ("cryptattach " + what + of).encode()).derive(key)
n = 0xffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551
d = int.from_bytes(derived("P-256 key", 48), "big") % (n - 1) + 1
pair = jwk.JWK.from_pyca(ec.derive_private_key(d, ec.SECP256R1()))
wrapping = jwk.JWK(kty="oct", k=encode(derived("wrapping key", 32)).decode().rstrip("="))
print(opened(lines[1], wrapping)["volume_key"], pair.thumbprint(), len(opened(lines[2], pair)["container_key"]))
"#;
    let lines = [sealed, entry, kek].map(|sealed| String::from_utf8(sealed.to_json()).unwrap().trim_end().to_owned());
    let told = jwcrypto(script, &[&lines[0], &lines[1], &lines[2], &escrow.jwk()]);
    let told = String::from_utf8(told).unwrap();
    let volume_key = Base64UrlUnpadded::encode_string(volume_key.expose());
    assert_eq!(told.trim(), format!("{volume_key} {} 43", lockbox.fingerprint()));
}

#[test]
fn others_open_what_we_seal() {
    let (owner, escrow) = (Party::ec(), Party::rsa());
    let volume_key = VolumeKey::random(KeySize::Bits512).unwrap();
    let content = content(&volume_key);
    let sealed = seal(&context(), &content, &[owner.recipient(), escrow.recipient()]).unwrap();
    let file = owner.file("sealed", &sealed.to_json());
    let by_jose = jose(&["jwe", "dec", "-i", file.to_str().unwrap(), "-k", &owner.jwk_file()]);
    let by_jwcrypto = [&owner, &escrow].map(|party| {
        let script = "token = jwe.JWE()\ntoken.deserialize(lines[0], jwk.JWK.from_json(lines[1]))\n\
                      sys.stdout.buffer.write(token.payload)";
        jwcrypto(script, &[String::from_utf8(sealed.to_json()).unwrap().trim_end(), &party.jwk()])
    });
    for opened in [&[by_jose], &by_jwcrypto[..]].concat() {
        let opened: Value = serde_json::from_slice(&opened).unwrap();
        let key = Base64UrlUnpadded::decode_vec(opened["volume_key"].as_str().unwrap()).unwrap();
        assert_eq!(key, volume_key.expose());
        assert_eq!(opened["key_size_bits"], 512);
    }
}

#[test]
fn jose_agrees_on_our_thumbprints() {
    for party in [Party::ec(), Party::rsa()] {
        let thumbprint = jose(&["jwk", "thp", "-a", "S256", "-i", &party.jwk_file()]);
        assert_eq!(String::from_utf8(thumbprint).unwrap().trim(), party.key.recipient().unwrap().kid());
    }
}

#[test]
fn we_open_what_others_seal() {
    let (owner, second, other) = (Party::ec(), Party::ec(), Party::rsa());
    let volume_key = VolumeKey::random(KeySize::Bits256).unwrap();
    let payload = json!({
        "volume_key": Base64UrlUnpadded::encode_string(volume_key.expose()), "cipher": "aes-xts-plain64",
        "key_size_bits": 256, "sector_size_bytes": 512, "data_offset_bytes": 0, "digest": null, "note": "from jose",
    });
    let context = context();
    let protected = json!({"typ": "cryptattach", "enc": "A256GCM", "cryptattach": context});
    let by_jose = |parties: &[&Party]| {
        let header = owner.file("header", json!({"protected": protected}).to_string().as_bytes());
        let payload = owner.file("payload", payload.to_string().as_bytes());
        let mut jose_arguments = vec!["jwe", "enc", "-i", header.to_str().unwrap(), "-I", payload.to_str().unwrap()];
        let keys: Vec<_> = parties.iter().map(|party| party.jwk_file()).collect();
        for key in &keys {
            jose_arguments.extend(["-r", r#"{"header":{"alg":"ECDH-ES+A256KW"}}"#, "-k", key]);
        }
        jose(&jose_arguments)
    };
    let by_jwcrypto = |parties: &[(&Party, &str)]| {
        let script = "token = jwe.JWE(lines[1].encode(), protected=lines[0])\nfor algorithm, key in zip(lines[2::2], lines[3::2]):\n \
                      token.add_recipient(jwk.JWK.from_json(key), header=json.dumps({'alg': algorithm}))\n\
                      print(token.serialize())";
        let (protected, payload) = (protected.to_string(), payload.to_string());
        let keys: Vec<_> = parties.iter().map(|(party, algorithm)| (*algorithm, party.jwk())).collect();
        let mut lines = vec![protected.as_str(), &payload];
        lines.extend(keys.iter().flat_map(|(algorithm, key)| [*algorithm, key]));
        jwcrypto(script, &lines)
    };
    let (ec, rsa) = ("ECDH-ES+A256KW", "RSA-OAEP-256");
    for (case, sealed, opener) in [
        ("jose, flattened", by_jose(&[&owner]), &owner),
        ("jose, general", by_jose(&[&second, &owner]), &owner),
        ("jwcrypto, flattened, P-256", by_jwcrypto(&[(&owner, ec)]), &owner),
        ("jwcrypto, flattened, RSA", by_jwcrypto(&[(&other, rsa)]), &other),
        ("jwcrypto, general, first", by_jwcrypto(&[(&owner, ec), (&other, rsa)]), &owner),
        ("jwcrypto, general, second", by_jwcrypto(&[(&owner, ec), (&other, rsa)]), &other),
    ] {
        let sealed = SealedKey::from_json(&sealed).unwrap();
        let opened =
            opener.identities().open(&sealed, &expected(&context)).map_err(|e| format!("{case}: {e}")).unwrap();
        let Content::VolumeKey(payload) = opened.content else { panic!("{case}") };
        assert!(payload.volume_key == volume_key, "{case}");
        assert_eq!(opened.context, context, "{case}");
        // Without a kid every entry is tried, and a stranger finds none that opens.
        assert!(second.identities().open(&sealed, &expected(&context)).is_err() || case == "jose, general", "{case}");
    }
}
