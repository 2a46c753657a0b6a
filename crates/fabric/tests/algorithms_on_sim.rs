//! Every algorithm of every collective over the simulated network: the interpreter and the message layer as they are,
//! under seeded delays, reordering, full queues and both registration schemes; then with losses and dead endpoints.
//!
//! All ranks live in one thread and are polled in turn, so a seed gives one history.

#![allow(clippy::unwrap_used)]

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use smddp_core::engine::execution::Route;
use smddp_core::engine::graph::Ready;
use smddp_core::engine::group::{Group, Seat};
use smddp_core::engine::op::{GroupKey, OpState, PointToPoint, Work};
use smddp_core::engine::staging::Staging;
use smddp_core::memory::Owner;
use smddp_core::plan::{CallShape, Override, Tuning, candidates, schedule};
use smddp_core::settings::Settings;
use smddp_core::testing::MemoryNode;
use smddp_core::transport::{Ctx, Fabric, Message, MsgKey, NodeLocal};
use smddp_core::{Call, Collective, DType, Error, GroupShape, ReduceOp, Region};
use smddp_fabric::FabricEndpoint;
use smddp_fabric::sim::{SimConfig, SimDomain, SimNet};

/// One rank: all that a process would have, without a thread.
struct Rank {
    group: Group<MemoryNode>,
    fabric: FabricEndpoint<SimDomain>,
    staging: Staging,
}

impl Rank {
    fn key(&self) -> GroupKey {
        GroupKey { index: 0, id: self.group.seat.id }
    }

    /// Polls once and looks around, as the engine does.
    fn turn(&mut self) {
        let (mut done, mut finished) = (Vec::new(), Vec::new());
        let mut result = self.group.seat.local.poll(&mut done).map(|_| ());
        if let Err(failure) = self.fabric.poll(&mut done) {
            result = result.and(Err(failure.error));
        }
        for ctx in done {
            result = result.and(self.group.complete(ctx, &mut finished));
        }
        let result = result.and_then(|()| {
            self.group.advance(Some(&mut self.fabric), &mut self.staging, &mut finished)?;
            self.group.lost_peer(Some(&mut self.fabric)).map_or(Ok(()), Err)
        });
        if let Err(error) = result {
            self.group.fail(&error, None, Some(&mut self.fabric), &mut self.staging, &mut finished);
        }
    }
}

struct Job {
    net: SimNet,
    shape: Arc<GroupShape>,
    ranks: Vec<Rank>,
    tuning: Tuning,
}

/// A rank's buffers of one call.
struct Data {
    input: Vec<i64>,
    output: Vec<i64>,
}

const STEPS: usize = 300_000;

impl Job {
    fn new(shape: &GroupShape, config: SimConfig, tuning: Tuning) -> Job {
        let net = SimNet::new(config);
        let shape = Arc::new(shape.clone());
        let mut settings = Settings::default();
        // Small limits, so that small data takes every path.
        settings.set("SMDDP_EAGER", "64").unwrap();
        settings.set("SMDDP_STRIPE", "4096").unwrap();
        let mut fabrics: Vec<_> = (0..shape.size())
            .map(|_| FabricEndpoint::over(vec![net.domain(), net.domain()], &settings).unwrap())
            .collect();
        let addresses: Vec<Vec<u8>> = fabrics.iter().map(Fabric::address).collect();
        let mut nodes: Vec<Vec<Option<MemoryNode>>> = (0..shape.node_count())
            .map(|n| MemoryNode::new(shape.ranks_on(n).len(), config.seed).into_iter().map(Some).collect())
            .collect();
        let mut ranks = Vec::new();
        for (rank, mut fabric) in fabrics.drain(..).enumerate() {
            let mut staging = Staging::new(1 << 16);
            fabric.register(staging.whole().unwrap(), Owner::Host).unwrap();
            let mut route = |to: usize| {
                if shape.same_node(rank, to) {
                    return Route::Local(shape.local_of(to) as u32);
                }
                Route::Fabric(fabric.connect(&addresses[to], &format!("rank {to}")).unwrap())
            };
            let routes = (0..shape.size()).map(&mut route).collect();
            let local = nodes[shape.node_of(rank)][shape.local_of(rank)].take().unwrap();
            let seat = Seat { id: 9, name: "sim".into(), rank, shape: Arc::clone(&shape), local, routes };
            ranks.push(Rank { group: Group::new(0, seat), fabric, staging });
        }
        Job { net, shape, ranks, tuning }
    }

