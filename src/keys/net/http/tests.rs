use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::*;
use crate::keys::net::testing::serve;

#[test]
fn a_server_that_asks_to_slow_down_is_waited_for() {
    for status in [429, 498] {
        let asked = AtomicU32::new(0);
        let url = serve(move |_| match asked.fetch_add(1, Ordering::Relaxed) {
            0 => (status, "Retry-After: 0\r\n".to_owned(), "Slow down".to_owned()),
            _ => (200, String::new(), "done".to_owned()),
        });
        let http = Http::new(&Network::default(), None, None).unwrap();
        let answer = http.send(&Request::new(Method::GET, vec![super::url(&url).unwrap()], 100)).unwrap();
        assert_eq!((answer.status.as_u16(), answer.body.expose()), (200, b"done".as_slice()), "{status}");
    }
}

#[test]
fn a_server_asks_to_wait_for_seconds_or_until_a_date_of_its_clock() {
    let asks = |headers: &[(&'static str, &str)]| {
        let headers = headers.iter().map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap()));
        let (url, status) = (url("https://keys").unwrap(), StatusCode::SERVICE_UNAVAILABLE);
        let body = SecretBytes::zeroed(1).unwrap();
        HttpAnswer { url, status, headers: headers.collect(), body, repeated: false }.retry_after()
    };
    let date = ("date", "Thu, 01 Jan 1970 00:00:10 GMT");
    assert_eq!(asks(&[("retry-after", " 7 ")]), Some(Duration::from_secs(7)));
    for later in ["Thu, 01 Jan 1970 00:00:15 GMT", "Thursday, 01-Jan-70 00:00:15 GMT", "Thu Jan  1 00:00:15 1970"] {
        assert_eq!(asks(&[date, ("retry-after", later)]), Some(Duration::from_secs(5)), "{later}");
    }
    assert_eq!(asks(&[("retry-after", "Thu, 01 Jan 1970 00:00:15 GMT")]), Some(Duration::ZERO), "long ago");
    assert_eq!(asks(&[("retry-after", "soon")]), None);
    assert_eq!(asks(&[date]), None);
}

#[test]
fn hosts_that_are_asked_to_come_back_after_the_same_time_do_not_come_back_together() {
    let [asked, pause, left] = [4.0, 0.1, 60.0].map(Duration::from_secs_f64);
    let waits: Vec<_> = (0..64).map(|_| wait(asked, pause, left).unwrap()).collect();
    let (first, last) = (waits.iter().min().unwrap(), waits.iter().max().unwrap());
    assert!(*first >= asked && *last <= asked * 3 / 2, "{first:?} {last:?}");
    assert!(*last - *first > asked / 10, "{first:?} {last:?}");
    assert!(wait(Duration::ZERO, pause, left).unwrap() >= pause / 2);
    assert_eq!(wait(asked, pause, asked), None, "too late");
    assert!(wait(asked, pause, asked + pause).unwrap() <= asked + pause);
}

#[test]
fn a_server_that_is_too_slow_for_a_try_gets_more_time_for_the_next() {
    // One after the other, also those that nobody waits for any more.
    let url = serve(|_| {
        std::thread::sleep(Duration::from_millis(150));
        (200, String::new(), "done".to_owned())
    });
    let network = Network { try_seconds: 0.1, ..Network::default() };
    let http = Http::new(&network, None, None).unwrap();
    let request = Request::new(Method::GET, vec![super::url(&url).unwrap()], 100);
    assert_eq!(http.send(&request).unwrap().body.expose(), b"done");
    let hasty = Request { repeat: Repeat::UnlessSlow, ..request };
    assert_eq!(http.send(&hasty).unwrap().body.expose(), b"done", "the other requests know of it");
}

#[test]
fn an_answer_says_whether_a_server_may_have_done_it_before() {
    let [asked_twice, asked_once] = [true, false].map(|fails_first| {
        let fails = AtomicBool::new(fails_first);
        serve(move |_| {
            if fails.swap(false, Relaxed) {
                (503, String::new(), String::new())
            } else {
                (404, String::new(), String::new())
            }
        })
    });
    let nobody = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        format!("http://{}", listener.local_addr().unwrap())
    };
    let http = Http::new(&Network::default(), None, None).unwrap();
    let repeated = |urls: &[&String]| {
        let urls = urls.iter().map(|text| super::url(text).unwrap()).collect();
        http.send(&Request::new(Method::DELETE, urls, 100)).unwrap().repeated
    };
    assert!(repeated(&[&asked_twice]));
    assert!(!repeated(&[&asked_once]));
    assert!(!repeated(&[&nobody, &asked_once]), "nobody was asked before");
}

#[test]
fn a_try_that_took_too_long_is_heard_beside_the_next_ones() {
    let asked = std::sync::Arc::new(AtomicU32::new(0));
    let seen = asked.clone();
    // One after the other: what comes after the first is not even read as long as that is under way.
    let url = serve(move |_| match seen.fetch_add(1, Ordering::Relaxed) {
        0 => {
            std::thread::sleep(Duration::from_millis(500));
            (404, String::new(), "the first".to_owned())
        }
        _ => loop {
            std::thread::park();
        },
    });
    let network = Network { try_seconds: 0.1, total_seconds: 60.0, ..Network::default() };
    let http = Http::new(&network, None, None).unwrap();
    let request = Request::new(Method::GET, vec![super::url(&url).unwrap()], 100);
    let answer = http.send(&request).unwrap();
    assert_eq!(answer.body.expose(), b"the first");
    assert!(answer.repeated);
}

#[test]
fn a_server_that_answers_nothing_is_not_asked_for_everything_again() {
    let asked = std::sync::Arc::new(AtomicU32::new(0));
    let seen = asked.clone();
    // One after the other.
    let url = serve(move |_| {
        if seen.fetch_add(1, Ordering::Relaxed) == 0 {
            std::thread::sleep(Duration::from_secs(2));
        }
        (200, String::new(), "done".to_owned())
    });
    let network = Network { try_seconds: 0.1, total_seconds: 60.0, ..Network::default() };
    let http = Http::new(&network, None, None).unwrap();
    let requests: Vec<_> = (0..20).map(|_| Request::new(Method::GET, vec![super::url(&url).unwrap()], 100)).collect();
    assert!(http.send_all(&requests).into_iter().all(|answer| answer.unwrap().body.expose() == b"done"));
    let asked = asked.load(Ordering::Relaxed);
    assert!(asked < 45, "of 20 requests {asked} tries came; each by itself would have been tried four times");
}
