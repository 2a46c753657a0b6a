//! Cost of the flag protocol of one exchange, two ranks polled by turns in one thread: no core waits for another.
//!
//! `cargo bench -p smddp-shm --bench flags`

#![allow(clippy::unwrap_used, reason = "a measurement that fails says where")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use divan::Bencher;
use smddp_core::order::Order;
use smddp_core::plan::{Move, Op, Plan, Span, Who};
use smddp_core::transport::{Arith, Buffers, Ctx, NodeLocal, PhaseRun};
use smddp_core::{Call, Collective, DType, ReduceOp, Region};
use smddp_shm::{Geometry, Listener, Membership, ShmNode, SingleCopies};

fn main() {
    divan::main();
}

fn pair() -> [ShmNode; 2] {
    let membership = |local_rank| Membership {
        group: 1,
        secret: [7; 32],
        local_rank,
        ranks: vec![0, 1],
        node: "here".to_owned(),
        single_copy: SingleCopies::ALL,
        hands_back: false,
        far: Order::Straight,
        streams_from: None,
        deadline: Instant::now() + Duration::from_secs(30),
    };
    let listener = Listener::bind().unwrap();
    let name = listener.name().to_owned();
    let other = membership(1);
    let second = std::thread::spawn(move || ShmNode::connect(&name, &other).unwrap());
    let first = listener.serve(&membership(0), Geometry { slot: 64 << 10, slots: 4 }).unwrap();
    [first, second.join().unwrap()]
}

/// An all_reduce of float32 by both ranks: submitted, published, combined, done.
#[divan::bench(args = [4, 40, 1024, 16 << 10])]
fn exchange(bencher: Bencher<'_, '_>, bytes: usize) {
    let mut nodes = pair();
    let mut memory = [vec![1f32; bytes / 4], vec![1f32; bytes / 4]];
    let span = Span::output(0, bytes);
    let mut plan = Plan::default();
    plan.push(
        Op::Phase(vec![Move { from: Who::All, to: Who::All, src: span, dst: span, finish: true }]),
        &[],
    );
    let plan = Arc::new(plan);
    let call = Call::new(Collective::AllReduce, DType::F32, bytes as u64 / 4).pack();
    let arith = Arith { dtype: DType::F32, op: ReduceOp::Max, world: 2 };
    // SAFETY: `memory` outlives the nodes' work, which ends in each turn below.
    let regions = memory.each_mut().map(|m| unsafe { Region::of(m) });
    let mut done = Vec::with_capacity(4);
    bencher.bench_local(|| {
        for (node, data) in nodes.iter_mut().zip(regions) {
            let buffers = Buffers { input: data, output: data, scratch: Region::EMPTY };
            let plan = Arc::clone(&plan);
            node.submit(PhaseRun { plan, step: 0, shift: 0, buffers, arith, call, seq: 0, ctx: Ctx(0) })
                .unwrap();
        }
        done.clear();
        while done.len() < 2 {
            for node in &mut nodes {
                node.poll(&mut done).unwrap();
            }
        }
    });
}
