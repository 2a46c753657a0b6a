//! The lock-free protocols under loom: every interleaving (up to a number of preemptions) of two or three ranks.
//!
//! Each property has a twin in which one ordering or fence is missing and which must fail: that shows that the
//! model can see the mistake, and that the ordering is needed.

use bytemuck::Zeroable;
use loom::sync::Arc;
use loom::thread;
use smddp_core::call::PackedCall;
use smddp_core::transport::MsgKey;

use crate::deal::{Deal, End, Stand};
use crate::door::{self, Why};
use crate::doorbell::{Sleeper, notify};
use crate::layout::{ANYBODY, AbortCell, Alerts, Bell, Control, Frame, Line, Logged, Memory, SlotHead};
use crate::pair::Place;
use crate::ring::{Area, Ring};
use crate::sync::{AtomicU32, AtomicU64, Cell, Futex, MISTAKE, Mistake};
use crate::{abort, log};

const SLOTS: usize = 2;
const CELLS: usize = 2;

/// Shared structures on the heap.
struct Heap {
    alerts: Alerts,
    abort: AbortCell,
    controls: Vec<Control>,
    slots: Vec<Vec<Line<SlotHead>>>,
    /// The data areas of the slots.
    areas: Vec<Vec<Cell<[u8; 2]>>>,
    /// From rank 0 to rank 1.
    cells: Vec<Line<Frame>>,
    /// Of rank 0: whether it is closed, and who is inside.
    door: [AtomicU64; 3],
    /// Of rank 0 with rank 1.
    deal: Deal,
}

impl Heap {
    fn new(size: usize, slots: usize, cells: usize) -> Arc<Heap> {
        let control = |_| Control {
            consumed: AtomicU64::new(0),
            bell: Bell { futex: Futex::new(), hint: AtomicU32::new(0) },
            log: std::array::from_fn(|_| Logged {
                phase: AtomicU64::new(0),
                call: [AtomicU64::new(0), AtomicU64::new(0)],
            }),
        };
        Arc::new(Heap {
            alerts: Alerts { abort: AtomicU32::new(0), sleepers: std::array::from_fn(|_| AtomicU64::new(0)) },
            abort: AbortCell::new(),
            controls: (0..size).map(control).collect(),
            slots: (0..size).map(|_| (0..slots).map(|_| Line::new()).collect()).collect(),
            areas: (0..size).map(|_| (0..slots).map(|_| Cell::new([0; 2])).collect()).collect(),
            cells: (0..cells).map(|_| Line::new()).collect(),
            door: std::array::from_fn(|_| AtomicU64::new(0)),
            deal: Deal::new(),
        })
    }
}

impl Memory for Heap {
    fn alerts(&self) -> &Alerts {
        &self.alerts
    }
    fn abort_text(&self) -> &AbortCell {
        &self.abort
    }
    fn control(&self, rank: usize) -> &Control {
        &self.controls[rank]
    }
    fn slot(&self, rank: usize, index: usize) -> &Line<SlotHead> {
        &self.slots[rank][index]
    }
    fn cell(&self, from: usize, to: usize, index: usize) -> &Line<Frame> {
        assert_eq!((from, to), (0, 1));
        &self.cells[index]
    }
    fn deal(&self, from: usize, to: usize, index: usize) -> &Deal {
        assert_eq!((from, to, index), (0, 1, 0));
        &self.deal
    }
    fn closed(&self, rank: usize) -> &AtomicU64 {
        assert_eq!(rank, 0);
        &self.door[0]
    }
    fn inside(&self, rank: usize, peer: usize) -> &AtomicU64 {
        assert_eq!(rank, 0);
        &self.door[1 + peer]
    }
}

fn explore(preemptions: usize, mistake: Option<Mistake>, body: impl Fn() + Sync + Send + 'static) {
    MISTAKE.set(mistake);
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(preemptions);
    model.check(body);
}

/// What rank `rank` puts into exchange `exchange`.
fn content(rank: usize, exchange: u64) -> [u8; 2] {
    [rank as u8, exchange as u8]
}

/// Who publishes in an exchange, of so many that come in turn.
type Writers = &'static [&'static [usize]];

/// One rank's polls, as `ShmNode` makes them, for phases in which `writers` publish and everybody else reads.
struct Rank {
    me: usize,
    size: usize,
    heap: Arc<Heap>,
    ring: Ring,
    writers: Writers,
    exchanges: u64,
    /// Whether to wake sleepers.
    ringing: bool,
    /// Whether it sleeps several times after one announcement.
    stays_armed: bool,
    /// Every so many exchanges one takes no areas; 0: none.
    small: u64,
}

