//! Proves schedules: runs those of all ranks on symbols instead of numbers.
//!
//! Every element is a symbol that knows which contributions it holds and how they were combined. Steps run in the
//! order that dependencies, the window and the node's order of phases allow, under the strictest reading of the
//! contract: a message moves when both sides have posted it, a phase when all ranks of the node have submitted it.
//! Since bytes that unordered steps share are refused (P2), any other order gives the same result, and looser
//! transports cannot block where this one does not.

use std::fmt;

mod expect;
mod far;
mod fault;
mod messages;
mod races;
mod run;
mod values;

pub use fault::{Blocked, Fault, Place, Way};

use super::select::{CallShape, Tuning, schedule};
use super::{Buf, Op, Plan, Schedule};
use crate::call::Collective;
use crate::error::Result;
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

    /// Proves P1 to P7, and that the result is the collective's.
    pub fn check(&self) -> Result<Report, Fault> {
        self.check_phases()?;
        for rank in 0..self.shape.size() {
            races::check(self, rank)?;
            if self.calls[rank].far {
                far::check(self, rank)?;
            }
        }
        messages::check(self)?;
        let mut run = run::Run::new(self);
        let report = run.run()?;
        expect::check(self, &run)?;
        Ok(report)
    }

    /// P3: what the ranks of a node do together is written alike in all their schedules.
    fn check_phases(&self) -> Result<(), Fault> {
        for node in 0..self.shape.node_count() {
            let ranks = self.shape.ranks_on(node);
            let first = &self.schedules[ranks[0] as usize];
            for &rank in &ranks[1..] {
                let other = &self.schedules[rank as usize];
                let differ = |what: &str| Fault::PhasesDiffer {
                    node,
                    rank: ranks[0] as usize,
                    other: rank as usize,
                    what: what.to_owned(),
                };
                if (first.rounds(), first.full_rounds, first.lag, first.round_bytes)
                    != (other.rounds(), other.full_rounds, other.lag, other.round_bytes)
                {
                    return Err(differ("their rounds"));
                }
                if moves(&first.body).ne(moves(&other.body)) {
                    return Err(differ("the phases of a full round"));
                }
                let tails = |s: &Schedule| s.tail.as_ref().map(|t| moves(t).collect::<Vec<_>>().len());
                let same = match (&first.tail, &other.tail) {
                    (Some(a), Some(b)) => moves(a).eq(moves(b)),
                    _ => tails(first) == tails(other),
                };
                if !same {
                    return Err(differ("the phases of the last round"));
                }
            }
        }
        Ok(())
    }

    /// Elements of a rank's buffer. `Input` is 0 where it is the same memory as `Output`.
    fn elements(&self, rank: usize, buf: Buf) -> usize {
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
    fn in_place(&self) -> bool {
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

fn moves(plan: &Plan) -> impl Iterator<Item = &Op> {
    plan.steps.iter().map(|s| &s.op).filter(|op| matches!(op, Op::Phase(_)))
}
