//! A call on memory that every rank of the node sees: no slots, each rank works in everybody's data.
//!
//! Two exchanges (`ring`) make the call. In the first the ranks tell one another where their data lies: what other ranks
//! read. Then each does its part. Where data is combined or copied in place, it does so with its share of all ranks' data, so
//! that all ranks work whoever the result is for; else it takes from its peers' data what belongs in its own. The second
//! exchange says that it has.
//!
//! Invariants
//! - **D1** Nobody touches a peer's data before that peer has published the first exchange: it has entered the call, and
//!   its caller's writes are seen.
//! - **D2** A rank publishes the second exchange after its last access to any rank's data; the call is over here when
//!   all ranks' were seen. So whatever a caller does with its data before and after the call does not race.
//! - **D3** The shares are disjoint and whole cache lines, and cover everything: no two ranks touch the same bytes. Of a call
//!   that is not in place, what a rank writes is nothing that others read (the callers see to that).
//! - **D4** A rank combines in the order of local ranks, once an element, and copies the result: equal bits for all, and the
//!   bits that the slots give.

use std::ops::Range;

use smddp_core::Region;
use smddp_core::order::Order;
use smddp_core::plan::{Move, Who};
use smddp_core::reduce::{Pass, Store, combine_and};
use smddp_core::shared::{Place, Shared, place};
use smddp_core::threads;
use smddp_core::transport::Arith;

use crate::equal_shares::{CUT_ALIGN, share};

/// Exchanges of a call.
pub(crate) const EXCHANGES: usize = 2;

/// Bytes combined before they are copied to further peers, from a near cache.
const STEP: usize = 16 << 10;
/// Data of so many bytes lies in main memory, or in caches that all cores share.
const FAR: usize = 16 << 20;

/// The shared memory that a group's ranks have entered.
#[derive(Default)]
pub(crate) struct Entered(Vec<Shared>);

impl Entered {
    pub(crate) fn enter(&mut self, shared: Shared) {
        self.0.push(shared);
    }

    pub(crate) fn leave(&mut self, number: u64) {
        self.0.retain(|shared| shared.number != number);
    }

    /// Where this rank's `data` lies.
    pub(crate) fn place(&self, data: Region) -> Option<Place> {
        self.0.iter().find_map(|shared| place(shared.number, shared.own(), data))
    }

    /// The `len` bytes of local rank `rank` at `place`, as it says.
    fn look_up(&self, rank: usize, place: Place, len: usize) -> Option<Region> {
        let part = self.0.iter().find(|shared| shared.number == place.number)?.parts.get(rank)?;
        let offset = usize::try_from(place.offset).ok()?;
        (offset.checked_add(len)? <= part.len()).then(|| part.slice(offset, len))
    }
}

/// One call's data, as far as it is known, and how far this rank's share is done.
#[derive(Default)]
pub(crate) struct Direct {
    /// By local rank; gathered in the first exchange.
    data: Vec<Region>,
    /// Of the bytes being worked on, by local rank.
    parts: Vec<Region>,
    done: usize,
}

impl Direct {
    /// The call is over.
    pub(crate) fn forget(&mut self) {
        self.data.clear();
        self.done = 0;
    }

    /// Ranks whose data is known.
    pub(crate) fn known(&self) -> usize {
        self.data.len()
    }

    /// By local rank.
    pub(crate) fn data(&self) -> &[Region] {
        &self.data
    }

    /// Takes what local rank [`known`](Direct::known) says of `len` bytes; false when that is no memory that it shares, or
    /// not the same as `own`.
    pub(crate) fn learn(&mut self, entered: &Entered, theirs: Place, own: Place, len: usize) -> bool {
        if theirs.number != own.number {
            return false;
        }
        let found = entered.look_up(self.data.len(), theirs, len);
        self.data.extend(found);
        found.is_some()
    }

