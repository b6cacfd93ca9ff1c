//! `bench-stores`: keys per second through real Swift, sealed under a container key; next to Barbican, which gives its keys out
//! unsealed, as castellan's users do today. Whose processor time that is. And the requests of one attach.

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use nix::sys::{
    resource::{UsageWho, getrusage},
    time::TimeValLike,
};

use cryptattach::{
    base::key::{KeyId, ManagedObject, ObjectFacts, ObjectKind, SecretBytes},
    config::Config,
    keys::{
        seal::For,
        store::{self, Access},
    },
    unlock::container::{Container, Use, ViaLockbox},
};

use crate::{
    cloud::{Cloud, Site},
    keys::forget_tokens,
    opens::opens,
    shell::sh,
};

const PARALLEL: [usize; 3] = [1, 8, 32];
const TIME: Duration = Duration::from_secs(4);

/// Whose processor time a key takes.
const SERVERS: [&str; 8] = ["keystone", "account", "container", "object1", "object2", "object3", "proxy", "barbican"];

/// What was measured with so many threads.
struct Rate {
    per_second: f64,
    /// Milliseconds of processor time for one key: the servers', and this process's.
    servers: f64,
    ours: f64,
}

/// For each number of threads.
type Rates = [Rate; PARALLEL.len()];

pub fn compare(cloud: &Cloud) {
    let site = Site::bare(cloud);
    sh(&format!(
        "cd {} && openssl genpkey -quiet -algorithm RSA -pkeyopt rsa_keygen_bits:3072 -out rsa.key && \
         openssl pkey -in rsa.key -pubout -out rsa.pem",
        site.path("").display()
    ));
    let mut rows = Vec::new();
    for (name, owner, title) in
        [("rsa", "rsa", "Swift, sealed; owner RSA-3072"), ("ec", "owner", "Swift, sealed; owner P-256")]
    {
        let container = swift(&site, name, owner);
        let ids = Mutex::new(Vec::new());
        let create = || ids.lock().unwrap().push(container.keep_object(object()).unwrap().key);
        let creates = PARALLEL.map(|threads| rate(cloud, threads, create));
        rows.push((title, creates, get_rates(cloud, &container, &ids.lock().unwrap())));
    }
    site.barbican("barbican", false);
    let config = Config::read(&site.path("cryptattach.toml")).unwrap();
    let barbican = Container::open(&config, &"barbican".parse().unwrap(), None, Use::Keys).unwrap();
    let ids = Mutex::new(Vec::new());
    let create = || ids.lock().unwrap().push(barbican.store().objects().unwrap().create(&object()).unwrap());
    let creates = PARALLEL.map(|threads| rate(cloud, threads, create));
    rows.push(("Barbican, unsealed (the peer)", creates, get_rates(cloud, &barbican, &ids.lock().unwrap())));

    println!(
        "\nkeys per second: one Swift proxy and three object servers, or one Barbican; token and container key warm"
    );
    table(&rows, |rate| rate.per_second);
    println!("\nmilliseconds of the servers' processor time per key");
    table(&rows, |rate| rate.servers);
    println!("\nmilliseconds of this process's processor time per key");
    table(&rows, |rate| rate.ours);
    let [.., (_, our_creates, our_gets), (_, creates, gets)] = &rows[..] else { unreachable!() };
    let ratio = |ours: &Rates, theirs: &Rates| {
        let of = |(one, other): (&Rate, &Rate)| format!("{:>8.2}", one.per_second / other.per_second);
        ours.iter().zip(theirs).map(of).collect::<String>()
    };
    println!("{:<46} {}   {}", "Swift (P-256) / Barbican", ratio(our_creates, creates), ratio(our_gets, gets));
    requests(cloud);
}

fn table(rows: &[(&str, Rates, Rates)], cell: impl Fn(&Rate) -> f64) {
    let cells = |rates: &Rates| rates.iter().map(|rate| format!("{:>8.1}", cell(rate))).collect::<String>();
    let header = PARALLEL.map(|threads| format!("{threads:>8}")).concat();
    println!("{:<46} {:>24}   {:>24}", "", "seal + create", "get + open");
    println!("{:<46} {header}   {header}", "at once");
    for (title, creates, gets) in rows {
        println!("{title:<46} {}   {}", cells(creates), cells(gets));
    }
}

