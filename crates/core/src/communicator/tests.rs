//! What a group decides alone: which plans it keeps, and which calls work in shared memory.

use super::*;
use crate::engine::execution::Route;
use crate::settings::Settings;
use crate::testing::{MemoryNode, MemoryTransports};

/// Rank 0 of that shape, which hears of nobody.
fn first(shape: GroupShape) -> Communicator<MemoryTransports> {
    let seat = Seat {
        id: 7,
        name: "test".into(),
        rank: 0,
        local: MemoryNode::new(shape.local_size(0), 1).remove(0),
        routes: (0..shape.size() as u32)
            .map(
                |rank| {
                    if shape.same_node(0, rank as usize) { Route::Local(rank) } else { Route::Fabric(rank) }
                },
            )
            .collect(),
        shape: Arc::new(shape),
    };
    let engine = Arc::new(Engine::new(&Settings::default()).unwrap());
    Communicator::new(engine, seat, Tuning::default(), Duration::from_secs(60)).unwrap()
}

#[test]
fn plans_that_no_call_repeats_do_not_pile_up() {
    let group = first(GroupShape::even(1, 1));
    let plan = |count| {
        let request = Request::new(Collective::AllReduce, DType::U8, count, Region::EMPTY, Region::EMPTY);
        group.plan(&request).unwrap()
    };
    let kept = || group.inner.plans.lock().unwrap().made.len();
    let first = plan(1);
    for count in 2..=PLANS_KEPT {
        plan(count);
    }
    assert!(kept() == PLANS_KEPT && Arc::ptr_eq(&first, &plan(1)));
    for count in PLANS_KEPT + 1..=3 * PLANS_KEPT {
        plan(count);
        assert!(kept() <= PLANS_KEPT, "{} plans after {count} calls", kept());
    }
}

#[test]
fn over_several_nodes_what_is_only_moved_is_not_taken_from_shared_memory() {
    use Collective::{AllGather, AllReduce, Broadcast};
    let mut bytes = vec![0u8; SHARED_FROM];
    // SAFETY: the bytes outlive the group, which touches none of them.
    let memory = unsafe { Region::of(&mut bytes) };
    for (nodes, shared) in [(1, [AllReduce, Broadcast, AllGather].as_slice()), (2, &[AllReduce])] {
        let group = first(GroupShape::even(nodes, 2));
        group.inner.shared.enter(1, memory);
        for collective in [AllReduce, Broadcast, AllGather] {
            let output = if collective == AllGather { Region::EMPTY } else { memory };
            let request = Request::new(collective, DType::U8, memory.len(), memory, output);
            assert_eq!(
                group.is_shared(&request),
                shared.contains(&collective),
                "{collective} on {nodes} nodes"
            );
        }
    }
}
