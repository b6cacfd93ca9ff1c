//! Kill and revive: each subset of a TPM, three Tang servers, an OpenBao server, a PKCS#11 token and a person, for three
//! policies. It takes minutes: `cargo test --test host -- --ignored subsets --nocapture` prints the table.

use std::{
    fs,
    process::Output,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    bao::{BaoServer, POLICY},
    site::{Site, sh},
    softhsm::{MODULE, PIN, SoftHsm},
    tangd::Tangd,
    token_program,
    tpm::Host,
};

const NAMES: [&str; 7] = ["tpm", "t1", "t2", "t3", "vault", "hsm", "anna"];
/// Which of them is there.
type Subset = [bool; NAMES.len()];
/// A policy, and when it opens.
type Case = (&'static str, fn(Subset) -> bool);

fn count<const N: usize>(of: [bool; N]) -> usize {
    of.iter().filter(|is| **is).count()
}

const POLICIES: [Case; 3] = [
    ("any(escrow, all(tpm, 2 of (t1, t2, t3)), all(vault, any(hsm, anna)))", |[tpm, t1, t2, t3, vault, hsm, anna]| {
        tpm && count([t1, t2, t3]) >= 2 || vault && (hsm || anna)
    }),
    ("any(escrow, 3 of (tpm, vault, hsm, anna, any(t1, t2, t3)))", |[tpm, t1, t2, t3, vault, hsm, anna]| {
        count([tpm, vault, hsm, anna, t1 || t2 || t3]) >= 3
    }),
    (
        "any(escrow, all(any(tpm, anna), any(all(vault, hsm), 2 of (t1, t2, t3))))",
        |[tpm, t1, t2, t3, vault, hsm, anna]| (tpm || anna) && (vault && hsm || count([t1, t2, t3]) >= 2),
    ),
];

/// All of them, and a volume in a directory store.
struct Leaves {
    host: Host,
    tangs: [Tangd; 3],
    bao: BaoServer,
    hsm: SoftHsm,
    site: Site,
    volume: String,
}

impl Leaves {
    fn new() -> Self {
        token_program::build();
        let host = Host::new();
        let (site, tangs, bao) = (host.site(), std::array::from_fn(|_| Tangd::start()), BaoServer::start());
        let keys = site.keys("");
        sh(&format!(
            "cd {keys} && openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out owner.key 2>/dev/null && \
             openssl pkey -in owner.key -pubout -out owner.pem && echo 'the right words' >right && echo 'other words' >wrong"
        ));
        let hsm = SoftHsm::new(site.keys("hsm").into());
        hsm.token("owner");
        fs::write(site.keys("pin"), format!("{PIN}\n")).unwrap();
        for file in ["ca.pem", "role_id", "secret_id"] {
            fs::copy(bao.path(file), site.keys(file)).unwrap();
        }
        let tang = |(at, tang): (usize, &Tangd)| {
            format!("[leaves.t{at}]\ntang = '{}'\nthumbprint = '{}'\n", tang.url, tang.thumbprint())
        };
        let servers: String = (1..).zip(&tangs).map(tang).collect();
        let config = fs::read_to_string(site.keys("cryptattach.toml")).unwrap();
        // A token gets no PIN that less than a second is left for.
        let more = format!(
            "[network]\nconnect_seconds = 1.0\ntry_seconds = 1.0\ntotal_seconds = 3.0\n\
             [servers.main]\nbao = ['{}']\nca = 'ca.pem'\napprole = {{ role_id = 'role_id', secret_id = 'secret_id' }}\n\
             [tpm]\nidentity = 'host.tpm.pem'\n[leaves.tpm]\npublic = 'host.pem'\n{servers}\
             [leaves.vault]\ntransit = 'owner'\nserver = 'main'\n[leaves.anna]\npassphrase = 'anna.json'\n\
             [leaves.hsm]\npkcs11 = 'pkcs11:token=owner;object=rsa'\nmodule = '{MODULE}'\npin = 'pin'\n\
             environment = {{ SOFTHSM2_CONF = '{}' }}\n\
             [stores.s]\ntype = 'directory'\npath = 'sealed'\nowner = 'owner.pem'\nescrow = 'escrow.pem'\n\
             identities = ['owner.key']\n",
            bao.url,
            hsm.config().display()
        );
        fs::write(site.keys("cryptattach.toml"), config + &more).unwrap();
        site.ok(&["container", "create", "s"]);
        let (volume, _) = site.volume("volume", &["--store", "s", "--allow-shared"]);
        for leaf in ["vault", "hsm"] {
            let told = site.fails(64, &["leaf", "pin", leaf]);
            let thumbprint = told.trim_end().rsplit(' ').next().unwrap();
            site.ok(&["leaf", "pin", leaf, "--thumbprint", thumbprint]);
        }
        site.ok(&["leaf", "new", "anna", "--answer", site.keys("right")]);
        Self { host, tangs, bao, hsm, site, volume }
    }

    fn run(&self, arguments: &[&str], [tpm, .., anna]: Subset) -> Output {
        let tcti = if tpm { self.host.swtpm.tcti() } else { "device:/dev/none".to_owned() };
        let answer = self.site.keys(if anna { "right" } else { "wrong" });
        let mut command = self.site.command();
        command.args(arguments).args(["--answer", answer]).env("CRYPTATTACH_TCTI", tcti).output().unwrap()
    }

    /// From now on these are there, and the others are not; TPM and person are so in [`run`](Self::run).
    fn set_up(&self, [_, t1, t2, t3, vault, hsm, _]: Subset) {
        self.tangs.iter().zip([t1, t2, t3]).for_each(|(tang, up)| tang.set_up(up));
        self.hsm.plug(hsm);
        let refused = POLICY.replace("path \"transit/decrypt", "path \"transit/other");
        self.bao.policy(if vault { POLICY } else { &refused }, &[]);
    }
}

#[test]
#[ignore = "it takes minutes"]
fn each_subset_of_all_kinds_of_leaves_opens_exactly_when_the_policy_says_so() {
    let leaves = Leaves::new();
    for (number, (policy, opens)) in POLICIES.into_iter().enumerate() {
        leaves.set_up([true; NAMES.len()]);
        let changed = leaves.run(&["container", "policy", "s", policy], [true; NAMES.len()]);
        assert!(changed.status.success(), "{}", String::from_utf8_lossy(&changed.stderr));
        if number == 0 {
            let config = leaves.site.keys("cryptattach.toml");
            let text = fs::read_to_string(config).unwrap().replace("'owner.key'", "'tpm:host.tpm.pem'");
            fs::write(config, text).unwrap();
        }
        println!("\n{policy}\n{}   opens      s", NAMES.map(|name| format!("{name:>6}")).concat());
        let mut took: [Vec<Duration>; 2] = Default::default();
        for subset in 0..1_u32 << NAMES.len() {
            let has: Subset = std::array::from_fn(|bit| subset >> bit & 1 == 1);
            leaves.set_up(has);
            let started = Instant::now();
            let tested = leaves.run(&["test", &leaves.volume, "--allow-shared", "--json"], has);
            let (after, opened) = (started.elapsed(), tested.status.success());
            let marks = has.map(|has| format!("{:>6}", if has { "+" } else { "-" })).concat();
            println!("{marks}   {:5} {:6.2}", opened, after.as_secs_f64());
            let told = String::from_utf8_lossy(&tested.stderr);
            assert_eq!(opened, opens(has), "{policy}\n{marks}: {told}");
            if opened {
                let passed: Value = serde_json::from_slice(&tested.stdout).unwrap();
                assert_eq!(passed["policy"]["said"], "opened", "{passed}");
            } else {
                assert!(told.contains("its policy is not met") || told.contains("anna"), "{marks}: {told}");
            }
            took[usize::from(opened)].push(after);
        }
        for (what, mut took) in ["refused", "opened"].into_iter().zip(took) {
            took.sort_unstable();
            let (median, last) = (took[took.len() / 2].as_secs_f64(), took[took.len() - 1].as_secs_f64());
            println!("{what}: {} subsets, median {median:.2} s, at most {last:.2} s", took.len());
        }
    }
}
