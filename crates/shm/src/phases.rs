//! Runs the queue of phases as exchanges over the ring: what to copy where, and when a phase is done.
//!
//! Two places walk over the queue: *publishing* copies this rank's pieces into its slots, up to a ring ahead, also
//! of phases behind the first; *consuming* always works on the first phase. Both see the same moves, groups and cuts as
//! every other rank (`cut`), so they know without asking what lies where in whose slot.

use std::collections::VecDeque;
use std::sync::Arc;

use smddp_core::call::PackedCall;
use smddp_core::error::Site;
use smddp_core::plan::{Buf, Move, Op, Plan, Span, Who, source_of};
use smddp_core::reduce::combine;
use smddp_core::shared::Place;
use smddp_core::transport::{Arith, Ctx, PhaseRun};
use smddp_core::{Error, Region, Result};

use crate::cut::{Cutter, Group, aligned, includes, travels};
use crate::direct::{self, Direct, Entered};
use crate::layout::{Memory, SlotHead};
use crate::mask::Mask;
use crate::ring::Ring;
use crate::segment::Segment;
use crate::single_copy::{self, SingleCopy};

/// What came of an attempt to make progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// There is nothing to do here.
    Idle,
    /// This local rank has to move first.
    Blocked(usize),
    Moved,
}

struct Run {
    run: PhaseRun,
    first: Group,
    way: Way,
}

/// How a phase's data reaches its ranks.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    Slots,
    /// From memory that the ranks share, where it lies here (`direct`).
    Shared(Place),
    /// From the ranks' private memory (`single_copy`).
    SingleCopy,
}

/// A phase that was found sound, and how it begins: the same call is often made again.
struct Known {
    plan: Arc<Plan>,
    step: u32,
    shift: usize,
    lens: [usize; 3],
    first: Group,
    way: Way,
}

impl Known {
    fn is(&self, run: &PhaseRun) -> bool {
        Arc::ptr_eq(&self.plan, &run.plan)
            && (self.step, self.shift, self.lens) == (run.step, run.shift, lens(run))
    }
}

fn lens(run: &PhaseRun) -> [usize; 3] {
    [run.buffers.input.len(), run.buffers.output.len(), run.buffers.scratch.len()]
}

/// Phases that are remembered: those of a few calls in turn.
const KNOWN: usize = 16;

/// Where `run` is remembered.
fn place_among_known(run: &PhaseRun) -> usize {
    // Plans are allocated, 16 bytes apart at least.
    ((Arc::as_ptr(&run.plan) as usize >> 4) + run.step as usize) % KNOWN
}

/// The moves of a phase that was checked when it was submitted.
fn moves_of(run: &PhaseRun) -> &[Move] {
    match run.plan.steps.get(run.step as usize).map(|s| &s.op) {
        Some(Op::Phase(moves)) => moves,
        _ => &[],
    }
}

/// The next exchange to publish.
#[derive(Default)]
struct Publishing {
    /// Index into the queue.
    run: usize,
    group: Group,
    cut: usize,
}

/// The exchange being consumed, and how far.
struct Consuming {
    group: Group,
    cut: usize,
    /// The next move, and how many bytes of its piece are done.
    next: usize,
    done: usize,
    /// Where the next piece lies in rank `w`'s slot: `base + beyond[w]`.
    base: isize,
    beyond: Vec<isize>,
    /// Peers whose heads were seen and compared in this exchange.
    arrived: Mask,
}

pub(crate) struct Phases {
    me: usize,
    /// Group rank of each local rank.
    ranks: Vec<u32>,
    /// Bytes one poll may copy.
    budget: usize,
    cutter: Cutter,
    queue: VecDeque<Run>,
    publishing: Publishing,
    consuming: Consuming,
    sources: Vec<Region>,
    submitted: u64,
    known: [Option<Known>; KNOWN],
    entered: Entered,
    direct: Direct,
    single_copy: SingleCopy,
}

