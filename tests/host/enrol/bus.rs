//! Whoever listens on the TPM's wires during enrolment and a whole boot.

use std::{fs, sync::Arc};

use cryptattach::{
    base::key::{ContainerKeyId, KeyReference, SealedKey},
    config::{Config, IdentitySpec},
    keys::seal::{ContainerKey, Content, Expected, For, Identities, LockboxKey},
};

use super::{latch::counted, stage::Stage};
use crate::{
    site::sh,
    wiretap::{Taken, Wiretap},
};

const PIN: &str = "a PIN that is easily found";

#[test]
fn no_key_and_no_pin_of_a_whole_boot_is_heard_on_the_bus() {
    let stage = Stage::new();
    let host = stage.host("compute-7");
    let tap = Wiretap::on(&host.swtpm.socket());
    fs::write(host.file("pin"), format!("{PIN}\n")).unwrap();
    host.configure("pin = 'pin'\n");
    // All of it goes over the tap, from the making of the key on.
    fs::rename(host.by_tcti("tapped.toml", &tap.tcti()), host.file("cryptattach.toml")).unwrap();
    stage.enrols(&host);
    tap.taken();
    let (said, taken) = (host.says(&["lockbox", "open"]), tap.taken());
    assert_eq!(taken.policy_sessions, 1, "{said}");
    assert_eq!(counted(&said).1, 1, "what is logged is what was sent: {said}");
    let volume = host.volume("volume");
    // By the key that is derived from the lockbox key, then from the entry.
    host.attaches(&volume);
    let entry = host.json(&["lockbox", "status"])["entries"][0].clone();
    assert_eq!(entry["state"], "valid");
    host.attaches(&volume);
    assert_eq!(tap.taken(), Taken::default(), "no volume needs the TPM");
    assert!(host.ok(&["lockbox", "close"]).contains("1 entry"));
    host.fails(79, &["lockbox", "open"]);

    // What the administrator has of the same secrets.
    let config = Config::read(stage.keys("cryptattach.toml").as_ref()).unwrap();
    let sealed = fs::read(stage.keys(&format!("cinder/host/{}.jwe", host.name()))).unwrap();
    let escrow = Identities::read(&[IdentitySpec::of("", stage.keys("escrow.key"))], &config.tpm).unwrap();
    let sealed = SealedKey::from_json(&sealed).unwrap();
    let lockbox_key = LockboxKey::open(&sealed, &escrow, &host.name().parse().unwrap()).unwrap();
    let key: KeyReference = entry["key"].as_str().unwrap().parse().unwrap();
    let sealed = fs::read(stage.keys(&format!("cinder/{}.jwe", key.key))).unwrap();
    let sealed = SealedKey::from_json(&sealed).unwrap();
    let id: ContainerKeyId = sealed.recipient_kids().next().unwrap().parse().unwrap();
    let kek = fs::read(stage.keys(&format!("cinder/kek/{}.jwe", id.epoch))).unwrap();
    let kek = ContainerKey::open(&SealedKey::from_json(&kek).unwrap(), &escrow, &id).unwrap();
    let expected = Expected { key_id: key.key, container: key.store.clone(), volume: For::Any };
    let opened = Identities::of(vec![Box::new(Arc::new(kek))]).open(&sealed, &expected).unwrap();
    let Content::VolumeKey(payload) = &opened.content else { panic!("{key} is a volume key") };
    let secrets = [
        ("PIN", PIN.as_bytes()),
        ("lockbox key", lockbox_key.secret().expose()),
        ("volume key", payload.volume_key.expose()),
    ];
    for (what, secret) in secrets {
        assert!(secret.len() >= 26, "{what}: {} bytes", secret.len());
        // Halves of it neither.
        for part in [secret, &secret[..secret.len() / 2], &secret[secret.len() / 2..]] {
            assert!(!tap.heard(part), "the {what} was on the bus");
        }
    }
    // The boot was: TPM2_ECDH_ZGen.
    assert!(tap.heard(&[0, 0, 1, 0x54]));

    // The same secrets sent by a program without such sessions are heard, each.
    for (what, secret) in secrets {
        fs::write(host.file("in"), secret).unwrap();
        let script = format!(
            "export TPM2TOOLS_TCTI={} && cd {} && tpm2_createprimary -Q -c primary && tpm2_create -Q -C primary -i in -u u -r r && \
             tpm2_flushcontext -t && rm in primary u r",
            tap.tcti(),
            host.file(""),
        );
        sh(&script);
        assert!(tap.heard(secret), "the control does not hear the {what}");
    }
}
