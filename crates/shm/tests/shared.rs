//! Calls on memory that the ranks share: ranks as threads, or polled by hand in one thread.

#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;

use common::{SMALL, arith, call, drive, on_ranks, one_phase, run, span_move};
use proptest::prelude::*;
use smddp_core::call::{Call, Collective, PackedCall};
use smddp_core::dtype::{DType, ReduceOp};
use smddp_core::plan::{CallShape, Plan, Span, Tuning, Who, schedule};
use smddp_core::shared::Shared;
use smddp_core::topology::GroupShape;
use smddp_core::transport::{Buffers, Ctx, NodeLocal, PhaseRun};
use smddp_core::{Error, Region};
use smddp_shm::{SharedBuffer, ShmNode};

/// Every rank's memory, and each rank's view of all of it.
struct Job {
    nodes: Vec<ShmNode>,
    own: Vec<Arc<SharedBuffer>>,
}

fn shared(own: &[Arc<SharedBuffer>], me: usize, number: u64) -> Shared {
    let parts: Vec<SharedBuffer> = own
        .iter()
        .enumerate()
        .filter(|(rank, _)| *rank != me)
        .map(|(_, buffer)| SharedBuffer::of_peer(&buffer.card().unwrap()).unwrap())
        .collect();
    let mut regions: Vec<Region> = parts.iter().map(SharedBuffer::region).collect();
    regions.insert(me, own[me].region());
    Shared { number, parts: regions, own: me, keep: Arc::new((parts, Arc::clone(&own[me]))) }
}

impl Job {
    /// `bytes` of memory a rank, entered as number 1 on all.
    fn new(size: usize, bytes: usize) -> Job {
        let mut nodes = on_ranks(size, SMALL, |_, node| node);
        let own: Vec<_> = (0..size).map(|_| Arc::new(SharedBuffer::new(bytes).unwrap())).collect();
        for (rank, node) in nodes.iter_mut().enumerate() {
            node.enter_shared(shared(&own, rank, 1)).unwrap();
        }
        Job { nodes, own }
    }

    fn fill(&self, rank: usize, at: usize, values: &[f32]) {
        write(self.own[rank].region().slice(at, 4 * values.len()), values);
    }

    fn values(&self, rank: usize, at: usize, count: usize) -> Vec<f32> {
        read(self.own[rank].region().slice(at, 4 * count))
    }

    fn submit(&mut self, rank: usize, at: usize, count: usize) -> Result<(), Error> {
        let data = self.own[rank].region().slice(at, 4 * count);
        self.nodes[rank].submit(in_place(data, marked(count), self.own.len()))
    }

    /// Polls `rank` until it does nothing more; the marks that came.
    fn exhaust(&mut self, rank: usize) -> Result<Vec<Ctx>, Error> {
        let mut done = Vec::new();
        while self.nodes[rank].poll(&mut done)? {}
        Ok(done)
    }
}

fn write(region: Region, values: &[f32]) {
    let mut copy = values.to_vec();
    // SAFETY: `copy` outlives the call.
    region.copy_from(unsafe { Region::of(&mut copy) });
}

fn read(region: Region) -> Vec<f32> {
    let mut copy = vec![0f32; region.len() / 4];
    // SAFETY: `copy` outlives the call.
    unsafe { Region::of(&mut copy) }.copy_from(region);
    copy
}

fn marked(count: usize) -> PackedCall {
    Call { shared: true, ..Call::new(Collective::AllReduce, DType::F32, count as u64) }.pack()
}

fn all_to_all_of(bytes: usize) -> Arc<Plan> {
    let span = Span::output(0, bytes);
    one_phase(vec![span_move(Who::All, Who::All, span, span)])
}

fn in_place(data: Region, call: PackedCall, world: usize) -> PhaseRun {
    let buffers = Buffers { input: data, output: data, scratch: Region::EMPTY };
    run(&all_to_all_of(data.len()), buffers, arith(DType::F32, ReduceOp::Sum, world), call, 5)
}