impl Phases {
    pub(crate) fn new(me: usize, ranks: Vec<u32>, slot_bytes: usize, single_copy: SingleCopy) -> Phases {
        let size = ranks.len();
        Phases {
            me,
            budget: slot_bytes.max(64 << 10),
            cutter: Cutter::new(me, size, slot_bytes),
            queue: VecDeque::with_capacity(64),
            publishing: Publishing::default(),
            consuming: Consuming {
                group: Group::default(),
                cut: 0,
                next: 0,
                done: 0,
                base: 0,
                beyond: vec![0; size],
                arrived: Mask::default(),
            },
            sources: Vec::with_capacity(size),
            submitted: 0,
            known: [const { None }; KNOWN],
            entered: Entered::default(),
            direct: Direct::default(),
            single_copy,
            ranks,
        }
    }

    /// The memory that the ranks share.
    pub(crate) fn entered(&mut self) -> &mut Entered {
        &mut self.entered
    }

    pub(crate) fn single_copy(&self) -> &SingleCopy {
        &self.single_copy
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Number of the first unfinished phase, and its call.
    pub(crate) fn oldest(&self) -> Option<(u64, PackedCall)> {
        let first = self.queue.front()?;
        Some((self.submitted - self.queue.len() as u64, first.run.call))
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.queue.clear();
    }

    /// Queues a phase; its number.
    pub(crate) fn submit(&mut self, run: PhaseRun) -> Result<u64> {
        let place = if run.call.is_shared() { self.place(&run)? } else { None };
        let (first, way) = match place {
            Some(place) => {
                check(&run, self.me, self.ranks.len())?;
                (self.cutter.whole(moves_of(&run), direct::EXCHANGES), Way::Shared(place))
            }
            None => self.beginning(&run)?,
        };
        if self.queue.is_empty() {
            self.consuming.start(first, 0);
        }
        if self.publishing.run == self.queue.len() {
            self.publishing.group = first;
            self.publishing.cut = 0;
        }
        self.queue.push_back(Run { run, first, way });
        Ok(self.count())
    }

    /// The number of a phase that is taken up.
    fn count(&mut self) -> u64 {
        self.submitted += 1;
        self.submitted - 1
    }

    /// The first group of a phase that lies in no shared memory, and its way; the phase is checked.
    fn beginning(&mut self, run: &PhaseRun) -> Result<(Group, Way)> {
        let known = &mut self.known[place_among_known(run)];
        if let Some(known) = known.as_ref().filter(|known| known.is(run)) {
            return Ok((known.first, known.way));
        }
        check(run, self.me, self.ranks.len())?;
        let moves = moves_of(run);
        let (first, way) = if single_copy::takes(run, moves, self.ranks.len()) {
            (self.cutter.whole(moves, single_copy::EXCHANGES), Way::SingleCopy)
        } else {
            (self.cutter.group(moves, 0), Way::Slots)
        };
        let (plan, step, shift) = (Arc::clone(&run.plan), run.step, run.shift);
        *known = Some(Known { plan, step, shift, lens: lens(run), first, way });
        Ok((first, way))
    }

    /// Takes up a phase that is to be over before anything is queued: its number. `None` where it is not one exchange
    /// through slots, or not the only work. What follows is [`publish_at_once`](Self::publish_at_once), then
    /// [`consume_at_once`](Self::consume_at_once), and [`keep`](Self::keep) if it is not over.
    pub(crate) fn take_up(&mut self, run: &PhaseRun) -> Result<Option<u64>> {
        if !self.queue.is_empty() || run.call.is_shared() {
            return Ok(None);
        }
        let (first, way) = self.beginning(run)?;
        if way != Way::Slots || first.cuts > 1 || first.end < moves_of(run).len() {
            return Ok(None);
        }
        self.publishing = Publishing { run: 0, group: first, cut: 0 };
        self.consuming.start(first, 0);
        Ok(Some(self.count()))
    }

    /// Whether this rank reads others' slots in the phase that was taken up.
    pub(crate) fn reads(&self) -> bool {
        !self.consuming.group.reads.is_empty()
    }

    /// Bytes that a rank publishes of the phase that was taken up, at most.
    pub(crate) fn published_bytes(&self) -> usize {
        self.publishing.group.most
    }

    /// Publishes the one exchange of a phase that was taken up; false where its slot is not free.
    pub(crate) fn publish_at_once(&mut self, run: &PhaseRun, segment: &Segment, ring: &mut Ring) -> bool {
        // Nothing is queued, so this rank is not ahead of itself (E3).
        if !self.publishing.group.writes {
            ring.skip();
        } else if ring.in_the_way(segment).is_none() {
            fill_slot(self.me, run, &self.publishing, segment, ring);
        } else {
            return false;
        }
        self.publishing.run = 1;
        true
    }

    /// As [`consume`](Self::consume), of a phase that was taken up and published. `None` when it is over.
    pub(crate) fn consume_at_once(
        &mut self,
        run: &PhaseRun,
        segment: &Segment,
        ring: &mut Ring,
    ) -> Result<Option<Step>> {
        let (sources, all) = (&mut self.sources, usize::MAX);
        let mut work = Work::new(self.me, &self.ranks, run, segment, ring, sources, all);
        let step = work.consume(&mut self.consuming)?;
        if step.is_none() {
            ring.consume(segment);
            self.publishing.run = 0;
        }
        Ok(step)
    }

    /// Queues a phase that was taken up, as far as it is.
    pub(crate) fn keep(&mut self, run: PhaseRun) {
        self.queue.push_back(Run { run, first: self.consuming.group, way: Way::Slots });
    }

    /// Where the data lies, of a call on shared memory. None: this phase moves other data (what came from other nodes,
    /// say), as every rank's plan has it, and goes through slots.
    fn place(&self, run: &PhaseRun) -> Result<Option<Place>> {
        let source = run.call.unpack().map(|call| source_of(call.collective));
        let moves = moves_of(run);
        if moves.is_empty() || moves.iter().any(|m| Some(m.src.buf) != source) {
            return Ok(None);
        }
        let data = if source == Some(Buf::Input) { run.buffers.input } else { run.buffers.output };
        let place = self.entered.place(data);
        let missing = || {
            let what = "its data is not in memory that the ranks share";
            Error::Internal(format!("phase {} of {}: {what}", run.step, run.call))
        };
        place.map(Some).ok_or_else(missing)
    }

    /// Publishes one exchange, when there is one and its slot is free.
    pub(crate) fn publish(&mut self, segment: &Segment, ring: &mut Ring) -> Step {
        let at = &mut self.publishing;
        let Some(Run { run, way, .. }) = self.queue.get(at.run) else { return Step::Idle };
        // The second exchange waits until this rank's share is done, which consuming the first one is (D2, C2). What follows
        // a single copy waits until that is over: it may go on through slots (C1).
        let waits = match way {
            Way::Slots => false,
            _ => at.cut == at.group.cuts || at.cut > 0 && (at.run > 0 || self.consuming.cut == 0),
        };
        if waits || ring.is_full() {
            return Step::Idle;
        }
        let moves = moves_of(run);
        if !at.group.writes {
            ring.skip();
        } else if let Some(peer) = ring.in_the_way(segment) {
            return Step::Blocked(peer);
        } else {
            match way {
                Way::Slots => fill_slot(self.me, run, at, segment, ring),
                Way::Shared(place) => publish_words(run, bytemuck::bytes_of(place), segment, ring),
                Way::SingleCopy if at.cut == 0 => {
                    let offer = self.single_copy.offer(run, moves, self.me);
                    publish_words(run, bytemuck::bytes_of(&offer), segment, ring);
                }
                Way::SingleCopy => {
                    publish_words(run, &[u8::from(self.single_copy.has_failed())], segment, ring);
                }
            }
        }
        at.cut += 1;
        if at.cut == at.group.cuts && *way != Way::SingleCopy {
            at.cut = 0;
            if at.group.end < moves.len() {
                at.group = self.cutter.group(moves, at.group.end);
            } else {
                at.run += 1;
                at.group = self.queue.get(at.run).map_or(Group::default(), |next| next.first);
            }
        }
        Step::Moved
    }

    /// Consumes what it can of the oldest published exchange, within the budget of one poll.
    pub(crate) fn consume(
        &mut self,
        segment: &Segment,
        ring: &mut Ring,
        done: &mut Vec<Ctx>,
    ) -> Result<Step> {
        let Some(Run { run, way, .. }) = self.queue.front() else { return Ok(Step::Idle) };
        if ring.consumed() == ring.published() {
            return Ok(Step::Idle);
        }
        let (sources, budget) = (&mut self.sources, self.budget);
        let mut work = Work::new(self.me, &self.ranks, run, segment, ring, sources, budget);
        let step = match *way {
            Way::Slots => work.consume(&mut self.consuming)?,
            Way::Shared(own) => {
                let sharing = Sharing { own, entered: &self.entered, direct: &mut self.direct };
                work.share(&mut self.consuming, sharing)?
            }
            Way::SingleCopy => work.copy_once(&mut self.consuming, &mut self.single_copy)?,
        };
        if let Some(step) = step {
            return Ok(step);
        }
        let again = *way == Way::SingleCopy && self.consuming.cut > 0 && self.single_copy.has_failed();
        ring.consume(segment);
        if again {
            self.start_again();
        } else {
            self.step_on(done);
        }
        Ok(Step::Moved)
    }

    /// The first phase from its beginning, through slots (C1).
    fn start_again(&mut self) {
        self.single_copy.forget();
        let Some(Run { run, first, way }) = self.queue.front_mut() else { return };
        (*first, *way) = (self.cutter.group(moves_of(run), 0), Way::Slots);
        self.consuming.start(*first, 0);
        self.publishing = Publishing { run: 0, group: *first, cut: 0 };
    }

    /// To the next exchange; the phase may be over.
    fn step_on(&mut self, done: &mut Vec<Ctx>) {
        let Some(Run { run, way, .. }) = self.queue.front() else { return };
        let (group, cut) = (self.consuming.group, self.consuming.cut + 1);
        if cut < group.cuts {
            self.consuming.start(group, cut);
        } else if group.end < moves_of(run).len() {
            let next = self.cutter.group(moves_of(run), group.end);
            self.consuming.start(next, 0);
        } else {
            done.push(run.ctx);
            let held = *way == Way::SingleCopy;
            self.direct.forget();
            self.single_copy.forget();
            self.queue.pop_front();
            let next = self.queue.front().map_or(Group::default(), |next| next.first);
            if held {
                self.publishing = Publishing { run: 0, group: next, cut: 0 };
            } else {
                self.publishing.run -= 1;
            }
            if !self.queue.is_empty() {
                self.consuming.start(next, 0);
            }
        }
    }

    /// Local ranks without which the oldest phase does not go on.
    pub(crate) fn waiting_for(&self, segment: &Segment, ring: &Ring) -> Vec<usize> {
        if self.queue.is_empty() {
            return Vec::new();
        }
        if ring.consumed() == ring.published() {
            return ring.all_in_the_way(segment).collect();
        }
        self.consuming.group.reads.iter().filter(|&peer| !ring.has_published(segment, peer)).collect()
    }
}

impl Consuming {
    fn start(&mut self, group: Group, cut: usize) {
        self.group = group;
        self.cut = cut;
        self.next = group.start;
        self.done = 0;
        self.base = 0;
        self.beyond.fill(0);
        self.arrived = Mask::default();
    }

