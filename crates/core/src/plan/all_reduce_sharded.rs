//! All-reduce in two hops whatever the number of nodes: balanced shards go straight to their owner, are summed there
//! at once in node order, and come straight back (the balanced fusion buffers of Herring, SC20).
//!
//! Over each link, each way: all but the own part, and the own part once a peer: 2(N-1)/N of the data.

use super::build::{Builder, LINE, cut, longest_cut};
use super::data::Span;
use super::rail::Rail;

pub(super) fn build(b: &mut Builder, rail: &Rail, data: Span, out: Span, elem: usize) {
    let n = rail.len();
    let mine = data.cut(n, rail.me, elem);
    let mut srcs = vec![mine; n];
    for i in rail.before() {
        srcs[i] = b.reserve(mine.len);
        b.recv(rail.ranks[i], srcs[i]);
    }
    for j in rail.after() {
        b.send(rail.ranks[j], data.cut(n, j, elem));
    }
    let result = out.cut(n, rail.me, elem);
    b.reduce(result, srcs, true);
    for j in rail.after() {
        b.send(rail.ranks[j], result);
    }
    for i in rail.before() {
        b.recv(rail.ranks[i], out.cut(n, i, elem));
    }
}

/// The same both ways.
pub(super) fn link(nodes: usize, me: usize, len: usize, elem: usize) -> usize {
    let own = cut(len, nodes, me, elem).1;
    len - own + (nodes - 1) * own
}

pub(super) fn scratch(nodes: usize, len: usize, elem: usize) -> usize {
    (nodes - 1) * longest_cut(len, nodes, elem).next_multiple_of(LINE)
}
