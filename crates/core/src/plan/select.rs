//! Which algorithm serves a call: one table, and what a person may override.
//!
//! Buffers, by collective (elements; P ranks; "own" blocks are the caller's)
//!
//! | collective | `Input` | `Output` |
//! | --- | --- | --- |
//! | all_reduce, broadcast, barrier | the same memory as `Output` | count |
//! | reduce | the same memory as `Output` | count; only the root's changes |
//! | all_gather | count | P * count, or the sum of `counts` |
//! | reduce_scatter | P * count, or the sum of `counts` | count, or the own entry of `counts` |
//! | all_to_all | P * count, or the sum of the send splits | P * count, or the sum of the receive splits |
//! | gather | count | P * count at the root, else nothing |
//! | scatter | P * count at the root, else nothing | count |

use std::sync::Arc;

use super::{Op, Plan, Schedule, Span, cost, hierarchical};
use crate::call::Collective;
use crate::error::{Error, Result};
use crate::far;
use crate::settings::{Settings, parse_bytes};
use crate::topology::GroupShape;

/// All that decides a schedule besides the group and the rank: the key of a cache of schedules.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct CallShape {
    pub collective: Collective,
    /// Bytes of an element: a power of two, at most 64.
    pub elem: usize,
    /// Elements, as in [`crate::Call`].
    pub count: usize,
    /// Group rank; 0 where the collective has none.
    pub root: usize,
    /// Uneven all_gather and reduce_scatter: elements of each rank's block, known to all ranks.
    pub counts: Option<Arc<[usize]>>,
    /// Uneven all_to_all; blocks lie in rank order.
    pub splits: Option<Splits>,
    /// On memory that the ranks of each node share.
    pub shared: bool,
    /// With its data on a device: see [`crate::far`].
    pub far: bool,
}

/// Elements that a rank (sends to, receives from) each rank.
pub type Splits = (Arc<[usize]>, Arc<[usize]>);

impl CallShape {
    pub fn new(collective: Collective, elem: usize, count: usize) -> CallShape {
        CallShape { collective, elem, count, root: 0, counts: None, splits: None, shared: false, far: false }
    }

    pub fn rooted(collective: Collective, elem: usize, count: usize, root: usize) -> CallShape {
        CallShape { root, ..CallShape::new(collective, elem, count) }
    }

    /// Whether no rank has an element to move. (An uneven all_to_all never knows that.)
    pub fn moves_nothing(&self) -> bool {
        let counted = self.counts.as_ref().map_or(self.count, |counts| counts.iter().sum());
        self.collective != Collective::Barrier && self.splits.is_none() && counted == 0
    }

    /// Bytes of all blocks together: what the selection table goes by. For an uneven all_to_all, whose sizes no rank
    /// knows alone, 0.
    pub fn bytes(&self, size: usize) -> usize {
        if self.splits.is_some() {
            return 0;
        }
        let blocks = match self.collective {
            Collective::AllReduce | Collective::Broadcast | Collective::Reduce => self.count,
            Collective::Barrier | Collective::SendRecv => 0,
            Collective::ReduceScatter
            | Collective::AllGather
            | Collective::AllToAll
            | Collective::Gather
            | Collective::Scatter => self.counts.as_ref().map_or(self.count * size, |c| c.iter().sum()),
        };
        blocks * self.elem
    }
}

/// What a person or a machine may change about schedules; equal on all ranks of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tuning {
    /// Bytes of a round; 0: chosen by size and shape.
    pub chunk: usize,
    /// Bytes of a rank's staging memory. A schedule uses at most one of [`Tuning::SHARES`] shares of it.
    pub staging: usize,
    /// All-reduce data reaches the fabric through scratch alone, since the user's buffers are not host memory.
    pub staged: bool,
    /// All-reduce data of up to so many bytes goes through one rank a node: fewer messages matter more than their size.
    pub one_owner: usize,
    pub overrides: Vec<Override>,
}

