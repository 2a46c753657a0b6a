//! Whole jobs: ranks as processes, nodes played by `SMDDP_NODE_ID`, real shared memory and real libfabric.
//!
//! A test starts this executable again, once a rank, with the name of a role; the role's panic is the rank's failure.
//! Every job has a time limit, after which its processes are killed by pid.

#![allow(clippy::unwrap_used)]

mod algorithms;
mod deaths;
mod links;

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use smddp::{Collective, DType, Error, ReduceOp, Region, Request, Settings, SharedMemory, World};
use smddp_core::reduce::Variant;

const LIMIT: Duration = Duration::from_secs(120);
/// A rank's last words. Who ends well without them has not played its role: `worker` is not what it was, or was not found.
const PLAYED: &str = "@@ the role is played";

/// One rank's end.
struct End {
    rank: usize,
    /// `None`: killed by a signal, or by us.
    code: Option<i32>,
    output: String,
}

/// A process that does not outlive its test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Reads to the end beside the test: a rank never waits for somebody to read what it says.
fn drain(mut pipe: impl Read + Send + 'static) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        pipe.read_to_end(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// Runs `role` on ranks spread over nodes of these sizes.
fn job(role: &str, nodes: &[usize], more: &[(&str, &str)]) -> Vec<End> {
    let size: usize = nodes.iter().sum();
    // Held until the job has ended: it tells this job from those of tests beside it (our store listens elsewhere).
    let master = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = master.local_addr().unwrap().port().to_string();
    let (mut ranks, mut outputs) = (Vec::new(), Vec::new());
    for (node, &locals) in nodes.iter().enumerate() {
        for local in 0..locals {
            let rank = ranks.len();
            let mut command = Command::new(std::env::current_exe().unwrap());
            command.args(["--exact", "worker", "--ignored", "--nocapture", "--test-threads=1"]);
            command.envs([("JOB_ROLE", role), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", &port)]);
            command.env("RANK", rank.to_string()).env("WORLD_SIZE", size.to_string());
            command.env("LOCAL_RANK", local.to_string()).env("LOCAL_WORLD_SIZE", locals.to_string());
            command.env("SMDDP_NODE_ID", format!("node{node}")).env("SMDDP_TIMEOUT", "60");
            command.envs(more.iter().copied()).stdout(Stdio::piped()).stderr(Stdio::piped());
            let mut child = Running(command.spawn().unwrap());
            let (out, err) = (child.0.stdout.take().unwrap(), child.0.stderr.take().unwrap());
            outputs.push([drain(out), drain(err)]);
            ranks.push(child);
        }
    }
    let deadline = Instant::now() + LIMIT;
    let ended = ranks.into_iter().zip(outputs).enumerate().map(|(rank, (mut child, output))| {
        let code = loop {
            if let Some(status) = child.0.try_wait().unwrap() {
                break status.code();
            }
            if Instant::now() > deadline {
                break None;
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        drop(child);
        let output = output.map(|text| text.join().unwrap()).concat();
        assert!(code != Some(0) || output.contains(PLAYED), "rank {rank} never played {role}:\n{output}");
        End { rank, code, output }
    });
    ended.collect()
}

/// Runs a job in which every rank must end well; their outputs.
fn good_job(role: &str, nodes: &[usize], more: &[(&str, &str)]) -> Vec<String> {
    let ends = job(role, nodes, more);
    // All of them: which came first, their outputs say.
    let bad = ends.iter().filter(|end| end.code != Some(0));
    let bad: Vec<String> =
        bad.map(|end| format!("rank {}: {:?}\n{}", end.rank, end.code, end.output)).collect();
    assert!(bad.is_empty(), "{role} on {nodes:?} with {more:?}:\n{}", bad.join("\n"));
    ends.into_iter().map(|e| e.output).collect()
}

/// The number after `name=` in a rank's output.
fn figure(output: &str, name: &str) -> u64 {
    let at = output.find(&format!("{name}=")).unwrap_or_else(|| panic!("no {name} in {output}"));
    let digits = output[at + name.len() + 1..].chars().take_while(char::is_ascii_digit).collect::<String>();
    digits.parse().unwrap()
}

#[test]
#[ignore = "the body of a rank, started by the tests of this file"]
fn worker() {
    match std::env::var("JOB_ROLE").unwrap().as_str() {
        "collectives" => collectives(),
        "algorithms" => algorithms::rank(),
        "bytes" => links::rank(),
        "bits" => bits(),
        "groups" => groups(),
        "mismatch" => mismatch(),
        "lengths" => lengths(),
        "splits" => splits(),
        "odd-message" => odd_message(),
        "timeout" => timeout(),
        "dies" => deaths::rank(),
        "killed" => killed(),
        "again" => again(),
        "settings" => settings(),
        "shared" => shared(),
        "threads" => threads(),
        "shared or not" => shared_or_not(|world, data| world.all_reduce(data, ReduceOp::Sum)),
        "scattered, shared or not" => shared_or_not(|world, data| {
            let mut own = vec![0f32; data.len() / world.size()];
            world.reduce_scatter(&data[..own.len() * world.size()], &mut own, ReduceOp::Sum)
        }),
        "moved, shared or not" => moved_shared_or_not(),
        "told" => told(),
        other => panic!("no role {other}"),
    }
    println!("{PLAYED}");
}

fn value(rank: usize, i: usize) -> f32 {
    (i % 13) as f32 * 3.0 + rank as f32 + 1.0
}

fn collectives() {
    let world = World::init().unwrap();
    let (n, me) = (world.size(), world.rank());
    for count in [1usize, 1000, 300_000] {
        let mut a: Vec<f32> = (0..count).map(|i| value(me, i)).collect();
        world.all_reduce(&mut a, ReduceOp::Sum).unwrap();
        let sum = |i: usize| (0..n).map(|r| value(r, i)).sum::<f32>();
        assert!(a.iter().enumerate().all(|(i, &v)| v == sum(i)), "all_reduce");

        let input: Vec<f32> = (0..count * n).map(|i| value(me, i)).collect();
        let mut own = vec![0f32; count];
        world.reduce_scatter(&input, &mut own, ReduceOp::Sum).unwrap();
        assert!(own.iter().enumerate().all(|(i, &v)| v == sum(me * count + i)), "reduce_scatter");

        let mut all = vec![0f32; count * n];
        world.all_gather(&own, &mut all).unwrap();
        assert!(all.iter().enumerate().all(|(i, &v)| v == sum(i)), "all_gather");

        let mut out = vec![0f32; count * n];
        world.all_to_all(&input, &mut out).unwrap();
        let want = |k: usize| value(k / count, me * count + k % count);
        assert!((0..n * count).all(|k| out[k] == want(k)), "all_to_all");

        let mut b: Vec<f32> = (0..count).map(|i| value(me, i)).collect();
        world.broadcast(&mut b, n - 1).unwrap();
        assert!(b.iter().enumerate().all(|(i, &v)| v == value(n - 1, i)), "broadcast");
        world.reduce(&mut b, 0, ReduceOp::Max).unwrap();

        let mut at_root = vec![0f32; if me == 1 { n * count } else { 0 }];
        world.gather(&b, (me == 1).then_some(&mut at_root[..]), 1).unwrap();
        world.scatter((me == 1).then_some(&at_root[..]), &mut a, 1).unwrap();
        assert_eq!(a, b, "gather then scatter");

        std::thread::scope(|scope| {
            scope.spawn(|| world.send(&a, (me + 1) % n, 5).unwrap());
            world.recv(&mut b, (me + n - 1) % n, 5).unwrap();
        });
        world.barrier().unwrap();
    }
    println!("done by {}", world.describe());
}

#[test]
fn every_collective_on_one_node_and_on_several() {
    for nodes in [&[3][..], &[1, 1], &[2, 2], &[2, 1]] {
        let outputs = good_job("collectives", nodes, &[]);
        let over = if nodes.len() > 1 { "between nodes" } else { "1 node" };
        assert!(outputs.iter().all(|o| o.contains(over)), "{outputs:?}");
    }
}

#[test]
fn tagged_messages_do_the_same() {
    let outputs = good_job("collectives", &[2, 1], &[("SMDDP_FABRIC_MODE", "tagged")]);
    assert!(outputs[0].contains("tagged"), "{}", outputs[0]);
}

#[allow(clippy::mut_from_ref, reason = "memory that peers write to as well")]
fn floats(memory: &SharedMemory) -> &mut [f32] {
    let region = memory.region();
    // SAFETY: mapped as long as `memory` lives; the one slice at a time that the tests use.
    unsafe { std::slice::from_raw_parts_mut(region.as_ptr().cast(), region.len() / 4) }
}

/// Every other collective that reads `data`, beside the same call on ordinary memory.
fn others_in_shared_memory(world: &World, data: &mut [f32], one_node: bool) {
    let (n, me) = (world.size(), world.rank());
    let fill = |data: &mut [f32], salt| {
        data.iter_mut().enumerate().for_each(|(i, x)| *x = value(me, i + salt) * 0.7);
    };
    let is_shared = || assert_eq!(world.last_algorithm() == "shared", one_node);
    let same = |a: &[f32], b: &[f32], what| {
        assert!(a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits()), "other bits by {what}");
    };
    fill(data, 1);
    let mut ordinary = data.to_vec();
    world.broadcast(data, n - 1).unwrap();
    is_shared();
    world.broadcast(&mut ordinary, n - 1).unwrap();
    same(data, &ordinary, "broadcast");

    fill(data, 2);
    ordinary.copy_from_slice(data);
    world.reduce(data, 0, ReduceOp::Avg).unwrap();
    is_shared();
    let before = ordinary.clone();
    world.reduce(&mut ordinary, 0, ReduceOp::Avg).unwrap();
    same(data, if me == 0 { &ordinary } else { &before }, "reduce");

    let whole = data.len() / n * n;
    let (input, plain) = (&mut data[..whole], &mut before.clone()[..whole]);
    fill(input, 3);
    plain.copy_from_slice(input);
    let (mut a, mut b) = (vec![0f32; whole / n], vec![1f32; whole / n]);
    world.reduce_scatter(input, &mut a, ReduceOp::Sum).unwrap();
    is_shared();
    world.reduce_scatter(plain, &mut b, ReduceOp::Sum).unwrap();
    same(&a, &b, "reduce_scatter");
    let (mut a, mut b) = (vec![0f32; whole * n], vec![1f32; whole * n]);
    world.all_to_all(input, &mut a[..whole]).unwrap();
    is_shared();
    world.all_to_all(plain, &mut b[..whole]).unwrap();
    same(&a[..whole], &b[..whole], "all_to_all");
    world.all_gather(input, &mut a).unwrap();
    is_shared();
    world.all_gather(plain, &mut b).unwrap();
    same(&a, &b, "all_gather");
    b.fill(0.5);
    world.gather(input, (me == 0).then_some(&mut b[..]), 0).unwrap();
    is_shared();
    if me == 0 {
        same(&b, &a, "gather");
    }
    same(input, plain, "what leaves its input as it is");
}

fn shared() {
    let world = World::init().unwrap();
    let (n, me) = (world.size(), world.rank());
    let one_node = world.shape().node_count() == 1;
    for count in [100_000, 5_000, 1_000_003] {
        let memory = SharedMemory::new(&world, 4 * count + 4 * me).unwrap();
        assert!(memory.is_shared(), "{:?}", memory.why_not());
        let data = &mut floats(&memory)[me..];
        for round in 0..3 {
            data.iter_mut().enumerate().for_each(|(i, x)| *x = value(me, i + round) * 0.3);
            let mut ordinary = data.to_vec();
            world.all_reduce(data, ReduceOp::Avg).unwrap();
            assert_eq!(world.last_algorithm() == "shared", one_node);
            world.all_reduce(&mut ordinary, ReduceOp::Avg).unwrap();
            assert_ne!(world.last_algorithm(), "shared");
            assert!(data.iter().zip(&ordinary).all(|(a, b)| a.to_bits() == b.to_bits()), "other bits");
        }
        others_in_shared_memory(&world, data, one_node);
        // A call too small to pay takes it as any memory.
        world.all_reduce(&mut data[..100], ReduceOp::Sum).unwrap();
        assert_ne!(world.last_algorithm(), "shared");
    }
    // What has left is ordinary memory again, whatever comes to lie at its address.
    let mut after = vec![1f32; 100_000];
    world.all_reduce(&mut after, ReduceOp::Sum).unwrap();
    assert_ne!(world.last_algorithm(), "shared");
    assert!(after.iter().all(|&x| x == n as f32));
    // SAFETY: there is no memory.
    assert!(unsafe { SharedMemory::over(&world, None) }.unwrap().is_none());
}

#[test]
fn shared_memory_gives_the_same_bits() {
    // Nobody to share with.
    good_job("shared or not", &[1], &[]);
    for nodes in [&[2][..], &[4], &[2, 1], &[2, 2], &[1, 1]] {
        good_job("shared", nodes, &[]);
    }
    // Rounds of a size that somebody has set.
    good_job("shared", &[2], &[("SMDDP_CHUNK", "20K")]);
    good_job("shared", &[2, 2], &[("SMDDP_CHUNK", "20K")]);
}

/// A large all_reduce in shared memory; says how many threads for reductions there are then.
fn threads() {
    let world = World::init().unwrap();
    let (n, me) = (world.size(), world.rank());
    let count = (9 << 20) / 4 + 5;
    let memory = SharedMemory::new(&world, count * 4).unwrap();
    let data = floats(&memory);
    for (i, x) in data.iter_mut().enumerate() {
        *x = value(me, i);
    }
    world.all_reduce(data, ReduceOp::Sum).unwrap();
    assert!(data.iter().enumerate().all(|(i, &v)| v == (0..n).map(|r| value(r, i)).sum::<f32>()));
    let names = std::fs::read_dir("/proc/self/task")
        .unwrap()
        .filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).ok());
    println!("helpers={}", names.filter(|name| name.starts_with("smddp-reduce")).count());
    world.shutdown();
}

#[test]
fn large_reductions_in_shared_memory_use_the_cores_of_a_rank() {
    for nodes in [&[2], &[3]] {
        for threads in ["1", "3"] {
            let outputs = good_job("threads", nodes, &[("SMDDP_REDUCE_THREADS", threads)]);
            let helpers = threads.parse::<u64>().unwrap() - 1;
            outputs.iter().for_each(|o| assert_eq!(figure(o, "helpers"), helpers, "{nodes:?}"));
        }
    }
}

fn shared_or_not(call: fn(&World, &mut [f32]) -> smddp::Result<()>) {
    let world = World::init().unwrap();
    let memory = match SharedMemory::new(&world, 1 << 20) {
        Ok(memory) => memory,
        // A rank that has shared its memory already goes on, and its failure reaches those that have not.
        Err(error) => return println!("error={error}"),
    };
    let data = floats(&memory);
    if world.size() == 1 {
        assert!(!memory.is_shared() && memory.why_not().unwrap().contains("several ranks"));
        return call(&world, data).unwrap();
    }
    let mut plain = vec![0f32; data.len()];
    let given = if world.rank() == 0 { data } else { &mut plain };
    let error = call(&world, given).unwrap_err();
    println!("error={error}");
}

#[test]
fn one_rank_in_shared_memory_and_one_not_are_told() {
    for output in good_job("shared or not", &[2], &[]) {
        assert!(output.contains("ranks disagree") && output.contains("in shared memory"), "{output}");
    }
    // Over several nodes the algorithm's name does not show that shared memory is used; this does.
    for role in ["shared or not", "scattered, shared or not"] {
        for nodes in [&[2, 1][..], &[2, 2]] {
            for output in good_job(role, nodes, &[]) {
                assert!(output.contains("in shared memory"), "{role} on {nodes:?}: {output}");
            }
        }
    }
}

/// Broadcasts and gathers of several nodes take shared memory as any other: it need not be shared on all ranks.
fn moved_shared_or_not() {
    let world = World::init().unwrap();
    let (n, me) = (world.size(), world.rank());
    let memory = SharedMemory::new(&world, 1 << 20).unwrap();
    let mut plain = vec![0f32; (1 << 20) / 4];
    let given = if me == 0 { floats(&memory) } else { &mut plain };
    for root in [0, n - 1] {
        given.fill(me as f32);
        world.broadcast(given, root).unwrap();
        assert!(given.iter().all(|&x| x == root as f32));
    }
    given.fill(me as f32);
    let mut all = vec![-1f32; n * given.len()];
    world.all_gather(given, &mut all).unwrap();
    assert!(all.chunks(given.len()).enumerate().all(|(rank, part)| part.iter().all(|&x| x == rank as f32)));
}

#[test]
fn what_several_nodes_move_may_be_shared_on_one_rank_alone() {
    for nodes in [&[2, 1][..], &[2, 2]] {
        good_job("moved, shared or not", nodes, &[]);
    }
}

/// Says what the first group and one after it are like.
fn told() {
    let world = World::init().unwrap();
    let all: Vec<usize> = (0..world.size()).collect();
    let later = world.new_group(&all).unwrap().unwrap();
    println!("first: {}\nlater: {}", world.describe(), later.describe());
}

/// The rest of the line behind `name`.
fn words<'a>(output: &'a str, name: &str) -> &'a str {
    let (_, after) = output.split_once(name).unwrap_or_else(|| panic!("no {name} in {output}"));
    after.lines().next().unwrap_or_default()
}

