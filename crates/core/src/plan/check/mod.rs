//! Proves schedules: runs those of all ranks on symbols instead of numbers.
//!
//! Every element is a symbol that knows which contributions it holds and how they were combined. Steps run in the
//! order that dependencies, the window and the node's order of phases allow, under the strictest reading of the
//! contract: a message moves when both sides have posted it, a phase when all ranks of the node have submitted it.
//! Since bytes that unordered steps share are refused (P2), any other order gives the same result, and looser
//! transports cannot block where this one does not.

mod expect;
mod far;
mod fault;
mod messages;
mod races;
mod run;
mod values;
mod world;

pub use fault::{Blocked, Fault, Place, Way};
pub use world::{Report, World};

use super::data::{Op, Plan, Schedule};

impl World {
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
}

fn moves(plan: &Plan) -> impl Iterator<Item = &Op> {
    plan.steps.iter().map(|s| &s.op).filter(|op| matches!(op, Op::Phase(_)))
}
