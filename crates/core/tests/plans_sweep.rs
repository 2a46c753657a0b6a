//! Every algorithm, proven for every shape up to 12 nodes of 8 ranks and up to 64 ranks alone on their nodes.
//! Sizes are small, with rests everywhere; shapes are complete.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::Arc;

use smddp_core::plan::check::{Report, World};
use smddp_core::plan::{CallShape, Override, Tuning, candidates, schedule};
use smddp_core::plan::{Op, source_of};
use smddp_core::{Collective, GroupShape};

/// Every shape of the sweep.
fn shapes() -> impl Iterator<Item = GroupShape> {
    let grid = (1..=12).flat_map(|n| (1..=8).map(move |l| GroupShape::even(n, l)));
    grid.chain((13..=64).map(|n| GroupShape::even(n, 1)))
}

fn tuning(collective: Collective, algorithm: &str, chunk: usize) -> Tuning {
    let overrides = Override::parse_all(&format!("{collective}={algorithm}")).unwrap();
    Tuning { chunk, overrides, one_owner: 64, ..Tuning::default() }
}

fn prove(shape: &GroupShape, call: &CallShape, tuning: &Tuning) -> Report {
    let world =
        World::new(shape, call, tuning).unwrap_or_else(|e| panic!("{shape}, {call:?}, {tuning:?}: {e}"));
    let check = |world: &World, how: &str| {
        let name = world.schedules[0].algorithm;
        world.check().unwrap_or_else(|e| panic!("{shape}, {call:?}, {tuning:?}, {name}, {how}: {e}"))
    };
    let report = check(&world, "apart");
    assert!(report.scratch <= tuning.scratch(), "{shape}, {call:?}: {report}");
    if has_blocks(call) {
        assert_eq!(check(&world.in_place(), "in place"), report);
    }
    report
}

/// Whether the call may be made in place or not.
fn has_blocks(call: &CallShape) -> bool {
    use Collective::{AllGather, Gather, ReduceScatter, Scatter};
    matches!(call.collective, AllGather | ReduceScatter | Gather | Scatter) && !call.far
}

/// Proves all algorithms of a collective on all shapes, for (elements, bytes of an element, bytes of a round).
fn sweep(collective: Collective, sizes: impl Fn(usize) -> Vec<(usize, usize, usize)>) {
    for shape in shapes() {
        let size = shape.size();
        let mut roots = vec![0, size - 1, size / 2];
        roots.dedup();
        roots.truncate(if collective.rooted() { 3 } else { 1 });
        for algorithm in candidates(collective, shape.node_count()) {
            for (count, elem, chunk) in sizes(size) {
                for &root in &roots {
                    let call = CallShape::rooted(collective, elem, count, root);
                    prove(&shape, &call, &tuning(collective, algorithm, chunk));
                }
            }
        }
    }
}

#[test]
fn all_reduce() {
    sweep(Collective::AllReduce, |size| {
        vec![(1, 4, 0), (size * 3 + 1, 2, 0), (37, 4, 44), (size * 2 + 5, 1, 16)]
    });
}

/// On memory that the ranks of each node share: nothing of the user's passes through scratch.
#[test]
fn in_shared_memory() {
    for shape in shapes().filter(|shape| shape.size() > 1) {
        let (size, nodes) = (shape.size(), shape.node_count());
        for algorithm in candidates(Collective::AllReduce, nodes) {
            for (count, elem, chunk) in [(size * 3 + 1, 2, 0), (37, 4, 44)] {
                let call = CallShape { shared: true, ..CallShape::new(Collective::AllReduce, elem, count) };
                let tuning = tuning(Collective::AllReduce, algorithm, chunk);
                let shared = prove_shared(&shape, &call, &tuning).scratch;
                let ordinary = prove(&shape, &CallShape { shared: false, ..call }, &tuning).scratch;
                let direct = nodes == 1 || shape.even_local_size() == Some(1);
                assert!(if direct { shared == ordinary } else { shared < ordinary }, "{shape} {algorithm}");
            }
        }
    }
    use Collective::{AllGather, AllToAll, Broadcast, Gather, Reduce, ReduceScatter};
    for collective in [Broadcast, Reduce, AllGather, ReduceScatter, AllToAll, Gather] {
        for shape in shapes().filter(|shape| shape.size() > 1) {
            let call = CallShape { shared: true, ..CallShape::rooted(collective, 4, 100, 1) };
            prove_shared(&shape, &call, &Tuning::default());
        }
    }
}