impl Rank {
    fn new(me: usize, heap: &Arc<Heap>, writers: Writers, exchanges: u64, ringing: bool) -> Rank {
        let size = heap.controls.len();
        let ring = Ring::new(me, size, SLOTS);
        Rank {
            me,
            size,
            heap: Arc::clone(heap),
            ring,
            writers,
            exchanges,
            ringing,
            stays_armed: false,
            small: 0,
        }
    }

    fn writers(&self, exchange: u64) -> &'static [usize] {
        self.writers[exchange as usize % self.writers.len()]
    }

    fn takes_areas(&self, exchange: u64) -> bool {
        self.small == 0 || exchange % self.small != 1
    }

    fn area(&self, at: Area) -> &Cell<[u8; 2]> {
        &self.heap.areas[at.rank][at.index]
    }

    fn is_done(&self) -> bool {
        self.ring.consumed() == self.exchanges
    }

    fn notify(&self) {
        if self.ringing {
            notify(&*self.heap, self.me, self.size);
        }
    }

    /// Publishes the next exchange if it can; `Err` names who is in the way.
    fn publish(&mut self) -> Result<bool, usize> {
        if self.ring.published() == self.exchanges || self.ring.is_full() {
            return Ok(false);
        }
        let exchange = self.ring.published();
        if !self.writers(exchange).contains(&self.me) {
            self.ring.skip(self.takes_areas(exchange));
            return Ok(true);
        }
        if let Some(peer) = self.ring.in_the_way(&*self.heap) {
            return Err(peer);
        }
        let bytes = content(self.me, exchange);
        let areas = self.takes_areas(exchange);
        if areas {
            // SAFETY: what the model is to show (E5); it panics on a race.
            self.area(self.ring.area_to_fill(self.me, 0)).with_mut(|area| unsafe { *area = bytes });
        }
        self.ring.publish(&*self.heap, areas, |head| head.inline[..2].copy_from_slice(&bytes));
        self.notify();
        Ok(true)
    }

    fn consume(&mut self) -> Result<bool, usize> {
        let exchange = self.ring.consumed();
        if exchange == self.ring.published() {
            return Ok(false);
        }
        for &peer in self.writers(exchange).iter().filter(|&&w| w != self.me) {
            if self.ring.ready(&*self.heap, peer).is_none() {
                return Err(peer);
            }
            let slot = self.heap.slot(peer, self.ring.index(exchange));
            let got = slot.read(|head| [head.inline[0], head.inline[1]]);
            assert_eq!(got, content(peer, exchange), "stale or torn data");
            if self.takes_areas(exchange) {
                // SAFETY: as in `publish`.
                let area = self.area(self.ring.area_to_read(peer));
                let got = area.with(|area| unsafe { *area });
                if self.size == 2 {
                    // Its only reader hands the lines back: as if it wrote them.
                    area.with_mut(|area| unsafe { *area = got });
                }
                assert_eq!(got, content(peer, exchange), "another rank's data, or old");
            }
        }
        self.ring.consume(&*self.heap, self.takes_areas(exchange));
        self.notify();
        Ok(true)
    }

    /// One poll: whether anything moved, and who blocks.
    fn poll(&mut self) -> (bool, Vec<usize>) {
        let steps = [self.publish(), self.consume()];
        (steps.contains(&Ok(true)), steps.iter().filter_map(|s| s.err()).collect())
    }

    fn spin(mut self) {
        while !self.is_done() {
            if !self.poll().0 {
                thread::yield_now();
            }
        }
    }

    /// As the engine does when spinning is over.
    fn sleep_between(mut self) {
        let mut sleeper = Sleeper::default();
        while !self.is_done() {
            if self.poll().0 {
                continue;
            }
            if !sleeper.is_armed() {
                sleeper.arm(&*self.heap, self.me);
            }
            let value = self.heap.control(self.me).bell.futex.value();
            if !self.armed_poll(&mut sleeper) {
                self.heap.control(self.me).bell.futex.sleep(value);
            }
            if !self.stays_armed {
                sleeper.disarm(&*self.heap, self.me);
            }
        }
    }

    fn armed_poll(&mut self, sleeper: &mut Sleeper) -> bool {
        loop {
            let (moved, blockers) = self.poll();
            if moved {
                return true;
            }
            let hope = match blockers[..] {
                [one] => Some(one),
                [a, b] if a == b => Some(a),
                _ => None,
            };
            if !sleeper.wait_for(&*self.heap, self.me, hope) {
                return false;
            }
        }
    }
}

