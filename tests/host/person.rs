//! Leaves that persons open: words on paper and passphrases, typed at a terminal; and rehearsals of a recovery.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::Value;

use crate::{
    page,
    page_words::words_of,
    policy::Policies,
    site::{Site, sh},
    tpm::Host,
    tpm_attach,
};

/// How long a conversation may take, in seconds.
const LONGEST: &str = "60";

/// What a terminal has shown, and the exit code.
pub struct Conversation {
    pub shown: String,
    pub code: Option<i32>,
}

/// Runs the command at a terminal of its own. `answer` is asked for each question.
pub fn at_terminal(
    site: &Site,
    environment: &[(&str, &str)],
    arguments: &[&str],
    mut answer: impl FnMut(&str) -> String,
) -> Conversation {
    let words = [env!("CARGO_BIN_EXE_cryptattach")].into_iter().chain(arguments.iter().copied());
    let line = words.map(|word| format!("'{word}'")).collect::<Vec<_>>().join(" ");
    // script(1) makes the terminal, and ends with the command's exit code.
    let mut child = Command::new("timeout")
        .args(["-k", "1", LONGEST, "script", "-qefc", &line, "/dev/null"])
        .env("CRYPTATTACH_CONFIG", site.keys("cryptattach.toml"))
        .envs(environment.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut typed, mut out) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let (mut shown, mut bytes, mut answered) = (Vec::new(), [0; 4096], 0);
    loop {
        let read = out.read(&mut bytes).unwrap();
        if read == 0 {
            break;
        }
        shown.extend_from_slice(&bytes[..read]);
        let said = String::from_utf8_lossy(&shown[answered..]).into_owned();
        // A line of the log may follow the question.
        if ["): ", "Again: ", "passphrase: "].iter().any(|end| said.contains(end)) {
            answered = shown.len();
            let _ = writeln!(typed, "{}", answer(&said));
        }
    }
    let code = child.wait().unwrap().code();
    let shown = String::from_utf8_lossy(&shown).into_owned();
    println!("$ cryptattach {}\n{shown}  -> {code:?}\n", arguments.join(" "));
    Conversation { shown, code }
}

/// Makes the leaf `paper`: its words, which are typed back.
fn new_paper(site: &Site) -> String {
    let config = site.keys("cryptattach.toml");
    let text = fs::read_to_string(config).unwrap() + "[leaves.paper]\nrecovery = \"paper.json\"\n";
    fs::write(config, text).unwrap();
    let mut words = String::new();
    let made = at_terminal(site, &[], &["leaf", "new", "paper"], |page| {
        if words.is_empty() {
            words = words_of(page);
            return "not these words".to_owned();
        }
        words.to_uppercase()
    });
    assert_eq!(made.code, Some(0));
    assert!(made.shown.contains("it has 3 words; a recovery key has 14. Again") && made.shown.contains("█"));
    let file = fs::read_to_string(site.keys("paper.json")).unwrap();
    assert!(
        words.split(' ').filter(|word| word.len() > 5 && *word != "public").all(|word| !file.contains(word)),
        "{file}"
    );
    words
}

fn bytes_of(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.extend(bytes_of(&path));
        } else {
            all.insert(path.clone(), fs::read(&path).unwrap());
        }
    }
    all
}

