//! Certificates of endorsement keys, as the makers of TPMs make them and as they do not.

use std::fs;

use cryptattach::keys::tpm::{EndorsementKind, Tpm, public::to_pkey};

use super::stage::{Host, Stage};
use crate::site::sh;

/// What a good certificate says (TCG EK Credential Profile, section 3.2): no subject, the TPM's names in a critical subject
/// alternative name of the directory kind.
const GOOD: &str = "basicConstraints = critical, CA:FALSE
keyUsage = critical, keyAgreement
extendedKeyUsage = 2.23.133.8.1
subjectAltName = critical, dirName:tpm
[tpm]
0.2.23.133.2.1 = id:53544D20
0.2.23.133.2.2 = ST33
0.2.23.133.2.3 = id:00010101
";

/// A maker: a root and an authority below it. Only the latter is in the folder that the administrator trusts.
fn maker(stage: &Stage, name: &str) -> String {
    let folder = stage.keys(name);
    sh(&format!(
        "mkdir {folder} {folder}/trusted && cd {folder} && \
         key='-newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes' && ca='-addext basicConstraints=critical,CA:TRUE' && \
         openssl req -x509 $key -keyout root.key -out root.pem -subj '/CN=Maker Root' -days 99 2>/dev/null && \
         openssl req -new $key -keyout ca.key -out ca.csr -subj '/CN=Maker EK CA' 2>/dev/null && \
         printf 'basicConstraints = critical, CA:TRUE\\nkeyUsage = critical, keyCertSign' > ca.ext && \
         openssl x509 -req -in ca.csr -CA root.pem -CAkey root.key -set_serial 7 -extfile ca.ext -days 99 \
             -outform DER -out trusted/ca.cer 2>/dev/null && \
         openssl x509 -in trusted/ca.cer -out ca.pem"
    ));
    folder.to_owned()
}

/// Puts a certificate for its P-256 endorsement key into the host's TPM, with room to spare behind it.
fn certify(host: &Host<'_>, maker: &str, extensions: &str, days: u32) {
    let public = {
        let tpm = Tpm::open(&host.tpm_config()).unwrap();
        let key = tpm.endorsement_key(EndorsementKind::P256).unwrap();
        to_pkey(&tpm.esys().public_of(&key).unwrap()).unwrap().public_key_to_pem().unwrap()
    };
    fs::write(host.file("ek.pem"), public).unwrap();
    fs::write(host.file("ek.ext"), extensions).unwrap();
    let at = host.file("");
    sh(&format!(
        "cd {at} && openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout any.key -subj / -out ek.csr \
             2>/dev/null && \
         openssl x509 -req -in ek.csr -force_pubkey ek.pem -CA {maker}/ca.pem -CAkey {maker}/ca.key -set_serial 9 \
             -extfile ek.ext -days {days} -outform DER -out ek.cer 2>/dev/null && \
         printf '\\377\\377\\377\\377' >> ek.cer"
    ));
    let size = fs::metadata(host.file("ek.cer")).unwrap().len().to_string();
    let attributes = "ownerread|ownerwrite|authread|no_da";
    let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        host.swtpm.tool(&["tpm2_nvundefine", "0x1c0000a", "-C", "o"]);
    }));
    host.swtpm.tool(&["tpm2_nvdefine", "0x1c0000a", "-C", "o", "-s", &size, "-a", attributes]);
    host.swtpm.tool(&["tpm2_nvwrite", "0x1c0000a", "-C", "o", "-i", &host.file("ek.cer")]);
    host.asks_again();
}

#[test]
fn a_p256_key_with_its_makers_certificate_is_believed_in() {
    let stage = Stage::new();
    let host = stage.bare_host("compute-7");
    let maker = maker(&stage, "maker");
    certify(&host, &maker, GOOD, 99);
    let admitted = stage.run_admission(&host, &["--ca", &format!("{maker}/trusted")]);
    let said = String::from_utf8(admitted.stdout).unwrap();
    assert!(said.contains("certificate by Maker EK CA for id:53544D20, ST33, id:00010101"), "{said}");
    host.takes();
}

#[test]
fn certificates_that_are_no_proof_are_refused() {
    let stage = Stage::new();
    let host = stage.bare_host("compute-7");
    let (maker, other) = (maker(&stage, "maker"), maker(&stage, "other"));
    let trusted = format!("{maker}/trusted");
    let refused = |why: &str| {
        let refused = stage.refuses(&host, &["--ca", &trusted]);
        assert!(refused.contains(why), "no '{why}'");
    };
    // Another authority of the same name.
    certify(&host, &other, GOOD, 99);
    refused("is not signed by a trusted authority");
    // A key that the same maker has certified for something else, which need not be in a TPM.
    certify(&host, &maker, &GOOD.replace("2.23.133.8.1", "serverAuth"), 99);
    refused("is not for an endorsement key");
    certify(&host, &maker, &format!("1.2.3.4 = critical, ASN1:NULL\n{GOOD}"), 99);
    refused("unhandled critical extension");
    certify(&host, &maker, GOOD, 0);
    refused("certificate has expired");

    // To have a certificate makes nobody an authority.
    certify(&host, &maker, GOOD, 99);
    sh(&format!(
        "cd {maker} && openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout ca.key -out leaf.csr \
             -subj '/CN=leaf' 2>/dev/null && printf 'basicConstraints = critical, CA:FALSE' > leaf.ext && \
         cp ca.key leaf.key && openssl x509 -req -in leaf.csr -CA {other}/ca.pem -CAkey {other}/ca.key -set_serial 3 \
             -extfile leaf.ext -days 99 -out ca.pem 2>/dev/null && rm trusted/* && cp ca.pem trusted/leaf.pem"
    ));
    certify(&host, &maker, GOOD, 99);
    refused("is not signed by a trusted authority: invalid CA certificate");
}
