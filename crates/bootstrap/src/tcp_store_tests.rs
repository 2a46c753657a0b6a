use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;

use super::*;

const SECRET: [u8; 16] = [7; 16];

fn soon(seconds: u64) -> Instant {
    Instant::now() + Duration::from_secs(seconds)
}

fn me(rank: usize, size: usize) -> Identity {
    Identity { rank, size, secret: SECRET }
}

fn host(size: usize) -> TcpStore {
    TcpStore::host(me(0, size), &Listen { loopback: true, ports: vec![0] }, soon(60)).unwrap()
}

fn at(store: &TcpStore) -> String {
    format!("127.0.0.1:{}", store.port().unwrap())
}

fn join(address: &str, rank: usize, size: usize) -> Result<TcpStore> {
    TcpStore::connect(me(rank, size), &[address.to_owned()], soon(60))
}

fn answers(store: &dyn Store) {
    store.set("alive", b"yes").unwrap();
    assert_eq!(store.get("alive", soon(60)).unwrap(), b"yes");
}

#[test]
fn values_and_counters_are_shared() {
    let zero = host(2);
    let one = join(&at(&zero), 1, 2).unwrap();
    one.set("k", b"").unwrap();
    assert_eq!(zero.get("k", soon(60)).unwrap(), b"");
    let long = vec![3u8; 1 << 20];
    zero.set("k", &long).unwrap();
    assert_eq!(one.get("k", soon(60)).unwrap(), long);
    assert_eq!((zero.add("c", 3).unwrap(), one.add("c", -1).unwrap()), (3, 2));
    assert_eq!(one.get("c", soon(60)).unwrap(), b"2");
    drop(one);
}

#[test]
fn threads_of_one_rank_do_not_block_one_another() {
    let store = Arc::new(host(1));
    let waiters: Vec<_> = (0..16)
        .map(|i| {
            let store = Arc::clone(&store);
            std::thread::spawn(move || store.get(&format!("k{i}"), soon(60)).unwrap())
        })
        .collect();
    for i in (0..16).rev() {
        store.set(&format!("k{i}"), &[i]).unwrap();
    }
    for (i, waiter) in waiters.into_iter().enumerate() {
        assert_eq!(waiter.join().unwrap(), [i as u8]);
    }
}

#[test]
fn a_get_ends_at_its_deadline_and_the_store_goes_on() {
    let store = host(1);
    let error = store.get("absent", Instant::now() + Duration::from_millis(50)).unwrap_err();
    assert!(matches!(error, smddp_core::Error::Timeout { .. }), "{error}");
    // A later value must not be taken for the answer to something else.
    store.set("absent", b"late").unwrap();
    answers(&store);
}

