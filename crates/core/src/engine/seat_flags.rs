//! What threads tell one another about the driver's seat, beside its lock: what was submitted, who wants it, who sleeps.
//!
//! Invariants
//! - **S1** A driver that goes to sleep is woken by who submits something, or wants the seat, behind its last look.
//! - **S2** Whoever leaves the seat learns of what was submitted, and of who went to sleep, because the seat was taken.
//!
//! In both, two threads store and then look, with a fence between: one of them at least sees what the other stored.

use std::sync::atomic::Ordering;

use crate::atomics::{AtomicBool, AtomicUsize, fence};

#[derive(Default)]
pub(crate) struct SeatFlags {
    /// Operations in the inbox. Changed with the inbox locked.
    submitted: AtomicUsize,
    /// Callers who want the seat from the progress thread.
    wanted: AtomicUsize,
    /// Callers who sleep until their operation is done: they found the seat taken, and it may be left before that.
    sleepers: AtomicUsize,
    /// Who drives sleeps where a bell is heard.
    is_asleep: AtomicBool,
}

/// What was found by who left the seat.
pub(crate) struct Found {
    pub(crate) submitted: bool,
    pub(crate) sleepers: bool,
}

impl SeatFlags {
    /// So many operations lie in the inbox, one of them new. Whether the driver's bell must be rung (S1).
    pub(crate) fn submit(&self, operations: usize) -> bool {
        self.submitted.store(operations, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.is_asleep.load(Ordering::Relaxed)
    }

    /// So many operations are left in the inbox.
    pub(crate) fn take(&self, left: usize) {
        self.submitted.store(left, Ordering::Relaxed);
    }

    /// Whether anything lies in the inbox. Who is called to what was submitted sees it: who called has seen it (S2), or submitted it.
    #[inline]
    pub(crate) fn has_submissions(&self) -> bool {
        self.submitted.load(Ordering::Relaxed) > 0
    }

    /// Somebody wants the seat until [`has_it`](Self::has_it). Whether the driver's bell must be rung (S1).
    pub(crate) fn want(&self) -> bool {
        self.wanted.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.is_asleep.load(Ordering::Relaxed)
    }

    pub(crate) fn has_it(&self) {
        self.wanted.fetch_sub(1, Ordering::Relaxed);
    }

    /// Callers who want the seat.
    #[inline]
    pub(crate) fn wanted(&self) -> &AtomicUsize {
        &self.wanted
    }

    #[inline]
    pub(crate) fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Relaxed) > 0
    }

    /// Who drives sleeps, until its bell rings, unless it is called by now (S1).
    pub(crate) fn doze(&self, is_called: impl FnOnce() -> bool, sleep: impl FnOnce()) {
        self.is_asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if !self.has_submissions() && !self.is_wanted() && !is_called() {
            sleep();
        }
        self.is_asleep.store(false, Ordering::Relaxed);
    }

    /// Who found the seat taken sleeps, unless it can be taken by now (S2).
    pub(crate) fn sleep_unless<S>(
        &self,
        seat: impl FnOnce() -> Option<S>,
        sleep: impl FnOnce(),
    ) -> Option<S> {
        self.sleepers.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let seat = seat();
        if seat.is_none() {
            sleep();
        }
        self.sleepers.fetch_sub(1, Ordering::Relaxed);
        seat
    }

    /// What is to be known behind the unlocking of the seat (S2).
    #[inline]
    pub(crate) fn leave(&self) -> Found {
        unlocked();
        Found {
            submitted: self.submitted.load(Ordering::SeqCst) > 0,
            sleepers: self.sleepers.load(Ordering::SeqCst) > 0,
        }
    }
}

/// Orders the unlocking of the seat before the looks behind it. Where that is an instruction, calls would pay for it: x86-64 unlocks by
/// a locked exchange, which is a fence, and on AArch64 no load-acquire passes the store-release that unlocks.
#[inline]
fn unlocked() {
    #[cfg(all(not(loom), any(target_arch = "x86_64", target_arch = "aarch64")))]
    std::sync::atomic::compiler_fence(Ordering::SeqCst);
    #[cfg(not(all(not(loom), any(target_arch = "x86_64", target_arch = "aarch64"))))]
    fence(Ordering::SeqCst);
}

#[cfg(all(test, loom))]
#[path = "seat_models.rs"]
mod models;