#[test]
fn slots_are_as_set_until_groups_have_too_many() {
    // Together more than a rank's groups may have.
    let large = [("SMDDP_SHM_SLOT", "4M"), ("SMDDP_SHM_SLOTS", "3")];
    let small = [("SMDDP_SHM_SLOT", "8K"), ("SMDDP_SHM_SLOTS", "5")];
    for (settings, first, later) in
        [(large, "3 slots of 4096 KiB", "3 slots of 64 KiB"), (small, "5 slots of 8 KiB", "5 slots of 8 KiB")]
    {
        for output in good_job("told", &[2], &settings) {
            assert!(words(&output, "first:").contains(first), "{output}");
            assert!(words(&output, "later:").contains(later), "{output}");
        }
    }
}

#[test]
fn kernels_and_log_are_as_set() {
    let fastest = Variant::available().last().unwrap().name();
    for (simd, kernels) in [("portable", "portable"), ("auto", fastest)] {
        for (log, is_told) in [("info", true), ("error", false)] {
            let output = good_job("told", &[1], &[("SMDDP_SIMD", simd), ("SMDDP_LOG", log)]).concat();
            assert!(words(&output, "first:").ends_with(&format!(" {kernels} kernels")), "{output}");
            // That a group was made.
            assert_eq!(output.contains("INFO"), is_told, "{log}: {output}");
        }
    }
}

