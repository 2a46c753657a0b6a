//! Runs the queue of phases as exchanges over the ring: what to copy where, and when a phase is done.
//!
//! Two places walk over the queue: *publishing* copies this rank's pieces into its slots, up to a ring ahead, also
//! of phases behind the first; *consuming* always works on the first phase. Both see the same moves, groups and cuts as
//! every other rank (`cut`), so they know without asking what lies where in whose slot.

use std::collections::VecDeque;
use std::sync::Arc;

use smddp_core::call::{Collective, PackedCall};
use smddp_core::plan::{Buf, Op, Plan, Span, Who, source_of};
use smddp_core::shared::Place;
use smddp_core::transport::{Arith, Ctx, PhaseRun};
use smddp_core::{Error, Region, Result};

use crate::cut::{Cutter, Group, includes};
use crate::direct::{self, Direct, Entered};
use crate::exchange::{
    Consuming, PastCaches, Publishing, Sharing, Step, Work, call_back_lines, fill_gather, fill_slot,
    mismatch, moves_of, publish_words,
};
use crate::log;
use crate::pen::Pen;
use crate::reach::AT_ONCE;
use crate::relay::Relay;
use crate::ring::Ring;
use crate::script::{Playing, Script, SoFar};
use crate::segment::Segment;
use crate::single_copy::{self, SingleCopy};

struct Run {
    run: PhaseRun,
    first: Group,
    way: Way,
}

/// How a phase's data reaches its ranks.
#[derive(Clone, Copy, Default, PartialEq)]
enum Way {
    #[default]
    Slots,
    /// From memory that the ranks share, where it lies here (`direct`).
    Shared(Place),
    /// From the ranks' private memory (`single_copy`).
    SingleCopy,
    /// Through slots, summed up share by share (`relay`).
    Relay(Relay),
}

/// A phase that was found sound, and how it begins: the same call is often made again.
#[derive(Default)]
struct Known {
    plan: Option<Arc<Plan>>,
    step: u32,
    shift: usize,
    lens: [usize; 3],
    first: Group,
    way: Way,
    script: Script,
}

impl Known {
    #[inline]
    fn is(&self, run: &PhaseRun) -> bool {
        self.plan.as_ref().is_some_and(|plan| Arc::ptr_eq(plan, &run.plan))
            && (self.step, self.shift, self.lens) == (run.step, run.shift, lens(run))
    }
}

/// A rank's own blocks need so much less of results: what is read for them lies in no slot, and stays in the caches no longer.
const OWN_SHARE: usize = 2;

/// Unless results stay in the caches up to more than this: so large a cache has room for both (docs/adr/0033).
const CROWDED: usize = 32 << 20;

/// From how many bytes of results on a rank's own blocks are stored past the caches, if all are from so many on.
fn own_from(streams_from: usize) -> usize {
    if streams_from <= CROWDED { streams_from.div_ceil(OWN_SHARE) } else { streams_from }
}

/// Which results of a phase among so many ranks are stored past the caches, if all are from so many bytes on.
fn past_caches(run: &PhaseRun, group: &Group, ranks: usize, streams_from: usize) -> PastCaches {
    let results = run.buffers.output.len().saturating_mul(group.takers(ranks));
    if results < own_from(streams_from) || !is_written_only(run) {
        PastCaches::None
    } else if results < streams_from {
        PastCaches::Own
    } else {
        PastCaches::All
    }
}

