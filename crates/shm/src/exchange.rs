//! One exchange: what this rank puts into its slot, and what it takes from the others'.

use smddp_core::call::PackedCall;
use smddp_core::error::Site;
use smddp_core::memory::settle;
use smddp_core::plan::{Move, Op, Who};
use smddp_core::reduce::{Pass, Store, combine_and};
use smddp_core::shared::Place;
use smddp_core::transport::PhaseRun;
use smddp_core::{Error, Region, Result};

use crate::cut::{Group, aligned, includes, travels};
use crate::direct::{Direct, Entered};
use crate::geometry::Geometry;
use crate::layout::{Memory, SlotHead};
use crate::mask::Mask;
use crate::pen::Pen;
use crate::relay::Relay;
use crate::ring::{Area, Ring};
use crate::segment::Segment;
use crate::single_copy::{Part, SingleCopy, Way};
use crate::theirs::Theirs;

/// What came of an attempt to make progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// There is nothing to do here.
    Idle,
    /// This local rank has to move first.
    Blocked(usize),
    Moved,
}

/// The moves of a phase that was checked when it was submitted.
pub(crate) fn moves_of(run: &PhaseRun) -> &[Move] {
    match run.plan.steps.get(run.step as usize).map(|s| &s.op) {
        Some(Op::Phase(moves)) => moves,
        _ => &[],
    }
}

/// The next exchange to publish.
#[derive(Default)]
pub(crate) struct Publishing {
    /// Index into the queue.
    pub(crate) run: usize,
    pub(crate) group: Group,
    pub(crate) cut: usize,
}

/// The exchange being consumed, and how far.
pub(crate) struct Consuming {
    pub(crate) group: Group,
    pub(crate) cut: usize,
    /// The next move, and how many bytes of its piece are done.
    next: usize,
    done: usize,
    /// Where the next piece lies in rank `w`'s slot: `base + beyond[w]`.
    base: isize,
    beyond: Vec<isize>,
    /// Peers whose heads were seen and compared in this exchange.
    arrived: Mask,
}

impl Consuming {
    pub(crate) fn new(size: usize) -> Consuming {
        Consuming {
            group: Group::default(),
            cut: 0,
            next: 0,
            done: 0,
            base: 0,
            beyond: vec![0; size],
            arrived: Mask::default(),
        }
    }

    pub(crate) fn start(&mut self, group: Group, cut: usize) {
        self.group = group;
        self.cut = cut;
        self.next = group.start;
        self.done = 0;
        self.base = 0;
        self.beyond.fill(0);
        self.arrived = Mask::default();
    }

    /// At move `next` of a phase that is one exchange; what comes before is done.
    pub(crate) fn start_at(&mut self, next: usize, group: Group, moves: &[Move]) {
        self.start(group, 0);
        moves[..next].iter().for_each(|m| self.step_over(m, m.src.len));
    }

    /// Offset in `rank`'s slot of the next piece.
    pub(crate) fn offset(&self, rank: usize) -> usize {
        (self.base + self.beyond[rank]) as usize
    }

    /// Steps over `m`, whose piece of this cut has `len` bytes.
    pub(crate) fn step_over(&mut self, m: &Move, len: usize) {
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
        self.step_to(self.next + 1);
    }

    fn step_to(&mut self, next: usize) {
        self.next = next;
        self.done = 0;
    }
}

/// Publishes what this rank gives in the exchange `at`; its slot is free.
pub(crate) fn fill_slot(
    me: usize,
    run: &PhaseRun,
    at: &Publishing,
    segment: &Segment,
    ring: &mut Ring,
    pen: &mut Pen,
) {
    let areas = at.group.takes_areas();
    let slot = slot_to_fill(me, areas, at.group.part, segment, ring);
    let mut offset = 0;
    for m in moves_of(run)[at.group.start..at.group.end].iter().filter(|m| travels(m, me)) {
        let (start, len) = at.group.piece(m.src.len, at.cut);
        let (place, piece) = (slot.slice(offset, len), run.buffers.at(m.src, run.shift).slice(start, len));
        pen.write(place, piece, at.group.is_dear_to_write());
        offset += aligned(len);
    }
    ring.publish(segment, areas, |head: &mut SlotHead| head.call = run.call);
}

