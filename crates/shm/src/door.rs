//! A rank's door: its peers write into its private memory only inside of it (`single_copy`).
//!
//! What a peer reads too late is its own loss. What it writes too late lands in memory that the caller has back, or that is
//! somebody else's by then. So a rank that gives up a call closes its door first, and waits until nobody is inside.
//!
//! Invariants
//! - **O1** A peer that is about to write says that it is inside, then looks whether the door is closed. A rank closes its door, then
//!   looks who is inside. Between both steps each has a fence, so one of them sees the other: once a door was closed and empty, nobody
//!   enters.
//! - **O2** That a peer has left is the last thing that the system call which writes for it writes, if it ends well: a peer that is
//!   stopped, or ends, behind its last byte is outside.
//! - **O3** A closed door stays closed: its group works no more.
//! - **O4** Who leaves a group that has not failed says so with the same word, behind all it ever published: who sees that it has
//!   left, and still waits for it then, waits in vain.

use crate::layout::Memory;
use crate::sync::{Ordering, close_fence, enter_fence, leave_order};

/// What says that a peer is outside.
pub(crate) const OUTSIDE: u64 = 0;
const INSIDE: u64 = 1;

/// Why a door is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub(crate) enum Why {
    Failed = 1,
    /// The rank has left the group in good order (O4).
    Left = 2,
}

/// `peer` is about to write into the memory of `rank`. False: it must not, and is not inside.
pub(crate) fn enter(memory: &impl Memory, rank: usize, peer: usize) -> bool {
    memory.inside(rank, peer).store(INSIDE, Ordering::Relaxed);
    enter_fence();
    let open = memory.closed(rank).load(Ordering::Relaxed) == 0;
    if !open {
        leave(memory, rank, peer);
    }
    open
}

/// `peer` has written. As the kernel says it, who writes eight bytes of [`OUTSIDE`] behind the others (O2).
pub(crate) fn leave(memory: &impl Memory, rank: usize, peer: usize) {
    memory.inside(rank, peer).store(OUTSIDE, Ordering::Release);
}

/// Nobody enters any more who is not [inside](is_inside).
pub(crate) fn close(memory: &impl Memory, rank: usize, why: Why) {
    memory.closed(rank).store(why as u64, leave_order());
    close_fence();
}

/// Why the door of `rank` is closed, if it is (O4).
pub(crate) fn is_closed(memory: &impl Memory, rank: usize) -> Option<Why> {
    match memory.closed(rank).load(Ordering::Acquire) {
        0 => None,
        why if why == Why::Left as u64 => Some(Why::Left),
        _ => Some(Why::Failed),
    }
}

/// Whether `peer` may be writing into the memory of `rank`.
pub(crate) fn is_inside(memory: &impl Memory, rank: usize, peer: usize) -> bool {
    memory.inside(rank, peer).load(Ordering::Acquire) != OUTSIDE
}