/// Requests of one attach, as `-v` shows them: from a new process, and where token and container key are warm.
fn requests(cloud: &Cloud) {
    println!("\n{:<46} {:>10} {:>10} {:>10}", "requests per attach", "Keystone", "keys", "rings");
    let row = |name: &str, log: &str| {
        let [keystone, keys, rings] = counted(log);
        println!("{name:<46} {keystone:>10} {keys:>10} {rings:>10}");
    };
    let attach = |site: &Site<'_>, arguments: &[&str]| {
        let name = site.name("bench");
        let output =
            site.run(&[&["-v", "attach", arguments[0], &name, "--backend", "userspace"], &arguments[1..]].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        site.ok(&["detach", &name]);
        String::from_utf8(output.stderr).unwrap()
    };
    let warm = |site: &Site<'_>, store: &str, ids: &[KeyId]| {
        let config = Config::read(&site.path("cryptattach.toml")).unwrap();
        let container = Arc::new(Container::open(&config, &store.parse().unwrap(), None, Use::Keys).unwrap());
        let work = |id: &KeyId| {
            ViaLockbox::look(container.clone(), *id, For::Any, &|_| Ok(())).places().unwrap();
            assert!(opens(&container, id));
        };
        work(&ids[0]);
        logged(|| work(&ids[1]))
    };

    let site = Site::new(cloud);
    let volumes = ["one", "two"].map(|name| site.file(name));
    let keys = volumes.each_ref().map(|volume| site.ok(&["format", volume]));
    let ids = keys.each_ref().map(|key| key[7..].parse().unwrap());
    forget_tokens();
    row("Swift, the first attach of a boot", &attach(&site, &[&volumes[0]]));
    row("Swift, a later one, of another volume", &attach(&site, &[&volumes[1]]));
    row("Swift, token and container key warm", &warm(&site, "cinder", &ids));

    let site = Site::bare(cloud);
    let ids = keys_in_barbican(&site, 2);
    let (volume, key) = (site.file("volume"), format!("barbican/{}", ids[0]));
    let format = "cryptsetup luksFormat -q --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --key-file -";
    let binary = env!("CARGO_BIN_EXE_cryptattach");
    sh(&format!(
        "{binary} --config {} key passphrase {key} | {format} {volume}",
        site.path("cryptattach.toml").display()
    ));
    forget_tokens();
    row("Barbican, unsealed, the first attach of a boot", &attach(&site, &[&volume, "--key", &key]));
    row("Barbican, unsealed, a later one", &attach(&site, &[&volume, "--key", &key]));
    row("Barbican, unsealed, token warm", &warm(&site, "barbican", &ids));
}

/// Unsealed, in a store `barbican` of that site.
pub fn keys_in_barbican(site: &Site<'_>, keys: usize) -> Vec<KeyId> {
    site.barbican("barbican", false);
    let config = Config::read(&site.path("cryptattach.toml")).unwrap();
    let barbican = Container::open(&config, &"barbican".parse().unwrap(), None, Use::Keys).unwrap();
    (0..keys).map(|_| barbican.store().objects().unwrap().create(&object()).unwrap()).collect()
}

/// How many requests `-v` tells of: to Keystone, for keys, and for rings.
pub fn counted(log: &str) -> [usize; 3] {
    let answered = || log.lines().filter(|line| line.contains(" http") && line.contains(" in "));
    let of = |what: &dyn Fn(&str) -> bool| answered().filter(|line| what(line)).count();
    let (keystone, rings) = (of(&|line| line.contains("/v3/")), of(&|line| line.contains("/endpoints/")));
    [keystone, answered().count() - keystone - rings, rings]
}

/// What is logged meanwhile.
pub fn logged(work: impl FnOnce()) -> String {
    let log = Arc::new(Mutex::new(Vec::new()));
    let writer = {
        let log = log.clone();
        move || Log(log.clone())
    };
    let subscriber =
        tracing_subscriber::fmt().with_max_level(tracing::Level::DEBUG).with_ansi(false).with_writer(writer).finish();
    tracing::subscriber::with_default(subscriber, work);
    let log = log.lock().unwrap();
    String::from_utf8(log.clone()).unwrap()
}

struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn swift(site: &Site<'_>, name: &str, owner: &str) -> Container {
    let container = site.container(name);
    site.configure(&format!(
        "[stores.{name}]\ntype = \"swift\"\ncontainer = \"{container}\"\ncloud = \"keys\"\nclouds = \"clouds.yaml\"\n\
         owner = \"{owner}.pem\"\nescrow = \"escrow.pem\"\nidentities = [\"{owner}.key\"]\n"
    ));
    let config = Config::read(&site.path("cryptattach.toml")).unwrap();
    let name = name.parse().unwrap();
    let store_config = config.store(&name).unwrap();
    let nobody = Access { readers: &[], writers: &[] };
    store::kind(store_config).unwrap().make(&name, store_config, &nobody).unwrap().unwrap();
    let container = Container::open(&config, &name, None, Use::Keys).unwrap();
    container.make_first_key().unwrap();
    container
}

fn get_rates(cloud: &Cloud, container: &Container, ids: &[KeyId]) -> Rates {
    let next = AtomicUsize::new(0);
    PARALLEL.map(|threads| {
        rate(cloud, threads, || {
            let id = &ids[next.fetch_add(1, Ordering::Relaxed) % ids.len()];
            assert!(opens(container, id));
        })
    })
}

/// How often per second `work` is done by that many threads together, and what it costs.
fn rate(cloud: &Cloud, threads: usize, work: impl Fn() + Sync) -> Rate {
    work();
    let used = || {
        let ours = getrusage(UsageWho::RUSAGE_SELF).unwrap();
        let ours = (ours.user_time() + ours.system_time()).num_microseconds() as f64 / 1000.0;
        (SERVERS.map(|server| cloud.processor_time(server)).iter().sum::<Duration>().as_secs_f64() * 1000.0, ours)
    };
    let (before, start, done) = (used(), Instant::now(), AtomicUsize::new(0));
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while start.elapsed() < TIME {
                    work();
                    done.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    let (seconds, after, done) = (start.elapsed().as_secs_f64(), used(), done.into_inner() as f64);
    Rate { per_second: done / seconds, servers: (after.0 - before.0) / done, ours: (after.1 - before.1) / done }
}

fn object() -> ManagedObject {
    let facts = ObjectFacts {
        kind: ObjectKind::Symmetric,
        algorithm: Some("AES".to_owned()),
        bit_length: Some(512),
        name: None,
        created: None,
        fresh: false,
        filling: None,
    };
    ManagedObject { facts, value: SecretBytes::random(64).unwrap() }
}
