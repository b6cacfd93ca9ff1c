//! OpenBao as a store and as a leaf: the real server, with Tang servers and a TPM beside it.

use std::{
    fs,
    net::TcpListener,
    path::PathBuf,
    time::{Duration, Instant},
};

use cryptattach::{
    base::key::{HostName, StoreName},
    config::Config,
    keys::{
        seal::OwnerRecipient,
        store::{self, KeyStore},
    },
    unlock::{
        container::{Container, Use},
        lockbox,
    },
};
use serde_json::Value;

use crate::{
    bao::{BaoServer, POLICY},
    enrol::stage::{Host as Joining, Stage, edit},
    page,
    site::{LoopDevice, Site, sh},
    store_suite,
    tangd::Tangd,
    tpm::Host,
};

const APPROLE: &str = "approle = { role_id = 'role_id', secret_id = 'secret_id' }";

/// A server, and a site with a store `s` in it.
struct Vault {
    bao: BaoServer,
    site: Site,
}

impl Vault {
    fn new() -> Self {
        Self::with(Site::bare(), "")
    }

    fn with(site: Site, more: &str) -> Self {
        let vault = Self { bao: BaoServer::start(), site };
        let keys = vault.site.keys("");
        sh(&format!(
            "cd {keys} && openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out owner.key 2>/dev/null && \
             openssl pkey -in owner.key -pubout -out owner.pem"
        ));
        for file in ["ca.pem", "role_id", "secret_id"] {
            fs::copy(vault.bao.path(file), vault.site.keys(file)).unwrap();
        }
        vault.configure(&format!(
            "[network]\nconnect_seconds = 1.0\ntry_seconds = 1.0\ntotal_seconds = 3.0\n\
             [servers.main]\nbao = ['{}']\nca = 'ca.pem'\n{APPROLE}\n\
             [leaves.vault]\ntransit = 'owner'\nserver = 'main'\n\
             [stores.s]\ntype = 'bao'\nserver = 'main'\npath = 'kv/cryptattach/keys'\nowner = 'owner.pem'\n\
             escrow = 'escrow.pem'\nidentities = ['owner.key']\n{more}",
            vault.bao.url
        ));
        vault
    }

    fn config(&self) -> PathBuf {
        self.site.keys("cryptattach.toml").into()
    }

    fn configure(&self, more: &str) {
        fs::write(self.config(), fs::read_to_string(self.config()).unwrap() + more).unwrap();
    }

    #[track_caller]
    fn change(&self, from: &str, to: &str) {
        let text = fs::read_to_string(self.config()).unwrap();
        assert!(text.contains(from), "{text}");
        fs::write(self.config(), text.replace(from, to)).unwrap();
    }

    fn store(&self) -> Box<dyn KeyStore> {
        let config = Config::read(&self.config()).unwrap();
        let name: StoreName = "s".parse().unwrap();
        let store = config.store(&name).unwrap();
        store::open(&*store::kind(store).unwrap(), &name, store, None).unwrap()
    }

    fn volume(&self) -> String {
        self.site.volume("volume", &["--store", "s", "--allow-shared"]).0
    }

    fn test(&self, volume: &str) -> Value {
        self.site.json(&["test", volume, "--allow-shared"])
    }

    /// The path of the only volume key.
    fn key_path(&self) -> String {
        let listed = self.bao.json(&["kv", "list", "-mount=kv", "cryptattach/keys"]);
        let names = listed.as_array().unwrap().iter().filter_map(Value::as_str);
        let ids: Vec<_> = names.filter(|name| !name.ends_with('/') && *name != "current").collect();
        let [id] = ids[..] else { panic!("{listed}") };
        format!("cryptattach/keys/{id}")
    }

    fn pin(&self) -> String {
        let told = self.site.fails(64, &["leaf", "pin", "vault"]);
        let thumbprint = told.lines().next_back().unwrap().rsplit(' ').next().unwrap().to_owned();
        self.site.ok(&["leaf", "pin", "vault", "--thumbprint", &thumbprint]);
        thumbprint
    }