    /// Works on the share of rank `me` of a move in place, `shift` bytes from where it says, until it is done or `budget`
    /// bytes were read and written. Whether it is done. All ranks' data is known. `far`: the order of what lies far.
    pub(crate) fn work(
        &mut self,
        arith: Arith,
        far: Order,
        m: &Move,
        shift: usize,
        me: usize,
        budget: usize,
    ) -> bool {
        let ranks = self.data.len();
        let (start, share) = share(m.dst.len, ranks, me);
        // Where the result of this rank's share comes to lie first.
        let first = match (m.from, m.to) {
            (Who::One(root), _) | (Who::All, Who::One(root)) => root as usize,
            (Who::All, Who::All) => me,
        };
        let order = if self.data[first].len() >= FAR { far } else { Order::Straight };
        let mut left = budget;
        if threads::in_use() > 1 {
            left = left.max(threads::WORTH * ranks);
        }
        while self.done < share {
            if left == 0 {
                return false;
            }
            let n = ((left / ranks).max(STEP) / CUT_ALIGN * CUT_ALIGN).min(share - self.done);
            let at = shift + m.dst.off + start + self.done;
            if n >= threads::WORTH && threads::in_use() > 1 {
                let data = &self.data;
                threads::split(n, |range| {
                    let mut parts = Vec::with_capacity(ranks);
                    piece(arith, order, m, first, data, &mut parts, at + range.start..at + range.end);
                });
            } else {
                piece(arith, order, m, first, &self.data, &mut self.parts, at..at + n);
            }
            self.done += n;
            left = left.saturating_sub(n * ranks);
        }
        true
    }
}

/// Combines the bytes `range` of all ranks' `data` into that of local rank `first` and copies them to whom else they are for.
fn piece(
    arith: Arith,
    order: Order,
    m: &Move,
    first: usize,
    data: &[Region],
    parts: &mut Vec<Region>,
    range: Range<usize>,
) {
    let ranks = data.len();
    // Two ranks' parts are stored at once: nothing is copied.
    let step = if ranks > 2 { STEP } else { range.len() };
    for at in range.clone().step_by(step.max(1)) {
        let n = step.min(range.end - at);
        parts.clear();
        parts.extend(data.iter().map(|data| data.slice(at, n)));
        let result = parts[first];
        if m.from == Who::All {
            // The next rank's part as well, if it is to have the result: that saves a pass.
            let store = match m.to {
                Who::All if ranks > 1 => Store::Twice(parts[(first + 1) % ranks]),
                _ => Store::Cached,
            };
            combine_and(Pass { store, order }, arith, m.finish, result, parts);
        }
        if m.to == Who::All {
            let has_it = |rank| m.from == Who::All && rank == (first + 1) % ranks;
            let others = (0..ranks).filter(|&rank| !has_it(rank));
            others.for_each(|rank| parts[rank].copy_from(result));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn shares_are_disjoint_lines_that_cover_everything(
            len in prop_oneof![0usize..100_000, (1usize << 32) - 2000..(1usize << 32) + 2000], ranks in 1usize..20,
        ) {
            let mut next = 0;
            for rank in 0..ranks {
                let (start, len_of) = share(len, ranks, rank);
                prop_assert_eq!(start, next);
                prop_assert!(start.is_multiple_of(CUT_ALIGN) || start == len);
                next += len_of;
            }
            prop_assert_eq!(next, len);
        }
    }

    #[test]
    fn what_a_peer_says_is_believed_only_within_what_it_shares() {
        let mut bytes = [[0u8; 128]; 2];
        let [a, b] = &mut bytes;
        // SAFETY: nothing is read or written through them.
        let parts = unsafe { vec![Region::of(a), Region::of(b)] };
        let mut entered = Entered::default();
        entered.enter(Shared { number: 3, parts: parts.clone(), own: 0, keep: std::sync::Arc::new(()) });
        let own = entered.place(parts[0].slice(64, 64)).unwrap();
        assert_eq!(own, Place { number: 3, offset: 64 });
        assert_eq!(entered.place(parts[1]), None);
        let says = |number, offset| {
            let mut direct = Direct::default();
            assert!(direct.learn(&entered, own, own, 64));
            direct.learn(&entered, Place { number, offset }, own, 64).then(|| direct.data[1])
        };
        assert_eq!(says(3, 0), Some(parts[1].slice(0, 64)));
        assert_eq!(says(3, 64), Some(parts[1].slice(64, 64)));
        for (number, offset) in [(3, 65), (3, u64::MAX), (3, 1 << 40), (4, 0)] {
            assert_eq!(says(number, offset), None, "{number} {offset}");
        }
        entered.leave(3);
        assert_eq!(entered.place(parts[0]), None);
    }
}
