//! Requests that lie: each in one point, signed by a real TPM, and refused for that point.

use base64ct::{Base64, Encoding};
use cryptattach::keys::tpm::{
    Counter, Policy, SiteKey, attestation_templates,
    public::{identity_p256, identity_rsa},
};
use openssl::{
    ec::{EcGroup, EcKey},
    nid::Nid,
};
use serde_json::Value;

use super::{
    forger::{Certify, attributes, endorsement_keys, forge, with_point},
    stage::{Host, Stage},
};

#[test]
fn the_forger_is_admitted_as_long_as_it_tells_the_truth() {
    let stage = Stage::new();
    stage.site_key("site.pem");
    let host = stage.host("compute-7");
    host.configure("site_key = '../site.pem'\n");
    forge(&host, |_| {});
    stage.admit(&host);
    // A TPM that has no P-256.
    forge(&host, |plan| {
        plan.attestation_key = attestation_templates().unwrap()[1].clone();
        plan.identity = identity_rsa(&plan.policy.digest().unwrap(), false).unwrap();
    });
    stage.admit_again(&host);
}

#[test]
fn keys_with_other_attributes_are_refused() {
    let stage = Stage::new();
    let host = stage.host("compute-7");
    let attestation_key = "attestation key";
    forge(&host, |plan| attributes(&mut plan.attestation_key, |is| is.with_restricted(false)));
    stage.refuses_part(&host, attestation_key, "it must be restricted");
    forge(&host, |plan| attributes(&mut plan.attestation_key, |is| is.with_fixed_tpm(false).with_fixed_parent(false)));
    stage.refuses_part(&host, attestation_key, "it must be fixedTPM, must be fixedParent");

    let identity = "identity key";
    forge(&host, |plan| attributes(&mut plan.identity, |is| is.with_user_with_auth(true)));
    stage.refuses_part(&host, identity, "it must not be userWithAuth");
    forge(&host, |plan| attributes(&mut plan.identity, |is| is.with_fixed_tpm(false).with_fixed_parent(false)));
    stage.refuses_part(&host, identity, "it must be fixedTPM, must be fixedParent");
    forge(&host, |plan| attributes(&mut plan.identity, |is| is.with_admin_with_policy(false)));
    stage.refuses_part(&host, identity, "it must be adminWithPolicy");
    forge(&host, |plan| attributes(&mut plan.identity, |is| is.with_sign_encrypt(true)));
    stage.refuses_part(&host, identity, "it must not be sign");
    forge(&host, |plan| attributes(&mut plan.identity, |is| is.with_no_da(false)));
    stage.refuses_part(&host, identity, "it must be noDA");
}

#[test]
fn policies_that_are_not_the_sites_are_refused() {
    let stage = Stage::new();
    let mut host = stage.host("compute-7");
    let weaken = |host: &Host<'_>, change: fn(&mut Policy)| {
        forge(host, |plan| {
            change(&mut plan.policy);
            plan.identity = identity_p256(&plan.policy.digest().unwrap(), false).unwrap();
        });
    };
    weaken(&host, |policy| policy.latch = false);
    stage.refuses_part(&host, "policy", "it is without the latch");
    weaken(&host, |policy| policy.pcrs.insert(4, [9; 32]));
    stage.refuses_part(&host, "policy", "it binds PCR 4 to 0909");
    weaken(&host, |policy| policy.pcrs = Default::default());
    stage.refuses_part(&host, "policy", "it does not name a PCR");
    // The request says the right policy, the key has another.
    forge(&host, |plan| plan.identity = identity_p256(&[5; 32], false).unwrap());
    stage.refuses_part(&host, "identity key", "its policy differs from the one in the request: 0505");

    stage.configure("pcrs = [4, 7]");
    forge(&host, |_| {});
    stage.refuses_part(&host, "policy", "it binds the values of PCR 4+7+8+9; expected PCR 4+7");
    stage.site_key("site.pem");
    forge(&host, |_| {});
    stage.refuses_part(&host, "policy", "it does not trust signatures by the site's key");
    // Values that nobody vouches for.
    stage.configure("");
    host.asks();
    let (request, output) = (host.file("request"), host.file("answer"));
    let arguments = ["host", "admit", &request, "--output", &output, "--ca", stage.authority()];
    assert!(stage.fails(80, &arguments).contains("which nothing confirms"));
    let output = stage.run(&[&arguments[..], &["--trust-pcr-values"]].concat());
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("no proof that"));
    // Where nothing is measured, any boot state opens the key; no one can want that.
    host.swtpm.reboot();
    forge(&host, |_| {});
    stage.refuses_part(&host, "policy", "nothing was measured, and any boot state opens the key");
}

