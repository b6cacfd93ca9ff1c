//! A server for unit tests: it answers each request as a test says.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpListener,
    thread,
};

use crate::config::CloudConfig;

/// The cloud whose entry in clouds.yaml this is, as long as the folder is there.
pub fn cloud(entry: &str) -> (CloudConfig, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let clouds = folder.path().join("clouds.yaml");
    fs::write(&clouds, format!("clouds: {{c: {entry}}}")).unwrap();
    (CloudConfig { cloud: Some("c".to_owned()), clouds: Some(clouds.into()), secret: None }, folder)
}

/// Serves until the tests end; its URL. `answer` is given the head of a request, in lower case, an empty line and the body, and
/// says status and headers (each line ends in CRLF) and body.
pub fn serve(answer: impl Fn(&str) -> (u16, String, String) + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut reader = BufReader::new(&stream);
            let head = reader.by_ref().lines().map_while(Result::ok).take_while(|line| !line.is_empty());
            let head = head.collect::<Vec<_>>().join("\n").to_lowercase();
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
            let mut body = String::new();
            let _ = reader.take(length.unwrap_or(0)).read_to_string(&mut body);
            let (status, headers, body) = answer(&format!("{head}\n\n{body}"));
            let length = body.len();
            let _ = write!(
                &stream,
                "HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n{body}"
            );
        }
    });
    url
}