/// Publishes the gather `exchange` of a relay; its slot is free.
pub(crate) fn fill_gather(
    me: usize,
    run: &PhaseRun,
    at: &Publishing,
    relay: &Relay,
    segment: &Segment,
    ring: &mut Ring,
    pen: &mut Pen,
) {
    let Some(m) = moves_of(run).first() else { return };
    let (slot, data) =
        (slot_to_fill(me, true, at.group.part, segment, ring), run.buffers.at(m.src, run.shift));
    for rank in at.group.reads.iter() {
        let (start, len) = relay.share(at.cut, rank);
        let (place, piece) = (slot.slice(relay.offset(at.cut, me, rank), len), data.slice(start, len));
        pen.write(place, piece, at.group.is_dear_to_write());
    }
    ring.publish(segment, true, |head: &mut SlotHead| head.call = run.call);
}

/// Publishes an exchange that consists of `words`; its slot is free.
pub(crate) fn publish_words(run: &PhaseRun, words: &[u8], segment: &Segment, ring: &mut Ring) {
    ring.publish(segment, false, |head: &mut SlotHead| {
        head.call = run.call;
        head.inline[..words.len()].copy_from_slice(words);
    });
}

/// Behind the last exchange of `group`, in which rank `me` gave without reading: the lines of all its areas have gone to its
/// readers' caches. Those that the next such group fills are called back now, when nobody waits for that; not where readers
/// are behind, who would wait for these lines' way meanwhile.
pub(crate) fn call_back_lines(me: usize, group: &Group, segment: &Segment, ring: &mut Ring) {
    if !group.writes || !group.reads.is_empty() || !group.takes_areas() {
        return;
    }
    let (cuts, geometry) = (group.cuts as u64, segment.layout().geometry);
    if cuts <= geometry.slots as u64 / 2 && ring.is_consumed_but_for(cuts, segment) {
        let len = group.most.div_ceil(group.cuts).min(geometry.slot);
        (0..cuts).for_each(|ahead| {
            area(segment, ring.area_to_fill(me, ahead), group.part).slice(0, len).fetch_for_writing()
        });
    }
}

/// Where `me` puts its pieces of the exchange to publish next: into an area, or into its slot's head.
#[inline]
pub(crate) fn slot_to_fill(me: usize, areas: bool, part: usize, segment: &Segment, ring: &Ring) -> Region {
    if areas {
        area(segment, ring.area_to_fill(me, 0), part)
    } else {
        segment.inline(me, ring.index_to_fill())
    }
}

/// Where `rank` has its pieces of the exchange to consume next.
#[inline]
pub(crate) fn slot_to_read(rank: usize, areas: bool, part: usize, segment: &Segment, ring: &Ring) -> Region {
    if areas {
        area(segment, ring.area_to_read(rank), part)
    } else {
        segment.inline(rank, ring.index_to_read())
    }
}

/// Whether `peer` has published the exchange to consume next.
///
/// # Errors
/// [`Error::Mismatch`]: as part of another call.
#[inline]
pub(crate) fn has_come(
    peer: usize,
    run: &PhaseRun,
    ranks: &[u32],
    segment: &Segment,
    ring: &mut Ring,
) -> Result<bool> {
    let Some(head) = ring.ready(segment, peer) else { return Ok(false) };
    let words = |call: &PackedCall| -> [u64; 2] { bytemuck::cast(*call) };
    if head.read(|head| words(&head.call) == words(&run.call)) {
        return Ok(true);
    }
    Err(mismatch(&run.call, ranks[peer], &head.read(|head| head.call)))
}

