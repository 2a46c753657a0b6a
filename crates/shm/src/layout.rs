//! The structures that lie in shared memory. Each has one writer a field, named here; all unsafe access to them is
//! in this file, behind functions that are sound only under the protocols of `ring` and `pair`:
//!
//! - **L1** A [`Line`]'s body is written by its owner alone, after the protocol showed that every reader has handed the
//!   line back; it becomes visible with the word that `publish` release-stores, and is read only after that word was
//!   acquire-loaded. Bytes in the data area that an exchange takes (`ring`) or that a cell has follow
//!   the same rule by way of the line that is published with them.
//! - **L2** Everything is valid when all bytes are zero, as fresh memory is.
//! - **L3** Everything in shared memory is plain integers, so that no byte a peer writes is an invalid value; what it
//!   means is checked where it is used.

use bytemuck::{Pod, Zeroable};
use smddp_core::call::PackedCall;
use smddp_core::transport::MsgKey;

use crate::deal::Deal;
use crate::mask::WORDS;
use crate::sync::{AtomicU32, AtomicU64, Cell, Futex, Ordering, publish_order};

/// Bytes that fit into a slot's head beside the call.
pub(crate) const INLINE: usize = 40;

/// What a slot's head carries.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct SlotHead {
    pub(crate) call: PackedCall,
    pub(crate) inline: [u8; INLINE],
}

/// What a message cell's head carries: a frame of a message, or an offer of one (`straight`), whole messages following one another.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Frame {
    pub(crate) key: MsgKey,
    pub(crate) call: PackedCall,
    /// Bytes of the whole message.
    pub(crate) total: u64,
    /// Bytes of it in this cell; of an offer, those of the address at which it lies.
    pub(crate) len: u32,
    /// 0, or of an offer the number of its deal, plus one.
    pub(crate) offer: u32,
}

/// One cache line: a word that says whose turn it is, and what is handed over.
#[repr(C, align(64))]
pub(crate) struct Line<T> {
    word: AtomicU64,
    body: Cell<T>,
}

// SAFETY: a body is plain data whose accesses L1 orders.
unsafe impl<T: Pod> Sync for Line<T> {}
// SAFETY: as above.
unsafe impl<T: Pod> Send for Line<T> {}

impl<T: Pod> Line<T> {
    #[cfg(loom)]
    pub(crate) fn new() -> Line<T> {
        Line { word: AtomicU64::new(0), body: Cell::new(T::zeroed()) }
    }

    #[inline]
    pub(crate) fn word(&self) -> u64 {
        self.word.load(Ordering::Acquire)
    }

    /// Fills the body and hands it over with `word`. The owner alone calls this, when the line is free (L1).
    #[inline]
    pub(crate) fn publish(&self, word: u64, fill: impl FnOnce(&mut T)) {
        // SAFETY: L1: nobody else touches the body while the line is the owner's.
        self.body.with_mut(|body| fill(unsafe { &mut *body }));
        self.word.store(word, publish_order());
    }

    /// Looks at the body. Only after `word` said that it is there, and before it is handed back (L1).
    #[inline]
    pub(crate) fn read<R>(&self, f: impl FnOnce(&T) -> R) -> R {
        // SAFETY: L1: the writer does not touch the body until this reader hands it back.
        self.body.with(|body| f(unsafe { &*body }))
    }

    /// Where the body lies, for regions inside it; the same rule applies (L1).
    #[cfg(not(loom))]
    #[inline]
    pub(crate) fn body(&self) -> *mut T {
        self.body.with_mut(|body| body)
    }

    /// Hands a cell back to its writer. Only its one reader calls this.
    #[inline]
    pub(crate) fn release(&self, word: u64) {
        self.word.store(word, crate::sync::recycle_order());
    }
}

/// Phases whose calls a rank's log remembers.
pub(crate) const LOG: u64 = if cfg!(loom) { 1 } else { 16 };

/// A call this rank submitted, for peers that wonder why nothing comes. Written by the rank.
#[repr(C)]
pub(crate) struct Logged {
    /// Number of the phase plus one; 0 while being written.
    pub(crate) phase: AtomicU64,
    pub(crate) call: [AtomicU64; 2],
}