    /// Offset in `rank`'s slot of the next piece.
    fn offset(&self, rank: usize) -> usize {
        (self.base + self.beyond[rank]) as usize
    }

    /// Steps over `m`, whose piece of this cut has `len` bytes.
    fn step_over(&mut self, m: &Move, len: usize) {
        let len = aligned(len) as isize;
        match (m.from, m.to) {
            (Who::All, Who::All) => self.base += len,
            (Who::All, Who::One(to)) => {
                self.base += len;
                self.beyond[to as usize] -= len;
            }
            (Who::One(from), to) => {
                if to != Who::One(from) {
                    self.beyond[from as usize] += len;
                }
            }
        }
        self.next += 1;
        self.done = 0;
    }
}

/// Publishes what this rank gives in the exchange `at`; its slot is free.
fn fill_slot(me: usize, run: &PhaseRun, at: &Publishing, segment: &Segment, ring: &mut Ring) {
    let slot = slot_of(segment, ring, me, ring.published(), at.group.inline);
    let mut offset = 0;
    for m in moves_of(run)[at.group.start..at.group.end].iter().filter(|m| travels(m, me)) {
        let (start, len) = at.group.piece(m.src.len, at.cut);
        slot.slice(offset, len).copy_from(run.buffers.at(m.src, run.shift).slice(start, len));
        offset += aligned(len);
    }
    ring.publish(segment, |head: &mut SlotHead| head.call = run.call);
}

/// Publishes an exchange that consists of `words`; its slot is free.
fn publish_words(run: &PhaseRun, words: &[u8], segment: &Segment, ring: &mut Ring) {
    ring.publish(segment, |head: &mut SlotHead| {
        head.call = run.call;
        head.inline[..words.len()].copy_from_slice(words);
    });
}

fn slot_of(segment: &Segment, ring: &Ring, rank: usize, exchange: u64, inline: bool) -> Region {
    let index = ring.index(exchange);
    if inline { segment.inline(rank, index) } else { segment.data(ring.area(rank, exchange), index) }
}

/// One poll's work on one exchange.
struct Work<'a> {
    me: usize,
    ranks: &'a [u32],
    run: &'a PhaseRun,
    segment: &'a Segment,
    ring: &'a mut Ring,
    sources: &'a mut Vec<Region>,
    /// Of a call on shared memory: every rank's data, by local rank.
    peers: &'a [Region],
    /// Of a phase that takes its peers' data out of their private memory.
    single_copy: Option<&'a mut SingleCopy>,
    budget: usize,
    moved: bool,
}