#[test]
fn sizes_are_bounded_on_both_sides() {
    let store = host(1);
    let error = store.set("k", &vec![0; kv::MAX_VALUE + 1]).unwrap_err().to_string();
    assert!(error.contains("values have up to"), "{error}");
    assert!(store.set(&"k".repeat(2000), b"").is_err());
    assert!(store.set("", b"").is_err());
    store.set("text", b"text").unwrap();
    assert!(store.add("text", 1).unwrap_err().to_string().contains("not a counter"));
    answers(&store);
    // A client that does not keep to the bounds is cut off.
    let mut rogue = TcpStream::connect(at(&store)).unwrap();
    greet(&mut rogue, me(0, 1), store.process, soon(60)).unwrap();
    let mut header = Request::encode(Op::Set, 0, "k", b"");
    header[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
    send(&mut rogue, &header, soon(60)).unwrap();
    let error = receive_reply(&mut rogue, soon(60)).unwrap_err();
    assert_ne!(error.kind(), std::io::ErrorKind::TimedOut, "the server waits for four gigabytes");
    answers(&store);
}

#[test]
fn garbage_on_the_port_disturbs_nobody() {
    let zero = host(2);
    let address = at(&zero);
    let mut kept = Vec::new();
    for i in 0..200u64 {
        let mut stream = TcpStream::connect(&address).unwrap();
        let mut bytes: Vec<u8> = (0..64).flat_map(|_| host::random_u64().to_le_bytes()).collect();
        match i % 4 {
            // Says nothing, or stops in the middle of a hello, and stays.
            0 => bytes.clear(),
            1 => bytes = Hello { secret: SECRET, size: 2, rank: 1, process: 5 }.encode()[..30].to_vec(),
            // The magic, then random: a wrong secret.
            2 => bytes[..8].copy_from_slice(&MAGIC),
            _ => {}
        }
        // The server may close while we write.
        let _ = stream.write_all(&bytes);
        kept.push(stream);
    }
    let one = join(&address, 1, 2).unwrap();
    one.ready(soon(60)).unwrap();
    zero.ready(soon(60)).unwrap();
    answers(&one);
    drop(kept);
    answers(&zero);
}

#[test]
fn another_world_size_is_told_to_both_sides() {
    let zero = host(2);
    let address = at(&zero);
    let waiter = std::thread::spawn(move || zero.ready(soon(60)));
    let theirs = join(&address, 1, 3).unwrap_err();
    let ours = waiter.join().unwrap().unwrap_err();
    for error in [theirs, ours] {
        assert!(matches!(error, Error::Disagree { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains("rank 1") && text.contains("3 ranks") && text.contains("says 2"), "{text}");
    }
}

#[test]
fn two_processes_of_one_rank_are_told_on_both_sides() {
    let zero = host(3);
    let address = at(&zero);
    let first = join(&address, 1, 3).unwrap();
    let waiter = std::thread::spawn(move || first.ready(soon(60)).unwrap_err());
    let second = join(&address, 1, 3).unwrap_err();
    for error in [second, waiter.join().unwrap(), zero.ready(soon(60)).unwrap_err()] {
        assert!(matches!(error, Error::Disagree { .. }), "{error}");
        assert!(error.to_string().contains("two processes say they are rank 1"), "{error}");
    }
}

#[test]
fn a_complete_job_is_not_disturbed_by_a_latecomer() {
    let zero = host(2);
    let one = join(&at(&zero), 1, 2).unwrap();
    zero.ready(soon(60)).unwrap();
    assert!(matches!(join(&at(&zero), 1, 2), Err(Error::Disagree { .. })));
    assert!(matches!(join(&at(&zero), 5, 7), Err(Error::Disagree { .. })));
    answers(&one);
}

#[test]
fn a_second_rank_zero_is_refused() {
    let zero = host(2);
    let listen = Listen { loopback: true, ports: vec![zero.port().unwrap(), 0] };
    let error = TcpStore::host(me(0, 2), &listen, soon(60)).unwrap_err();
    assert!(error.to_string().contains("two processes say they are rank 0"), "{error}");
}

#[test]
fn missing_ranks_are_named() {
    let zero = host(4);
    let two = join(&at(&zero), 2, 4).unwrap();
    match two.ready(Instant::now() + Duration::from_millis(100)) {
        Err(Error::Missing { missing, .. }) => assert_eq!(missing, [1, 3]),
        other => panic!("{other:?}"),
    }
    // Rank 2 gives up: the others need not wait for their own deadlines.
    drop(two);
    let error = zero.ready(soon(60)).unwrap_err().to_string();
    assert!(error.contains("rank 2 gave up"), "{error}");
}

#[test]
fn a_rank_that_dies_before_the_job_is_complete_is_named() {
    let zero = host(3);
    let mut one = TcpStream::connect(at(&zero)).unwrap();
    greet(&mut one, me(1, 3), 99, soon(60)).unwrap();
    send(&mut one, &Request::encode(Op::Ready, 60_000, "", b""), soon(60)).unwrap();
    drop(one);
    let error = zero.ready(soon(60)).unwrap_err().to_string();
    assert!(error.contains("rank 1") && error.contains("ended before"), "{error}");
}

/// A store too busy to greet in time: the client goes, its hello is read afterwards.
#[test]
fn an_attempt_given_up_is_not_a_rank_that_left() {
    let zero = host(3);
    let hello = Hello { secret: SECRET, size: 3, rank: 1, process: 99 }.encode();
    let mut given_up = TcpStream::connect(at(&zero)).unwrap();
    send(&mut given_up, &hello, soon(60)).unwrap();
    // Its greeting came, so the store has read the hello.
    given_up.peek(&mut [0]).unwrap();
    drop(given_up);
    match zero.ready(Instant::now() + Duration::from_millis(100)) {
        Err(Error::Missing { missing, .. }) => assert_eq!(missing, [1, 2]),
        other => panic!("{other:?}"),
    }
    let mut again = TcpStream::connect(at(&zero)).unwrap();
    greet(&mut again, me(1, 3), 99, soon(60)).unwrap();
    let two = join(&at(&zero), 2, 3).unwrap();
    zero.ready(soon(60)).unwrap();
    two.ready(soon(60)).unwrap();
}

/// Until the store of a job that has failed turns newcomers away because it ends.
fn until_it_ends(address: SocketAddr) {
    let limit = soon(60);
    loop {
        let mut probe = TcpStream::connect(address).unwrap();
        let hello = Hello { secret: SECRET, size: 3, rank: 2, process: 9 }.encode();
        send(&mut probe, &hello, limit).unwrap();
        receive(&mut probe, &mut [0; MAGIC.len()], limit).unwrap();
        match receive_reply(&mut probe, limit).unwrap().0 {
            Status::Ending => return,
            status => assert_eq!(status, Status::Disagree),
        }
    }
}

#[test]
fn ranks_that_came_before_rank_zero_hear_of_a_contradiction() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let mut twins = [5, 6].map(|process| {
        let mut stream = TcpStream::connect(address).unwrap();
        let hello = Hello { secret: SECRET, size: 3, rank: 1, process }.encode();
        send(&mut stream, &hello, soon(60)).unwrap();
        stream
    });
    let zero = std::thread::spawn(move || TcpStore::serve(me(0, 3), 7, listener, soon(60)));
    let told = |answer: std::io::Result<(Status, Vec<u8>)>| {
        let (status, text) = answer.unwrap();
        let text = String::from_utf8_lossy(&text).into_owned();
        assert!(status == Status::Disagree && text.contains("two processes say they are rank 1"), "{text}");
    };
    for (twin, greeting) in twins.iter_mut().zip([Status::Ok, Status::Disagree]) {
        receive(twin, &mut [0; MAGIC.len()], soon(60)).unwrap();
        let answer = receive_reply(twin, soon(60));
        if greeting == Status::Ok {
            assert_eq!(answer.unwrap().0, Status::Ok);
            // Rank 0 has been told, and is at its end.
            until_it_ends(address);
            send(twin, &Request::encode(Op::Ready, 60_000, "", b""), soon(60)).unwrap();
            told(receive_reply(twin, soon(60)));
        } else {
            told(answer);
        }
    }
    drop(twins);
    let error = zero.join().unwrap().unwrap_err();
    assert!(error.to_string().contains("two processes say they are rank 1"), "{error}");
}

#[test]
fn nobody_there_is_an_error_with_address_and_advice() {
    // A port that was free a moment ago.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = format!("127.0.0.1:{port}");
    let deadline = Instant::now() + Duration::from_millis(200);
    let error =
        TcpStore::connect(me(1, 2), std::slice::from_ref(&address), deadline).unwrap_err().to_string();
    assert!(
        error.contains(&address) && error.contains("refused") && error.contains("MASTER_ADDR"),
        "{error}"
    );
    // A listener that never answers ends at the deadline as well.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap().to_string();
    let deadline = Instant::now() + Duration::from_millis(200);
    let error = TcpStore::connect(me(1, 2), &[address], deadline).unwrap_err().to_string();
    assert!(error.contains("no answer in time"), "{error}");
}

#[test]
fn stores_of_other_jobs_and_other_programs_are_passed_over() {
    let stranger = TcpStore::host(
        Identity { rank: 0, size: 2, secret: [1; 16] },
        &Listen { loopback: true, ports: vec![0] },
        soon(60),
    )
    .unwrap();
    let web = TcpListener::bind("127.0.0.1:0").unwrap();
    let web_address = web.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = web.accept() {
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
        }
    });
    let ours = host(2);
    let candidates = [web_address, at(&stranger), at(&ours)];
    let one = TcpStore::connect(me(1, 2), &candidates, soon(60)).unwrap();
    one.ready(soon(60)).unwrap();
    let deadline = Instant::now() + Duration::from_millis(300);
    let error = TcpStore::connect(me(1, 2), &candidates[..2], deadline).unwrap_err().to_string();
    assert!(error.contains("another program") && error.contains("another job"), "{error}");
}

