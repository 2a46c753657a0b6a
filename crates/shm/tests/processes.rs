//! Ranks as processes: this binary starts itself once a rank, with its role in the environment.

// Tests may unwrap: a panic there is the report.
#![allow(clippy::unwrap_used)]

#[path = "common/mod.rs"]
mod common;

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use common::*;
use rustix::process::{Resource, Rlimit, Signal, getrlimit, kill_process, setrlimit};
use smddp_core::dtype::{DType, ReduceOp};
use smddp_core::plan::{Span, Who};
use smddp_core::transport::{Ctx, Message, MsgKey, NodeLocal};
use smddp_core::{Error, Region};
use smddp_shm::{Geometry, Listener, Membership, ShmNode};

const LIMIT: Duration = Duration::from_secs(90);
const SIZE: usize = 3;

fn main() {
    if let Ok(role) = std::env::var("SHM_TEST_ROLE") {
        return child(&role);
    }
    type Scenario = (&'static str, fn(&[String]));
    let scenarios: [Scenario; 6] = [
        ("works", works),
        ("secret", secret),
        ("killed", killed),
        ("abort", abort),
        ("file-limit", file_limit),
        ("address-limit", address_limit),
    ];
    // As a test harness is asked: cargo-nextest first lists the tests, then runs each alone by its name.
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let asked = |flag: &str| arguments.iter().any(|a| a == flag);
    if asked("--list") {
        let all = if asked("--ignored") { &scenarios[..0] } else { &scenarios[..] };
        all.iter().for_each(|(name, _)| println!("{name}: test"));
        return;
    }
    let named = |name: &str| arguments.iter().all(|a| a.starts_with('-')) || asked(name);
    for (name, check) in scenarios.into_iter().filter(|(name, _)| named(name)) {
        let said = play(name);
        println!("{name}: {said:?}");
        check(&said);
        println!("test {name} ... ok");
    }
}

/// A rank as a process, which does not outlive its test.
struct Rank {
    child: Child,
    /// What it says, a line each. Read by a thread, since a read has no time limit.
    lines: Receiver<String>,
}

impl Rank {
    fn start(scenario: &str, rank: usize, names: &str) -> Rank {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .env("SHM_TEST_ROLE", scenario)
            .env("SHM_TEST_RANK", rank.to_string())
            .env("SHM_TEST_NAMES", names)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (said, lines) = channel();
        let output = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || output.lines().map_while(Result::ok).try_for_each(|line| said.send(line)));
        Rank { child, lines }
    }

    /// Its next line; `None` when it ends or the time is over before.
    fn line(&self, deadline: Instant) -> Option<String> {
        self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())).ok()
    }

    fn ends(&mut self, deadline: Instant) -> bool {
        while Instant::now() < deadline {
            if self.child.try_wait().unwrap().is_some() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        false
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts the ranks of a scenario; what each said last.
fn play(scenario: &str) -> Vec<String> {
    let deadline = Instant::now() + LIMIT;
    let first = Rank::start(scenario, 0, "");
    let Some(names) = first.line(deadline) else { panic!("rank 0 does not say where the others find it") };
    let mut ranks = vec![first];
    ranks.extend((1..SIZE).map(|rank| Rank::start(scenario, rank, names.trim())));
    let hangs = ranks.iter_mut().any(|rank| !rank.ends(deadline));
    let said = ranks.into_iter().map(|mut rank| {
        // One that hangs would never end its output.
        let _ = rank.child.kill();
        rank.lines.iter().collect::<Vec<_>>().join("\n").trim().to_owned()
    });
    let said: Vec<String> = said.collect();
    assert!(!hangs, "{scenario} hangs; said {said:?}");
    said
}

// What the ranks do.

fn child(role: &str) {
    let rank: usize = std::env::var("SHM_TEST_RANK").unwrap().parse().unwrap();
    match role {
        "works" => println!("{}", work_in_two_groups(rank)),
        "secret" => report(join(rank, |who| {
            // The others wait longer than rank 0, so that they hear from it what happened.
            who.deadline = Instant::now() + Duration::from_secs(if rank == 0 { 3 } else { 60 });
            who.secret[31] ^= u8::from(rank == 1);
        })),
        "killed" => lose_rank_two(rank),
        "abort" => abort_from_rank_two(rank),
        "file-limit" => {
            if rank == 0 {
                let limit = Rlimit { current: Some(65536), maximum: getrlimit(Resource::Fsize).maximum };
                setrlimit(Resource::Fsize, limit).unwrap();
            }
            report(join(rank, |_| ()));
        }
        "address-limit" => {
            if rank == 2 {
                let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
                let used = pages.split(' ').next().unwrap().parse::<u64>().unwrap() * 4096;
                let maximum = getrlimit(Resource::As).maximum;
                setrlimit(Resource::As, Rlimit { current: Some(used + (4 << 20)), maximum }).unwrap();
            }
            report(join(rank, |_| ()));
        }
        other => panic!("no role {other}"),
    }
}

fn report(joined: Result<ShmNode, Error>) {
    match joined {
        Ok(_) => println!("joined"),
        Err(error) => println!("{error}"),
    }
}

/// Joins the next group; rank 0 tells its name in advance.
fn join(rank: usize, change: impl Fn(&mut Membership)) -> Result<ShmNode, Error> {
    join_all(rank, 1, change).pop().unwrap()
}

fn join_all(rank: usize, groups: usize, change: impl Fn(&mut Membership)) -> Vec<Result<ShmNode, Error>> {
    let who = |group| {
        let mut who = membership(group as u64, rank, SIZE);
        change(&mut who);
        who
    };
    let geometry = Geometry { slot: 512 << 10, slots: 4 };
    if rank == 0 {
        let listeners: Vec<Listener> = (0..groups).map(|_| Listener::bind().unwrap()).collect();
        println!("{}", listeners.iter().map(Listener::name).collect::<Vec<_>>().join(" "));
        let nodes = listeners.into_iter().enumerate();
        return nodes.map(|(group, l)| l.serve(&who(group), geometry).map_err(Error::from)).collect();
    }
    let names = std::env::var("SHM_TEST_NAMES").unwrap();
    let nodes = names.split(' ').enumerate();
    nodes.map(|(group, name)| ShmNode::connect(name, &who(group)).map_err(Error::from)).collect()
}

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn all_reduce(node: &mut ShmNode, rank: usize, count: usize) -> Result<Vec<u64>, Error> {
    let len = 8 * count;
    let plan = one_phase(vec![span_move(Who::All, Who::All, Span::input(0, len), Span::output(0, len))]);
    let input = (0..count).flat_map(|i| ((rank * i) as u64).to_ne_bytes()).collect();
    let mut memory = Memory { input, output: vec![0; len], scratch: vec![] };
    let sum = arith(DType::I64, ReduceOp::Sum, SIZE);
    node.submit(run(&plan, memory.buffers(), sum, call(count), 1))?;
    drive(node, 1, 100)?;
    Ok(memory.output.chunks(8).map(|b| u64::from_ne_bytes(b.try_into().unwrap())).collect())
}

fn work_in_two_groups(rank: usize) -> String {
    let before = open_files();
    let mut nodes: Vec<ShmNode> = join_all(rank, 2, |_| ()).into_iter().map(|n| n.unwrap()).collect();
    let kept = open_files() - before;
    for node in &mut nodes {
        // All are alive: each still waits for this rank's part in the next line.
        assert_eq!(node.lost_peer(), None);
        for count in [1, 5, 1000, 65536, 300_000] {
            let expected: Vec<u64> = (0..count as u64).map(|i| 3 * i).collect();
            assert!(all_reduce(node, rank, count).unwrap() == expected, "{count}");
        }
        let (mut out, mut back) = (vec![rank as u8; 200_000], vec![9; 200_000]);
        let message = |peer: usize, number, bytes: &mut Vec<u8>| Message {
            key: MsgKey { group: 0, seq: number as u64, tag: 0 },
            peer: peer as u32,
            peer_rank: 10 + peer as u32,
            // SAFETY: the vectors outlive `drive`.
            region: unsafe { Region::of(bytes) },
            call: call(1),
            ctx: Ctx(2),
        };
        let (next, last) = ((rank + 1) % SIZE, (rank + 2) % SIZE);
        node.send(message(next, rank, &mut out)).unwrap();
        node.recv(message(last, last, &mut back)).unwrap();
        drive(node, 2, 100).unwrap();
        assert!(back == vec![last as u8; 200_000]);
    }
    format!("right, {kept} descriptors")
}

fn works(said: &[String]) {
    // One pidfd for each other process, whatever the number of groups; nothing else stays open.
    assert_eq!(said, vec![format!("right, {} descriptors", SIZE - 1); SIZE]);
}

fn secret(said: &[String]) {
    assert!(said[1].contains("does not know the job's secret"), "{}", said[1]);
    assert!(said[0].contains("timeout after") && said[0].contains("rank 11"), "{}", said[0]);
    assert!(said[2].contains("[11] did not come"), "{}", said[2]);
}

fn lose_rank_two(rank: usize) {
    let mut node = join(rank, |_| ()).unwrap();
    all_reduce(&mut node, rank, 1000).unwrap();
    if rank == 2 {
        kill_process(rustix::process::getpid(), Signal::KILL).unwrap();
    }
    let plan = one_phase(vec![span_move(Who::All, Who::All, Span::input(0, 4), Span::output(0, 4))]);
    let mut memory = Memory { input: vec![0; 4], output: vec![0; 4], scratch: vec![] };
    let sum = arith(DType::F32, ReduceOp::Sum, SIZE);
    node.submit(run(&plan, memory.buffers(), sum, call(1), 1)).unwrap();
    let (bell, started) = (node.bell(), Instant::now());
    node.poll(&mut vec![]).unwrap();
    // As the engine does: look whenever a short sleep has passed in vain.
    while node.lost_peer().is_none() {
        assert!(started.elapsed() < PATIENCE);
        node.poll(&mut vec![]).unwrap();
        node.arm();
        let value = bell.value();
        node.poll(&mut vec![]).unwrap();
        bell.wait(value, Duration::from_millis(20));
        node.disarm();
    }
    println!("lost {:?}, waiting for {:?}", node.lost_peer(), node.waiting_for().last());
}

fn killed(said: &[String]) {
    for survivor in &said[..2] {
        assert_eq!(survivor, "lost Some((2, Ended)), waiting for Some(2)");
    }
}

fn abort_from_rank_two(rank: usize) {
    let mut node = join(rank, |_| ()).unwrap();
    if rank == 2 {
        node.abort(&Error::Internal("the roof is on fire".to_owned()));
        return println!("aborted");
    }
    println!("{}", all_reduce(&mut node, rank, 10).unwrap_err());
}

fn abort(said: &[String]) {
    for survivor in &said[..2] {
        assert!(
            survivor.contains("aborted: rank 12:") && survivor.contains("the roof is on fire"),
            "{survivor}"
        );
    }
}

fn file_limit(said: &[String]) {
    assert!(said[0].contains("not enough shared memory") && said[0].contains("65536 bytes"), "{}", said[0]);
    for other in &said[1..] {
        assert!(other.contains("not enough shared memory") && other.contains("65536 bytes"), "{other}");
    }
}

fn address_limit(said: &[String]) {
    for rank in said {
        assert!(rank.contains("not enough shared memory") && rank.contains("MiB"), "{rank}");
    }
    assert!(said[0].contains("on rank 12"), "{}", said[0]);
}