/// A rank's control lines.
#[repr(C, align(128))]
pub(crate) struct Control {
    /// Exchanges this rank has consumed. Written by the rank.
    pub(crate) consumed: AtomicU64,
    pub(crate) bell: Bell,
    pub(crate) log: [Logged; LOG as usize],
}

/// What a sleeping rank waits for, and the word it sleeps on; away from `consumed`, which peers poll.
#[repr(C, align(128))]
pub(crate) struct Bell {
    /// Bumped by whoever wakes the rank.
    pub(crate) futex: Futex,
    /// The one local rank whose doings would wake this one, or [`ANYBODY`]. Written by the rank.
    pub(crate) hint: AtomicU32,
}

pub(crate) const ANYBODY: u32 = u32::MAX;

/// One line that every poll reads and few ever write.
#[repr(C, align(128))]
pub(crate) struct Alerts {
    /// 0, or [`ABORT_WRITING`], then [`ABORT_WRITTEN`].
    pub(crate) abort: AtomicU32,
    /// Ranks that sleep, or are about to; each sets and clears its own bit.
    pub(crate) sleepers: [AtomicU64; WORDS],
}

pub(crate) const ABORT_WRITING: u32 = 1;
pub(crate) const ABORT_WRITTEN: u32 = 2;

pub(crate) const ABORT_TEXT: usize = 2000;

/// Why the group was aborted. Written once, by the rank that moved [`Alerts::abort`] from 0.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct AbortText {
    pub(crate) rank: u32,
    pub(crate) len: u32,
    pub(crate) text: [u8; ABORT_TEXT],
}

/// [`AbortText`] behind the rule of L1; the word is [`Alerts::abort`].
#[repr(C, align(64))]
pub(crate) struct AbortCell(Cell<AbortText>);

// SAFETY: plain data; written by the one rank that won `Alerts::abort`, read after it is `ABORT_WRITTEN`.
unsafe impl Sync for AbortCell {}
// SAFETY: as above.
unsafe impl Send for AbortCell {}

impl AbortCell {
    #[cfg(loom)]
    pub(crate) fn new() -> AbortCell {
        AbortCell(Cell::new(AbortText::zeroed()))
    }

    /// Only the rank that won calls this.
    pub(crate) fn write(&self, fill: impl FnOnce(&mut AbortText)) {
        // SAFETY: nobody reads before `ABORT_WRITTEN`, nobody else writes.
        self.0.with_mut(|text| fill(unsafe { &mut *text }));
    }

    /// Only after `ABORT_WRITTEN` was seen.
    pub(crate) fn read<R>(&self, f: impl FnOnce(&AbortText) -> R) -> R {
        // SAFETY: it does not change any more.
        self.0.with(|text| f(unsafe { &*text }))
    }
}

/// The shared structures as the protocols see them: a mapped segment, or a model's heap.
pub(crate) trait Memory {
    fn alerts(&self) -> &Alerts;
    fn abort_text(&self) -> &AbortCell;
    fn control(&self, rank: usize) -> &Control;
    /// Head of slot `index` of `rank`.
    fn slot(&self, rank: usize, index: usize) -> &Line<SlotHead>;
    /// Head of cell `index` of the messages from `from` to `to`.
    fn cell(&self, from: usize, to: usize, index: usize) -> &Line<Frame>;
    /// Deal `index` for the messages from `from` to `to`.
    fn deal(&self, from: usize, to: usize, index: usize) -> &Deal;
    /// Whether the door of `rank` is closed: 0, or why it is. Written by the rank (`door`).
    fn closed(&self, rank: usize) -> &AtomicU64;
    /// Whether `peer` is inside of it. Written by the peer, and by the kernel in its name.
    fn inside(&self, rank: usize, peer: usize) -> &AtomicU64;
}

#[cfg(not(loom))]
const _: () = {
    assert!(size_of::<Line<SlotHead>>() == 64, "flag, call and inline data share a cache line");
    assert!(size_of::<Line<Frame>>() == 64 && size_of::<Deal>() == 64);
    assert!(size_of::<Alerts>() == 128);
};