#[test]
fn rank_zero_serves_until_the_last_has_left() {
    let zero = host(2);
    let one = join(&at(&zero), 1, 2).unwrap();
    one.ready(soon(60)).unwrap();
    let (left, gone) = std::sync::mpsc::channel();
    let closer = std::thread::spawn(move || {
        zero.close(Duration::from_secs(60));
        left.send(()).unwrap();
    });
    for i in 0..100 {
        one.set(&format!("k{i}"), b"v").unwrap();
    }
    assert!(gone.try_recv().is_err(), "the server ended under its client");
    drop(one);
    gone.recv_timeout(Duration::from_secs(50)).unwrap();
    closer.join().unwrap();
}

#[test]
fn rank_zero_does_not_wait_for_ever() {
    let zero = host(2);
    let one = join(&at(&zero), 1, 2).unwrap();
    zero.close(Duration::from_millis(100));
    let error = one.set("k", b"v").unwrap_err().to_string();
    assert!(error.contains("rank 0") && error.contains("set k"), "{error}");
}

#[test]
fn the_same_ports_serve_the_next_job_of_the_same_processes() {
    let zero = host(2);
    let port = zero.port().unwrap();
    let one = join(&at(&zero), 1, 2).unwrap();
    one.ready(soon(60)).unwrap();
    // Rank 1 leaves first and comes again at once, to the old store: it must wait for the new one.
    drop(one);
    let again = std::thread::spawn(move || {
        let one = join(&format!("127.0.0.1:{port}"), 1, 2).unwrap();
        one.ready(soon(60)).unwrap();
        one.set("second", b"life").unwrap();
        one
    });
    drop(zero);
    let zero = TcpStore::host(me(0, 2), &Listen { loopback: true, ports: vec![port] }, soon(60)).unwrap();
    assert_eq!(zero.get("second", soon(60)).unwrap(), b"life");
    drop(again.join().unwrap());
}

