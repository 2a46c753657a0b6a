//! Who takes part in an exchange between nodes, and the patterns in which they talk.

use crate::topology::GroupShape;

/// One rank of every node, in node order; `me` is the caller's place.
pub(super) struct Rail {
    pub(super) ranks: Vec<u32>,
    pub(super) me: usize,
}

impl Rail {
    /// The ranks with local rank `local` on every node, seen from `node`.
    pub(super) fn of_local(shape: &GroupShape, local: usize, node: usize) -> Rail {
        Rail { ranks: (0..shape.node_count()).map(|n| shape.ranks_on(n)[local]).collect(), me: node }
    }

    /// `root` for its own node, the first rank of each other node, seen from `node`.
    pub(super) fn of_leaders(shape: &GroupShape, root: usize, node: usize) -> Rail {
        Rail { ranks: (0..shape.node_count()).map(|n| leader(shape, root, n) as u32).collect(), me: node }
    }

    pub(super) fn len(&self) -> usize {
        self.ranks.len()
    }

    /// The others, from the next one on: whom to send to, so that not all send to one.
    pub(super) fn after(&self) -> impl Iterator<Item = usize> + use<> {
        let (n, me) = (self.len(), self.me);
        (1..n).map(move |k| (me + k) % n)
    }

    /// The others, from the previous one back: whom to receive from.
    pub(super) fn before(&self) -> impl Iterator<Item = usize> + use<> {
        let (n, me) = (self.len(), self.me);
        (1..n).map(move |k| (me + n - k) % n)
    }
}

/// The rank that speaks for `node` when `root` speaks for its own.
pub(super) fn leader(shape: &GroupShape, root: usize, node: usize) -> usize {
    if shape.node_of(root) == node { root } else { shape.ranks_on(node)[0] as usize }
}

/// How any number of participants becomes a power of two.
pub(super) struct Fold {
    /// log2 of the core.
    pub(super) steps: usize,
    rest: usize,
}

pub(super) enum Role {
    /// Gives its data to participant `into` and gets the result from it.
    Folded { into: usize },
    /// Number `v` of the core, speaking for participant `extra` too.
    Core { v: usize, extra: Option<usize> },
}

impl Fold {
    pub(super) fn new(n: usize) -> Fold {
        let steps = n.max(1).ilog2() as usize;
        Fold { steps, rest: n - (1 << steps) }
    }

    /// Participants left, a power of two.
    pub(super) fn core(&self) -> usize {
        1 << self.steps
    }

    pub(super) fn role(&self, i: usize) -> Role {
        match i {
            i if i >= 2 * self.rest => Role::Core { v: i - self.rest, extra: None },
            i if i % 2 == 0 => Role::Core { v: i / 2, extra: Some(i + 1) },
            i => Role::Folded { into: i - 1 },
        }
    }

    /// The participant that is number `v` of the core.
    pub(super) fn real(&self, v: usize) -> usize {
        if v < self.rest { 2 * v } else { v + self.rest }
    }
}

/// One participant's place in a tree over all.
pub(super) struct Tree {
    pub(super) parent: Option<usize>,
    /// The one with the smallest subtree first.
    pub(super) children: Vec<usize>,
}

impl Tree {
    /// Counted from the root, participant v hangs below v without its lowest bit.
    pub(super) fn binomial(n: usize, root: usize, me: usize) -> Tree {
        let v = (me + n - root) % n;
        let real = |v: usize| (v + root) % n;
        let low = if v == 0 { n.next_power_of_two() } else { 1 << v.trailing_zeros() };
        let children = (0..usize::BITS)
            .map(|k| 1 << k)
            .take_while(|&bit| bit < low && v + bit < n)
            .map(|bit| real(v + bit));
        Tree { parent: (v > 0).then(|| real(v & (v - 1))), children: children.collect() }
    }

    /// Everyone passes on to the next.
    pub(super) fn chain(n: usize, root: usize, me: usize) -> Tree {
        let v = (me + n - root) % n;
        Tree {
            parent: (v > 0).then(|| (me + n - 1) % n),
            children: if v + 1 < n { vec![(me + 1) % n] } else { Vec::new() },
        }
    }

    /// Of any participant of a binomial tree of `n`.
    pub(super) fn most_children(n: usize) -> usize {
        n.max(1).next_power_of_two().ilog2() as usize
    }
}
