//! How a rank reads what a peer has written into shared memory for it (docs/adr/0024, 0041).

use smddp_core::Region;
use smddp_core::order::Order;

/// Fewer bytes are not read faster in another order.
const FAR: usize = 32 << 10;

/// The order in which `n` bytes are read.
pub(crate) fn order(n: usize) -> Order {
    if n >= FAR { Order::FourPages } else { Order::Straight }
}

/// What a peer has written.
#[derive(Clone, Copy)]
pub(crate) struct Theirs {
    /// Its lines go back to the peer.
    pub(crate) hands_back: bool,
}

impl Theirs {
    #[inline]
    pub(crate) fn copy(self, dst: Region, source: Region) {
        if self.hands_back {
            dst.take_from(source);
        } else {
            dst.copy_in(order(dst.len()), source);
        }
    }
}
