//! All-reduce over nodes and their ranks: combine inside the node, exchange between nodes, spread inside the node.
//!
//! The first R ranks of every node own a shard each (R: the smallest node's ranks; 1 for small data). A round is
//! phase 1 (every shard's node sum to its owner), the exchange of each shard between its owners on all nodes, and
//! phase 2 (every shard to all). What crosses nodes lies in scratch, which transports have registered. On one node
//! there is no exchange, and one phase does it all. A rank alone on its node has no phases, and its exchange
//! works in the user's buffer, unless that is not host memory. In memory that the node's ranks share, which transports
//! have registered too, the sums come to lie in the owners' buffers, where the exchange works on them.

use super::build::{Builder, LINE, cut, gather_sum, longest_cut, spread};
use super::context::Context;
use super::data::{Move, Op, Plan, Schedule, Span, Who};
use super::rail::Rail;
use super::rounds::{Cutting, Rounds};
use crate::error::Result;

/// One way to all-reduce between participants, one a node.
pub(super) struct Exchange {
    pub(super) name: &'static str,
    /// Reduces the participants' `data` to everyone's `out`, which is `data` or apart from it.
    pub(super) build: fn(&mut Builder, &Rail, data: Span, out: Span, elem: usize),
    /// Bytes that participant `me` of `nodes` sends for `len` bytes of data, and receives, at most.
    pub(super) link: fn(nodes: usize, me: usize, len: usize, elem: usize) -> usize,
    /// Scratch that any participant needs at most.
    pub(super) scratch: fn(nodes: usize, len: usize, elem: usize) -> usize,
}

macro_rules! exchange {
    ($name:literal, $module:ident) => {
        Exchange {
            name: $name,
            build: super::$module::build,
            link: super::$module::link,
            scratch: super::$module::scratch,
        }
    };
}

pub(super) const EXCHANGES: &[Exchange] = &[
    exchange!("sharded", all_reduce_sharded),
    exchange!("ring", all_reduce_ring),
    exchange!("recursive_doubling", all_reduce_recursive_doubling),
    exchange!("halving_doubling", all_reduce_halving_doubling),
    exchange!("tree", all_reduce_tree),
];

fn exchange(algorithm: &str) -> Option<&'static Exchange> {
    EXCHANGES.iter().find(|e| e.name == algorithm)
}

/// `algorithm` is a name of [`EXCHANGES`] or "one_phase".
pub(super) fn schedule(cx: &Context<'_>, algorithm: &str) -> Result<Schedule> {
    match exchange(algorithm) {
        Some(exchange) => between_nodes(cx, exchange),
        None => Ok(one_phase(cx)),
    }
}

fn one_phase(cx: &Context<'_>) -> Schedule {
    let user = Span::output(0, cx.bytes());
    let mut plan = Plan::default();
    plan.push(
        Op::Phase(vec![Move { from: Who::All, to: Who::All, src: user, dst: user, finish: true }]),
        &[],
    );
    Schedule::single("one_phase", plan, 0)
}

/// The way a hierarchical all-reduce cuts its data; the same on every rank.
struct Layout {
    exchange: &'static Exchange,
    owners: usize,
    /// The result has its own scratch, so that it need not wait until the data has left.
    apart: bool,
}

impl Layout {
    fn new(cx: &Context<'_>, exchange: &'static Exchange) -> Layout {
        let apart = cx.bytes() <= cx.tuning.one_owner && !cx.call.shared;
        Layout { exchange, owners: if apart { 1 } else { cx.shape.min_local_size() }, apart }
    }

    /// That any rank needs for a round at most.
    fn scratch(&self, cx: &Context<'_>, len: usize) -> usize {
        let (nodes, elem) = (cx.shape.node_count(), cx.call.elem);
        let shard = longest_cut(len, self.owners, elem);
        let all_direct = cx.shape.even_local_size() == Some(1) && is_direct(cx);
        let own = if all_direct || cx.call.shared {
            0
        } else {
            (1 + usize::from(self.apart)) * shard.next_multiple_of(LINE)
        };
        own + (self.exchange.scratch)(nodes, shard, elem)
    }

