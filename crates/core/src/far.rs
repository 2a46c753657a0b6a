//! Calls whose data lies in a device's memory, where messages take it and leave it: the host computes on memory of its own.
//!
//! Such a call has its data twice. [`Request`] names the host's memory as ever, and a [`Far`]
//! the device's, of the same shape.
//!
//! Invariants, on groups of one rank a node
//! - **F1** a message reads and writes the device's memory, unless it lies within the rank's [own share](own_share) or in scratch.
//! - **F2** what is computed reads and writes the host's memory, within the own share and scratch only.
//! - **F3** what needs neither message nor computation is the caller's affair: an all_gather leaves the own block alone.
//! - **F4** a call is one round, so that no message is shorter than [`least_message`] says.

use crate::call::Collective;
use crate::error::{Error, Result};
use crate::memory::Region;
use crate::plan::{Buf, Span, cut};
use crate::request::Request;

/// The device's memory of a call. Empty: messages use the host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Far {
    pub input: Region,
    pub output: Region,
}

impl Far {
    /// The caller is one of ours: what is wrong is a bug.
    pub(crate) fn check(&self, request: &Request) -> Result<()> {
        let alike = |far: Region, near: Region| far.is_empty() || far.len() == near.len();
        // A sum is computed (F2).
        let is_sum = request.collective == Collective::ReduceScatter;
        let sound = carries(request.collective)
            && request.counts.is_none()
            && alike(self.input, request.input)
            && alike(self.output, request.output)
            && (!is_sum || self.output.is_empty());
        let wrong = || Error::Internal(format!("{} cannot have its data at {self:?}", request.collective));
        if sound { Ok(()) } else { Err(wrong()) }
    }
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
    pub(crate) fn of(request: &Request, size: usize, rank: usize) -> Option<FarCall> {
        let near = || own_share(request.collective, request.dtype.size(), request.count, size, rank);
        request.far.map(|far| FarCall { far, near: near() })
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
