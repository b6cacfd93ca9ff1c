//! A store that lies: a server that answers to Swift's requests with whatever a story wants.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use crate::{
    Story,
    cloud::{Cloud, Site},
    shell::sh,
    store_suite,
};

pub const STORIES: &[Story] = &[
    ("another_keys_object_is_refused", |cloud| lie(cloud, 76, "belongs to the key", another_key)),
    ("another_volumes_key_is_refused", another_volume),
    ("an_old_generation_is_refused", old_generation),
    ("garbage_is_refused", |cloud| lie(cloud, 76, "not a JWE", |_, _| answer(b"<html>hello</html>", ""))),
    ("a_truncated_key_is_refused", |cloud| lie(cloud, 76, "not a JWE", truncated)),
    ("a_changed_key_is_refused", |cloud| lie(cloud, 69, "MD5", changed)),
    ("a_key_changed_with_its_digest_is_refused", |cloud| lie(cloud, 68, "changed since it was sealed", forged)),
    ("ten_gibibytes_are_not_read", |cloud| {
        lie(cloud, 76, "longer than", |_, _| endless("Content-Length: 10737418240"))
    }),
    ("ten_gibibytes_in_chunks_are_not_read", |cloud| {
        lie(cloud, 76, "longer than", |_, _| endless("Transfer-Encoding: chunked"))
    }),
    ("a_drip_is_cut_off", |cloud| lie(cloud, 69, "did not answer within", |_, _| Lie::Drip)),
    ("half_an_answer_is_told", |cloud| {
        lie(cloud, 69, "broke during the answer", |_, _| {
            Lie::Bytes(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\nhalf".to_vec())
        })
    }),
    ("another_host_is_not_followed", |cloud| lie(cloud, 69, "redirects to another server", elsewhere)),
    ("an_absurd_retry_after_is_no_wait", |cloud| {
        lie(cloud, 69, "503", |_, _| {
            Lie::Bytes(b"HTTP/1.1 503 Busy\r\nRetry-After: 18446744073709551615\r\nContent-Length: 0\r\n\r\n".into())
        })
    }),
    ("retry_after_is_honoured", retry_after),
    ("a_last_try_that_is_cut_short_hides_no_reason", cut_short),
    ("a_silent_proxy_costs_a_head_start_only", silent_proxy),
    ("a_deletion_whose_answer_is_lost_is_told_as_one", lost_deletion),
];

/// What the server sends.
enum Lie {
    Bytes(Vec<u8>),
    /// A head, and then bytes for ever.
    Endless(String),
    /// One byte, and another one a while later.
    Drip,
    /// The connection stands, and nothing comes.
    Silence,
}

fn answer(body: &[u8], headers: &str) -> Lie {
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n{headers}\r\n", body.len());
    Lie::Bytes([head.as_bytes(), body].concat())
}

fn endless(header: &str) -> Lie {
    Lie::Endless(format!("HTTP/1.1 200 OK\r\n{header}\r\n\r\n"))
}

/// Below the ephemeral ports, as all servers of this layer.
fn listen() -> TcpListener {
    (15900..15990).find_map(|port| TcpListener::bind(("127.0.0.1", port)).ok()).unwrap()
}

/// Serves one lie to every request; the URL of its account.
fn serve(lie: impl Fn(&str) -> Lie + Send + Sync + 'static) -> String {
    let listener = listen();
    let url = format!("http://{}/v1/AUTH_x", listener.local_addr().unwrap());
    let lie = Arc::new(lie);
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let lie = lie.clone();
            thread::spawn(move || drop(tell(stream, &*lie)));
        }
    });
    url
}

fn tell(mut stream: TcpStream, lie: &dyn Fn(&str) -> Lie) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut request = String::new();
    reader.read_line(&mut request)?;
    let mut line = String::new();
    while reader.read_line(&mut line)? > 2 {
        line.clear();
    }
    match lie(&request) {
        Lie::Bytes(bytes) => stream.write_all(&bytes)?,
        Lie::Endless(head) => {
            stream.write_all(head.as_bytes())?;
            loop {
                stream.write_all(b"1000\r\n")?;
                stream.write_all(&[b'x'; 4096])?;
                stream.write_all(b"\r\n")?;
            }
        }
        Lie::Silence => thread::sleep(Duration::from_secs(60)),
        Lie::Drip => {
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")?;
            loop {
                stream.write_all(b"x")?;
                thread::sleep(Duration::from_millis(300));
            }
        }
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    reader.read_to_end(&mut Vec::new()).map(drop)
}

/// The site's store is now at that URL.
fn redirect(site: &Site<'_>, url: &str) {
    let text = std::fs::read_to_string(site.path("cryptattach.toml")).unwrap();
    let text = text.replace("type = \"swift\"", &format!("type = \"swift\"\nurls = [\"{url}\"]"));
    site.write("cryptattach.toml", &(text + "[network]\ntry_seconds = 2\ntotal_seconds = 4\n"));
}

