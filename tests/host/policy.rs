//! Policies: which leaves open a container, with real Tang servers and a TPM.

use std::{fs, path::PathBuf, process::Output, time::Instant};

use serde_json::{Value, json};

use crate::{
    page,
    site::{Site, sh},
    tangd::Tangd,
    tpm::Host,
    tpm_attach,
};

const NO_TPM: &str = "device:/dev/none";

/// A site with three Tang servers, and a volume.
pub struct Policies {
    pub site: Site,
    tangs: [Tangd; 3],
    pub volume: String,
    pub tcti: String,
}

impl Policies {
    /// The store `cinder` is sealed to its owner, whose private key is here.
    pub fn new() -> Self {
        let site = Site::new();
        let (volume, _) = site.volume("volume", &[]);
        Self::with(site, volume, NO_TPM.to_owned())
    }

    pub fn with(site: Site, volume: String, tcti: String) -> Self {
        let tangs = std::array::from_fn(|_| Tangd::start());
        let policies = Self { site, tangs, volume, tcti };
        let leaves = policies.tangs.iter().enumerate().map(|(at, tang)| {
            format!("[leaves.t{}]\ntang = \"{}\"\nthumbprint = \"{}\"\n", at + 1, tang.url, tang.thumbprint())
        });
        let network = "[network]\nconnect_seconds = 2.0\ntry_seconds = 2.0\ntotal_seconds = 2.0\n".to_owned();
        let more: String = [network].into_iter().chain(leaves).collect();
        let config = policies.config();
        fs::write(&config, fs::read_to_string(&config).unwrap() + &more).unwrap();
        policies
    }

    pub fn config(&self) -> PathBuf {
        self.site.keys("cryptattach.toml").into()
    }

    fn change(&self, from: &str, to: &str) {
        let text = fs::read_to_string(self.config()).unwrap();
        assert!(text.contains(from), "{text}");
        fs::write(self.config(), text.replace(from, to)).unwrap();
    }

    fn run(&self, arguments: &[&str], tcti: &str) -> Output {
        self.site.command().args(arguments).env("CRYPTATTACH_TCTI", tcti).output().unwrap()
    }

    pub fn ok(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments, &self.tcti);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    pub fn test(&self, tcti: &str) -> Result<Value, String> {
        let output = self.run(&["test", &self.volume, "--allow-shared", "--json"], tcti);
        match output.status.success() {
            true => Ok(serde_json::from_slice(&output.stdout).unwrap()),
            false => Err(String::from_utf8(output.stderr).unwrap()),
        }
    }

    pub fn set_up(&self, up: [bool; 3]) {
        self.tangs.iter().zip(up).for_each(|(tang, up)| tang.set_up(up));
    }

    fn current_key(&self, store: &str) -> Value {
        let epoch = self.site.json(&["container", "show", store])["epoch"].as_str().unwrap().to_owned();
        let folder = if store == "tpm" { "sealed" } else { store };
        serde_json::from_slice(&fs::read(self.site.keys(&format!("{folder}/kek/{epoch}.jwe"))).unwrap()).unwrap()
    }
}

/// Kills and revives each subset of the TPM, t1, t2 and t3, and prints what opened in which time.
fn each_subset(policies: &Policies, policy: &str, opens: fn([bool; 4]) -> bool) {
    println!("{policy}\n  TPM t1 t2 t3   opens     s");
    for subset in 0..16_u32 {
        let has: [bool; 4] = std::array::from_fn(|bit| subset >> bit & 1 == 1);
        let [tpm, servers @ ..] = has;
        policies.set_up(servers);
        let started = Instant::now();
        let tested = policies.test(if tpm { &policies.tcti } else { NO_TPM });
        let (after, marks) = (started.elapsed().as_secs_f64(), has.map(|has| if has { "  +" } else { "  -" }));
        println!(" {}   {:5} {after:5.2}", marks.concat(), tested.is_ok());
        match tested {
            Ok(passed) => {
                assert!(opens(has), "{policy} {has:?}: {passed}");
                assert_eq!(passed["policy"]["said"], "opened");
            }
            Err(told) => assert!(!opens(has) && told.contains("its policy is not met"), "{policy} {has:?}: {told}"),
        }
    }
}

