//! What a call would take on a given machine, by formula: any number of nodes is priced in microseconds.
//!
//! LogGP with a node's link as the shared resource. A round of a call costs
//! - on the wire: `messages * overhead + link bytes / link bandwidth`,
//! - in arithmetic: `bytes combined / reduction speed`, of the busiest rank,
//! - inside the node: `phases * phase + bytes moved / memory bandwidth`, of the busiest rank,
//! - waiting: `hops * latency`, and `(hops - 1) * bytes passed on / link bandwidth` where each hop passes everything on.
//!
//! The first round takes the sum of all; each further one the largest of the first three, or, where that is more, the
//! sum divided by the rounds in flight.

use super::algorithms::{candidates, inside_node};
use super::context::Context;
use super::rail::{Fold, Tree};
use super::rounds::Rounds;
use super::shape::CallShape;
use super::tuning::Tuning;
use super::{broadcast, hierarchical, reduce};
use crate::call::Collective;
use crate::error::Result;
use crate::topology::GroupShape;

/// Speeds of a machine: seconds, and bytes a second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Model {
    /// From one node to another, one small message.
    pub latency: f64,
    /// A rank's work for one message.
    pub overhead: f64,
    /// Of a node's link, each way.
    pub link: f64,
    /// The ranks of a node to begin or end a phase together.
    pub phase: f64,
    /// One rank moving data inside the node.
    pub memory: f64,
    /// One rank reading contributions to combine them.
    pub reduction: f64,
}

impl Default for Model {
    /// A cloud node: 100 Gbit/s, 15 us.
    fn default() -> Self {
        Model { latency: 15e-6, overhead: 1e-6, link: 12.5e9, phase: 1e-6, memory: 8e9, reduction: 10e9 }
    }
}

/// What a round does.
#[derive(Clone, Copy, Debug, Default)]
struct Work {
    /// Messages one after the other before all have the result.
    hops: usize,
    /// Messages that the busiest rank sends or receives.
    messages: usize,
    /// Over the busiest link, one way.
    link: usize,
    /// Bytes that the busiest rank reads to combine data between nodes.
    combined: usize,
    phases: usize,
    /// Bytes that the busiest rank reads or writes in phases.
    inside: usize,
    /// Bytes that every hop must have before it passes them on.
    passed_on: usize,
}

impl Work {
    fn time(&self, model: &Model, rounds: usize, window: usize) -> f64 {
        let per = |bytes: usize, speed: f64| bytes as f64 / speed;
        let wire = self.messages as f64 * model.overhead + per(self.link, model.link);
        let arithmetic = per(self.combined, model.reduction);
        let inside = self.phases as f64 * model.phase + per(self.inside, model.memory);
        let passing = self.hops.saturating_sub(1) as f64 * per(self.passed_on, model.link);
        let first = wire + arithmetic + inside + passing + self.hops as f64 * model.latency;
        let further = wire.max(arithmetic).max(inside).max(first / window as f64);
        first + rounds.saturating_sub(1) as f64 * further
    }
}

/// Seconds that a call takes by `algorithm`, one of [`candidates`].
pub fn price(
    shape: &GroupShape,
    call: &CallShape,
    tuning: &Tuning,
    algorithm: &'static str,
    model: &Model,
) -> Result<f64> {
    let cx = Context { shape, rank: 0, call, tuning };
    if call.moves_nothing() {
        return Ok(0.0);
    }
    let rounds = match call.collective {
        _ if inside_node(algorithm) => None,
        Collective::AllReduce => Some(hierarchical::rounds(&cx, algorithm)?),
        Collective::Broadcast => Some(broadcast::rounds(&cx)?),
        Collective::Reduce => Some(reduce::rounds(&cx, algorithm)?),
        Collective::ReduceScatter
        | Collective::AllGather
        | Collective::AllToAll
        | Collective::Gather
        | Collective::Scatter
        | Collective::Barrier
        | Collective::SendRecv => None,
    };
    let (len, count, window) = rounds.map_or((block(&cx), 1, 1), |r: Rounds| (r.bytes, r.count(), r.window));
    let work = if inside_node(algorithm) { inside(&cx) } else { between(&cx, algorithm, len) };
    Ok(work.time(model, count, window))
}

