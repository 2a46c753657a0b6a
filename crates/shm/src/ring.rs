//! The exchange protocol: every rank's ring of slots, its exchanges numbered 0, 1, 2, … alike on all ranks.
//!
//! A rank takes part in exchange `e` by publishing (or skipping, when it has nothing to give) and later consuming it.
//! Its slot for `e` is head `e mod K`, and a data area where the data does not fit into heads: those exchanges take a ring of
//! areas in turn, whatever lies between them, so that a rank knows which one it fills next. Two ranks swap areas with
//! every turn of that ring, so that each writes into what it read last: those lines lie in its own cache, while what it
//! wrote there itself has gone to its reader's (docs/adr/0018).
//!
//! Invariants
//! - **E1** A slot's word is `(e + 1) << 8 | lag` for the last exchange `e` its owner published there; `lag` is how many
//!   exchanges behind `e` its owner's consumption was. So every head also carries an acknowledgement, and in
//!   symmetric traffic nobody reads the `consumed` counters.
//! - **E2** `e` is published only when every peer has consumed `e - K`: no reader is left in the slot.
//! - **E3** A rank publishes or skips `e` before it consumes `e` (consuming may overwrite what it publishes), and
//!   consumes in order; it is at most K exchanges ahead of its own consumption.
//! - **E4** Nobody waits for ever: of the ranks with the lowest consumption, each can publish or consume as soon
//!   as the work has been submitted everywhere.
//! - **E5** All ranks know alike which exchanges take areas. The `a`-th of them takes the areas `a mod K`, one for each rank. When
//!   a rank publishes it, as `e`, nobody has a use for what they held before: that was the `a - K`-th's, so `e - K` or an
//!   older one, which every peer has consumed (E2), and so has the rank itself (E3).

use crate::layout::{Line, Memory, SlotHead};
use crate::sync::{Ordering, recycle_order};

pub(crate) const MAX_SLOTS: usize = 64;

const LAG_BITS: u32 = 8;

/// Where a rank's data of one exchange lies: an area, named by a rank and the index of a slot, and how often that was
/// filled before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Area {
    pub(crate) rank: usize,
    pub(crate) index: usize,
    pub(crate) uses: u64,
}

pub(crate) struct Ring {
    me: usize,
    slots: u64,
    /// Exchanges published or skipped, and consumed, by this rank.
    published: u64,
    consumed: u64,
    /// Slots of the next one to publish and to consume: the numbers above mod `slots`, for divisions take long.
    fills: usize,
    reads: usize,
    /// How many of them took areas (E5).
    filled: u64,
    emptied: u64,
    /// What is known of each peer's consumption; it may be more by now.
    peers: Vec<u64>,
    /// A lower bound of all of them.
    floor: u64,
}

impl Ring {
    pub(crate) fn new(me: usize, size: usize, slots: usize) -> Ring {
        debug_assert!((2..=MAX_SLOTS).contains(&slots));
        Ring {
            me,
            slots: slots as u64,
            published: 0,
            consumed: 0,
            fills: 0,
            reads: 0,
            filled: 0,
            emptied: 0,
            peers: vec![0; size],
            floor: 0,
        }
    }

    #[inline]
    pub(crate) fn index(&self, exchange: u64) -> usize {
        (exchange % self.slots) as usize
    }

    /// The slot of the exchange to publish next.
    #[inline]
    pub(crate) fn index_to_fill(&self) -> usize {
        self.fills
    }

    /// The slot of the exchange to consume next.
    #[inline]
    pub(crate) fn index_to_read(&self) -> usize {
        self.reads
    }

    #[inline]
    fn behind(&self, index: usize) -> usize {
        if index + 1 == self.slots as usize { 0 } else { index + 1 }
    }

    /// Where `rank` puts its data in the exchange that takes areas and comes `ahead` of the next such one (E5).
    #[inline]
    pub(crate) fn area_to_fill(&self, rank: usize, ahead: u64) -> Area {
        self.area(rank, self.filled + ahead)
    }

    /// Where `rank` has its data in the exchange to consume next, which takes areas.
    #[inline]
    pub(crate) fn area_to_read(&self, rank: usize) -> Area {
        self.area(rank, self.emptied)
    }

    #[inline]
    fn area(&self, rank: usize, number: u64) -> Area {
        let (turn, index) = (number / self.slots, self.index(number));
        if self.peers.len() == 2 {
            Area { rank: rank ^ (turn as usize & 1), index, uses: turn / 2 }
        } else {
            Area { rank, index, uses: turn }
        }
    }

    /// The exchange to publish next.
    #[inline]
    pub(crate) fn published(&self) -> u64 {
        self.published
    }

