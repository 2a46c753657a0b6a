//! Bytes between nodes, as the ranks count them.

use smddp::{ReduceOp, World};

use crate::{figure, good_job};

const MIB: usize = 1 << 20;
/// Bytes of a block of the collectives that move blocks, and of a broadcast.
const BLOCK: usize = MIB / 2;

const CALLS: [&str; 5] = ["all_reduce", "reduce_scatter", "all_gather", "broadcast", "all_to_all"];

pub fn rank() {
    let world = World::init().unwrap();
    let n = world.size();
    let mut sum = vec![1f32; 16 * MIB / 4];
    let (mut own, mut all, mut more) = (vec![1u8; BLOCK], vec![1u8; n * BLOCK], vec![1u8; n * BLOCK]);
    let sent = || world.traffic().iter().map(|t| t.1).sum::<u64>();
    for call in CALLS {
        let before = sent();
        match call {
            "all_reduce" => world.all_reduce(&mut sum, ReduceOp::Sum),
            "reduce_scatter" => world.reduce_scatter(&all, &mut own, ReduceOp::Max),
            "all_gather" => world.all_gather(&own, &mut all),
            "broadcast" => world.broadcast(&mut own, 0),
            _ => world.all_to_all(&all, &mut more),
        }
        .unwrap();
        println!("{call}={}", sent() - before);
    }
    assert!(sum.iter().all(|&v| v == n as f32) && [own, all, more].concat().iter().all(|&byte| byte == 1));
}

/// Most that one node may send in a call, and all nodes together.
fn bounds(call: &str, nodes: &[usize], node: usize) -> (usize, usize) {
    let size: usize = nodes.iter().sum();
    let count = nodes.len();
    let over = |bytes: &dyn Fn(usize) -> usize| (bytes(node), (0..count).map(bytes).sum());
    match call {
        // 2(N-1)/N of the data.
        "all_reduce" => over(&|_| 2 * (count - 1) * 16 * MIB / count),
        // The sum of every block to the rank it is for.
        "reduce_scatter" => over(&|n| (size - nodes[n]) * BLOCK),
        // Every block once to each other node.
        "all_gather" => over(&|n| (count - 1) * nodes[n] * BLOCK),
        // Every other node hears it once; who tells it is for the algorithm to say.
        "broadcast" => ((count - 1) * BLOCK, (count - 1) * BLOCK),
        "all_to_all" => over(&|n| nodes[n] * (size - nodes[n]) * BLOCK),
        other => panic!("no bound for {other}"),
    }
}

#[test]
fn a_node_sends_no_more_than_the_bound() {
    for nodes in [&[2usize, 2][..], &[1, 1, 1], &[3, 2]] {
        let outputs = good_job("bytes", nodes, &[]);
        for call in CALLS {
            let (mut first, mut whole, mut all_bounds) = (0, 0, 0);
            for (node, &locals) in nodes.iter().enumerate() {
                let sent: u64 = outputs[first..first + locals].iter().map(|o| figure(o, call)).sum();
                let (bound, together) = bounds(call, nodes, node);
                // The cuts of a sum follow cache lines.
                let slack = if call == "all_reduce" { 1.02 } else { 1.0 };
                assert!(
                    sent as f64 <= slack * bound as f64,
                    "{call}: node {node} of {nodes:?} sent {sent}, bound {bound}"
                );
                first += locals;
                whole += sent;
                all_bounds = together;
            }
            // Less cannot do it.
            let enough = if call == "all_reduce" { 0.98 } else { 1.0 } * all_bounds as f64;
            assert!(whole as f64 >= enough, "{call}: {nodes:?} sent {whole}, needed {all_bounds}");
        }
    }
}