/// With the data on a device, which only messages reach.
#[test]
fn on_a_device() {
    use Collective::{AllGather, AllReduce, Broadcast, ReduceScatter};
    let ranks = [2, 3, 4, 5, 7, 8, 16, 33];
    for (collective, size) in
        [AllReduce, ReduceScatter, AllGather, Broadcast].into_iter().flat_map(|c| ranks.map(|n| (c, n)))
    {
        let shape = GroupShape::even(size, 1);
        for (count, elem, chunk) in [(size * 3 + 1, 2, 0), (37, 4, 44), (size * 1100 + 77, 4, 0)] {
            let call = CallShape { far: true, ..CallShape::rooted(collective, elem, count, size / 2) };
            let tuning = Tuning { chunk, staging: 1 << 30, ..Tuning::default() };
            prove(&shape, &call, &tuning);
        }
    }
}

/// Such a call is for ranks alone on their nodes, and for collectives that know it.
#[test]
fn on_a_device_not_everything_goes() {
    let plan = |shape: &GroupShape, collective| {
        let call = CallShape { far: true, ..CallShape::new(collective, 4, 100) };
        schedule(shape, 0, &call, &Tuning::default())
    };
    assert!(plan(&GroupShape::even(2, 1), Collective::AllReduce).is_ok());
    assert!(plan(&GroupShape::even(2, 2), Collective::AllReduce).is_err());
    assert!(plan(&GroupShape::even(2, 1), Collective::Reduce).is_err());
}

/// [`prove`]; and what is shared is taken by the first phase, and by later ones wholly or not at all.
fn prove_shared(shape: &GroupShape, call: &CallShape, tuning: &Tuning) -> Report {
    for rank in 0..shape.size() {
        let made = schedule(shape, rank, call, tuning).unwrap();
        let source = source_of(call.collective);
        for plan in [Some(&made.body), made.tail.as_ref()].into_iter().flatten() {
            let phases =
                plan.steps.iter().filter_map(|s| if let Op::Phase(m) = &s.op { Some(m) } else { None });
            for (i, phase) in phases.enumerate() {
                let shared = phase.iter().filter(|m| m.src.buf == source).count();
                let right = shared == phase.len() || (shared == 0 && i > 0);
                assert!(right, "{shape} {call:?}: phase {i} takes {shared} of {} moves", phase.len());
            }
        }
    }
    prove(shape, call, tuning)
}

#[test]
fn broadcast() {
    sweep(Collective::Broadcast, |size| vec![(1, 2, 0), (size + 3, 4, 0), (29, 1, 5)]);
}

#[test]
fn reduce() {
    sweep(Collective::Reduce, |size| vec![(1, 2, 0), (size + 3, 4, 0), (29, 1, 5)]);
}

#[test]
fn all_gather() {
    sweep(Collective::AllGather, |_| vec![(1, 1, 0), (3, 2, 0)]);
}

#[test]
fn reduce_scatter() {
    sweep(Collective::ReduceScatter, |_| vec![(1, 1, 0), (5, 2, 4)]);
}

#[test]
fn all_to_all() {
    sweep(Collective::AllToAll, |_| vec![(2, 1, 0)]);
}

#[test]
fn gather_and_scatter() {
    sweep(Collective::Gather, |_| vec![(1, 4, 0), (3, 2, 0)]);
    sweep(Collective::Scatter, |_| vec![(1, 4, 0), (3, 2, 0)]);
}

#[test]
fn barrier() {
    sweep(Collective::Barrier, |_| vec![(0, 1, 0)]);
}

