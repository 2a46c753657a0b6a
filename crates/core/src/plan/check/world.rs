//! What is proven: the schedules of all ranks together.

use std::fmt;
use std::ops::Range;

use crate::call::Collective;
use crate::error::Result;
use crate::plan::data::{Buf, Schedule, Span};
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
    /// Whether the input of an all_gather is the rank's own block of its output, the output of a reduce_scatter that of its
    /// input, and the root's likewise of a gather and a scatter.
    pub own_blocks: bool,
}

/// How a rank's input and output lie.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Layout {
    Apart,
    /// The input begins so many elements into the output.
    InputInOutput(usize),
    OutputInInput(usize),
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
        let schedules = schedules.collect::<Result<_>>()?;
        Ok(World { schedules, shape: shape.clone(), calls, own_blocks: false })
    }

    /// The same calls in place, where that is not what they always are.
    #[must_use]
    pub fn in_place(self) -> World {
        World { own_blocks: true, ..self }
    }

    /// Elements that a rank gives, and of the result that it gets.
    fn lengths(&self, rank: usize) -> (usize, usize) {
        let (call, size) = (&self.calls[rank], self.shape.size());
        let blocks = || call.counts.as_ref().map_or(call.count * size, |c| c.iter().sum());
        let own = || call.counts.as_ref().map_or(call.count, |c| c[rank]);
        let at_root = |n: usize| if rank == call.root { n } else { 0 };
        match call.collective {
            Collective::AllReduce | Collective::Broadcast | Collective::Reduce => (call.count, call.count),
            Collective::Barrier | Collective::SendRecv => (0, 0),
            Collective::AllGather => (own(), blocks()),
            Collective::ReduceScatter => (blocks(), own()),
            Collective::AllToAll => match &call.splits {
                Some((send, recv)) => (send.iter().sum(), recv.iter().sum()),
                None => (blocks(), blocks()),
            },
            Collective::Gather => (own(), at_root(blocks())),
            Collective::Scatter => (at_root(blocks()), own()),
        }
    }

    /// Elements of all ranks' blocks before this rank's own.
    pub(super) fn before_own(&self, rank: usize) -> usize {
        let call = &self.calls[rank];
        call.counts.as_ref().map_or(call.count * rank, |c| c[..rank].iter().sum())
    }

    fn layout(&self, rank: usize) -> Layout {
        let call = &self.calls[rank];
        let own_block = || self.before_own(rank);
        match call.collective {
            Collective::AllReduce | Collective::Broadcast | Collective::Reduce => Layout::InputInOutput(0),
            Collective::AllGather if self.own_blocks => Layout::InputInOutput(own_block()),
            Collective::ReduceScatter if self.own_blocks => Layout::OutputInInput(own_block()),
            Collective::Gather if self.own_blocks && rank == call.root => Layout::InputInOutput(own_block()),
            Collective::Scatter if self.own_blocks && rank == call.root => Layout::OutputInInput(own_block()),
            Collective::AllGather
            | Collective::ReduceScatter
            | Collective::AllToAll
            | Collective::Gather
            | Collective::Scatter
            | Collective::Barrier
            | Collective::SendRecv => Layout::Apart,
        }
    }

    /// Elements of a buffer: none of one that lies in another.
    pub(super) fn elements(&self, rank: usize, buf: Buf) -> usize {
        let (input, output) = self.lengths(rank);
        match (buf, self.layout(rank)) {
            (Buf::Input, Layout::InputInOutput(_)) | (Buf::Output, Layout::OutputInInput(_)) => 0,
            (Buf::Input, _) => input,
            (Buf::Output, _) => output,
            (Buf::Scratch, _) => {
                let schedule = &self.schedules[rank];
                schedule.scratch_stride() * schedule.window / self.calls[rank].elem
            }
        }
    }

    /// A span of the buffer that its bytes are of, where one buffer lies in another.
    pub(super) fn home(&self, rank: usize, span: Span) -> Span {
        let bytes = |elements: usize| elements * self.calls[rank].elem;
        match (span.buf, self.layout(rank)) {
            (Buf::Input, Layout::InputInOutput(at)) => Span::output(span.off + bytes(at), span.len),
            (Buf::Output, Layout::OutputInInput(at)) => Span::input(span.off + bytes(at), span.len),
            _ => span,
        }
    }

    /// Where a rank's contribution lies, in elements.
    pub(super) fn given(&self, rank: usize) -> (Buf, Range<usize>) {
        let (input, _) = self.lengths(rank);
        match self.layout(rank) {
            Layout::InputInOutput(at) => (Buf::Output, at..at + input),
            Layout::Apart | Layout::OutputInInput(_) => (Buf::Input, 0..input),
        }
    }

    /// Where a rank finds the result, in elements.
    pub(super) fn result(&self, rank: usize) -> (Buf, Range<usize>) {
        let (_, output) = self.lengths(rank);
        match self.layout(rank) {
            Layout::OutputInInput(at) => (Buf::Input, at..at + output),
            Layout::Apart | Layout::InputInOutput(_) => (Buf::Output, 0..output),
        }
    }
}