#[test]
fn the_counter_is_the_tpms_own_and_the_sites() {
    let stage = Stage::new();
    stage.site_key("other.pem");
    stage.site_key("site.pem");
    let host = stage.host("compute-7");
    host.configure("site_key = '../site.pem'\n");
    let with = |change: &dyn Fn(&mut Policy), certify| {
        forge(&host, |plan| {
            change(&mut plan.policy);
            plan.identity = identity_p256(&plan.policy.digest().unwrap(), false).unwrap();
            plan.certify = certify;
        });
    };
    fn signed(policy: &mut Policy) -> &mut cryptattach::keys::tpm::SignedPcrs {
        policy.signed.as_mut().unwrap()
    }
    with(&|policy| signed(policy).revocation.as_mut().unwrap().base += 100, Certify::TheIdentity);
    stage.refuses_part(&host, "certification of the counter", "has another value than the policy says");
    // A host that enrols again goes on with its epochs: fewer old signatures count, not more.
    with(&|policy| signed(policy).revocation.as_mut().unwrap().base -= 1, Certify::TheIdentity);
    stage.admit(&host);
    with(&|_| {}, Certify::NotTheCounter);
    stage.refuses_part(&host, "certification of the counter", "there is none");
    with(&|policy| signed(policy).revocation = None, Certify::TheIdentity);
    stage.refuses_part(&host, "policy", "it has no counter");
    let other_key = SiteKey::read(stage.keys("other.pem").as_ref()).unwrap();
    with(&|policy| signed(policy).key = other_key.clone(), Certify::TheIdentity);
    stage.refuses_part(&host, "policy", "not by the site's key");
    host.configure("site_key = '../site.pem'\ncounter = 0x01800001\n");
    with(
        &|policy| assert_eq!(signed(policy).revocation.unwrap().counter, Counter::at(0x0180_0001)),
        Certify::TheIdentity,
    );
    stage.refuses_part(&host, "policy", "its counter is 0x01800001");
    host.configure("");
    stage.configure("");
    host.configure("site_key = '../site.pem'\n");
    with(&|_| {}, Certify::TheIdentity);
    stage.refuses_part(&host, "policy", "no site_key is configured here");
}

#[test]
fn the_attestation_is_of_this_key_in_this_enrolment_by_a_tpm() {
    let stage = Stage::new();
    stage.site_key("site.pem");
    let host = stage.host("compute-7");
    host.configure("site_key = '../site.pem'\n");
    let certification = "certification of the identity key";
    forge(&host, |plan| plan.certify = Certify::AnotherKey);
    stage.refuses_part(&host, certification, "it is for another key");
    forge(&host, |plan| plan.certify = Certify::TheCounter);
    stage.refuses_part(&host, certification, "it certifies something else");
    forge(&host, |plan| plan.certify = Certify::AnotherEnrolment);
    stage.refuses_part(&host, "certification of the counter", "it is for another enrolment");
    forge(&host, |plan| plan.certify = Certify::InSoftware { magic: 0x1234_5678 });
    stage.refuses_part(&host, "certification of the counter", "a TPM did not make the signed data");

    // Software that lies well gets an answer. No TPM opens it: none has that attestation key.
    host.asks();
    forge(&host, |plan| plan.certify = Certify::InSoftware { magic: 0xFF54_4347 });
    stage.admit(&host);
    assert!(host.does_not_take(80).contains("another request than the last"));
    forget_which_request(&host);
    let refused = host.does_not_take(80);
    assert!(refused.contains("the TPM does not open the answer"), "{refused}");
    // And so the lockbox key, which is sealed to it, is out of its reach.
    let refused = host.fails(68, &["lockbox", "open"]);
    assert!(refused.contains("is refused"), "{refused}");
}

/// A host that lies to its own program, too: it takes the answer to whatever request it was admitted by.
fn forget_which_request(host: &Host<'_>) {
    let mut request: Value = serde_json::from_slice(&std::fs::read(host.file("request")).unwrap()).unwrap();
    request.as_object_mut().unwrap().retain(|name, _| name != "type" && name != "version");
    host.edit("state/enrolment.json", |kept| kept["request"] = request);
}