/// Bytes of the whole buffer or, where the collective has blocks, of one, on average.
fn block(cx: &Context<'_>) -> usize {
    cx.call.counts.as_ref().map_or(cx.bytes(), |_| cx.call.bytes(cx.size()).div_ceil(cx.size()))
}

/// All algorithms that could serve a call, the fastest first.
pub fn ranking(
    shape: &GroupShape,
    call: &CallShape,
    tuning: &Tuning,
    model: &Model,
) -> Result<Vec<(&'static str, f64)>> {
    let price = |a: &'static str| Ok((a, price(shape, call, tuning, a, model)?));
    let mut list = candidates(call.collective, shape.node_count()).map(price).collect::<Result<Vec<_>>>()?;
    list.sort_by(|a, b| a.1.total_cmp(&b.1));
    Ok(list)
}

/// On one node: bytes a rank reads and writes.
fn inside(cx: &Context<'_>) -> Work {
    let (len, size) = (block(cx), cx.size());
    let moved = match cx.call.collective {
        Collective::AllReduce => 4 * len,
        Collective::Broadcast | Collective::Gather | Collective::Scatter => 2 * len,
        Collective::Reduce | Collective::ReduceScatter | Collective::AllGather | Collective::AllToAll => {
            2 * size * len
        }
        Collective::Barrier | Collective::SendRecv => 0,
    };
    Work { phases: 1, inside: moved, ..Work::default() }
}

/// Between nodes, for a round of `len` bytes (of one block, where the collective has blocks).
fn between(cx: &Context<'_>, algorithm: &str, len: usize) -> Work {
    let (shape, nodes, elem) = (cx.shape, cx.shape.node_count(), cx.call.elem);
    let locals = (0..nodes).map(|n| shape.ranks_on(n).len()).max().unwrap_or(1);
    let phases = if locals > 1 { 2 } else { 0 };
    let own = |bytes: usize| if locals > 1 { bytes } else { 0 };
    match cx.call.collective {
        Collective::AllReduce => {
            let shard = len.div_ceil(shape.min_local_size());
            let work = all_reduce(algorithm, nodes, shard);
            let link = hierarchical::link_of(cx, algorithm, len);
            Work { link, phases, inside: own(4 * len), ..work }
        }
        Collective::Broadcast | Collective::Reduce => {
            let (hops, busiest) = match algorithm {
                "chain" => (nodes - 1, 1),
                _ => (Tree::most_children(nodes), Tree::binomial(nodes, 0, 0).children.len()),
            };
            let combined = if cx.call.collective == Collective::Reduce { (busiest + 1) * len } else { 0 };
            let link = busiest * len;
            Work {
                hops,
                messages: busiest,
                link,
                combined,
                phases: phases / 2,
                inside: own(2 * len),
                passed_on: len,
            }
        }
        Collective::AllGather if algorithm == "ring" => {
            let link = (cx.size() - locals) * len;
            let messages = 2 * (nodes - 1) * locals.div_ceil(shape.min_local_size());
            let inside = own(2 * cx.size() * len);
            Work { hops: nodes - 1, messages, link, phases: nodes.min(16), inside, ..Work::default() }
        }
        Collective::AllGather if algorithm == "bruck" => {
            let hops = Tree::most_children(nodes);
            let link = (cx.size() - locals) * len;
            Work {
                hops,
                messages: 2 * hops,
                link,
                phases,
                inside: own(2 * cx.size() * len),
                ..Work::default()
            }
        }
        Collective::AllGather | Collective::ReduceScatter | Collective::AllToAll => {
            let pairs =
                if cx.call.collective == Collective::AllToAll { cx.size() - locals } else { nodes - 1 };
            let link = locals * pairs * len;
            let reduces = cx.call.collective == Collective::ReduceScatter;
            let combined = if reduces { nodes * len } else { 0 };
            let inside = own(2 * cx.size() * len);
            Work { hops: 1, messages: 2 * pairs, link, combined, phases: phases / 2, inside, passed_on: 0 }
        }
        Collective::Gather | Collective::Scatter => {
            let blocks = cx.size() - locals;
            Work { hops: 1, messages: blocks, link: blocks * len, phases: phases / 2, ..Work::default() }
        }
        Collective::Barrier => {
            let hops = all_reduce("recursive_doubling", nodes, elem).hops;
            Work { hops, messages: 2 * hops, phases, ..Work::default() }
        }
        Collective::SendRecv => Work::default(),
    }
}