fn bits() {
    let world = World::init().unwrap();
    let mut state = world.rank() as u64 + 1;
    let mut hash = 0xcbf29ce484222325u64;
    for count in [7usize, 5000, 700_000] {
        let random = |state: &mut u64| {
            *state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (*state >> 40) as f32 / 1e5 - 80.0
        };
        let mut a: Vec<f32> = (0..count).map(|_| random(&mut state)).collect();
        world.all_reduce(&mut a, ReduceOp::Avg).unwrap();
        for v in a {
            hash = (hash ^ u64::from(v.to_bits())).wrapping_mul(0x100000001b3);
        }
    }
    println!("hash={hash}");
}

#[test]
fn same_bits_on_every_rank_and_every_run() {
    let run = || -> Vec<u64> { good_job("bits", &[2, 2], &[]).iter().map(|o| figure(o, "hash")).collect() };
    let (first, second) = (run(), run());
    assert!(first.iter().all(|h| *h == first[0]), "{first:?}");
    assert_eq!(first, second);
}

fn groups() {
    let world = World::init().unwrap();
    let me = world.rank();
    let even = world.new_group(&[2, 0]).unwrap();
    let all = world.new_group(&[3, 2, 1, 0]).unwrap().unwrap();
    assert_eq!(even.is_some(), me.is_multiple_of(2));
    if let Some(group) = &even {
        let mut a = [me as i64];
        group.all_reduce(&mut a, ReduceOp::Sum).unwrap();
        assert_eq!((a[0], group.rank()), (2, 1 - me / 2));
    }
    let mut order = vec![0i32; 4];
    all.all_gather(&[me as i32], &mut order).unwrap();
    assert_eq!(order, [3, 2, 1, 0]);
    assert!(world.new_group(&[0, 0]).is_err() && world.new_group(&[9]).is_err());
}

