//! How much data that everybody combines with everybody's goes around: each rank sums up a share of it for all.
//!
//! A phase that is one move from all to all is a relay where its data is large: it runs as chunks of two exchanges each. In
//! the first, a *gather*, every rank gives each other one its share of the chunk; in the second, a *spread*, every rank gives
//! what its own share came to. That goes to the rank's result and into its slot at once, and nobody reads it again on its
//! way; so a spread is published where its gather is consumed.
//!
//! Invariants
//! - **Y1** All ranks cut alike, from the size of the data, of the group and of the slots alone; elements stay whole.
//! - **Y2** Each rank's pieces of an exchange fit into its slot.
//! - **Y3** Each element is combined by one rank, from all ranks' in order, as a phase through slots combines it: equal bits.

use crate::equal_shares::{CUT_ALIGN, share};

/// How a phase is cut into chunks, and chunks into shares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Relay {
    size: usize,
    /// Bytes of the whole, and of a chunk.
    len: usize,
    chunk: usize,
}

/// Bytes that all ranks of a node read together, each reading all, where that is as fast as a relay.
const LEAST: usize = 64 << 10;

impl Relay {
    /// For `len` bytes of each of `size` ranks, where a rank's slot has room for `slot` bytes. `None`: everybody is to read
    /// everything.
    pub(crate) fn of(len: usize, size: usize, slot: usize) -> Option<Relay> {
        if size < 2 || len.saturating_mul(size) <= LEAST {
            return None;
        }
        // A rank gives all others their shares in one slot.
        let share = slot / (size - 1) / CUT_ALIGN * CUT_ALIGN;
        let chunks = len.div_ceil((share > 0).then(|| share * size)?);
        Some(Relay { size, len, chunk: len.div_ceil(chunks).next_multiple_of(size * CUT_ALIGN) })
    }

    pub(crate) fn exchanges(&self) -> usize {
        2 * self.len.div_ceil(self.chunk)
    }

    pub(crate) fn is_gather(exchange: usize) -> bool {
        exchange.is_multiple_of(2)
    }

    /// Offset in the data, and length, of `rank`'s share of the chunk that `exchange` is about.
    pub(crate) fn share(&self, exchange: usize, rank: usize) -> (usize, usize) {
        let start = exchange / 2 * self.chunk;
        let (at, len) = share(self.chunk.min(self.len - start), self.size, rank);
        (start + at, len)
    }

    /// Where `giver` puts `taker`'s share in the slot of a gather: behind those of the ranks before it, which are as long as
    /// the first where this one is not empty.
    pub(crate) fn offset(&self, exchange: usize, giver: usize, taker: usize) -> usize {
        (taker - usize::from(giver < taker)) * self.share(exchange, 0).1
    }

    /// Bytes that a rank puts into its slot, at most.
    pub(crate) fn most(&self) -> usize {
        self.chunk / self.size * (self.size - 1)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn shares_cover_the_data_once_and_fit_into_slots(
            size in 1usize..130,
            len in prop_oneof![0usize..200_000, 0usize..100 << 20],
            slot in prop_oneof![Just(4096usize), 4096usize..200_000, Just(1 << 20)],
        ) {
            let Some(relay) = Relay::of(len, size, slot) else {
                prop_assert!(size == 1 || len * size <= LEAST || slot / (size - 1) < CUT_ALIGN);
                return Ok(());
            };
            let mut end = 0;
            for exchange in (0..relay.exchanges()).step_by(2) {
                let mut most = 0;
                for rank in 0..size {
                    let (at, share) = relay.share(exchange, rank);
                    prop_assert_eq!((at, at % CUT_ALIGN), (end, if share > 0 { 0 } else { at % CUT_ALIGN }));
                    prop_assert_eq!(relay.share(exchange + 1, rank), (at, share));
                    end += share;
                    let place = relay.offset(exchange, (rank + 1) % size, rank);
                    most = most.max(place + share);
                }
                prop_assert!(most <= relay.most() && relay.most() <= slot);
            }
            prop_assert_eq!(end, len);
        }
    }

    #[test]
    fn shares_cover_more_than_four_gigabytes() {
        for (size, len) in [(2, 1 << 32), (3, (1 << 32) + 4), (8, (5 << 30) - 2)] {
            let relay = Relay::of(len, size, 1 << 20).unwrap();
            let mut end = 0;
            for exchange in (0..relay.exchanges()).step_by(2) {
                for rank in 0..size {
                    let (at, share) = relay.share(exchange, rank);
                    assert_eq!(at, end);
                    end += share;
                }
            }
            assert_eq!(end, len);
        }
    }
}
