//! Broadcast: the root speaks for its node, one rank for each other node; they pass the data down a tree, and every
//! node spreads it inside. Cut in rounds, so that all hops and the nodes' insides work at once.
//!
//! A binomial tree takes log2(N) hops and its root sends everything that often; a chain takes N-1 hops and every
//! node sends everything once: the better one for large data in many rounds.

use super::build::{Builder, spread};
use super::context::Context;
use super::data::{Plan, Schedule, Span};
use super::rail::{Rail, Tree, leader};
use super::rounds::{Cutting, Rounds};
use crate::error::Result;

/// Passes `data` from the root of `tree` to everyone; the child with the largest subtree first.
pub(super) fn down(b: &mut Builder, rail: &Rail, tree: &Tree, data: Span) {
    if let Some(parent) = tree.parent {
        b.recv(rail.ranks[parent], data);
    }
    for &child in tree.children.iter().rev() {
        b.send(rail.ranks[child], data);
    }
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
    Ok(rounds(cx)?.schedule(cx.named(algorithm), link, |len| round(cx, &rail, &tree, len)))
}

/// How the data is cut; on one node not at all.
pub(super) fn rounds(cx: &Context<'_>) -> Result<Rounds> {
    let cutting = match cx.shape.node_count() {
        1 => Cutting::whole(cx, cx.bytes()),
        _ => Cutting::between_nodes(cx, cx.bytes(), 1),
    };
    cutting.rounds(cx.tuning, |_| 0)
}

fn round(cx: &Context<'_>, rail: &Rail, tree: &Tree, len: usize) -> Plan {
    let mut b = Builder::new(cx.local());
    let user = Span::output(0, len);
    let speaker = leader(cx.shape, cx.call.root, cx.node());
    if cx.rank == speaker {
        down(&mut b, rail, tree, user);
    }
    if cx.shape.local_size(cx.rank) > 1 {
        b.phase(vec![spread(cx.shape.local_of(speaker), user, user)]);
    }
    b.finish()
}