#[test]
fn many_ranks_exchange_through_it() {
    let size = 32;
    let zero = host(size);
    let address = at(&zero);
    let ranks: Vec<_> = (1..size)
        .map(|rank| {
            let address = address.clone();
            std::thread::spawn(move || {
                let store = join(&address, rank, size).unwrap();
                store.ready(soon(60)).unwrap();
                crate::exchange::all_gather(&store, "g", rank, size, &[rank as u8], soon(60)).unwrap()
            })
        })
        .collect();
    let all = crate::exchange::all_gather(&zero, "g", 0, size, &[0], soon(60)).unwrap();
    assert_eq!(all, (0..size).map(|r| vec![r as u8]).collect::<Vec<_>>());
    for rank in ranks {
        assert_eq!(rank.join().unwrap(), all);
    }
}

#[test]
fn a_silent_address_leaves_time_to_the_hosts_next_one() {
    let store = host(1);
    let good = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), store.port().unwrap());
    // The kernel takes connections for it, and nobody ever answers.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let addresses = [silent.local_addr().unwrap(), good];
    let limit = Instant::now() + Duration::from_secs(2);
    let (_, reached) = attempt_each(me(0, 1), store.process, &addresses, limit).unwrap();
    assert_eq!(reached, good);
}

/// Meaningful where `net.ipv6.bindv6only` is 1; elsewhere it is so anyway.
#[test]
fn the_wildcard_of_ipv6_takes_ipv4() {
    let Ok(listener) = listen((Ipv6Addr::UNSPECIFIED, 0).into()) else {
        eprintln!("NOT RUN: no IPv6 here");
        return;
    };
    assert!(!rustix::net::sockopt::ipv6_v6only(&listener).unwrap());
    let port = listener.local_addr().unwrap().port();
    TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
}

