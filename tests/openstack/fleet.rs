//! `bench-fleet`: the power comes back, and all hosts of a site ask for the keys of their volumes at once. Ours through Keystone
//! and Swift; next to them, on the same machine, Barbican, OpenBao and tang as their users ask them.

mod count;
mod front;
mod hosts;
mod peers;
mod replay;
mod site;

use std::{
    env, fs,
    io::{BufRead, BufReader},
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

use nix::unistd::{SysconfVar, sysconf};
use serde_json::json;

use self::{
    count::Counts,
    front::{Admits, Front},
    hosts::{Line, Order, What, now},
    peers::peers,
    replay::{Request, Stream},
    site::Fleet,
};
use crate::cloud::Cloud;

pub use hosts::ordered;

const VOLUMES: usize = 12;
/// Hosts in threads are in so many processes: each has limits on files and mappings.
const HERDS: usize = 8;
/// Long enough for every host.
const PATIENT: f64 = 600.0;
/// What a boot waits unless the configuration says otherwise.
const STOCK: f64 = 90.0;
const SWIFT: &[&str] = &["keystone", "proxy", "object1", "object2", "object3", "container", "account"];

/// What became of one storm.
#[derive(Default)]
struct Outcome {
    /// Until all volumes of a host were open, sorted.
    seconds: Vec<f64>,
    /// Within so many seconds the hosts started.
    spread: f64,
    lost: Vec<String>,
    counts: Counts,
    client_cpu: f64,
    /// Of each server.
    server_cpu: Vec<(String, f64)>,
}

pub fn storm(cloud: &Cloud) {
    let hosts = number("FLEET_HOSTS", 1000);
    let fleet = Fleet::new(cloud, number("FLEET_PROCESSES", 12));
    let recorded = same_requests(&fleet);
    let mut rows = Vec::new();
    let mut row = |group: &str, name: &str, hosts: usize, outcome: &Outcome| {
        println!("{}", outcome.line(&format!("{group}: {name}"), hosts));
        rows.push(outcome.json(group, name, hosts));
        // Each time: a run that is ended has shown something.
        if let Ok(file) = env::var("FLEET_JSON") {
            fs::write(file, json!({"volumes": VOLUMES, "rows": rows}).to_string()).unwrap();
        }
    };
    let wanted = env::var("FLEET_ONLY").unwrap_or_default();
    let is_wanted = |group: &str| wanted.is_empty() || wanted.split(' ').any(|wanted| wanted == group);

    if is_wanted("costs") {
        costs(cloud, &recorded, &mut row);
    }
    if is_wanted("storm") {
        row("storm", "all at once", hosts, &fleet.storm(hosts, 0.0, PATIENT, || {}));
        row("storm", "all at once, boot.total_seconds = 90", hosts, &fleet.storm(hosts, 0.0, STOCK, || {}));
    }
    if is_wanted("spread") {
        row("storm", "spread over 120 s", hosts, &fleet.storm(hosts, 120.0, PATIENT, || {}));
    }
    if is_wanted("peers") {
        peers(cloud, hosts, &mut row);
    }
    let some = hosts.div_ceil(5);
    if is_wanted("admission") {
        let admits = Admits::AtOnce { most: 16, retry_after: 5 };
        let front = Front::of(cloud.var("SWIFT_URL"), admits);
        let outcome = fleet.behind(&front, "admission", some);
        let name = format!("16 at a time, the others Retry-After: 5 ({} refused)", front.refused());
        row("trouble", &name, some, &outcome);
    }
    if is_wanted("failures") {
        let outcome = fleet.storm(some, 0.0, PATIENT, || {
            thread::sleep(Duration::from_secs(3));
            cloud.stop("object1 keystone");
            thread::sleep(Duration::from_secs(10));
            cloud.repair();
        });
        row("trouble", "a storage node and Keystone die after 3 s, for 10 s", some, &outcome);
    }
    if is_wanted("cold") {
        cloud.stop("proxy keystone object1 object2 object3");
        let outcome = fleet.storm(some, 0.0, PATIENT, || {
            thread::sleep(Duration::from_secs(30));
            cloud.repair();
        });
        row("trouble", "the store boots last, after 30 s", some, &outcome);
    }
}

fn number(name: &str, otherwise: usize) -> usize {
    env::var(name).ok().map_or(otherwise, |text| text.parse().unwrap())
}

impl Fleet<'_> {
    /// So many hosts, of which the first are processes.
    fn storm(&self, hosts: usize, spread: f64, total: f64, meanwhile: impl FnOnce()) -> Outcome {
        let begin = now() + 3.0;
        let order = |what, hosts, first, every| Order { what, hosts, begin, spread, total, first, every };
        let processes = self.processes().min(hosts);
        let mut orders: Vec<Order> = (0..processes).map(|number| order(self.process(number), 1, number, 1)).collect();
        orders.extend((0..HERDS).map(|herd| {
            let left = hosts - processes;
            let share = left / HERDS + usize::from(herd < left % HERDS);
            order(self.threads("cryptattach.toml"), share, processes + herd, HERDS)
        }));
        Outcome::of(orders, &|| servers(self.cloud(), SWIFT), meanwhile)
    }

    /// Hosts in threads, which reach Swift through a front only.
    fn behind(&self, front: &Front, name: &str, hosts: usize) -> Outcome {
        let file = format!("{name}.toml");
        self.configure(&file, None, Some(&front.url));
        let begin = now() + 3.0;
        let what = self.threads(&file);
        let order = Order { what, hosts, begin, spread: 0.0, total: PATIENT, first: 0, every: 1 };
        Outcome::of(vec![order], &|| servers(self.cloud(), SWIFT), || {})
    }
}