/// Messages and arithmetic of one participant with `len` bytes.
fn all_reduce(algorithm: &str, nodes: usize, len: usize) -> Work {
    let fold = Fold::new(nodes);
    // Folding adds a hop before and one after.
    let folding = if fold.core() == nodes { 0 } else { 2 };
    let log = fold.steps;
    let (hops, messages, combined) = match algorithm {
        "sharded" => (2, 4 * (nodes - 1), len),
        "ring" => (2 * (nodes - 1), 4 * (nodes - 1), 2 * len),
        "recursive_doubling" => (log + folding, 2 * (log + folding), 2 * log * len),
        "halving_doubling" => (2 * log + folding, 4 * log + folding, 2 * len),
        _ => (2 * Tree::most_children(nodes), 4 * Tree::most_children(nodes), (log + 1) * len),
    };
    Work { hops, messages, combined, ..Work::default() }
}

/// Prices closer than this are equal: the formulas are not more exact.
const TOLERANCE: f64 = 1.05;

/// The fastest by the default model; of equals the one listed first in [`candidates`]. All ranks compute the same: the
/// formulas use no more than IEEE basic operations.
pub(super) fn cheapest(shape: &GroupShape, call: &CallShape, tuning: &Tuning) -> Result<&'static str> {
    let list = ranking(shape, call, tuning, &Model::default())?;
    let least = list.first().map_or(0.0, |(_, price)| *price);
    let near = |name: &&str| list.iter().any(|(n, price)| n == name && *price <= TOLERANCE * least);
    Ok(candidates(call.collective, shape.node_count()).find(near).unwrap_or("one_phase"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn best(nodes: usize, bytes: usize) -> &'static str {
        let shape = GroupShape::even(nodes, 8);
        let call = CallShape::new(Collective::AllReduce, 4, bytes / 4);
        cheapest(&shape, &call, &Tuning::default()).unwrap()
    }

    #[test]
    fn few_bytes_take_few_hops_and_many_bytes_few_bytes_more() {
        assert_eq!(best(64, 64), "recursive_doubling");
        for nodes in [3, 4, 16] {
            let found = best(nodes, 256 << 20);
            assert!(["sharded", "ring", "halving_doubling"].contains(&found), "{nodes}: {found}");
        }
        assert!(!["sharded", "ring"].contains(&best(4096, 1 << 20)));
    }

    #[test]
    fn more_data_never_costs_less() {
        for nodes in [2, 3, 16, 1000] {
            let shape = GroupShape::even(nodes, 4);
            for algorithm in candidates(Collective::AllReduce, nodes) {
                let mut last = 0.0;
                for log in 2..30 {
                    let call = CallShape::new(Collective::AllReduce, 4, 1 << log);
                    let now = price(&shape, &call, &Tuning::default(), algorithm, &Model::default()).unwrap();
                    assert!(now > last * 0.7, "{algorithm} on {shape}: {now} after {last} at 2^{log}");
                    last = now;
                }
            }
        }
    }

    #[test]
    fn large_data_costs_its_bytes_over_the_link() {
        let (shape, bytes) = (GroupShape::even(2, 8), 1usize << 30);
        let call = CallShape::new(Collective::AllReduce, 4, bytes / 4);
        let model = Model { memory: 1e12, reduction: 1e12, overhead: 0.0, latency: 1e-6, ..Model::default() };
        let time = price(&shape, &call, &Tuning::default(), "sharded", &model).unwrap();
        let least = bytes as f64 / model.link;
        assert!((least..1.1 * least).contains(&time), "{time} against {least}");
    }
}
