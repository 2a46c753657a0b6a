//! Each rank's record of the calls it submitted lately, for peers that wonder why nothing comes.
//!
//! One writer, readers at any time: an entry is valid when its number is the same before and after it is read.

use smddp_core::call::PackedCall;

use crate::layout::{LOG, Logged, Memory};
use crate::sync::{Ordering, fence};

fn entry(memory: &impl Memory, rank: usize, number: u64) -> &Logged {
    &memory.control(rank).log[(number % LOG) as usize]
}

/// `me` submitted its phase `number`, part of `call`.
pub(crate) fn record(memory: &impl Memory, me: usize, number: u64, call: &PackedCall) {
    let entry = entry(memory, me, number);
    let [a, b]: [u64; 2] = bytemuck::cast(*call);
    entry.phase.store(0, Ordering::Relaxed);
    // Whoever sees a part of the new call below also sees that the entry is not the old one any more.
    fence(Ordering::Release);
    entry.call[0].store(a, Ordering::Relaxed);
    entry.call[1].store(b, Ordering::Relaxed);
    entry.phase.store(number + 1, Ordering::Release);
}

/// The call of `peer`'s phase `number`, if it is still (or already) known.
pub(crate) fn look(memory: &impl Memory, peer: usize, number: u64) -> Option<PackedCall> {
    let entry = entry(memory, peer, number);
    if entry.phase.load(Ordering::Acquire) != number + 1 {
        return None;
    }
    let words = [0, 1].map(|i| entry.call[i].load(Ordering::Relaxed));
    fence(Ordering::Acquire);
    (entry.phase.load(Ordering::Relaxed) == number + 1).then(|| bytemuck::cast(words))
}
