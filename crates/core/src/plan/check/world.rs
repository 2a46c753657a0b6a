//! What is proven: the schedules of all ranks together.

use std::fmt;

use crate::call::Collective;
use crate::error::Result;
use crate::plan::data::{Buf, Schedule};
use crate::plan::select::schedule;
use crate::plan::shape::CallShape;
use crate::plan::tuning::Tuning;
use crate::topology::GroupShape;

/// The schedules of all ranks of a group for one call.
#[derive(Clone, Debug)]
pub struct World {
    pub shape: GroupShape,
    /// By rank; they differ in the splits of an uneven all_to_all only.
    pub calls: Vec<CallShape>,
    /// By rank.
    pub schedules: Vec<Schedule>,
}

/// What a proven world does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Messages between ranks.
    pub messages: usize,
    /// Most bytes over one node's link, out.
    pub sent: usize,
    /// Most bytes over one node's link, in.
    pub received: usize,
    /// Rounds of rank 0.
    pub rounds: usize,
    /// Most scratch bytes of a rank, all rounds in flight.
    pub scratch: usize,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} rounds, {} messages, a link carries {} B out and {} B in, {} B of scratch",
            self.rounds, self.messages, self.sent, self.received, self.scratch
        )
    }
}

impl World {
    /// All ranks make the same call.
    pub fn new(shape: &GroupShape, call: &CallShape, tuning: &Tuning) -> Result<World> {
        World::with_calls(shape, vec![call.clone(); shape.size()], tuning)
    }

    /// One call a rank.
    pub fn with_calls(shape: &GroupShape, calls: Vec<CallShape>, tuning: &Tuning) -> Result<World> {
        let schedules = calls.iter().enumerate().map(|(r, call)| schedule(shape, r, call, tuning));
        Ok(World { schedules: schedules.collect::<Result<_>>()?, shape: shape.clone(), calls })
    }

    /// Elements of a rank's buffer. `Input` is 0 where it is the same memory as `Output`.
    pub(super) fn elements(&self, rank: usize, buf: Buf) -> usize {
        let (call, size) = (&self.calls[rank], self.shape.size());
        let blocks = || call.counts.as_ref().map_or(call.count * size, |c| c.iter().sum());
        let own = || call.counts.as_ref().map_or(call.count, |c| c[rank]);
        let at_root = |n: usize| if rank == call.root { n } else { 0 };
        let (input, output) = match call.collective {
            Collective::AllReduce | Collective::Broadcast | Collective::Reduce => (0, call.count),
            Collective::Barrier | Collective::SendRecv => (0, 0),
            Collective::AllGather => (own(), blocks()),
            Collective::ReduceScatter => (blocks(), own()),
            Collective::AllToAll => match &call.splits {
                Some((send, recv)) => (send.iter().sum(), recv.iter().sum()),
                None => (blocks(), blocks()),
            },
            Collective::Gather => (own(), at_root(blocks())),
            Collective::Scatter => (at_root(blocks()), own()),
        };
        match buf {
            Buf::Input => input,
            Buf::Output => output,
            Buf::Scratch => {
                let schedule = &self.schedules[rank];
                schedule.scratch_stride() * schedule.window / call.elem
            }
        }
    }

    /// Whether `Input` and `Output` are the same memory.
    pub(super) fn in_place(&self) -> bool {
        match self.calls[0].collective {
            Collective::AllReduce | Collective::Broadcast | Collective::Reduce | Collective::Barrier => true,
            Collective::AllGather
            | Collective::ReduceScatter
            | Collective::AllToAll
            | Collective::Gather
            | Collective::Scatter
            | Collective::SendRecv => false,
        }
    }
}
