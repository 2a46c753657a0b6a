//! Random groups: uneven nodes, ranks placed in any order, any sizes, rounds and staging.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::Arc;

use proptest::prelude::*;
use smddp_core::plan::check::World;
use smddp_core::plan::{CallShape, Override, Tuning, candidates};
use smddp_core::{Collective, GroupShape};

/// Up to 24 ranks on up to 7 nodes, interleaved as it comes.
fn shapes() -> impl Strategy<Value = GroupShape> {
    (1u8..=7).prop_flat_map(|nodes| {
        prop::collection::vec(0..nodes, 1..24).prop_map(|labels| GroupShape::from_labels(&labels))
    })
}

fn collectives() -> impl Strategy<Value = Collective> {
    prop::sample::select(Collective::PLANNED.to_vec())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_plan_is_right(
        shape in shapes(),
        collective in collectives(),
        (algorithm, root) in any::<(prop::sample::Index, prop::sample::Index)>(),
        (log_elem, count, chunk) in (0u32..4, 0usize..70, 0usize..90),
        (one_owner, staged, shared, in_place) in any::<(bool, bool, bool, bool)>(),
        staging in prop::sample::select(vec![1usize << 14, 1 << 16, 1 << 24]),
        counts in prop::option::of(prop::collection::vec(0usize..9, 24)),
    ) {
        let names: Vec<_> = candidates(collective, shape.node_count()).collect();
        let overrides = Override::parse_all(&format!("{collective}={}", algorithm.get(&names))).unwrap();
        let one_owner = if one_owner { usize::MAX } else { 0 };
        let tuning = Tuning { chunk, staging, staged, one_owner, overrides };
        let blocks = matches!(collective, Collective::AllGather | Collective::ReduceScatter);
        let counts = counts.filter(|_| blocks).map(|c| Arc::from(&c[..shape.size()]));
        let root = root.index(shape.size());
        let shared = shared && (shape.node_count() == 1 || collective == Collective::AllReduce);
        let call = CallShape { counts, shared, ..CallShape::rooted(collective, 1 << log_elem, count, root) };
        let world = World::new(&shape, &call, &tuning).unwrap();
        let world = if in_place { world.in_place() } else { world };
        let report = world.check();
        prop_assert!(report.is_ok(), "{}", report.unwrap_err());
        prop_assert!(report.unwrap().scratch <= tuning.scratch());
    }

    #[test]
    fn every_uneven_all_to_all_is_right(shape in shapes(), sizes in prop::collection::vec(0usize..5, 24 * 24)) {
        let size = shape.size();
        let call = |r: usize| {
            let send = (0..size).map(|j| sizes[r * 24 + j]).collect();
            let recv = (0..size).map(|j| sizes[j * 24 + r]).collect();
            CallShape { splits: Some((send, recv)), ..CallShape::new(Collective::AllToAll, 2, 0) }
        };
        let world = World::with_calls(&shape, (0..size).map(call).collect(), &Tuning::default()).unwrap();
        let report = world.check();
        prop_assert!(report.is_ok(), "{}", report.unwrap_err());
    }
}
