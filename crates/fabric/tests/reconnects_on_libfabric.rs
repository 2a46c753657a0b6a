//! Connections that break between two endpoints over a real libfabric, which makes them again without a word. Needs one, as
//! `on_libfabric` does.

#![allow(clippy::unwrap_used)]

use std::io::Read;
use std::mem::ManuallyDrop;
use std::net::{Shutdown, TcpStream};
use std::os::fd::FromRawFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use smddp_core::error::Error;
use smddp_core::memory::Region;
use smddp_core::settings::Settings;
use smddp_core::transport::{Ctx, Fabric, FabricFailure, Message, MsgKey};
use smddp_core::{Call, Collective, DType};
use smddp_fabric::FabricEndpoint;

const LIMIT: Duration = Duration::from_secs(60);

fn open() -> Option<FabricEndpoint> {
    let mut settings = Settings::from_env().unwrap();
    settings.set("SMDDP_PROVIDER", "tcp").unwrap();
    settings.set("SMDDP_NICS", "lo").unwrap();
    let dirs: Vec<PathBuf> = std::env::var("VIRTUAL_ENV").map(PathBuf::from).into_iter().collect();
    match FabricEndpoint::open(&settings, &dirs) {
        Ok(end) => Some(end),
        Err(error) => {
            let required = std::env::var("SMDDP_TEST_REQUIRE_LIBFABRIC").is_ok_and(|v| v == "1");
            assert!(!required, "SMDDP_TEST_REQUIRE_LIBFABRIC=1, but: {error}");
            eprintln!("NOT RUN: {error}");
            None
        }
    }
}

fn message(seq: u64, bytes: &mut [u8]) -> Message {
    let call = Call::new(Collective::AllToAll, DType::U8, 1).pack();
    // SAFETY: the tests keep their buffers until all operations are over.
    let region = unsafe { Region::of(bytes) };
    Message { key: MsgKey { group: 5, seq, tag: 0 }, peer: 0, peer_rank: 1, region, call, ctx: Ctx(seq) }
}

/// All connections of this process, which are those between its two endpoints. Nothing else may use them meanwhile.
fn connections() -> Vec<ManuallyDrop<TcpStream>> {
    let fds = std::fs::read_dir("/proc/self/fd").unwrap();
    let fds: Vec<i32> = fds.filter_map(|fd| fd.ok()?.file_name().to_str()?.parse().ok()).collect();
    // SAFETY: whatever it is, it is asked for its peer and left open.
    let streams = fds.into_iter().map(|fd| ManuallyDrop::new(unsafe { TcpStream::from_raw_fd(fd) }));
    streams.filter(|stream| stream.peer_addr().is_ok()).collect()
}

/// Sockets of this process, connected or not.
fn sockets() -> usize {
    let fds = std::fs::read_dir("/proc/self/fd").unwrap().filter_map(Result::ok);
    fds.filter_map(|fd| std::fs::read_link(fd.path()).ok())
        .filter(|to| to.to_str().unwrap().starts_with("socket:"))
        .count()
}

/// Sends message `seq` of `a` to `b`, and gives the failure of `b`, if there is any.
fn exchange(a: &mut FabricEndpoint, b: &mut FabricEndpoint, seq: u64) -> Option<FabricFailure> {
    let (mut from, mut into, mut done) = (vec![seq as u8 + 1; 100], vec![0; 100], Vec::new());
    b.recv(message(seq, &mut into)).unwrap();
    a.send(message(seq, &mut from)).unwrap();
    wait(a, b, &mut done, 2)?;
    assert_eq!(from, into);
    None
}

fn wait(
    a: &mut FabricEndpoint,
    b: &mut FabricEndpoint,
    done: &mut Vec<Ctx>,
    n: usize,
) -> Option<FabricFailure> {
    let start = Instant::now();
    while done.len() < n {
        assert!(start.elapsed() < LIMIT, "{done:?}");
        a.poll(done).unwrap();
        if let Err(failure) = b.poll(done) {
            return Some(failure);
        }
        std::thread::yield_now();
    }
    None
}

/// Two endpoints that are connected, and how many sockets there were before.
fn pair() -> Option<(FabricEndpoint, FabricEndpoint, usize)> {
    let (mut a, mut b) = (open()?, open()?);
    let before = sockets();
    a.connect(&b.address(), "b").unwrap();
    b.connect(&a.address(), "a").unwrap();
    for seq in 0..3 {
        assert!(exchange(&mut a, &mut b, seq).is_none());
    }
    assert!(connections().len() >= 2);
    Some((a, b, before))
}

#[test]
fn a_connection_that_breaks_with_nothing_in_it_is_made_again() {
    let Some((mut a, mut b, before)) = pair() else { return };
    for seq in 3..6 {
        break_all(&mut a, &mut b, before);
        let failed = exchange(&mut a, &mut b, seq);
        assert!(failed.is_none(), "{failed:?}");
    }
}

