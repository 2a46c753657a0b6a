//! Large blocks straight from peers' private memory: ranks as threads, or polled by hand in one thread.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use common::{
    Memory, PATIENCE, SMALL, arith, call, drive, membership, on_members, on_ranks, one_phase, run, span_move,
};
use proptest::prelude::*;
use smddp_core::call::{Call, Collective};
use smddp_core::dtype::{DType, ReduceOp};
use smddp_core::plan::{Move, Plan, Span, Who};
use smddp_core::transport::{Buffers, Ctx, NodeLocal};
use smddp_core::{Region, transport::PhaseRun};
use smddp_shm::{Membership, ShmNode, SingleCopies};

/// Above the least block, and no round number.
const BLOCK: usize = (512 << 10) + 8 * 123;
/// More than what is copied of a block at a time.
const LONG: usize = (5 << 20) + 8 * 321;
const WORD: Span = Span::output(0, 8);

fn moves(size: usize, len: usize) -> Vec<Move> {
    let ranks = 0..size as u32;
    let at = |block: u32| block as usize * len;
    let sends = |from: u32, to: u32| {
        span_move(Who::One(from), Who::One(to), Span::input(at(to), len), Span::output(at(from), len))
    };
    ranks.clone().flat_map(|from| ranks.clone().map(move |to| sends(from, to))).collect()
}

fn gather_moves(size: usize, len: usize) -> Vec<Move> {
    let gives = |from: usize| {
        span_move(Who::One(from as u32), Who::All, Span::input(0, len), Span::output(from * len, len))
    };
    (0..size).map(gives).collect()
}

fn phase(collective: Collective, plan: &Arc<Plan>, buffers: Buffers, size: usize, len: usize) -> PhaseRun {
    let call = Call::new(collective, DType::U8, len as u64).pack();
    run(plan, buffers, arith(DType::U8, ReduceOp::Sum, size), call, 1)
}

/// Block `block` of what `rank` has.
fn content(rank: usize, block: usize, len: usize) -> Vec<u8> {
    (0..len).map(|i| ((i * 31 + rank * 101 + block * 7) % 251) as u8).collect()
}

/// What `rank` ends with.
fn wanted(rank: usize, size: usize) -> Vec<u8> {
    (0..size).flat_map(|from| content(from, rank, BLOCK)).collect()
}

#[derive(Clone, Copy, Debug)]
struct Rank {
    /// Output and input are one.
    in_place: bool,
    wants: bool,
}