    /// The policy of the store, and no private key on this host.
    fn set_policy(&self, policy: &str) {
        self.site.ok(&["container", "policy", "s", policy]);
        self.change("identities = ['owner.key']\n", "");
    }
}

#[test]
fn bao_conforms() {
    let vault = Vault::new();
    vault.site.ok(&["container", "create", "s"]);
    store_suite::conforms(vault.site.keys("").as_ref(), &*vault.store(), true);
    // Nothing is left of what was deleted, not even to be brought back.
    let left = vault.bao.json(&["kv", "list", "-mount=kv", "cryptattach/keys"]);
    assert_eq!(left, serde_json::json!(["current", "kek/"]));
    assert_eq!(vault.bao.json(&["kv", "list", "-mount=kv", "cryptattach/keys/kek"]), serde_json::json!(["1"]));
}

#[test]
fn a_backup_of_a_directory_is_restored_into_bao_and_back() {
    let vault = Vault::new();
    let site = &vault.site;
    let (bao, directory) =
        ("type = 'bao'\nserver = 'main'\npath = 'kv/cryptattach/keys'", "type = 'directory'\npath = 's'");
    vault.change(bao, directory);
    fs::create_dir(site.keys("s")).unwrap();
    site.ok(&["container", "create", "s"]);
    let volume = vault.volume();
    site.ok(&["container", "rotate", "s"]);
    let key = site.ok(&["key", "list", "--store", "s"]).split_whitespace().next().unwrap().to_owned();
    site.ok(&["container", "backup", "s", site.keys("first")]);

    vault.change(directory, bao);
    let done = site.json(&["container", "restore", "s", site.keys("first")]);
    assert_eq!((&done["written"], &done["unchanged"]), (&3.into(), &0.into()));
    fs::rename(site.keys("s"), site.keys("away")).unwrap();
    assert_eq!(vault.test(&volume)["policy"], Value::Null);
    assert_eq!(site.json(&["container", "restore", "s", site.keys("first")])["unchanged"], 3);
    assert_eq!(site.json(&["container", "rotate", "s"])["resealed"], 1);
    site.ok(&["container", "backup", "s", site.keys("second")]);

    // What bao has deleted comes back under its own id, if it is asked for.
    site.ok(&["key", "delete", &key, "--yes"]);
    site.fails(67, &["test", &volume, "--allow-shared"]);
    assert!(site.fails(68, &["container", "restore", "s", site.keys("second")]).contains("this host has deleted"));
    assert_eq!(site.json(&["container", "restore", "s", site.keys("second"), "--older"])["written"], 1);
    vault.test(&volume);

    vault.change(bao, directory);
    site.ok(&["container", "restore", "s", site.keys("second"), "--create"]);
    vault.test(&volume);
}

#[test]
fn a_store_in_bao_keeps_volumes_keys_and_no_former_version() {
    let vault = Vault::new();
    let (site, bao) = (&vault.site, &vault.bao);
    site.ok(&["container", "create", "s"]);
    site.fails(64, &["container", "create", "s", "--reader", "a:b"]);
    let volume = vault.volume();
    let tested = vault.test(&volume);
    assert_eq!(tested["policy"], Value::Null);
    assert_eq!(site.json(&["container", "rotate", "s"])["resealed"], 1);
    let shown = site.ok(&["container", "show", "s"]);
    assert!(shown.contains("path             kv/cryptattach/keys") && shown.contains("s/kek/2"), "{shown}");
    assert_eq!(site.ok(&["key", "list", "--store", "s"]).lines().count(), 1);
    let metadata = bao.json(&["kv", "metadata", "get", "-mount=kv", &vault.key_path()]);
    let destroyed = |version: &str| metadata["data"]["versions"][version]["destroyed"].clone();
    assert_eq!((destroyed("1"), destroyed("2")), (true.into(), false.into()), "{metadata}");
    // All of it is on this host, and so is the volume.
    let report: Value = serde_json::from_slice(&site.run(&["separation", &volume, "--json"]).stdout).unwrap();
    assert_eq!(report["verdict"], "shared");
    assert!(report["evidence"][0].as_str().unwrap().contains("sealed key on 127.0.0.1:"), "{report}");
    vault.test(&volume);
}