#[test]
fn groups_of_some_ranks_in_any_order() {
    good_job("groups", &[2, 2], &[]);
}

fn mismatch() {
    let world = World::init().unwrap();
    let mut a = vec![1f32; 10 + world.rank() / 2];
    let error = world.all_reduce(&mut a, ReduceOp::Sum).unwrap_err();
    println!("said: {error}");
}

#[test]
fn ranks_that_call_different_things_are_told_which() {
    for nodes in [&[1usize, 1, 1][..], &[3], &[2, 2]] {
        let text = good_job("mismatch", nodes, &[]).concat();
        assert!(text.contains("float32[10]") && text.contains("float32[11]"), "{nodes:?}: {text}");
    }
}

/// The lengths of all blocks, which each rank gives on its own.
fn lengths() {
    let world = World::init().unwrap();
    let counts = [8, if world.rank() == 0 { 16 } else { 4096 }];
    let (mut input, mut output) = (vec![1u8; counts[world.rank()]], vec![0u8; counts.iter().sum()]);
    // SAFETY: the vectors outlive the call.
    let error = unsafe {
        let (from, to) = (Region::of(&mut input), Region::of(&mut output));
        let request = Request::new(Collective::AllGather, DType::U8, 0, from, to);
        world.run(&Request { counts: Some(counts.into()), ..request }).unwrap_err()
    };
    println!("said: {error}");
}