/// What a host in a thread asks is what a real boot asks, which maps its volumes in userspace: a front writes both down.
fn same_requests(fleet: &Fleet<'_>) -> Vec<Request> {
    let fronts = ["AUTH_URL", "SWIFT_URL"].map(|server| Front::of(fleet.cloud().var(server), Admits::All));
    let servers = ["AUTH_URL", "SWIFT_URL"].map(|server| origin(fleet.cloud().var(server)));
    let recorded = || {
        let requests = |(front, server): (&Front, &String)| {
            front.recorded().iter().map(|request| Request::of(request, server)).collect::<Vec<_>>()
        };
        let mut requests: Vec<_> = fronts.iter().zip(&servers).flat_map(requests).collect();
        requests.sort();
        requests
    };
    fleet.configure("recorded.toml", Some(&fronts[0].url), Some(&fronts[1].url));
    fleet.boot("recorded.toml");
    let of_boot = recorded();
    let order = |what| Order { what, hosts: 1, begin: now(), spread: 0.0, total: STOCK, first: 0, every: 1 };
    let outcome = Outcome::of(vec![order(fleet.threads("recorded.toml"))], &Vec::new, || {});
    assert_eq!(outcome.lost, Vec::<String>::new());
    let of_thread = recorded();
    assert_eq!(of_boot, of_thread, "a host in a thread asks what a boot asks");
    println!("a real boot of {VOLUMES} volumes asks {} things; a host in a thread asks the same:", of_boot.len());
    of_boot.iter().for_each(|request| println!("  {} {}", request.method, request.url));
    of_boot
}

/// What one request of each kind costs the servers.
fn costs(cloud: &Cloud, recorded: &[Request], row: &mut Row<'_>) {
    const TIMES: usize = 200;
    let login = recorded.iter().find(|request| request.token_for.is_some()).unwrap();
    let mut cost = |name: &str, of: &str| {
        let request = recorded.iter().find(|request| request.url.contains(of)).unwrap();
        let requests = [vec![login.clone()], vec![request.clone(); TIMES]].concat();
        let stream = Stream { requests, authority: None, keep_alive: true };
        let mut outcome = Outcome::of(vec![replayed(stream, 1)], &|| servers(cloud, SWIFT), || {});
        // Each request is a row's host.
        outcome.client_cpu /= TIMES as f64;
        outcome.server_cpu.iter_mut().for_each(|(_, cpu)| *cpu /= TIMES as f64);
        row("costs", name, 1, &outcome);
    };
    cost("a log-in", "/auth/tokens");
    cost("a question where a key rests", "/endpoints/");
    cost("a key", "/v1/");
}

fn replayed(stream: Stream, hosts: usize) -> Order {
    let begin = now() + 1.0;
    Order { what: What::Replay(stream), hosts, begin, spread: 0.0, total: PATIENT, first: 0, every: 1 }
}

/// `http://HOST:PORT`
fn origin(url: &str) -> String {
    url.split('/').take(3).collect::<Vec<_>>().join("/")
}

/// Processor time of a process.
struct Used {
    name: String,
    parent: i32,
    session: i32,
    seconds: f64,
}

fn all_used() -> Vec<Used> {
    let per_second = sysconf(SysconfVar::CLK_TCK).unwrap().unwrap() as f64;
    let used = |entry: fs::DirEntry| {
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        // proc_pid_stat(5)
        let (name, rest) = stat.split_once('(')?.1.rsplit_once(") ")?;
        let fields: Vec<i64> = rest.split(' ').skip(1).filter_map(|field| field.parse().ok()).collect();
        let seconds = (fields[10] + fields[11]) as f64 / per_second;
        Some(Used { name: name.to_owned(), parent: fields[0] as i32, session: fields[2] as i32, seconds })
    };
    fs::read_dir("/proc").unwrap().flatten().filter_map(used).collect()
}

/// Of each of these servers of the cloud.
fn servers(cloud: &Cloud, names: &[&str]) -> Vec<(String, f64)> {
    let all = all_used();
    let of = |name: &&str| {
        let file = format!("{}/run/{name}.pid", cloud.var("STATE"));
        let pid = fs::read_to_string(file).unwrap_or_default();
        let pid: i32 = pid.split(' ').next().and_then(|pid| pid.parse().ok()).unwrap_or_default();
        let seconds = all.iter().filter(|used| used.session == pid).map(|used| used.seconds).sum();
        ((*name).to_owned(), seconds)
    };
    names.iter().map(of).collect()
}

