//! Sizes and offsets of everything in a group's segment.

use bytemuck::{Pod, Zeroable};
use smddp_core::Collective;

use crate::deal::{DEALS, Deal};
use crate::layout::{AbortCell, Alerts, Control};
use crate::mask::MAX_LOCAL;
use crate::ring::MAX_SLOTS;

const PAGE: usize = 4096;
/// Slot heads keep this distance: the CPU fetches lines in pairs.
pub(crate) const HEAD_STRIDE: usize = 128;
/// Shared memory of one rank, at most.
const RANK_LIMIT: usize = 16 << 20;
/// Of which its messages to all its peers; less where the slots are small: as much as so many of them.
const MESSAGES_LIMIT: usize = 2 << 20;
const MESSAGES_SLOTS: usize = 8;
const MESSAGES_LEAST: usize = 4096;
/// More would not be faster.
const MESSAGES_PAIR: usize = 512 << 10;
/// Bytes a slot must have for each local rank, so that a phase with a piece for each of them stays whole.
const SLOT_PER_RANK: usize = 256;

/// Ring of slots each rank has. Local rank 0 chooses; the others take what the segment says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of one slot.
    pub slot: usize,
    /// Slots of a rank.
    pub slots: usize,
}

impl Geometry {
    /// Where nothing better is known: two ranks' slots, each of which both use in turn, lie in the second cache of either.
    pub const USUAL: Geometry = Geometry { slot: 128 << 10, slots: 4 };

    /// Bytes of shared memory that a rank needs for it in each group, about.
    pub fn bytes(self) -> usize {
        self.slot * self.slots + self.messages()
    }

    /// Of which for messages to all its peers.
    fn messages(self) -> usize {
        MESSAGES_LIMIT.min(MESSAGES_SLOTS * self.slot)
    }

    /// The nearest geometry that `local_size` ranks can use: whole pages, at most 16 MiB a rank in all.
    pub fn fitted(self, local_size: usize) -> Geometry {
        let budget = RANK_LIMIT - MESSAGES_LIMIT - (256 << 10);
        let least = (SLOT_PER_RANK * local_size).max(PAGE);
        let slot = self.slot.clamp(least, budget / 2).next_multiple_of(PAGE).min(budget / 2 / PAGE * PAGE);
        let slots = self.slots.clamp(2, MAX_SLOTS).min(budget / slot);
        Geometry { slot, slots }
    }
}

/// Which calls' large blocks go straight between the ranks' private memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SingleCopies {
    /// Those in which all ranks take from one another: all_to_all, and all_gather of two ranks.
    pub mutual: bool,
    /// Those in which one rank gives or takes alone: scatter and gather, and broadcast of two ranks. Messages, too.
    pub alone: bool,
}

impl SingleCopies {
    pub const NONE: SingleCopies = SingleCopies { mutual: false, alone: false };
    pub const ALL: SingleCopies = SingleCopies { mutual: true, alone: true };

    pub(crate) fn allow(self, collective: Collective) -> bool {
        match collective {
            Collective::AllToAll | Collective::AllGather => self.mutual,
            Collective::Broadcast | Collective::Scatter | Collective::Gather => self.alone,
            _ => false,
        }
    }
}

/// What local rank 0 decides for its node's ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Agreed {
    pub single_copy: SingleCopies,
    /// Who alone reads a piece hands its cache lines back ([`Region::take_from`](smddp_core::Region::take_from)).
    pub hands_back: bool,
}

/// The first bytes of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Header {
    pub(crate) magic: u64,
    pub(crate) version: u32,
    pub(crate) local_size: u32,
    pub(crate) group: u64,
    pub(crate) slot: u64,
    pub(crate) slots: u64,
    pub(crate) total: u64,
    /// As [`Agreed`] says, 1 or 0 each.
    pub(crate) single_copy: [u16; 2],
    pub(crate) hands_back: u32,
    /// Identity of the pid namespace in which the table of pids is to be read.
    pub(crate) pid_space: u64,
}

pub(crate) const MAGIC: u64 = u64::from_le_bytes(*b"smddpshm");
pub(crate) const VERSION: u32 = 6;

impl Header {
    pub(crate) fn agreed(&self) -> Agreed {
        let [mutual, alone] = self.single_copy.map(|word| word == 1);
        Agreed { single_copy: SingleCopies { mutual, alone }, hands_back: self.hands_back == 1 }
    }
}

/// Where things are. A function of geometry and local size alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) local_size: usize,
    pub(crate) geometry: Geometry,
    /// Cells of the messages of one ordered pair, and bytes from one to the next (head included).
    pub(crate) cells: usize,
    pub(crate) cell_stride: usize,
    pub(crate) alerts: usize,
    pub(crate) abort_text: usize,
    pub(crate) pids: usize,
    ranks: usize,
    rank_stride: usize,
    heads: usize,
    door: usize,
    deals: usize,
    messages: usize,
    data: usize,
}

