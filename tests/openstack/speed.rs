//! `bench-stores`: keys per second through real Swift, sealed to an owner directly or under a container key; next to
//! Barbican, which gives its keys out unsealed, as castellan's users do today. And the requests of one attach.

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
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

pub fn compare(cloud: &Cloud) {
    let site = Site::bare(cloud);
    sh(&format!(
        "cd {} && openssl genpkey -quiet -algorithm RSA -pkeyopt rsa_keygen_bits:3072 -out rsa.key && \
         openssl pkey -in rsa.key -pubout -out rsa.pem",
        site.path("").display()
    ));
    println!(
        "\nkeys per second through one Swift proxy and three object servers on this machine, token and container key warm"
    );
    println!("{:<46} {:>24}   {:>24}", "", "seal + create", "get + open");
    println!("{:<46} {}   {}", "parallel attaches", header(), header());
    let mut first_get = 0.0;
    for (number, (owner, under)) in
        [("rsa", false), ("rsa", true), ("owner", false), ("owner", true)].into_iter().enumerate()
    {
        let name = format!("bench{number}");
        let container = swift(&site, &name, owner, under);
        let ids = Mutex::new(Vec::new());
        let creates = PARALLEL.map(|threads| {
            rate(threads, || {
                ids.lock().unwrap().push(container.keep_object(object()).unwrap().key);
            })
        });
        let ids = ids.into_inner().unwrap();
        let gets = PARALLEL.map(|threads| get_rate(&container, &ids, threads));
        first_get = gets[0];
        let owner = if owner == "rsa" { "RSA-3072" } else { "P-256" };
        let under = if under { "under a container key" } else { "to the owner and the escrow" };
        row(&format!("Swift, {owner}, {under}"), &creates, &gets);
    }
    site.barbican("barbican", false);
    let config = Config::read(&site.path("cryptattach.toml")).unwrap();
    let barbican = Container::open(&config, &"barbican".parse().unwrap(), None, Use::Keys).unwrap();
    let create = || barbican.store().objects().unwrap().create(&object()).unwrap();
    let ids = Mutex::new(Vec::new());
    let creates = PARALLEL.map(|threads| rate(threads, || ids.lock().unwrap().push(create())));
    let ids = ids.into_inner().unwrap();
    let gets = PARALLEL.map(|threads| get_rate(&barbican, &ids, threads));
    row("Barbican, unsealed (the peer)", &creates, &gets);
    println!("ratio, one get + open: Swift under a container key / Barbican  {:.2}", first_get / gets[0]);
    requests(cloud);
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
    site.barbican("barbican", false);
    let config = Config::read(&site.path("cryptattach.toml")).unwrap();
    let barbican = Container::open(&config, &"barbican".parse().unwrap(), None, Use::Keys).unwrap();
    let ids = [(); 2].map(|()| barbican.store().objects().unwrap().create(&object()).unwrap());
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

fn header() -> String {
    PARALLEL.map(|threads| format!("{threads:>8}")).concat()
}

fn row(name: &str, creates: &[f64], gets: &[f64]) {
    let numbers = |rates: &[f64]| rates.iter().map(|rate| format!("{rate:>8.1}")).collect::<String>();
    println!("{name:<46} {}   {}", numbers(creates), numbers(gets));
}

fn swift(site: &Site<'_>, name: &str, owner: &str, container_key: bool) -> Container {
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
    if container_key {
        container.make_first_key().unwrap();
    }
    container
}

fn get_rate(container: &Container, ids: &[KeyId], threads: usize) -> f64 {
    let next = AtomicUsize::new(0);
    rate(threads, || {
        let id = &ids[next.fetch_add(1, Ordering::Relaxed) % ids.len()];
        assert!(opens(container, id));
    })
}

/// How often per second `work` is done by that many threads together.
fn rate(threads: usize, work: impl Fn() + Sync) -> f64 {
    work();
    let (start, done) = (Instant::now(), AtomicUsize::new(0));
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
    done.into_inner() as f64 / start.elapsed().as_secs_f64()
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