/// How far a piece was taken.
enum Taken {
    All,
    /// Until the budget ended.
    Some,
    /// It cannot be had: the phase starts again, through slots.
    Failed,
}

/// What a call on shared memory works with besides.
struct Sharing<'a> {
    own: Place,
    entered: &'a Entered,
    direct: &'a mut Direct,
}

impl<'a> Work<'a> {
    fn new(
        me: usize,
        ranks: &'a [u32],
        run: &'a PhaseRun,
        segment: &'a Segment,
        ring: &'a mut Ring,
        sources: &'a mut Vec<Region>,
        budget: usize,
    ) -> Work<'a> {
        Work { me, ranks, run, segment, ring, sources, peers: &[], single_copy: None, budget, moved: false }
    }

    /// As [`consume`](Self::consume), of a call on shared memory.
    fn share(&mut self, at: &mut Consuming, sharing: Sharing<'a>) -> Result<Option<Step>> {
        let Sharing { own, entered, direct } = sharing;
        if let Some(peer) = self.missing(Who::All, at)? {
            return Ok(Some(Step::Blocked(peer)));
        }
        if at.cut > 0 {
            return Ok(None);
        }
        let moves = moves_of(self.run);
        while direct.known() < self.ranks.len() {
            let rank = direct.known();
            let theirs = if rank == self.me { own } else { self.words_of(rank) };
            if !direct.learn(entered, theirs, own, extent(moves, self.run.shift, rank)) {
                let at = |place: Place| format!("{} number {}", self.run.call, place.number);
                return Err(disagree(at(own), self.ranks[rank], at(theirs)));
            }
        }
        if let [m] = moves
            && m.src == m.dst
        {
            let over = direct.work(self.run.arith, m, self.run.shift, self.me, self.budget);
            return Ok(if over { None } else { Some(Step::Moved) });
        }
        self.peers = direct.data();
        self.consume(at)
    }

    /// As [`consume`](Self::consume), of a phase that takes its peers' data out of their private memory.
    fn copy_once(&mut self, at: &mut Consuming, copy: &'a mut SingleCopy) -> Result<Option<Step>> {
        if let Some(peer) = self.missing(Who::All, at)? {
            return Ok(Some(Step::Blocked(peer)));
        }
        let peers = (0..self.ranks.len()).filter(|&rank| rank != self.me);
        if at.cut > 0 {
            let failed = |rank: usize| self.words_of::<u8>(rank) != 0;
            copy.hear(peers.into_iter().any(failed));
            return Ok(None);
        }
        while copy.known() < self.ranks.len() {
            copy.learn(self.words_of(copy.known()));
        }
        if copy.has_failed() {
            return Ok(None);
        }
        self.single_copy = Some(copy);
        self.consume(at)
    }

    /// What `rank` says in its slot's head.
    fn words_of<T: bytemuck::AnyBitPattern>(&self, rank: usize) -> T {
        let index = self.ring.index(self.ring.consumed());
        self.segment
            .slot(rank, index)
            .read(|head| bytemuck::pod_read_unaligned(&head.inline[..size_of::<T>()]))
    }

    /// `None` when the exchange is complete.
    fn consume(&mut self, at: &mut Consuming) -> Result<Option<Step>> {
        let moves = moves_of(self.run);
        while at.next < at.group.end {
            let m = &moves[at.next];
            let (start, len) = at.group.piece(m.src.len, at.cut);
            if includes(m.to, self.me) {
                if let Some(peer) = self.missing(m.from, at)? {
                    return Ok(Some(if self.moved { Step::Moved } else { Step::Blocked(peer) }));
                }
                match self.take(m, start, len, at) {
                    Taken::All => {}
                    Taken::Some => return Ok(Some(Step::Moved)),
                    Taken::Failed => return Ok(None),
                }
            }
            at.step_over(m, len);
        }
        Ok(None)
    }

    /// A rank among `from` that has not published this exchange. Compares calls with those that have.
    fn missing(&mut self, from: Who, at: &mut Consuming) -> Result<Option<usize>> {
        let peers = match from {
            Who::One(one) => one as usize..one as usize + 1,
            Who::All => 0..self.ranks.len(),
        };
        for peer in peers {
            if peer == self.me || at.arrived.has(peer) {
                continue;
            }
            if !self.ring.is_ready(self.segment, peer) {
                return Ok(Some(peer));
            }
            let index = self.ring.index(self.ring.consumed());
            let theirs = self.segment.slot(peer, index).read(|head| head.call);
            if theirs != self.run.call {
                return Err(mismatch(&self.run.call, self.ranks[peer], &theirs));
            }
            at.arrived.set(peer);
        }
        Ok(None)
    }

    /// Copies or combines the rest of a piece, as far as the budget goes.
    fn take(&mut self, m: &Move, start: usize, len: usize, at: &mut Consuming) -> Taken {
        let reads = match m.from {
            Who::One(_) => 1,
            Who::All => self.ranks.len(),
        };
        while at.done < len {
            if self.budget == 0 {
                return Taken::Some;
            }
            let left = len - at.done;
            let n = if left.saturating_mul(reads) <= self.budget {
                left
            } else {
                left.min((self.budget / reads).max(4096) & !63)
            };
            let dst = self.run.buffers.at(m.dst, self.run.shift).slice(start + at.done, n);
            match m.from {
                Who::One(from) => match &mut self.single_copy {
                    Some(copy) if from as usize != self.me => {
                        if !copy.read(from as usize, m.src, self.run.shift, at.done, dst) {
                            return Taken::Failed;
                        }
                    }
                    _ => dst.copy_from(self.source(from as usize, m, start, n, at)),
                },
                Who::All => {
                    self.sources.clear();
                    for rank in 0..self.ranks.len() {
                        let source = self.source(rank, m, start, n, at);
                        self.sources.push(source);
                    }
                    combine(self.run.arith, m.finish, dst, self.sources);
                }
            }
            at.done += n;
            self.budget = self.budget.saturating_sub(n * reads);
            self.moved = true;
        }
        Taken::All
    }

    /// The next `n` bytes of `rank`'s piece: in its slot, or where they are if this rank sees them there.
    fn source(&self, rank: usize, m: &Move, start: usize, n: usize, at: &Consuming) -> Region {
        if rank == self.me {
            return self.run.buffers.at(m.src, self.run.shift).slice(start + at.done, n);
        }
        if let Some(data) = self.peers.get(rank) {
            return data.slice(m.src.off + self.run.shift + at.done, n);
        }
        let exchange = self.ring.consumed();
        slot_of(self.segment, self.ring, rank, exchange, at.group.inline).slice(at.offset(rank) + at.done, n)
    }
}