#[test]
fn uneven_blocks() {
    for shape in shapes().chain([GroupShape::uneven(&[1, 4, 2]), GroupShape::uneven(&[8, 1])]) {
        let size = shape.size();
        for counts in [
            (0..size).map(|r| r * 7 % 5).collect::<Vec<_>>(),
            (0..size).map(|r| if r == size / 2 { 11 } else { 0 }).collect(),
            vec![0; size],
        ] {
            for collective in [Collective::AllGather, Collective::ReduceScatter] {
                for algorithm in candidates(collective, shape.node_count()) {
                    let counts = Some(Arc::from(counts.clone()));
                    let call = CallShape { counts, ..CallShape::new(collective, 2, 0) };
                    prove(&shape, &call, &tuning(collective, algorithm, 6));
                }
            }
        }
    }
}

#[test]
fn uneven_all_to_all() {
    for shape in shapes().chain([GroupShape::uneven(&[1, 4, 2]), GroupShape::uneven(&[8, 1])]) {
        let size = shape.size();
        let sent = |from: usize, to: usize| (from * 3 + to * 5) % 4;
        let call = |r: usize| {
            let send = (0..size).map(|j| sent(r, j)).collect();
            let recv = (0..size).map(|j| sent(j, r)).collect();
            CallShape { splits: Some((send, recv)), ..CallShape::new(Collective::AllToAll, 4, 0) }
        };
        let world = World::with_calls(&shape, (0..size).map(call).collect(), &Tuning::default()).unwrap();
        world.check().unwrap_or_else(|e| panic!("{shape}: {e}"));
    }
}

#[test]
fn nothing_and_alone() {
    for collective in Collective::PLANNED {
        for shape in
            [GroupShape::even(1, 1), GroupShape::even(1, 3), GroupShape::even(3, 2), GroupShape::even(3, 1)]
        {
            for count in [0, 3] {
                prove(&shape, &CallShape::new(collective, 4, count), &Tuning::default());
            }
        }
    }
}

/// The bound that the balanced exchange is chosen for: 2(N-1)/N of the data over each link, each way.
#[test]
fn bytes_over_a_link_are_the_least_possible() {
    for nodes in 2..=12 {
        for local in [1, 2, 4, 8] {
            let shape = GroupShape::even(nodes, local);
            let count = nodes * local * 40;
            for algorithm in ["sharded", "ring"] {
                let call = CallShape::new(Collective::AllReduce, 4, count);
                let report = prove(&shape, &call, &tuning(Collective::AllReduce, algorithm, 0));
                let least = 2 * (nodes - 1) * count * 4 / nodes;
                assert_eq!((report.sent, report.received), (least, least), "{shape} {algorithm}");
            }
            let call = CallShape::new(Collective::ReduceScatter, 4, 10);
            let report = prove(&shape, &call, &tuning(Collective::ReduceScatter, "direct", 0));
            assert_eq!(report.sent, (nodes - 1) * local * 40, "{shape}");
        }
    }
}

/// Scratch does not grow with the message: gigabytes are planned within the same staging memory.
#[test]
fn scratch_is_bounded_whatever_the_size() {
    for shape in
        [GroupShape::even(2, 2), GroupShape::even(2, 8), GroupShape::even(64, 1), GroupShape::even(300, 8)]
    {
        for collective in [Collective::AllReduce, Collective::Reduce, Collective::ReduceScatter] {
            for algorithm in candidates(collective, shape.node_count()) {
                for staging in [1 << 20, 16 << 20] {
                    let tuning = Tuning { staging, ..tuning(collective, algorithm, 0) };
                    let call = CallShape::new(collective, 4, 1 << 28);
                    let plan = schedule(&shape, 0, &call, &tuning).unwrap();
                    let scratch = plan.scratch_stride() * plan.window;
                    assert!(scratch <= tuning.scratch(), "{shape} {algorithm}: {scratch}");
                    let covered = plan.full_rounds * plan.round_bytes;
                    assert!(
                        covered <= 4 << 28 && covered + plan.round_bytes >= 4 << 28,
                        "{shape} {algorithm}"
                    );
                }
            }
        }
    }
}

/// Contributor sets have no bound of their own.
#[test]
fn more_ranks_than_a_machine_word_has_bits() {
    for algorithm in ["sharded", "halving_doubling"] {
        let shape = GroupShape::even(20, 8);
        let call = CallShape::new(Collective::AllReduce, 4, 333);
        prove(&shape, &call, &tuning(Collective::AllReduce, algorithm, 0));
    }
}
