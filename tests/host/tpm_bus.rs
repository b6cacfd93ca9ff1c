//! Whoever listens on the wires of the TPM learns no secret; and a TPM that does not answer does not hold us.

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::unix::net::UnixStream,
    thread,
};

use cryptattach::{
    base::{hex, key::SecretBytes},
    config::TpmConfig,
    keys::tpm::{IdentityFile, Policy, Tpm, TpmError, latch},
};
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
use openssl::{
    derive::Deriver,
    ec::{EcGroup, EcKey},
    nid::Nid,
    pkey::PKey,
};

use crate::{
    shell::sh,
    swtpm::Swtpm,
    tpm::{Host, coordinates},
    wiretap::{LATCH, Wiretap},
};

#[test]
fn neither_pin_nor_shared_secret_nor_decrypted_key_is_heard_on_the_bus() {
    const PIN: &[u8] = b"a PIN that is easily found";
    let host = Host::new();
    let tap = Wiretap::on(&host.swtpm.socket());
    let pin = SecretBytes::copy_of(PIN).unwrap();
    let policy = Policy { pin: true, ..host.literal("4+7") };
    let config = TpmConfig { tcti: tap.tcti(), ..TpmConfig::default() };
    let tpm = Tpm::open(&config).unwrap();
    let signatures = host.signatures();
    let now = tpm.satisfiable(&policy, &signatures).unwrap();

    let file = tpm.create_identity(&policy, Some(&pin)).unwrap().file;
    let ephemeral = EcKey::generate(&EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap()).unwrap();
    let (x, y) = coordinates(&ephemeral);
    let z = tpm.identity(&file).unwrap().ecdh_z(&now, (&x, &y), Some(&pin)).unwrap();
    let ours = PKey::from_ec_key(ephemeral).unwrap();
    let theirs = file.public_key().unwrap();
    let mut deriver = Deriver::new(&ours).unwrap();
    deriver.set_peer(&theirs).unwrap();
    assert_eq!(z.expose(), deriver.derive_to_vec().unwrap());

    let rsa = tpm.create_rsa_identity(&policy, Some(&pin)).unwrap().file;
    let content_key = openssl::sha::sha256(b"content key");
    fs::write(host.path("content"), content_key).unwrap();
    fs::write(host.path("rsa.pem"), rsa.public_pem().unwrap()).unwrap();
    host.shell(
        "openssl pkeyutl -encrypt -pubin -inkey rsa.pem -in content -out encrypted -pkeyopt rsa_padding_mode:oaep \
         -pkeyopt rsa_oaep_md:sha256 -pkeyopt rsa_mgf1_md:sha256",
    );
    let encrypted = fs::read(host.path("encrypted")).unwrap();
    let decrypted = tpm.identity(&rsa).unwrap().rsa_decrypt(&now, &encrypted, Some(&pin)).unwrap();
    assert_eq!(decrypted.expose(), content_key);

    for secret in [PIN, z.expose(), &content_key] {
        assert!(!tap.heard(secret));
        // Halves of it neither.
        assert!(!tap.heard(&secret[..secret.len() / 2]));
    }
    // TPM2_StartAuthSession: salted to 0x81000001 each time, never to nothing (TPM_RH_NULL), whose key all could compute.
    assert!(tap.heard(&[0, 0, 1, 0x76, 0x81, 0, 0, 1]));
    assert!(!tap.heard(&[0, 0, 1, 0x76, 0x40, 0, 0, 7]));
    // The tap does hear: what is public, and what programs without such sessions say.
    assert!(tap.heard(&policy.digest().unwrap()));
    drop(tpm);
    let control = format!(
        "cd {} && export TPM2TOOLS_TCTI={} && tpm2_createprimary -Q -c primary && \
         tpm2_create -Q -C primary -G ecc -p 'a PIN on the wire' -c key && tpm2_flushcontext -t",
        host.folder.path().display(),
        tap.tcti(),
    );
    sh(&control);
    assert!(tap.heard(b"a PIN on the wire"));
}

/// A device that answers libtss2's first question, and no more.
#[test]
fn a_tpm_that_does_not_answer_is_given_up() {
    let swtpm = Swtpm::start();
    let pty = nix::pty::openpty(None, None).unwrap();
    let mut settings = tcgetattr(&pty.slave).unwrap();
    cfmakeraw(&mut settings);
    tcsetattr(&pty.slave, SetArg::TCSANOW, &settings).unwrap();
    let tcti = format!("device:{}", nix::unistd::ttyname(&pty.slave).unwrap().display());
    let answering = thread::spawn(move || {
        let (mut device, mut tpm) = (File::from(pty.master), UnixStream::connect(swtpm.socket()).unwrap());
        let mut buffer = [0; 4096];
        let len = device.read(&mut buffer).unwrap();
        tpm.write_all(&buffer[..len]).unwrap();
        let len = tpm.read(&mut buffer).unwrap();
        device.write_all(&buffer[..len]).unwrap();
        device
    });
    let config = TpmConfig { tcti, command_seconds: 0.2, ..TpmConfig::default() };
    let tpm = Tpm::open(&config).unwrap();
    let error = tpm.boot_values().unwrap_err();
    assert!(matches!(error, TpmError::TimedOut { command: "PCR_Read", .. }), "{error}");
    drop(answering.join());
}

