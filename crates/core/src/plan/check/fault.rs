//! What can be wrong with schedules, said so that it can be found.

use std::fmt;

use crate::plan::data::{Buf, Span};

/// A step of a rank in a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub rank: usize,
    pub round: usize,
    pub step: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {}, round {}, step {}", self.rank, self.round, self.step)
    }
}

/// A step that could not finish, and what it waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocked {
    pub place: Place,
    pub waiting: String,
}

impl fmt::Display for Blocked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} waits for {}", self.place, self.waiting)
    }
}

/// The way over a link, seen from the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    Out,
    In,
}

/// The first thing found wrong. Elements are indices of the buffer they are found in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    #[error("P1: rank {rank}, step {step} depends on step {on}, which does not come before it")]
    Forward { rank: usize, step: usize, on: usize },

    #[error("P2: rank {rank}: steps {first} and {second}{} touch bytes {from}..{to} of {buf:?} unordered",
        rounds(*.apart))]
    Race { rank: usize, first: usize, second: usize, apart: usize, buf: Buf, from: usize, to: usize },

    #[error("P3: node {node}: ranks {rank} and {other} differ in {what}")]
    PhasesDiffer { node: usize, rank: usize, other: usize, what: String },

    #[error("ranks {rank} and {other} cut the call in different rounds")]
    RoundsDiffer { rank: usize, other: usize },

    #[error("P4: rank {rank}, step {step}: tag {tag} with rank {peer} is used twice in a round")]
    Tag { rank: usize, step: usize, peer: usize, tag: u32 },

    #[error("P4: {place}: {what} with tag {tag}: rank {peer} has no counterpart")]
    Unmatched { place: Place, what: &'static str, peer: usize, tag: u32 },

    #[error("P4: {place} sends {sent} bytes with tag {tag}, rank {to} expects {expected}")]
    Length { place: Place, to: usize, tag: u32, sent: usize, expected: usize },

    #[error("P4: deadlock: {count} steps are blocked: {}", list(blocked))]
    Deadlock { count: usize, blocked: Vec<Blocked> },

    #[error("rank {rank}, step {step}: {what}")]
    Malformed { rank: usize, step: usize, what: String },

    #[error("rank {rank}, step {step}: {span:?} ends beyond the {limit} bytes there are")]
    Bounds { rank: usize, step: usize, span: Span, limit: usize },

    #[error("P5: {place} reads element {element}, which nothing has written")]
    Undefined { place: Place, element: usize },

    #[error("P5: {place}: at {element} it combines element {one} with element {other}")]
    Mixed { place: Place, element: usize, one: usize, other: usize },

    #[error("P5: {place}: at {element} rank {contributor}'s contribution enters twice")]
    Twice { place: Place, element: usize, contributor: usize },

    #[error("P5: {place}: at {element} it combines what `finish` has been applied to")]
    CombinedAfterFinish { place: Place, element: usize },

    #[error(
        "P5: rank {rank}: element {element} of the result holds element {holds} of the input, not {wanted}"
    )]
    WrongElement { rank: usize, element: usize, holds: usize, wanted: usize },

    #[error("P5: rank {rank}: element {element} of the result lacks {missing:?} and has {excess:?} too much")]
    WrongContributors { rank: usize, element: usize, missing: Vec<usize>, excess: Vec<usize> },

    #[error("P5: rank {rank}: nothing wrote element {element} of the result")]
    Unwritten { rank: usize, element: usize },

    #[error("P5: rank {rank}: element {element} of the result was {}", if *.finished { "finished, though nothing is reduced" } else { "never finished" })]
    Finish { rank: usize, element: usize, finished: bool },

    #[error("P5: ranks {rank} and {other} combine element {element} in different orders")]
    Association { rank: usize, other: usize, element: usize },

    #[error("rank {rank}: element {element} of {buf:?} was overwritten, and is not this rank's to change")]
    Clobbered { rank: usize, buf: Buf, element: usize },

    #[error("P7: rank {rank}, step {step}: {what}")]
    Far { rank: usize, step: usize, what: String },

    #[error("P6: node {node}: {bytes} bytes go {} over the link, stated are {bound}", if *.way == Way::Out { "out" } else { "in" })]
    Link { node: usize, way: Way, bytes: usize, bound: usize },
}

fn rounds(apart: usize) -> String {
    match apart {
        0 => String::new(),
        1 => " of successive rounds".to_owned(),
        n => format!(" of rounds {n} apart"),
    }
}

fn list(blocked: &[Blocked]) -> String {
    blocked.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}