#[test]
fn words_on_paper_open_what_dead_servers_do_not() {
    let host = Host::new();
    let site = tpm_attach::site(&host);
    let volume = site.file("volume", 64 << 20).into_os_string().into_string().unwrap();
    let policies = Policies::with(site, volume, host.swtpm.tcti());
    let config = fs::read_to_string(policies.config()).unwrap();
    fs::write(policies.config(), config + "[leaves.tpm]\npublic = \"host.pem\"\n[boot]\nprompt_after_seconds = 1.0\n")
        .unwrap();
    policies.ok(&["format", &policies.volume, "--store", "tpm"]);
    let words = new_paper(&policies.site);
    policies.ok(&["container", "policy", "tpm", "any(escrow, paper, all(tpm, t1))"]);

    let tcti = policies.tcti.clone();
    let environment = [("CRYPTATTACH_TCTI", &*tcti)];
    let test = ["test", &policies.volume, "--allow-shared"];
    // Nobody is asked while the server answers.
    let quiet = at_terminal(&policies.site, &environment, &test, |said| panic!("asked: {said}"));
    assert_eq!(quiet.code, Some(0));
    assert!(quiet.shown.contains("paper: not needed") && quiet.shown.contains("t1: opened"));

    policies.set_up([false; 3]);
    let told = policies.test(&tcti).unwrap_err();
    assert!(told.contains("paper (nobody was asked for it)") && told.contains("--answer FILE"), "{told}");
    let mut answers = vec![words.clone(), words.replacen(' ', " zebra ", 1), String::from("one word")];
    let opened = at_terminal(&policies.site, &environment, &test, |said| {
        assert!(said.contains("Enter the recovery key of container 'tpm' (paper): "), "{said}");
        answers.pop().unwrap()
    });
    assert_eq!(opened.code, Some(0));
    assert!(opened.shown.contains("paper: opened") && opened.shown.contains("it has 15 words"), "{}", opened.shown);
    assert!(!opened.shown.contains(&words), "what is typed is not shown");

    let mut asked = 0;
    let refused = at_terminal(&policies.site, &environment, &test, |_| {
        asked += 1;
        "abandon ".repeat(14)
    });
    assert_eq!((refused.code, asked), (Some(68), 3));
    assert!(refused.shown.contains("what was typed opens none of: paper"), "{}", refused.shown);

    // A rotation needs no words, and the words need no rotation.
    policies.set_up([true; 3]);
    policies.ok(&["container", "rotate", "tpm"]);
    policies.set_up([false; 3]);
    let answer = policies.site.path("answer");
    fs::write(&answer, words.to_uppercase().replace(' ', "-") + "\n").unwrap();
    policies.ok(&[&test[..], &["--answer", answer.to_str().unwrap()]].concat());
    // The servers are dead for ever: the words alone change the policy.
    let policy = ["container", "policy", "tpm", "any(escrow, paper, tpm)", "--answer", answer.to_str().unwrap()];
    policies.ok(&policy);
    policies.ok(&test);

    // The server is on the volume's host. A person is apart, so both together are.
    let verdict = |policy: &str| {
        policies.ok(&["container", "policy", "tpm", policy, "--answer", answer.to_str().unwrap()]);
        let report = policies.site.run(&["separation", &policies.volume, "--separation", "warn", "--json"]);
        serde_json::from_slice::<Value>(&report.stdout).unwrap()["verdict"].clone()
    };
    assert_eq!(verdict("any(escrow, paper, t1)"), "shared");
    assert_ne!(verdict("any(escrow, all(paper, t1))"), "shared");
}

#[test]
fn a_recovery_is_rehearsed_without_changing_anything() {
    let site = Site::new();
    let words = new_paper(&site);
    let volumes = ["a", "b", "c"].map(|name| site.volume(name, &[]).1);
    site.ok(&["container", "policy", "cinder", "any(owner, escrow, hosts, paper)"]);
    let answer = site.path("answer");
    fs::write(&answer, &words).unwrap();
    let store = PathBuf::from(site.keys("cinder"));
    // All but the head of the audit record, which has each rehearsal.
    let all = || {
        let mut all = bytes_of(Path::new(site.keys("site-state")));
        all.retain(|path, _| path.parent().is_some_and(|folder| !folder.ends_with("audit")));
        all.extend(bytes_of(&store));
        all
    };
    let before = all();
    let rehearse = ["container", "rehearse", "cinder", "--answer", answer.to_str().unwrap()];
    let found = site.json(&rehearse);
    assert_eq!((&found["saved"], &found["lost"]), (&3.into(), &serde_json::json!([])), "{found}");
    assert_eq!(found["container_keys"], serde_json::json!(["2"]));
    assert_eq!(found["replaced"], serde_json::json!(["1"]), "it was made before there was paper");
    let by_escrow = site.json(&["container", "rehearse", "cinder", "--identity", site.keys("escrow.key")]);
    assert_eq!((&by_escrow["saved"], &by_escrow["replaced"]), (&3.into(), &serde_json::json!([])));
    let asked = at_terminal(&site, &[], &["container", "rehearse", "cinder", "--with", "paper"], |_| words.clone());
    assert!(asked.code == Some(0) && asked.shown.contains("would save 3 of 3 keys"));
    assert!(asked.shown.contains("cinder/kek/1: replaced, no key needs it"));
    assert!(all() == before, "nothing changed");

    // The owner's key is on this host, and is not used.
    let stranger = site.keys("stranger.key");
    sh(&format!(
        "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out {stranger} 2>/dev/null; chmod 600 {stranger}"
    ));
    let told = site.fails(68, &["container", "rehearse", "cinder", "--identity", stranger]);
    assert!(told.contains("would lose 3 keys and 1 container keys"), "{told}");
    site.fails(64, &["container", "rehearse", "cinder", "--identity", stranger, "--with", "paper"]);

    // One key is damaged: the others are saved, and it is told.
    let damaged = site.sealed(&volumes[1]);
    let mut key: Value = serde_json::from_slice(&fs::read(&damaged).unwrap()).unwrap();
    key["tag"] = "AAAAAAAAAAAAAAAAAAAAAA".into();
    fs::write(&damaged, key.to_string()).unwrap();
    let output = site.run(&rehearse);
    let (said, told) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert_eq!(output.status.code(), Some(68), "{told}");
    assert!(said.contains("would save 2 of 3 keys") && said.contains("has been changed since it was sealed"), "{said}");
    assert!(told.contains("would lose 1 keys and 0 container keys"), "{told}");
}

