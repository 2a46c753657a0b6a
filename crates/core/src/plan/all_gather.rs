//! All-gather between nodes: every block crosses to each other node once, and each node spreads what has come.
//!
//! - *direct*: every rank sends its block to its counterpart on each other node: one hop. Over each link: the node's
//!   own blocks once a peer out, all other blocks in.
//! - *ring*: the first R ranks of every node (R: the smallest node's ranks) pass blocks on to the next node: N-1 hops,
//!   only neighbours talk, and no link carries more than all blocks each way.
//! - *bruck*: the first rank of every node holds the blocks of 2^k nodes after k hops (Bruck et al., 1997): log2(N)
//!   hops and few messages for many nodes with little data. Each block goes to its own place, so nothing is turned
//!   afterwards; blocks that lie side by side travel together.
//!
//! Blocks lie in the output from the moment they arrive: no scratch, whatever the size. The node's phases follow the
//! arrival of one node's blocks after the other's, so that wire and memory work at once.

use super::build::{Builder, spread};
use super::context::Context;
use super::data::{Schedule, Span};
use super::rail::Rail;

/// At most so many phases spread what comes from other nodes.
const PHASES: usize = 16;

pub(super) fn schedule(cx: &Context<'_>, algorithm: &'static str) -> Schedule {
    let blocks = cx.blocks();
    let shape = cx.shape;
    let mut b = Builder::new(cx.local());
    let nodes = Rail::of_local(shape, 0, cx.node());
    spread_own(cx, &mut b, &blocks);
    let owners = match algorithm {
        "ring" => shape.min_local_size(),
        "bruck" => 1,
        _ => shape.local_size(cx.rank),
    };
    let of = |n: usize| shape.ranks_on(n).iter().map(|&r| blocks[r as usize].len).sum::<usize>();
    let (total, own): (usize, usize) = ((0..nodes.len()).map(of).sum(), of(cx.node()));
    let link = match algorithm {
        "one_phase" => 0,
        "ring" => {
            ring(cx, &mut b, &blocks, owners);
            total - (0..nodes.len()).map(of).min().unwrap_or(0)
        }
        "bruck" => {
            bruck(cx, &mut b, &blocks);
            let sent: usize = bruck_steps(nodes.len()).map(|s| s.held(nodes.me).map(of).sum::<usize>()).sum();
            sent.max(total - own)
        }
        _ => {
            direct(cx, &mut b, &blocks);
            (total - own).max((nodes.len() - 1) * own)
        }
    };
    if shape.local_size(cx.rank) > 1 {
        let order: Vec<usize> = nodes.before().collect();
        let phases = if algorithm == "bruck" { 1 } else { PHASES };
        for some in order.chunks(order.len().div_ceil(phases).max(1)) {
            let all = some.iter().flat_map(|&n| shape.ranks_on(n).iter().enumerate());
            b.phase(all.map(|(l, &r)| spread(l % owners, blocks[r as usize], blocks[r as usize])).collect());
        }
    }
    Schedule::single(cx.named(algorithm), b.finish(), link)
}

/// The node's own blocks, to their places in all outputs of the node.
fn spread_own(cx: &Context<'_>, b: &mut Builder, blocks: &[Span]) {
    let here = cx.shape.ranks_on(cx.node());
    let own = |r: usize| Span::input(0, blocks[r].len);
    if here.len() == 1 {
        if !cx.call.far {
            b.copy(blocks[cx.rank], own(cx.rank));
        }
        return;
    }
    b.phase(here.iter().enumerate().map(|(l, &r)| spread(l, own(r as usize), blocks[r as usize])).collect());
}

/// Where nodes hold different numbers of ranks, a counterpart is the local rank modulo the other node's number.
fn direct(cx: &Context<'_>, b: &mut Builder, blocks: &[Span]) {
    let shape = cx.shape;
    let (local, locals) = (cx.local(), shape.local_size(cx.rank));
    let nodes = Rail::of_local(shape, 0, cx.node());
    for n in nodes.before() {
        for &r in shape.ranks_on(n).iter().skip(local).step_by(locals) {
            b.recv(r, blocks[r as usize]);
        }
    }
    for n in nodes.after() {
        let there = shape.ranks_on(n);
        b.send(there[local % there.len()], Span::input(0, blocks[cx.rank].len));
    }
}

/// Owner `c` passes on the blocks whose local rank is `c` modulo the number of owners.
fn ring(cx: &Context<'_>, b: &mut Builder, blocks: &[Span], owners: usize) {
    if cx.local() >= owners {
        return;
    }
    let rail = Rail::of_local(cx.shape, cx.local(), cx.node());
    let (n, me) = (rail.len(), rail.me);
    let column = |node: usize| cx.shape.ranks_on(node).iter().skip(cx.local()).step_by(owners);
    for s in 0..n - 1 {
        for &r in column((me + 2 * n - s - 1) % n) {
            b.recv(rail.ranks[(me + n - 1) % n], blocks[r as usize]);
        }
        for &r in column((me + n - s) % n) {
            b.send(rail.ranks[(me + 1) % n], blocks[r as usize]);
        }
    }
}

/// In one step participant i gets from i + `apart` the blocks of `count` nodes, from there on.
struct BruckStep {
    nodes: usize,
    apart: usize,
    count: usize,
}

impl BruckStep {
    /// The nodes whose blocks participant `i` gives away.
    fn held(&self, i: usize) -> impl Iterator<Item = usize> + use<> {
        let nodes = self.nodes;
        (i..i + self.count).map(move |n| n % nodes)
    }
}

fn bruck_steps(nodes: usize) -> impl Iterator<Item = BruckStep> {
    let powers = (0..usize::BITS).map(|k| 1usize << k).take_while(move |&apart| apart < nodes);
    powers.map(move |apart| BruckStep { nodes, apart, count: apart.min(nodes - apart) })
}

fn bruck(cx: &Context<'_>, b: &mut Builder, blocks: &[Span]) {
    if cx.local() > 0 {
        return;
    }
    let rail = Rail::of_local(cx.shape, 0, cx.node());
    let (n, me) = (rail.len(), rail.me);
    for step in bruck_steps(n) {
        let (from, to) = ((me + step.apart) % n, (me + n - step.apart) % n);
        for span in side_by_side(cx, blocks, step.held(from)) {
            b.recv(rail.ranks[from], span);
        }
        for span in side_by_side(cx, blocks, step.held(me)) {
            b.send(rail.ranks[to], span);
        }
    }
}

/// The blocks of some nodes, neighbours joined.
fn side_by_side(cx: &Context<'_>, blocks: &[Span], nodes: impl Iterator<Item = usize>) -> Vec<Span> {
    let ranks = nodes.flat_map(|n| cx.shape.ranks_on(n));
    let mut spans: Vec<Span> = ranks.map(|&r| blocks[r as usize]).filter(|s| !s.is_empty()).collect();
    spans.sort_by_key(|s| s.off);
    let mut joined: Vec<Span> = Vec::new();
    for span in spans {
        match joined.last_mut() {
            Some(last) if last.off + last.len == span.off => last.len += span.len,
            _ => joined.push(span),
        }
    }
    joined
}
