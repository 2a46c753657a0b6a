//! Ranks as threads of this process, each with its own [`ShmNode`].
#![allow(dead_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use smddp_core::call::{Call, Collective, PackedCall};
use smddp_core::dtype::{DType, ReduceOp};
use smddp_core::order::Order;
use smddp_core::plan::{Move, Op, Plan, Span, Who};
use smddp_core::transport::{Arith, Buffers, Ctx, NodeLocal, PhaseRun};
use smddp_core::{Error, Region};
use smddp_shm::{Geometry, Listener, Membership, ShmNode, SingleCopies};

/// Long enough that only a hang reaches it.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// A sleep that lasts so long was not ended by a bell.
pub const SLEEP: Duration = Duration::from_secs(20);

pub const SMALL: Geometry = Geometry { slot: 4096, slots: 2 };

pub fn membership(group: u64, local_rank: usize, size: usize) -> Membership {
    Membership {
        group,
        secret: [7; 32],
        local_rank,
        // Group ranks differ from local ranks, so that a test sees which one an error names.
        ranks: (0..size as u32).map(|r| 10 + r).collect(),
        node: "here".to_owned(),
        single_copy: SingleCopies::ALL,
        hands_back: true,
        far: Order::FourPages,
        streams_from: None,
        deadline: Instant::now() + PATIENCE,
    }
}

/// Runs `body` on `size` ranks and returns what each gives.
pub fn on_ranks<T: Send>(
    size: usize,
    geometry: Geometry,
    body: impl Fn(usize, ShmNode) -> T + Sync,
) -> Vec<T> {
    on_members(size, geometry, membership, body)
}

/// As [`on_ranks`], of ranks that join as `member` of group, local rank and size says.
pub fn on_members<T: Send>(
    size: usize,
    geometry: Geometry,
    member: impl Fn(u64, usize, usize) -> Membership + Sync,
    body: impl Fn(usize, ShmNode) -> T + Sync,
) -> Vec<T> {
    static GROUP: AtomicU64 = AtomicU64::new(1);
    let group = GROUP.fetch_add(1, Ordering::Relaxed);
    let listener = Listener::bind().unwrap();
    let name = listener.name().to_owned();
    std::thread::scope(|scope| {
        let (body, name, member) = (&body, &name, &member);
        let others: Vec<_> = (1..size)
            .map(|rank| {
                scope.spawn(move || body(rank, ShmNode::connect(name, &member(group, rank, size)).unwrap()))
            })
            .collect();
        let first = listener.serve(&member(group, 0, size), geometry).unwrap();
        let mut results = vec![body(0, first)];
        results.extend(others.into_iter().map(|thread| thread.join().unwrap()));
        results
    })
}

pub fn span_move(from: Who, to: Who, src: Span, dst: Span) -> Move {
    Move { from, to, src, dst, finish: true }
}

pub fn one_phase(moves: Vec<Move>) -> Arc<Plan> {
    let mut plan = Plan::default();
    plan.push(Op::Phase(moves), &[]);
    Arc::new(plan)
}

pub fn call(count: usize) -> PackedCall {
    Call::new(Collective::AllReduce, DType::F32, count as u64).pack()
}

pub fn arith(dtype: DType, op: ReduceOp, world: usize) -> Arith {
    Arith { dtype, op, world: world as u32 }
}

/// The buffers of one rank, as owned bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Memory {
    pub input: Vec<u8>,
    pub output: Vec<u8>,
    pub scratch: Vec<u8>,
}

impl Memory {
    /// The caller keeps `self` in place and untouched until what uses the buffers is over.
    pub fn buffers(&mut self) -> Buffers {
        // SAFETY: as the caller promises.
        unsafe {
            Buffers {
                input: Region::of(&mut self.input),
                output: Region::of(&mut self.output),
                scratch: Region::of(&mut self.scratch),
            }
        }
    }
}

pub fn run(plan: &Arc<Plan>, buffers: Buffers, arith: Arith, call: PackedCall, ctx: u64) -> PhaseRun {
    PhaseRun { plan: Arc::clone(plan), step: 0, shift: 0, buffers, arith, call, seq: 0, ctx: Ctx(ctx) }
}

/// Polls until `count` more marks have come, sleeping on the bell after `spins` polls without progress.
pub fn drive(node: &mut ShmNode, count: usize, spins: usize) -> Result<Vec<Ctx>, Error> {
    let bell = node.bell();
    let started = Instant::now();
    let (mut done, mut idle) = (Vec::new(), 0);
    while done.len() < count {
        assert!(started.elapsed() < PATIENCE, "hangs, waiting for {:?}", node.waiting_for());
        if node.poll(&mut done)? {
            idle = 0;
            continue;
        }
        idle += 1;
        if idle < spins {
            std::thread::yield_now();
            continue;
        }
        idle = 0;
        node.arm();
        let value = bell.value();
        let moved = node.poll(&mut done);
        if let Ok(false) = moved {
            let asleep = Instant::now();
            bell.wait(value, SLEEP);
            assert!(asleep.elapsed() < SLEEP, "nobody rang; waiting for {:?}", node.waiting_for());
        }
        node.disarm();
        moved?;
    }
    assert_eq!(done.len(), count, "more marks than work");
    Ok(done)
}
