//! Leaves whose private key is in a token: SoftHSM's, and modules that misbehave.

use std::{
    fs,
    path::PathBuf,
    process::{Command, Stdio},
    sync::OnceLock,
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    page,
    site::{Site, sh},
    softhsm::{MODULE, PIN, SoftHsm},
    tangd::Tangd,
    token_program,
};

/// A site whose store `cinder` is opened by a token.
struct Tokens {
    site: Site,
    hsm: SoftHsm,
    volume: String,
}

impl Tokens {
    /// With the token `owner`, and nothing that names it yet.
    fn new() -> Self {
        token_program::build();
        let site = Site::new();
        let (volume, _) = site.volume("volume", &[]);
        let hsm = SoftHsm::new(site.keys("hsm").into());
        hsm.token("owner");
        fs::write(site.keys("pin"), format!("{PIN}\n")).unwrap();
        let tokens = Self { site, hsm, volume };
        tokens.configure("[network]\ntotal_seconds = 3.0\n");
        tokens
    }

    /// The same, opened by the key `rsa` through a module of ours.
    fn by_our_module(mode: &str) -> Self {
        let tokens = Self::new();
        tokens.leaf("hsm", "token=owner;object=rsa", &our_module(), "pin = \"pin\"\n");
        tokens.pin("hsm");
        tokens.site.ok(&["container", "policy", "cinder", "any(escrow, hsm)"]);
        tokens.set_mode(mode);
        tokens
    }

    fn config(&self) -> PathBuf {
        self.site.keys("cryptattach.toml").into()
    }

    fn configure(&self, more: &str) {
        fs::write(self.config(), fs::read_to_string(self.config()).unwrap() + more).unwrap();
    }

    fn change(&self, from: &str, to: &str) {
        let text = fs::read_to_string(self.config()).unwrap();
        assert!(text.contains(from), "{text}");
        fs::write(self.config(), text.replace(from, to)).unwrap();
    }

    fn leaf(&self, name: &str, uri: &str, module: &str, more: &str) {
        let (conf, log) = (self.hsm.config(), self.log());
        self.configure(&format!(
            "[leaves.{name}]\npkcs11 = \"pkcs11:{uri}\"\nmodule = \"{module}\"\n{more}\
             environment = {{ SOFTHSM2_CONF = \"{}\", LOG = \"{}\", MODE = \"none\" }}\n",
            conf.display(),
            log.display()
        ));
    }

    fn set_mode(&self, mode: &str) {
        self.change("MODE = \"none\"", &format!("MODE = \"{mode}\""));
    }

    fn log(&self) -> PathBuf {
        self.site.path("module.log")
    }

    fn logged(&self) -> String {
        fs::read_to_string(self.log()).unwrap_or_default()
    }

    fn logins(&self) -> usize {
        self.logged().lines().filter(|line| *line == "login").count()
    }

    /// Pins a leaf to what its token offers.
    fn pin(&self, leaf: &str) {
        let told = self.site.fails(64, &["leaf", "pin", leaf]);
        let thumbprint = told.trim().rsplit(' ').next().unwrap();
        self.site.ok(&["leaf", "pin", leaf, "--thumbprint", thumbprint]);
    }

    fn test(&self) -> Result<Value, String> {
        let output = self.site.run(&["test", &self.volume, "--allow-shared", "--json"]);
        match output.status.success() {
            true => Ok(serde_json::from_slice(&output.stdout).unwrap()),
            false => Err(String::from_utf8(output.stderr).unwrap()),
        }
    }

    /// Why the leaf `hsm` does not open.
    #[track_caller]
    fn refused(&self) -> String {
        let told = self.test().unwrap_err();
        println!("{told}");
        assert!(told.contains("its policy is not met"), "{told}");
        told
    }

