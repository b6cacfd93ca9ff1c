//! Waiting for what the kernel announces: devices and routes. Nothing is polled: the announcement comes over netlink.

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    ifaddrs::getifaddrs,
    net::if_::InterfaceFlags,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket},
};

/// What is announced.
#[derive(Clone, Copy)]
pub enum Announced {
    /// Devices: by the kernel, and by udev once it has made their links.
    Devices,
    /// Addresses and routes.
    Routes,
}

/// A socket that hears of it.
pub struct Announcements(OwnedFd);

impl Announcements {
    /// From now on.
    pub fn of(announced: Announced) -> io::Result<Self> {
        let (protocol, groups) = match announced {
            // Group 1 is the kernel's, 2 udev's (systemd, sd-device: MONITOR_GROUP_KERNEL, MONITOR_GROUP_UDEV).
            Announced::Devices => (SockProtocol::NetlinkKObjectUEvent, 1 | 2),
            // linux/rtnetlink.h: links, addresses and routes, IPv4 and IPv6.
            Announced::Routes => (SockProtocol::NetlinkRoute, 0x1 | 0x10 | 0x40 | 0x100 | 0x400),
        };
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
        Ok(Self(socket))
    }

    /// Waits until something is announced; false if nothing is by then. What it says does not matter: the caller looks.
    fn next(&self, until: Instant) -> io::Result<bool> {
        let left = until.saturating_duration_since(Instant::now());
        // One millisecond more, so that a rounded-down wait does not spin at the end.
        let timeout = PollTimeout::try_from(left.as_millis().saturating_add(1)).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) => return Ok(false),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let mut message = [0; 8192];
        loop {
            match recv(self.0.as_raw_fd(), &mut message, MsgFlags::empty()) {
                // ENOBUFS: some were lost, so something has happened.
                Ok(_) | Err(Errno::EINTR | Errno::ENOBUFS) => {}
                Err(Errno::EAGAIN) => return Ok(true),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// Looks, and looks again whenever something is announced, until `look` finds what it looks for; `None` when time is over.
pub fn until<T>(announced: Announced, deadline: Instant, mut look: impl FnMut() -> Option<T>) -> io::Result<Option<T>> {
    // First the ear, then the look: nothing falls in between.
    let announcements = Announcements::of(announced)?;
    loop {
        if let Some(found) = look() {
            return Ok(Some(found));
        }
        if !announcements.next(deadline)? {
            return Ok(None);
        }
    }
}

/// Whether the kernel knows a way to this address. Nothing is sent.
pub fn has_route(to: SocketAddr) -> bool {
    let from: SocketAddr = if to.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0_u16; 8], 0).into() };
    UdpSocket::bind(from).and_then(|socket| socket.connect(to)).is_ok()
}

/// Whether an interface but the loopback has an address that reaches beyond its link.
pub fn has_address() -> bool {
    getifaddrs().into_iter().flatten().any(|interface| {
        let up =
            interface.flags.contains(InterfaceFlags::IFF_UP) && !interface.flags.contains(InterfaceFlags::IFF_LOOPBACK);
        let global = interface.address.is_some_and(|address| {
            let v6 = address.as_sockaddr_in6().map(|address| address.ip());
            // fe80::/10, RFC 4291 section 2.4
            address.as_sockaddr_in().is_some() || v6.is_some_and(|ip| ip.segments()[0] & 0xffc0 != 0xfe80)
        });
        up && global
    })
}

/// The waits that are under way, for people to see; each is for a volume, known by `V`.
pub struct Waits<V>(Mutex<Vec<Wait<V>>>);

struct Wait<V> {
    volume: V,
    what: String,
    since: Instant,
    /// How many of the announced ages were told.
    told: usize,
}

/// A wait is reported at these ages, in seconds: often enough to show progress, too rarely to bury a prompt.
const TOLD_AT: [u64; 6] = [1, 3, 10, 20, 40, 80];

