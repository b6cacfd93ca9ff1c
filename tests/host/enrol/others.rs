//! Other programs' credentials open here, ours open with other programs; and what is opened is not heard on the bus.

use std::fs;

use base64ct::{Base64, Encoding};
use cryptattach::{
    config::TpmConfig,
    keys::tpm::{
        EndorsementKind, Tpm,
        public::{name_of, to_sized},
    },
};
use serde_json::Value;

use super::stage::{Host, Stage};
use crate::{shell::sh, wiretap::Wiretap};

/// What tpm2-tools write in front of a credential: 0xBADCC0DE and their version.
const MAGIC: [u8; 8] = [0xBA, 0xDC, 0xC0, 0xDE, 0, 0, 0, 1];

#[test]
fn a_credential_of_tpm2_makecredential_is_opened_and_not_heard_on_the_bus() {
    let stage = Stage::new();
    let host = stage.bare_host("compute-7");
    let tap = Wiretap::on(&host.swtpm.socket());
    let tpm = Tpm::open(&TpmConfig { tcti: tap.tcti(), ..TpmConfig::default() }).unwrap();
    let root = tpm.storage_root(None).unwrap();
    let made = tpm.create_attestation_key(&root).unwrap();
    let attestation_key = tpm.esys().load(root.handle(), &made.private, &made.public).unwrap();
    for kind in EndorsementKind::ALL {
        let endorsement_key = tpm.endorsement_key(kind).unwrap();
        let public = tpm.esys().public_of(&endorsement_key).unwrap();
        let secret = openssl::sha::sha256(format!("{kind:?}").as_bytes());
        fs::write(host.file("ek.pub"), to_sized(&public).unwrap()).unwrap();
        fs::write(host.file("secret"), secret).unwrap();
        sh(&format!(
            "cd {} && tpm2_makecredential -T none -u ek.pub -s secret -n {} -o credential",
            host.file(""),
            name_of(&made.public).unwrap()
        ));
        let credential = fs::read(host.file("credential")).unwrap();
        let (id_object, rest) = sized(credential.strip_prefix(&MAGIC).unwrap());
        let (encrypted_seed, _) = sized(rest);
        let activated =
            tpm.activate_credential(&root, &endorsement_key, &attestation_key, id_object, encrypted_seed).unwrap();
        assert_eq!(activated.expose(), secret);
        assert!(tap.heard(&encrypted_seed[..32]), "the tap hears what is not secret");
        assert!(!tap.heard(&secret));
    }
}

fn sized(bytes: &[u8]) -> (&[u8], &[u8]) {
    let (len, rest) = bytes.split_first_chunk().unwrap();
    rest.split_at(u16::from_be_bytes(*len).into())
}

#[test]
fn what_tpm2_tools_open_is_the_share_that_the_host_takes() {
    let stage = Stage::new();
    for (algorithm, host) in [("rsa", stage.host("compute-7")), ("ecc", stage.bare_host("compute-8"))] {
        host.asks();
        assert!(stage.run_admission(&host, &["--trust-first-use"]).status.success());
        host.takes();
        let key = fs::read_to_string(host.file("host.tpm.pem")).unwrap();
        host.ok(&["lockbox", "open"]);
        let share = activate(&host, algorithm);
        assert!(key.contains(&format!("\"admission\":\"{share}\"")), "{key}");
    }
}

/// TPM2_ActivateCredential by tpm2-tools, with the attestation key that the host keeps; the secret in hexadecimal.
fn activate(host: &Host<'_>, algorithm: &str) -> String {
    let json = |name: &str| serde_json::from_slice::<Value>(&fs::read(host.file(name)).unwrap()).unwrap();
    let bytes = |value: &Value| Base64::decode_vec(value.as_str().unwrap()).unwrap();
    let with_len = |bytes: Vec<u8>| [&(bytes.len() as u16).to_be_bytes()[..], &bytes].concat();
    let (kept, answer) = (json("state/enrolment.json"), json("answer"));
    fs::write(host.file("ak.pub"), bytes(&kept["attestation_key"])).unwrap();
    fs::write(host.file("ak.priv"), with_len(bytes(&kept["private"]))).unwrap();
    let credential = [&MAGIC[..], &with_len(bytes(&answer["credential"])), &with_len(bytes(&answer["secret"]))];
    fs::write(host.file("credential"), credential.concat()).unwrap();
    sh(&format!(
        "cd {} && export TPM2TOOLS_TCTI={} && {{ \
             tpm2_load -C 0x81000001 -u ak.pub -r ak.priv -c ak.ctx && tpm2_flushcontext -t && \
             tpm2_createek -G {algorithm} -c ek.ctx && tpm2_flushcontext -t && \
             tpm2_startauthsession --policy-session -S session && tpm2_policysecret -S session -c e && \
             tpm2_activatecredential -c ak.ctx -C ek.ctx -i credential -o opened -P session:session && \
             tpm2_flushcontext session; }} >/dev/null && xxd -p -c 64 opened",
        host.file(""),
        host.swtpm.tcti()
    ))
    .trim()
    .to_owned()
}