#[test]
fn without_the_right_to_destroy_a_rotation_tells_what_stays() {
    let vault = Vault::new();
    vault.site.ok(&["container", "create", "s"]);
    vault.volume();
    vault.bao.policy(&POLICY.replace("path \"kv/destroy", "path \"kv/other"), &[]);
    let output = vault.site.run(&["container", "rotate", "s"]);
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && told.contains("version 1 of kv/cryptattach/keys/"), "{told}");
    assert!(told.contains("allow 'update' on kv/destroy/cryptattach/keys/*"), "{told}");
}

#[test]
fn a_key_that_was_deleted_softly_is_told_with_how_to_bring_it_back() {
    let vault = Vault::new();
    vault.site.ok(&["container", "create", "s"]);
    let volume = vault.volume();
    let path = vault.key_path();
    vault.bao.bao(&["kv", "delete", "-mount=kv", &path]);
    let told = vault.site.fails(67, &["test", &volume, "--allow-shared"]);
    assert!(told.contains("was deleted, but its version 1 can be brought back"), "{told}");
    let step = told.split("'bao ").nth(1).unwrap().split('\'').next().unwrap();
    vault.bao.bao(&step.split(' ').collect::<Vec<_>>());
    vault.test(&volume);
    // Destroyed is for ever.
    vault.bao.bao(&["kv", "destroy", "-mount=kv", "-versions=1", &path]);
    let told = vault.site.fails(69, &["test", &volume, "--allow-shared"]);
    assert!(told.contains("has destroyed version 1, which is the last one"), "{told}");
}

#[test]
fn three_log_ins_and_a_namespace() {
    let vault = Vault::new();
    let (site, bao) = (&vault.site, &vault.bao);
    site.ok(&["container", "create", "s"]);
    let show = || site.ok(&["container", "show", "s"]);
    let was = show();
    fs::write(site.keys("token"), bao.token()).unwrap();
    vault.change(APPROLE, "token_file = 'token'");
    assert_eq!(show(), was);
    for file in ["server.pem", "server.key"] {
        fs::copy(bao.path(file), site.keys(file)).unwrap();
    }
    vault.change("token_file = 'token'", "certificate = 'server.pem'\nkey = 'server.key'");
    assert_eq!(show(), was);
    // A namespace has engines, policies and roles of its own.
    bao.bao(&["namespace", "create", "team"]);
    bao.set_up(&["-namespace=team"]);
    for file in ["role_id", "secret_id"] {
        fs::copy(bao.path(file), site.keys(file)).unwrap();
    }
    vault.change("certificate = 'server.pem'\nkey = 'server.key'", APPROLE);
    site.fails(77, &["container", "show", "s"]);
    vault.change("[servers.main]\n", "[servers.main]\nnamespace = 'team'\n");
    assert!(!show().contains("s/kek/1"), "another namespace has other keys");
    vault.change("state = \"site-state\"", "state = \"other-state\"");
    site.ok(&["container", "create", "s"]);
    assert!(show().contains("s/kek/1"));
    let there = bao.json(&["kv", "list", "-namespace=team", "-mount=kv", "cryptattach/keys"]);
    assert_eq!(there, serde_json::json!(["current", "kek/"]));
}

