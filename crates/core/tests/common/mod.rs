//! Groups for tests: ranks as threads over plain memory that delivers in seeded order.

use std::sync::Arc;
use std::time::Duration;

use smddp_core::GroupShape;
use smddp_core::communicator::Communicator;
use smddp_core::engine::Engine;
use smddp_core::engine::execution::Route;
use smddp_core::engine::group::Seat;
use smddp_core::plan::Tuning;
use smddp_core::settings::Settings;
use smddp_core::testing::{MemoryFabric, MemoryNode, MemoryTransports};

pub type Group = Communicator<MemoryTransports>;

/// One communicator a rank, each with an engine of its own, as processes would have.
pub fn groups(shape: &GroupShape, seed: u64, tuning: &Tuning) -> Vec<Group> {
    groups_over(shape, seed, tuning, |node| node)
}

/// As [`groups`], over what `prepare` makes of their nodes' transports.
pub fn groups_over(
    shape: &GroupShape,
    seed: u64,
    tuning: &Tuning,
    prepare: impl Fn(MemoryNode) -> MemoryNode,
) -> Vec<Group> {
    seated(shape, seed, tuning, prepare).into_iter().map(|(_, group)| group).collect()
}

/// As [`groups_over`], with the engines.
pub fn seated(
    shape: &GroupShape,
    seed: u64,
    tuning: &Tuning,
    prepare: impl Fn(MemoryNode) -> MemoryNode,
) -> Vec<(Arc<Engine<MemoryTransports>>, Group)> {
    let shape = Arc::new(shape.clone());
    let fabrics = MemoryFabric::new(shape.size(), seed);
    let mut nodes: Vec<Vec<Option<MemoryNode>>> = (0..shape.node_count())
        .map(|n| MemoryNode::new(shape.ranks_on(n).len(), seed + n as u64).into_iter().map(Some).collect())
        .collect();
    let route = |from: usize, to: usize| {
        if shape.same_node(to, from) {
            Route::Local(shape.local_of(to) as u32)
        } else {
            Route::Fabric(to as u32)
        }
    };
    let group = |(rank, fabric): (usize, MemoryFabric)| {
        let engine = Arc::new(Engine::new(&Settings::default()).unwrap());
        engine.set_crowded();
        // As in a process that needs none: its thread then sleeps until it is called.
        if shape.node_count() > 1 {
            engine.with_fabric(|| Ok(fabric), |_| Ok(())).unwrap();
        }
        let seat = Seat {
            id: 7,
            name: "test".into(),
            rank,
            shape: Arc::clone(&shape),
            local: prepare(nodes[shape.node_of(rank)][shape.local_of(rank)].take().unwrap()),
            routes: (0..shape.size()).map(|to| route(rank, to)).collect(),
        };
        let group = Group::new(Arc::clone(&engine), seat, tuning.clone(), Duration::from_secs(60)).unwrap();
        (engine, group)
    };
    fabrics.into_iter().enumerate().map(group).collect()
}

/// Runs `f` on every rank at once.
pub fn on_all<R: Send>(groups: &[Group], f: impl Fn(&Group) -> R + Sync) -> Vec<R> {
    std::thread::scope(|scope| {
        let f = &f;
        let handles: Vec<_> = groups.iter().map(|g| scope.spawn(move || f(g))).collect();
        handles.into_iter().map(|h| h.join().unwrap()).collect()
    })
}