fn both_spin(writers: Writers, exchanges: u64) {
    both_spin_with(writers, exchanges, 0);
}

fn both_spin_with(writers: Writers, exchanges: u64, small: u64) {
    let heap = Heap::new(2, SLOTS, 0);
    let rank = |me| Rank { small, ..Rank::new(me, &heap, writers, exchanges, false) };
    let other = rank(1);
    let thread = thread::spawn(move || other.spin());
    rank(0).spin();
    thread.join().unwrap();
}

#[test]
fn slots_carry_every_exchange_both_ways() {
    explore(2, None, || both_spin(&[&[0, 1]], 4));
}

#[test]
fn slots_are_recycled_when_only_one_rank_writes() {
    explore(3, None, || both_spin(&[&[0]], 5));
}

#[test]
fn slots_change_their_areas_whoever_skips() {
    explore(2, None, || both_spin(&[&[0, 1], &[0], &[1]], 5));
}

#[test]
fn areas_go_around_whatever_takes_none() {
    explore(2, None, || both_spin_with(&[&[0, 1], &[0]], 4, 2));
    explore(2, None, || both_spin_with(&[&[0]], 6, 3));
}

/// Two ranks that both take themselves for the root: whether each sees that the other gave something, too.
fn two_roots() {
    let heap = Heap::new(2, SLOTS, 0);
    let root = |me: usize| {
        let heap = Arc::clone(&heap);
        move || {
            let mut ring = Ring::new(me, 2, SLOTS);
            ring.publish(&*heap, true, |head| head.inline[0] = me as u8);
            ring.consume(&*heap, true);
            notify(&*heap, me, 2);
            ring.has_given(&*heap, 1 - me, 0)
        }
    };
    let other = thread::spawn(root(1));
    let saw = root(0)();
    assert!(other.join().unwrap() || saw, "neither root noticed");
}

#[test]
fn of_two_roots_one_sees_the_other() {
    explore(3, None, two_roots);
}