#[test]
fn edited_requests_are_refused() {
    let stage = Stage::new();
    let host = stage.host("compute-7");
    host.asks();
    let whole = std::fs::read(host.file("request")).unwrap();
    let certification = "certification of the identity key";
    let statement = |change: &dyn Fn(&mut Value)| {
        std::fs::write(host.file("request"), &whole).unwrap();
        host.edit("request", |request| {
            let json = Base64::decode_vec(request["statement"].as_str().unwrap()).unwrap();
            let mut statement: Value = serde_json::from_slice(&json).unwrap();
            change(&mut statement);
            request["statement"] = Base64::encode_string(statement.to_string().as_bytes()).into();
        });
    };
    statement(&|statement| statement["host"] = "compute-9".into());
    stage.refuses_part(&host, certification, "or the request was changed");
    statement(&|statement| statement["nonce"] = "0".repeat(64).into());
    stage.refuses_part(&host, certification, "or the request was changed");
    statement(&|statement| statement["created"] = (statement["created"].as_u64().unwrap() + 1).into());
    stage.refuses_part(&host, certification, "or the request was changed");
    statement(&|statement| statement["policy"]["pcrs"]["4"] = "9".repeat(64).into());
    stage.refuses_part(&host, "policy", "it binds PCR 4");
    for member in ["host", "nonce", "identity", "policy"] {
        statement(&|statement| drop(statement.as_object_mut().unwrap().remove(member)));
        assert!(stage.refuses(&host, &["--trust-first-use"]).contains(&format!("missing field `{member}`")));
    }
    statement(&|statement| statement["more"] = 1.into());
    assert!(stage.refuses(&host, &["--trust-first-use"]).contains("unknown field `more`"));
    statement(&|statement| statement["identity"] = "AAAA".into());
    assert!(stage.refuses(&host, &["--trust-first-use"]).contains("its statement is damaged"));

    for (member, why) in [("attest", "the signature is not"), ("signature", "the signature is not")] {
        std::fs::write(host.file("request"), &whole).unwrap();
        host.edit("request", |request| {
            let mut bytes = Base64::decode_vec(request["creation"][member].as_str().unwrap()).unwrap();
            *bytes.last_mut().unwrap() ^= 1;
            request["creation"][member] = Base64::encode_string(&bytes).into();
        });
        stage.refuses_part(&host, certification, why);
    }
    for len in [0, 1, whole.len() / 2, whole.len() - 3] {
        std::fs::write(host.file("request"), &whole[..len]).unwrap();
        assert!(stage.refuses(&host, &["--trust-first-use"]).contains("it is damaged"), "{len}");
    }
    std::fs::write(host.file("request"), [&whole[..], &[b' '; 1 << 16]].concat()).unwrap();
    assert!(stage.refuses(&host, &["--trust-first-use"]).contains("more than 65536 bytes"));
}

#[test]
fn requests_are_neither_old_nor_of_tomorrow() {
    let stage = Stage::new();
    let host = stage.host("compute-7");
    forge(&host, |plan| plan.created -= 8 * 24 * 60 * 60);
    stage.refuses_part(&host, "time of the enrolment", "it is 8 days ago");
    forge(&host, |plan| plan.created += 24 * 60 * 60);
    stage.refuses_part(&host, "time of the enrolment", "it is in the future");
}

#[test]
fn another_tpms_endorsement_key_helps_nobody() {
    let stage = Stage::new();
    let (thief, victim) = (stage.host("compute-7"), stage.host("compute-8"));
    victim.asks();
    let keys = endorsement_keys(&cryptattach::keys::tpm::Tpm::open(&victim.tpm_config()).unwrap());
    thief.asks();
    // It has a certificate of an authority, and the key that belongs to it; but not in its TPM.
    forge(&thief, |plan| plan.endorsement_keys = keys.clone());
    stage.admit(&thief);
    forget_which_request(&thief);
    assert!(thief.does_not_take(80).contains("for the TPM of another host"));
    std::fs::copy(thief.file("answer"), victim.file("answer")).unwrap();
    assert!(victim.does_not_take(80).contains("this host is"));
    stage.ok(&["host", "remove", thief.name()]);

    // Nor does a certificate of another key, or a key that is in no TPM's template.
    let own = endorsement_keys(&cryptattach::keys::tpm::Tpm::open(&thief.tpm_config()).unwrap());
    forge(&thief, |plan| plan.endorsement_keys[0].certificate = keys[0].certificate.clone());
    stage.refuses_part(&thief, "endorsement key", "is for another key");
    forge(&thief, |plan| {
        plan.endorsement_keys = own.clone();
        attributes(&mut plan.endorsement_keys[0].public, |is| is.with_restricted(false));
    });
    stage.refuses_part(&thief, "endorsement key", "it fits none of the TCG's templates");
    forge(&thief, |plan| plan.endorsement_keys.clear());
    stage.refuses_part(&thief, "endorsement key", "there is none");
    // A software key in the right form, trusted on first use, is what --trust-first-use cannot see, and says so.
    let software = EcKey::generate(&EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap()).unwrap();
    let template = cryptattach::keys::tpm::EndorsementKind::P256.template().unwrap();
    forge(&thief, |plan| {
        plan.endorsement_keys[0].public = with_point(&template, &software);
        plan.endorsement_keys[0].certificate = None;
    });
    stage.refuses_part(&thief, "endorsement key", "its TPM has no certificate for it");
    let output = stage.run_admission(&thief, &["--trust-first-use"]);
    assert!(output.status.success() && String::from_utf8_lossy(&output.stderr).contains("no proof that"));
}