fn lie(cloud: &Cloud, code: i32, says: &str, make: fn(&Site<'_>, &[u8]) -> Lie) {
    let site = Site::new(cloud);
    let volume = site.file("volume");
    let reference = site.ok(&["format", &volume]);
    let sealed = object(cloud, &site, &reference[7..]);
    // Keys of the container are asked for as well: those are told the truth.
    let kek = object(cloud, &site, "kek/1");
    let told = Arc::new(make(&site, &sealed));
    let url = serve(move |request| match &*told {
        _ if request.contains("/kek/1") => answer(&kek, ""),
        _ if request.contains("/endpoints/") => not_found(),
        Lie::Bytes(bytes) => Lie::Bytes(bytes.clone()),
        Lie::Endless(head) => Lie::Endless(head.clone()),
        Lie::Drip => Lie::Drip,
        Lie::Silence => Lie::Silence,
    });
    redirect(&site, &url);
    let (text, _) =
        site.fails_within(code, Duration::from_secs(10), &["attach", &volume, "x", "--backend", "userspace"]);
    assert!(text.contains(says), "{text}");
}

fn object(cloud: &Cloud, site: &Site<'_>, name: &str) -> Vec<u8> {
    let (token, url) = (cloud.token("cinder"), cloud.container_url(&site.container("cinder")));
    sh(&format!("curl -sf -H 'X-Auth-Token: {token}' {url}/{name}")).into_bytes()
}

fn another_key(site: &Site<'_>, _: &[u8]) -> Lie {
    answer(&store_suite::sealed(&site.path(""), "cinder", cryptattach::base::key::KeyId::random(), 1).to_json(), "")
}

fn truncated(_: &Site<'_>, object: &[u8]) -> Lie {
    answer(&object[..object.len() / 2], "")
}

fn changed(_: &Site<'_>, object: &[u8]) -> Lie {
    answer(object, "Etag: 00000000000000000000000000000000\r\n")
}

fn forged(_: &Site<'_>, object: &[u8]) -> Lie {
    let text = String::from_utf8(object.to_vec()).unwrap();
    let (before, after) = text.split_once("\"ciphertext\":\"").unwrap();
    let flipped = if after.starts_with('A') { "B" } else { "A" };
    answer(format!("{before}\"ciphertext\":\"{flipped}{}", &after[1..]).as_bytes(), "")
}

fn elsewhere(_: &Site<'_>, _: &[u8]) -> Lie {
    Lie::Bytes(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.2:15999/v1/x\r\nContent-Length: 0\r\n\r\n".to_vec())
}

/// The key of another volume, under the id that was asked for: its seal says whose it is.
fn another_volume(cloud: &Cloud) {
    let site = Site::new(cloud);
    let (one, two) = (site.file("one"), site.file("two"));
    let first = site.ok(&["format", &one]);
    site.ok(&["format", &two]);
    // The header of the second volume names the first one's key: whoever changes headers cannot make that fit.
    let text = site.fails(68, &["attach", &two, "x", "--backend", "userspace", "--key", &first]);
    assert!(text.contains("it belongs to volume"), "{text}");
}

/// The form from before a rotation, and the container key of then with it.
fn old_generation(cloud: &Cloud) {
    let site = Site::new(cloud);
    let volume = site.file("volume");
    let reference = site.ok(&["format", &volume]);
    let (key, kek) = (object(cloud, &site, &reference[7..]), object(cloud, &site, "kek/1"));
    site.ok(&["container", "rotate", "cinder"]);
    site.attaches(&volume);
    let url = serve(move |request| match () {
        () if request.contains("/kek/1") => answer(&kek, ""),
        () if request.contains("/endpoints/") => not_found(),
        () => answer(&key, ""),
    });
    redirect(&site, &url);
    let text = site.fails(68, &["attach", &volume, "x", "--backend", "userspace"]);
    assert!(text.contains("generation 1") && text.contains("has seen generation 2"), "{text}");
}

fn not_found() -> Lie {
    Lie::Bytes(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n".to_vec())
}

fn retry_after(cloud: &Cloud) {
    let site = Site::new(cloud);
    let volume = site.file("volume");
    site.ok(&["format", &volume]);
    let busy = || Lie::Bytes(b"HTTP/1.1 503 Busy\r\nRetry-After: 3\r\nContent-Length: 0\r\n\r\n".to_vec());
    let asked = Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = asked.clone();
    let url = serve(move |_| {
        seen.lock().unwrap().push(std::time::Instant::now());
        busy()
    });
    redirect(&site, &url);
    let (text, _) = site.fails_within(69, Duration::from_secs(10), &["key", "list"]);
    assert!(text.contains("503"), "{text}");
    let asked = asked.lock().unwrap();
    assert_eq!(asked.len(), 2, "in four seconds, three of them waited");
    assert!(asked[1] - asked[0] >= Duration::from_secs(3));
}

/// Busy at first, silent then: the end of the time comes in the middle of a try, and says less than the server did.
fn cut_short(cloud: &Cloud) {
    let site = Site::new(cloud);
    let asked = std::sync::atomic::AtomicUsize::new(0);
    let url = serve(move |_| match asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed) {
        0 => Lie::Bytes(b"HTTP/1.1 503 Busy\r\nRetry-After: 3\r\nContent-Length: 0\r\n\r\n".to_vec()),
        _ => Lie::Silence,
    });
    redirect(&site, &url);
    let (text, _) = site.fails_within(69, Duration::from_secs(10), &["key", "list"]);
    assert!(text.contains("(503") && !text.contains("did not answer"), "{text}");
}

/// Of two proxies the second is asked, too, when the first has not answered for a quarter of a second.
fn silent_proxy(cloud: &Cloud) {
    let site = Site::new(cloud);
    let volume = site.file("volume");
    site.ok(&["format", &volume]);
    let real = format!("{}/v1/AUTH_{}", cloud.var("SWIFT_URL"), cloud.var("PROJECT_ID_KEYS"));
    let silent = serve(|_| Lie::Silence).replace("AUTH_x", &format!("AUTH_{}", cloud.var("PROJECT_ID_KEYS")));
    let text = std::fs::read_to_string(site.path("cryptattach.toml")).unwrap();
    let urls = format!("type = \"swift\"\nurls = [\"{silent}\", \"{real}\"]");
    site.write("cryptattach.toml", &text.replace("type = \"swift\"", &urls));
    let (name, start) = (site.name("once"), std::time::Instant::now());
    let output = site.run(&["attach", &volume, &name, "--backend", "userspace", "-v"]);
    println!("attach with the first of two proxies silent: {:.1?}", start.elapsed());
    let text = String::from_utf8(output.stderr).unwrap();
    // No try of the silent one has come to its end: it is given up when the other has answered.
    let asked = format!("200 {real}/");
    assert!(output.status.success() && text.contains(&asked) && !text.contains("did not answer within"), "{text}");
    site.ok(&["detach", &name]);
}

fn lost_deletion(cloud: &Cloud) {
    let project = cloud.var("PROJECT_ID_KEYS");
    for (store, url) in [
        ("swift", format!("{}/v1/AUTH_{project}", cloud.var("SWIFT_URL"))),
        ("barbican", format!("{}/v1", cloud.var("BARBICAN_URL"))),
    ] {
        let site = Site::bare(cloud);
        match store {
            "swift" => site.swift("cinder", "keys", ""),
            _ => site.barbican("cinder", true),
        }
        site.ok(&["container", "create", "cinder"]);
        let volume = site.file("volume");
        let reference = site.ok(&["format", &volume]);
        let (authority, path) = url.trim_start_matches("http://").split_once('/').unwrap();
        let front = loses_first_deletion(authority);
        let text = std::fs::read_to_string(site.path("cryptattach.toml")).unwrap();
        let urls = format!("type = \"{store}\"\nurls = [\"http://{front}/{path}\"]");
        site.write("cryptattach.toml", &text.replace(&format!("type = \"{store}\""), &urls));
        let output = site.run(&["key", "delete", &reference, "--yes"]);
        let told = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success() && told.contains("broke during the answer"), "{told}");
        site.fails(67, &["key", "delete", &reference, "--yes"]);
    }
}

/// Passes everything on to a server and back, but for the answer to the first DELETE: that connection ends.
fn loses_first_deletion(server: &str) -> String {
    let (listener, server) = (listen(), server.to_owned());
    let front = listener.local_addr().unwrap().to_string();
    let was_lost = Arc::new(AtomicBool::new(false));
    thread::spawn(move || {
        for mut client in listener.incoming().flatten() {
            let (mut to_server, loses) = (TcpStream::connect(&server).unwrap(), Arc::new(AtomicBool::new(false)));
            let (mut from_client, mut from_server) = (client.try_clone().unwrap(), to_server.try_clone().unwrap());
            let (was_lost, is_lost) = (was_lost.clone(), loses.clone());
            thread::spawn(move || {
                pass(&mut from_client, &mut to_server, |request| {
                    if request.starts_with(b"DELETE ") && !was_lost.swap(true, Relaxed) {
                        loses.store(true, Relaxed);
                    }
                    true
                })
            });
            thread::spawn(move || pass(&mut from_server, &mut client, |_| !is_lost.load(Relaxed)));
        }
    });
    front
}

fn pass(from: &mut TcpStream, to: &mut TcpStream, may: impl Fn(&[u8]) -> bool) {
    let mut part = [0; 65536];
    while let Ok(read @ 1..) = from.read(&mut part)
        && may(&part[..read])
        && to.write_all(&part[..read]).is_ok()
    {}
    let _ = to.shutdown(std::net::Shutdown::Both);
}