#[test]
fn each_subset_of_tpm_and_servers_opens_exactly_when_the_policy_says_so() {
    let host = Host::new();
    let site = tpm_attach::site(&host);
    let volume = site.file("volume", 64 << 20).into_os_string().into_string().unwrap();
    let policies = Policies::with(site, volume, host.swtpm.tcti());
    let config = fs::read_to_string(policies.config()).unwrap();
    fs::write(policies.config(), config + "[leaves.tpm]\npublic = \"host.pem\"\n").unwrap();
    policies.ok(&["format", &policies.volume, "--store", "tpm"]);

    let policy = "any(escrow, all(tpm, 2 of (t1, t2, t3)))";
    let said = policies.ok(&["container", "policy", "tpm", policy]);
    println!("{said}");
    assert!(
        said.contains(&format!("opens            {policy}")) && said.contains("former leaves    hosts, owner"),
        "{said}"
    );
    assert_eq!(policies.site.json(&["container", "show", "tpm"])["opens"], policy);
    assert_eq!(policies.current_key("tpm")["recipients"].as_array().unwrap().len(), 2);

    each_subset(&policies, policy, |[tpm, t1, t2, t3]| tpm && [t1, t2, t3].iter().filter(|up| **up).count() >= 2);
    let told = policies.test(NO_TPM).unwrap_err();
    assert!(told.contains("escrow (this host has no key for it)") && told.contains("2 of 3"), "{told}");
    // What is up is not kept waiting by what is down.
    policies.set_up([true, false, true]);
    let text = policies.ok(&["test", &policies.volume, "--allow-shared"]);
    println!("{text}");
    assert!(text.contains("t2: not needed"), "{text}");
    assert!(text.contains("2 of 2: opened") && text.contains("tpm: opened") && text.contains("t3: opened"), "{text}");

    // Where key and data rest is judged as the tree says: all servers are on this host, and the TPM is not on its disks.
    let evidence = policies.site.json(&["separation", &policies.volume, "--separation", "warn"]);
    assert_ne!(evidence["verdict"], "shared", "{evidence}");
    // Two more policies over the same leaves. Changing a policy takes what opens the former one.
    let then = |policy: &str, opens: fn([bool; 4]) -> bool| {
        policies.set_up([true; 3]);
        policies.ok(&["container", "policy", "tpm", policy]);
        each_subset(&policies, policy, opens);
    };
    then("any(escrow, all(tpm, any(t1, t2)))", |[tpm, t1, t2, _]| tpm && (t1 || t2));
    then("any(escrow, 2 of (tpm, t1, all(t2, t3)))", |[tpm, t1, t2, t3]| {
        [tpm, t1, t2 && t3].iter().filter(|share| **share).count() >= 2
    });

    // With the escrow key nobody is asked.
    policies.set_up([false; 3]);
    let identity = format!("tpm:{}", policies.site.keys("host.tpm.pem"));
    policies.change(&identity, policies.site.keys("escrow.key"));
    policies.test(NO_TPM).unwrap();
}

#[test]
fn the_owner_asks_no_server_and_a_policy_goes_on_after_an_interruption() {
    let policies = Policies::new();
    let tested = policies.test(NO_TPM).unwrap();
    assert_eq!(tested["policy"], Value::Null, "without a policy there is nothing to tell");
    policies.ok(&["container", "policy", "cinder", "any(owner, escrow, t1)"]);
    let asked = policies.tangs[0].asked();
    assert_eq!(asked, 1, "for the advertisement");
    policies.set_up([false; 3]);
    assert_eq!(policies.test(NO_TPM).unwrap()["policy"]["of"][0], json!({"part": "owner", "said": "opened"}));
    // Sealing needs no server either.
    policies.ok(&["container", "rotate", "cinder"]);
    policies.ok(&["container", "policy", "cinder", "any(owner, escrow, t1)"]);
    assert_eq!(policies.tangs[0].asked(), asked);

    let misfits = [
        ("any(owner, t1)", "does not name escrow"),
        ("any(owner, escrow, t4)", "no [leaves.t4]"),
        ("any(owner, escrow", "at character 18"),
    ];
    let before = fs::read(policies.config()).unwrap();
    for (policy, why) in misfits {
        let refused = policies.run(&["container", "policy", "cinder", policy], NO_TPM);
        let told = String::from_utf8(refused.stderr).unwrap();
        assert!(!refused.status.success() && told.contains(why), "{told}");
    }
    // A server whose advertisement is not known yet and not to be had.
    let refused = policies.run(&["container", "policy", "cinder", "any(owner, escrow, t2)"], NO_TPM);
    assert!(!refused.status.success());
    assert_eq!(fs::read(policies.config()).unwrap(), before, "nothing was changed");
}

/// The owner's key is not here, so what opens the keys of before is the leaf that the new policy no longer names.
#[test]
fn a_policy_may_leave_the_leaf_by_which_the_keys_open_now() {
    let policies = Policies::new();
    policies.ok(&["container", "policy", "cinder", "any(owner, escrow, t1)"]);
    policies.change(&format!("identities = [\"{}\"]", policies.site.keys("cinder.owner.key")), "identities = []");
    for (policy, left) in [("any(escrow, t2)", 0), ("any(escrow, all(t1, t3))", 1)] {
        policies.ok(&["container", "policy", "cinder", policy]);
        policies.set_up(std::array::from_fn(|at| at != left));
        policies.test(NO_TPM).unwrap();
        policies.set_up([true; 3]);
    }
    policies.set_up([false, true, true]);
    let told = policies.test(NO_TPM).unwrap_err();
    assert!(told.contains("its policy is not met"), "{told}");
}