/// The first block fits into a slot's header on one side and not on the other.
#[test]
fn ranks_that_give_other_lengths_are_told_so() {
    for nodes in [&[2usize][..], &[1, 1]] {
        let text = good_job("lengths", nodes, &[]).concat();
        assert!(text.contains("uneven, lengths #"), "{nodes:?}: {text}");
    }
}

/// One rank says how its blocks are split, as all must or none; that they are equal does not matter.
fn splits() {
    let world = World::init().unwrap();
    world.set_timeout(Duration::from_secs(10));
    let (input, mut output) = ([1f32; 4], [0f32; 4]);
    let result = match world.rank() {
        0 => world.all_to_all(&input, &mut output),
        _ => world.all_to_all_uneven(&input, &[2, 2], &mut output, &[2, 2]),
    };
    println!("said: {}", result.unwrap_err());
}

#[test]
fn ranks_of_which_one_splits_its_blocks_are_told_so() {
    for nodes in [&[2usize][..], &[1, 1]] {
        let outputs = good_job("splits", nodes, &[]);
        let told =
            |o: &String| o.contains("all_to_all(float32[2])") && o.contains("all_to_all(float32, uneven)");
        assert!(outputs.iter().all(told), "{nodes:?}: {outputs:?}");
    }
}

/// Rank 0 waits for messages of both others, of which one is shorter than it should be, and in a collective.
fn odd_message() {
    let world = World::init().unwrap();
    if world.rank() > 0 {
        if world.rank() == 2 {
            world.send(&[1f32; 4], 0, 0).unwrap();
        }
        return println!("said: {}", world.recv(&mut [0f32], 0, 9).unwrap_err());
    }
    let (mut first, mut second, mut sum) = ([0f32; 4], [0f32; 8], [0f32; 8]);
    // SAFETY: all outlive the work on them.
    let regions = unsafe { (Region::of(&mut first), Region::of(&mut second), Region::of(&mut sum)) };
    // SAFETY: as above.
    let handles = unsafe {
        [
            world.start_recv(1, 0, DType::F32, regions.0).unwrap(),
            world.start(&Request::new(Collective::AllReduce, DType::F32, 8, regions.2, regions.2)).unwrap(),
            world.start_recv(2, 0, DType::F32, regions.1).unwrap(),
        ]
    };
    let [first, running, second] = handles.map(|handle| handle.wait(None).unwrap_err());
    assert!(matches!(&second, Error::Mismatch { peer: 2, .. }), "{second}");
    assert!(second.to_string().contains("operation send/recv(float32[8])"), "{second}");
    for other in [first, running] {
        assert!(matches!(&other, Error::Aborted { .. }), "{other}");
        assert!(other.to_string().contains("the group failed before"), "{other}");
    }
    println!("said: {second}");
}