/// Whether the ranks that take do not read, in the same call, the memory that they write to.
fn is_written_only(run: &PhaseRun) -> bool {
    let call = run.call.unpack();
    call.is_some_and(|call| !matches!(call.collective, Collective::AllReduce | Collective::Reduce))
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

/// A phase that is to be over before anything is queued.
#[derive(Clone, Copy)]
pub(crate) struct TakenUp {
    pub(crate) number: u64,
    /// Its place among those known.
    place: usize,
}

pub(crate) struct Phases {
    me: usize,
    /// Group rank of each local rank.
    ranks: Vec<u32>,
    /// Bytes one poll may copy.
    budget: usize,
    pen: Pen,
    /// Results of so many bytes, of all ranks together, are stored past the caches.
    streams_from: usize,
    /// Bytes that were.
    streamed: u64,
    cutter: Cutter,
    queue: VecDeque<Run>,
    publishing: Publishing,
    consuming: Consuming,
    sources: Vec<Region>,
    submitted: u64,
    known: [Known; KNOWN],
    entered: Entered,
    direct: Direct,
    single_copy: SingleCopy,
}

impl Phases {
    pub(crate) fn new(
        me: usize,
        ranks: Vec<u32>,
        slot_bytes: usize,
        streams_from: usize,
        single_copy: SingleCopy,
        hands_back: bool,
    ) -> Phases {
        let size = ranks.len();
        Phases {
            me,
            budget: slot_bytes.max(64 << 10),
            pen: Pen::new(streams_from < usize::MAX),
            streams_from,
            streamed: 0,
            cutter: Cutter::new(me, size, slot_bytes, hands_back),
            queue: VecDeque::with_capacity(64),
            publishing: Publishing::default(),
            consuming: Consuming::new(size),
            sources: Vec::with_capacity(size),
            submitted: 0,
            known: std::array::from_fn(|_| Known::default()),
            entered: Entered::default(),
            direct: Direct::default(),
            single_copy,
            ranks,
        }
    }

    /// Changes how phases are cut that are not known yet.
    pub(crate) fn hand_back(&mut self, hands_back: bool) {
        self.cutter.hands_back = hands_back;
    }

    /// The memory that the ranks share.
    pub(crate) fn entered(&mut self) -> &mut Entered {
        &mut self.entered
    }

    /// Bytes of results that were stored past the caches.
    pub(crate) fn streamed(&self) -> u64 {
        self.streamed
    }

    pub(crate) fn single_copy(&self) -> &SingleCopy {
        &self.single_copy
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Number of the first unfinished phase, and its call.
    pub(crate) fn oldest(&self) -> Option<(u64, &PhaseRun)> {
        let first = self.queue.front()?;
        Some((self.submitted - self.queue.len() as u64, &first.run))
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
            None => {
                let known = &self.known[self.beginning(&run)?];
                (known.first, known.way)
            }
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

    /// Where a phase is known that lies in no shared memory; it is checked.
    #[inline(always)]
    fn beginning(&mut self, run: &PhaseRun) -> Result<usize> {
        let place = place_among_known(run);
        if !self.known[place].is(run) {
            self.get_to_know(run, place)?;
        }
        Ok(place)
    }

    #[inline(never)]
    fn get_to_know(&mut self, run: &PhaseRun, place: usize) -> Result<()> {
        check(run, self.me, self.ranks.len())?;
        let known = &mut self.known[place];
        let moves = moves_of(run);
        (known.first, known.way) = if let Some((group, relay)) = self.cutter.relay(moves) {
            (group, Way::Relay(relay))
        } else if self.single_copy.takes(run, moves) {
            (self.cutter.whole(moves, single_copy::EXCHANGES), Way::SingleCopy)
        } else {
            (self.cutter.group(moves, 0), Way::Slots)
        };
        known.plan = Some(Arc::clone(&run.plan));
        (known.step, known.shift, known.lens) = (run.step, run.shift, lens(run));
        known.script.forget();
        Ok(())
    }

    /// Takes up a phase that is to be over before anything is queued. `None` where it is not one exchange through slots, or
    /// not the only work. What follows is to [`play`](Self::play) it, and [`keep`](Self::keep) if it is not over.
    #[inline]
    pub(crate) fn take_up(&mut self, run: &PhaseRun) -> Result<Option<TakenUp>> {
        if !self.queue.is_empty() || run.call.is_shared() {
            return Ok(None);
        }
        let place = self.beginning(run)?;
        let Known { first, way, script, .. } = &mut self.known[place];
        if !script.is_written() {
            let moves = moves_of(run);
            if *way != Way::Slots || first.cuts > 1 || first.end < moves.len() {
                return Ok(None);
            }
            // Nothing is queued, so nothing is being consumed.
            script.write(self.me, self.ranks.len(), moves, first, &mut self.consuming);
        }
        Ok(Some(TakenUp { number: self.count(), place }))
    }

    /// To run the one exchange of a phase that was taken up.
    #[inline]
    pub(crate) fn play<'a>(
        &'a mut self,
        run: &'a PhaseRun,
        up: TakenUp,
        segment: &'a Segment,
    ) -> Playing<'a> {
        let script = &self.known[up.place].script;
        let (me, ranks, sources, pen) = (self.me, &*self.ranks, &mut self.sources, &mut self.pen);
        Playing { me, ranks, script, run, segment, sources, pen, so_far: SoFar::default() }
    }

    /// Behind the one exchange of a phase that was taken up and in which nobody is read, and a fence that follows its
    /// publishing.
    pub(crate) fn end_at_once(
        &self,
        up: TakenUp,
        call: &PackedCall,
        segment: &Segment,
        ring: &mut Ring,
    ) -> Result<()> {
        let group = &self.known[up.place].first;
        self.check_silence(up.number, call, group, ring.consumed() - 1, segment, ring)?;
        call_back_lines(self.me, group, segment, ring);
        Ok(())
    }

    /// Whether `exchange`, the one at hand, of `group`, is part of the same call on every rank, as far as a rank cannot know
    /// that reads no slot: two roots would not notice each other.
    ///
    /// # Errors
    /// [`Error::Mismatch`]: a peer that should give nothing gave something, as part of another call.
    fn check_silence(
        &self,
        number: u64,
        call: &PackedCall,
        group: &Group,
        exchange: u64,
        segment: &Segment,
        ring: &Ring,
    ) -> Result<()> {
        if !group.reads.is_empty() || !call.is_rooted() {
            return Ok(());
        }
        for peer in 0..self.ranks.len() {
            if peer != self.me && !group.givers.has(peer) && ring.has_given(segment, peer, exchange) {
                self.compare_log(number, call, peer, segment)?;
            }
        }
        Ok(())
    }

    /// Whether `peer`'s phase `number` belongs to `call`, if it is still (or already) known.
    pub(crate) fn compare_log(
        &self,
        number: u64,
        call: &PackedCall,
        peer: usize,
        segment: &Segment,
    ) -> Result<()> {
        match log::look(segment, peer, number) {
            Some(theirs) if theirs != *call => Err(mismatch(call, self.ranks[peer], &theirs)),
            _ => Ok(()),
        }
    }

    /// Queues a phase that was taken up, to go on without its script (W2 of `script`).
    pub(crate) fn keep(&mut self, run: PhaseRun, up: TakenUp, so_far: SoFar) {
        let Known { first, script, .. } = &self.known[up.place];
        let (first, moves) = (*first, moves_of(&run));
        self.consuming.start_at(so_far.next_move(script, moves.len()), first, moves);
        let (ahead, group) = if so_far.published { (1, Group::default()) } else { (0, first) };
        self.publishing = Publishing { run: ahead, group, cut: 0 };
        self.queue.push_back(Run { run, first, way: Way::Slots });
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
        // The second exchange waits until this rank's share is done, which consuming the first one is (D2 of `direct`, C2 of
        // `single_copy`). What follows a single copy waits until that is over: it may go on through slots (C1 there).
        let waits = match way {
            Way::Slots => false,
            // A spread is published where its gather is consumed.
            Way::Relay(_) => !Relay::is_gather(at.cut),
            _ => at.cut == at.group.cuts || at.cut > 0 && (at.run > 0 || self.consuming.cut == 0),
        };
        if waits || ring.is_full() {
            return Step::Idle;
        }
        if !at.group.writes {
            ring.skip(at.group.takes_areas());
        } else if let Some(peer) = ring.in_the_way(segment) {
            return Step::Blocked(peer);
        } else {
            match way {
                Way::Relay(relay) => fill_gather(self.me, run, at, relay, segment, ring, &mut self.pen),
                Way::Slots => fill_slot(self.me, run, at, segment, ring, &mut self.pen),
                Way::Shared(place) => publish_words(run, bytemuck::bytes_of(place), segment, ring),
                Way::SingleCopy if at.cut == 0 => {
                    let offer = self.single_copy.offer(run, moves_of(run), self.me, segment);
                    publish_words(run, bytemuck::bytes_of(&offer), segment, ring);
                }
                Way::SingleCopy => {
                    publish_words(run, &[u8::from(self.single_copy.has_failed())], segment, ring);
                }
            }
        }
        self.step_past_published();
        Step::Moved
    }

    /// To the exchange that is published next.
    fn step_past_published(&mut self) {
        let at = &mut self.publishing;
        let Some(Run { run, way, .. }) = self.queue.get(at.run) else { return };
        at.cut += 1;
        if at.cut < at.group.cuts || *way == Way::SingleCopy {
            return;
        }
        at.cut = 0;
        if at.group.end < moves_of(run).len() {
            at.group = self.cutter.group(moves_of(run), at.group.end);
        } else {
            at.run += 1;
            at.group = self.queue.get(at.run).map_or(Group::default(), |next| next.first);
        }
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
        let budget = if *way == Way::SingleCopy { AT_ONCE } else { self.budget };
        let which = past_caches(run, &self.consuming.group, self.ranks.len(), self.streams_from);
        let mut work = Work::new(self.me, &self.ranks, run, segment, ring, &mut self.sources, budget)
            .streaming(which, &mut self.streamed);
        let step = match way {
            Way::Slots => work.consume(&mut self.consuming)?,
            &Way::Shared(own) => {
                let sharing = Sharing { own, entered: &self.entered, direct: &mut self.direct };
                work.share(&mut self.consuming, sharing)?
            }
            Way::SingleCopy => work.copy_once(&mut self.consuming, &mut self.single_copy)?,
            Way::Relay(relay) => work.relay(&mut self.consuming, relay)?,
        };
        if let Some(step) = step {
            return Ok(step);
        }
        let number = self.submitted - self.queue.len() as u64;
        self.check_silence(number, &run.call, &self.consuming.group, ring.consumed(), segment, ring)?;
        let spread = matches!(way, Way::Relay(_)) && Relay::is_gather(self.consuming.cut);
        let again = *way == Way::SingleCopy && self.consuming.cut > 0 && self.single_copy.has_failed();
        if spread {
            self.step_past_published();
        }
        ring.consume(segment, self.consuming.group.takes_areas());
        if again {
            self.start_again();
        } else {
            self.step_on(segment, ring, done);
        }
        Ok(Step::Moved)
    }

    /// The first phase from its beginning, through slots (C1 of `single_copy`).
    fn start_again(&mut self) {
        self.single_copy.forget();
        let Some(Run { run, first, way }) = self.queue.front_mut() else { return };
        (*first, *way) = (self.cutter.group(moves_of(run), 0), Way::Slots);
        self.consuming.start(*first, 0);
        self.publishing = Publishing { run: 0, group: *first, cut: 0 };
    }

    /// To the next exchange; the phase may be over.
    fn step_on(&mut self, segment: &Segment, ring: &mut Ring, done: &mut Vec<Ctx>) {
        let Some(Run { run, way, .. }) = self.queue.front() else { return };
        let (group, cut) = (self.consuming.group, self.consuming.cut + 1);
        if cut < group.cuts {
            self.consuming.start(group, cut);
        } else if group.end < moves_of(run).len() {
            let next = self.cutter.group(moves_of(run), group.end);
            self.consuming.start(next, 0);
        } else {
            done.push(run.ctx);
            call_back_lines(self.me, &group, segment, ring);
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
        let late = self.consuming.group.reads.iter().filter(|&peer| !ring.has_published(segment, peer));
        let late: Vec<_> = late.collect();
        // A relay's gather may wait for its spread's slot.
        if late.is_empty() { ring.all_in_the_way(segment).collect() } else { late }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_blocks_leave_small_caches_earlier() {
        assert_eq!([1, 16 << 20, 32 << 20].map(own_from), [1, 8 << 20, 16 << 20]);
        assert_eq!([64 << 20, usize::MAX].map(own_from), [64 << 20, usize::MAX]);
    }
}