    /// What is said at a terminal where somebody types this when asked for the PIN.
    fn at_a_terminal(&self, typed: &str) -> (bool, String) {
        let test = format!("{} test {} --allow-shared", env!("CARGO_BIN_EXE_cryptattach"), self.volume);
        let mut script = Command::new("script");
        script.args(["--quiet", "--return", "--echo", "never", "--command", &test, "/dev/null"]);
        script.env("CRYPTATTACH_CONFIG", self.config());
        let mut child = script.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        // What is typed before it is asked for would be flushed.
        thread::sleep(Duration::from_millis(2500));
        use std::io::Write;
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(format!("{typed}\n").as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        drop(stdin);
        (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// No process of the module is left.
    fn all_are_gone(&self) {
        let logged = self.logged();
        let numbers: Vec<&str> =
            logged.lines().filter_map(|line| line.split_once(' ')).map(|(_, number)| number).collect();
        let numbers: Vec<_> = numbers.into_iter().filter(|number| number.parse::<u32>().is_ok()).collect();
        assert_eq!(numbers.len(), 2, "{logged}");
        for number in numbers {
            let stat = || fs::read_to_string(format!("/proc/{number}/stat")).unwrap_or_default();
            let is_gone = |_| {
                thread::sleep(Duration::from_millis(10));
                stat().is_empty() || stat().contains(") Z ")
            };
            assert!((0..200).any(is_gone), "{}", stat());
        }
    }
}

/// The module of pkcs11_module.c.
fn our_module() -> String {
    static MADE: OnceLock<String> = OnceLock::new();
    let make = || {
        let module = concat!(env!("CARGO_TARGET_TMPDIR"), "/pkcs11_module.so");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/host/pkcs11_module.c");
        sh(&format!("cc -Wall -Wextra -Werror -shared -fPIC -o {module} {source} -ldl"));
        module.to_owned()
    };
    MADE.get_or_init(make).clone()
}

#[test]
fn keys_in_tokens_open_alone_and_together_and_through_a_proxy() {
    let tokens = Tokens::new();
    tokens.leaf("rsa", "token=owner;object=rsa;type=private", MODULE, "pin = \"pin\"\n");
    tokens.leaf("ec", "token=owner;id=%02", "/usr/lib/x86_64-linux-gnu/p11-kit-proxy.so", "pin = \"pin\"\n");
    // Nobody has said which keys they are.
    let told = tokens.site.fails(78, &["container", "policy", "cinder", "any(escrow, rsa)"]);
    assert!(told.contains("'cryptattach leaf pin rsa'"), "{told}");
    let told = tokens.site.fails(68, &["leaf", "pin", "rsa", "--thumbprint", "another"]);
    assert!(told.contains("expected another"), "{told}");
    tokens.pin("rsa");
    tokens.pin("ec");
    for (policy, said) in [
        ("any(escrow, ec)", vec!["ec"]),
        ("any(escrow, all(rsa, ec))", vec!["rsa", "ec"]),
        ("any(escrow, 2 of (rsa, ec, t1))", vec!["rsa", "ec"]),
    ] {
        if policy.contains("t1") {
            // Nobody answers there.
            tokens.configure("[leaves.t1]\npublic = \"escrow.pem\"\n");
        }
        tokens.site.ok(&["container", "policy", "cinder", policy]);
        let told = tokens.test().unwrap()["policy"].to_string();
        for leaf in said {
            assert!(told.contains(&format!(r#""part":"{leaf}","said":"opened""#)), "{told}");
        }
    }
}

#[test]
fn a_token_and_two_servers_open_exactly_when_two_of_them_are_there() {
    let tokens = Tokens::new();
    let tangs = [Tangd::start(), Tangd::start()];
    for (name, tang) in ["t1", "t2"].iter().zip(&tangs) {
        tokens.configure(&format!(
            "[leaves.{name}]\ntang = \"{}\"\nthumbprint = \"{}\"\n",
            tang.url,
            tang.thumbprint()
        ));
    }
    tokens.leaf("hsm", "token=owner;object=rsa", MODULE, "pin = \"pin\"\n");
    tokens.pin("hsm");
    tokens.site.ok(&["container", "policy", "cinder", "any(escrow, 2 of (hsm, t1, t2))"]);
    for subset in 0..8_u32 {
        let has = |bit: u32| subset >> bit & 1 == 1;
        tokens.hsm.plug(has(0));
        tangs[0].set_up(has(1));
        tangs[1].set_up(has(2));
        match tokens.test() {
            Ok(passed) => assert!(subset.count_ones() >= 2, "{subset:03b}: {passed}"),
            Err(told) => {
                assert!(subset.count_ones() < 2 && told.contains("2 of 3"), "{subset:03b}: {told}");
                assert!(
                    has(0) || told.contains("hsm (no token is there)") || told.contains("hsm (not needed)"),
                    "{told}"
                );
            }
        }
    }
}

/// An owner's key that moves into a token opens what was sealed to it before: nothing in a sealed key says where it is.
#[test]
fn a_public_key_in_a_file_is_enough_and_says_nothing_of_a_token() {
    let tokens = Tokens::new();
    let pem = tokens.site.keys("rsa.pem");
    tokens.hsm.run(&format!(
        "pkcs11-tool --module {MODULE} --token-label owner --read-object --type pubkey --id 01 -o {pem}.der && \
         openssl rsa -pubin -inform DER -in {pem}.der -out {pem}"
    ));
    tokens.leaf("hsm", "token=owner;id=%01", MODULE, "pin = \"pin\"\npublic = \"rsa.pem\"\n");
    tokens.site.ok(&["container", "policy", "cinder", "any(escrow, hsm)"]);
    let tested = tokens.test().unwrap();
    assert!(tested["policy"].to_string().contains(r#""part":"hsm","said":"opened""#), "{tested}");
    let epoch = tokens.site.json(&["container", "show", "cinder"])["epoch"].as_str().unwrap().to_owned();
    let sealed: Value =
        serde_json::from_slice(&fs::read(tokens.site.keys(&format!("cinder/kek/{epoch}.jwe"))).unwrap()).unwrap();
    for recipient in sealed["recipients"].as_array().unwrap() {
        assert!(!recipient.to_string().contains("pkcs11") && !recipient.to_string().contains("owner"), "{recipient}");
    }
    // Another key of the token opens nothing.
    tokens.change("id=%01", "id=%02");
    let told = tokens.refused();
    assert!(told.contains("hsm (the token's key"), "{told}");
    // Its public key is not the one of the file.
    let told = tokens.site.fails(68, &["leaf", "pin", "hsm"]);
    assert!(told.contains("expected"), "{told}");
}

#[test]
fn what_fits_twice_is_not_guessed_at() {
    let tokens = Tokens::new();
    tokens.hsm.token("other");
    tokens.leaf("hsm", "object=rsa", MODULE, "");
    let told = tokens.site.fails(78, &["leaf", "pin", "hsm"]);
    assert!(told.contains("2 tokens fit") && told.contains("'owner' (serial") && told.contains("serial="), "{told}");
    tokens.change("pkcs11:object=rsa", "pkcs11:token=other");
    let told = tokens.site.fails(78, &["leaf", "pin", "hsm"]);
    assert!(told.contains("2 public keys fit") && told.contains("'rsa' (id %01)"), "{told}");
    tokens.change("pkcs11:token=other", "pkcs11:token=third");
    let told = tokens.site.fails(69, &["leaf", "pin", "hsm"]);
    assert!(told.contains("no token fits the URI; there are: '"), "{told}");
    tokens.change("pkcs11:token=third", "pkcs11:token=other;object=none");
    assert!(tokens.site.fails(78, &["leaf", "pin", "hsm"]).contains("no public key fits"));
    let refusals = [
        ("pkcs11:token=a;token=b", "'token' twice"),
        ("pkcs11:token=a?pin-value=1234", "it has a PIN"),
        ("pkcs11:token=a?module-path=/m.so", "expected one module"),
        ("tokn=a", "does not begin with 'pkcs11:'"),
    ];
    let before = fs::read_to_string(tokens.config()).unwrap();
    for (uri, why) in refusals {
        tokens.change("pkcs11:token=other;object=none", uri);
        let told = tokens.site.fails(78, &["leaf", "pin", "hsm"]);
        assert!(told.contains(why) && told.contains("leaf 'hsm'"), "{told}");
        fs::write(tokens.config(), &before).unwrap();
    }
    tokens.change(MODULE, "/nowhere.so");
    assert!(tokens.site.fails(78, &["leaf", "pin", "hsm"]).contains("/nowhere.so is no PKCS#11 module"));
}

/// The token counts nothing here: that the PIN is not tried again is this host's doing.
#[test]
fn a_wrong_pin_is_tried_once_in_a_boot_and_then_a_person_is_needed() {
    let tokens = Tokens::by_our_module("uncounted");
    fs::write(tokens.site.keys("pin"), "000000\n").unwrap();
    let told = tokens.refused();
    assert!(told.contains("PIN of the token 'owner'") && told.contains("is wrong"), "{told}");
    assert_eq!(tokens.logins(), 1);
    for _ in 0..3 {
        let told = tokens.refused();
        assert!(told.contains("was given the PIN in") && told.contains("in this boot"), "{told}");
    }
    // Neither is the right one.
    fs::write(tokens.site.keys("pin"), PIN).unwrap();
    tokens.refused();
    assert_eq!(tokens.logins(), 1);

    let (opened, told) = tokens.at_a_terminal("111111");
    assert!(!opened && told.contains("PIN of the token 'owner': "), "{told}");
    assert!(!told.contains("111111"), "{told}");
    tokens.refused();
    assert_eq!(tokens.logins(), 2);
    let (opened, told) = tokens.at_a_terminal(PIN);
    assert!(opened && !told.contains(PIN), "{told}");
    tokens.test().unwrap();
    assert_eq!(tokens.logins(), 4);
}

/// Some tokens return a general error, and count the try all the same.
#[test]
fn a_pin_that_may_be_wrong_is_not_tried_again_either() {
    let tokens = Tokens::by_our_module("vague");
    fs::write(tokens.site.keys("pin"), "000000\n").unwrap();
    let told = tokens.refused();
    assert!(told.contains("may be wrong: C_Login returns GeneralError"), "{told}");
    let told = tokens.refused();
    assert!(told.contains("in this boot"), "{told}");
    assert_eq!(tokens.logins(), 1);
}

/// Two who read the same line would each have a part of it: a wrong PIN, given to the token.
#[test]
fn a_person_is_asked_for_a_pin_and_for_a_passphrase_one_after_the_other() {
    let tokens = Tokens::by_our_module("uncounted");
    fs::write(tokens.site.keys("right"), "correct horse battery").unwrap();
    tokens.configure("[leaves.anna]\npassphrase = \"anna.json\"\n[boot]\nprompt_after_seconds = 1.5\n");
    tokens.site.ok(&["leaf", "new", "anna", "--answer", tokens.site.keys("right")]);
    tokens.site.ok(&["container", "policy", "cinder", "any(escrow, hsm, anna)"]);
    tokens.change("pin = \"pin\"\n", "");
    let before = tokens.logins();
    let (opened, told) = tokens.at_a_terminal(PIN);
    // While the token works the other question may come. It stands on a line of its own.
    assert!(opened && told.contains("PIN of the token 'owner': ") && !told.contains("'owner': Enter"), "{told}");
    assert_eq!(tokens.logins(), before + 1);
}

#[test]
fn what_a_token_says_of_its_pin_is_heeded() {
    let tokens = Tokens::by_our_module("final");
    let told = tokens.refused();
    assert!(told.contains("wants its PIN") && told.contains("not tried unattended"), "{told}");
    let (opened, told) = tokens.at_a_terminal(PIN);
    assert!(opened && told.contains("a wrong one locks it for good"), "{told}");
    tokens.change("MODE = \"final\"", "MODE = \"locked\"");
    let before = tokens.logins();
    assert!(tokens.refused().contains("is locked"));
    assert_eq!(tokens.logins(), before);
    // SoftHSM says so itself after a wrong PIN.
    tokens.change("MODE = \"locked\"", "MODE = \"none\"");
    fs::write(tokens.site.keys("pin"), "000000\n").unwrap();
    tokens.refused();
    assert_eq!(tokens.logins(), before + 1);
    // Without a file and without a terminal nobody has the PIN.
    tokens.change("pin = \"pin\"\n", "");
    assert!(tokens.refused().contains("wants its PIN, and nobody can be asked"));
    assert_eq!(tokens.logins(), before + 1);
}

#[test]
fn a_pin_is_in_no_argument_and_no_environment_and_neither_is_the_callers() {
    let tokens = Tokens::by_our_module("none-other");
    let mut test = tokens.site.command();
    test.args(["test", &tokens.volume, "--allow-shared"]).env("OS_PASSWORD", "of-the-cloud");
    assert!(test.stdin(Stdio::null()).status().unwrap().success());
    let logged = tokens.logged();
    assert!(logged.contains("cryptattach-pkcs11") && logged.contains("MODE=none-other"), "{logged}");
    assert!(!logged.contains(PIN) && !logged.contains("of-the-cloud") && !logged.contains("HOME="), "{logged}");
}

#[test]
fn a_module_that_hangs_is_killed_with_its_children() {
    for mode in ["hang", "hang-login", "hang-key"] {
        let tokens = Tokens::by_our_module(mode);
        let begun = Instant::now();
        let told = tokens.refused();
        assert!(told.contains("does not answer within"), "{told}");
        assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
        tokens.all_are_gone();
        // Whether the PIN was taken is known in the last case only.
        tokens.change(&format!("MODE = \"{mode}\""), "MODE = \"none\"");
        match tokens.test() {
            Ok(_) => assert_ne!(mode, "hang-login"),
            Err(told) => assert!(mode == "hang-login" && told.contains("was given the PIN"), "{told}"),
        }
    }
}

#[test]
fn a_module_that_hangs_holds_nobody_up_who_has_another_leaf() {
    let tokens = Tokens::by_our_module("none");
    let tang = Tangd::start();
    tokens.configure(&format!("[leaves.t1]\ntang = \"{}\"\nthumbprint = \"{}\"\n", tang.url, tang.thumbprint()));
    tokens.site.ok(&["container", "policy", "cinder", "any(escrow, hsm, t1)"]);
    tokens.set_mode("hang");
    tokens.change("total_seconds = 3.0", "total_seconds = 30.0");
    fs::remove_file(tokens.log()).unwrap();
    let begun = Instant::now();
    let tested = tokens.test().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    assert!(tested["policy"].to_string().contains(r#""part":"hsm","said":"not-needed""#), "{tested}");
    tokens.all_are_gone();
}

#[test]
fn a_module_that_crashes_prints_or_talks_rubbish_opens_nothing_and_harms_nobody() {
    let tokens = Tokens::by_our_module("crash");
    let mut before = "crash";
    let cases = [
        ("crash", "signal: 11"),
        ("exit", "ends without an answer"),
        ("print", "C_Initialize returns GeneralError"),
        ("forge", "its answer is not a key"),
        ("rubbish", "without an answer"),
        ("broken-key", "does not open the leaf"),
    ];
    for (mode, why) in cases {
        tokens.change(&format!("MODE = \"{before}\""), &format!("MODE = \"{mode}\""));
        let told = tokens.refused();
        assert!(told.contains(why), "{mode}: {told}");
        before = mode;
    }
    tokens.change("MODE = \"broken-key\"", "MODE = \"none\"");
    tokens.test().unwrap();
}

#[test]
fn where_a_token_rests_is_judged() {
    let tokens = Tokens::by_our_module("software");
    let judged = |tokens: &Tokens| {
        let output = tokens.site.run(&["separation", &tokens.volume, "--json"]);
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        (report["verdict"].as_str().unwrap().to_owned(), report.to_string())
    };
    let (verdict, report) = judged(&tokens);
    assert!(verdict == "unproven" && report.contains("no token has said that it is hardware"), "{report}");
    tokens.change("MODE = \"software\"", "MODE = \"hardware\"");
    tokens.site.ok(&["leaf", "pin", "hsm"]);
    let (verdict, report) = judged(&tokens);
    assert!(verdict == "apart" && report.contains("the token 'owner'"), "{report}");
    // The volume is on this disk, and the real tokens are in memory.
    let beside = tokens.site.path("tokens");
    fs::create_dir(&beside).unwrap();
    tokens.change("pin = \"pin\"\n", &format!("pin = \"pin\"\nplaces = [\"{}\"]\n", beside.display()));
    let (verdict, report) = judged(&tokens);
    assert!(verdict == "shared" && report.contains("leaf hsm"), "{report}");
    tokens.change(beside.to_str().unwrap(), tokens.hsm.tokens().to_str().unwrap());
    let (verdict, report) = judged(&tokens);
    assert_eq!(verdict, "apart", "{report}");
}

#[test]
fn an_initramfs_gets_the_program_and_the_module_only_for_a_leaf_of_a_boot_volume() {
    let tokens = Tokens::new();
    let conf = tokens.hsm.config().display().to_string();
    let files = format!("pin = \"pin\"\nfiles = [\"{conf}\", \"hsm/tokens\"]\nplaces = [\"hsm/tokens\"]\n");
    tokens.leaf("hsm", "token=owner;object=rsa", MODULE, &files);
    tokens.pin("hsm");
    let key = tokens.site.json(&["test", &tokens.volume, "--allow-shared"])["key"].as_str().unwrap().to_owned();
    let volume = format!("[[boot.volumes]]\nname = \"data\"\ndevice = \"/dev/null\"\nkeys = [\"{key}\"]\n");
    tokens.configure(&volume);
    let parts = || {
        let output = tokens.site.run(&["boot", "--image-parts"]);
        assert!(output.status.success(), "{output:?}");
        [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap())
    };
    let [without, _] = parts();
    assert!(without.contains("dm_crypt") && !without.contains("pkcs11") && !without.contains(MODULE), "{without}");
    tokens.site.ok(&["container", "policy", "cinder", "any(escrow, hsm)"]);
    let [with, kept_out] = parts();
    println!("{with}{kept_out}");
    let has = |line: &str| with.lines().any(|part| part.starts_with(line));
    assert!(has("program ") && with.contains("/cryptattach-pkcs11\n"), "{with}");
    assert!(has(&format!("library {MODULE}")) && has(&format!("file {conf}")), "{with}");
    assert!(has(&format!("file {}", tokens.site.keys("site-state/leaves/hsm.json"))), "{with}");
    assert!(!has(&format!("file {}", tokens.site.keys("pin"))) && !with.contains("hsm/tokens"), "{with}");
    assert!(kept_out.contains("it is the PIN of a token") && kept_out.contains("the keys of a token"), "{kept_out}");
}

#[test]
fn a_container_is_opened_by_hand_with_either_key() {
    let tokens = Tokens::new();
    tokens.leaf("rsa", "token=owner;object=rsa", MODULE, "pin = \"pin\"\n");
    tokens.leaf("ec", "token=owner;object=ec", MODULE, "pin = \"pin\"\n");
    tokens.pin("rsa");
    tokens.pin("ec");
    let reference = tokens.site.json(&["test", &tokens.volume, "--allow-shared"])["key"].as_str().unwrap().to_owned();
    tokens.site.ok(&["container", "policy", "cinder", "any(rsa, ec, escrow)"]);
    let epoch = tokens.site.json(&["container", "show", "cinder"])["epoch"].as_str().unwrap().to_owned();
    for (leaf, id, recipient) in [("rsa", "01", 0), ("ec", "02", 1)] {
        let folder = tokens.site.path(leaf);
        fs::create_dir(&folder).unwrap();
        fs::copy(tokens.site.keys(&format!("cinder/kek/{epoch}.jwe")), folder.join("kek-2.jwe")).unwrap();
        fs::copy(tokens.site.sealed(&reference), folder.join("KEY-ID.jwe")).unwrap();
        let mut script = page::commands(include_str!("../../docs/pkcs11.md"), "## Recover by hand");
        // A person types what `read` wants, and knows the rest.
        let answers = [
            ("read -rs PIN", format!("PIN={PIN}")),
            ("MODULE", MODULE.to_owned()),
            ("TOKEN", "owner".to_owned()),
            ("ID-OF-KEY", id.to_owned()),
            ("\nec kek-2.jwe 1 ", format!("\n{leaf} kek-2.jwe {recipient} ")),
        ];
        for (written, meant) in answers {
            assert!(script.contains(written), "{script}");
            script = script.replace(written, &meant);
        }
        page::run(&folder, &script, &[("SOFTHSM2_CONF", tokens.hsm.config().to_str().unwrap())]);
        sh(&format!(
            "cryptsetup open --test-passphrase --volume-key-file {0}/volume.key --key-size 512 {1}",
            folder.display(),
            tokens.volume
        ));
    }
}
