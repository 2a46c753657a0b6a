//! Phases of every kind against a plain model: random moves, sizes, slots and schedules.
#![cfg(not(loom))]
// Tests may unwrap: a panic there is the report.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::*;
use proptest::prelude::*;
use smddp_core::call::{Call, Collective};
use smddp_core::dtype::{DType, ReduceOp};
use smddp_core::plan::{Move, Span, Who};
use smddp_core::reduce::combine;
use smddp_core::transport::{Arith, Ctx, NodeLocal, Patience, PhaseRun};
use smddp_core::yields::Yields;
use smddp_core::{Error, Region};
use smddp_shm::{Geometry, Membership};

/// From, to, elements, in place, finish of each move.
type RawPhase = (Vec<(Who, Who, usize, bool, bool)>, DType, ReduceOp);

/// A phase to be: its moves, and what they reduce with.
#[derive(Clone, Debug)]
struct Phase {
    moves: Vec<Move>,
    arith: Arith,
}

#[derive(Clone, Debug)]
struct Case {
    size: usize,
    geometry: Geometry,
    phases: Vec<Phase>,
    input: usize,
    output: usize,
    /// Polls before sleeping, a rank.
    spins: Vec<usize>,
    /// Phases submitted at once.
    window: usize,
    /// Polls in vain of a phase that is run on the spot, a rank; `None`: it submits all of them.
    now: Vec<Option<u32>>,
    /// Whether a rank stores what it takes past the caches.
    streams: Vec<bool>,
    /// Whether lines are handed back.
    hands_back: bool,
}

/// Elements around the sizes at which something changes: inline, one slot, several.
fn elements() -> impl Strategy<Value = usize> {
    prop_oneof![
        3 => 0usize..12,
        2 => Just(1023usize),
        2 => Just(1024usize),
        2 => Just(1025usize),
        2 => 0usize..1000,
        1 => 0usize..9000,
    ]
}

fn who(size: usize) -> impl Strategy<Value = Who> {
    prop_oneof![2 => Just(Who::All), 3 => (0..size as u32).prop_map(Who::One)]
}

/// Moves whose targets do not overlap; sources may. `in_place` makes an All-to-All move reduce onto itself.
///
/// Now and then one move of much data from all to all, which goes around as a relay.
fn phase(size: usize) -> impl Strategy<Value = RawPhase> {
    let dtype = prop::sample::select(vec![DType::F32, DType::BF16, DType::I64, DType::U8, DType::F64]);
    let op = prop::sample::select(vec![ReduceOp::Sum, ReduceOp::Avg, ReduceOp::Max]);
    let a_move = (who(size), who(size), elements(), any::<bool>(), any::<bool>());
    let relay = (8_200usize..40_000, any::<bool>(), any::<bool>())
        .prop_map(|(elements, in_place, finish)| vec![(Who::All, Who::All, elements, in_place, finish)]);
    let moves = prop_oneof![3 => prop::collection::vec(a_move, 1..8), 1 => relay];
    (moves, dtype, op)
}

fn case() -> impl Strategy<Value = Case> {
    (1usize..=8, 2usize..5, 1usize..4)
        .prop_flat_map(|(size, slots, window)| {
            let phases = prop::collection::vec(phase(size), 1..6);
            let spins = prop::collection::vec(prop_oneof![Just(0usize), Just(3), Just(200)], size);
            let patience = prop_oneof![Just(None), Just(Some(0)), Just(Some(5)), Just(Some(100_000))];
            let each = prop::collection::vec((patience, any::<bool>()), size);
            (Just((size, slots, window)), phases, spins, each, any::<bool>())
        })
        .prop_map(|((size, slots, window), raw, spins, each, hands_back)| Case {
            hands_back,
            now: each.iter().map(|(now, _)| *now).collect(),
            streams: each.iter().map(|(_, streams)| *streams).collect(),
            ..build(size, slots, window, raw, spins)
        })
}