#[test]
fn a_wrapped_secret_id_tells_that_somebody_was_there_first() {
    let vault = Vault::new();
    let (site, bao) = (&vault.site, &vault.bao);
    vault.change("secret_id = 'secret_id'", "secret_id = 'secret_id', wrapped = true");
    fs::write(site.keys("secret_id"), bao.wrapped()).unwrap();
    site.ok(&["container", "create", "s"]);
    let told = site.fails(80, &["container", "show", "s"]);
    assert!(told.contains("has been used before") && told.contains("destroy the role's SecretIDs"), "{told}");
    // A thief has taken the SecretID out, and wrapped it again.
    let secret = bao.bao(&["write", "-f", "-field=secret_id", "auth/approle/role/compute-7/secret-id"]);
    let secret = format!("secret_id={secret}");
    let again = bao.bao(&["write", "-wrap-ttl=5m", "-field=wrapping_token", "sys/wrapping/wrap", &secret]);
    fs::write(site.keys("secret_id"), again).unwrap();
    let told = site.fails(80, &["container", "show", "s"]);
    assert!(told.contains("is not a SecretID: it was made by 'sys/wrapping/wrap'"), "{told}");
    // Store and leaf share one log-in, so one wrapping is enough for a run.
    fs::write(site.keys("secret_id"), bao.wrapped()).unwrap();
    let thumbprint = site.fails(64, &["leaf", "pin", "vault"]);
    let thumbprint = thumbprint.lines().next_back().unwrap().rsplit(' ').next().unwrap();
    fs::write(site.keys("secret_id"), bao.wrapped()).unwrap();
    site.ok(&["leaf", "pin", "vault", "--thumbprint", thumbprint]);
    fs::write(site.keys("secret_id"), bao.wrapped()).unwrap();
    site.ok(&["container", "policy", "s", "any(escrow, vault)"]);
}

#[test]
fn each_refusal_is_told_apart() {
    let vault = Vault::new();
    let (site, bao) = (&vault.site, &vault.bao);
    site.ok(&["container", "create", "s"]);
    let show = ["container", "show", "s"];
    bao.policy("path \"kv/data/other\" { capabilities = [\"read\"] }", &[]);
    let told = site.fails(77, &show);
    assert!(told.contains("does not let this host do that") && told.contains("policy"), "{told}");
    bao.policy(POLICY, &[]);
    let secret = fs::read(site.keys("secret_id")).unwrap();
    fs::write(site.keys("secret_id"), "11111111-2222-3333-4444-555555555555").unwrap();
    let told = site.fails(77, &show);
    assert!(told.contains("refuses the log-in: invalid role or secret ID"), "{told}");
    assert!(!told.contains("11111111-2222"), "no secret is told: {told}");
    fs::write(site.keys("secret_id"), secret).unwrap();
    bao.seal();
    let started = Instant::now();
    let told = site.fails(69, &show);
    assert!(told.contains("trying again") && told.contains("Vault is sealed") && told.contains("unseal"), "{told}");
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
    bao.unseal();
    site.ok(&show);
    vault.change("ca = 'ca.pem'\n", "");
    let told = site.fails(69, &show);
    assert!(told.contains("certificate verify failed") && told.contains("'ca' in [servers.NAME]"), "{told}");
}

#[test]
fn dead_and_silent_servers_hold_nobody_up() {
    let vault = Vault::new();
    let (site, bao) = (&vault.site, &vault.bao);
    site.ok(&["container", "create", "s"]);
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = format!("https://{}", silent.local_addr().unwrap());
    vault.change("try_seconds = 1.0\ntotal_seconds = 3.0", "try_seconds = 30.0\ntotal_seconds = 30.0");
    for first in ["https://127.0.0.1:1", &silent] {
        vault.change(&format!("bao = ['{}']", bao.url), &format!("bao = ['{first}', '{}']", bao.url));
        let started = Instant::now();
        site.ok(&["container", "show", "s"]);
        println!("beside {first}: {:?}", started.elapsed());
        assert!(started.elapsed() < Duration::from_secs(15), "{first}: {:?}", started.elapsed());
        vault.change(&format!("bao = ['{first}', '{}']", bao.url), &format!("bao = ['{}']", bao.url));
    }
}

