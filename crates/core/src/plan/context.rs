//! What an algorithm is asked for.

use super::algorithms::inside_node;
use super::data::Span;
use super::shape::CallShape;
use super::tuning::Tuning;
use crate::topology::GroupShape;

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
    /// The name of an algorithm between nodes, with what surrounds it inside them.
    pub(super) fn named(&self, algorithm: &'static str) -> &'static str {
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
        if inside_node(algorithm) || self.shape.even_local_size() == Some(1) {
            return algorithm;
        }
        WITH_PHASES.iter().find(|(name, _)| *name == algorithm).map_or(algorithm, |(_, with)| with)
    }
}