/// It says so for a while, then takes the command; or it never does.
#[test]
fn a_busy_tpm_is_asked_again_for_a_while() {
    let swtpm = Swtpm::start();
    let ask = |busy_times, command_seconds| {
        let tap = Wiretap::that_is_busy(&swtpm.socket(), busy_times);
        let config = TpmConfig { tcti: tap.tcti(), command_seconds, ..TpmConfig::default() };
        Tpm::open(&config).unwrap().boot_values().map(drop)
    };
    ask(20, 60.0).unwrap();
    let error = ask(usize::MAX, 2.0).unwrap_err();
    assert!(matches!(error, TpmError::Busy { command: "PCR_Read" }), "{error}");
}

/// Else it would be asked for ever for those that it does not give.
#[test]
fn an_answer_about_other_pcrs_is_none() {
    let swtpm = Swtpm::start();
    let tap = Wiretap::on(&swtpm.socket());
    let tpm = Tpm::open(&TpmConfig { tcti: tap.tcti(), ..TpmConfig::default() }).unwrap();
    // A selection in the SHA-256 bank: PCR 16 in place of 0 to 7.
    tap.forge(&[0, 0x0B, 3, 0xFF, 0, 0], &[0, 0x0B, 3, 0, 0, 1]);
    let error = tpm.boot_values().unwrap_err();
    assert!(matches!(error, TpmError::Answer { command: "PCR_Read" }), "{error}");
}

/// An interposer that wants to know the sessions' keys answers with a storage root key of its own, under the right name.
#[test]
fn a_storage_root_key_of_somebody_between_is_noticed() {
    let host = Host::new();
    host.enrol(&host.literal("7"), None);
    let file = IdentityFile::read(&host.path("host.tpm.pem")).unwrap();
    let public = |swtpm: &Swtpm| {
        let root = swtpm.tool(&["tpm2_readpublic", "-c", "0x81000001"]);
        let coordinate = |name| {
            let line = root.lines().find_map(|line| line.trim().strip_prefix(name)).unwrap();
            hex::decode(line.trim()).unwrap()
        };
        // As they stand in the public area, each with its length.
        [&[0, 32][..], &coordinate("x:"), &[0, 32], &coordinate("y:")].concat()
    };
    let (original, other) = (public(&host.swtpm), Host::new());
    other.tpm().storage_root(None).unwrap();
    let tap = Wiretap::on(&host.swtpm.socket());
    let config = TpmConfig { tcti: tap.tcti(), ..TpmConfig::default() };
    let tpm = Tpm::open(&config).unwrap();
    tpm.identity(&file).unwrap();
    tap.forge(&original, &public(&other.swtpm));
    let refused = Tpm::open(&config).unwrap().identity(&file).err().unwrap();
    assert!(matches!(refused, TpmError::OtherTpm { expected, .. } if expected == file.storage_root), "{refused}");
    assert!(tap.heard(file.storage_root.as_bytes()));
}

type Tamper = fn(&Wiretap);

/// Whoever wants to use the key again later in this boot has the latch's command for themselves, or answers in the TPM's place.
#[test]
fn a_latch_that_somebody_between_swallows_or_makes_up_is_noticed() {
    let mut host = Host::new();
    host.enrol(&host.literal("7"), None);
    let pcr_15 = |host: &Host| host.tpm().pcr_values("15".parse().unwrap()).unwrap();
    let unextended = pcr_15(&host);
    let tampers: [(&str, Tamper); 3] = [
        ("the command is swallowed", |tap| tap.swallow_the_latch()),
        ("the answer that PCR 15 is zero is made up", |tap| tap.forge(&[0; 32], &[1; 32])),
        // As the authentic answer says it after the latch.
        ("another command than the latch is refused", |tap| {
            tap.swallow(&LATCH, &[0x80, 1, 0, 0, 0, 10, 0, 0, 0x01, 0x01]);
        }),
    ];
    for (what, tamper) in tampers {
        host.reboot();
        let tap = Wiretap::on(&host.swtpm.socket());
        let config = TpmConfig { tcti: tap.tcti(), ..host.config.clone() };
        tamper(&tap);
        let error = latch(&config, &config.identity, "a boot").unwrap_err();
        println!("{what}: {error}");
    }
    // Without them the TPM proves it, also the second time, and whatever else was measured before.
    host.reboot();
    assert_eq!(pcr_15(&host), unextended);
    let value = host.latch().unwrap();
    assert_eq!(pcr_15(&host).get(15), Some(&value));
    assert_eq!(host.latch().unwrap(), value, "extended once");
    assert_eq!(host.swtpm.leftovers(), "");
    host.swtpm.extend(15, '1');
    assert_ne!(host.latch().unwrap(), value);
}

/// With a storage root key of their own they could make up the answers.
#[test]
fn a_latch_by_another_storage_root_key_is_no_proof() {
    let host = Host::new();
    host.enrol(&host.literal("7"), None);
    let other = Host::new();
    other.tpm().storage_root(None).unwrap();
    let error = latch(&other.config, &host.config.identity, "a boot").unwrap_err();
    assert!(matches!(error, TpmError::OtherTpm { .. }), "{error}");
    // It is extended all the same, for the case that it is honest.
    assert_ne!(other.tpm().pcr_values("15".parse().unwrap()).unwrap().get(15), Some(&[0; 32]));
}
