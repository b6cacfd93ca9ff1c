//! The other ways to a key, which hosts ask in the same run.

use std::{fs, thread, time::Duration};

use nix::sys::resource::UsageWho;
use serde_json::json;

use super::{
    Outcome, Row, VOLUMES, all_used,
    front::{Admits, Front},
    hosts::cpu_seconds,
    origin,
    replay::{Request, Stream},
    replayed, servers,
};
use crate::{
    bao::{BaoServer, POLICY},
    cloud::{Cloud, Site},
    shell::sh,
    speed::keys_in_barbican,
    tangd::Tangd,
};

/// Each as its users ask: one thing after the other, over one connection if the client keeps one.
pub fn peers(cloud: &Cloud, hosts: usize, row: &mut Row<'_>) {
    let storm =
        |stream, hosts, used: &dyn Fn() -> Vec<(String, f64)>| Outcome::of(vec![replayed(stream, hosts)], used, || {});
    let bao = BaoServer::start();
    let of_bao = || {
        let own = std::process::id() as i32;
        let seconds =
            all_used().iter().filter(|used| used.parent == own && used.name == "bao").map(|used| used.seconds).sum();
        vec![("bao".to_owned(), seconds)]
    };
    row("peers", "OpenBao KV", hosts, &storm(kv(&bao), hosts, &of_bao));
    row("peers", "OpenBao Transit", hosts, &storm(transit(&bao), hosts, &of_bao));
    drop(bao);

    let some = hosts.div_ceil(5);
    let tang = Tangd::start();
    // A process for each connection: they, and what starts them, are this process and its children.
    let before = cpu_seconds(UsageWho::RUSAGE_SELF) + cpu_seconds(UsageWho::RUSAGE_CHILDREN);
    let mut outcome = storm(clevis(&tang), some, &Vec::new);
    thread::sleep(Duration::from_millis(200));
    let after = cpu_seconds(UsageWho::RUSAGE_SELF) + cpu_seconds(UsageWho::RUSAGE_CHILDREN);
    outcome.server_cpu = vec![("tangd".to_owned(), after - before - outcome.client_cpu)];
    row("peers", "tang, by clevis", some, &outcome);

    let used = || servers(cloud, &["keystone", "barbican"]);
    let requests = castellan(cloud);
    let mut once: Vec<Request> = Vec::new();
    requests.iter().for_each(|request| {
        if !once.contains(request) {
            once.push(request.clone());
        }
    });
    let stream = |requests| Stream { requests, authority: None, keep_alive: true };
    let (few, fewer) = (hosts.div_ceil(20), hosts.div_ceil(100));
    row("peers", "Barbican, each thing asked once", few, &storm(stream(once), few, &used));
    row("peers", "Barbican, by castellan", fewer, &storm(stream(requests), fewer, &used));
}

/// AppRole, as a host's agent logs in.
fn bao_login(bao: &BaoServer) -> Request {
    let [role, secret] = ["role_id", "secret_id"].map(|file| fs::read_to_string(bao.path(file)).unwrap());
    let body = json!({"role_id": role.trim(), "secret_id": secret.trim()}).to_string();
    let login = Request::new("POST", format!("{}/v1/auth/approle/login", bao.url), &body);
    Request { token_for: Some("x-vault-token".to_owned()), ..login }
}

fn bao_stream(bao: &BaoServer, of_volume: impl Fn(usize) -> Request) -> Stream {
    let requests = [bao_login(bao)].into_iter().chain((0..VOLUMES).map(of_volume)).collect();
    Stream { requests, authority: Some(bao.path("ca.pem")), keep_alive: true }
}

fn kv(bao: &BaoServer) -> Stream {
    bao_stream(bao, |volume| {
        let path = format!("cryptattach/keys/volume{volume}");
        bao.bao(&["kv", "put", "-mount=kv", &path, "passphrase=0123456789abcdef0123456789abcdef0123456789abcdef"]);
        Request::new("GET", format!("{}/v1/kv/data/{path}", bao.url), "")
    })
}

fn transit(bao: &BaoServer) -> Stream {
    bao.policy(&format!("{POLICY}\npath \"transit/decrypt/fleet\" {{ capabilities = [\"update\"] }}"), &[]);
    bao.bao(&["write", "-f", "transit/keys/fleet"]);
    bao_stream(bao, |_| {
        let encrypt = ["write", "-field=ciphertext", "transit/encrypt/fleet", "plaintext=MDEyMzQ1Njc4OWFiY2RlZg=="];
        let body = json!({"ciphertext": bao.bao(&encrypt)}).to_string();
        Request::new("POST", format!("{}/v1/transit/decrypt/fleet", bao.url), &body)
    })
}

/// What `clevis decrypt` asks, once for each volume, each time by a new curl.
fn clevis(tang: &Tangd) -> Stream {
    let front = Front::of(&tang.url, Admits::All);
    let config = json!({"url": front.url, "thp": tang.thumbprint()});
    sh(&format!(
        "printf secret | clevis encrypt tang '{config}' >/dev/shm/fleet-$$ && clevis decrypt </dev/shm/fleet-$$ && rm /dev/shm/fleet-$$"
    ));
    let recorded = front.recorded();
    let asked = recorded.iter().find(|request| request.method == "POST").unwrap();
    Stream { requests: vec![Request::of(asked, &tang.url); VOLUMES], authority: None, keep_alive: false }
}

/// What castellan asks for the keys of a host's volumes. They have no name, as those that Cinder has made: so it asks for what
/// Barbican knows of a key again and again.
fn castellan(cloud: &Cloud) -> Vec<Request> {
    let site = Site::bare(cloud);
    let keys = keys_in_barbican(&site, VOLUMES);
    let fronts = ["AUTH_URL", "BARBICAN_URL"].map(|server| Front::of(cloud.var(server), Admits::All));
    let script = include_str!("castellan_keys.py");
    site.write("castellan_keys.py", script);
    let keys: Vec<_> = keys.iter().map(ToString::to_string).collect();
    sh(&format!(
        "{}/bin/python -W ignore {} {}/v3 {} '{}' {}",
        cloud.var("VENV"),
        site.path("castellan_keys.py").display(),
        fronts[0].url,
        fronts[1].url,
        cloud.var("PASSWORD_CINDER"),
        keys.join(" ")
    ));
    let servers = ["AUTH_URL", "BARBICAN_URL"].map(|server| origin(cloud.var(server)));
    let mut recorded: Vec<_> = fronts
        .iter()
        .zip(&servers)
        .flat_map(|(front, server)| {
            front.recorded().into_iter().map(|request| Request::of(&request, server)).collect::<Vec<_>>()
        })
        .collect();
    // Log-in first: what is asked of Barbican before that needs no token.
    recorded.sort_by_key(|request| request.token_for.is_none());
    recorded
}
