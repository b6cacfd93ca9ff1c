//! The host's identity in its TPM (swtpm): which boot state opens, and which does not.

use std::{
    fs,
    path::PathBuf,
    process::{Command, Output},
};

use base64ct::{Base64UrlUnpadded, Encoding};
use cryptattach::{
    base::{
        advice::Advice,
        exit::Exit,
        key::{BoundContext, KeySize, SealedKey, SecretBytes, VolumeKey},
        pcr_set::PcrSet,
    },
    config::{IdentitySpec, Latch, TpmConfig},
    keys::{
        seal::{Content, Expected, For, Identities, OwnerRecipient, SealError, seal},
        tpm::{
            self, Counter, Digest, Finding, IdentityFile, PcrSignatures, Policy, Revocation, SignedPcrs, SiteKey, Tpm,
            TpmError,
        },
    },
};
use openssl::{
    bn::{BigNum, BigNumContext},
    ec::{EcGroup, EcKey},
    nid::Nid,
    pkey::Private,
};
use tempfile::TempDir;

use crate::{
    sealing::{context, payload},
    shell::sh,
    site::Site,
    swtpm::Swtpm,
};

/// A host: its TPM, and a folder with its files.
pub struct Host {
    pub swtpm: Swtpm,
    pub folder: TempDir,
    pub config: TpmConfig,
}

impl Host {
    /// Booted: firmware and boot loader have measured something.
    pub fn new() -> Self {
        let swtpm = Swtpm::start();
        let folder = tempfile::tempdir().unwrap();
        let config = TpmConfig {
            tcti: swtpm.tcti(),
            identity: folder.path().join("host.tpm.pem").into(),
            signatures: vec![folder.path().join("signatures.json").into()],
            event_log: folder.path().join("log").into(),
            ..TpmConfig::default()
        };
        let host = Self { swtpm, folder, config };
        host.boot();
        host
    }

    /// What every boot of this machine measures.
    fn boot(&self) {
        self.swtpm.extend(4, '4');
        self.swtpm.extend(7, '7');
    }

    pub fn reboot(&mut self) {
        self.swtpm.reboot();
        self.boot();
    }