    /// Of a round.
    fn link(&self, cx: &Context<'_>, len: usize) -> usize {
        let (nodes, elem) = (cx.shape.node_count(), cx.call.elem);
        let shard = |l: usize| cut(len, self.owners, l, elem).1;
        (0..self.owners).map(|l| (self.exchange.link)(nodes, cx.node(), shard(l), elem)).sum()
    }

    fn rounds(&self, cx: &Context<'_>) -> Result<Rounds> {
        let cutting = Cutting::between_nodes(cx, cx.bytes(), cx.shape.node_count() * self.owners);
        cutting.rounds(cx.tuning, |len| self.scratch(cx, len))
    }
}

/// Whether this rank's exchange works in the user's buffer.
fn is_direct(cx: &Context<'_>) -> bool {
    cx.shape.local_size(cx.rank) == 1 && !cx.tuning.staged
}

fn between_nodes(cx: &Context<'_>, exchange: &'static Exchange) -> Result<Schedule> {
    let layout = Layout::new(cx, exchange);
    let rounds = layout.rounds(cx)?;
    let link = rounds.sum(|len| layout.link(cx, len));
    Ok(rounds.schedule(cx.named(exchange.name), link, |len| round(cx, &layout, len)))
}

/// How a call between nodes is cut.
pub(super) fn rounds(cx: &Context<'_>, algorithm: &str) -> Result<Rounds> {
    Layout::new(cx, exchange(algorithm).unwrap_or(&EXCHANGES[0])).rounds(cx)
}

/// Bytes over the link of this rank's node in a round of `len` bytes.
pub(super) fn link_of(cx: &Context<'_>, algorithm: &str, len: usize) -> usize {
    Layout::new(cx, exchange(algorithm).unwrap_or(&EXCHANGES[0])).link(cx, len)
}

fn round(cx: &Context<'_>, layout: &Layout, len: usize) -> Plan {
    let elem = cx.call.elem;
    let mut b = Builder::new(cx.local());
    let user = Span::output(0, len);
    let rail = || Rail::of_local(cx.shape, cx.local(), cx.node());
    if is_direct(cx) {
        debug_assert_eq!(layout.owners, 1);
        (layout.exchange.build)(&mut b, &rail(), user, user, elem);
        return b.finish();
    }
    let shard = |l: usize| user.cut(layout.owners, l, elem);
    // Equal offsets on all ranks of the node: a move names one span for all of them. None: in the owner's own data.
    let longest = longest_cut(len, layout.owners, elem);
    let data = (!cx.call.shared).then(|| b.reserve(longest));
    let out = if layout.apart { Some(b.reserve(longest)) } else { data };
    let held = |l: usize, at: Option<Span>| at.map_or(shard(l), |at| at.part((0, shard(l).len)));
    b.phase((0..layout.owners).map(|l| gather_sum(l, shard(l), held(l, data), false)).collect());
    if cx.local() < layout.owners {
        let me = cx.local();
        (layout.exchange.build)(&mut b, &rail(), held(me, data), held(me, out), elem);
    }
    b.phase((0..layout.owners).map(|l| spread(l, held(l, out), shard(l))).collect());
    b.finish()
}

/// A barrier is the all-reduce of one element that nobody reads.
pub(super) fn barrier(cx: &Context<'_>) -> Schedule {
    let (elem, nodes) = (cx.call.elem, cx.shape.node_count());
    let mut b = Builder::new(cx.local());
    let data = b.reserve(elem);
    if nodes == 1 {
        b.phase(vec![Move { from: Who::All, to: Who::All, src: data, dst: data, finish: false }]);
        return Schedule::single("one_phase", b.finish(), 0);
    }
    let out = b.reserve(elem);
    let alone = cx.shape.local_size(cx.rank) == 1;
    let sum = if alone { data } else { b.reserve(elem) };
    if !alone {
        b.phase(vec![gather_sum(0, data, sum, false)]);
    }
    if cx.local() == 0 {
        let rail = Rail::of_local(cx.shape, 0, cx.node());
        super::all_reduce_recursive_doubling::build(&mut b, &rail, sum, out, elem);
    }
    if !alone {
        b.phase(vec![spread(0, out, out)]);
    }
    let link = super::all_reduce_recursive_doubling::link(nodes, cx.node(), elem, elem);
    Schedule::single(cx.named("recursive_doubling"), b.finish(), link)
}