fn value(rank: usize, i: usize) -> f32 {
    ((i * 7 + rank * 13) % 1000) as f32 * 0.37 - 100.0
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// The same bits as through slots, at any length and at offsets that differ from rank to rank.
    #[test]
    fn shared_memory_gives_the_bits_that_slots_give(
        size in 1usize..6,
        count in prop_oneof![1usize..40, 1000usize..20_000],
        offsets in prop::collection::vec(0usize..50, 6),
    ) {
        let results = on_ranks(size, SMALL, |rank, mut node| {
            let mut through_slots: Vec<f32> = (0..count).map(|i| value(rank, i)).collect();
            // SAFETY: the vector is in place until the run is over.
            let data = unsafe { Region::of(&mut through_slots) };
            node.submit(in_place(data, call(count), size)).unwrap();
            drive(&mut node, 1, 100).unwrap();
            (node, through_slots)
        });
        let (nodes, slots): (Vec<_>, Vec<_>) = results.into_iter().unzip();
        let own: Vec<_> = (0..size).map(|_| Arc::new(SharedBuffer::new(4 * (count + 50)).unwrap())).collect();
        let shared_results: Vec<Vec<f32>> = std::thread::scope(|scope| {
            let ranks: Vec<_> = nodes.into_iter().enumerate().map(|(rank, mut node)| {
                let (own, at) = (&own, 4 * offsets[rank]);
                scope.spawn(move || {
                    node.enter_shared(shared(own, rank, 9)).unwrap();
                    let data = own[rank].region().slice(at, 4 * count);
                    // Several in flight, also of other kinds: they keep their order.
                    for _ in 0..3 {
                        write(data, &(0..count).map(|i| value(rank, i)).collect::<Vec<_>>());
                        let mut small = vec![rank as f32; 3];
                        // SAFETY: in place until both runs are over.
                        let other = unsafe { Region::of(&mut small) };
                        node.submit(in_place(data, marked(count), size)).unwrap();
                        node.submit(in_place(other, call(3), size)).unwrap();
                        drive(&mut node, 2, 100).unwrap();
                        assert_eq!(small, vec![(0..size).sum::<usize>() as f32; 3]);
                    }
                    read(data)
                })
            }).collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        });
        for (direct, slots) in shared_results.iter().zip(&slots) {
            let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            prop_assert_eq!(bits(direct), bits(slots));
        }
    }
}

/// Calls in which ranks only read what their peers share.
const READERS: [Collective; 6] = [
    Collective::Broadcast,
    Collective::Reduce,
    Collective::AllGather,
    Collective::ReduceScatter,
    Collective::AllToAll,
    Collective::Gather,
];

/// One rank's part in a call whose blocks have `count` elements.
struct Reader {
    plan: Arc<Plan>,
    call: Call,
    /// Elements of input and output.
    lens: (usize, usize),
    in_place: bool,
}

impl Reader {
    fn new(collective: Collective, size: usize, rank: usize, count: usize, root: usize) -> Reader {
        let shape =
            CallShape { shared: true, ..CallShape::rooted(collective, DType::F32.size(), count, root) };
        let made = schedule(&GroupShape::even(1, size), rank, &shape, &Tuning::default()).unwrap();
        assert_eq!((made.rounds(), made.body.steps.len(), made.algorithm), (1, 1, "shared"));
        let in_place = matches!(collective, Collective::Broadcast | Collective::Reduce);
        let all = size * count;
        let lens = match collective {
            Collective::AllGather => (count, all),
            Collective::ReduceScatter => (all, count),
            Collective::AllToAll => (all, all),
            Collective::Gather => (count, if rank == root { all } else { 0 }),
            _ => (count, count),
        };
        let call =
            Call { root: root as u32, shared: true, ..Call::new(collective, DType::F32, count as u64) };
        Reader { plan: made.body, call, lens, in_place }
    }

