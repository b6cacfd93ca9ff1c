//! A server in front of another: it writes down what passes, or admits so many requests at a time and asks the others to come
//! back later.

use std::{
    io::{BufRead, BufReader, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    thread,
};

/// A request, as it was sent.
#[derive(Clone, Debug)]
pub struct Recorded {
    pub method: String,
    pub path: String,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

/// Serves as long as the process lives.
pub struct Front {
    pub url: String,
    recorded: Arc<Mutex<Vec<Recorded>>>,
    refused: Arc<AtomicUsize>,
}

/// What it admits.
#[derive(Clone, Copy)]
pub enum Admits {
    /// Everything, and it remembers that.
    All,
    /// So many requests at a time. The others are told to come back after so many seconds.
    AtOnce { most: usize, retry_after: usize },
}

struct Shared {
    to: SocketAddr,
    admits: Admits,
    inside: AtomicUsize,
    recorded: Arc<Mutex<Vec<Recorded>>>,
    refused: Arc<AtomicUsize>,
}

/// Swift's ratelimit middleware, most of the others, and a proxy whose servers are all busy.
const SLOW_DOWN: [&str; 3] = ["498 Rate Limited", "429 Too Many Requests", "503 Service Unavailable"];

impl Front {
    /// In front of the server of this URL.
    pub fn of(url: &str, admits: Admits) -> Self {
        let to = url.split('/').nth(2).unwrap().parse().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (recorded, refused) = (Arc::default(), Arc::default());
        let front = Self { url, recorded: Arc::clone(&recorded), refused: Arc::clone(&refused) };
        let shared = Arc::new(Shared { to, admits, inside: AtomicUsize::new(0), recorded, refused });
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let shared = shared.clone();
                let thread = thread::Builder::new().stack_size(128 << 10);
                thread.spawn(move || drop(shared.serve(&client))).unwrap();
            }
        });
        front
    }

    /// What has passed since this was asked last.
    pub fn recorded(&self) -> Vec<Recorded> {
        std::mem::take(&mut self.recorded.lock().unwrap())
    }

    /// How many requests were told to come back later.
    pub fn refused(&self) -> usize {
        self.refused.load(SeqCst)
    }
}

impl Shared {
    /// Until the client closes the connection.
    fn serve(&self, client: &TcpStream) -> std::io::Result<()> {
        client.set_nodelay(true)?;
        let mut from_client = BufReader::new(client);
        let mut server: Option<BufReader<TcpStream>> = None;
        while let Some((head, body)) = message(&mut from_client, false)? {
            let Admits::AtOnce { most, retry_after } = self.admits else {
                self.recorded.lock().unwrap().push(Recorded::of(&head, &body));
                self.pass(client, &mut server, &head, &body)?;
                continue;
            };
            let is_admitted = self.inside.fetch_add(1, SeqCst) < most;
            let passed = if is_admitted {
                self.pass(client, &mut server, &head, &body)
            } else {
                let status = SLOW_DOWN[self.refused.fetch_add(1, SeqCst) % SLOW_DOWN.len()];
                let answer = format!("HTTP/1.1 {status}\r\nRetry-After: {retry_after}\r\nContent-Length: 0\r\n\r\n");
                (&mut &*client).write_all(answer.as_bytes())
            };
            self.inside.fetch_sub(1, SeqCst);
            passed?;
        }
        Ok(())
    }

    fn pass(
        &self,
        mut client: &TcpStream,
        server: &mut Option<BufReader<TcpStream>>,
        head: &str,
        body: &[u8],
    ) -> std::io::Result<()> {
        // The server may have closed a connection that was idle.
        for is_last in [false, true] {
            let connection = match server.take() {
                Some(connection) => connection,
                None => BufReader::new(TcpStream::connect(self.to)?),
            };
            let connection = server.insert(connection);
            let sent = connection.get_mut().write_all(&[head.as_bytes(), body].concat());
            match sent.and_then(|()| message(connection, head.starts_with("HEAD "))) {
                Ok(Some((head, body))) => return client.write_all(&[head.as_bytes(), &body].concat()),
                _ if !is_last => *server = None,
                _ => break,
            }
        }
        Err(std::io::ErrorKind::BrokenPipe.into())
    }
}

/// A head, with the empty line at its end, and a body; `None` at the connection's end.
fn message(from: &mut impl BufRead, without_body: bool) -> std::io::Result<Option<(String, Vec<u8>)>> {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if from.read_line(&mut head)? == 0 {
            return Ok(None);
        }
    }
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse().ok())?
    });
    let mut body = vec![0; if without_body { 0 } else { length.unwrap_or(0) }];
    from.read_exact(&mut body)?;
    Ok(Some((head, body)))
}

impl Recorded {
    fn of(head: &str, body: &[u8]) -> Self {
        let mut lines = head.lines();
        let mut words = lines.next().unwrap_or_default().split(' ').map(str::to_owned);
        let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let header =
            |line: &str| line.split_once(':').map(|(name, value)| (name.to_lowercase(), value.trim().to_owned()));
        Self { method, path, headers: lines.filter_map(header).collect(), body: body.to_vec() }
    }
}
