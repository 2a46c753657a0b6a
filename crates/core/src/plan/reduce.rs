//! Reduce to a root: every node combines its ranks' data at one of them, and these combine up a tree.
//!
//! Buffers other than the root's stay as they are. A node of the tree combines its own data and all its children's
//! at once, so that 16-bit types round once a hop.

use super::build::{Builder, LINE, gather_sum};
use super::context::Context;
use super::data::{Plan, Schedule, Span};
use super::rail::{Rail, Tree, leader};
use super::rounds::{Cutting, Rounds};
use crate::error::Result;

/// Combines the participants' `data` up `tree`; at the root the result is `out`. Returns where this rank's sum is.
pub(super) fn up(b: &mut Builder, rail: &Rail, tree: &Tree, data: Span, out: Span, finish: bool) -> Span {
    let mut srcs = vec![data];
    for &child in &tree.children {
        let slot = b.reserve(data.len);
        b.recv(rail.ranks[child], slot);
        srcs.push(slot);
    }
    let sum = match tree.parent {
        None => out,
        Some(_) if srcs.len() > 1 => srcs[1],
        Some(_) => data,
    };
    if srcs.len() > 1 || tree.parent.is_none() {
        b.reduce(sum, srcs, finish && tree.parent.is_none());
    }
    if let Some(parent) = tree.parent {
        b.send(rail.ranks[parent], sum);
    }
    sum
}

/// Scratch that [`up`] needs below a rank with `children` children.
pub(super) const fn scratch(children: usize, len: usize) -> usize {
    children * len.next_multiple_of(LINE)
}

pub(super) fn schedule(cx: &Context<'_>, algorithm: &'static str) -> Result<Schedule> {
    let (shape, nodes) = (cx.shape, cx.shape.node_count());
    let rail = Rail::of_leaders(shape, cx.call.root, cx.node());
    let root_node = shape.node_of(cx.call.root);
    let tree = match algorithm {
        "chain" => Tree::chain(nodes, root_node, rail.me),
        _ => Tree::binomial(nodes, root_node, rail.me),
    };
    let link = tree.children.len().max(usize::from(tree.parent.is_some())) * cx.bytes();
    Ok(rounds(cx, algorithm)?.schedule(cx.named(algorithm), link, |len| round(cx, &rail, &tree, len)))
}

/// How the data is cut; on one node not at all.
pub(super) fn rounds(cx: &Context<'_>, algorithm: &str) -> Result<Rounds> {
    let nodes = cx.shape.node_count();
    if nodes == 1 {
        return Cutting::whole(cx, cx.bytes()).rounds(cx.tuning, |_| 0);
    }
    let children = if algorithm == "chain" { 1 } else { Tree::most_children(nodes) };
    // One more for the node's own sum.
    Cutting::between_nodes(cx, cx.bytes(), 1).rounds(cx.tuning, |len| scratch(children + 1, len))
}

fn round(cx: &Context<'_>, rail: &Rail, tree: &Tree, len: usize) -> Plan {
    let mut b = Builder::new(cx.local());
    let user = Span::output(0, len);
    let speaker = leader(cx.shape, cx.call.root, cx.node());
    let inside = cx.shape.node_count() == 1;
    let mut data = user;
    if cx.shape.local_size(cx.rank) > 1 {
        data = if inside { user } else { b.reserve(len) };
        b.phase(vec![gather_sum(cx.shape.local_of(speaker), user, data, inside)]);
    }
    if !inside && cx.rank == speaker {
        up(&mut b, rail, tree, data, user, true);
    }
    b.finish()
}