fn build(size: usize, slots: usize, window: usize, raw: Vec<RawPhase>, spins: Vec<usize>) -> Case {
    let (mut output, mut input) = (0, 0);
    let mut phases = vec![];
    for (moves, dtype, op) in raw {
        let mut built = vec![];
        for (from, to, elements, in_place, finish) in moves {
            let len = elements * dtype.size();
            let dst = Span::output(output, len);
            output += len.next_multiple_of(8);
            let in_place = in_place && from == Who::All;
            let src = if in_place { dst } else { Span::input(8 * (elements % 5), len) };
            input = input.max(src.off + len);
            built.push(Move { from, to, src, dst, finish });
        }
        phases.push(Phase { moves: built, arith: arith(dtype, op, size) });
    }
    let geometry = Geometry { slot: 4096, slots };
    Case {
        size,
        geometry,
        phases,
        input,
        output,
        spins,
        window,
        now: vec![None; size],
        streams: vec![false; size],
        hands_back: false,
    }
}

/// Bytes that are small numbers of every dtype used here often enough, and never not a number by accident of pattern.
fn fill(rank: usize, salt: usize, len: usize) -> Vec<u8> {
    (0..len).map(|i| ((i * 7 + rank * 13 + salt) % 61) as u8).collect()
}

fn memory(case: &Case, rank: usize) -> Memory {
    Memory { input: fill(rank, 1, case.input), output: fill(rank, 2, case.output), scratch: vec![] }
}

/// What every rank's buffers must hold in the end.
fn model(case: &Case) -> Vec<Memory> {
    let mut ranks: Vec<Memory> = (0..case.size).map(|r| memory(case, r)).collect();
    for phase in &case.phases {
        for m in &phase.moves {
            let mut sources: Vec<Vec<u8>> = (0..case.size).map(|r| bytes_at(&mut ranks[r], m.src)).collect();
            let mut result = match m.from {
                Who::One(from) => sources[from as usize].clone(),
                Who::All => {
                    let mut result = vec![0; m.src.len];
                    // SAFETY: the vectors live through the call.
                    let (dst, srcs) = unsafe {
                        let srcs: Vec<Region> = sources.iter_mut().map(|s| Region::of(s)).collect();
                        (Region::of(&mut result), srcs)
                    };
                    if m.src.len > 0 {
                        combine(phase.arith, m.finish, dst, &srcs);
                    }
                    result
                }
            };
            for (rank, memory) in ranks.iter_mut().enumerate() {
                if m.to == Who::All || m.to == Who::One(rank as u32) {
                    // SAFETY: as above.
                    memory.buffers().at(m.dst, 0).copy_from(unsafe { Region::of(&mut result) });
                }
            }
        }
    }
    ranks
}

fn bytes_at(memory: &mut Memory, span: Span) -> Vec<u8> {
    let mut bytes = vec![0; span.len];
    // SAFETY: both live through the call.
    unsafe { Region::of(&mut bytes) }.copy_from(memory.buffers().at(span, 0));
    bytes
}

