//! How fast rings of slots are on this machine, and the kernel's copies between processes: two threads exchange through real
//! segments, as two ranks do.
//!
//! Which size is best depends on where the caches lie: on some CPUs memory that was written, and read by a peer, is several
//! times as fast to write again once it has left both second caches for a shared L3. An all_reduce of two ranks does not
//! show that, since they swap what they write; a broadcast does. Where readers hand lines back, that price is gone. What serves much data best (slots that stay in the second
//! caches) may cut a bucket of gradients into more pieces than need be.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_setaffinity};
use smddp_core::call::{Call, Collective};
use smddp_core::dtype::{DType, ReduceOp};
use smddp_core::order::Order;
use smddp_core::plan::{Move, Op, Plan, Span, Who};
use smddp_core::transport::{Arith, Buffers, Ctx, NodeLocal, PhaseRun};
use smddp_core::{Error, Region};

use crate::error::ShmError;
use crate::geometry::{Agreed, Geometry, SingleCopies};
use crate::handover::Listener;
use crate::membership::Membership;
use crate::node::ShmNode;

/// An all-reduce of so many bytes.
const DATA: usize = 4 << 20;
/// All-reduces of so many bytes, all of the same.
const BUCKET: usize = 1 << 20;
const BUCKETS: usize = 3;
/// Broadcasts of so many bytes.
const PIECE: usize = 16 << 10;
const PIECES: usize = 16;
/// What each of two ranks gives to each in an all-to-all and an all-gather: what single copies are used for.
const BLOCK: usize = 512 << 10;
/// And one of them in a broadcast.
const ALONE: usize = 2 << 20;
const RANKS: usize = 2;
/// Rounds of all candidates that must be over for the result to count.
const LEAST_ROUNDS: usize = 3;
const MOST_ROUNDS: usize = 12;
/// Threads of one process hand memory over in far less.
const HANDOVER: Duration = Duration::from_secs(5);

/// Fastest times with some slots, in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SlotTimes {
    /// All-reduces of much and of less data.
    pub all_reduce: f64,
    /// Broadcasts of one rank, one by one.
    pub broadcast: f64,
    /// As `broadcast`, with lines handed back.
    pub handed_back: f64,
}

/// Times of each of `candidates`, much being read in the order `far`. They take turns for as long as `limit` allows, between this thread and another that
/// runs on `peer_cores`. `None` where the time was too short to tell.
///
/// # Errors
/// When the segments cannot be made, or those cores not be used.
pub fn slots(
    candidates: &[Geometry],
    far: Order,
    peer_cores: &[usize],
    limit: Duration,
) -> Result<Option<Vec<SlotTimes>>, Error> {
    let candidates: Vec<_> = candidates.iter().map(|&geometry| (geometry, Agreed::default())).collect();
    let fastest =
        fastest(&candidates, far, peer_cores, limit, |rank, node| rank.all_reduce_and_broadcast(node))?;
    let named =
        |[all_reduce, broadcast, handed_back]: [f64; 3]| SlotTimes { all_reduce, broadcast, handed_back };
    Ok(fastest.map(|times| times.into_iter().map(named).collect()))
}

/// Fastest times of calls on large blocks that were just written, in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BlockTimes {
    /// Of an all-to-all and an all-gather together.
    pub mutual: f64,
    /// Of a broadcast and a look at its result, which is not in the reader's caches where the root wrote it.
    pub alone: f64,
}

/// The times through `geometry`'s slots, with lines handed back or not, and straight between the ranks' private memory. Otherwise as [`slots`].
///
/// # Errors
/// As [`slots`].
pub fn blocks(
    geometry: Geometry,
    hands_back: bool,
    far: Order,
    peer_cores: &[usize],
    limit: Duration,
) -> Result<Option<[BlockTimes; 2]>, Error> {
    let candidates = [SingleCopies::NONE, SingleCopies::ALL]
        .map(|single_copy| (geometry, Agreed { single_copy, hands_back }));
    let fastest = fastest(&candidates, far, peer_cores, limit, |rank, node| rank.blocks(node))?;
    let named = |[mutual, alone]: [f64; 2]| BlockTimes { mutual, alone };
    Ok(fastest.map(|times| [named(times[0]), named(times[1])]))
}

/// The fastest of each of the times that `measure` takes, for each candidate.
fn fastest<const N: usize>(
    candidates: &[(Geometry, Agreed)],
    far: Order,
    peer_cores: &[usize],
    limit: Duration,
    measure: Measure<N>,
) -> Result<Option<Vec<[f64; N]>>, Error> {
    let (ours, theirs) = open(candidates, far)?;
    let deadline = Instant::now() + limit;
    let meeting = Meeting::default();
    std::thread::scope(|scope| {
        let peer = scope.spawn(|| {
            let result = move_to(peer_cores).and_then(|()| exchange(measure, theirs, 1, &meeting, deadline));
            meeting.leave();
            result
        });
        let times = exchange(measure, ours, 0, &meeting, deadline);
        meeting.leave();
        match peer.join() {
            Ok(Err(error)) => Err(error),
            // Its times are the same but for noise.
            Ok(Ok(_)) => times,
            Err(_) => Err(Error::Internal("the probe's second rank panicked".to_owned())),
        }
    })
}