impl<V> Default for Waits<V> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<V: Copy + PartialEq> Waits<V> {
    /// Runs a wait of a volume, seen by people.
    pub fn during<T>(&self, volume: V, what: &str, wait: impl FnOnce() -> T) -> T {
        {
            let mut waits = self.lock();
            // Several may wait for one thing: it is told once, from the first on.
            let first = waits.iter().find(|wait| wait.what == what);
            let (since, told) = first.map_or((Instant::now(), 0), |first| (first.since, first.told));
            waits.push(Wait { volume, what: what.to_owned(), since, told });
        }
        let outcome = wait();
        let mut waits = self.lock();
        if let Some(at) = waits.iter().position(|wait| wait.volume == volume && wait.what == what) {
            waits.remove(at);
        }
        outcome
    }

    /// What is to be told by `now` of the volumes that are still `pending`, each wait once: "a route to 10.0.2.100 (3 s)".
    pub fn due(&self, now: Instant, pending: impl Fn(V) -> bool) -> Vec<String> {
        let mut lines = Vec::new();
        for wait in self.lock().iter_mut() {
            let age = now.saturating_duration_since(wait.since).as_secs();
            let told = TOLD_AT.iter().filter(|at| **at <= age).count();
            if told > std::mem::replace(&mut wait.told, told) && pending(wait.volume) {
                let line = format!("{} ({age} s)", wait.what);
                if !lines.contains(&line) {
                    lines.push(line);
                }
            }
        }
        lines
    }

    /// What a volume waits for, if it does.
    pub fn of(&self, volume: V) -> Option<String> {
        self.lock().iter().find(|wait| wait.volume == volume).map(|wait| wait.what.clone())
    }

    /// When the next wait is to be told.
    pub fn next_due(&self) -> Option<Instant> {
        let next = |wait: &Wait<V>| TOLD_AT.get(wait.told).map(|at| wait.since + Duration::from_secs(*at));
        self.lock().iter().filter_map(next).min()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Wait<V>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, sync::mpsc, thread};

    use super::*;

    #[test]
    fn knows_the_way_to_this_host_and_none_to_nowhere() {
        assert!(has_route(([127, 0, 0, 1], 443).into()));
        // 240.0.0.0/4 is reserved (RFC 1112 section 4); Linux routes it like any other, so only an answer is expected.
        let _ = has_route(([255, 255, 255, 255], 443).into());
    }

    #[test]
    fn ends_when_time_is_over() {
        let found = until(Announced::Routes, Instant::now(), || None::<()>).unwrap();
        assert!(found.is_none());
    }

    #[test]
    fn tells_a_wait_while_it_lasts_and_only_for_who_still_waits() {
        let waits = Waits::default();
        let (told, end) = (mpsc::channel::<Vec<String>>(), mpsc::channel::<()>());
        thread::scope(|scope| {
            let running = &waits;
            scope.spawn(move || running.during(3, "a route", || end.1.recv()));
            let due = loop {
                if let Some(due) = waits.next_due() {
                    break due;
                }
                thread::yield_now();
            };
            let since = waits.lock()[0].since;
            assert!(due > since);
            let now = since + Duration::from_secs(4);
            assert!(waits.due(now, |volume| volume != 3).is_empty());
            waits.lock()[0].told = 0;
            told.0.send(waits.due(now, |volume| volume == 3)).unwrap();
            assert!(waits.due(now, |_| true).is_empty(), "told once");
            end.0.send(()).unwrap();
        });
        assert_eq!(told.1.recv().unwrap(), ["a route (4 s)"]);
        assert!(waits.next_due().is_none());
    }

    #[test]
    fn who_comes_second_to_a_wait_is_not_told_again() {
        let waits = Waits::default();
        waits.during(0, "a route", || {
            let since = waits.lock()[0].since;
            let after = |seconds| since + Duration::from_secs(seconds);
            assert_eq!(waits.due(after(2), |_| true), ["a route (2 s)"]);
            waits.during(1, "a route", || {
                assert!(waits.due(after(2), |_| true).is_empty());
                assert_eq!(waits.due(after(4), |_| true), ["a route (4 s)"]);
            });
        });
        assert!(waits.lock().is_empty());
    }

    #[test]
    fn looks_before_it_waits() {
        let path = tempfile::NamedTempFile::new().unwrap();
        let size = until(Announced::Devices, Instant::now(), || fs::metadata(path.path()).ok().map(|m| m.len()));
        assert_eq!(size.unwrap(), Some(0));
    }
}
