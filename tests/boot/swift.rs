//! A server that speaks as much of Swift's API as fetching a key takes: TempAuth's log-in, GET and HEAD of objects out of a
//! directory, list_endpoints. The openstack layer proves the store against the real Swift; here only the way to it matters,
//! from inside an initramfs, and a real Swift would not fit behind QEMU's guestfwd.
//!
//! QEMU starts one process per connection, with the connection as standard input and output: nothing listens anywhere.

use std::{
    fs,
    io::{self, BufRead, BufReader, Read, Write},
    path::Path,
};

use openssl::ssl::{SslAcceptor, SslFiletype, SslMethod, SslStream};

/// Where the guest finds it; its certificate is for no other address.
pub const ADDRESS: &str = "10.0.2.100";
pub const USER: &str = "keys:boot";
pub const KEY: &str = "testing";
const TOKEN: &str = "AUTH_tk0123456789abcdef";

struct Connection;

impl Read for Connection {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        io::stdin().lock().read(bytes)
    }
}

impl Write for Connection {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut out = io::stdout().lock();
        let written = out.write(bytes)?;
        out.flush()?;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stdout().lock().flush()
    }
}

/// Serves one connection: `folder` has `server.pem`, `server.key` and the container `net`, a directory of sealed keys; and
/// perhaps `ill`, a line for each request that it does not answer as it should: "503", or "drop" for not at all.
pub fn serve(folder: &Path) {
    let mut acceptor = SslAcceptor::mozilla_intermediate_v5(SslMethod::tls_server()).unwrap();
    acceptor.set_certificate_chain_file(folder.join("server.pem")).unwrap();
    acceptor.set_private_key_file(folder.join("server.key"), SslFiletype::PEM).unwrap();
    let Ok(stream) = acceptor.build().accept(Connection) else { return };
    let mut stream = BufReader::new(stream);
    while answer(&mut stream, folder).unwrap_or(false) {}
}

fn answer(stream: &mut BufReader<SslStream<Connection>>, folder: &Path) -> io::Result<bool> {
    let mut request = String::new();
    if stream.read_line(&mut request)? == 0 {
        return Ok(false);
    }
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        stream.read_line(&mut line)?;
        match line.trim_end().split_once(": ") {
            Some((name, value)) => headers.push((name.to_ascii_lowercase(), value.to_owned())),
            None => break,
        }
    }
    let header = |name: &str| headers.iter().find(|(other, _)| other == name).map(|(_, value)| value.as_str());
    let mut words = request.split(' ');
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let (status, more, body) = match illness(folder)?.as_deref() {
        Some("drop") => return Ok(false),
        Some(_) => ("503 Service Unavailable", String::new(), Vec::new()),
        None => respond(path, &header, folder),
    };
    let length = body.len();
    let stream = stream.get_mut();
    write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {length}\r\n{more}X-Trans-Id: tx0\r\n\r\n")?;
    if method != "HEAD" {
        stream.write_all(&body)?;
    }
    stream.flush()?;
    Ok(true)
}

/// The next line of `ill`, if one is left.
fn illness(folder: &Path) -> io::Result<Option<String>> {
    let text = fs::read_to_string(folder.join("ill")).unwrap_or_default();
    let Some((next, rest)) = text.split_once('\n') else { return Ok(None) };
    fs::write(folder.join("ill"), rest)?;
    Ok(Some(next.to_owned()))
}

fn respond<'a>(
    path: &str,
    header: &impl Fn(&str) -> Option<&'a str>,
    folder: &Path,
) -> (&'static str, String, Vec<u8>) {
    let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
    match parts.as_slice() {
        ["auth", "v1.0"] if header("x-auth-user") == Some(USER) && header("x-auth-key") == Some(KEY) => {
            let headers = format!("X-Auth-Token: {TOKEN}\r\nX-Storage-Url: https://{ADDRESS}/v1/AUTH_keys\r\n");
            ("200 OK", headers, Vec::new())
        }
        // list_endpoints wants no token.
        ["endpoints", "v2", rest @ ..] => {
            let answer =
                format!("{{\"endpoints\":[\"http://{ADDRESS}:6200/sdb1/1/{}\"],\"headers\":{{}}}}", rest.join("/"));
            ("200 OK", String::new(), answer.into_bytes())
        }
        ["v1", "AUTH_keys", ..] if header("x-auth-token") != Some(TOKEN) => {
            ("401 Unauthorized", String::new(), Vec::new())
        }
        ["v1", "AUTH_keys", "net"] => ("204 No Content", String::new(), Vec::new()),
        ["v1", "AUTH_keys", "net", name @ ..] if !path.contains("..") => {
            let name = name.join("/").replace("%2F", "/");
            match fs::read(folder.join("net").join(format!("{name}.jwe"))) {
                Ok(bytes) => ("200 OK", "Content-Type: application/json\r\n".to_owned(), bytes),
                Err(_) => ("404 Not Found", String::new(), Vec::new()),
            }
        }
        ["v1", ..] => ("404 Not Found", String::new(), Vec::new()),
        _ => ("401 Unauthorized", String::new(), Vec::new()),
    }
}
