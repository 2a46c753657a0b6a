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
        let stays = match self.collective {
            Collective::AllReduce | Collective::Broadcast | Collective::Reduce => true,
            // In place, a rank writes around what its peers read, or what it alone reads.
            Collective::AllGather => self.is_own_block(rank, output, input) || !input.overlaps(output),
            Collective::ReduceScatter => self.is_own_block(rank, input, output) || !input.overlaps(output),
            Collective::AllToAll => !input.overlaps(output),
            // The root alone reads, itself too.
            Collective::Gather => true,
            Collective::Scatter | Collective::Barrier | Collective::SendRecv => false,
        };
        (is_even && stays).then_some(if source_of(self.collective) == Buf::Input { input } else { output })
    }

    /// Whether `part` begins where `rank`'s own block of `whole` does.
    fn is_own_block(&self, rank: usize, whole: Region, part: Region) -> bool {
        let before = match &self.counts {
            Some(counts) => counts.iter().take(rank).sum::<usize>() * self.dtype.size(),
            None => rank * part.len(),
        };
        (part.as_ptr() as usize).checked_sub(whole.as_ptr() as usize) == Some(before)
    }

    /// Whether `rank` of `size` may make the call on this memory, whose lengths are right: input and output share bytes only
    /// as a call in place has them.
    #[inline(never)]
    pub fn check_apart(&self, rank: usize, size: usize, input: Region, output: Region) -> Result<()> {
        if !input.overlaps(output) {
            return Ok(());
        }
        let (fits, expected) = match self.collective {
            Collective::AllGather | Collective::Gather => (
                self.is_own_block(rank, output, input),
                "memory apart from the output, or this rank's own block of it",
            ),
            Collective::ReduceScatter | Collective::Scatter => (
                self.is_own_block(rank, input, output),
                "memory apart from the output, or with the output as this rank's own block",
            ),
            Collective::AllToAll => {
                (size == 1 && input.as_ptr() == output.as_ptr(), "memory apart from the output")
            }
            Collective::AllReduce | Collective::Broadcast | Collective::Reduce => {
                (input.as_ptr() == output.as_ptr(), "the output's memory, or memory apart from it")
            }
            Collective::Barrier | Collective::SendRecv => (true, ""),
        };
        if fits {
            return Ok(());
        }
        let offset = (input.as_ptr() as usize).wrapping_sub(output.as_ptr() as usize) as isize;
        Err(Error::Argument {
            op: self.collective.name().to_owned(),
            argument: "input",
            expected: expected.to_owned(),
            given: format!(
                "{} bytes that begin {offset} bytes from the start of the output's {}",
                input.len(),
                output.len()
            ),
            hint: "Copy it first".to_owned(),
        })
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

    /// Whether rank 1 of 3, whose blocks have 8 bytes, or 4, 8 and 16, may call on these ranges of one memory.
    fn is_apart(
        collective: Collective,
        uneven: bool,
        input: (usize, usize),
        output: (usize, usize),
    ) -> Result<()> {
        let mut bytes = [0u8; 128];
        // SAFETY: nothing is read or written through it.
        let whole = unsafe { Region::of(&mut bytes) };
        let (input, output) = (whole.slice(input.0, input.1), whole.slice(output.0, output.1));
        let counts = uneven.then(|| [4, 8, 16].into());
        let request = Request { counts, ..Request::new(collective, DType::U8, 8, input, output) };
        request.check_apart(1, 3, input, output)
    }

    #[test]
    fn memory_is_shared_in_place_or_not_at_all() {
        use Collective::{AllGather, AllReduce, AllToAll, Gather, ReduceScatter, Scatter};
        for (collective, own, all) in [
            (AllGather, "input", 24),
            (Gather, "input", 24),
            (ReduceScatter, "output", 24),
            (Scatter, "output", 24),
            (AllGather, "uneven input", 28),
            (ReduceScatter, "uneven output", 28),
        ] {
            let uneven = own.starts_with("uneven");
            let fits = |block: usize| {
                let (block, whole) = ((block, 8), (40, all));
                let (input, output) = if own.ends_with("input") { (block, whole) } else { (whole, block) };
                is_apart(collective, uneven, input, output)
            };
            let place = 40 + if uneven { 4 } else { 8 };
            for block in 25..80 {
                let apart = block + 8 <= 40 || block >= 40 + all;
                assert_eq!(fits(block).is_ok(), apart || block == place, "{collective}, {own} at {block}");
            }
        }
        assert!(is_apart(AllToAll, false, (0, 24), (0, 24)).is_err());
        assert!(is_apart(AllToAll, false, (0, 24), (23, 24)).is_err());
        assert!(is_apart(AllToAll, false, (0, 24), (24, 24)).is_ok());
        assert!(is_apart(AllReduce, false, (0, 8), (0, 8)).is_ok());
        assert!(is_apart(AllReduce, false, (0, 8), (4, 8)).is_err());
        let error = is_apart(AllGather, false, (40, 8), (40, 24)).unwrap_err().to_string();
        let parts =
            ["all_gather", "'input'", "apart from the output", "8 bytes that begin 0", "Copy it first"];
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
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