#[test]
fn one_server_on_the_volumes_host_is_told_as_shared() {
    let policies = Policies::new();
    policies.ok(&["container", "policy", "cinder", "any(owner, escrow, 2 of (t1, t2, t3))"]);
    let report = policies.run(&["separation", &policies.volume, "--json"], NO_TPM);
    let report: Value = serde_json::from_slice(&report.stdout).unwrap();
    assert_eq!(report["verdict"], "shared", "{report}");
    let told = report["evidence"][0].as_str().unwrap();
    assert!(told.contains("leaf t") && told.contains("this host"), "{told}");
}

#[test]
fn rotated_keys_of_a_server_open_until_they_are_deleted() {
    let policies = Policies::new();
    let [tang, ..] = &policies.tangs;
    policies.ok(&["container", "policy", "cinder", "any(escrow, t1)"]);
    policies.test(NO_TPM).unwrap();
    let kid = |policies: &Policies| {
        let key = policies.current_key("cinder");
        let entries = key["recipients"].as_array().unwrap();
        entries.iter().find(|entry| entry["header"]["tang"].is_object()).unwrap()["header"]["kid"].clone()
    };
    let old = kid(&policies);
    assert_eq!(policies.test(NO_TPM).unwrap()["outdated"], Value::Null);
    tang.rotate();
    assert_eq!(policies.test(NO_TPM).unwrap()["outdated"], json!(["t1"]));
    let told = policies.ok(&["test", &policies.volume, "--allow-shared"]);
    assert!(told.contains("note: the server of leaf 't1' has new keys") && told.contains("leaf pin t1"), "{told}");
    // The old signing key vouches for the new keys.
    policies.ok(&["leaf", "pin", "t1"]);
    policies.ok(&["container", "rotate", "cinder"]);
    assert_ne!(kid(&policies), old);
    assert_eq!(policies.test(NO_TPM).unwrap()["outdated"], Value::Null);
    tang.delete_old_keys();
    policies.test(NO_TPM).unwrap();

    // The pinned thumbprint is now of a key that is gone.
    let refused = policies.run(&["leaf", "pin", "t1"], NO_TPM);
    let told = String::from_utf8(refused.stderr).unwrap();
    assert!(!refused.status.success() && told.contains("has no such key"), "{told}");
}

#[test]
fn a_server_is_pinned_by_a_person_or_by_its_thumbprint() {
    let policies = Policies::new();
    let thumbprint = policies.tangs[1].thumbprint();
    policies.change(&format!("thumbprint = \"{thumbprint}\"\n"), "");
    let refused = policies.run(&["container", "policy", "cinder", "any(owner, escrow, t2)"], NO_TPM);
    let told = String::from_utf8(refused.stderr).unwrap();
    assert!(told.contains("has no thumbprint") && told.contains("leaf pin t2"), "{told}");
    let refused = policies.run(&["leaf", "pin", "t2"], NO_TPM);
    let told = String::from_utf8(refused.stderr).unwrap();
    assert!(!refused.status.success() && told.contains(&format!("--thumbprint {thumbprint}")), "{told}");
    let other = policies.tangs[0].thumbprint();
    let refused = policies.run(&["leaf", "pin", "t2", "--thumbprint", &other], NO_TPM);
    assert!(!refused.status.success());
    policies.ok(&["leaf", "pin", "t2", "--thumbprint", &thumbprint]);
    policies.ok(&["container", "policy", "cinder", "any(owner, escrow, t2)"]);
}

#[test]
fn a_threshold_that_nobody_can_meet_yet_is_left_out() {
    let policies = Policies::new();
    policies.ok(&["container", "policy", "cinder", "any(owner, escrow, all(hosts, t1))"]);
    let key = policies.current_key("cinder");
    assert_eq!(key["recipients"].as_array().unwrap().len(), 2, "no host is admitted");
    policies.ok(&["container", "policy", "cinder", "any(owner, escrow, t1)"]);
    assert_eq!(policies.current_key("cinder")["recipients"].as_array().unwrap().len(), 3);
}

#[test]
fn a_threshold_of_servers_is_opened_by_hand() {
    let policies = Policies::new();
    policies.ok(&["container", "policy", "cinder", "any(escrow, 2 of (t1, t2, t3))"]);
    policies.tangs[1].set_up(false);
    let reference =
        policies.site.json(&["test", &policies.volume, "--allow-shared"])["key"].as_str().unwrap().to_owned();
    let folder = policies.site.path("by-hand");
    fs::create_dir(&folder).unwrap();
    let key = policies.current_key("cinder");
    fs::write(folder.join("kek-2.jwe"), key.to_string()).unwrap();
    fs::copy(policies.site.sealed(&reference), folder.join("KEY-ID.jwe")).unwrap();
    page::run(&folder, &page::commands(include_str!("../../docs/recovery.md"), "## A container with a policy"), &[]);
    assert_eq!(fs::metadata(folder.join("volume.key")).unwrap().len(), 64);
    sh(&format!(
        "cryptsetup open --test-passphrase --volume-key-file {0}/volume.key --key-size 512 {1}",
        folder.display(),
        policies.volume
    ));
}