    fn start(&mut self, call: Call, data: &mut [Data]) -> Vec<Arc<OpState>> {
        let key = CallShape {
            root: call.root as usize,
            ..CallShape::new(call.collective, call.dtype.size(), call.count as usize)
        };
        let mut ops = Vec::new();
        for (rank, (r, d)) in self.ranks.iter_mut().zip(data).enumerate() {
            let schedule = schedule(&self.shape, rank, &key, &self.tuning).unwrap();
            // SAFETY: the data outlives the operations: it is dropped after `finish`, or after the job.
            let output = unsafe { Region::of(&mut d.output) };
            // SAFETY: as above.
            let input = if d.input.is_empty() { output } else { unsafe { Region::of(&mut d.input) } };
            let ready = Arc::new(Ready::new(schedule, false));
            let work = Work::Collective { ready, input, output, far: None };
            let group = r.key();
            let op = Arc::new(OpState::new(call, work, group, "sim".into(), rank, Duration::from_secs(3600)));
            r.group.start(Arc::clone(&op), Some(&mut r.fabric), &mut Vec::new()).unwrap();
            ops.push(op);
        }
        ops
    }

    /// Begins a receive from any rank.
    fn receive_any(&mut self, rank: usize, into: &mut [u8]) -> Arc<OpState> {
        // SAFETY: the data outlives the operation, as in `start`.
        let region = unsafe { Region::of(into) };
        let work = Work::ReceiveAny { tag: 3, region, numbers: Arc::default(), source: OnceLock::new() };
        let call = Call::new(Collective::SendRecv, DType::U8, region.len() as u64);
        let group = self.ranks[rank].key();
        let op = Arc::new(OpState::new(call, work, group, "sim".into(), rank, Duration::from_secs(3600)));
        let r = &mut self.ranks[rank];
        r.group.start(Arc::clone(&op), Some(&mut r.fabric), &mut Vec::new()).unwrap();
        op
    }

    fn turn(&mut self) {
        self.ranks.iter_mut().for_each(Rank::turn);
    }

    /// Compares what the endpoints say of their traffic with what the network has seen.
    fn traffic_is_what_was_carried(&mut self) {
        // A sender may not know yet that its last piece has arrived.
        (0..1000).for_each(|_| self.turn());
        // Two rails an endpoint.
        let ends = 2 * self.ranks.len();
        for (rank, r) in self.ranks.iter().enumerate() {
            let [out, back]: [u64; 2] = [false, true].map(|back| {
                let pairs = (0..ends).flat_map(|there| [(2 * rank, there), (2 * rank + 1, there)]);
                pairs.map(|(a, b)| if back { self.net.carried(b, a) } else { self.net.carried(a, b) }).sum()
            });
            let traffic = r.fabric.traffic();
            let [sent, received] = [traffic.iter().map(|t| t.1).sum(), traffic.iter().map(|t| t.2).sum()];
            assert_eq!((sent, received), (out, back), "rank {rank} of {}", self.shape);
        }
    }

    /// Polls until all of `ops` are done; false when that takes too long.
    fn finish(&mut self, ops: &[Arc<OpState>]) -> bool {
        for _ in 0..STEPS {
            if ops.iter().all(|o| o.is_done()) {
                return true;
            }
            self.turn();
        }
        false
    }
}

fn value(rank: usize, i: usize) -> i64 {
    (i as i64 * 7 + 3) % 101 + 1000 * rank as i64
}