#[test]
fn a_transit_key_is_a_leaf_beside_tang_and_the_tpm() {
    let host = Host::new();
    let site = host.site();
    let tcti = host.swtpm.tcti();
    let tang = Tangd::start();
    let tpm = format!(
        "[tpm]\ntcti = '{tcti}'\nidentity = 'host.tpm.pem'\n[leaves.tpm]\npublic = 'host.pem'\n[leaves.t1]\ntang = '{}'\n\
         thumbprint = '{}'\n",
        tang.url,
        tang.thumbprint()
    );
    let vault = Vault::with(site, &tpm);
    let site = &vault.site;
    site.ok(&["container", "create", "s"]);
    let volume = vault.volume();
    let told = site.fails(78, &["container", "policy", "s", "any(escrow, vault)"]);
    assert!(told.contains("the leaf 'vault' has no public key") && told.contains("leaf pin vault"), "{told}");
    vault.pin();
    site.ok(&["container", "policy", "s", "any(escrow, 2 of (vault, t1, tpm))"]);
    vault.change("identities = ['owner.key']", "identities = ['tpm:host.tpm.pem']");
    for subset in 0..8_u32 {
        let has = |bit: u32| subset >> bit & 1 == 1;
        tang.set_up(has(0));
        // Without the right to decrypt: the store itself is in the same server.
        let refused = POLICY.replace("path \"transit/decrypt", "path \"transit/other");
        vault.bao.policy(if has(1) { POLICY } else { &refused }, &[]);
        let tcti = if has(2) { &*tcti } else { "device:/dev/none" };
        let mut tested = site.command();
        tested.args(["test", &volume, "--allow-shared", "--json"]).env("CRYPTATTACH_TCTI", tcti);
        let tested = tested.output().unwrap();
        let opens = subset.count_ones() >= 2;
        let told = String::from_utf8_lossy(&tested.stderr);
        assert_eq!(tested.status.success(), opens, "{subset:03b}: {told}");
        if !opens {
            assert!(told.contains("its policy is not met"), "{subset:03b}: {told}");
            assert!(told.contains("vault ("), "{told}");
        }
    }
}

#[test]
fn versions_of_a_transit_key_and_a_key_that_was_replaced() {
    let vault = Vault::new();
    let (site, bao) = (&vault.site, &vault.bao);
    site.ok(&["container", "create", "s"]);
    let volume = vault.volume();
    let first = vault.pin();
    vault.set_policy("any(escrow, vault)");
    vault.test(&volume);
    bao.bao(&["write", "-f", "transit/keys/owner/rotate"]);
    vault.test(&volume);
    let told = site.fails(68, &["leaf", "pin", "vault", "--thumbprint", &first]);
    assert!(told.contains("expected"), "{told}");
    bao.bao(&["write", "transit/keys/owner/config", "min_decryption_version=2"]);
    let told = site.fails(68, &["test", &volume, "--allow-shared"]);
    assert!(told.contains("does not decrypt with versions of 'owner' before 2") && told.contains(&first), "{told}");
    bao.bao(&["write", "transit/keys/owner/config", "min_decryption_version=1"]);
    vault.test(&volume);
    // The new version is sealed to, and the former one is no longer needed then.
    let second = vault.pin();
    assert_ne!(first, second);
    vault.change("escrow = 'escrow.pem'\n", "escrow = 'escrow.pem'\nidentities = ['owner.key']\n");
    site.ok(&["container", "rotate", "s", "--keep-days", "0"]);
    vault.change("identities = ['owner.key']\n", "");
    bao.bao(&["write", "transit/keys/owner/config", "min_decryption_version=2", "deletion_allowed=true"]);
    vault.test(&volume);

    // Another key under the same name opens nothing, and nobody seals to it unasked.
    bao.bao(&["delete", "transit/keys/owner"]);
    let told = site.fails(68, &["test", &volume, "--allow-shared"]);
    assert!(told.contains("has no transit key 'owner'"), "{told}");
    bao.bao(&["write", "-f", "transit/keys/owner", "type=rsa-2048"]);
    let told = site.fails(68, &["test", &volume, "--allow-shared"]);
    assert!(told.contains("is not the one that the leaf 'vault' is sealed to") && told.contains(&second), "{told}");
    // A key without a public half.
    bao.bao(&["write", "transit/keys/owner/config", "deletion_allowed=true"]);
    bao.bao(&["delete", "transit/keys/owner"]);
    bao.bao(&["write", "-f", "transit/keys/owner"]);
    let told = site.fails(68, &["leaf", "pin", "vault"]);
    assert!(told.contains("has no public half"), "{told}");
}

