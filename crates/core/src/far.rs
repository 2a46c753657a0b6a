//! Calls whose data lies in a device's memory, where messages take it and leave it: the host computes on memory of its own.
//!
//! Such a call has its data twice. [`Request`](crate::request::Request) names the host's memory as ever, and a [`Far`]
//! the device's, of the same shape.
//!
//! Invariants, on groups of one rank a node
//! - **F1** a message reads and writes the device's memory, unless it lies within the rank's [own share](own_share) or in scratch.
//! - **F2** what is computed reads and writes the host's memory, within the own share and scratch only.
//! - **F3** what needs neither message nor computation is the caller's affair: an all_gather leaves the own block alone.
//! - **F4** a call is one round, so that no message is shorter than [`least_message`] says.

use crate::call::Collective;
use crate::memory::Region;
use crate::plan::build::cut;
use crate::plan::data::{Buf, Span};

/// The device's memory of a call. Empty: messages use the host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Far {
    pub input: Region,
    pub output: Region,
}

/// Whether a collective can be called so.
pub fn carries(collective: Collective) -> bool {
    use Collective::{AllGather, AllReduce, Broadcast, ReduceScatter};
    matches!(collective, AllReduce | ReduceScatter | AllGather | Broadcast)
}

/// What `rank` of `size` computes of `count` elements of `elem` bytes: (offset, length) in bytes, in the input, and in the
/// output where that is the same memory. Nothing where nothing is computed.
pub fn own_share(
    collective: Collective,
    elem: usize,
    count: usize,
    size: usize,
    rank: usize,
) -> (usize, usize) {
    match collective {
        Collective::AllReduce => cut(count * elem, size, rank, elem),
        Collective::ReduceScatter => (rank * count * elem, count * elem),
        _ => (0, 0),
    }
}

/// Bytes of the shortest message of a call on so many ranks.
pub fn least_message(collective: Collective, elem: usize, count: usize, size: usize) -> usize {
    match collective {
        Collective::AllReduce => {
            (0..size).map(|rank| cut(count * elem, size, rank, elem).1).min().unwrap_or(0)
        }
        _ => count * elem,
    }
}

/// A call's [`Far`] and the rank's own share of it.
#[derive(Clone, Copy, Debug)]
pub struct FarCall {
    far: Far,
    near: (usize, usize),
}

impl FarCall {
    /// `near`: offset and length of the [own share](own_share).
    pub(crate) fn new(far: Far, near: (usize, usize)) -> FarCall {
        FarCall { far, near }
    }

    /// The device's memory for a message of `span`, which is not in the host's (F1).
    pub(crate) fn of_message(&self, span: Span) -> Option<Region> {
        let whole = match span.buf {
            Buf::Input => self.far.input,
            Buf::Output => self.far.output,
            Buf::Scratch => return None,
        };
        let (start, len) = self.near;
        let is_near = start <= span.off && span.off + span.len <= start + len;
        (!whole.is_empty() && !is_near).then(|| whole.slice(span.off, span.len))
    }
}