/// Buffers before the call, and what every rank's output must be after it.
fn case(collective: Collective, n: usize, count: usize, root: usize) -> (Vec<Data>, Vec<Vec<i64>>) {
    let own = |r: usize, k: usize| -> Vec<i64> { (0..k).map(|i| value(r, i)).collect() };
    let sum = |i: usize| (0..n).map(|r| value(r, i)).sum::<i64>();
    let at_root = |r: usize, k: usize| if r == root { k } else { 0 };
    let blocks = |f: &dyn Fn(usize, usize) -> i64| -> Vec<i64> {
        (0..n * count).map(|k| f(k / count, k % count)).collect()
    };
    let make = |r: usize| -> (Data, Vec<i64>) {
        let in_place = |want: Vec<i64>| (Data { input: vec![], output: own(r, count) }, want);
        let apart = |input: Vec<i64>, want: Vec<i64>| (Data { input, output: vec![-1; want.len()] }, want);
        match collective {
            Collective::AllReduce => in_place((0..count).map(sum).collect()),
            Collective::Reduce if r == root => in_place((0..count).map(sum).collect()),
            Collective::Reduce => in_place(own(r, count)),
            Collective::Broadcast => in_place(own(root, count)),
            Collective::ReduceScatter => {
                apart(own(r, n * count), (0..count).map(|i| sum(r * count + i)).collect())
            }
            Collective::AllGather => apart(own(r, count), blocks(&value)),
            Collective::AllToAll => apart(own(r, n * count), blocks(&|from, i| value(from, r * count + i))),
            Collective::Gather if r == root => apart(own(r, count), blocks(&value)),
            Collective::Gather => apart(own(r, count), vec![]),
            Collective::Scatter => {
                let want = (0..count).map(|i| value(root, r * count + i)).collect();
                apart(own(r, at_root(r, n * count)), want)
            }
            Collective::Barrier | Collective::SendRecv => (Data { input: vec![], output: vec![] }, vec![]),
        }
    };
    (0..n).map(make).unzip()
}

fn tuning(collective: Collective, algorithm: &'static str) -> Tuning {
    let overrides = vec![Override { collective, from: 0, to: usize::MAX, algorithm }];
    Tuning { chunk: 256, staging: 1 << 16, overrides, ..Tuning::default() }
}

fn networks(seed: u64) -> [SimConfig; 4] {
    let plain = SimConfig { seed, max_delay: 12, ..SimConfig::default() };
    [
        plain,
        SimConfig { needs_local_mr: true, virt_addr: true, prov_key: true, depth: 3, moody: 200, ..plain },
        SimConfig { rma: false, depth: 4, ..plain },
        SimConfig { early_completion: true, max_delay: 40, ..plain },
    ]
}

#[test]
fn every_algorithm_gives_the_result_on_every_network() {
    let shapes = [
        GroupShape::even(2, 1),
        GroupShape::even(2, 2),
        GroupShape::even(3, 1),
        GroupShape::even(5, 1),
        GroupShape::uneven(&[3, 1, 2]),
    ];
    let mut ran = 0;
    for (s, shape) in shapes.iter().enumerate() {
        for collective in Collective::PLANNED {
            for algorithm in candidates(collective, shape.node_count()) {
                for config in networks(s as u64) {
                    let mut job = Job::new(shape, config, tuning(collective, algorithm));
                    for (k, count) in [1usize, 90, 0, 200].into_iter().enumerate() {
                        let root = k % shape.size();
                        let (mut data, want) = case(collective, shape.size(), count, root);
                        let call =
                            Call { root: root as u32, ..Call::new(collective, DType::I64, count as u64) };
                        let ops = job.start(call, &mut data);
                        let place =
                            format!("{collective} by {algorithm} on {shape}, {count} elements, {config:?}");
                        assert!(job.finish(&ops), "{place}: did not end");
                        for (rank, (op, (d, w))) in ops.iter().zip(data.iter().zip(&want)).enumerate() {
                            assert_eq!(op.result(), Some(&Ok(())), "{place}, rank {rank}");
                            assert_eq!(&d.output, w, "{place}, rank {rank}");
                        }
                        ran += 1;
                    }
                    job.traffic_is_what_was_carried();
                }
            }
        }
    }
    assert!(ran > 500, "{ran}");
}

#[test]
fn calls_in_flight_do_not_mix() {
    let shape = GroupShape::even(3, 2);
    for config in networks(77) {
        let mut job = Job::new(&shape, config, tuning(Collective::AllReduce, "sharded"));
        let mut cases: Vec<_> = (0..6).map(|k| case(Collective::AllReduce, 6, 20 + k, 0)).collect();
        let mut ops = Vec::new();
        for (data, want) in &mut cases {
            let call = Call {
                op: ReduceOp::Sum,
                ..Call::new(Collective::AllReduce, DType::I64, want[0].len() as u64)
            };
            ops.extend(job.start(call, data));
        }
        assert!(job.finish(&ops));
        assert!(cases.iter().all(|(data, want)| data.iter().zip(want).all(|(d, w)| &d.output == w)));
    }
}

