//! Which algorithm serves a call: what a person says, else one table.

use super::algorithms::inside_node;
use super::build::LINE;
use super::context::Context;
use super::data::{Op, Plan, Schedule, Span};
use super::shape::CallShape;
use super::tuning::{Override, Tuning};
use super::{cost, hierarchical};
use crate::call::Collective;
use crate::error::{Error, Result};
use crate::far;
use crate::topology::GroupShape;

/// The algorithm of calls on memory that the ranks of the one node share. Not a person's choice: it is the memory's.
const SHARED: &str = "shared";

/// The algorithms of calls whose data lies on a device: those in which a rank computes its own share alone.
const fn far_algorithm(collective: Collective) -> Option<&'static str> {
    match collective {
        Collective::AllReduce => Some("sharded"),
        Collective::AllGather | Collective::ReduceScatter => Some("direct"),
        _ => None,
    }
}

/// For which groups a row holds.
#[derive(Clone, Copy, Debug)]
enum Nodes {
    One,
    UpTo(usize),
    Any,
}

/// For which sizes a row holds.
#[derive(Clone, Copy, Debug)]
enum Size {
    /// Bytes of the call at most.
    UpTo(usize),
    Any,
}

#[derive(Clone, Copy, Debug)]
enum Pick {
    Always(&'static str),
    /// The one that [`cost`] finds fastest with its default model.
    Cheapest,
}

/// The first row that fits decides.
struct Row {
    collective: Collective,
    nodes: Nodes,
    size: Size,
    pick: Pick,
}

const fn row(collective: Collective, nodes: Nodes, size: Size, pick: Pick) -> Row {
    Row { collective, nodes, size, pick }
}

const KIB: usize = 1024;

const TABLE: &[Row] = {
    use Collective::*;
    use Pick::*;
    &[
        row(AllReduce, Nodes::One, Size::Any, Always("one_phase")),
        row(AllReduce, Nodes::UpTo(8), Size::UpTo(16 * KIB), Always("recursive_doubling")),
        row(AllReduce, Nodes::UpTo(2), Size::Any, Always("sharded")),
        // Several senders at one receiver's link cost it a tenth (docs/performance-log.md).
        row(AllReduce, Nodes::UpTo(4), Size::UpTo(2048 * KIB), Always("sharded")),
        row(AllReduce, Nodes::UpTo(4), Size::Any, Always("ring")),
        row(AllReduce, Nodes::UpTo(8), Size::Any, Always("sharded")),
        row(AllReduce, Nodes::Any, Size::Any, Cheapest),
        row(Broadcast, Nodes::One, Size::Any, Always("one_phase")),
        row(Broadcast, Nodes::UpTo(2), Size::Any, Always("tree")),
        row(Broadcast, Nodes::Any, Size::Any, Cheapest),
        row(Reduce, Nodes::One, Size::Any, Always("one_phase")),
        row(Reduce, Nodes::UpTo(2), Size::Any, Always("tree")),
        row(Reduce, Nodes::Any, Size::Any, Cheapest),
        row(AllGather, Nodes::One, Size::Any, Always("one_phase")),
        row(AllGather, Nodes::UpTo(8), Size::Any, Always("direct")),
        row(AllGather, Nodes::Any, Size::Any, Cheapest),
        row(ReduceScatter, Nodes::One, Size::Any, Always("one_phase")),
        row(ReduceScatter, Nodes::Any, Size::Any, Always("direct")),
        row(AllToAll, Nodes::One, Size::Any, Always("one_phase")),
        row(AllToAll, Nodes::Any, Size::Any, Always("pairwise")),
        row(Gather, Nodes::One, Size::Any, Always("one_phase")),
        row(Gather, Nodes::Any, Size::Any, Always("pairwise")),
        row(Scatter, Nodes::One, Size::Any, Always("one_phase")),
        row(Scatter, Nodes::Any, Size::Any, Always("pairwise")),
        row(Barrier, Nodes::One, Size::Any, Always("one_phase")),
        row(Barrier, Nodes::Any, Size::Any, Always("recursive_doubling")),
    ]
};

/// The algorithm for a call: the first override that fits it and the group, else the table's.
pub fn choose(shape: &GroupShape, call: &CallShape, tuning: &Tuning) -> Result<&'static str> {
    let (nodes, bytes) = (shape.node_count(), call.bytes(shape.size()));
    let fits = |o: &&Override| o.fits(call.collective, bytes) && inside_node(o.algorithm) == (nodes == 1);
    if let Some(chosen) = tuning.overrides.iter().find(fits) {
        return Ok(chosen.algorithm);
    }
    let fits = |row: &&Row| {
        row.collective == call.collective
            && match row.nodes {
                Nodes::One => nodes == 1,
                Nodes::UpTo(most) => nodes <= most,
                Nodes::Any => true,
            }
            && match row.size {
                Size::UpTo(most) => bytes <= most,
                Size::Any => true,
            }
    };
    match TABLE.iter().find(fits).map(|row| row.pick) {
        Some(Pick::Always(name)) => Ok(name),
        Some(Pick::Cheapest) => cost::cheapest(shape, call, tuning),
        None => Err(Error::Internal(format!("no algorithm for {}", call.collective))),
    }
}

