//! Falling asleep and being woken, without losing a wake-up.
//!
//! Invariants
//! - **D1** A sleeper stores its hint and its bit, fences, looks once more at what it waits for, and only then sleeps on
//!   the value its bell had before. A waker publishes, fences, and looks at bits and hints. One of the two fences
//!   is first, so either the sleeper sees what was published or the waker sees the sleeper.
//! - **D2** A hint names the only peer whose doings could move this rank. Narrowing it from anybody to one needs no more:
//!   that peer rings for either hint. When it changes from one peer to another, the new hint is stored, fenced,
//!   and everything is looked at again (D1 anew).

use crate::layout::{ANYBODY, Memory};
use crate::mask::bits_of;
use crate::sync::{Ordering, arm_fence, look_again, notify_fence};

/// This rank's side: whether it announced that it will sleep, and for whom.
#[derive(Default)]
pub(crate) struct Sleeper {
    hint: Option<u32>,
}

impl Sleeper {
    pub(crate) fn is_armed(&self) -> bool {
        self.hint.is_some()
    }

    /// Announces that `me` is about to sleep until anybody moves.
    pub(crate) fn arm(&mut self, memory: &impl Memory, me: usize) {
        self.hint = Some(ANYBODY);
        memory.control(me).bell.hint.store(ANYBODY, Ordering::Relaxed);
        memory.alerts().sleepers[me / 64].fetch_or(1 << (me % 64), Ordering::AcqRel);
        arm_fence();
    }

    pub(crate) fn disarm(&mut self, memory: &impl Memory, me: usize) {
        if self.hint.take().is_some() {
            memory.alerts().sleepers[me / 64].fetch_and(!(1 << (me % 64)), Ordering::AcqRel);
        }
    }

    /// While armed: `peer` is the only one to wait for (`None`: anybody may be). True when everything must be looked
    /// at once more before sleeping (D2).
    pub(crate) fn wait_for(&mut self, memory: &impl Memory, me: usize, peer: Option<usize>) -> bool {
        let hint = peer.map_or(ANYBODY, |p| p as u32);
        let Some(before) = self.hint.replace(hint) else {
            self.hint = None;
            return false;
        };
        if before == hint {
            return false;
        }
        memory.control(me).bell.hint.store(hint, Ordering::Relaxed);
        if before == ANYBODY {
            return false;
        }
        arm_fence();
        look_again()
    }
}

/// Wakes whoever sleeps until `me` moves; called after something was published or handed back.
#[inline]
pub(crate) fn notify(memory: &impl Memory, me: usize, size: usize) {
    notify_fence();
    for word in 0..size.div_ceil(64) {
        let sleepers = memory.alerts().sleepers[word].load(Ordering::Acquire);
        if sleepers != 0 {
            wake(memory, me, size, word, sleepers);
        }
    }
}

#[cold]
fn wake(memory: &impl Memory, me: usize, size: usize, word: usize, sleepers: u64) {
    for rank in bits_of(sleepers).map(|bit| word * 64 + bit).filter(|&rank| rank < size && rank != me) {
        let bell = &memory.control(rank).bell;
        let hint = bell.hint.load(Ordering::Relaxed);
        if hint == ANYBODY || hint == me as u32 {
            bell.futex.ring();
        }
    }
}

/// Wakes everybody else, asleep or not: the group is over.
pub(crate) fn ring_all(memory: &impl Memory, me: usize, size: usize) {
    for rank in (0..size).filter(|&rank| rank != me) {
        memory.control(rank).bell.futex.ring();
    }
}