#[test]
fn a_lost_message_leaves_the_call_waiting_for_its_sender() {
    let mut stalled = 0;
    for lost in (0..40).step_by(3) {
        let config = SimConfig { seed: lost, ..SimConfig::default() };
        let mut job = Job::new(&GroupShape::even(3, 1), config, tuning(Collective::AllReduce, "ring"));
        job.net.lose(lost);
        // Ranks of one thread cannot settle with one another while one of them withdraws: let that limit be near.
        job.net.pace(Duration::from_micros(100));
        let (mut data, _) = case(Collective::AllReduce, 3, 200, 0);
        let ops = job.start(Call::new(Collective::AllReduce, DType::I64, 200), &mut data);
        for _ in 0..3000 {
            job.turn();
        }
        if ops.iter().all(|o| o.is_done()) {
            continue;
        }
        stalled += 1;
        let waits = |r: &Rank| !r.group.missing(Some(&r.fabric)).is_empty();
        assert!(job.ranks.iter().zip(&ops).any(|(r, o)| !o.is_done() && waits(r)), "message {lost}");
        // The engine's time limit ends it on one rank; the others hear of it. Withdrawing waits for the peers to let go of
        // the memory, so they must go on meanwhile.
        let error = ops[0].timeout_error(vec![1]);
        let (first, others) = job.ranks.split_at_mut(1);
        std::thread::scope(|scope| {
            let r = &mut first[0];
            let failing = scope
                .spawn(|| r.group.fail(&error, None, Some(&mut r.fabric), &mut r.staging, &mut Vec::new()));
            while !failing.is_finished() {
                others.iter_mut().for_each(Rank::turn);
            }
        });
        let ended = job.finish(&ops);
        let states: Vec<_> = ops.iter().map(|o| o.result()).collect();
        let waits: Vec<_> = job.ranks.iter().map(|r| r.group.missing(Some(&r.fabric))).collect();
        assert!(
            ended,
            "message {lost}: not every rank heard of the time limit: {states:?}, waiting {waits:?}"
        );
    }
    assert!(stalled > 7, "only {stalled} losses mattered");
}

#[test]
fn a_dead_endpoint_ends_the_call_on_every_survivor() {
    for step in (10..400).step_by(23) {
        let config = SimConfig { seed: step, ..SimConfig::default() };
        let mut job = Job::new(&GroupShape::even(4, 1), config, tuning(Collective::AllReduce, "sharded"));
        // Two rails an endpoint: 4 and 5 belong to rank 2.
        job.net.kill_at(job.net.step() + step, 4);
        let (mut data, want) = case(Collective::AllReduce, 4, 2000, 0);
        let ops = job.start(Call::new(Collective::AllReduce, DType::I64, 2000), &mut data);
        assert!(job.finish(&ops), "death at step {step}: somebody waits for ever");
        for (rank, op) in ops.iter().enumerate().filter(|(rank, _)| *rank != 2) {
            match op.result() {
                Some(Ok(())) => assert_eq!(data[rank].output, want[rank], "death at step {step}"),
                Some(Err(error)) => {
                    let named = matches!(error, Error::PeerLost { .. } | Error::Aborted { .. });
                    assert!(named && error.to_string().contains("rank 2"), "death at step {step}: {error}");
                }
                None => unreachable!("finished above"),
            }
        }
    }
}

/// Nothing was ever posted in the group that a receive from any rank waits in.
#[test]
fn a_receive_from_any_rank_hears_of_an_abort() {
    let mut job = Job::new(&GroupShape::even(2, 1), SimConfig::default(), Tuning::default());
    let mut data = [0u8; 4];
    let op = job.receive_any(0, &mut data);
    hears_of_an_abort(&mut job, &op, 1);
}

fn hears_of_an_abort(job: &mut Job, op: &Arc<OpState>, by: usize) {
    let r = &mut job.ranks[by];
    let why = Error::Internal("out of paper".to_owned());
    r.group.fail(&why, None, Some(&mut r.fabric), &mut r.staging, &mut Vec::new());
    assert!(job.finish(&[Arc::clone(op)]));
    let result = op.result();
    let Some(Err(Error::Aborted { reason, .. })) = &result else { panic!("{result:?}") };
    assert!(reason.contains("out of paper"), "{reason}");
}