/// One round of a candidate: `None` where the deadline came first.
type Measure<const N: usize> = fn(&mut Rank<'_>, &mut ShmNode) -> Result<Option<[f64; N]>, Error>;

fn move_to(cores: &[usize]) -> Result<(), Error> {
    let mut set = CpuSet::new();
    cores.iter().filter(|&&core| core < CpuSet::MAX_CPU).for_each(|&core| set.set(core));
    sched_setaffinity(None, &set).map_err(|e| Error::Internal(format!("cannot run on cores {cores:?}: {e}")))
}

/// Both ranks' ends of a segment for each candidate.
pub(crate) fn open(
    candidates: &[(Geometry, Agreed)],
    far: Order,
) -> Result<(Vec<ShmNode>, Vec<ShmNode>), ShmError> {
    let member = |local_rank, agreed: Agreed| Membership {
        group: 0,
        secret: [0; 32],
        local_rank,
        ranks: vec![0, 1],
        node: "this machine".to_owned(),
        single_copy: agreed.single_copy,
        hands_back: agreed.hands_back,
        far,
        streams_from: None,
        deadline: Instant::now() + HANDOVER,
    };
    let mut ends = (Vec::new(), Vec::new());
    for &(geometry, agreed) in candidates {
        let listener = Listener::bind()?;
        let name = listener.name().to_owned();
        let (ours, theirs) = std::thread::scope(|scope| {
            let peer = scope.spawn(|| ShmNode::connect(&name, &member(1, agreed)));
            let ours = listener.serve(&member(0, agreed), geometry);
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
            std::hint::spin_loop();
        }
        true
    }

    fn leave(&self) {
        self.left.store(true, Ordering::Relaxed);
    }
}

fn exchange<const N: usize>(
    measure: Measure<N>,
    ends: Vec<ShmNode>,
    me: usize,
    meeting: &Meeting,
    deadline: Instant,
) -> Result<Option<Vec<[f64; N]>>, Error> {
    let mut rank = Rank::new(me, meeting, deadline);
    // Dropped before the rank's data: out of time, the other end may still be writing there until this one's doors close.
    let mut ends = ends;
    let mut fastest = vec![[f64::INFINITY; N]; ends.len()];
    for round in 0..=MOST_ROUNDS {
        for (index, node) in ends.iter_mut().enumerate() {
            let Some(times) = measure(&mut rank, node)? else {
                return Ok((round > LEAST_ROUNDS).then_some(fastest));
            };
            // The first round warms up.
            if round > 0 {
                (0..N).for_each(|i| fastest[index][i] = fastest[index][i].min(times[i]));
            }
        }
    }
    Ok(Some(fastest))
}

/// A collective's phase, as often as there are places in its data to shift it to.
#[derive(Clone, Copy)]
struct Work<'a> {
    collective: Collective,
    len: usize,
    shifts: &'a [usize],
}

/// Data begins where a cache line does, as tensors do: else every vector lies in two, and what that costs hides what slots do.
#[derive(Clone, Copy, Default)]
#[repr(align(64))]
struct Line {
    floats: [f32; 16],
}

/// What a rank works with.
struct Rank<'a> {
    me: usize,
    meeting: &'a Meeting,
    met: usize,
    deadline: Instant,
    data: Vec<Line>,
    blocks: [Vec<Line>; 2],
}

