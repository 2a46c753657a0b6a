//! All-reduce up and down a binomial tree: 2 log2(N) steps, no node meets more than log2(N) others.

use super::build::Builder;
use super::data::Span;
use super::rail::{Rail, Tree};

pub(super) fn build(b: &mut Builder, rail: &Rail, data: Span, out: Span, _elem: usize) {
    let tree = Tree::binomial(rail.len(), 0, rail.me);
    super::reduce::up(b, rail, &tree, data, out, true);
    super::broadcast::down(b, rail, &tree, out);
}

pub(super) fn link(nodes: usize, me: usize, len: usize, _elem: usize) -> usize {
    let tree = Tree::binomial(nodes, 0, me);
    (tree.children.len() + usize::from(tree.parent.is_some())) * len
}

pub(super) fn scratch(nodes: usize, len: usize, _elem: usize) -> usize {
    super::reduce::scratch(Tree::most_children(nodes), len)
}
