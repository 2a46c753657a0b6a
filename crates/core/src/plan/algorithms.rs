//! The algorithms by name. A new one has its line here.

use crate::call::Collective;

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

/// Whether `algorithm` serves groups on one node (the others serve groups on several).
pub fn inside_node(algorithm: &str) -> bool {
    algorithm == "one_phase"
}

/// The algorithms of `collective` that serve a group of this many nodes.
pub fn candidates(collective: Collective, nodes: usize) -> impl Iterator<Item = &'static str> {
    algorithms(collective).iter().copied().filter(move |a| inside_node(a) == (nodes == 1))
}
