//! Slots of which small exchanges take a part at a time.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used)]

mod common;

use common::{Memory, arith, call, drive, membership, on_members, one_phase, run, span_move};
use proptest::prelude::*;
use smddp_core::dtype::{DType, ReduceOp};
use smddp_core::order::Order;
use smddp_core::plan::{Span, Who};
use smddp_core::transport::{Ctx, NodeLocal, Patience};
use smddp_shm::{Geometry, Membership};

/// No multiple of a part.
const LARGE: Geometry = Geometry { slot: 396 << 10, slots: 2 };

/// What the root, or rank `rank`, has in exchange `number`.
fn content(number: usize, rank: usize, len: usize) -> Vec<u8> {
    (0..len).map(|i| ((i * 7 + number * 31 + rank * 101) % 251) as u8).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    /// One rank gives to all, or all to all, of all sizes up to several slots.
    #[test]
    fn exchanges_of_all_sizes_arrive(
        size in 2usize..4,
        at_once in any::<bool>(),
        hands_back in any::<bool>(),
        far in prop::sample::select(vec![Order::Straight, Order::FourPages]),
        calls in prop::collection::vec((prop_oneof![1usize..200, 100_000usize..150_000, 200_000usize..900_000], any::<bool>()), 1..20),
    ) {
        let member = |group, rank, size| Membership { hands_back, far, ..membership(group, rank, size) };
        let results = on_members(size, LARGE, member, |rank, mut node| {
            let mut wrong = Vec::new();
            for (number, &(len, symmetric)) in calls.iter().enumerate() {
                let block = |of: usize| if symmetric { of * len } else { 0 };
                let givers = if symmetric { size } else { 1 };
                let moves = (0..givers).map(|from| {
                    let to = Span::output(block(from), len);
                    span_move(Who::One(from as u32), Who::All, Span::input(0, len), to)
                });
                let plan = one_phase(moves.collect());
                let mut memory =
                    Memory { input: content(number, rank, len), output: vec![0; givers * len], scratch: vec![] };
                let phase =
                    run(&plan, memory.buffers(), arith(DType::U8, ReduceOp::Sum, size), call(len), number as u64);
                let over = at_once && node.run_now(&phase, &mut Patience::of_looks(50)).unwrap();
                if !at_once {
                    node.submit(phase).unwrap();
                }
                if !over {
                    assert_eq!(drive(&mut node, 1, 50).unwrap(), vec![Ctx(number as u64)]);
                }
                let wanted: Vec<u8> = (0..givers).flat_map(|from| content(number, from, len)).collect();
                if memory.output != wanted {
                    wrong.push(number);
                }
            }
            wrong
        });
        prop_assert!(results.iter().all(Vec::is_empty), "{:?}", results);
    }
}