#[test]
fn sealing_to_a_public_key_in_a_file_asks_nobody() {
    let vault = Vault::new();
    let (site, bao) = (&vault.site, &vault.bao);
    let keys = bao.json(&["read", "transit/keys/owner"]);
    fs::write(site.keys("vault.pem"), keys["data"]["keys"]["1"]["public_key"].as_str().unwrap()).unwrap();
    vault.change("transit = 'owner'\n", "transit = 'owner'\npublic = 'vault.pem'\n");
    vault.configure(&format!(
        "[stores.disk]\ntype = 'directory'\npath = '{}'\nowner = 'owner.pem'\nescrow = 'escrow.pem'\n\
         opens = 'any(escrow, vault)'\n",
        site.keys("disk")
    ));
    fs::create_dir(site.keys("disk")).unwrap();
    bao.seal();
    site.ok(&["container", "create", "disk"]);
    bao.unseal();
    let shown = site.ok(&["container", "show", "disk"]);
    assert!(shown.contains("vault: opened"), "{shown}");
    // A key that Transit could not decrypt for.
    fs::copy(site.keys("owner.pem"), site.keys("vault.pem")).unwrap();
    let told = site.fails(78, &["container", "policy", "disk", "any(escrow, vault)"]);
    assert!(told.contains("is not an RSA key"), "{told}");
}

