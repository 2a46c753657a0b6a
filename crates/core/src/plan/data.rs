//! The data itself: spans, steps, the plan of a round, the schedule of a call.

use std::sync::Arc;

use crate::call::Collective;

/// Which buffer a span lies in. For in-place calls `Input` and `Output` are the same memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Buf {
    Input,
    Output,
    Scratch,
}

/// The buffer whose data other ranks read in a call of `collective`: what is shared where a call works in shared memory.
pub const fn source_of(collective: Collective) -> Buf {
    match collective {
        Collective::AllReduce | Collective::Broadcast | Collective::Reduce => Buf::Output,
        Collective::AllGather
        | Collective::ReduceScatter
        | Collective::AllToAll
        | Collective::Gather
        | Collective::Scatter
        | Collective::Barrier
        | Collective::SendRecv => Buf::Input,
    }
}

/// `len` bytes from `off`. User-buffer offsets are those of round 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Span {
    pub buf: Buf,
    pub off: usize,
    pub len: usize,
}

impl Span {
    pub const fn input(off: usize, len: usize) -> Span {
        Span { buf: Buf::Input, off, len }
    }
    pub const fn output(off: usize, len: usize) -> Span {
        Span { buf: Buf::Output, off, len }
    }
    pub const fn scratch(off: usize, len: usize) -> Span {
        Span { buf: Buf::Scratch, off, len }
    }
}

/// The local ranks at one end of a [`Move`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Who {
    /// Local rank within the node.
    One(u32),
    All,
}

/// A movement inside a node. `from: All` combines every local rank's `src` (in local-rank order); `to: All` puts the
/// result at `dst` of every local rank. `src` and `dst` have equal lengths; each is a span of the rank it applies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Move {
    pub from: Who,
    pub to: Who,
    pub src: Span,
    pub dst: Span,
    /// With `from: All`: this combination is the last (`Avg` divides here).
    pub finish: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// All local ranks together; moves of one phase do not depend on each other.
    Phase(Vec<Move>),
    /// To group rank `to`. `tag` is unique among the plan's messages from this rank to that one.
    Send {
        to: u32,
        src: Span,
        tag: u32,
    },
    Recv {
        from: u32,
        dst: Span,
        tag: u32,
    },
    /// `dst` = combination of `srcs` in that order, accumulated at once; `dst` may be one of them.
    Reduce {
        dst: Span,
        srcs: Vec<Span>,
        finish: bool,
    },
    Copy {
        dst: Span,
        src: Span,
    },
}

/// Index of a step in its plan.
pub type StepId = u32;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    pub op: Op,
    pub after: Vec<StepId>,
}

/// One round of one rank.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    pub steps: Vec<Step>,
    /// Bytes of scratch one round needs.
    pub scratch: usize,
}

impl Plan {
    pub fn push(&mut self, op: Op, after: &[StepId]) -> StepId {
        self.steps.push(Step { op, after: after.to_vec() });
        (self.steps.len() - 1) as StepId
    }

    /// Reserves `len` bytes of scratch, aligned to 64.
    pub fn reserve(&mut self, len: usize) -> Span {
        let off = self.scratch.next_multiple_of(64);
        self.scratch = off + len;
        Span::scratch(off, len)
    }

    /// Indices of the phases, in the order in which this node runs them.
    pub fn phases(&self) -> Vec<StepId> {
        let is_phase = |s: &Step| matches!(s.op, Op::Phase(_));
        self.steps.iter().enumerate().filter(|(_, s)| is_phase(s)).map(|(i, _)| i as StepId).collect()
    }
}

/// The whole call of one rank: `full_rounds` rounds of `body`, `round_bytes` apart, then `tail` if there is one.
///
/// Phase `i` of round `c` has place `(c + i * lag, i)` in the node's order of phases: with `lag` 1 and two phases
/// that is P0R0, P0R1, P1R0, P0R2, P1R1, ...
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// As the selection table names it, e.g. "hierarchical(sharded)".
    pub algorithm: &'static str,
    pub body: Arc<Plan>,
    pub full_rounds: usize,
    pub tail: Option<Arc<Plan>>,
    /// Bytes of the user's buffer that one full round covers (the shift between rounds).
    pub round_bytes: usize,
    /// Rounds in flight at once; each has its own scratch. Round `c` begins when rounds up to `c - window` are over.
    /// At least `lag * (phases - 1) + 1`, where there are so many rounds.
    pub window: usize,
    pub lag: usize,
    /// Bytes this rank's node may send over its link in the whole call, at most (the stated bound of P6); likewise
    /// receive. In an uneven all_to_all, whose sizes no rank knows alone: this rank's own share.
    pub link_bytes: usize,
}

/// The algorithm of calls without elements.
const NOTHING: &str = "nothing";

impl Schedule {
    pub fn rounds(&self) -> usize {
        self.full_rounds + usize::from(self.tail.is_some())
    }

    /// What a call without elements does, on every rank: it meets nobody, so it may come before another call on one rank
    /// and after it on the next.
    pub fn nothing() -> Schedule {
        Schedule::single(NOTHING, Plan::default(), 0)
    }

    pub fn is_nothing(&self) -> bool {
        self.algorithm == NOTHING
    }

    /// The plan of round `round`.
    pub fn plan(&self, round: usize) -> &Arc<Plan> {
        match &self.tail {
            Some(tail) if round == self.full_rounds => tail,
            _ => &self.body,
        }
    }

    /// Scratch of one round, rounded to a cache line.
    pub fn scratch_stride(&self) -> usize {
        let tail = self.tail.as_ref().map_or(0, |t| t.scratch);
        self.body.scratch.max(tail).next_multiple_of(64)
    }

    /// One round without chunking.
    pub fn single(algorithm: &'static str, plan: Plan, link_bytes: usize) -> Schedule {
        Schedule {
            algorithm,
            body: Arc::new(plan),
            full_rounds: 1,
            tail: None,
            round_bytes: 0,
            window: 1,
            lag: 1,
            link_bytes,
        }
    }
}