impl Default for Tuning {
    fn default() -> Self {
        Tuning { chunk: 0, staging: 16 << 20, staged: false, one_owner: 8 << 10, overrides: Vec::new() }
    }
}

impl Tuning {
    /// Calls that can have their scratch at once.
    pub const SHARES: usize = 4;

    pub fn from_settings(settings: &Settings) -> Result<Tuning> {
        Ok(Tuning {
            chunk: settings.number("SMDDP_CHUNK"),
            staging: settings.number("SMDDP_STAGING"),
            overrides: Override::parse_all(settings.text("SMDDP_ALGORITHM"))?,
            ..Tuning::default()
        })
    }

    /// Bytes that all rounds in flight of one schedule may use together.
    pub const fn scratch(&self) -> usize {
        self.staging / Tuning::SHARES
    }
}

/// One entry of SMDDP_ALGORITHM: `collective[:from-to]=algorithm`, bytes as [`CallShape::bytes`] counts them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Override {
    pub collective: Collective,
    pub from: usize,
    pub to: usize,
    pub algorithm: &'static str,
}

impl Override {
    /// Entries are separated by commas; the first that fits a call counts.
    pub fn parse_all(text: &str) -> Result<Vec<Override>> {
        Override::parse_for("SMDDP_ALGORITHM", text, algorithms)
    }

    /// As [`parse_all`](Self::parse_all), of the setting `name`, whose algorithms of a collective are `known`.
    pub fn parse_for(name: &str, text: &str, known: Known) -> Result<Vec<Override>> {
        let entries = text.split(',').map(str::trim).filter(|t| !t.is_empty());
        entries.map(|entry| Override::parse(name, entry, known)).collect()
    }

    /// Whether the entry is for calls of `collective` with so many bytes.
    pub fn fits(&self, collective: Collective, bytes: usize) -> bool {
        self.collective == collective && (self.from..=self.to).contains(&bytes)
    }

    fn parse(name: &str, text: &str, known: Known) -> Result<Override> {
        let wrong = |expected: String| Error::Setting {
            name: name.to_owned(),
            given: text.to_owned(),
            expected,
            hint: "Write collective=algorithm or collective:64K-1M=algorithm, separated by commas".to_owned(),
        };
        let (what, algorithm) = text.split_once('=').ok_or_else(|| wrong("expected a '='".to_owned()))?;
        let (collective, range) = what.split_once(':').unwrap_or((what, "-"));
        let is_known = |&c: &Collective| !known(c).is_empty();
        let unknown = || {
            let all = Collective::ALL.into_iter().filter(is_known).map(Collective::name);
            wrong(format!("'{collective}' is no collective; known: {}", all.collect::<Vec<_>>().join(", ")))
        };
        let collective = Collective::from_name(collective.trim()).filter(is_known).ok_or_else(unknown)?;
        let bound = |t: &str, default: usize| match t.trim() {
            "" => Some(default),
            t => parse_bytes(t).map(|b| b as usize),
        };
        let limits = range.split_once('-').and_then(|(a, b)| Some((bound(a, 0)?, bound(b, usize::MAX)?)));
        let (from, to) =
            limits.ok_or_else(|| wrong(format!("'{range}' is no range of bytes such as 64K-1M or 64K-")))?;
        let names = known(collective);
        let algorithm = names.iter().find(|n| **n == algorithm.trim()).ok_or_else(|| {
            wrong(format!("'{algorithm}' is no algorithm of {collective}; known: {}", names.join(", ")))
        })?;
        Ok(Override { collective, from, to, algorithm })
    }
}

/// The algorithms of a collective; none: it is not to be overridden.
pub type Known = fn(Collective) -> &'static [&'static str];

