//! Calls on memory that the ranks share: ranks as threads, or polled by hand in one thread.

#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;

use common::{SMALL, arith, call, drive, on_ranks, one_phase, run, span_move};
use proptest::prelude::*;
use smddp_core::call::{Call, Collective, PackedCall};
use smddp_core::dtype::{DType, ReduceOp};
use smddp_core::plan::{Plan, Span, Who};
use smddp_core::shared::Shared;
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

const COUNT: usize = 100_000;

/// D1.
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

/// D2.
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

/// D2, of a rank that waits for the others to come: it says that it is done no earlier.
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