impl<'a> Rank<'a> {
    fn new(me: usize, meeting: &'a Meeting, deadline: Instant) -> Rank<'a> {
        let lines = |bytes: usize| vec![Line::default(); bytes / size_of::<Line>()];
        let blocks = [(); 2].map(|()| lines(RANKS * BLOCK));
        Rank { me, meeting, met: 0, deadline, data: lines(DATA), blocks }
    }

    /// All-reduces, broadcasts, and broadcasts whose reader hands lines back. `None` where the deadline came first, as for all
    /// that follow.
    fn all_reduce_and_broadcast(&mut self, node: &mut ShmNode) -> Result<Option<[f64; 3]>, Error> {
        // SAFETY: `data` stays in place until the ends, with their doors, are closed (`exchange`); a run that did not end before `run`
        // returned is not polled again.
        let whole = unsafe { Region::of(&mut self.data) };
        let buffers = Buffers { input: whole, output: whole, scratch: Region::EMPTY };
        let pieces: [usize; PIECES] = std::array::from_fn(|piece| piece * PIECE);
        let all_reduce = |len, calls| Work { collective: Collective::AllReduce, len, shifts: calls };
        let broadcasts = Work { collective: Collective::Broadcast, len: PIECE, shifts: &pieces };
        let mut times = [0.0; 3];
        for work in [all_reduce(DATA, &[0]), all_reduce(BUCKET, &[0; BUCKETS])] {
            let Some(time) = self.one_by_one(node, work, buffers)? else { return Ok(None) };
            times[0] += time;
        }
        for (kind, hands_back) in [(1, false), (2, true)] {
            node.hand_back(hands_back);
            let Some(time) = self.one_by_one(node, broadcasts, buffers)? else { return Ok(None) };
            times[kind] = time;
        }
        Ok(Some(times))
    }

    /// An all-to-all and an all-gather; a broadcast, and a look at what came of it. `None` as above.
    fn blocks(&mut self, node: &mut ShmNode) -> Result<Option<[f64; 2]>, Error> {
        let mut mutual = 0.0;
        let written = Line { floats: [self.met as f32; 16] };
        for collective in [Collective::AllToAll, Collective::AllGather] {
            self.blocks[0].fill(written);
            // SAFETY: as above.
            let [input, output] = self.blocks.each_mut().map(|block| unsafe { Region::of(block) });
            let buffers = Buffers { input, output, scratch: Region::EMPTY };
            let Some(time) = self.run(node, Work { collective, len: BLOCK, shifts: &[0] }, buffers)? else {
                return Ok(None);
            };
            mutual += time;
        }
        if self.me == 0 {
            self.data.fill(written);
        }
        // SAFETY: as above.
        let whole = unsafe { Region::of(&mut self.data) };
        let buffers = Buffers { input: whole, output: whole, scratch: Region::EMPTY };
        let broadcast = Work { collective: Collective::Broadcast, len: ALONE, shifts: &[0] };
        let alone = self.run(node, broadcast, buffers)?;
        Ok(alone.map(|alone| [mutual, alone]))
    }

    /// The work's calls, each when both ranks have come, as they are made between other work. All are made once before, untimed:
    /// the other candidates' turns have pushed this one's slots out of the caches.
    fn one_by_one(
        &mut self,
        node: &mut ShmNode,
        work: Work<'_>,
        buffers: Buffers,
    ) -> Result<Option<f64>, Error> {
        let mut total = 0.0;
        for _ in 0..2 {
            total = 0.0;
            for shifts in work.shifts.chunks(1) {
                let Some(time) = self.run(node, Work { shifts, ..work }, buffers)? else { return Ok(None) };
                total += time;
            }
        }
        Ok(Some(total))
    }

    /// Meets the other rank, then does the work: seconds until both have done it.
    fn run(&mut self, node: &mut ShmNode, work: Work<'_>, buffers: Buffers) -> Result<Option<f64>, Error> {
        let Work { collective, len, shifts } = work;
        let plan = Arc::new(plan(collective, len));
        if !self.meet() {
            return Ok(None);
        }
        let start = Instant::now();
        let call = Call::new(collective, DType::F32, (len / size_of::<f32>()) as u64).pack();
        for &shift in shifts {
            node.submit(PhaseRun {
                plan: Arc::clone(&plan),
                step: 0,
                shift,
                buffers,
                arith: Arith { dtype: DType::F32, op: ReduceOp::Sum, world: RANKS as u32 },
                call,
                seq: 0,
                ctx: Ctx(0),
            })?;
        }
        let mut done = Vec::with_capacity(shifts.len());
        while done.len() < shifts.len() {
            if !node.poll(&mut done)? {
                if Instant::now() > self.deadline {
                    return Ok(None);
                }
                std::hint::spin_loop();
            }
        }
        if len == ALONE && self.me != 0 {
            let result = &self.data[..len / size_of::<Line>()];
            result.iter().for_each(|line| _ = std::hint::black_box(line.floats[0]));
        }
        Ok(self.meet().then(|| start.elapsed().as_secs_f64()))
    }

    /// False where the deadline came first.
    fn meet(&mut self) -> bool {
        self.met += 1;
        self.meeting.hold(self.me, self.met, self.deadline)
    }
}

/// Of `len` bytes, or of blocks of `len` bytes.
fn plan(collective: Collective, len: usize) -> Plan {
    let all = |from| {
        let span = Span::output(0, len);
        vec![Move { from, to: Who::All, src: span, dst: span, finish: true }]
    };
    let mut plan = Plan::default();
    let moves = match collective {
        Collective::AllReduce => all(Who::All),
        Collective::Broadcast => all(Who::One(0)),
        Collective::AllGather => all_gather(len),
        _ => all_to_all(len),
    };
    plan.push(Op::Phase(moves), &[]);
    plan
}

fn all_gather(len: usize) -> Vec<Move> {
    let moves = (0..RANKS).map(|from| Move {
        from: Who::One(from as u32),
        to: Who::All,
        src: Span::input(0, len),
        dst: Span::output(from * len, len),
        finish: true,
    });
    moves.collect()
}

fn all_to_all(len: usize) -> Vec<Move> {
    let block = |of: usize| of * len;
    let pairs = (0..RANKS).flat_map(|from| (0..RANKS).map(move |to| (from, to)));
    let moves = pairs.map(|(from, to)| Move {
        from: Who::One(from as u32),
        to: Who::One(to as u32),
        src: Span::input(block(to), len),
        dst: Span::output(block(from), len),
        finish: true,
    });
    moves.collect()
}