impl Layout {
    /// `geometry` must be [fitted](Geometry::fitted) and `local_size` within 1 and [`MAX_LOCAL`].
    pub(crate) fn new(geometry: Geometry, local_size: usize) -> Layout {
        debug_assert!((1..=MAX_LOCAL).contains(&local_size) && geometry == geometry.fitted(local_size));
        let alerts = size_of::<Header>().next_multiple_of(128);
        let abort_text = alerts + size_of::<Alerts>();
        let pids = abort_text + size_of::<AbortCell>();
        let ranks = (pids + 4 * local_size).next_multiple_of(PAGE);

        let pair = prev_power_of_two(geometry.messages() / local_size).clamp(MESSAGES_LEAST, MESSAGES_PAIR);
        let cells = if pair >= 32 << 10 { 8 } else { 4 };
        let heads = size_of::<Control>();
        let door = heads + geometry.slots * HEAD_STRIDE;
        let deals = (door + 8 * (1 + local_size)).next_multiple_of(HEAD_STRIDE);
        let messages = (deals + local_size * DEALS * size_of::<Deal>()).next_multiple_of(HEAD_STRIDE);
        let data = (messages + pair * local_size).next_multiple_of(PAGE);
        Layout {
            local_size,
            geometry,
            cells,
            cell_stride: pair / cells,
            alerts,
            abort_text,
            pids,
            ranks,
            rank_stride: data + geometry.slots * geometry.slot,
            heads,
            door,
            deals,
            messages,
            data,
        }
    }

    /// Bytes of the whole segment.
    pub(crate) fn total(&self) -> usize {
        self.ranks + self.local_size * self.rank_stride
    }

    /// Offset and length of what belongs to `rank`; with rank 0 goes what belongs to all.
    pub(crate) fn share(&self, rank: usize) -> (usize, usize) {
        match rank {
            0 => (0, self.ranks + self.rank_stride),
            _ => (self.control(rank), self.rank_stride),
        }
    }

    pub(crate) fn control(&self, rank: usize) -> usize {
        self.ranks + rank * self.rank_stride
    }

    pub(crate) fn head(&self, rank: usize, index: usize) -> usize {
        self.control(rank) + self.heads + index * HEAD_STRIDE
    }

    /// A word that says whether the rank's door is closed, and one for each local rank that may be inside.
    pub(crate) fn door(&self, rank: usize) -> usize {
        self.control(rank) + self.door
    }

    pub(crate) fn deal(&self, from: usize, to: usize, index: usize) -> usize {
        self.control(from) + self.deals + (to * DEALS + index) * size_of::<Deal>()
    }

    pub(crate) fn slot(&self, rank: usize, index: usize) -> usize {
        self.control(rank) + self.data + index * self.geometry.slot
    }

    pub(crate) fn cell(&self, from: usize, to: usize, index: usize) -> usize {
        self.control(from) + self.messages + (to * self.cells + index) * self.cell_stride
    }

    pub(crate) fn header(&self, group: u64, agreed: Agreed, pid_space: u64) -> Header {
        Header {
            magic: MAGIC,
            version: VERSION,
            local_size: self.local_size as u32,
            group,
            slot: self.geometry.slot as u64,
            slots: self.geometry.slots as u64,
            total: self.total() as u64,
            single_copy: [agreed.single_copy.mutual, agreed.single_copy.alone].map(u16::from),
            hands_back: agreed.hands_back.into(),
            pid_space,
        }
    }
}

fn prev_power_of_two(n: usize) -> usize {
    1 << n.max(1).ilog2()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn parts_do_not_overlap_and_a_rank_stays_within_its_limit(
            slot in 1usize..8 << 20, slots in 1usize..100, local in 1usize..=MAX_LOCAL,
        ) {
            let geometry = Geometry { slot, slots }.fitted(local);
            prop_assert_eq!(geometry.fitted(local), geometry);
            prop_assert!(geometry.slots >= 2 && geometry.slot >= 256 * local && geometry.slot.is_multiple_of(PAGE));
            let l = Layout::new(geometry, local);
            prop_assert!(l.rank_stride <= RANK_LIMIT);
            // Heads and whole pages come to what `bytes` says, and the least for each of many peers.
            let told = geometry.bytes().max(geometry.slot * geometry.slots + MESSAGES_LEAST * local);
            prop_assert!(l.rank_stride <= told + l.messages + PAGE);
            prop_assert!(size_of::<Header>() <= l.alerts);
            prop_assert!(l.pids + 4 * local <= l.ranks);
            let last = local - 1;
            let mut parts = vec![];
            for rank in [0, last] {
                parts.push((l.control(rank), size_of::<Control>()));
                parts.push((l.door(rank), 8 * (1 + local)));
                for index in [0, geometry.slots - 1] {
                    parts.push((l.head(rank, index), 64));
                    parts.push((l.slot(rank, index), geometry.slot));
                }
                for to in [0, last] {
                    parts.push((l.deal(rank, to, 0), DEALS * size_of::<Deal>()));
                    for index in [0, l.cells - 1] {
                        parts.push((l.cell(rank, to, index), l.cell_stride));
                    }
                }
            }
            parts.sort_unstable();
            parts.dedup();
            for pair in parts.windows(2) {
                prop_assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{:?}", pair);
            }
            for (at, len) in parts {
                prop_assert!(at % 64 == 0 && at + len <= l.total());
            }
            prop_assert_eq!((0..local).map(|r| l.share(r).1).sum::<usize>(), l.total());
        }
    }
}