/// Where in an area the data of an exchange lies: in a part of `part` bytes, another one with each use.
///
/// Areas larger than usual are chosen where memory that was written, and read by a peer, is faster to write again once it has
/// left both second caches (docs/adr/0021); small exchanges would keep to their areas' beginnings, and those never leave.
/// Two ranks that both give write what they read last: that is to stay in the cache, and `part` is 0.
#[inline]
fn area(segment: &Segment, at: Area, part: usize) -> Region {
    let data = segment.data(at.rank, at.index);
    let parts = data.len().checked_div(part).unwrap_or(0);
    if parts < 2 || data.len() <= Geometry::USUAL.slot {
        return data;
    }
    data.slice(at.uses as usize % parts * part, part)
}

/// Bytes of each rank that are combined before their lines are handed back.
const COMBINED_AT_ONCE: usize = 16 << 10;

/// One poll's work on one exchange.
pub(crate) struct Work<'a> {
    me: usize,
    ranks: &'a [u32],
    run: &'a PhaseRun,
    segment: &'a Segment,
    ring: &'a mut Ring,
    sources: &'a mut Vec<Region>,
    /// Of a call on shared memory: every rank's data, by local rank.
    peers: &'a [Region],
    budget: usize,
    /// What of that which is taken is stored past the caches; and bytes that were, so far.
    past_caches: PastCaches,
    streamed: Option<&'a mut u64>,
    moved: bool,
}

/// Which results are stored past the caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PastCaches {
    None,
    /// What a rank gives to itself.
    Own,
    All,
}

/// What a call on shared memory works with besides.
pub(crate) struct Sharing<'a> {
    pub(crate) own: Place,
    pub(crate) entered: &'a Entered,
    pub(crate) direct: &'a mut Direct,
}