impl Outcome {
    /// Carries orders out, and does something else meanwhile.
    fn of(orders: Vec<Order>, used: &dyn Fn() -> Vec<(String, f64)>, meanwhile: impl FnOnce()) -> Self {
        let outcome = Mutex::new(Self::default());
        let (begin, spread) = (orders[0].begin, orders[0].spread);
        let before = used();
        thread::scope(|scope| {
            let outcome = &outcome;
            for order in orders {
                scope.spawn(move || carry_out(order, outcome));
            }
            thread::sleep(Duration::from_secs_f64((begin - now()).max(0.0)));
            meanwhile();
        });
        let mut outcome = outcome.into_inner().unwrap();
        let after = used().into_iter().zip(before);
        outcome.server_cpu = after.map(|((name, after), (_, before))| (name, after - before)).collect();
        outcome.seconds.sort_by(f64::total_cmp);
        outcome.spread = spread;
        outcome
    }

    fn percentile(&self, percent: usize) -> f64 {
        let last = self.seconds.len().saturating_sub(1);
        self.seconds.get(last * percent / 100).copied().unwrap_or(f64::NAN)
    }

    fn within(&self, seconds: f64) -> usize {
        self.seconds.iter().filter(|took| **took <= seconds).count()
    }

    fn on_servers(&self) -> f64 {
        self.server_cpu.iter().map(|(_, seconds)| seconds.max(0.0)).sum()
    }

    /// Per host that had its keys.
    fn each(&self, of: f64) -> f64 {
        of / self.seconds.len().max(1) as f64
    }

    fn per_minute(&self) -> f64 {
        self.seconds.len() as f64 * 60.0 / (self.spread + self.percentile(100))
    }

    fn line(&self, name: &str, hosts: usize) -> String {
        let lost = self.lost.first().map(|why| format!(" (such as: {why})")).unwrap_or_default();
        let servers: Vec<_> =
            self.server_cpu.iter().map(|(name, cpu)| format!("{name} {:.0}", self.each(*cpu) * 1e3)).collect();
        format!(
            "{name}: {} of {hosts} hosts open, {:.0} a minute; p50 {:.1} s, p99 {:.1} s, last {:.1} s; within 60 s {}; \
             requests per host {:.1} ({:.1} later, {:.1} unanswered); CPU per host {:.0} ms on servers ({}), {:.0} ms on clients{lost}",
            self.seconds.len(),
            self.per_minute(),
            self.percentile(50),
            self.percentile(99),
            self.percentile(100),
            self.within(60.0),
            self.each(self.counts.sent() as f64),
            self.each(self.counts.later as f64),
            self.each(self.counts.unanswered as f64),
            self.each(self.on_servers()) * 1e3,
            servers.join(", "),
            self.each(self.client_cpu) * 1e3,
        )
    }

    fn json(&self, group: &str, name: &str, hosts: usize) -> serde_json::Value {
        let each = |of: f64| self.each(of);
        let servers: serde_json::Map<_, _> =
            self.server_cpu.iter().map(|(name, cpu)| (name.clone(), json!(each(*cpu)))).collect();
        json!({
            "group": group, "name": name, "hosts": hosts, "opened": self.seconds.len(), "per_minute": self.per_minute(),
            "p50": self.percentile(50), "p99": self.percentile(99), "last": self.percentile(100),
            "within_60": self.within(60.0), "requests": each(self.counts.sent() as f64), "later": each(self.counts.later as f64),
            "unanswered": each(self.counts.unanswered as f64), "server_cpu": each(self.on_servers()), "servers": servers,
            "client_cpu": each(self.client_cpu), "load": fs::read_to_string("/proc/loadavg").unwrap_or_default().trim(),
        })
    }
}

/// Starts a process and hears what it says.
fn carry_out(mut order: Order, outcome: &Mutex<Outcome>) {
    if let What::Process { .. } = order.what {
        let start = order.start(0);
        thread::sleep(start.saturating_duration_since(Instant::now()));
        (order.begin, order.spread) = (now(), 0.0);
    }
    let mut child = order.spawn();
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        let line: Line = serde_json::from_str(&line.unwrap()).unwrap();
        let mut outcome = outcome.lock().unwrap();
        match line {
            Line::Host(Ok(seconds)) => outcome.seconds.push(seconds),
            Line::Host(Err(why)) => outcome.lost.push(why),
            Line::Process { counts, cpu } => {
                outcome.counts += counts;
                outcome.client_cpu += cpu;
            }
        }
    }
    assert!(child.wait().unwrap().success());
}

type Row<'a> = dyn FnMut(&str, &str, usize, &Outcome) + 'a;
