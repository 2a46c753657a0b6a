//! What a caller asks of a group.

use std::hash::Hasher;
use std::sync::Arc;
use std::time::Duration;

use rustc_hash::FxHasher;

use crate::call::{Call, Collective};
use crate::dtype::{DType, ReduceOp};
use crate::error::{Error, Result};
use crate::far::{self, Far, FarCall};
use crate::gate::Gate;
use crate::memory::Region;
use crate::plan::data::{Buf, source_of};

/// Elements of each rank's block, by group rank.
pub type Blocks = Arc<[usize]>;

/// A collective call on raw memory.
#[derive(Clone, Debug)]
pub struct Request {
    pub collective: Collective,
    pub dtype: DType,
    pub op: ReduceOp,
    /// Group rank; for rooted collectives.
    pub root: usize,
    /// Elements, as [`Call::count`] says.
    pub count: usize,
    /// all_reduce, broadcast and reduce take the same memory for both.
    pub input: Region,
    pub output: Region,
    /// Uneven all_gather and reduce_scatter: elements of each rank's block, equal on all ranks.
    pub counts: Option<Blocks>,
    /// Uneven all_to_all: elements this rank sends to, and receives from, each rank.
    pub splits: Option<(Blocks, Blocks)>,
    /// The group's when `None`.
    pub timeout: Option<Duration>,
    /// Begin only when it opens. The group's later collectives wait behind this one.
    pub gate: Option<Gate>,
    /// The device's memory that messages use in place of `input` and `output`.
    pub far: Option<Far>,
}

impl Request {
    pub fn new(collective: Collective, dtype: DType, count: usize, input: Region, output: Region) -> Request {
        Request {
            collective,
            dtype,
            op: ReduceOp::Sum,
            root: 0,
            count,
            input,
            output,
            counts: None,
            splits: None,
            timeout: None,
            gate: None,
            far: None,
        }
    }

    /// The data that other ranks read, which `rank` itself does not write as long as they may; `None` where it is not
    /// as long on every rank, or there is none.
    pub(crate) fn read_by_others(&self, rank: usize) -> Option<Region> {
        let is_even = self.counts.is_none() && self.splits.is_none();
        let (input, output) = (self.input, self.output);
        let begins_at = |whole: Region, part: Region| {
            (part.as_ptr() as usize).checked_sub(whole.as_ptr() as usize) == Some(rank * part.len())
        };
        let stays = match self.collective {
            Collective::AllReduce | Collective::Broadcast | Collective::Reduce => true,
            // In place, a rank writes around what its peers read, or what it alone reads.
            Collective::AllGather => begins_at(output, input) || !input.overlaps(output),
            Collective::ReduceScatter => begins_at(input, output) || !input.overlaps(output),
            Collective::AllToAll => !input.overlaps(output),
            // The root alone reads, itself too.
            Collective::Gather => true,
            Collective::Scatter | Collective::Barrier | Collective::SendRecv => false,
        };
        (is_even && stays).then_some(if source_of(self.collective) == Buf::Input { input } else { output })
    }

    /// Whether a call can have its data on a device as this one says. The caller is one of ours: what is wrong is a bug.
    pub(crate) fn check_far(&self) -> Result<()> {
        let Some(far) = &self.far else { return Ok(()) };
        let alike = |far: Region, near: Region| far.is_empty() || far.len() == near.len();
        // A sum is computed (F2).
        let is_sum = self.collective == Collective::ReduceScatter;
        let sound = far::carries(self.collective)
            && self.counts.is_none()
            && alike(far.input, self.input)
            && alike(far.output, self.output)
            && (!is_sum || far.output.is_empty());
        let wrong = || Error::Internal(format!("{} cannot have its data at {far:?}", self.collective));
        if sound { Ok(()) } else { Err(wrong()) }
    }

    /// Where the messages of `rank` of `size` take and leave data that lies on a device.
    pub(crate) fn far_call(&self, size: usize, rank: usize) -> Option<FarCall> {
        let near = || far::own_share(self.collective, self.dtype.size(), self.count, size, rank);
        self.far.map(|far| FarCall::new(far, near()))
    }

