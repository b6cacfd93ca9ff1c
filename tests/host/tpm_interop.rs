//! The TPM key's file, in the hands of other programs: tpm2-tools and tpm2-openssl.
//!
//! The latter loads the key to show its public part; it has no way to say a policy, so it cannot use it.

use std::{fs, process::Command};

use cryptattach::keys::tpm::{IdentityFile, Policy};
use openssl::{
    derive::Deriver,
    ec::{EcGroup, EcKey},
    nid::Nid,
    pkey::PKey,
};

use crate::tpm::{Host, coordinates};

/// tpm2-tools load the file, satisfy the policy that it names, and come to the same shared secret.
#[test]
fn tpm2_tools_use_the_key_under_its_policy_only() {
    let host = Host::new();
    host.enrol(&host.literal("4+7"), None);
    let file = IdentityFile::read(&host.path("host.tpm.pem")).unwrap();
    let ephemeral = EcKey::generate(&EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap()).unwrap();
    let (x, y) = coordinates(&ephemeral);
    let in_software = {
        let (ours, theirs) = (PKey::from_ec_key(ephemeral).unwrap(), file.public_key().unwrap());
        let mut deriver = Deriver::new(&ours).unwrap();
        deriver.set_peer(&theirs).unwrap();
        deriver.derive_to_vec().unwrap()
    };
    {
        let (tpm, signatures) = (host.tpm(), host.signatures());
        let now = tpm.satisfiable(&file.policy, &signatures).unwrap();
        let z = tpm.identity(&file).unwrap().ecdh_z(&now, (&x, &y), None).unwrap();
        assert_eq!(z.expose(), in_software);
    }

    let point = [&[0, 68, 0, 32][..], &x, &[0, 32], &y].concat();
    fs::write(host.path("point"), point).unwrap();
    let path = |name: &str| host.path(name).into_os_string().into_string().unwrap();
    let tool = |arguments: &[&str]| host.swtpm.tool(arguments);
    let (pem, key, session, point, z) = (path("host.tpm.pem"), path("key"), path("session"), path("point"), path("z"));
    tool(&["tpm2_load", "-r", &pem, "-c", &key]);
    tool(&["tpm2_flushcontext", "-t"]);
    let zgen = |authorization: &[&str]| {
        let output = Command::new("tpm2_ecdhzgen")
            .args(["-c", &key, "-u", &point, "-o", &z])
            .args(authorization)
            .env("TPM2TOOLS_TCTI", host.swtpm.tcti())
            .output()
            .unwrap();
        for left in ["-t", "-l", "-s"] {
            tool(&["tpm2_flushcontext", left]);
        }
        output.status.success()
    };
    let by_pcrs = |selections: &[&str]| {
        tool(&["tpm2_startauthsession", "--policy-session", "-S", &session]);
        for selection in selections {
            tool(&["tpm2_policypcr", "-S", &session, "-l", selection]);
        }
        zgen(&["-p", &format!("session:{session}")])
    };
    assert!(!zgen(&[]), "opens by the empty password");
    assert!(!by_pcrs(&["sha256:4,7"]), "opens by a part of the policy");
    assert!(!by_pcrs(&["sha256:15", "sha256:4,7"]), "opens by the policy's parts in another order");
    assert!(by_pcrs(&["sha256:4,7", "sha256:15"]), "does not open by its policy");
    assert_eq!(fs::read(&z).unwrap()[4..36], in_software);
}

#[test]
fn openssl_reads_the_file_by_its_tpm2_provider() {
    let host = Host::new();
    for policy in [host.literal("7"), Policy { pin: true, ..host.literal("7") }] {
        host.enrol(&policy, policy.pin.then_some("1234"));
        let read = Command::new("openssl")
            .args(["pkey", "-provider", "tpm2", "-provider", "default", "-propquery", "?provider=tpm2", "-pubout"])
            .args(["-passin", "pass:1234", "-in"])
            .arg(host.path("host.tpm.pem"))
            .env("TPM2OPENSSL_TCTI", host.swtpm.tcti())
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&read.stderr);
        assert!(read.status.success(), "{error}");
        assert_eq!(String::from_utf8(read.stdout).unwrap(), fs::read_to_string(host.path("host.pem")).unwrap());
    }
}