#[test]
fn an_initramfs_has_what_logs_in_only_if_that_is_not_enough() {
    let vault = Vault::new();
    let site = &vault.site;
    site.ok(&["container", "create", "s"]);
    let volume = vault.volume();
    vault.pin();
    vault.set_policy("any(escrow, vault)");
    let device = LoopDevice::new(volume.as_ref(), "");
    vault.configure(&format!("[[boot.volumes]]\nname = '{}'\ndevice = '{}'\n", site.name("root"), device.path()));
    let parts = || {
        let output = site.run(&["boot", "--image-parts"]);
        (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let (has, told) = parts();
    for file in ["ca.pem", "role_id", "site-state/leaves/vault.json"] {
        assert!(has.contains(&format!("file {}", site.keys(file))), "{file}: {has}");
    }
    assert!(!has.contains("/secret_id"), "{has}");
    assert!(told.contains("secret_id is not put into the initramfs") && told.contains("in the network"), "{told}");
    assert!(site.run(&["boot", "--needs-network"]).status.success());
    vault.configure("[leaves.o]\npublic = 'owner.pem'\n");
    vault.change("any(escrow, vault)", "any(escrow, all(o, vault))");
    let (has, _) = parts();
    assert!(has.contains(&format!("file {}", site.keys("secret_id"))), "{has}");
}

const PAGE: &str = include_str!("../../docs/openbao.md");

#[test]
fn a_volume_is_opened_by_hand() {
    let vault = Vault::new();
    let site = &vault.site;
    site.ok(&["container", "create", "s"]);
    let volume = vault.volume();
    let thumbprint = vault.pin();
    vault.set_policy("any(escrow, vault)");
    let folder = site.path("by-hand");
    fs::create_dir(&folder).unwrap();
    let confirmed = vault.bao.bash(&folder, &page::commands(PAGE, "### Confirm the key"), vault.bao.root());
    assert_eq!(confirmed, thumbprint);
    let id = vault.key_path().rsplit('/').next().unwrap().to_owned();
    let commands = page::commands(PAGE, "## By hand").replace("KEY-ID", &id).replace("EPOCH", "2");
    vault.bao.bash(&folder, &commands, &vault.bao.token());
    sh(&format!(
        "cryptsetup open --test-passphrase --volume-key-file {}/volume.key --key-size 512 {volume}",
        folder.display()
    ));
}

#[test]
fn a_host_with_a_lockbox_attaches_while_the_server_is_sealed_and_until_it_is_removed() {
    let vault = Vault::new();
    let (site, bao) = (&vault.site, &vault.bao);
    site.ok(&["container", "create", "s"]);
    let volume = vault.volume();
    sh(&format!(
        "cd {} && openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out host.key 2>/dev/null && \
         openssl pkey -in host.key -pubout -out host.pem && chmod 600 host.key",
        site.keys("")
    ));
    let name = site.name("host");
    let text = fs::read_to_string(vault.config()).unwrap().replace("identities = ['owner.key']\n", "");
    let lockbox = format!("[lockbox]\nhost = '{name}'\nstore = 's'\nidentities = ['host.key']\npath = 'lockbox'\n");
    fs::write(site.keys("host.toml"), text.replace("site-state", "host-state") + &lockbox).unwrap();
    let host: HostName = name.parse().unwrap();
    let config = Config::read(&vault.config()).unwrap();
    let container = Container::open(&config, &"s".parse().unwrap(), None, Use::Keys).unwrap();
    let mut recipients = container.escrow().unwrap();
    recipients.push(Box::new(OwnerRecipient::read(site.keys("host.pem").as_ref()).unwrap()));
    let admission = lockbox::admit(container.host_keys().unwrap(), &host, &recipients).unwrap();
    container.admit_host(&host, &admission.recipient).unwrap();

    let on_host = |arguments: &[&'static str]| [&["--config", site.keys("host.toml")], arguments].concat();
    assert!(site.ok(&on_host(&["lockbox", "open"])).contains("is open"));
    let attach = || {
        let name = site.name("v");
        let arguments =
            [&on_host(&["attach", "--allow-shared", "--backend", "userspace"])[..], &[&volume, &name]].concat();
        let output = site.run(&arguments);
        site.run(&["detach", &name]);
        (output.status.success(), String::from_utf8(output.stderr).unwrap())
    };
    let (attached, told) = attach();
    assert!(attached, "{told}");
    bao.seal();
    let (attached, told) = attach();
    assert!(attached, "{told}");
    bao.unseal();
    // Whoever deletes the host's key softly has removed the host.
    bao.bao(&["kv", "delete", "-mount=kv", &format!("cryptattach/keys/host/{name}")]);
    let told = site.run(&on_host(&["lockbox", "open"]));
    let told = String::from_utf8(told.stderr).unwrap();
    println!("{told}");
    assert!(told.contains("not admitted") || told.contains("removed"), "{told}");
    let (attached, told) = attach();
    assert!(!attached, "{told}");
}

/// What a host may that attaches and joins, as docs/openbao.md has it.
const JOINS: &str = r#"
path "kv/data/cryptattach/keys/*"            { capabilities = ["read"] }
path "kv/data/cryptattach/keys/join/NAME.*"  { capabilities = ["create", "update", "read"] }
"#;

/// A host that logs in with a policy of its own.
fn joining<'s>(stage: &'s Stage, bao: &BaoServer, name: &str) -> Joining<'s> {
    let host = stage.host(name);
    let policy = host.file("host.hcl");
    fs::write(&policy, JOINS.replace("NAME", host.name())).unwrap();
    bao.bao(&["policy", "write", host.name(), &policy]);
    let own = format!("-policy={}", host.name());
    fs::write(host.file("token"), bao.bao(&["token", "create", &own, "-ttl=5m", "-field=token"])).unwrap();
    let text = fs::read_to_string(host.file("cryptattach.toml")).unwrap();
    let (before, rest) = text.split_once("[stores.cinder]").unwrap();
    let (_, after) = rest.split_once("[lockbox]").unwrap();
    let store = format!(
        "[servers.main]\nbao = ['{}']\nca = '../ca.pem'\ntoken_file = 'token'\n[stores.s]\ntype = 'bao'\nserver = 'main'\n\
         path = 'kv/cryptattach/keys'\nowner = '../owner.pem'\nescrow = '../escrow.pem'\n[lockbox]",
        bao.url
    );
    let text = format!("{before}{store}{after}").replace("store = 'cinder'", "store = 's'");
    fs::write(host.file("cryptattach.toml"), text).unwrap();
    host
}

#[test]
fn a_host_joins_through_the_server_and_its_neighbour_does_not_in_its_name() {
    let vault = Vault::new();
    vault.site.ok(&["container", "create", "s"]);
    let Vault { bao, site } = vault;
    fs::create_dir(site.keys("authority")).unwrap();
    let stage = Stage { site };
    let (host, neighbour) = (joining(&stage, &bao, "compute-7"), joining(&stage, &bao, "compute-8"));
    let join = ["host", "join", "--store", "s"];
    assert!(host.ok(&join).contains(&format!("host admit {}", host.name())));

    // The neighbour may leave letters of its own, and none in the host's name.
    neighbour.ok(&join);
    let posing = neighbour.file("posing.toml");
    let text = fs::read_to_string(neighbour.file("cryptattach.toml")).unwrap();
    let text = text.replace(neighbour.name(), host.name()).replace("'state'", "'posing'");
    fs::write(&posing, text.replace("host.tpm.pem", "posing.tpm.pem")).unwrap();
    let refused = neighbour.fails(77, &["--config", &posing, "host", "join", "--store", "s"]);
    assert!(refused.contains("does not let this host do that"), "{refused}");

    // Whoever rules the server changes letters.
    let letter = |host: &Joining<'_>, kind: &str| format!("cryptattach/keys/join/{}.{kind}", host.name());
    let read = |at: &str| bao.bao(&["kv", "get", "-mount=kv", "-field=jwe", at]);
    let write = |at: &str, file: &str| drop(bao.bao(&["kv", "put", "-mount=kv", at, &format!("jwe=@{file}")]));
    let admit = ["host", "admit", host.name(), "--ca", stage.authority(), "--pcr-values", &host.pcr_values()];
    let (asked, file) = (letter(&host, "request"), stage.keys("letter"));
    let request = read(&asked);
    fs::write(file, read(&letter(&neighbour, "request"))).unwrap();
    write(&asked, file);
    let refused = stage.fails(80, &admit);
    assert!(refused.contains(&format!("it is the request of '{}'", neighbour.name())), "{refused}");
    fs::write(file, &request).unwrap();
    edit(file.as_ref(), |request| request["statement"] = neighbours(&read(&letter(&neighbour, "request"))));
    write(&asked, file);
    stage.fails(80, &admit);
    assert!(stage.ok(&["host", "list"]).starts_with("no host is admitted"));
    assert!(host.ok(&join).contains("request of"), "the host puts it right");

    stage.ok(&admit);
    let answered = letter(&host, "answer");
    let answer = read(&answered);
    fs::write(neighbour.file("answer"), &answer).unwrap();
    assert!(neighbour.does_not_take(80).contains("this host is"));
    fs::write(file, &answer).unwrap();
    edit(file.as_ref(), |answer| answer["credential"] = "AAAA".into());
    write(&answered, file);
    assert!(host.fails(80, &join).contains("the TPM does not open the answer"));
    host.fails(68, &["lockbox", "open"]);
    fs::write(file, &answer).unwrap();
    write(&answered, file);
    assert!(host.ok(&join).contains("has joined"));
    host.ok(&["lockbox", "open"]);
    let listed = stage.json(&["host", "list"]);
    assert!(listed[0]["store_says"] == "there" && listed[0]["last_seen"].is_u64(), "{listed}");

    // A dead store holds the list up once, and not for each of its hosts.
    stage.ok(&["host", "admit", neighbour.name(), "--ca", stage.authority(), "--trust-pcr-values"]);
    bao.seal();
    let output = stage.run(&["host", "list", "-v"]);
    let (shown, said) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(output.status.success(), "{said}");
    assert_eq!(shown.matches("unknown (").count(), 2, "{shown}");
    let alone = stage.run(&["container", "show", "s", "-v"]);
    let tries = |said: &str| said.matches("trying again").count();
    let of_one = tries(&String::from_utf8(alone.stderr).unwrap());
    assert!(of_one > 0 && tries(&said) <= of_one + 1, "{of_one}: {said}");
    let rows = stage.json(&["host", "list"]);
    assert_eq!((rows.as_array().unwrap().len(), &rows[0]["last_seen"]), (2, &Value::Null), "{rows}");
}

fn neighbours(request: &str) -> Value {
    serde_json::from_str::<Value>(request).unwrap()["statement"].clone()
}
