//! How a rank reads what a peer has written into shared memory for it (docs/adr/0024, 0042).

use smddp_core::Region;
use smddp_core::order::Order;

use crate::segment::Segment;

/// Fewer bytes are not read faster in another order.
const FAR: usize = 32 << 10;

/// What a peer has written.
#[derive(Clone, Copy)]
pub(crate) struct Theirs {
    /// Its lines go back to the peer.
    pub(crate) hands_back: bool,
    /// The order in which much of it is read.
    far: Order,
}

impl Theirs {
    #[inline]
    pub(crate) fn within(segment: &Segment, hands_back: bool) -> Theirs {
        Theirs { hands_back, far: segment.far() }
    }

    /// The order in which `n` bytes of it are read.
    #[inline]
    pub(crate) fn order(self, n: usize) -> Order {
        if n >= FAR { self.far } else { Order::Straight }
    }

    #[inline]
    pub(crate) fn copy(self, dst: Region, source: Region) {
        if self.hands_back {
            dst.take_from(source);
        } else {
            dst.copy_in(self.order(dst.len()), source);
        }
    }
}