/// One call between two small phases, all submitted at once; what each rank ends with and took.
fn execute(ranks: &[Rank]) -> Vec<(Vec<u8>, u64, Vec<Ctx>)> {
    let size = ranks.len();
    let all = one_phase(moves(size, BLOCK));
    let word = one_phase(vec![span_move(Who::One(0), Who::All, WORD, Span { off: 8, ..WORD })]);
    let member = |group, rank: usize, size| Membership {
        single_copy: if ranks[rank].wants { SingleCopies::ALL } else { SingleCopies::NONE },
        ..membership(group, rank, size)
    };
    on_members(size, SMALL, member, |rank, mut node| {
        let input: Vec<u8> = (0..size).flat_map(|block| content(rank, block, BLOCK)).collect();
        let mut memory = Memory { input, output: vec![0; size * BLOCK], scratch: vec![0; 16] };
        let mut buffers = memory.buffers();
        if ranks[rank].in_place {
            buffers.output.copy_from(buffers.input);
            buffers.input = buffers.output;
        }
        let mut words = Memory { input: vec![], output: vec![rank as u8 + 1; 16], scratch: vec![] };
        let small = |words: &mut Memory, ctx| {
            run(&word, words.buffers(), arith(DType::U8, ReduceOp::Sum, size), call(2), ctx)
        };
        node.submit(small(&mut words, 0)).unwrap();
        node.submit(phase(Collective::AllToAll, &all, buffers, size, BLOCK)).unwrap();
        node.submit(small(&mut words, 2)).unwrap();
        let done = drive(&mut node, 3, 50).unwrap();
        assert_eq!(words.output[8..], [1; 8], "rank 0's word");
        (memory.output.clone(), node.copied_once(), done)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// Whoever cannot or must not, all end with the right bytes; and where all can, none goes through a slot.
    #[test]
    fn every_rank_ends_with_its_blocks(
        ranks in prop::collection::vec((any::<bool>(), prop::bool::weighted(0.8)), 2..5),
    ) {
        let ranks: Vec<Rank> = ranks.into_iter().map(|(in_place, wants)| Rank { in_place, wants }).collect();
        let size = ranks.len();
        // In place, a rank writes over what its peers read.
        let possible = ranks.iter().all(|r| r.wants && !r.in_place);
        for (rank, (output, taken, done)) in execute(&ranks).into_iter().enumerate() {
            prop_assert!(output == wanted(rank, size), "rank {}", rank);
            prop_assert_eq!(done, vec![Ctx(0), Ctx(1), Ctx(2)]);
            // Nobody takes anything that has to come again.
            prop_assert_eq!(taken, if possible { ((size - 1) * BLOCK) as u64 } else { 0 });
        }
    }
}

#[test]
fn a_block_below_the_least_goes_through_slots() {
    let len = (512 << 10) - 8;
    let plan = one_phase(moves(2, len));
    let taken = on_ranks(2, SMALL, |rank, mut node| {
        let mut memory =
            Memory { input: vec![rank as u8; 2 * len], output: vec![9; 2 * len], scratch: vec![] };
        node.submit(phase(Collective::AllToAll, &plan, memory.buffers(), 2, len)).unwrap();
        drive(&mut node, 1, 50).unwrap();
        assert!(memory.output[..len] == vec![0; len] && memory.output[len..] == vec![1; len]);
        node.copied_once()
    });
    assert_eq!(taken, [0, 0]);
}

/// One call in which each rank begins with an input and ends with an output: bytes that each took from its peers' memory.
fn taken_by<const N: usize>(
    collective: Collective,
    moves: Vec<Move>,
    len: usize,
    ranks: [(Vec<u8>, Vec<u8>); N],
) -> Vec<u64> {
    let plan = one_phase(moves);
    on_ranks(N, SMALL, |rank, mut node| {
        let (input, wanted) = &ranks[rank];
        let mut memory = Memory { input: input.clone(), output: vec![0; wanted.len()], scratch: vec![] };
        node.submit(phase(collective, &plan, memory.buffers(), N, len)).unwrap();
        drive(&mut node, 1, 50).unwrap();
        assert!(memory.output == *wanted, "rank {rank}");
        node.copied_once()
    })
}

/// An all_gather of `size` ranks, of blocks of `len` bytes, in place or not: bytes that each took from its peers' memory.
fn gather(size: usize, len: usize, in_place: bool) -> Vec<u64> {
    let plan = one_phase(gather_moves(size, len));
    on_ranks(size, SMALL, |rank, mut node| {
        let input = content(rank, 0, len);
        let mut memory = Memory { input, output: vec![0; size * len], scratch: vec![] };
        let mut buffers = memory.buffers();
        if in_place {
            let own = buffers.output.slice(rank * len, len);
            own.copy_from(buffers.input);
            buffers.input = own;
        }
        node.submit(phase(Collective::AllGather, &plan, buffers, size, len)).unwrap();
        drive(&mut node, 1, 50).unwrap();
        let wanted: Vec<u8> = (0..size).flat_map(|from| content(from, 0, len)).collect();
        assert!(memory.output == wanted, "rank {rank} of {size}, {len} bytes");
        node.copied_once()
    })
}

/// In place, too, no rank writes over what its peer reads.
#[test]
fn all_gathers_of_two_ranks_are_read_straight() {
    for len in [BLOCK, LONG] {
        assert_eq!(gather(2, len, false), [len as u64; 2]);
        assert_eq!(gather(2, len, true), [len as u64; 2]);
    }
}

/// Each rank's input is as long as its own block.
#[test]
fn blocks_of_different_lengths_are_read_straight() {
    let lens = [BLOCK + 8, BLOCK];
    let gives = |from: usize| {
        let dst = Span::output(from * lens[0], lens[from]);
        span_move(Who::One(from as u32), Who::All, Span::input(0, lens[from]), dst)
    };
    let wanted = [content(0, 0, lens[0]), content(1, 0, lens[1])].concat();
    let taken = taken_by(
        Collective::AllGather,
        (0..2).map(gives).collect(),
        lens[0],
        [0, 1].map(|rank| (content(rank, 0, lens[rank]), wanted.clone())),
    );
    assert_eq!(taken, [lens[1] as u64, lens[0] as u64]);
}

#[test]
fn other_all_gathers_go_through_slots() {
    assert_eq!(gather(2, (512 << 10) - 8, false), [0; 2]);
    assert_eq!(gather(2, (8 << 20) + 8, false), [0; 2]);
    assert_eq!(gather(3, BLOCK, false), [0; 3]);
}

#[test]
fn blocks_are_taken_a_stretch_at_a_time() {
    let blocks = |rank: usize| {
        let input = (0..3).flat_map(|block| content(rank, block, LONG)).collect();
        (input, (0..3).flat_map(|from| content(from, rank, LONG)).collect())
    };
    let taken = taken_by(Collective::AllToAll, moves(3, LONG), LONG, [0, 1, 2].map(blocks));
    assert_eq!(taken, [2 * LONG as u64; 3]);
}

/// Rank 0 gives a block of `len` bytes to all ranks, or takes one from each, as `collective` says; `None`: nothing.
fn alone(collective: Collective, size: usize, len: usize) -> Vec<Move> {
    let (root, ranks) = (Who::One(0), 0..size as u32);
    let block = |rank: u32| rank as usize * len;
    let there = Span::output(0, len);
    match collective {
        Collective::Broadcast => vec![span_move(root, Who::All, there, there)],
        Collective::Scatter => {
            let gives = |to| span_move(root, Who::One(to), Span::input(block(to), len), there);
            ranks.map(gives).collect()
        }
        _ => {
            let gives =
                |from| span_move(Who::One(from), root, Span::input(0, len), Span::output(block(from), len));
            ranks.map(gives).collect()
        }
    }
}

/// Such a call: bytes that each rank copied between its memory and its peers'.
fn copied(
    collective: Collective,
    size: usize,
    len: usize,
    wants: &(dyn Fn(usize) -> bool + Sync),
) -> Vec<u64> {
    let plan = one_phase(alone(collective, size, len));
    let all = |rank: usize| (0..size).flat_map(|block| content(rank, block, len)).collect::<Vec<u8>>();
    let gathered = || (0..size).flat_map(|from| content(from, 0, len)).collect::<Vec<u8>>();
    let member = |group, rank: usize, size| Membership {
        single_copy: if wants(rank) { SingleCopies::ALL } else { SingleCopies::NONE },
        ..membership(group, rank, size)
    };
    on_members(size, SMALL, member, |rank, mut node| {
        let is_root = rank == 0;
        let (input, output, wanted) = match collective {
            Collective::Broadcast => {
                (vec![], if is_root { content(0, 0, len) } else { vec![9; len] }, content(0, 0, len))
            }
            Collective::Scatter => {
                (if is_root { all(0) } else { vec![] }, vec![9; len], content(0, rank, len))
            }
            _ if is_root => (content(0, 0, len), vec![9; size * len], gathered()),
            _ => (content(rank, 0, len), vec![], vec![]),
        };
        let mut memory = Memory { input, output, scratch: vec![] };
        for ctx in 0..2 {
            let call = Call::new(collective, DType::U8, len as u64).pack();
            node.submit(run(&plan, memory.buffers(), arith(DType::U8, ReduceOp::Sum, size), call, ctx))
                .unwrap();
        }
        assert_eq!(drive(&mut node, 2, 50).unwrap(), [Ctx(0), Ctx(1)]);
        assert!(memory.output == wanted, "{collective}, {len} bytes, rank {rank} of {size}");
        node.copied_once()
    })
}

const ALONE: [Collective; 3] = [Collective::Broadcast, Collective::Scatter, Collective::Gather];
const LEAST_ALONE: usize = 256 << 10;

/// C6: every byte once, half of a broadcast by either rank, and more of what the other ranks give or take by them.
#[test]
fn the_rank_that_gives_or_takes_alone_does_not_copy_alone() {
    let all = |_| true;
    for len in [LEAST_ALONE, BLOCK, LONG] {
        let whole = 2 * len as u64;
        for collective in ALONE {
            let each = copied(collective, 2, len, &all);
            assert_eq!(each.iter().sum::<u64>(), whole, "{collective}: {each:?}");
            let share = each[0] as f64 / whole as f64;
            let wanted = if collective == Collective::Broadcast { 0.5 } else { 0.25 };
            assert!((share - wanted).abs() < 0.01, "{collective}: {each:?}");
        }
        for collective in [Collective::Scatter, Collective::Gather] {
            let each = copied(collective, 3, len, &all);
            assert_eq!(each.iter().sum::<u64>(), 2 * whole, "{collective}: {each:?}");
            assert!(each.iter().all(|&one| one > whole / 4), "{collective}: {each:?}");
        }
    }
}

#[test]
fn where_a_rank_does_not_want_it_nobody_copies_so() {
    for collective in ALONE {
        for unwilling in [0, 1] {
            assert_eq!(copied(collective, 2, BLOCK, &|rank| rank != unwilling), [0, 0], "{collective}");
        }
    }
}

#[test]
fn what_one_gives_or_takes_of_other_lengths_goes_through_slots() {
    for collective in ALONE {
        assert_eq!(copied(collective, 2, LEAST_ALONE - 8, &|_| true), [0, 0], "{collective}");
    }
    assert_eq!(copied(Collective::Broadcast, 3, BLOCK, &|_| true), [0, 0, 0], "several readers");
    assert_eq!(copied(Collective::Broadcast, 2, (32 << 20) + 8, &|_| true), [0, 0]);
}

/// C5: a rank gives up at any time while its peer writes into its memory. From then on its bytes are its own.
#[test]
fn nobody_writes_into_the_memory_of_a_rank_that_gave_up() {
    const LEN: usize = 8 << 20;
    /// Of these the root writes half; it writes one at each poll.
    const PIECE: usize = 1 << 20;
    let plan = one_phase(alone(Collective::Broadcast, 2, LEN));
    for turn in 0..192 {
        // One piece, and only one, is what the two are at odds about: it is being written when rank 1 gives up, or about to
        // be, or has just been.
        let before = 1 + turn % 2;
        let (time_of_piece, begins) = (AtomicUsize::new(0), AtomicBool::new(false));
        let met = AtomicUsize::new(0);
        let until = |what: &dyn Fn() -> bool| {
            let started = Instant::now();
            for look in 1.. {
                if what() {
                    return;
                }
                assert!(started.elapsed() < PATIENCE, "turn {turn}: the other rank does not come");
                // Whoever sleeps comes too late to be in the way.
                if look % 4096 == 0 { std::thread::yield_now() } else { std::hint::spin_loop() }
            }
        };
        let meet = |number: usize| {
            met.fetch_add(1, Ordering::SeqCst);
            until(&|| met.load(Ordering::SeqCst) >= 2 * number);
        };
        let wrote = on_ranks(2, SMALL, |rank, mut node| {
            let mut memory = Memory { input: vec![], output: vec![1 + rank as u8; LEN], scratch: vec![] };
            node.submit(phase(Collective::Broadcast, &plan, memory.buffers(), 2, LEN)).unwrap();
            let mut done = Vec::new();
            if rank == 0 {
                let started = Instant::now();
                while (node.copied_once() as usize) < before * PIECE {
                    let now = Instant::now();
                    node.poll(&mut done).unwrap();
                    time_of_piece.store(now.elapsed().as_nanos() as usize, Ordering::SeqCst);
                    assert!(started.elapsed() < PATIENCE);
                }
                meet(1);
                begins.store(true, Ordering::SeqCst);
                let is_told = node.poll(&mut done).is_err();
                meet(2);
                // Nothing more comes of it, however often it tries.
                assert!(is_told || (0..100).any(|_| node.poll(&mut done).is_err()));
                meet(3);
                assert_eq!(done, []);
                return node.copied_once() as usize;
            }
            // It says where its data lies and copies nothing itself: the root alone is at it.
            node.poll(&mut done).unwrap();
            meet(1);
            // From its beginning until a while after its end.
            let delay = time_of_piece.load(Ordering::SeqCst) * (turn / 2 % 32) / 24;
            until(&|| begins.load(Ordering::SeqCst));
            let now = Instant::now();
            while (now.elapsed().as_nanos() as usize) < delay {
                std::hint::spin_loop();
            }
            node.abort(&smddp_core::Error::Internal("enough".to_owned()));
            // A byte of every page: to look at all of them, or to write them, would take longer than a piece that comes late.
            let look = || -> Vec<u8> {
                let pages = memory.output.iter().step_by(4096);
                // SAFETY: a reference; the other rank writes to it if this test is to fail.
                pages.map(|byte| unsafe { std::ptr::from_ref(byte).read_volatile() }).collect()
            };
            let seen = look();
            meet(2);
            meet(3);
            assert!(look() == seen, "written behind its back, turn {turn}");
            0
        })[0];
        let pieces = before * PIECE..=(before + 1) * PIECE;
        assert!(pieces.contains(&wrote), "turn {turn}: the root wrote {wrote} bytes, of {pieces:?}");
    }
}

/// Two ranks polled by hand, of one all_to_all.
struct Pair {
    nodes: Vec<ShmNode>,
    buffers: Vec<Buffers>,
    plan: Arc<Plan>,
    len: usize,
    _memories: Vec<Memory>,
}

impl Pair {
    fn new(len: usize) -> Pair {
        let nodes = on_ranks(2, SMALL, |_, node| node);
        let input = |rank| [content(rank, 0, len), content(rank, 1, len)].concat();
        let memory = |rank| Memory { input: input(rank), output: vec![0; 2 * len], scratch: vec![] };
        let mut memories: Vec<Memory> = (0..2).map(memory).collect();
        let buffers = memories.iter_mut().map(Memory::buffers).collect();
        Pair { nodes, buffers, plan: one_phase(moves(2, len)), len, _memories: memories }
    }

    fn submit(&mut self, rank: usize) {
        let run = phase(Collective::AllToAll, &self.plan, self.buffers[rank], 2, self.len);
        self.nodes[rank].submit(run).unwrap();
    }

    /// Polls `rank` until nothing more happens; the marks that came.
    fn exhaust(&mut self, rank: usize) -> Vec<Ctx> {
        let mut done = Vec::new();
        while self.nodes[rank].poll(&mut done).unwrap() {}
        done
    }

    /// Whether `rank` has what it is to end with from rank `from`.
    fn has(&self, rank: usize, from: usize) -> bool {
        let mut bytes = vec![0; self.len];
        // SAFETY: `bytes` outlives the call.
        unsafe { Region::of(&mut bytes) }
            .copy_from(self.buffers[rank].output.slice(from * self.len, self.len));
        bytes == content(from, rank, self.len)
    }

    fn is_right(&self, rank: usize) -> bool {
        (0..2).all(|from| self.has(rank, from))
    }
}

/// C2: nobody reads a peer that has not come, and nobody is done while another may still read from it.
#[test]
fn a_rank_is_held_until_its_peers_have_read() {
    let mut pair = Pair::new(BLOCK);
    pair.submit(0);
    assert_eq!(pair.exhaust(0), []);
    assert_eq!((pair.nodes[0].copied_once(), pair.nodes[0].waiting_for()), (0, vec![1]));
    pair.submit(1);
    let mut done = Vec::new();
    assert!(pair.nodes[1].poll(&mut done).unwrap(), "it says where its data lies");
    assert_eq!(pair.exhaust(0), [], "rank 1 has not read all of rank 0");
    assert_eq!((pair.nodes[0].copied_once(), pair.is_right(0)), (BLOCK as u64, true));
    done.extend(pair.exhaust(1));
    assert_eq!(done, [Ctx(1)]);
    assert_eq!(pair.exhaust(0), [Ctx(1)]);
    assert!(pair.is_right(1));
}

/// C2, of a rank that waits for the others to come: it says that it has read no earlier.
#[test]
fn a_rank_that_came_first_is_waited_for_too() {
    let mut pair = Pair::new(BLOCK);
    pair.submit(0);
    assert_eq!(pair.exhaust(0), []);
    pair.submit(1);
    assert_eq!(pair.exhaust(1), [], "rank 0 has not read anything");
    assert!(pair.is_right(1));
    assert_eq!(pair.exhaust(0), [Ctx(1)]);
    assert_eq!(pair.exhaust(1), [Ctx(1)]);
    assert!(pair.is_right(0));
}

/// C4. One poll takes less than a block.
#[test]
fn a_rank_copies_its_own_block_before_its_peers() {
    let mut pair = Pair::new(4 << 20);
    let mut done = Vec::new();
    (0..2).for_each(|rank| pair.submit(rank));
    for rank in [0, 1] {
        while !(pair.has(rank, 0) || pair.has(rank, 1)) {
            pair.nodes[1 - rank].poll(&mut done).unwrap();
            pair.nodes[rank].poll(&mut done).unwrap();
        }
        assert!(pair.has(rank, rank), "rank {rank} has its own first");
    }
}