#[test]
fn who_gives_up_is_not_asked_again_for_each_key_that_a_store_brings_back() {
    let site = Site::new();
    let words = new_paper(&site);
    let volumes = ["a", "b", "c"].map(|name| site.volume(name, &[]).1);
    site.ok(&["container", "policy", "cinder", "any(escrow, paper)"]);
    let sealed = volumes.map(|volume| site.sealed(&volume));
    let before = sealed.each_ref().map(|path| fs::read(path).unwrap());
    let answer = site.path("answer");
    fs::write(&answer, &words).unwrap();
    site.ok(&["container", "policy", "cinder", "any(owner, escrow)", "--answer", answer.to_str().unwrap()]);
    sealed.iter().zip(before).for_each(|(path, key)| fs::write(path, key).unwrap());
    let mut asked = 0;
    let rotated = at_terminal(&site, &[], &["container", "rotate", "cinder"], |_| {
        asked += 1;
        String::new()
    });
    assert!(rotated.code != Some(0) && rotated.shown.contains("paper"), "{}", rotated.shown);
    assert_eq!(asked, 1);
}

#[test]
fn a_store_is_made_with_words_in_place_of_an_escrow() {
    let site = Site::bare();
    let keys = site.keys("cinder");
    let init = ["init", "--store", "cinder", "--path", keys, "--recovery"];
    let refused = site.fails(64, &init);
    assert!(refused.contains("on a terminal only"), "{refused}");
    assert!(!Path::new(keys).exists());
    let mut words = String::new();
    let made = at_terminal(&site, &[], &init, |page| {
        words = words_of(page);
        words.clone()
    });
    assert_eq!(made.code, Some(0));
    let config = fs::read_to_string(site.keys("cryptattach.toml")).unwrap();
    assert!(config.contains("opens = \"any(owner, hosts, paper)\"") && config.contains("no_escrow = true"), "{config}");
    let (volume, _) = site.volume("volume", &[]);
    // The owner's key is lost.
    fs::remove_file(site.keys("cinder.owner.key")).unwrap();
    fs::write(site.keys("cryptattach.toml"), config.replace(&format!("\"{}\"", site.keys("cinder.owner.key")), ""))
        .unwrap();
    let opened = at_terminal(&site, &[], &["test", &volume], |_| words.clone());
    assert_eq!(opened.code, Some(0));
    // The leaf's file is never overwritten; one passphrase is too short, two are not the same.
    site.fails(73, &["leaf", "new", "paper", "--to-pipe", "--no-confirm"]);
    let config = fs::read_to_string(site.keys("cryptattach.toml")).unwrap();
    fs::write(site.keys("cryptattach.toml"), config + "[leaves.anna]\npassphrase = \"anna.json\"\n").unwrap();
    let mut typed = ["correct horse", "correct house", "short", "short"].into_iter();
    let short = at_terminal(&site, &[], &["leaf", "new", "anna"], |_| typed.next().unwrap().to_owned());
    assert_eq!(short.code, Some(64));
    assert!(
        short.shown.contains("two different passphrases") && short.shown.contains("at least 12"),
        "{}",
        short.shown
    );
    let made = at_terminal(&site, &[], &["leaf", "new", "anna"], |_| "correct horse battery".to_owned());
    assert_eq!(made.code, Some(0));
}

#[test]
fn a_copy_of_the_store_and_the_words_are_enough_by_hand() {
    let site = Site::new();
    let words = new_paper(&site);
    let config = site.keys("cryptattach.toml");
    fs::write(config, fs::read_to_string(config).unwrap() + "[leaves.anna]\npassphrase = \"anna.json\"\n").unwrap();
    let passphrase = site.path("passphrase.txt");
    fs::write(&passphrase, "correct horse battery\n").unwrap();
    site.ok(&["leaf", "new", "anna", "--answer", passphrase.to_str().unwrap()]);
    site.ok(&["container", "policy", "cinder", "any(escrow, paper, anna)"]);
    fs::write(site.path("answer"), &words).unwrap();
    let volume = site.file("volume", 64 << 20).into_os_string().into_string().unwrap();
    let reference = site.ok(&["format", &volume, "--answer", site.path("answer").to_str().unwrap()]);
    let cases = [("### With a recovery key", words), ("### With a passphrase", "correct horse battery".to_owned())];
    for (at, (heading, typed)) in cases.into_iter().enumerate() {
        let folder = site.path(&format!("by-hand-{at}"));
        fs::create_dir(&folder).unwrap();
        fs::copy(site.keys("cinder/kek/2.jwe"), folder.join("kek-2.jwe")).unwrap();
        fs::copy(site.sealed(&reference), folder.join("KEY-ID.jwe")).unwrap();
        fs::write(folder.join("typed.txt"), typed + "\n").unwrap();
        page::run(&folder, &page::commands(include_str!("../../docs/recovery.md"), heading), &[]);
        sh(&format!(
            "cryptsetup open --test-passphrase --volume-key-file {}/volume.key --key-size 512 {volume}",
            folder.display()
        ));
    }
}