/// What rank `rank` does in a call, by the algorithm that the table or a person gives.
pub fn schedule(shape: &GroupShape, rank: usize, call: &CallShape, tuning: &Tuning) -> Result<Schedule> {
    check(shape, rank, call)?;
    let cx = Context { shape, rank, call, tuning };
    if call.moves_nothing() {
        return Ok(Schedule::nothing());
    }
    if shape.size() == 1 {
        return Ok(alone(&cx));
    }
    // The transport sees to it that nothing is copied on the way: the one phase is the same.
    let inside = call.shared && shape.node_count() == 1;
    let in_one_round = call.far.then(|| Tuning { chunk: usize::MAX, staging: usize::MAX, ..tuning.clone() });
    let cx = Context { tuning: in_one_round.as_ref().unwrap_or(tuning), ..cx };
    let algorithm = match far_algorithm(call.collective) {
        _ if inside => "one_phase",
        Some(algorithm) if call.far => algorithm,
        _ => choose(shape, call, tuning)?,
    };
    let schedule = match call.collective {
        Collective::AllReduce => hierarchical::schedule(&cx, algorithm),
        Collective::Barrier => Ok(hierarchical::barrier(&cx)),
        Collective::Broadcast => super::broadcast::schedule(&cx, algorithm),
        Collective::Reduce => super::reduce::schedule(&cx, algorithm),
        Collective::AllGather => Ok(super::all_gather::schedule(&cx, algorithm)),
        Collective::ReduceScatter => super::reduce_scatter::schedule(&cx),
        Collective::AllToAll => Ok(super::pairwise::all_to_all(&cx)),
        Collective::Gather => Ok(super::pairwise::gather(&cx)),
        Collective::Scatter => Ok(super::pairwise::scatter(&cx)),
        Collective::SendRecv => Err(Error::Internal("point to point has no schedule".to_owned())),
    }?;
    Ok(if inside { Schedule { algorithm: SHARED, ..schedule } } else { schedule })
}

/// One rank has the result already, or it is a copy away.
fn alone(cx: &Context<'_>) -> Schedule {
    let mut plan = Plan::default();
    let len = cx
        .call
        .bytes(1)
        .max(cx.call.splits.as_ref().map_or(0, |(s, _)| s.iter().sum::<usize>() * cx.call.elem));
    match cx.call.collective {
        Collective::AllGather
        | Collective::ReduceScatter
        | Collective::AllToAll
        | Collective::Gather
        | Collective::Scatter => {
            plan.push(Op::Copy { dst: Span::output(0, len), src: Span::input(0, len) }, &[]);
        }
        Collective::AllReduce
        | Collective::Broadcast
        | Collective::Reduce
        | Collective::Barrier
        | Collective::SendRecv => {}
    }
    Schedule::single("alone", plan, 0)
}

/// Callers check arguments where they can name them; what is wrong here is a bug of ours.
fn check(shape: &GroupShape, rank: usize, call: &CallShape) -> Result<()> {
    let size = shape.size();
    let lists = call.counts.iter().chain(call.splits.iter().flat_map(|(s, r)| [s, r]));
    let sound = rank < size
        && call.root < size
        && call.elem.is_power_of_two()
        && call.elem <= LINE
        && (!call.far || shape.even_local_size() == Some(1) && far::carries(call.collective))
        && lists.into_iter().all(|l| l.len() == size);
    if sound {
        return Ok(());
    }
    Err(Error::Internal(format!("cannot plan {call:?} for rank {rank} of {size}")))
}

#[cfg(test)]
mod tests {
    use super::super::algorithms::{algorithms, candidates};
    use super::*;

    #[test]
    fn overrides_hold_where_they_fit() {
        let tuning =
            Tuning { overrides: Override::parse_all("all_reduce:64K-=ring").unwrap(), ..Tuning::default() };
        let name = |shape: &GroupShape, count| {
            schedule(shape, 0, &CallShape::new(Collective::AllReduce, 4, count), &tuning).unwrap().algorithm
        };
        assert_eq!(name(&GroupShape::even(2, 2), 1 << 20), "hierarchical(ring)");
        assert_eq!(name(&GroupShape::even(2, 1), 1 << 20), "ring");
        assert_eq!(name(&GroupShape::even(2, 2), 100), "hierarchical(recursive_doubling)");
        assert_eq!(name(&GroupShape::even(1, 2), 1 << 20), "one_phase");
    }

    #[test]
    fn large_sums_of_a_few_nodes_go_around_a_ring() {
        let name = |nodes, bytes: usize| {
            let call = CallShape::new(Collective::AllReduce, 4, bytes / 4);
            choose(&GroupShape::even(nodes, 2), &call, &Tuning::default()).unwrap()
        };
        for (nodes, large) in [(2, "sharded"), (3, "ring"), (4, "ring"), (5, "sharded")] {
            assert_eq!(name(nodes, 2 << 20), "sharded");
            assert_eq!(name(nodes, 16 << 20), large, "{nodes} nodes");
        }
    }

    #[test]
    fn every_collective_has_a_row_for_every_group_and_every_row_a_valid_name() {
        for row in TABLE {
            if let Pick::Always(name) = row.pick {
                assert!(algorithms(row.collective).contains(&name), "{name}");
                assert_eq!(inside_node(name), matches!(row.nodes, Nodes::One), "{name}");
            }
        }
        for collective in Collective::PLANNED {
            for nodes in [1, 2, 3, 9, 2000] {
                let shape = GroupShape::even(nodes, 2);
                let name = choose(&shape, &CallShape::new(collective, 4, 1000), &Tuning::default()).unwrap();
                assert!(candidates(collective, nodes).any(|n| n == name));
            }
        }
    }
}