/// What waits for a rank of its own node posts nothing over the network.
#[test]
fn a_receive_from_a_rank_of_the_node_hears_of_an_abort_elsewhere() {
    let mut job = Job::new(&GroupShape::even(2, 2), SimConfig::default(), Tuning::default());
    let mut data = [0u8; 4];
    // SAFETY: the data outlives the operation, as in `start`.
    let region = unsafe { Region::of(&mut data) };
    let key = MsgKey { group: 9, seq: MsgKey::P2P, tag: 3 };
    let work = Work::Message(PointToPoint { peer: 1, key, region, send: false });
    let call = Call::new(Collective::SendRecv, DType::U8, 4);
    let op =
        Arc::new(OpState::new(call, work, job.ranks[0].key(), "sim".into(), 0, Duration::from_secs(3600)));
    let r = &mut job.ranks[0];
    r.group.start(Arc::clone(&op), Some(&mut r.fabric), &mut Vec::new()).unwrap();
    hears_of_an_abort(&mut job, &op, 2);
}

#[test]
fn a_receive_from_any_rank_hears_of_a_death() {
    let config = SimConfig { sockets: true, ..SimConfig::default() };
    let mut job = Job::new(&GroupShape::even(3, 1), config, Tuning::default());
    let mut data = [0u8; 4];
    let op = job.receive_any(0, &mut data);
    // Acquainted by probes; a rank never heard of may be done as well as dead.
    for _ in 0..10_000 {
        job.turn();
    }
    // Two rails an endpoint: 2 and 3 belong to rank 1.
    job.net.kill_at(job.net.step() + 1, 2);
    assert!(job.finish(&[Arc::clone(&op)]));
    let result = op.result();
    assert!(matches!(result, Some(Err(Error::PeerLost { peer: 1, .. }))), "{result:?}");
    job.net.pace(Duration::from_millis(10));
}

/// Whose work is done may go while others still send; over a network without goodbyes that looks like a death.
#[test]
fn a_receive_from_any_rank_waits_for_those_that_are_left() {
    // Acquainted by probes, or never met.
    for (sockets, acquainted) in [(false, true), (true, true), (true, false), (false, false)] {
        let config = SimConfig { sockets, ..SimConfig::default() };
        let mut job = Job::new(&GroupShape::even(3, 1), config, Tuning::default());
        let (mut first, mut second) = ([0u8; 4], [0u8; 4]);
        let received = job.receive_any(0, &mut first);
        for _ in 0..if acquainted { 10_000 } else { 0 } {
            job.turn();
        }
        let go = |job: &mut Job| {
            let gone = job.ranks.remove(1);
            // Time passes with the others' turns, and the thread that goes may get none of its own meanwhile: its limits,
            // behind which it goes without a word, must be out of reach.
            job.net.pace(Duration::from_nanos(100));
            std::thread::scope(|scope| {
                let going = scope.spawn(move || drop(gone.fabric));
                while !going.is_finished() {
                    job.ranks.iter_mut().for_each(Rank::turn);
                }
            });
            job.net.pace(Duration::from_micros(10));
            for _ in 0..10_000 {
                job.turn();
            }
        };
        if acquainted {
            go(&mut job);
        } else {
            drop(job.ranks.remove(1));
            (0..10_000).for_each(|_| job.turn());
        }
        assert!(!received.is_done(), "{:?}", received.result());
        let mut data = [8u8; 4];
        // SAFETY: the data outlives the operation.
        let region = unsafe { Region::of(&mut data) };
        let key = MsgKey { group: 9, seq: MsgKey::P2P, tag: 3 };
        let call = Call::new(Collective::SendRecv, DType::U8, 4).pack();
        let message = Message { key, peer: 0, peer_rank: 0, region, call, ctx: Ctx(1 << 40) };
        job.ranks[1].fabric.send(message).unwrap();
        for _ in 0..STEPS {
            if received.is_done() {
                break;
            }
            job.ranks[0].turn();
            job.ranks[1].fabric.poll(&mut Vec::new()).unwrap();
        }
        assert!(matches!(received.result(), Some(Ok(()))) && first == [8; 4], "sockets {sockets}");
        let waits = job.receive_any(0, &mut second);
        go(&mut job);
        assert!(job.finish(&[Arc::clone(&waits)]));
        let text = waits.result().unwrap().as_ref().unwrap_err().to_string();
        assert!(text.contains("no rank is left"), "{text}");
    }
}