/// Looks for the store at `candidates`, whose names `resolver` knows; attempts last `longest` at most.
fn find(
    candidates: &[String],
    resolver: impl Fn(&str) -> std::io::Result<Vec<SocketAddr>> + Send + Sync + 'static,
    longest: Duration,
    deadline: Instant,
) -> Result<TcpStore> {
    let resolver: Resolver = Arc::new(resolver);
    let mut hosts = CandidateHost::all(candidates, &resolver)?;
    TcpStore::reach_hosts(me(1, 2), 5, &mut hosts, longest, deadline)
}

fn loopback() -> Vec<SocketAddr> {
    vec![(Ipv4Addr::LOCALHOST, 0).into()]
}

#[test]
fn a_lookup_longer_than_an_attempt_leaves_the_attempt_its_time() {
    let zero = host(2);
    let longest = Duration::from_millis(200);
    let slow = move |_: &str| {
        std::thread::sleep(longest * 2);
        Ok(loopback())
    };
    let candidates = [format!("zero:{}", zero.port().unwrap())];
    find(&candidates, slow, longest, soon(60)).unwrap();
}

#[test]
fn a_lookup_without_an_answer_is_made_once_and_waited_for_to_the_deadline() {
    let (end, until) = channel::<()>();
    let until = Mutex::new(until);
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let silent = move |name: &str| {
        assert_eq!(name, "zero");
        count.fetch_add(1, Ordering::Relaxed);
        let _ = until.lock().unwrap().recv_timeout(Duration::from_secs(60));
        Ok(Vec::new())
    };
    let candidates = [1, 2, 3, 4].map(|port| format!("zero:{port}"));
    let deadline = Instant::now() + Duration::from_millis(300);
    let error = find(&candidates, silent, Duration::from_millis(50), deadline).unwrap_err().to_string();
    assert!(error.contains("zero:1, zero:2, zero:3, zero:4: the name service has not answered"), "{error}");
    assert_eq!(asked.load(Ordering::Relaxed), 1);
    drop(end);
}

#[test]
fn a_lookup_without_an_answer_does_not_keep_other_hosts_from_being_tried() {
    let zero = host(2);
    let (end, until) = channel::<()>();
    let until = Mutex::new(until);
    let silent = move |_: &str| {
        let _ = until.lock().unwrap().recv_timeout(Duration::from_secs(120));
        Ok(Vec::new())
    };
    let candidates = ["nobody:1".to_owned(), at(&zero)];
    find(&candidates, silent, LONGEST_ATTEMPT, soon(60)).unwrap();
    drop(end);
}

/// As where a container's name appears with the container.
#[test]
fn a_name_nobody_knows_yet_is_asked_for_again() {
    let zero = host(2);
    let asked = AtomicUsize::new(0);
    let second = move |_: &str| match asked.fetch_add(1, Ordering::Relaxed) {
        0 => Err(std::io::Error::other("unknown name")),
        1 => Ok(Vec::new()),
        _ => Ok(loopback()),
    };
    let candidates = [format!("zero:{}", zero.port().unwrap())];
    find(&candidates, second, LONGEST_ATTEMPT, soon(60)).unwrap();
    let unknown = |_: &str| Err(std::io::Error::other("unknown name"));
    let error = find(&candidates, unknown, LONGEST_ATTEMPT, soon(1)).unwrap_err().to_string();
    assert!(error.contains(&format!("{}: unknown name", candidates[0])), "{error}");
}

#[test]
fn candidates_are_a_host_and_a_port() {
    assert_eq!(host_and_port("algo-1:29811"), Some(("algo-1", 29811)));
    assert_eq!(host_and_port("[2001:db8::1]:80"), Some(("2001:db8::1", 80)));
    assert_eq!(host_and_port("fe80::1%eth0:80"), Some(("fe80::1%eth0", 80)));
    for wrong in ["algo-1", "algo-1:", "algo-1:70000", ""] {
        assert_eq!(host_and_port(wrong), None);
        let error = TcpStore::connect(me(1, 2), &[wrong.to_owned()], soon(60)).unwrap_err();
        assert!(matches!(&error, Error::NoWay { .. }), "{error}");
    }
}

#[test]
fn a_silent_connection_is_kept_in_the_firewalls_memory() {
    let store = host(1);
    crate::server::assert_kept_alive(&store.idle.lock().unwrap()[0]);
}
