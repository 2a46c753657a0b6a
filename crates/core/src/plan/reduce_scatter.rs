//! Reduce-scatter between nodes: every node sums each block inside, sends it straight to the rank it is for, and that
//! rank combines all nodes' sums at once, in node order.
//!
//! On node n, local rank l mod L(n) sums the blocks for the local ranks l of other nodes. Over each link: the blocks of
//! all other nodes out, the node's own blocks once a peer in. The input stays as it is.

use super::build::{Builder, LINE, gather_sum};
use super::context::Context;
use super::data::{Plan, Schedule, Span};
use super::rail::Rail;
use super::rounds::Cutting;
use crate::error::Result;

pub(super) fn schedule(cx: &Context<'_>) -> Result<Schedule> {
    let blocks = cx.blocks();
    let nodes = cx.shape.node_count();
    if nodes == 1 {
        let mut b = Builder::new(cx.local());
        b.phase(
            blocks
                .iter()
                .enumerate()
                .map(|(l, &s)| gather_sum(l, input(s), Span::output(0, s.len), true))
                .collect(),
        );
        return Ok(Schedule::single("one_phase", b.finish(), 0));
    }
    let of = |n: usize| cx.shape.ranks_on(n).iter().map(|&r| blocks[r as usize].len).sum::<usize>();
    let own = of(cx.node());
    let link = ((0..nodes).map(of).sum::<usize>() - own).max((nodes - 1) * own);
    let total = blocks.iter().map(|b| b.len).max().unwrap_or(0);
    let rounds = Cutting::between_nodes(cx, total, 1)
        .rounds(cx.tuning, |len| slots(cx) * len.next_multiple_of(LINE))?;
    if cx.call.counts.is_none() {
        return Ok(rounds.schedule(cx.named("direct"), link, |len| {
            let mut b = Builder::new(cx.local());
            let places = Places::new(cx, &mut b, len);
            slice(cx, &mut b, &places, &blocks, 0, len);
            b.finish()
        }));
    }
    // Blocks end in different rounds, and rounds must be alike: one round that uses its places over and over.
    let plan = in_one_round(cx, &blocks, total, rounds.bytes, rounds.window);
    Ok(Schedule::single(cx.named("direct"), plan, link))
}

fn in_one_round(cx: &Context<'_>, blocks: &[Span], total: usize, bytes: usize, window: usize) -> Plan {
    let mut b = Builder::new(cx.local());
    let places: Vec<Places> = (0..window).map(|_| Places::new(cx, &mut b, bytes)).collect();
    for (i, from) in (0..total).step_by(bytes.max(1)).enumerate() {
        slice(cx, &mut b, &places[i % window], blocks, from, bytes);
    }
    b.finish()
}

fn input(block: Span) -> Span {
    Span::input(block.off, block.len)
}

/// Pieces of scratch that any rank needs in a round: its own node's sum, sums for other nodes, sums from other nodes.
fn slots(cx: &Context<'_>) -> usize {
    let shape = cx.shape;
    let locals = |n: usize| shape.ranks_on(n).len();
    let nodes = shape.node_count();
    let out = |n: usize| (0..nodes).filter(|&m| m != n).map(|m| locals(m).div_ceil(locals(n))).sum::<usize>();
    nodes + (0..nodes).map(out).max().unwrap_or(0)
}

/// Where a round keeps its sums; offsets agree on all ranks of a node.
struct Places {
    own: Span,
    /// By group rank: at its summing rank, the sum for that rank (nothing for ranks of this node).
    outgoing: Vec<Span>,
    /// By node: what this rank gets from there.
    incoming: Vec<Span>,
}

impl Places {
    fn new(cx: &Context<'_>, b: &mut Builder, len: usize) -> Places {
        let shape = cx.shape;
        let (nodes, locals) = (shape.node_count(), shape.local_size(cx.rank));
        let own = b.reserve(len);
        let mut outgoing = vec![Span::scratch(0, 0); cx.size()];
        if locals > 1 {
            for n in (0..nodes).filter(|&n| n != cx.node()) {
                // One place serves the blocks that different local ranks sum.
                for some in shape.ranks_on(n).chunks(locals) {
                    let place = b.reserve(len);
                    some.iter().for_each(|&r| outgoing[r as usize] = place);
                }
            }
        }
        let incoming = (0..nodes).map(|n| if n == cx.node() { own } else { b.reserve(len) }).collect();
        Places { own, outgoing, incoming }
    }
}

/// Bytes `from..from + len` of every block, as far as it has them.
fn slice(cx: &Context<'_>, b: &mut Builder, places: &Places, blocks: &[Span], from: usize, len: usize) {
    let shape = cx.shape;
    let (local, locals) = (cx.local(), shape.local_size(cx.rank));
    let piece = |r: usize| {
        let from = from.min(blocks[r].len);
        input(blocks[r]).part((from, len.min(blocks[r].len - from)))
    };
    let mine = piece(cx.rank).len;
    let rail = Rail::of_local(shape, 0, cx.node());
    let mut srcs: Vec<Span> = places.incoming.iter().map(|s| s.part((0, mine))).collect();
    for n in rail.before() {
        let there = shape.ranks_on(n);
        b.recv(there[local % there.len()], srcs[n]);
    }
    if locals > 1 {
        let sum_of = |r: usize| {
            let (src, l) = (piece(r), shape.local_of(r) % locals);
            let place = if shape.same_node(r, cx.rank) { places.own } else { places.outgoing[r] };
            gather_sum(l, src, place.part((0, src.len)), false)
        };
        b.phase((0..cx.size()).map(sum_of).collect());
    } else {
        srcs[rail.me] = piece(cx.rank);
    }
    for n in rail.after() {
        for &r in shape.ranks_on(n).iter().skip(local).step_by(locals) {
            let src = piece(r as usize);
            let sum = if locals > 1 { places.outgoing[r as usize].part((0, src.len)) } else { src };
            b.send(r, sum);
        }
    }
    b.reduce(Span::output(from.min(blocks[cx.rank].len), mine), srcs, true);
}