/// Breaks all connections with nothing in them, which both notice.
fn break_all(a: &mut FabricEndpoint, b: &mut FabricEndpoint, before: usize) {
    // Answers to probes may be on their way.
    for _ in 0..100 {
        a.poll(&mut Vec::new()).unwrap();
        b.poll(&mut Vec::new()).unwrap();
        std::thread::sleep(Duration::from_micros(100));
    }
    connections().iter().for_each(|c| c.shutdown(Shutdown::Both).unwrap_or_default());
    let start = Instant::now();
    while sockets() > before {
        assert!(start.elapsed() < LIMIT);
        a.poll(&mut Vec::new()).unwrap();
        b.poll(&mut Vec::new()).unwrap();
    }
}

/// A process without work looks for news every 100 ms; two looks are what it takes to make a connection.
#[test]
fn a_connection_is_made_again_with_one_that_looks_seldom() {
    for a_is_idle in [false, true] {
        let Some((mut a, mut b, before)) = pair() else { return };
        for seq in 3..6 {
            break_all(&mut a, &mut b, before);
            let (mut from, mut into) = (vec![seq as u8; 100], vec![0; 100]);
            let mut done = [Vec::new(), Vec::new()];
            b.recv(message(seq, &mut into)).unwrap();
            a.send(message(seq, &mut from)).unwrap();
            let (start, mut looked) = (Instant::now(), Instant::now());
            while done.iter().any(Vec::is_empty) {
                assert!(start.elapsed() < LIMIT, "{done:?}");
                let is_time = looked.elapsed() >= Duration::from_millis(100);
                if is_time {
                    looked = Instant::now();
                }
                // The one that is idle looks once, or twice.
                if !a_is_idle || is_time {
                    a.poll(&mut done[0]).unwrap();
                }
                for _ in 0..if a_is_idle { 1 } else { 2 * usize::from(is_time) } {
                    b.poll(&mut done[1]).unwrap();
                }
                std::thread::sleep(Duration::from_micros(100));
            }
            assert_eq!(from, into);
        }
    }
}

#[test]
fn a_message_that_was_lost_with_its_connection_is_missed() {
    let Some((mut a, mut b, _)) = pair() else { return };
    let (mut from, mut into, mut done) = ([7; 100], [0; 100], Vec::new());
    b.recv(message(9, &mut into)).unwrap();
    a.send(message(9, &mut from)).unwrap();
    // On its way out, and taken from the connection before its receiver looks.
    let start = Instant::now();
    let mut taken = 0;
    while taken == 0 {
        assert!(start.elapsed() < LIMIT);
        a.poll(&mut done).unwrap();
        for mut connection in connections() {
            connection.set_nonblocking(true).unwrap();
            taken += connection.read(&mut [0; 4096]).unwrap_or_default();
        }
    }
    connections().iter().for_each(|c| c.shutdown(Shutdown::Both).unwrap_or_default());
    let failure = wait(&mut a, &mut b, &mut done, 2).unwrap();
    let Error::PeerLost { peer: 1, reason, .. } = &failure.error else { panic!("{failure:?}") };
    assert!(reason.contains("lost with it"), "{reason}");
}

/// The connection breaks with a write half out, which its sender sees; its receiver has read nothing of that.
#[test]
fn who_loses_a_peer_in_the_midst_of_a_message_tells_it() {
    let Some((mut a, mut b, _)) = pair() else { return };
    let (mut from, mut into, mut done) = (vec![7; 64 << 20], vec![0; 64 << 20], Vec::new());
    b.recv(message(9, &mut into)).unwrap();
    a.send(message(9, &mut from)).unwrap();
    let (start, mut some) = (Instant::now(), [0; 4096]);
    // More than what else is said.
    while !connections().iter().any(|c| c.peek(&mut some).is_ok_and(|n| n == some.len())) {
        assert!(start.elapsed() < LIMIT);
        a.poll(&mut done).unwrap();
    }
    for mut connection in connections() {
        connection.shutdown(Shutdown::Both).unwrap_or_default();
        while !matches!(connection.read(&mut some), Ok(0)) {
            assert!(start.elapsed() < LIMIT);
        }
    }
    let lost = loop {
        assert!(start.elapsed() < LIMIT);
        if let Err(failure) = a.poll(&mut done) {
            break failure.error;
        }
    };
    a.withdraw(5, &[0], Some(&lost));
    let start = Instant::now();
    let failure = loop {
        assert!(start.elapsed() < Duration::from_secs(20), "it was not told");
        a.poll(&mut done).unwrap();
        if let Err(failure) = b.poll(&mut done) {
            break failure;
        }
    };
    assert_eq!((failure.group, done), (Some(5), vec![]));
    // That is all it costs.
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                a.poll(&mut Vec::new()).unwrap();
            }
        });
        b.withdraw(5, &[0], Some(&failure.error));
        stop.store(true, Ordering::Relaxed);
    });
    b.poll(&mut Vec::new()).unwrap();
}
