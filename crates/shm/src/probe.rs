//! How fast rings of slots are on this machine: two threads exchange through real segments, as two ranks do.
//!
//! Which size is best depends on where the caches lie: slots that fit in the writer's L2 are read out of it as dirty
//! lines, which on some CPUs takes several times as long as reading what has been pushed out to a shared L3.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_setaffinity};
use smddp_core::call::{Call, Collective, PackedCall};
use smddp_core::dtype::{DType, ReduceOp};
use smddp_core::plan::{Move, Op, Plan, Span, Who};
use smddp_core::transport::{Arith, Buffers, Ctx, NodeLocal, PhaseRun};
use smddp_core::{Error, Region};

use crate::error::ShmError;
use crate::geometry::Geometry;
use crate::handover::{Listener, Membership};
use crate::node::ShmNode;

/// An all-reduce of so many bytes, in rounds of so many, as ranks run it.
const DATA: usize = 4 << 20;
const ROUND: usize = 1 << 20;
const RANKS: usize = 2;
/// Rounds of all candidates that must be over for the result to count.
const LEAST_ROUNDS: usize = 3;
const MOST_ROUNDS: usize = 12;
/// Threads of one process hand memory over in far less.
const HANDOVER: Duration = Duration::from_secs(5);

/// Fastest all-reduce with each of `candidates`, in seconds, taking turns for as long as `limit` allows: between this thread and
/// another that runs on `peer_cores`. `None` where the time was too short to tell.
///
/// # Errors
/// When the segments cannot be made, or those cores not be used.
pub fn time(
    candidates: &[Geometry],
    peer_cores: &[usize],
    limit: Duration,
) -> Result<Option<Vec<f64>>, Error> {
    let (ours, theirs) = open(candidates)?;
    let deadline = Instant::now() + limit;
    let meeting = Meeting::default();
    std::thread::scope(|scope| {
        let peer = scope.spawn(|| {
            let result = move_to(peer_cores).and_then(|()| exchange(theirs, 1, &meeting, deadline));
            meeting.leave();
            result
        });
        let times = exchange(ours, 0, &meeting, deadline);
        meeting.leave();
        match peer.join() {
            Ok(Err(error)) => Err(error),
            // Its times are the same but for noise.
            Ok(Ok(_)) => times,
            Err(_) => Err(Error::Internal("the probe's second rank panicked".to_owned())),
        }
    })
}

fn move_to(cores: &[usize]) -> Result<(), Error> {
    let mut set = CpuSet::new();
    cores.iter().filter(|&&core| core < CpuSet::MAX_CPU).for_each(|&core| set.set(core));
    sched_setaffinity(None, &set).map_err(|e| Error::Internal(format!("cannot run on cores {cores:?}: {e}")))
}

/// Both ranks' ends of a segment for each candidate.
fn open(candidates: &[Geometry]) -> Result<(Vec<ShmNode>, Vec<ShmNode>), ShmError> {
    let member = |local_rank| Membership {
        group: 0,
        secret: [0; 32],
        local_rank,
        ranks: vec![0, 1],
        node: "this machine".to_owned(),
        single_copy: true,
        deadline: Instant::now() + HANDOVER,
    };
    let mut ends = (Vec::new(), Vec::new());
    for &geometry in candidates {
        let listener = Listener::bind()?;
        let name = listener.name().to_owned();
        let (ours, theirs) = std::thread::scope(|scope| {
            let peer = scope.spawn(|| ShmNode::connect(&name, &member(1)));
            let ours = listener.serve(&member(0), geometry);
            let ended = ShmError::Parameters("the probe's second rank ended early".to_owned());
            (ours, peer.join().unwrap_or(Err(ended)))
        });
        ends.0.push(ours?);
        ends.1.push(theirs?);
    }
    Ok(ends)
}

/// Where the two threads wait for each other.
#[derive(Default)]
struct Meeting {
    come: [AtomicUsize; RANKS],
    left: AtomicBool,
}

impl Meeting {
    /// False where the other has left, or did not come in time.
    fn hold(&self, me: usize, number: usize, deadline: Instant) -> bool {
        self.come[me].store(number, Ordering::Release);
        while self.come[1 - me].load(Ordering::Acquire) < number {
            if Instant::now() > deadline || self.left.load(Ordering::Relaxed) {
                return false;
            }
            std::thread::yield_now();
        }
        true
    }

    fn leave(&self) {
        self.left.store(true, Ordering::Relaxed);
    }
}

fn exchange(
    mut ends: Vec<ShmNode>,
    me: usize,
    meeting: &Meeting,
    deadline: Instant,
) -> Result<Option<Vec<f64>>, Error> {
    let mut data = vec![0f32; DATA / size_of::<f32>()];
    // SAFETY: `data` stays in place; a run that did not end before `all_reduce` returned is not polled again.
    let region = unsafe { Region::of(&mut data) };
    let plan = plan();
    let mut fastest = vec![f64::INFINITY; ends.len()];
    for round in 0..=MOST_ROUNDS {
        for (index, node) in ends.iter_mut().enumerate() {
            let come = meeting.hold(me, round * fastest.len() + index + 1, deadline);
            let start = Instant::now();
            if !come || !all_reduce(node, &plan, region, deadline)? {
                return Ok((round > LEAST_ROUNDS).then_some(fastest));
            }
            // The first round warms up.
            if round > 0 {
                fastest[index] = fastest[index].min(start.elapsed().as_secs_f64());
            }
        }
    }
    Ok(Some(fastest))
}

/// One round: each rank combines its half, then takes the other's.
fn plan() -> Arc<Plan> {
    let half = |rank: usize| Span::output(rank * ROUND / RANKS, ROUND / RANKS);
    let moves = |of: fn(usize) -> (Who, Who)| -> Vec<Move> {
        (0..RANKS)
            .map(|rank| {
                let (from, to) = of(rank);
                Move { from, to, src: half(rank), dst: half(rank), finish: true }
            })
            .collect()
    };
    let mut plan = Plan::default();
    plan.push(Op::Phase(moves(|rank| (Who::All, Who::One(rank as u32)))), &[]);
    plan.push(Op::Phase(moves(|rank| (Who::One(rank as u32), Who::All))), &[0]);
    Arc::new(plan)
}

/// Two rounds are under way at a time. False where the deadline came first.
fn all_reduce(node: &mut ShmNode, plan: &Arc<Plan>, data: Region, deadline: Instant) -> Result<bool, Error> {
    let rounds = DATA / ROUND;
    let mut submit = |step: u32, round: usize| {
        node.submit(PhaseRun {
            plan: Arc::clone(plan),
            step,
            shift: round * ROUND,
            buffers: Buffers { input: data, output: data, scratch: Region::EMPTY },
            arith: Arith { dtype: DType::F32, op: ReduceOp::Sum, world: RANKS as u32 },
            call: call(),
            ctx: Ctx(0),
        })
    };
    submit(0, 0)?;
    for round in 1..rounds {
        submit(0, round)?;
        submit(1, round - 1)?;
    }
    submit(1, rounds - 1)?;
    let mut done = Vec::with_capacity(2 * rounds);
    while done.len() < 2 * rounds {
        if !node.poll(&mut done)? {
            if Instant::now() > deadline {
                return Ok(false);
            }
            std::hint::spin_loop();
        }
    }
    Ok(true)
}

fn call() -> PackedCall {
    Call::new(Collective::AllReduce, DType::F32, (DATA / size_of::<f32>()) as u64).pack()
}