    pub(crate) fn call(&self, shared: bool) -> Call {
        let count = match (&self.counts, &self.splits) {
            (Some(counts), _) => checksum(counts),
            // Each rank has its own.
            (None, Some(_)) => 0,
            (None, None) => self.count as u64,
        };
        Call {
            collective: self.collective,
            dtype: self.dtype,
            op: self.op,
            root: self.root as u32,
            count,
            uneven: self.counts.is_some() || self.splits.is_some(),
            shared,
            far: self.far.is_some(),
        }
    }
}

/// Tells ranks whose lists of lengths differ, which their calls would not show otherwise.
fn checksum(counts: &[usize]) -> u64 {
    let mut hasher = FxHasher::default();
    counts.iter().for_each(|&count| hasher.write_u64(count as u64));
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What others read of a call on these ranges of one memory, as a range.
    fn read(
        collective: Collective,
        rank: usize,
        input: (usize, usize),
        output: (usize, usize),
    ) -> Option<(usize, usize)> {
        let mut bytes = [0u8; 64];
        // SAFETY: nothing is read or written through it.
        let whole = unsafe { Region::of(&mut bytes) };
        let part = |(at, len): (usize, usize)| whole.slice(at, len);
        let request = Request::new(collective, DType::U8, 8, part(input), part(output));
        let found = request.read_by_others(rank)?;
        Some((found.as_ptr() as usize - whole.as_ptr() as usize, found.len()))
    }

    #[test]
    fn the_input_is_read_unless_its_rank_writes_over_it() {
        let apart = ((0, 8), (16, 32));
        for collective in [Collective::AllGather, Collective::Gather] {
            assert_eq!(read(collective, 1, apart.0, apart.1), Some((0, 8)), "{collective}");
        }
        for collective in [Collective::ReduceScatter, Collective::AllToAll] {
            assert_eq!(read(collective, 1, (16, 32), (0, 8)), Some((16, 32)), "{collective}");
        }
        // In place: the own block, and no other.
        assert_eq!(read(Collective::AllGather, 1, (24, 8), (16, 32)), Some((24, 8)));
        assert_eq!(read(Collective::AllGather, 1, (32, 8), (16, 32)), None);
        assert_eq!(read(Collective::ReduceScatter, 1, (16, 32), (24, 8)), Some((16, 32)));
        assert_eq!(read(Collective::ReduceScatter, 1, (16, 32), (25, 8)), None);
        assert_eq!(read(Collective::AllToAll, 0, (16, 32), (16, 32)), None);
        assert_eq!(read(Collective::AllToAll, 0, (16, 16), (31, 16)), None);
        assert_eq!(read(Collective::AllToAll, 0, (16, 16), (32, 16)), Some((16, 16)));
    }

    #[test]
    fn buffers_of_calls_in_place_are_read_and_those_of_one_rank_alone_are_not() {
        for collective in [Collective::AllReduce, Collective::Broadcast, Collective::Reduce] {
            assert_eq!(read(collective, 0, (8, 8), (8, 8)), Some((8, 8)), "{collective}");
        }
        for collective in [Collective::Scatter, Collective::Barrier, Collective::SendRecv] {
            assert_eq!(read(collective, 0, (0, 8), (16, 8)), None, "{collective}");
        }
        let uneven = Request {
            counts: Some([1, 2].into()),
            ..Request::new(Collective::AllGather, DType::U8, 0, Region::EMPTY, Region::EMPTY)
        };
        assert_eq!(uneven.read_by_others(0), None);
    }

    #[test]
    fn calls_of_other_lengths_differ() {
        let call = |counts: &[usize]| {
            let request = Request::new(Collective::AllGather, DType::U8, 0, Region::EMPTY, Region::EMPTY);
            Request { counts: Some(counts.into()), ..request }.call(false).pack()
        };
        assert_eq!(call(&[8, 16]), call(&[8, 16]));
        for other in [&[8, 4096][..], &[16, 8], &[8, 16, 0], &[8], &[0, 0]] {
            assert_ne!(call(&[8, 16]), call(other), "{other:?}");
        }
    }
}