#[test]
fn the_message_that_differs_gets_the_mismatch() {
    for output in good_job("odd-message", &[3], &[]) {
        assert!(output.contains("float32[4]"), "{output}");
    }
}

fn timeout() {
    let world = World::init().unwrap();
    world.set_timeout(Duration::from_millis(500));
    if world.rank() == 2 {
        // It is there, and does not call before the others have given up.
        let until = Instant::now() + LIMIT;
        while world.failure().is_none() {
            assert!(Instant::now() < until, "nobody gave up");
            std::thread::sleep(Duration::from_millis(10));
        }
    } else {
        let error = world.all_reduce(&mut vec![1f32; 100_000], ReduceOp::Sum).unwrap_err();
        println!("said: {error}");
    }
}

#[test]
fn a_rank_that_does_not_come_is_named() {
    for nodes in [&[3usize][..], &[1, 1, 1]] {
        let outputs = good_job("timeout", nodes, &[]);
        let named = |o: &&String| {
            let waits = o.split("waiting for rank").nth(1).unwrap_or_default();
            o.contains("timeout after") && waits.split(".").next().unwrap_or_default().contains("2")
        };
        assert!(outputs[..2].iter().any(|o| named(&o)), "{outputs:?}");
        assert!(outputs[..2].iter().all(|o| o.contains("said:")), "{outputs:?}");
    }
}