impl<'a> Work<'a> {
    pub(crate) fn new(
        me: usize,
        ranks: &'a [u32],
        run: &'a PhaseRun,
        segment: &'a Segment,
        ring: &'a mut Ring,
        sources: &'a mut Vec<Region>,
        budget: usize,
    ) -> Work<'a> {
        Work {
            me,
            ranks,
            run,
            segment,
            ring,
            sources,
            peers: &[],
            budget,
            past_caches: PastCaches::None,
            streamed: None,
            moved: false,
        }
    }

    /// Stores some results past the caches, and counts them.
    pub(crate) fn streaming(self, past_caches: PastCaches, streamed: &'a mut u64) -> Work<'a> {
        Work { past_caches, streamed: Some(streamed), ..self }
    }

    /// As [`consume`](Self::consume), of a call on shared memory.
    pub(crate) fn share(&mut self, at: &mut Consuming, sharing: Sharing<'a>) -> Result<Option<Step>> {
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
            let over =
                direct.work(self.run.arith, self.segment.far(), m, self.run.shift, self.me, self.budget);
            return Ok(if over { None } else { Some(Step::Moved) });
        }
        self.peers = direct.data();
        self.consume(at)
    }

    /// As [`consume`](Self::consume), of a phase that takes its peers' data out of their private memory.
    pub(crate) fn copy_once(&mut self, at: &mut Consuming, copy: &mut SingleCopy) -> Result<Option<Step>> {
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
        if at.next == 0 && at.done == 0 {
            copy.share_out(self.run, moves_of(self.run), self.me);
        }
        self.copy_parts(at, copy)
    }

    fn copy_parts(&mut self, at: &mut Consuming, copy: &mut SingleCopy) -> Result<Option<Step>> {
        while let Some(part) = copy.part(at.next) {
            while at.done < part.len {
                if self.budget == 0 {
                    return Ok(Some(Step::Moved));
                }
                let n = (part.len - at.done).min(self.budget);
                if !self.copy_some(part, part.start + at.done, n, copy) {
                    return Ok(None);
                }
                at.done += n;
                self.budget -= n;
                self.moved = true;
            }
            at.step_to(at.next + 1);
        }
        Ok(None)
    }

    /// Copies `n` bytes of a part, from byte `start` of its block on. Whether it could.
    fn copy_some(&mut self, part: Part, start: usize, n: usize, copy: &mut SingleCopy) -> bool {
        let (m, shift) = (&moves_of(self.run)[part.index], self.run.shift);
        let here = |span| self.run.buffers.at(span, shift).slice(start, n);
        match part.way {
            Way::Own => {
                let stored_past =
                    copy_within(here(m.dst), here(m.src), self.past_caches != PastCaches::None, None);
                if let Some(streamed) = &mut self.streamed {
                    **streamed += stored_past as u64;
                }
                true
            }
            Way::From(peer) => copy.read(peer, m.src, shift, start, here(m.dst)),
            Way::To(peer) => copy.write(peer, m.dst, shift, start, here(m.src), self.segment),
        }
    }

    /// As [`consume`](Self::consume), of a relay. A gather ends with its spread published.
    pub(crate) fn relay(&mut self, at: &mut Consuming, relay: &Relay) -> Result<Option<Step>> {
        let Some(m) = moves_of(self.run).first() else { return Ok(None) };
        if Relay::is_gather(at.cut) { self.sum_up(m, at, relay) } else { self.collect(m, at, relay) }
    }

    /// Combines this rank's share.
    fn sum_up(&mut self, m: &Move, at: &mut Consuming, relay: &Relay) -> Result<Option<Step>> {
        if let Some(peer) = self.missing(Who::All, at)?.or_else(|| self.ring.in_the_way(self.segment)) {
            return Ok(Some(Step::Blocked(peer)));
        }
        let slot = slot_to_fill(self.me, true, at.group.part, self.segment, self.ring);
        let [src, dst] = [m.src, m.dst].map(|span| self.run.buffers.at(span, self.run.shift));
        let (start, len) = relay.share(at.cut, self.me);
        while at.done < len {
            if self.budget == 0 {
                return Ok(Some(Step::Moved));
            }
            let n = (len - at.done).min((self.budget / self.ranks.len()).max(4096) & !63);
            self.sources.clear();
            for rank in 0..self.ranks.len() {
                let source = if rank == self.me {
                    src.slice(start + at.done, n)
                } else {
                    let slot = slot_to_read(rank, true, at.group.part, self.segment, self.ring);
                    slot.slice(relay.offset(at.cut, rank, self.me) + at.done, n)
                };
                self.sources.push(source);
            }
            let order = Theirs::within(self.segment, false).order(n);
            let pass = Pass { store: Store::Twice(slot.slice(at.done, n)), order };
            combine_and(pass, self.run.arith, m.finish, dst.slice(start + at.done, n), self.sources);
            at.done += n;
            self.budget = self.budget.saturating_sub(n * self.ranks.len());
        }
        self.ring.publish(self.segment, true, |head: &mut SlotHead| head.call = self.run.call);
        Ok(None)
    }

    /// Copies what the others' shares came to.
    fn collect(&mut self, m: &Move, at: &mut Consuming, relay: &Relay) -> Result<Option<Step>> {
        let dst = self.run.buffers.at(m.dst, self.run.shift);
        while at.next < self.ranks.len() {
            if at.next != self.me {
                if let Some(peer) = self.missing(Who::One(at.next as u32), at)? {
                    return Ok(Some(if self.moved { Step::Moved } else { Step::Blocked(peer) }));
                }
                if self.budget == 0 {
                    return Ok(Some(Step::Moved));
                }
                let (start, len) = relay.share(at.cut, at.next);
                let slot = slot_to_read(at.next, true, at.group.part, self.segment, self.ring);
                Theirs::within(self.segment, false).copy(dst.slice(start, len), slot.slice(0, len));
                self.budget = self.budget.saturating_sub(len);
                self.moved = true;
            }
            at.next += 1;
        }
        Ok(None)
    }

    /// What `rank` says in its slot's head.
    fn words_of<T: bytemuck::AnyBitPattern>(&self, rank: usize) -> T {
        let index = self.ring.index_to_read();
        self.segment
            .slot(rank, index)
            .read(|head| bytemuck::pod_read_unaligned(&head.inline[..size_of::<T>()]))
    }

    /// `None` when the exchange is complete.
    pub(crate) fn consume(&mut self, at: &mut Consuming) -> Result<Option<Step>> {
        let moves = moves_of(self.run);
        while at.next < at.group.end {
            let m = &moves[at.next];
            let (start, len) = at.group.piece(m.src.len, at.cut);
            if includes(m.to, self.me) {
                if let Some(peer) = self.missing(m.from, at)? {
                    return Ok(Some(if self.moved { Step::Moved } else { Step::Blocked(peer) }));
                }
                if !self.take(m, start, len, at) {
                    return Ok(Some(Step::Moved));
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
            if !has_come(peer, self.run, self.ranks, self.segment, self.ring)? {
                return Ok(Some(peer));
            }
            at.arrived.set(peer);
        }
        Ok(None)
    }

    /// Copies or combines the rest of a piece, as far as the budget goes. Whether that is all of it.
    fn take(&mut self, m: &Move, start: usize, len: usize, at: &mut Consuming) -> bool {
        let reads = match m.from {
            Who::One(_) => 1,
            Who::All => self.ranks.len(),
        };
        let streams = match self.past_caches {
            PastCaches::None => false,
            PastCaches::Own => m.from == Who::One(self.me as u32),
            PastCaches::All => true,
        };
        let theirs = Theirs::within(self.segment, at.group.hands_back);
        while at.done < len {
            if self.budget == 0 {
                return false;
            }
            let left = len - at.done;
            let n = match m.from {
                // What was combined goes back while it is still in the first cache.
                Who::All if at.group.hands_back => left.min(COMBINED_AT_ONCE),
                _ if left.saturating_mul(reads) <= self.budget => left,
                _ => left.min((self.budget / reads).max(4096) & !63),
            };
            let dst = self.run.buffers.at(m.dst, self.run.shift).slice(start + at.done, n);
            let stored_past = match m.from {
                Who::One(from) => {
                    let source = self.source(from as usize, m, start, n, at);
                    let is_own = from as usize == self.me;
                    copy_within(dst, source, streams, (!is_own).then_some(theirs))
                }
                Who::All => {
                    self.sources.clear();
                    for rank in 0..self.ranks.len() {
                        let source = self.source(rank, m, start, n, at);
                        self.sources.push(source);
                    }
                    let store = if streams { Store::PastCaches } else { Store::Cached };
                    combine_and(
                        Pass { store, order: theirs.order(n) },
                        self.run.arith,
                        m.finish,
                        dst,
                        self.sources,
                    );
                    if at.group.hands_back {
                        hand_back(self.me, self.sources);
                    }
                    if streams { n } else { 0 }
                }
            };
            at.done += n;
            if let Some(streamed) = &mut self.streamed {
                **streamed += stored_past as u64;
            }
            self.budget = self.budget.saturating_sub(n * reads);
            self.moved = true;
        }
        true
    }

    /// The next `n` bytes of `rank`'s piece: in its slot, or where they are if this rank sees them there.
    fn source(&self, rank: usize, m: &Move, start: usize, n: usize, at: &Consuming) -> Region {
        if rank == self.me {
            return self.run.buffers.at(m.src, self.run.shift).slice(start + at.done, n);
        }
        if let Some(data) = self.peers.get(rank) {
            return data.slice(m.src.off + self.run.shift + at.done, n);
        }
        let slot = slot_to_read(rank, at.group.takes_areas(), at.group.part, self.segment, self.ring);
        slot.slice(at.offset(rank) + at.done, n)
    }
}

/// Copies `source`, which is a peer's or this rank's own, to `dst`, past the caches where it `streams`; bytes that went past them.
fn copy_within(dst: Region, source: Region, streams: bool, theirs: Option<Theirs>) -> usize {
    if source.as_ptr() == dst.as_ptr() {
        // It is there already.
        return 0;
    }
    if streams {
        dst.stream_from(source);
        settle();
        if theirs.is_some_and(|theirs| theirs.hands_back) {
            source.claim();
        }
        return dst.len();
    }
    match theirs {
        Some(theirs) => theirs.copy(dst, source),
        None => dst.copy_from(source),
    }
    0
}

/// Hands the lines of its peers' pieces back, which rank `me` has combined and is the only one to read. `sources` are all
/// ranks' pieces.
#[inline]
pub(crate) fn hand_back(me: usize, sources: &[Region]) {
    for (rank, source) in sources.iter().enumerate() {
        if rank != me {
            source.claim();
        }
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
