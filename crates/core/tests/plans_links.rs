//! What every algorithm sends over the links of the nodes, against formulas that know nothing of how it is built.
//!
//! The plans' own bound (P6) is stated by the algorithms themselves: one that sent everything twice, and said so, would
//! keep to it.

#![allow(clippy::unwrap_used)]

use smddp_core::plan::check::World;
use smddp_core::plan::{CallShape, Override, Tuning, candidates};
use smddp_core::{Collective, GroupShape};

/// log2, rounded down and up.
fn logs(nodes: usize) -> (usize, usize) {
    (nodes.ilog2() as usize, nodes.next_power_of_two().ilog2() as usize)
}

/// Most bytes over one node's link, (out, in), of a call of `data` bytes, or of `data` bytes a block.
fn expected(collective: Collective, algorithm: &str, shape: &GroupShape, data: usize) -> (usize, usize) {
    let nodes = shape.node_count();
    let ranks = |node: usize| shape.ranks_on(node).len();
    let most = |bytes: &dyn Fn(usize) -> usize| (0..nodes).map(bytes).max().unwrap();
    let (floor, ceil) = logs(nodes);
    let core = 1 << floor;
    // A number of nodes that is no power of two: some give all they have to a neighbour, and get all back.
    let folded = if core < nodes { data } else { 0 };
    // Every block to each other node once, or to its one owner: as many as the node has, or has not.
    let own_blocks = most(&|n| (nodes - 1) * ranks(n) * data);
    let other_blocks = most(&|n| (shape.size() - ranks(n)) * data);
    let root = shape.node_of(0);
    let not_root = (0..nodes).filter(|&n| n != root).map(ranks).max().unwrap_or(0) * data;
    let to_root = (shape.size() - ranks(root)) * data;
    use Collective::*;
    let both = |bytes: usize| (bytes, bytes);
    match (collective, algorithm) {
        (_, "one_phase") => both(0),
        // All but the own part, and the own part to each other node.
        (AllReduce, "sharded" | "ring") => both(2 * (nodes - 1) * data / nodes),
        (AllReduce, "recursive_doubling") => both(floor * data + folded),
        (AllReduce, "halving_doubling") => both(2 * (core - 1) * data / core + folded),
        // The root of a binomial tree has one child a level, and so has whoever is below it, its parent counted.
        (AllReduce, "tree") => both(ceil * data),
        (ReduceScatter, "direct") => (other_blocks, own_blocks),
        (AllGather, "direct") => (own_blocks, other_blocks),
        // All blocks pass but those that the next node has, or that this one has.
        (AllGather, "ring") => both(other_blocks),
        (AllGather, "bruck") => {
            // After each step a node holds the blocks of twice as many nodes, from its own on.
            let sent = |node: usize| -> usize {
                let steps = (0..ceil).map(|k| (1 << k).min(nodes - (1 << k)));
                steps.map(|held| (node..node + held).map(|n| ranks(n % nodes) * data).sum::<usize>()).sum()
            };
            (most(&sent), other_blocks)
        }
        (AllToAll, "pairwise") => both(most(&|n| ranks(n) * (shape.size() - ranks(n)) * data)),
        (Broadcast, "tree") => (ceil * data, data),
        (Reduce, "tree") => (data, ceil * data),
        (Broadcast | Reduce, "chain") => both(data),
        (Gather, "pairwise") => (not_root, to_root),
        (Scatter, "pairwise") => (to_root, not_root),
        (Barrier, "recursive_doubling") => both(floor * data + folded),
        _ => panic!("no formula for {collective} by {algorithm}: work one out"),
    }
}

#[test]
fn every_algorithm_sends_what_its_formula_says() {
    let alone = (1..=9).chain([12, 16]).map(|n| GroupShape::even(n, 1));
    let even = [(1, 4), (2, 2), (3, 2), (3, 3), (4, 2), (5, 2), (7, 2)].map(|(n, l)| GroupShape::even(n, l));
    let uneven = [&[3, 1, 2][..], &[1, 4], &[2, 2, 1], &[1, 2, 3, 4, 1]].map(GroupShape::uneven);
    let mut tried = 0;
    for shape in alone.chain(even).chain(uneven) {
        let (nodes, owners) = (shape.node_count(), shape.min_local_size());
        // All cuts come out even: by owners, by nodes, and by the power of two that halving and doubling works with.
        let unit = nodes * owners * (1 << logs(nodes).0);
        for collective in Collective::PLANNED {
            for algorithm in candidates(collective, nodes) {
                // Elements, in one round and in several; what a call of few bytes does through one rank of a node.
                for (count, rounds, one_owner) in [(unit, 1, 0), (3 * unit, 3, 0), (unit, 1, usize::MAX)] {
                    let count = if collective == Collective::Barrier { 0 } else { count };
                    let overrides = Override::parse_all(&format!("{collective}={algorithm}")).unwrap();
                    let chunk = if rounds > 1 { unit * 4 } else { 0 };
                    let tuning = Tuning { chunk, one_owner, overrides, ..Tuning::default() };
                    let call = CallShape::new(collective, 4, count);
                    let report = World::new(&shape, &call, &tuning).unwrap().check().unwrap();
                    // A barrier reduces one element.
                    let data = count.max(1) * 4;
                    assert_eq!(
                        (report.sent, report.received),
                        if shape.size() == 1 {
                            (0, 0)
                        } else {
                            expected(collective, algorithm, &shape, data)
                        },
                        "{collective} by {algorithm} on {shape}, {count} elements: (out, in)"
                    );
                    tried += 1;
                }
            }
        }
    }
    assert!(tried > 1000, "{tried}");
}