fn killed() {
    let world = World::init().unwrap();
    world.barrier().unwrap();
    if world.rank() == 1 {
        std::process::abort();
    }
    let error = loop {
        if let Err(error) = world.all_reduce(&mut vec![1f32; 10_000], ReduceOp::Sum) {
            break error;
        }
    };
    // Not a timeout: nobody has to wait for the limit.
    assert!(matches!(error, Error::PeerLost { .. } | Error::Aborted { .. }), "{error}");
    println!("said: {error}");
}

#[test]
fn a_rank_that_dies_is_named() {
    for nodes in [&[3usize][..], &[1, 1, 1]] {
        let ends = job("killed", nodes, &[]);
        for end in ends.iter().filter(|e| e.rank != 1) {
            assert_eq!(end.code, Some(0), "rank {} on {nodes:?}:\n{}", end.rank, end.output);
            assert!(end.output.contains("rank 1"), "{nodes:?}: {}", end.output);
        }
        assert_eq!(ends[1].code, None);
    }
}

fn again() {
    for round in 1..=3 {
        let port: u16 = std::env::var("MASTER_PORT").unwrap().parse().unwrap();
        // SAFETY: no other thread of this process runs now.
        unsafe { std::env::set_var("MASTER_PORT", (port + round * 10).to_string()) };
        let world = World::init().unwrap();
        let mut a = [1f32];
        world.all_reduce(&mut a, ReduceOp::Sum).unwrap();
        assert_eq!(a[0], world.size() as f32);
        drop(world);
    }
}

#[test]
fn a_process_can_join_leave_and_join_again() {
    good_job("again", &[1, 1], &[]);
}

fn settings() {
    let mut settings = Settings::from_env().unwrap();
    if std::env::var("RANK").unwrap() == "1" {
        settings.set("SMDDP_CHUNK", "64K").unwrap();
    }
    let error = World::init_with(settings, &[]).err().unwrap();
    assert!(matches!(error, Error::Setting { .. }), "{error}");
    println!("said: {error}");
}

#[test]
fn settings_that_must_agree_are_compared() {
    let outputs = good_job("settings", &[2], &[]);
    assert!(outputs.iter().all(|o| o.contains("SMDDP_CHUNK")), "{outputs:?}");
}