#[test]
#[should_panic(expected = "neither root noticed")]
fn two_roots_that_do_not_fence_are_found() {
    explore(3, Some(Mistake::NoNotifyFence), two_roots);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn a_relaxed_publish_is_found() {
    explore(3, Some(Mistake::RelaxedPublish), || both_spin(&[&[0, 1]], 4));
}

#[test]
#[should_panic(expected = "Causality violation")]
fn a_relaxed_recycle_is_found() {
    explore(3, Some(Mistake::RelaxedRecycle), || both_spin(&[&[0]], 5));
}

fn all_sleep(size: usize, writers: Writers, exchanges: u64) {
    let heap = Heap::new(size, SLOTS, 0);
    let rank = |me| Rank { stays_armed: size > 2, ..Rank::new(me, &heap, writers, exchanges, true) };
    let threads: Vec<_> = (1..size)
        .map(|me| {
            let rank = rank(me);
            thread::spawn(move || rank.sleep_between())
        })
        .collect();
    rank(0).sleep_between();
    for thread in threads {
        thread.join().unwrap();
    }
}

#[test]
fn no_wake_up_is_lost_between_two_ranks() {
    explore(2, None, || all_sleep(2, &[&[0, 1]], 2));
}

#[test]
fn no_wake_up_is_lost_when_a_writer_waits_for_its_slots() {
    explore(2, None, || all_sleep(2, &[&[0]], 3));
}

#[test]
fn no_wake_up_is_lost_when_the_peer_waited_for_changes() {
    explore(2, None, || all_sleep(3, &[&[1, 2]], 1));
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_sleeper_that_does_not_fence_is_found() {
    explore(2, Some(Mistake::NoArmFence), || all_sleep(2, &[&[0, 1]], 2));
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_waker_that_does_not_fence_is_found() {
    explore(2, Some(Mistake::NoNotifyFence), || all_sleep(2, &[&[0, 1]], 2));
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_changed_hint_without_another_look_is_found() {
    explore(2, Some(Mistake::NoSecondLook), || all_sleep(3, &[&[1, 2]], 1));
}

const FRAMES: u32 = 4;

fn frame(number: u32) -> Frame {
    let key = MsgKey { group: 1, seq: u64::from(number), tag: 2 };
    Frame { key, call: PackedCall::zeroed(), total: 0, len: number, offer: 0 }
}

fn frames_pass() {
    let heap = Heap::new(2, 0, CELLS);
    let writer = Arc::clone(&heap);
    let thread = thread::spawn(move || {
        let mut place = Place::default();
        for number in 0..FRAMES {
            let cell = writer.cell(0, 1, place.index(CELLS));
            while !place.is_free(cell, CELLS) {
                thread::yield_now();
            }
            place.publish(cell, CELLS, frame(number));
        }
    });
    let mut place = Place::default();
    for number in 0..FRAMES {
        let cell = heap.cell(0, 1, place.index(CELLS));
        let got = loop {
            match place.arrived(cell, CELLS) {
                Some(got) => break got,
                None => thread::yield_now(),
            }
        };
        assert_eq!((got.key.seq, got.len), (u64::from(number), number));
        place.release(cell, CELLS);
    }
    thread.join().unwrap();
}

#[test]
fn frames_arrive_in_order_and_whole() {
    explore(3, None, frames_pass);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn a_frame_published_relaxed_is_found() {
    explore(3, Some(Mistake::RelaxedPublish), frames_pass);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn a_cell_handed_back_relaxed_is_found() {
    explore(3, Some(Mistake::RelaxedRecycle), frames_pass);
}

fn two_abort() {
    let heap = Heap::new(2, 0, 0);
    let other = Arc::clone(&heap);
    let thread = thread::spawn(move || abort::raise(&*other, 1, "one"));
    abort::raise(&*heap, 0, "zero");
    while !abort::is_raised(&*heap) {
        thread::yield_now();
    }
    let seen = abort::reason(&*heap);
    assert!(seen == (0, "zero".to_owned()) || seen == (1, "one".to_owned()), "{seen:?}");
    thread.join().unwrap();
    assert_eq!(abort::reason(&*heap), seen);
}

#[test]
fn the_first_abort_is_seen_whole() {
    explore(3, None, two_abort);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn an_abort_published_relaxed_is_found() {
    explore(3, Some(Mistake::RelaxedPublish), two_abort);
}

/// Rank 1 writes into rank 0's memory twice, if it may; rank 0 gives up at any time, and has its memory back.
fn one_gives_up() {
    let heap = Heap::new(2, 0, 0);
    let memory = Arc::new(Cell::new(0u8));
    let (theirs, target) = (Arc::clone(&heap), Arc::clone(&memory));
    let peer = thread::spawn(move || {
        for _ in 0..2 {
            if !door::enter(&*theirs, 0, 1) {
                return;
            }
            // SAFETY: what the model is to show (O1); it panics on a race.
            target.with_mut(|byte| unsafe { *byte = 1 });
            door::leave(&*theirs, 0, 1);
        }
    });
    door::close(&*heap, 0, Why::Failed);
    while door::is_inside(&*heap, 0, 1) {
        thread::yield_now();
    }
    // SAFETY: as above.
    memory.with_mut(|byte| unsafe { *byte = 2 });
    peer.join().unwrap();
    // SAFETY: the other thread has ended.
    let left = memory.with(|byte| unsafe { *byte });
    assert_eq!(left, 2, "written behind its back");
}

#[test]
fn nobody_writes_behind_a_closed_door() {
    explore(3, None, one_gives_up);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn a_writer_that_does_not_fence_is_found() {
    explore(3, Some(Mistake::NoEnterFence), one_gives_up);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn a_door_closed_without_a_fence_is_found() {
    explore(3, Some(Mistake::NoCloseFence), one_gives_up);
}

/// Rank 0 sends a message and leaves. Rank 1, when it sees that, finds the message.
fn one_leaves() {
    let heap = Heap::new(2, 0, 1);
    let ours = Arc::clone(&heap);
    let leaver = thread::spawn(move || {
        Place::default().publish(&ours.cells[0], 1, frame(7));
        door::close(&*ours, 0, Why::Left);
    });
    if door::is_closed(&*heap, 0) == Some(Why::Left) {
        let has_come = Place::default().arrived(&heap.cells[0], 1).is_some();
        assert!(has_come, "it left without its last word");
    }
    leaver.join().unwrap();
    assert_eq!(door::is_closed(&*heap, 0), Some(Why::Left));
}

#[test]
fn who_has_left_has_said_all() {
    explore(3, None, one_leaves);
}

#[test]
#[should_panic(expected = "it left without its last word")]
fn a_leave_before_its_last_word_is_found() {
    explore(3, Some(Mistake::RelaxedLeave), one_leaves);
}

/// Rank 0 gives a message of two pieces, twice; both ranks copy, as they come to it. Or rank 0 fails at its first, in the midst.
fn two_share_the_copying(fails: bool) {
    const PIECES: u32 = 2;
    let heap = Heap::new(2, 0, 1);
    type Pieces = Arc<[Cell<u8>; PIECES as usize]>;
    let pieces = || -> Pieces { Arc::new(std::array::from_fn(|_| Cell::new(0))) };
    // The memory of each.
    let (source, target) = (pieces(), pieces());
    // SAFETY: what the model is to show (B2, B3); it panics on a race.
    let copy = |source: &Pieces, target: &Pieces, at: u32| unsafe {
        let byte = source[at as usize].with(|byte| *byte);
        target[at as usize].with_mut(|place| *place = byte);
    };
    let (theirs, read, written) = (Arc::clone(&heap), Arc::clone(&source), Arc::clone(&target));
    let taker = thread::spawn(move || {
        let mut place = Place::default();
        for round in 1..=2 {
            while place.arrived(&theirs.cells[0], 1).is_none() {
                thread::yield_now();
            }
            place.release(&theirs.cells[0], 1);
            let deal = theirs.deal(0, 1, 0);
            deal.accept(7, 8);
            loop {
                match deal.claim_front() {
                    Some(at) => copy(&read, &written, at),
                    None if deal.is_whole(PIECES) => break,
                    None => thread::yield_now(),
                }
            }
            // SAFETY: as above.
            let got = |at: usize| written[at].with(|byte| unsafe { *byte });
            assert_eq!([got(0), got(1)], [round; 2]);
            deal.end(End::Taken);
        }
    });
    let mut place = Place::default();
    let deal = heap.deal(0, 1, 0);
    let mut has_failed = false;
    for round in 1..=2 {
        // SAFETY: as above: both the first time and once the message before it was taken, the memory is this rank's.
        source.iter().for_each(|piece| piece.with_mut(|byte| unsafe { *byte = round }));
        deal.offer(PIECES);
        assert!(place.is_free(&heap.cells[0], 1));
        place.publish(&heap.cells[0], 1, Frame::zeroed());
        loop {
            match deal.stand() {
                Stand::Over(end) => break assert_eq!(end, End::Taken),
                Stand::Accepted => {
                    assert_eq!(deal.target(), (7, 8));
                    match if has_failed { None } else { deal.claim_back() } {
                        Some(at) => {
                            copy(&source, &target, at);
                            has_failed = fails;
                            if fails { deal.leave_back() } else { deal.count() }
                        }
                        None => thread::yield_now(),
                    }
                }
                _ => thread::yield_now(),
            }
        }
        deal.free();
    }
    taker.join().unwrap();
}

#[test]
fn a_message_is_copied_once_by_either() {
    explore(2, None, || two_share_the_copying(false));
}

#[test]
fn what_one_fails_to_copy_the_other_does() {
    explore(2, None, || two_share_the_copying(true));
}

#[test]
#[should_panic(expected = "Causality violation")]
fn a_piece_left_too_early_is_found() {
    explore(2, Some(Mistake::RelaxedCount), || two_share_the_copying(true));
}

#[test]
#[should_panic(expected = "Causality violation")]
fn a_piece_counted_too_early_is_found() {
    explore(2, Some(Mistake::RelaxedCount), || two_share_the_copying(false));
}

#[test]
#[should_panic(expected = "Causality violation")]
fn a_deal_ended_too_early_is_found() {
    explore(2, Some(Mistake::RelaxedEnd), || two_share_the_copying(false));
}

#[test]
fn a_logged_call_is_whole_or_not_seen() {
    let call = |n: u8| PackedCall { collective: n, count: u64::from(n), ..PackedCall::zeroed() };
    explore(3, None, move || {
        let heap = Heap::new(2, 0, 0);
        let writer = Arc::clone(&heap);
        let thread = thread::spawn(move || {
            for number in 0..2 {
                log::record(&*writer, 1, number, &call(number as u8 + 1));
            }
        });
        for number in 0..2 {
            if let Some(seen) = log::look(&*heap, 1, number) {
                assert_eq!(seen, call(number as u8 + 1));
            }
        }
        thread.join().unwrap();
    });
}

#[test]
fn anybody_is_no_rank() {
    assert!(ANYBODY as usize >= crate::MAX_LOCAL);
}