/// Bytes of `rank`'s data, from its beginning, that others may touch.
fn extent(moves: &[Move], shift: usize, rank: usize) -> usize {
    let theirs = moves.iter().filter(|m| includes(m.from, rank) || m.src == m.dst);
    theirs.map(|m| shift + m.src.off + m.src.len).max().unwrap_or(0)
}

pub(crate) fn mismatch(ours: &PackedCall, peer: u32, theirs: &PackedCall) -> Error {
    disagree(ours.to_string(), peer, theirs.to_string())
}

fn disagree(ours: String, peer: u32, theirs: String) -> Error {
    Error::Mismatch { site: Site::unknown(), ours, peer: peer as usize, theirs }
}

/// Whether a phase can run as it is: so that nothing later panics on a broken plan.
fn check(run: &PhaseRun, me: usize, size: usize) -> Result<()> {
    let wrong = |what: String| Err(Error::Internal(format!("phase {} of {}: {what}", run.step, run.call)));
    let Some(Op::Phase(moves)) = run.plan.steps.get(run.step as usize).map(|s| &s.op) else {
        return wrong("the plan has no such phase".to_owned());
    };
    let known = |who: Who| matches!(who, Who::All) || matches!(who, Who::One(one) if (one as usize) < size);
    let inside = |span: Span| {
        let (region, shift) = match span.buf {
            Buf::Input => (run.buffers.input, run.shift),
            Buf::Output => (run.buffers.output, run.shift),
            Buf::Scratch => (run.buffers.scratch, 0),
        };
        let end = span.off.checked_add(shift).and_then(|at| at.checked_add(span.len));
        end.is_some_and(|end| end <= region.len())
    };
    for m in moves {
        if !known(m.from) || !known(m.to) {
            return wrong(format!("{m:?} names a rank beyond the node's {size}"));
        }
        if m.src.len != m.dst.len || (m.from == Who::All && !whole(run.arith, m.src.len)) {
            return wrong(format!("{m:?} does not fit its lengths or {}", run.arith.dtype));
        }
        if includes(m.from, me) && !inside(m.src) || includes(m.to, me) && !inside(m.dst) {
            return wrong(format!("{m:?} reaches outside its buffer, shifted by {}", run.shift));
        }
    }
    Ok(())
}

fn whole(arith: Arith, len: usize) -> bool {
    len.is_multiple_of(arith.dtype.size())
}