    pub fn tpm(&self) -> Tpm {
        Tpm::open(&self.config).unwrap()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn shell(&self, script: &str) -> String {
        sh(&format!("cd {} && {script}", self.folder.path().display()))
    }

    pub fn signatures(&self) -> PcrSignatures {
        PcrSignatures::read(&self.config.signatures).unwrap()
    }

    /// PCRs as they are now.
    pub fn literal(&self, pcrs: &str) -> Policy {
        let pcrs: PcrSet = pcrs.parse().unwrap();
        Policy { signed: None, pcrs: self.tpm().pcr_values(pcrs).unwrap(), latch: true, pin: false }
    }

    /// A new site key, and the policy that follows it.
    pub fn signed(&self, algorithm: &str) -> Policy {
        self.shell(&format!(
            "openssl genpkey {algorithm} -out site.key 2>/dev/null && openssl pkey -in site.key -pubout -out site.pem"
        ));
        let key = SiteKey::read(&self.path("site.pem")).unwrap();
        Policy { signed: Some(SignedPcrs { key, revocation: None }), pcrs: Default::default(), latch: true, pin: false }
    }

    /// With a counter that retires signatures.
    pub fn revocable(&self, algorithm: &str) -> Policy {
        let mut policy = self.signed(algorithm);
        let counter = Counter::at(self.config.counter);
        let base = self.tpm().counter_or_new(counter).unwrap().0;
        policy.signed.as_mut().unwrap().revocation = Some(Revocation { counter, base });
        policy
    }

    /// Makes this host's key, writes its file, seals a volume key to it.
    pub fn enrol(&self, policy: &Policy, pin: Option<&str>) -> Sealed {
        let pin = pin.map(|pin| SecretBytes::copy_of(pin.as_bytes()).unwrap());
        let file = self.tpm().create_identity(policy, pin.as_ref()).unwrap().file;
        self.enrolled(&file)
    }

    /// A site without any store, which has this host's key for boots like this one.
    pub fn site(&self) -> Site {
        let site = Site::bare();
        self.enrol(&self.literal("7"), None);
        for file in ["host.pem", "host.tpm.pem"] {
            fs::copy(self.path(file), site.keys(file)).unwrap();
        }
        site
    }

    pub fn enrolled(&self, file: &IdentityFile) -> Sealed {
        fs::write(&self.config.identity, file.to_pem().unwrap()).unwrap();
        fs::write(self.path("host.pem"), file.public_pem().unwrap()).unwrap();
        Sealed::to(&self.path("host.pem"))
    }

    /// The end of a boot.
    pub fn latch(&self) -> Result<Digest, TpmError> {
        tpm::latch(&self.config, &self.config.identity, "a boot")
    }

    pub fn open(&self, sealed: &Sealed) -> Result<(), SealError> {
        self.open_as(sealed, &self.config)
    }

    pub fn open_with_pin(&self, sealed: &Sealed, pin: &str) -> Result<(), SealError> {
        let path = self.path("pin");
        fs::write(&path, format!("{pin}\n")).unwrap();
        self.open_as(sealed, &TpmConfig { pin: Some(path.into()), ..self.config.clone() })
    }

    fn open_as(&self, sealed: &Sealed, config: &TpmConfig) -> Result<(), SealError> {
        let identities = Identities::read(&[IdentitySpec::of("tpm", config.identity.clone())], config)?;
        let opened = identities.open(&sealed.key, &sealed.expected);
        assert!(self.swtpm.leftovers().is_empty(), "left in the TPM: {}", self.swtpm.leftovers());
        let Content::VolumeKey(payload) = opened?.content else { panic!("no volume key") };
        assert!(payload.volume_key.secret() == sealed.volume_key.secret());
        Ok(())
    }

    /// Why it does not open.
    #[track_caller]
    pub fn refusal(&self, sealed: &Sealed) -> Vec<Finding> {
        match self.open(sealed) {
            Err(SealError::Tpm(TpmError::NotThisState(why))) => {
                println!("{why}");
                why.findings
            }
            Err(error) => panic!("{error}"),
            Ok(()) => panic!("it opens"),
        }
    }

    /// The command.
    pub fn run(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_cryptattach"))
            .args(arguments)
            .current_dir(self.folder.path())
            .env("CRYPTATTACH_CONFIG", self.path("cryptattach.toml"))
            .env("CRYPTATTACH_TCTI", self.swtpm.tcti())
            .output()
            .unwrap()
    }

    /// Runs it with a configuration that names the files in the folder; its standard output.
    #[track_caller]
    pub fn ok(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs it, expects 79, returns standard error.
    #[track_caller]
    pub fn fails(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(79), "{arguments:?}: {text}");
        println!("$ cryptattach {}\n{text}", arguments.join(" "));
        text
    }

    pub fn configure(&self) {
        fs::write(
            self.path("cryptattach.toml"),
            "[tpm]\nidentity = 'host.tpm.pem'\nsignatures = ['signatures.json']\nevent_log = 'log'\n",
        )
        .unwrap();
    }
}

/// A volume key, and its sealed form.
pub struct Sealed {
    pub volume_key: VolumeKey,
    pub key: SealedKey,
    pub expected: Expected,
}

impl Sealed {
    fn to(recipient: &std::path::Path) -> Self {
        let volume_key = VolumeKey::random(KeySize::Bits512).unwrap();
        let context = context();
        let recipient = Box::new(OwnerRecipient::read(recipient).unwrap());
        let key = seal(&context, &Content::VolumeKey(payload(&volume_key)), &[recipient]).unwrap();
        Self { volume_key, key, expected: expected(&context) }
    }
}

fn expected(context: &BoundContext) -> Expected {
    Expected { key_id: context.key_id, container: context.container.clone(), volume: For::Plain }
}

pub const P256: &str = "-algorithm EC -pkeyopt ec_paramgen_curve:P-256";
const RSA: &str = "-algorithm RSA -pkeyopt rsa_keygen_bits:2048";

#[test]
fn opens_in_its_boot_state_only() {
    let mut host = Host::new();
    let sealed = host.enrol(&host.literal("4+7"), None);
    host.open(&sealed).unwrap();
    // The same boot again.
    host.reboot();
    host.open(&sealed).unwrap();
    // Something more is measured.
    host.swtpm.extend(7, 'a');
    let findings = host.refusal(&sealed);
    let [Finding::Pcr { pcr: 7, expected, seen, .. }] = findings.as_slice() else { panic!("{findings:?}") };
    assert_ne!(expected, seen);
    host.reboot();
    host.open(&sealed).unwrap();
}

#[test]
fn an_rsa_key_where_there_is_no_p256() {
    let host = Host::new();
    let file = host.tpm().create_rsa_identity(&host.literal("7"), None).unwrap().file;
    let sealed = host.enrolled(&file);
    host.open(&sealed).unwrap();
    host.swtpm.extend(7, 'a');
    host.refusal(&sealed);
}

/// Files of the real systemd-measure, which computes PCR 11 from a unified kernel image's parts.
#[test]
fn systemd_measures_signatures_open_without_new_enrolment() {
    let mut host = Host::new();
    let policy = host.signed(RSA);
    let measure = |host: &Host, kernel: &str| {
        host.shell(&format!(
            "printf {kernel} >linux && printf initramfs >initrd && printf root=/dev/sda1 >cmdline && \
             /lib/systemd/systemd-measure sign --linux=linux --initrd=initrd --cmdline=cmdline --bank=sha256 \
             --private-key=site.key --public-key=site.pem --tpm2-device={} --phase= >signatures.json",
            host.swtpm.tcti()
        ));
    };
    // systemd-stub measures each part's name, with its zero, and its content.
    let boot = |host: &Host, kernel: &str| {
        for (name, content) in [(".linux", kernel), (".cmdline", "root=/dev/sda1"), (".initrd", "initramfs")] {
            for measured in [format!("{name}\0"), content.to_owned()] {
                let digest = openssl::sha::sha256(measured.as_bytes()).map(|byte| format!("{byte:02x}")).concat();
                host.swtpm.tool(&["tpm2_pcrextend", &format!("11:sha256={digest}")]);
            }
        }
    };
    boot(&host, "kernel-1");
    let sealed = host.enrol(&policy, None);
    let [Finding::NoSignature { signatures: 0, .. }] = host.refusal(&sealed).as_slice() else { panic!() };

    measure(&host, "kernel-1");
    host.open(&sealed).unwrap();

    host.reboot();
    boot(&host, "kernel-2");
    let [Finding::NoSignature { signatures: 1, present, .. }] = &host.refusal(&sealed)[..] else { panic!() };
    assert!(present.get(11).is_some());
    measure(&host, "kernel-2");
    host.open(&sealed).unwrap();
}

#[test]
fn the_sites_own_signatures_by_either_kind_of_key() {
    for algorithm in [RSA, P256] {
        let mut host = Host::new();
        host.configure();
        let sealed = host.enrol(&host.revocable(algorithm), None);
        let signed = host.ok(&["policy", "sign", "--private-key", "site.key", "--current", "4+7"]);
        fs::write(host.path("signatures.json"), signed).unwrap();
        host.open(&sealed).unwrap();
        host.ok(&["policy", "test"]);

        // Another boot: its PCRs are known to the explanation, for the signer has said them.
        host.reboot();
        host.swtpm.extend(4, 'b');
        let [Finding::Pcr { pcr: 4, .. }] = host.refusal(&sealed)[..] else { panic!() };
        assert!(host.fails(&["policy", "test"]).contains("PCR 4"));
        // The administrator signs what the host reports; nothing is enrolled again.
        let values = host.ok(&["policy", "show", "--json"]);
        let values: serde_json::Value = serde_json::from_str(&values).unwrap();
        fs::write(host.path("values.json"), values["pcrs"].to_string()).unwrap();
        let sign = ["policy", "sign", "--private-key", "site.key", "--values", "values.json", "--pcrs", "4+7"];
        let signed = host.ok(&[&sign[..], &["--append-to", "signatures.json"]].concat());
        fs::write(host.path("signatures.json"), signed).unwrap();
        host.open(&sealed).unwrap();
    }
}

#[test]
fn a_signature_by_another_key_opens_nothing() {
    let host = Host::new();
    host.configure();
    let sealed = host.enrol(&host.signed(P256), None);
    let other = Host::new();
    other.signed(P256);
    fs::copy(other.path("site.key"), host.path("other.key")).unwrap();
    let signed = host.ok(&["policy", "sign", "--private-key", "other.key", "--current", "4+7"]);
    fs::write(host.path("signatures.json"), &signed).unwrap();
    let [Finding::NoSignature { signatures: 0, .. }] = host.refusal(&sealed)[..] else { panic!() };
    // Under the right key's name it is still not its signature.
    let mut forged: serde_json::Value = serde_json::from_str(&signed).unwrap();
    let key = SiteKey::read(&host.path("site.pem")).unwrap();
    forged["sha256"][0]["pkfp"] = key.to_string().into();
    fs::write(host.path("signatures.json"), forged.to_string()).unwrap();
    assert!(matches!(host.refusal(&sealed)[..], [Finding::NoSignature { signatures: 1, .. }]));
}

#[test]
fn a_raised_counter_retires_old_signatures() {
    let mut host = Host::new();
    host.configure();
    let policy = host.revocable(P256);
    let sealed = host.enrol(&policy, None);
    let sign = |epoch: &str, append: &[&str]| {
        let sign = ["policy", "sign", "--private-key", "site.key", "--current", "4+7", "--epoch", epoch];
        let signed = host.ok(&[&sign[..], append].concat());
        fs::write(host.path("signatures.json"), signed).unwrap();
    };
    sign("0", &[]);
    host.open(&sealed).unwrap();
    // Not before there is a signature that would open then.
    assert!(host.fails(&["policy", "revoke-old"]).contains("at least epoch 1 is needed"));
    host.open(&sealed).unwrap();
    let old = fs::read(host.path("signatures.json")).unwrap();
    sign("1", &["--append-to", "signatures.json"]);
    host.ok(&["policy", "revoke-old"]);
    host.open(&sealed).unwrap();
    let both = fs::read(host.path("signatures.json")).unwrap();
    fs::write(host.path("signatures.json"), old).unwrap();
    assert!(matches!(host.refusal(&sealed)[..], [Finding::Retired { epoch: 0, oldest: 1 }]));
    fs::write(host.path("signatures.json"), both).unwrap();
    let counter = policy.signed.as_ref().unwrap().revocation.unwrap().counter;
    // The last epoch that the key knows.
    for _ in 1..7 {
        host.tpm().raise_counter(counter).unwrap();
    }
    assert!(matches!(host.refusal(&sealed)[..], [Finding::Retired { epoch: 1, oldest: 7 }]));
    sign("7", &["--append-to", "signatures.json"]);
    host.open(&sealed).unwrap();
    let last = host.run(&["policy", "revoke-old"]);
    assert!(String::from_utf8_lossy(&last.stderr).contains("this is the last"));

    // Whoever has the owner's authorization removes the counter and makes it again: it does not start anew.
    let index = counter.to_string();
    host.swtpm.tool(&["tpm2_nvundefine", &index]);
    host.tpm().counter_or_new(counter).unwrap();
    sign("0", &[]);
    let [Finding::Retired { oldest, .. }] = host.refusal(&sealed)[..] else { panic!() };
    assert!(oldest >= 8, "{oldest}");
    host.reboot();
    host.refusal(&sealed);
}

/// Whoever made it was killed before it was raised for the first time, which gives a counter its value and its name.
#[test]
fn a_counter_that_was_half_made_is_finished() {
    let host = Host::new();
    let counter = Counter::at(host.config.counter);
    let attributes = "ownerwrite|ownerread|authread|no_da|nt=counter";
    host.swtpm.tool(&["tpm2_nvdefine", &counter.to_string(), "-C", "o", "-s", "8", "-a", attributes]);
    let made = host.tpm().counter_or_new(counter).unwrap();
    assert_eq!(host.tpm().counter_or_new(counter).unwrap(), made);
}

#[test]
fn retired_signatures_stay_retired_for_a_key_that_is_made_anew() {
    let host = Host::new();
    host.configure();
    let site = TpmConfig { site_key: Some(host.path("site.pem").into()), latch: Latch::On, ..host.config.clone() };
    let first = host.revocable(P256);
    host.enrol(&first, None);
    let sign = ["policy", "sign", "--private-key", "site.key", "--current", "4+7", "--epoch"];
    let old = host.ok(&[&sign[..], &["0"]].concat());
    fs::write(host.path("signatures.json"), host.ok(&[&sign[..], &["1"]].concat())).unwrap();
    host.ok(&["policy", "revoke-old"]);

    let again = host.enrol(&host.tpm().policy_here(&site, false).unwrap(), None);
    host.open(&again).unwrap();
    fs::write(host.path("signatures.json"), old).unwrap();
    assert!(matches!(host.refusal(&again)[..], [Finding::Retired { epoch: 0, oldest: 1 }]));
    // Epochs of another site's key are others; and where none is left, they begin again.
    host.revocable(P256);
    let base = |policy: &Policy| policy.signed.as_ref().unwrap().revocation.unwrap().base;
    assert_eq!(base(&host.tpm().policy_here(&site, false).unwrap()), base(&first) + 1);
}

/// The TPM says no by itself: what this program looks at before is for the explanation only.
#[test]
fn the_tpm_itself_refuses() {
    let mut host = Host::new();
    host.configure();
    let policy = Policy { pcrs: host.literal("4").pcrs, ..host.revocable(P256) };
    let counter = policy.signed.as_ref().unwrap().revocation.unwrap().counter;
    host.enrol(&policy, None);
    let signed = host.ok(&["policy", "sign", "--private-key", "site.key", "--current", "7"]);
    fs::write(host.path("signatures.json"), signed).unwrap();
    let file = IdentityFile::read(&host.path("host.tpm.pem")).unwrap();
    let ephemeral = EcKey::generate(&EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap()).unwrap();
    let (x, y) = coordinates(&ephemeral);
    type Change = fn(&Host, Counter);
    let changes: [(&str, Change); 5] = [
        ("nothing", |_, _| {}),
        ("the signed PCR", |host, _| host.swtpm.extend(7, 'a')),
        ("the literal PCR", |host, _| host.swtpm.extend(4, 'a')),
        ("the latch", |host, _| assert!(host.latch().is_ok())),
        ("the counter", |host, counter| assert!(host.tpm().raise_counter(counter).unwrap().0 > 0)),
    ];
    for (what, change) in changes {
        host.reboot();
        {
            let tpm = host.tpm();
            let signatures = host.signatures();
            let now = tpm.satisfiable(&file.policy, &signatures).unwrap();
            change(&host, counter);
            let z = tpm.identity(&file).unwrap().ecdh_z(&now, (&x, &y), None);
            println!("{what}: {:?}", z.as_ref().err().map(ToString::to_string));
            assert_eq!(z.is_ok(), what == "nothing", "{what}");
            assert!(z.is_ok() || matches!(z, Err(TpmError::NotThisState(_))), "{what}");
        }
        assert_eq!(host.swtpm.leftovers(), "", "{what}");
    }
}

pub fn coordinates(key: &EcKey<Private>) -> (Vec<u8>, Vec<u8>) {
    let (mut x, mut y, mut context) = (BigNum::new().unwrap(), BigNum::new().unwrap(), BigNumContext::new().unwrap());
    key.public_key().affine_coordinates(key.group(), &mut x, &mut y, &mut context).unwrap();
    (x.to_vec_padded(32).unwrap(), y.to_vec_padded(32).unwrap())
}

#[test]
fn once_latched_it_opens_no_more_in_this_boot() {
    let mut host = Host::new();
    host.configure();
    let sealed = host.enrol(&host.literal("7"), None);
    host.open(&sealed).unwrap();
    host.ok(&["policy", "latch"]);
    host.ok(&["policy", "latch"]);
    assert!(matches!(host.refusal(&sealed)[..], [Finding::Latched]));
    assert!(host.fails(&["policy", "test"]).contains("were already opened in this boot"));
    host.reboot();
    host.open(&sealed).unwrap();
    // Opted out.
    let sealed = host.enrol(&Policy { latch: false, ..host.literal("7") }, None);
    host.latch().unwrap();
    host.open(&sealed).unwrap();
}

#[test]
fn a_pin_is_wanted_and_guessing_it_locks_the_tpm() {
    let host = Host::new();
    let sealed = host.enrol(&Policy { pin: true, ..host.literal("7") }, Some("correct horse"));
    host.swtpm.tool(&["tpm2_dictionarylockout", "-s", "-n", "3", "-t", "1000", "-l", "1000"]);
    host.open_with_pin(&sealed, "correct horse").unwrap();
    let wrong = |expected: u32| match host.open_with_pin(&sealed, "battery") {
        Err(SealError::Tpm(TpmError::WrongPin { left })) => assert_eq!(left, expected),
        other => panic!("{other:?}"),
    };
    wrong(2);
    wrong(1);
    let locked = host.open_with_pin(&sealed, "battery").unwrap_err();
    assert!(matches!(&locked, SealError::Tpm(TpmError::LockedOut { failed: 3, recovery_seconds: 1000 })), "{locked}");
    // The right one is not tried then.
    let locked = host.open_with_pin(&sealed, "correct horse").unwrap_err();
    assert!(matches!(locked, SealError::Tpm(TpmError::LockedOut { .. })), "{locked}");
    host.swtpm.tool(&["tpm2_dictionarylockout", "-c"]);
    host.open_with_pin(&sealed, "correct horse").unwrap();
}

/// A stolen disk in another server.
#[test]
fn another_tpm_opens_nothing() {
    let (host, thief) = (Host::new(), Host::new());
    let sealed = host.enrol(&host.literal("7"), None);
    fs::copy(host.path("host.tpm.pem"), thief.path("host.tpm.pem")).unwrap();
    let refused = thief.open(&sealed).unwrap_err();
    assert!(matches!(refused, SealError::Tpm(TpmError::NoStorageRoot)), "{refused}");
    // Where the thief's TPM has a storage root key of its own, too.
    thief.tpm().storage_root(None).unwrap();
    let refused = thief.open(&sealed).unwrap_err();
    assert!(matches!(refused, SealError::Tpm(TpmError::OtherTpm { .. })), "{refused}");
    // And if the file is made to name that one.
    let mut file = IdentityFile::read(&host.path("host.tpm.pem")).unwrap();
    file.storage_root = thief.tpm().storage_root(None).unwrap().name();
    fs::write(thief.path("host.tpm.pem"), file.to_pem().unwrap()).unwrap();
    let Err(SealError::Tpm(TpmError::Refused { command: "Load", code })) = thief.open(&sealed) else { panic!() };
    assert!(code.is_integrity());
}

#[test]
fn a_cleared_tpm_opens_nothing() {
    let host = Host::new();
    let sealed = host.enrol(&host.literal("7"), None);
    host.swtpm.tool(&["tpm2_clear", "-c", "platform"]);
    let refused = host.open(&sealed).unwrap_err();
    assert!(matches!(refused, SealError::Tpm(TpmError::NoStorageRoot)), "{refused}");
    host.tpm().storage_root(None).unwrap();
    let refused = host.open(&sealed).unwrap_err();
    assert!(matches!(refused, SealError::Tpm(TpmError::OtherTpm { .. })), "{refused}");
}

/// tpm2-tools make one by the RSA template, as many systems have it.
#[test]
fn an_rsa_storage_root_key_is_taken() {
    let host = Host::new();
    host.swtpm.tool(&["tpm2_createprimary", "-C", "o", "-G", "rsa2048", "-c", "srk.ctx"]);
    host.swtpm.tool(&["tpm2_evictcontrol", "-C", "o", "-c", "srk.ctx", "0x81000001"]);
    host.swtpm.tool(&["tpm2_flushcontext", "-t"]);
    let sealed = host.enrol(&host.literal("7"), None);
    host.open(&sealed).unwrap();
}

#[test]
fn an_object_that_is_no_storage_root_key_is_not_taken() {
    let host = Host::new();
    host.swtpm.tool(&[
        "tpm2_createprimary",
        "-C",
        "o",
        "-G",
        "ecc",
        "-a",
        "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|decrypt|sign",
        "-c",
        "key",
    ]);
    host.swtpm.tool(&["tpm2_evictcontrol", "-C", "o", "-c", "key", "0x81000001"]);
    host.swtpm.tool(&["tpm2_flushcontext", "-t"]);
    let refused = host.tpm().create_identity(&host.literal("7"), None).err().unwrap();
    assert!(matches!(refused, TpmError::BadStorageRoot(_)), "{refused}");
    assert_eq!(host.swtpm.leftovers(), "");
}

#[test]
fn a_file_that_says_another_policy_than_its_key_is_refused() {
    let host = Host::new();
    let sealed = host.enrol(&host.literal("4+7"), None);
    let path = host.path("host.tpm.pem");
    let mut file = IdentityFile::read(&path).unwrap();
    file.policy = host.literal("7");
    fs::write(&path, file.to_pem().unwrap()).unwrap();
    let refused = host.open(&sealed).unwrap_err();
    assert!(refused.exit() == Exit::Config, "{refused}");
    assert!(refused.to_string().contains("differs from the one in its file"), "{refused}");
}

#[test]
fn jose_seals_to_the_tpm() {
    let host = Host::new();
    host.enrol(&host.literal("7"), None);
    let volume_key = VolumeKey::random(KeySize::Bits256).unwrap();
    let context = context();
    let payload = serde_json::json!({
        "volume_key": Base64UrlUnpadded::encode_string(volume_key.expose()), "cipher": "aes-xts-plain64",
        "key_size_bits": 256, "sector_size_bytes": 512, "data_offset_bytes": 0, "digest": null,
    });
    let protected = serde_json::json!({"protected": {"typ": "cryptattach", "enc": "A256GCM", "cryptattach": context}});
    fs::write(host.path("payload"), payload.to_string()).unwrap();
    fs::write(host.path("header"), protected.to_string()).unwrap();
    // X and Y are the last 64 bytes of the public key in DER.
    let jwe = host.shell(
        "part() { openssl pkey -pubin -in host.pem -outform DER | tail -c 64 | $1 -c 32 | base64 | tr -- '+/' '-_' | tr -d '=\\n'; } && \
         printf '{\"kty\":\"EC\",\"crv\":\"P-256\",\"x\":\"%s\",\"y\":\"%s\"}' \"$(part head)\" \"$(part tail)\" >jwk && \
         jose jwe enc -i header -I payload -r '{\"header\":{\"alg\":\"ECDH-ES+A256KW\"}}' -k jwk",
    );
    let sealed =
        Sealed { volume_key, key: SealedKey::from_json(jwe.as_bytes()).unwrap(), expected: expected(&context) };
    host.open(&sealed).unwrap();
}
