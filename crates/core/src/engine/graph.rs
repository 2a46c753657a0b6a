//! A schedule made ready to run: who depends on whom, and where the phases are.

use std::sync::Arc;

use crate::plan::{Plan, Schedule, StepId};

/// The dependency graph of one plan, forwards.
#[derive(Debug, Default)]
pub struct Graph {
    /// Dependencies each step waits for.
    pub needs: Vec<u16>,
    /// `dependents[starts[i]..starts[i + 1]]` wait for step `i`.
    starts: Vec<u32>,
    dependents: Vec<StepId>,
    /// Phases in lane order.
    pub phases: Vec<StepId>,
}

impl Graph {
    pub fn new(plan: &Plan) -> Graph {
        let n = plan.steps.len();
        let mut counts = vec![0u32; n + 1];
        for step in &plan.steps {
            for &d in &step.after {
                counts[d as usize + 1] += 1;
            }
        }
        for i in 0..n {
            counts[i + 1] += counts[i];
        }
        let starts = counts.clone();
        let mut fill = counts;
        let mut dependents = vec![0; starts[n] as usize];
        for (i, step) in plan.steps.iter().enumerate() {
            for &d in &step.after {
                let at = &mut fill[d as usize];
                dependents[*at as usize] = i as StepId;
                *at += 1;
            }
        }
        let needs = plan.steps.iter().map(|s| s.after.len() as u16).collect();
        Graph { needs, starts, dependents, phases: plan.phases() }
    }

    pub fn dependents(&self, step: StepId) -> &[StepId] {
        let i = step as usize;
        &self.dependents[self.starts[i] as usize..self.starts[i + 1] as usize]
    }
}

/// Scratch that a group always has: enough for a barrier on one node.
pub const SCRAP: usize = 64;

/// A schedule with the graphs of its plans.
#[derive(Debug)]
pub struct Ready {
    pub schedule: Schedule,
    body: Graph,
    tail: Option<Graph>,
    /// Phases of a round, at most.
    pub phases: usize,
    /// Nothing but a phase, with no more scratch than [`SCRAP`]: such a call can run on its caller's stack.
    pub is_plain: bool,
    /// Made for memory that the node's ranks share.
    pub is_shared: bool,
}

impl Ready {
    pub fn new(schedule: Schedule, is_shared: bool) -> Ready {
        let body = Graph::new(&schedule.body);
        let tail = schedule.tail.as_ref().map(|t| Graph::new(t));
        let phases = body.phases.len().max(tail.as_ref().map_or(0, |t| t.phases.len()));
        let one_round = schedule.full_rounds == 1 && tail.is_none();
        let only_a_phase = phases == 1 && schedule.body.steps.len() == 1;
        let is_plain = one_round && only_a_phase && schedule.scratch_stride() <= SCRAP;
        Ready { schedule, body, tail, phases, is_plain, is_shared }
    }

    pub fn graph(&self, round: usize) -> &Graph {
        match &self.tail {
            Some(tail) if round == self.schedule.full_rounds => tail,
            _ => &self.body,
        }
    }

    pub fn plan(&self, round: usize) -> &Arc<Plan> {
        self.schedule.plan(round)
    }

    /// Rounds that are ever open at once.
    pub fn window(&self) -> usize {
        self.schedule.window.clamp(1, self.schedule.rounds().max(1))
    }

    /// Scratch of the whole call.
    pub fn scratch(&self) -> usize {
        self.schedule.scratch_stride() * self.window()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::Collective;
    use crate::plan::{CallShape, Tuning, schedule};
    use crate::plan::{Op, Span};
    use crate::topology::GroupShape;

    #[test]
    fn dependents_mirror_dependencies() {
        let mut plan = Plan::default();
        let copy = || Op::Copy { dst: Span::output(0, 1), src: Span::input(0, 1) };
        let a = plan.push(copy(), &[]);
        let b = plan.push(Op::Phase(vec![]), &[a]);
        let c = plan.push(copy(), &[a, b]);
        let graph = Graph::new(&plan);
        assert_eq!(graph.needs, vec![0, 1, 2]);
        assert_eq!(graph.dependents(a), &[b, c]);
        assert_eq!(graph.dependents(b), &[c]);
        assert!(graph.dependents(c).is_empty());
        assert_eq!(graph.phases, vec![b]);
    }

    #[test]
    fn small_calls_within_a_node_can_run_on_their_callers_stack() {
        let shape = GroupShape::even(1, 3);
        for collective in Collective::PLANNED {
            let call = CallShape::new(collective, 4, 1);
            let schedule = schedule(&shape, 1, &call, &Tuning::default()).unwrap();
            assert!(Ready::new(schedule, false).is_plain, "{collective}");
        }
    }
}