/// Names of the algorithms of a collective: those inside one node first. None for point to point.
pub const fn algorithms(collective: Collective) -> &'static [&'static str] {
    match collective {
        Collective::AllReduce => {
            &["one_phase", "sharded", "ring", "recursive_doubling", "halving_doubling", "tree"]
        }
        Collective::ReduceScatter => &["one_phase", "direct"],
        Collective::AllGather => &["one_phase", "direct", "bruck", "ring"],
        Collective::AllToAll | Collective::Gather | Collective::Scatter => &["one_phase", "pairwise"],
        Collective::Broadcast | Collective::Reduce => &["one_phase", "tree", "chain"],
        Collective::Barrier => &["one_phase", "recursive_doubling"],
        Collective::SendRecv => &[],
    }
}

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

/// Whether `algorithm` serves groups on one node (the others serve groups on several).
pub fn inside_node(algorithm: &str) -> bool {
    algorithm == "one_phase"
}

/// The algorithms of `collective` that serve a group of this many nodes.
pub fn candidates(collective: Collective, nodes: usize) -> impl Iterator<Item = &'static str> {
    algorithms(collective).iter().copied().filter(move |a| inside_node(a) == (nodes == 1))
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

/// What rank `rank` does in a call, by the algorithm that [`choose`] gives.
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
        && call.elem <= super::LINE
        && (!call.far || shape.even_local_size() == Some(1) && far::carries(call.collective))
        && lists.into_iter().all(|l| l.len() == size);
    if sound {
        return Ok(());
    }
    Err(Error::Internal(format!("cannot plan {call:?} for rank {rank} of {size}")))
}

/// What an algorithm is asked for.
#[derive(Clone, Copy)]
pub(super) struct Context<'a> {
    pub(super) shape: &'a GroupShape,
    pub(super) rank: usize,
    pub(super) call: &'a CallShape,
    pub(super) tuning: &'a Tuning,
}

impl Context<'_> {
    /// Bytes of `count` elements.
    pub(super) fn bytes(&self) -> usize {
        self.call.count * self.call.elem
    }
    /// Every rank's block, as a span of the output.
    pub(super) fn blocks(&self) -> Vec<Span> {
        let mut at = 0;
        let count = |r: usize| self.call.counts.as_ref().map_or(self.call.count, |c| c[r]);
        let block = |r: usize| {
            let len = count(r) * self.call.elem;
            at += len;
            Span::output(at - len, len)
        };
        (0..self.size()).map(block).collect()
    }
    pub(super) fn node(&self) -> usize {
        self.shape.node_of(self.rank)
    }
    pub(super) fn local(&self) -> usize {
        self.shape.local_of(self.rank)
    }
    pub(super) fn size(&self) -> usize {
        self.shape.size()
    }
}

/// The name of an algorithm between nodes, with what surrounds it inside them.
pub(super) fn named(cx: &Context<'_>, algorithm: &'static str) -> &'static str {
    const WITH_PHASES: &[(&str, &str)] = &[
        ("sharded", "hierarchical(sharded)"),
        ("ring", "hierarchical(ring)"),
        ("recursive_doubling", "hierarchical(recursive_doubling)"),
        ("halving_doubling", "hierarchical(halving_doubling)"),
        ("tree", "hierarchical(tree)"),
        ("chain", "hierarchical(chain)"),
        ("direct", "hierarchical(direct)"),
        ("bruck", "hierarchical(bruck)"),
        ("pairwise", "hierarchical(pairwise)"),
    ];
    if inside_node(algorithm) || cx.shape.even_local_size() == Some(1) {
        return algorithm;
    }
    WITH_PHASES.iter().find(|(name, _)| *name == algorithm).map_or(algorithm, |(_, with)| with)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overrides_are_read_and_refused() {
        let list = Override::parse_all("all_reduce:64K-=sharded, broadcast=tree").unwrap();
        assert_eq!(list[0].from, 64 * KIB);
        assert_eq!(list[1].algorithm, "tree");
        for (text, named) in [
            ("all_reduce=magic", "halving_doubling"),
            ("all_produce=ring", "all_reduce"),
            ("all_reduce:x-=ring", "range"),
            ("ring", "'='"),
        ] {
            let error = Override::parse_all(text).unwrap_err().to_string();
            assert!(error.contains(named) && error.contains("SMDDP_ALGORITHM"), "{error}");
        }
    }

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