fn execute(case: &Case) -> Vec<Memory> {
    let plans: Vec<_> = case.phases.iter().map(|p| one_phase(p.moves.clone())).collect();
    // As a collective whose results may go past the caches.
    let call = |count: usize| Call::new(Collective::AllGather, DType::F32, count as u64).pack();
    let member = |group, rank: usize, size| Membership {
        streams_from: case.streams[rank].then_some(1),
        hands_back: case.hands_back,
        ..membership(group, rank, size)
    };
    on_members(case.size, case.geometry, member, |rank, mut node| {
        let mut memory = memory(case, rank);
        let buffers = memory.buffers();
        let (mut next, mut done) = (0, vec![]);
        while done.len() < plans.len() {
            while next < plans.len() && next < done.len() + case.window {
                let arith = case.phases[next].arith;
                let phase = run(&plans[next], buffers, arith, call(next), next as u64);
                next += 1;
                match case.now[rank].filter(|_| done.len() == next - 1) {
                    Some(patience) if node.run_now(&phase, &mut Patience::of_looks(patience)).unwrap() => {
                        done.push(phase.ctx)
                    }
                    Some(_) => {}
                    None => node.submit(phase).unwrap(),
                }
            }
            if done.len() == next {
                continue;
            }
            done.extend(
                drive(&mut node, 1.min(next - done.len()), case.spins[rank])
                    .unwrap_or_else(|e| panic!("{e}")),
            );
        }
        assert_eq!(done, (0..plans.len() as u64).map(Ctx).collect::<Vec<_>>(), "order of completions");
        assert!(node.waiting_for().is_empty());
        memory
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]
    #[test]
    fn ranks_end_with_what_the_model_says(case in case()) {
        let (expected, got) = (model(&case), execute(&case));
        for rank in 0..case.size {
            prop_assert!(got[rank] == expected[rank], "rank {} differs", rank);
        }
    }
}

/// One move, `len` bytes, on `size` ranks.
fn single(size: usize, from: Who, to: Who, len: usize) -> Case {
    let raw = vec![(vec![(from, to, len / 4, false, true)], DType::F32, ReduceOp::Sum)];
    build(size, 2, 1, raw, vec![50; size])
}

#[test]
fn every_kind_of_move_at_every_edge_of_inline_and_slot() {
    for size in [1, 2, 3, 8] {
        let one = Who::One(size as u32 - 1);
        for (from, to) in
            [(Who::All, Who::All), (one, Who::All), (Who::All, one), (Who::One(0), one), (one, one)]
        {
            for len in [0, 4, 36, 40, 44, 4092, 4096, 4100, 40_000] {
                let case = single(size, from, to, len);
                assert_eq!(execute(&case), model(&case), "{from:?} to {to:?}, {len} bytes, {size} ranks");
            }
        }
    }
}

#[test]
fn large_results_go_past_the_caches_unless_they_were_read_before() {
    const BLOCK: usize = 10_000;
    const BOTH: usize = 2 * BLOCK;
    let each = |from: usize| {
        let to = Span::output(from * BLOCK, BLOCK);
        span_move(Who::One(from as u32), Who::All, Span::input(0, BLOCK), to)
    };
    let summed = span_move(Who::All, Who::All, Span::input(0, BLOCK), Span::output(0, BLOCK));
    let given = span_move(Who::One(0), Who::All, Span::output(0, BLOCK), Span::output(0, BLOCK));
    // Results of both ranks together; what goes past the caches on either where that is just enough; what does where it just
    // fails, or is just half of what it takes: its own block.
    for (collective, moves, together, all, own) in [
        (Collective::AllGather, vec![each(0), each(1)], 2 * BOTH, [BOTH, BOTH], BLOCK),
        (Collective::ReduceScatter, vec![summed], 2 * BOTH, [BLOCK, BLOCK], 0),
        (Collective::Broadcast, vec![given], BOTH, [0, BLOCK], 0),
        (Collective::AllReduce, vec![summed], 2 * BOTH, [0, 0], 0),
    ] {
        let plan = one_phase(moves);
        let streamed = |streams_from: usize| {
            let streams_from = Some(streams_from);
            let member =
                |group, rank: usize, size| Membership { streams_from, ..membership(group, rank, size) };
            on_members(2, SMALL, member, |_, mut node| {
                let mut memory = Memory { input: vec![1; BLOCK], output: vec![0; BOTH], scratch: vec![] };
                let call = Call::new(collective, DType::F32, BLOCK as u64 / 4).pack();
                node.submit(run(&plan, memory.buffers(), arith(DType::F32, ReduceOp::Sum, 2), call, 1))
                    .unwrap();
                drive(&mut node, 1, 10).unwrap();
                node.streamed() as usize
            })
        };
        assert_eq!(streamed(together), all, "{collective}");
        assert_eq!(streamed(together + 1), [own; 2], "{collective}");
        assert_eq!(streamed(2 * together), [own; 2], "{collective}");
        assert_eq!(streamed(2 * together + 1), [0; 2], "{collective}");
    }
}

/// Waits until another thread has set the flag.
fn wait_for(flag: &AtomicBool) {
    let started = Instant::now();
    while !flag.load(Ordering::SeqCst) {
        assert!(started.elapsed() < PATIENCE, "the other thread does not come that far");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_phase_on_the_spot_is_over_or_goes_on_as_if_submitted() {
    let plan = one_phase(vec![span_move(Who::All, Who::All, Span::input(0, 8), Span::output(0, 8))]);
    let published = AtomicBool::new(false);
    let over = on_ranks(2, SMALL, |rank, mut node| {
        let mut memory = Memory { input: vec![1; 8], output: vec![0; 8], scratch: vec![] };
        let buffers = memory.buffers();
        let phase = |i| run(&plan, buffers, arith(DType::U8, ReduceOp::Sum, 2), call(8), i);
        if rank == 1 {
            // Nobody answers yet.
            assert_eq!(node.run_now(&phase(0), &mut Patience::of_looks(3)), Ok(false));
            assert_eq!(node.waiting_for(), [0]);
            published.store(true, Ordering::SeqCst);
            assert_eq!(drive(&mut node, 1, 0).unwrap(), [Ctx(0)]);
        } else {
            wait_for(&published);
            assert_eq!(
                node.run_now(&phase(0), &mut Patience::of_looks(0)),
                Ok(true),
                "the other has published"
            );
        }
        // Several exchanges are no matter of a moment.
        let long = one_phase(vec![span_move(Who::All, Who::All, Span::input(0, 8), Span::output(0, 8)); 200]);
        assert_eq!(
            node.run_now(&PhaseRun { plan: long, ..phase(1) }, &mut Patience::of_looks(1_000_000)),
            Ok(false)
        );
        assert_eq!(drive(&mut node, 1, 50).unwrap(), [Ctx(1)]);
        memory.output
    });
    assert_eq!(over, [vec![2; 8], vec![2; 8]]);
}

/// Without a look to spare: the core that it gives away is what its peer needs.
#[test]
fn a_phase_on_the_spot_yields_until_its_peer_has_come() {
    let plan = one_phase(vec![span_move(Who::All, Who::All, Span::input(0, 8), Span::output(0, 8))]);
    let (nobody, way) = (AtomicUsize::new(0), Yields::default());
    let come = on_ranks(2, SMALL, |rank, mut node| {
        let mut memory = Memory { input: vec![1; 8], output: vec![0; 8], scratch: vec![] };
        let phase = run(&plan, memory.buffers(), arith(DType::U8, ReduceOp::Sum, 2), call(8), 0);
        if rank == 1 {
            std::thread::sleep(Duration::from_millis(50));
        }
        let over = node.run_now(&phase, &mut Patience::new(0, u32::MAX, &nobody, &way)).unwrap();
        (over, memory.output)
    });
    assert_eq!(come, [(true, vec![2; 8]), (true, vec![2; 8])]);
}

#[test]
fn who_waits_for_a_free_slot_is_woken_by_a_phase_on_the_spot() {
    let to_1 = one_phase(vec![span_move(Who::One(0), Who::One(1), Span::input(0, 8), Span::output(0, 8))]);
    let (sender_is_armed, sender_is_through) = (AtomicBool::new(false), AtomicBool::new(false));
    on_ranks(2, SMALL, |rank, mut node| {
        let mut memory = Memory { input: vec![1; 8], output: vec![0; 8], scratch: vec![] };
        let buffers = memory.buffers();
        let phase = |i| run(&to_1, buffers, arith(DType::U8, ReduceOp::Sum, 2), call(8), i);
        let phases = SMALL.slots as u64 + 1;
        if rank == 0 {
            (0..phases).for_each(|i| node.submit(phase(i)).unwrap());
            // One more than there are slots: asleep until rank 1 has consumed the first.
            let (mut done, bell) = (vec![], node.bell());
            while node.poll(&mut done).unwrap() {}
            node.arm();
            let value = bell.value();
            assert!(!node.poll(&mut done).unwrap(), "rank 1 has consumed nothing");
            sender_is_armed.store(true, Ordering::SeqCst);
            let asleep = Instant::now();
            bell.wait(value, SLEEP);
            assert!(asleep.elapsed() < SLEEP, "nobody rang");
            node.disarm();
            drive(&mut node, phases as usize - done.len(), 0).unwrap();
            sender_is_through.store(true, Ordering::SeqCst);
        } else {
            wait_for(&sender_is_armed);
            assert_eq!(node.run_now(&phase(0), &mut Patience::of_looks(0)), Ok(true));
            wait_for(&sender_is_through);
            (1..phases)
                .for_each(|i| assert_eq!(node.run_now(&phase(i), &mut Patience::of_looks(0)), Ok(true)));
        }
    });
}

#[test]
fn more_ranks_than_a_word_has_bits() {
    for (from, to) in [(Who::All, Who::All), (Who::One(69), Who::All), (Who::All, Who::One(67))] {
        let case = single(70, from, to, 5000);
        assert!(execute(&case) == model(&case), "{from:?} to {to:?}");
    }
}

#[test]
fn in_place_all_to_all_swaps_blocks() {
    let (size, block) = (4usize, 30_000usize);
    let mut moves = vec![];
    for a in 0..size {
        for b in 0..size {
            let (src, dst) = (Span::input(b * block, block), Span::input(a * block, block));
            moves.push(span_move(Who::One(a as u32), Who::One(b as u32), src, dst));
        }
    }
    let plan = one_phase(moves);
    let got = on_ranks(size, SMALL, |rank, mut node| {
        let mut memory = Memory {
            input: (0..size).flat_map(|to| vec![(rank * size + to) as u8; block]).collect(),
            output: vec![],
            scratch: vec![],
        };
        let sum = arith(DType::U8, ReduceOp::Sum, size);
        node.submit(run(&plan, memory.buffers(), sum, call(1), 1)).unwrap();
        drive(&mut node, 1, 10).unwrap();
        memory.input
    });
    for (rank, bytes) in got.iter().enumerate() {
        let expected: Vec<u8> = (0..size).flat_map(|from| vec![(from * size + rank) as u8; block]).collect();
        assert!(*bytes == expected, "rank {rank}");
    }
}

#[test]
fn a_rank_with_nothing_to_give_or_take_waits_for_nobody() {
    let plan = one_phase(vec![span_move(Who::One(0), Who::One(1), Span::input(0, 400), Span::input(0, 400))]);
    let done = std::sync::Barrier::new(3);
    on_ranks(3, SMALL, |rank, mut node| {
        let mut memory = Memory { input: vec![rank as u8; 400], output: vec![], scratch: vec![] };
        let sum = arith(DType::U8, ReduceOp::Sum, 3);
        let buffers = memory.buffers();
        let work = |node: &mut smddp_shm::ShmNode| {
            for i in 0..100 {
                node.submit(run(&plan, buffers, sum, call(1), i)).unwrap();
                drive(node, 1, 10).unwrap();
            }
        };
        // Rank 2 is through with a hundred phases before the others begin.
        if rank == 2 {
            work(&mut node);
        }
        done.wait();
        if rank != 2 {
            work(&mut node);
        }
        assert_eq!(memory.input[0], [0, 0, 2][rank]);
    });
}

#[test]
fn different_calls_are_a_mismatch_that_names_both() {
    // All ranks read each other: everybody finds out by the slots.
    let everybody = vec![span_move(Who::All, Who::All, Span::input(0, 4), Span::output(0, 4))];
    // Nobody publishes what the other waits for: found by the log.
    let from = |r| vec![span_move(Who::One(r), Who::All, Span::input(0, 4), Span::output(0, 4))];
    let found = |moves: [Vec<Move>; 2]| {
        let plans = moves.map(one_phase);
        on_ranks(2, SMALL, |rank, mut node| {
            let mut memory = Memory { input: vec![0; 4], output: vec![0; 4], scratch: vec![] };
            let sum = arith(DType::F32, ReduceOp::Sum, 2);
            node.submit(run(&plans[rank], memory.buffers(), sum, call(1 + rank), 1)).unwrap();
            let error = drive(&mut node, 1, 10).unwrap_err();
            node.abort(&error);
            error
        })
    };
    for errors in [found([everybody.clone(), everybody]), found([from(1), from(0)])] {
        let mismatches = errors.iter().filter(|e| matches!(e, Error::Mismatch { .. })).count();
        assert!(mismatches >= 1, "{errors:?}");
        for (rank, error) in errors.iter().enumerate() {
            match error {
                Error::Mismatch { ours, peer, theirs, .. } => {
                    assert_eq!(*peer, 11 - rank);
                    assert!(
                        ours.contains(&format!("[{}]", 1 + rank))
                            && theirs.contains(&format!("[{}]", 2 - rank)),
                        "{error}"
                    );
                }
                Error::Aborted { reason, .. } => assert!(reason.contains("ranks disagree"), "{error}"),
                other => panic!("{other}"),
            }
        }
    }
}

#[test]
fn of_two_roots_one_at_least_finds_the_other_in_the_same_call() {
    // Each gives and reads nothing, so neither waits; through the slots' heads and through their areas.
    for (len, at_once) in [(4, true), (400, true), (4, false), (400, false), (20_000, false)] {
        let found = on_ranks(2, SMALL, |rank, mut node| {
            let plan = one_phase(vec![span_move(
                Who::One(rank as u32),
                Who::All,
                Span::input(0, len),
                Span::input(0, len),
            )]);
            let call = Call { root: rank as u32, ..Call::new(Collective::Broadcast, DType::U8, len as u64) };
            let mut memory = Memory { input: vec![0; len], output: vec![], scratch: vec![] };
            let work = run(&plan, memory.buffers(), arith(DType::U8, ReduceOp::Sum, 2), call.pack(), 1);
            let result = if at_once {
                // Nobody is waited for.
                node.run_now(&work, &mut Patience::of_looks(0)).map(|over| assert!(over))
            } else {
                node.submit(work).and_then(|()| drive(&mut node, 1, 10)).map(drop)
            };
            if let Err(error) = &result {
                node.abort(error);
            }
            result
        });
        let mismatch = |r: &Result<(), Error>| matches!(r, Err(Error::Mismatch { .. }));
        assert!(found.iter().any(mismatch), "{len} bytes, at once {at_once}: {found:?}");
    }
}

#[test]
fn an_abort_reaches_a_sleeping_rank_and_ends_all_work() {
    let plan = one_phase(vec![span_move(Who::All, Who::All, Span::input(0, 4), Span::output(0, 4))]);
    let errors = on_ranks(3, SMALL, |rank, mut node| {
        let mut memory = Memory { input: vec![0; 4], output: vec![0; 4], scratch: vec![] };
        let sum = arith(DType::F32, ReduceOp::Sum, 3);
        if rank == 2 {
            // Long words are cut at a character.
            let why = Error::Internal("Grüße ".repeat(1000));
            node.abort(&why);
            assert_eq!(node.poll(&mut vec![]), Err(why));
            return None;
        }
        let work = run(&plan, memory.buffers(), sum, call(1), 1);
        node.submit(work.clone()).unwrap();
        let error = drive(&mut node, 1, 0).unwrap_err();
        assert_eq!(node.submit(work), Err(error.clone()));
        assert!(node.waiting_for().is_empty());
        Some(error)
    });
    for error in &errors[..2] {
        let text = error.as_ref().unwrap().to_string();
        assert!(
            matches!(error, Some(Error::Aborted { .. }))
                && text.contains("rank 12")
                && text.contains("Grüße"),
            "{text}"
        );
    }
}

#[test]
fn broken_plans_are_errors_and_not_panics() {
    on_ranks(1, SMALL, |_, mut node| {
        let mut memory = Memory { input: vec![0; 8], output: vec![0; 8], scratch: vec![] };
        let sum = arith(DType::F32, ReduceOp::Sum, 1);
        let buffers = memory.buffers();
        let broken = [
            span_move(Who::One(1), Who::All, Span::input(0, 4), Span::output(0, 4)),
            span_move(Who::All, Who::All, Span::input(8, 4), Span::output(0, 4)),
            span_move(Who::All, Who::All, Span::input(0, 4), Span::scratch(0, 4)),
            span_move(Who::All, Who::All, Span::input(0, 4), Span::output(0, 8)),
            span_move(Who::All, Who::All, Span::input(0, 3), Span::output(0, 3)),
            span_move(Who::All, Who::All, Span::input(usize::MAX, 4), Span::output(0, 4)),
        ];
        for m in broken {
            let refused = node.submit(run(&one_phase(vec![m]), buffers, sum, call(1), 1));
            assert!(matches!(refused, Err(Error::Internal(_))), "{m:?}: {refused:?}");
        }
        let mut no_phase = run(&one_phase(vec![]), buffers, sum, call(1), 1);
        no_phase.step = 3;
        assert!(node.submit(no_phase).is_err());
    });
}