    /// The exchange to consume next.
    #[inline]
    pub(crate) fn consumed(&self) -> u64 {
        self.consumed
    }

    /// Whether this rank is as far ahead of its own consumption as E3 allows.
    #[inline]
    pub(crate) fn is_full(&self) -> bool {
        self.published - self.consumed >= self.slots
    }

    /// `None` when the slot of the next exchange is free (E2), else a peer that still has to consume it.
    #[inline]
    pub(crate) fn in_the_way(&mut self, memory: &impl Memory) -> Option<usize> {
        let needed = (self.published + 1).saturating_sub(self.slots);
        if self.floor >= needed { None } else { self.look_for(needed, memory) }
    }

    /// Whether every peer has consumed all exchanges but the last `few` that this rank published.
    pub(crate) fn is_consumed_but_for(&mut self, few: u64, memory: &impl Memory) -> bool {
        self.look_for(self.published.saturating_sub(few), memory).is_none()
    }

    fn look_for(&mut self, needed: u64, memory: &impl Memory) -> Option<usize> {
        let mut floor = u64::MAX;
        for peer in 0..self.peers.len() {
            if peer == self.me {
                continue;
            }
            if self.peers[peer] < needed {
                self.peers[peer] = memory.control(peer).consumed.load(Ordering::Acquire);
                if self.peers[peer] < needed {
                    return Some(peer);
                }
            }
            floor = floor.min(self.peers[peer]);
        }
        self.floor = floor;
        None
    }

    /// Every peer that has not consumed the slot of the next exchange.
    pub(crate) fn all_in_the_way(&self, memory: &impl Memory) -> impl Iterator<Item = usize> {
        let needed = (self.published + 1).saturating_sub(self.slots);
        let late = move |&peer: &usize| memory.control(peer).consumed.load(Ordering::Acquire) < needed;
        (0..self.peers.len()).filter(|peer| *peer != self.me).filter(late)
    }

    /// Publishes the next exchange; nobody may be [in the way](Ring::in_the_way). Data goes into the slot before. Does the
    /// exchange take areas?
    #[inline]
    pub(crate) fn publish(&mut self, memory: &impl Memory, areas: bool, fill: impl FnOnce(&mut SlotHead)) {
        debug_assert!(!self.is_full() && self.fills == self.index(self.published));
        let word = (self.published + 1) << LAG_BITS | (self.published - self.consumed);
        memory.slot(self.me, self.fills).publish(word, fill);
        self.published += 1;
        self.fills = self.behind(self.fills);
        self.filled += u64::from(areas);
    }

    /// Steps over the next exchange: this rank gives nothing to anybody in it, whether it takes areas or not.
    #[inline]
    pub(crate) fn skip(&mut self, areas: bool) {
        debug_assert!(!self.is_full());
        self.published += 1;
        self.fills = self.behind(self.fills);
        self.filled += u64::from(areas);
    }

    /// The head of `peer`'s slot, if it has published the exchange to consume next.
    #[inline]
    pub(crate) fn ready<'a>(&mut self, memory: &'a impl Memory, peer: usize) -> Option<&'a Line<SlotHead>> {
        let head = memory.slot(peer, self.reads);
        let word = head.word();
        if word >> LAG_BITS != self.consumed + 1 {
            return None;
        }
        let acknowledged = self.consumed.saturating_sub(word & ((1 << LAG_BITS) - 1));
        self.peers[peer] = self.peers[peer].max(acknowledged);
        Some(head)
    }

    /// As [`Ring::ready`], learning nothing.
    pub(crate) fn has_published(&self, memory: &impl Memory, peer: usize) -> bool {
        memory.slot(peer, self.reads).word() >> LAG_BITS == self.consumed + 1
    }

    /// Whether `peer` has published `exchange`, lately or not. Behind a fence that follows this rank's own publishing: of two
    /// that publish and then look at each other, one at least sees the other.
    #[inline]
    pub(crate) fn has_given(&self, memory: &impl Memory, peer: usize, exchange: u64) -> bool {
        memory.slot(peer, self.index(exchange)).word() >> LAG_BITS > exchange
    }

    /// Hands back the slots of the exchange to consume next: nothing of it is looked at any more.
    #[inline]
    pub(crate) fn consume(&mut self, memory: &impl Memory, areas: bool) {
        debug_assert!(self.consumed < self.published && self.reads == self.index(self.consumed));
        self.consumed += 1;
        self.reads = self.behind(self.reads);
        self.emptied += u64::from(areas);
        memory.control(self.me).consumed.store(self.consumed, recycle_order());
    }
}
