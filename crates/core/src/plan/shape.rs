//! All that decides what ranks do in a call, besides the group.
//!
//! Buffers, by collective (elements; P ranks; "own" blocks are the caller's)
//!
//! | collective | `Input` | `Output` |
//! | --- | --- | --- |
//! | all_reduce, broadcast, barrier | the same memory as `Output` | count |
//! | reduce | the same memory as `Output` | count; only the root's changes |
//! | all_gather | count | P * count, or the sum of `counts` |
//! | reduce_scatter | P * count, or the sum of `counts` | count, or the own entry of `counts` |
//! | all_to_all | P * count, or the sum of the send splits | P * count, or the sum of the receive splits |
//! | gather | count | P * count at the root, else nothing |
//! | scatter | P * count at the root, else nothing | count |

use std::sync::Arc;

use crate::call::Collective;

/// All that decides a schedule besides the group and the rank: the key of a cache of schedules.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct CallShape {
    pub collective: Collective,
    /// Bytes of an element: a power of two, at most 64.
    pub elem: usize,
    /// Elements, as in [`crate::Call`].
    pub count: usize,
    /// Group rank; 0 where the collective has none.
    pub root: usize,
    /// Uneven all_gather and reduce_scatter: elements of each rank's block, known to all ranks.
    pub counts: Option<Arc<[usize]>>,
    /// Uneven all_to_all; blocks lie in rank order.
    pub splits: Option<Splits>,
    /// On memory that the ranks of each node share.
    pub shared: bool,
    /// With its data on a device: see [`crate::far`].
    pub far: bool,
}

/// Elements that a rank (sends to, receives from) each rank.
pub type Splits = (Arc<[usize]>, Arc<[usize]>);

impl CallShape {
    pub fn new(collective: Collective, elem: usize, count: usize) -> CallShape {
        CallShape { collective, elem, count, root: 0, counts: None, splits: None, shared: false, far: false }
    }

    pub fn rooted(collective: Collective, elem: usize, count: usize, root: usize) -> CallShape {
        CallShape { root, ..CallShape::new(collective, elem, count) }
    }

    /// Whether no rank has an element to move. (An uneven all_to_all never knows that.)
    pub fn moves_nothing(&self) -> bool {
        let counted = self.counts.as_ref().map_or(self.count, |counts| counts.iter().sum());
        self.collective != Collective::Barrier && self.splits.is_none() && counted == 0
    }

    /// Bytes of all blocks together: what the selection table goes by. For an uneven all_to_all, whose sizes no rank
    /// knows alone, 0.
    pub fn bytes(&self, size: usize) -> usize {
        if self.splits.is_some() {
            return 0;
        }
        let blocks = match self.collective {
            Collective::AllReduce | Collective::Broadcast | Collective::Reduce => self.count,
            Collective::Barrier | Collective::SendRecv => 0,
            Collective::ReduceScatter
            | Collective::AllGather
            | Collective::AllToAll
            | Collective::Gather
            | Collective::Scatter => self.counts.as_ref().map_or(self.count * size, |c| c.iter().sum()),
        };
        blocks * self.elem
    }
}