    fn run(&self, shared: bool, input: Region, output: Region, size: usize) -> PhaseRun {
        let buffers = Buffers { input, output, scratch: Region::EMPTY };
        let call = Call { shared, ..self.call };
        run(&self.plan, buffers, arith(DType::F32, ReduceOp::Avg, size), call.pack(), 5)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    /// Every other collective: the results that slots give, from inputs that stay as they are.
    #[test]
    fn what_peers_read_gives_the_bits_that_slots_give(
        size in 2usize..6,
        count in prop_oneof![1usize..40, 1000usize..20_000],
        root in any::<prop::sample::Index>(),
        collective in prop::sample::select(&READERS[..]),
        offsets in prop::collection::vec(0usize..50, 6),
    ) {
        let root = root.index(size);
        let most = size * count + 50;
        let own: Vec<_> = (0..size).map(|_| Arc::new(SharedBuffer::new(4 * most).unwrap())).collect();
        let results = on_ranks(size, SMALL, |rank, mut node| {
            let reader = Reader::new(collective, size, rank, count, root);
            let (from, to) = reader.lens;
            let values: Vec<f32> = (0..from).map(|i| value(rank, i)).collect();
            let (mut input, mut output) = (values.clone(), vec![-1f32; to]);
            // SAFETY: the vectors are in place until their runs are over.
            let (i, o) = unsafe { (Region::of(&mut input), Region::of(&mut output)) };
            node.submit(reader.run(false, i, if reader.in_place { i } else { o }, size)).unwrap();
            drive(&mut node, 1, 100).unwrap();
            let by_slots = if reader.in_place { input.clone() } else { output.clone() };

            node.enter_shared(shared(&own, rank, 9)).unwrap();
            let data = own[rank].region().slice(4 * offsets[rank], 4 * from);
            let mut direct = Vec::new();
            for round in 0..3 {
                write(data, &values);
                output.fill(round as f32);
                // SAFETY: as above.
                let o = unsafe { Region::of(&mut output) };
                node.submit(reader.run(true, data, if reader.in_place { data } else { o }, size)).unwrap();
                drive(&mut node, 1, 100).unwrap();
                direct.push(if reader.in_place { read(data) } else { output.clone() });
                if !reader.in_place {
                    assert_eq!(read(data), values, "the input changed");
                }
            }
            (by_slots, direct)
        });
        for (by_slots, direct) in &results {
            let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            for each in direct {
                prop_assert_eq!(bits(each), bits(by_slots));
            }
        }
    }
}

/// D1 and D2 of `direct`, in a call in which a rank reads: not before the peer has come, and the peer is not done before it has read.
#[test]
fn a_reader_comes_after_its_peer_and_holds_it_until_it_has_read() {
    let mut job = Job::new(2, 4 * COUNT);
    job.fill(0, 0, &vec![1.0; COUNT]);
    let reader = |rank| Reader::new(Collective::Broadcast, 2, rank, COUNT, 0);
    let data: Vec<Region> = job.own.iter().map(|own| own.region()).collect();
    job.nodes[1].submit(reader(1).run(true, data[1], data[1], 2)).unwrap();
    assert_eq!(job.exhaust(1).unwrap(), vec![]);
    assert_eq!(job.nodes[1].waiting_for(), vec![0]);
    assert_eq!(job.values(1, 0, COUNT), vec![0.0; COUNT], "the root has not called yet");
    job.nodes[0].submit(reader(0).run(true, data[0], data[0], 2)).unwrap();
    assert_eq!(job.exhaust(0).unwrap(), vec![], "rank 1 has not read yet");
    assert_eq!(job.nodes[0].waiting_for(), vec![1]);
    assert_eq!(job.exhaust(1).unwrap(), vec![Ctx(5)]);
    assert_eq!(job.values(1, 0, COUNT), vec![1.0; COUNT]);
    assert_eq!(job.exhaust(0).unwrap(), vec![Ctx(5)]);
}

/// What a peer says lies within what it shares; what it is asked for does not.
#[test]
fn a_peer_whose_data_is_too_short_is_told() {
    let mut job = Job::new(2, 4 * COUNT);
    let long = Reader::new(Collective::Broadcast, 2, 1, COUNT, 0);
    let short = Reader::new(Collective::Broadcast, 2, 0, COUNT / 2, 0);
    let data: Vec<Region> = job.own.iter().map(|own| own.region()).collect();
    // The same call by its header, as no rank that keeps to the rules says it.
    let half = data[0].slice(2 * COUNT, 2 * COUNT);
    let call = Call { count: COUNT as u64, ..short.call };
    job.nodes[0].submit(Reader { call, ..short }.run(true, half, half, 2)).unwrap();
    job.nodes[1].submit(long.run(true, data[1], data[1], 2)).unwrap();
    let _ = job.exhaust(0);
    let error = job.exhaust(1).unwrap_err().to_string();
    assert!(error.contains("number 1"), "{error}");
}

const COUNT: usize = 100_000;

/// D1 of `direct`.
#[test]
fn nobody_touches_a_rank_that_has_not_come() {
    let mut job = Job::new(2, 4 * COUNT);
    job.fill(0, 0, &vec![1.0; COUNT]);
    job.fill(1, 0, &vec![2.0; COUNT]);
    job.submit(0, 0, COUNT).unwrap();
    assert_eq!(job.exhaust(0).unwrap(), vec![]);
    assert_eq!(job.nodes[0].waiting_for(), vec![1]);
    assert_eq!(job.values(1, 0, COUNT), vec![2.0; COUNT], "it has not called yet");
    assert_eq!(job.values(0, 0, COUNT), vec![1.0; COUNT]);
}

/// D2 of `direct`.
#[test]
fn a_call_is_over_when_all_ranks_have_left_the_data() {
    let mut job = Job::new(2, 4 * COUNT);
    job.fill(0, 0, &vec![1.0; COUNT]);
    job.fill(1, 0, &vec![2.0; COUNT]);
    job.submit(0, 0, COUNT).unwrap();
    job.submit(1, 0, COUNT).unwrap();
    // Both publish where their data lies; rank 0 then does all it can.
    let mut done = Vec::new();
    assert!(job.nodes[1].poll(&mut done).unwrap());
    assert_eq!(job.exhaust(0).unwrap(), vec![], "rank 1 has not done its share");
    let half = COUNT / 2;
    assert_eq!(job.values(1, 0, half), vec![3.0; half], "rank 0 has done its share, for both");
    assert_eq!(job.nodes[0].waiting_for(), vec![1]);
    assert_ne!(job.values(0, 4 * (COUNT - 1), 1), vec![3.0]);
    done.extend(job.exhaust(1).unwrap());
    assert_eq!(done, vec![Ctx(5)]);
    assert_eq!(job.exhaust(0).unwrap(), vec![Ctx(5)]);
    for rank in 0..2 {
        assert_eq!(job.values(rank, 0, COUNT), vec![3.0; COUNT]);
    }
}

/// D2 of `direct`, for a rank that waits for the others to come: it says that it is done no earlier.
#[test]
fn a_rank_that_came_first_is_waited_for_too() {
    let mut job = Job::new(2, 4 * COUNT);
    job.fill(0, 0, &vec![1.0; COUNT]);
    job.fill(1, 0, &vec![2.0; COUNT]);
    job.submit(0, 0, COUNT).unwrap();
    assert_eq!(job.exhaust(0).unwrap(), vec![]);
    job.submit(1, 0, COUNT).unwrap();
    assert_eq!(job.exhaust(1).unwrap(), vec![], "rank 0 has not done its share");
    assert_eq!(job.exhaust(0).unwrap(), vec![Ctx(5)]);
    assert_eq!(job.exhaust(1).unwrap(), vec![Ctx(5)]);
    assert_eq!(job.values(1, 0, COUNT), vec![3.0; COUNT]);
}

#[test]
fn ranks_that_disagree_about_the_memory_are_told() {
    // One in shared memory, one not.
    let mut job = Job::new(2, 4 * COUNT);
    job.submit(0, 0, 100).unwrap();
    let mut plain = vec![0f32; 100];
    // SAFETY: in place until the nodes are gone.
    let data = unsafe { Region::of(&mut plain) };
    job.nodes[1].submit(in_place(data, call(100), 2)).unwrap();
    let _ = job.exhaust(1);
    let error = job.exhaust(0).unwrap_err().to_string();
    assert!(error.contains("in shared memory") && error.contains("rank 11 called"), "{error}");
    drop(job);

    // In different memory.
    let mut job = Job::new(2, 4 * COUNT);
    let second: Vec<_> = (0..2).map(|_| Arc::new(SharedBuffer::new(4 * COUNT).unwrap())).collect();
    for (rank, node) in job.nodes.iter_mut().enumerate() {
        node.enter_shared(shared(&second, rank, 2)).unwrap();
    }
    job.submit(0, 0, 100).unwrap();
    let data = second[1].region().slice(0, 400);
    job.nodes[1].submit(in_place(data, marked(100), 2)).unwrap();
    let _ = job.exhaust(1);
    let error = job.exhaust(0).unwrap_err().to_string();
    assert!(error.contains("number 1") && error.contains("number 2"), "{error}");
}

#[test]
fn memory_that_was_never_entered_or_has_left_is_refused_at_once() {
    let mut job = Job::new(2, 4 * COUNT);
    let mut plain = vec![0f32; 100];
    // SAFETY: in place until the nodes are gone.
    let data = unsafe { Region::of(&mut plain) };
    assert!(job.nodes[0].submit(in_place(data, marked(100), 2)).is_err());
    assert!(job.submit(0, 0, 100).is_ok());
    job.nodes[1].leave_shared(1);
    assert!(job.submit(1, 0, 100).is_err());
}

#[test]
fn an_abort_reaches_whoever_waits_in_either_exchange() {
    for stage in 0..2 {
        let mut job = Job::new(2, 4 * COUNT);
        job.submit(0, 0, COUNT).unwrap();
        if stage == 1 {
            job.submit(1, 0, COUNT).unwrap();
            let _ = job.nodes[1].poll(&mut Vec::new());
        }
        assert_eq!(job.exhaust(0).unwrap(), vec![]);
        job.nodes[1].abort(&Error::Internal("enough".to_owned()));
        let error = job.exhaust(0).unwrap_err();
        assert!(matches!(error, Error::Aborted { .. }) && error.to_string().contains("enough"), "{error}");
    }
}
