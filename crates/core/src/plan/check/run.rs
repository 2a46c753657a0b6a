//! The symbolic executor.

use std::collections::HashMap;
use std::ops::Range;

use super::fault::{Blocked, Fault, Place, Way};
use super::values::{Cell, Values, Wrong};
use super::world::{Report, World};
use crate::call::Collective;
use crate::plan::data::{Buf, Move, Op, Plan, Schedule, Span, StepId, Who};

/// At most so many blocked steps are listed.
const LISTED: usize = 8;

/// Who waits for a step, from its plan.
struct Dependents {
    start: Vec<u32>,
    list: Vec<StepId>,
}

impl Dependents {
    fn new(plan: &Plan) -> Dependents {
        let mut start = vec![0u32; plan.steps.len() + 1];
        for &on in plan.steps.iter().flat_map(|s| &s.after) {
            start[on as usize + 1] += 1;
        }
        (1..start.len()).for_each(|i| start[i] += start[i - 1]);
        let mut list = vec![0; start.last().map_or(0, |&n| n as usize)];
        let mut at = start.clone();
        for (i, step) in plan.steps.iter().enumerate() {
            for &on in &step.after {
                list[at[on as usize] as usize] = i as StepId;
                at[on as usize] += 1;
            }
        }
        Dependents { start, list }
    }

    fn of(&self, step: usize) -> &[StepId] {
        &self.list[self.start[step] as usize..self.start[step + 1] as usize]
    }
}

/// A round in flight.
struct Flight {
    /// Unfinished dependencies by step.
    pending: Vec<u32>,
    /// By step: a phase that may be submitted.
    ready: Vec<bool>,
    left: usize,
}

struct RankState {
    body: Dependents,
    tail: Option<Dependents>,
    flights: HashMap<usize, Flight>,
    started: usize,
    /// Rounds 0..done are finished.
    done: usize,
    /// (round, step) of every phase, in the node's order.
    order: Vec<(usize, usize)>,
    submitted: usize,
    input: Vec<Cell>,
    output: Vec<Cell>,
    scratch: Vec<Cell>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    from: usize,
    to: usize,
    round: usize,
    tag: u32,
}

#[derive(Clone, Copy)]
struct Posted {
    place: Place,
    span: Span,
    is_send: bool,
}

pub(super) struct Run<'a> {
    world: &'a World,
    pub(super) values: Values,
    ranks: Vec<RankState>,
    ready: Vec<Place>,
    posted: HashMap<Key, Posted>,
    /// Phases run so far, by node.
    joined: Vec<usize>,
    /// Bytes (out, in), by node.
    links: Vec<(usize, usize)>,
    messages: usize,
}

impl<'a> Run<'a> {
    pub(super) fn new(world: &'a World) -> Run<'a> {
        let size = world.shape.size();
        Run {
            world,
            values: Values::new(size),
            ranks: (0..size).map(|r| state(world, r)).collect(),
            ready: Vec::new(),
            posted: HashMap::new(),
            joined: vec![0; world.shape.node_count()],
            links: vec![(0, 0); world.shape.node_count()],
            messages: 0,
        }
    }

    pub(super) fn cells(&self, rank: usize, buf: Buf) -> &[Cell] {
        let state = &self.ranks[rank];
        match buf {
            Buf::Input => &state.input,
            Buf::Output => &state.output,
            Buf::Scratch => &state.scratch,
        }
    }

    pub(super) fn run(&mut self) -> Result<Report, Fault> {
        for rank in 0..self.ranks.len() {
            self.start_rounds(rank);
            while let Some(place) = self.ready.pop() {
                self.step(place)?;
            }
        }
        if self.ranks.iter().enumerate().any(|(r, s)| s.done < self.world.schedules[r].rounds()) {
            return Err(self.stuck());
        }
        self.check_links()?;
        let schedules = &self.world.schedules;
        Ok(Report {
            messages: self.messages,
            sent: self.links.iter().map(|l| l.0).max().unwrap_or(0),
            received: self.links.iter().map(|l| l.1).max().unwrap_or(0),
            rounds: schedules[0].rounds(),
            scratch: schedules.iter().map(|s| s.scratch_stride() * s.window).max().unwrap_or(0),
        })
    }

    fn schedule(&self, rank: usize) -> &'a Schedule {
        &self.world.schedules[rank]
    }

    /// Starts the rounds that the window allows.
    fn start_rounds(&mut self, rank: usize) {
        let schedule = self.schedule(rank);
        loop {
            let state = &mut self.ranks[rank];
            let round = state.started;
            if round >= schedule.rounds() || round >= state.done + schedule.window {
                return;
            }
            state.started += 1;
            let plan = schedule.plan(round);
            let pending: Vec<u32> = plan.steps.iter().map(|s| s.after.len() as u32).collect();
            let first = pending.iter().enumerate().rev().filter(|(_, p)| **p == 0);
            self.ready.extend(first.map(|(step, _)| Place { rank, round, step }));
            let flight = Flight { ready: vec![false; pending.len()], left: pending.len(), pending };
            let empty = flight.left == 0;
            state.flights.insert(round, flight);
            if empty {
                self.end_rounds(rank);
            }
        }
    }

    /// Retires finished rounds in order.
    fn end_rounds(&mut self, rank: usize) {
        let state = &mut self.ranks[rank];
        while state.flights.get(&state.done).is_some_and(|f| f.left == 0) {
            state.flights.remove(&state.done);
            state.done += 1;
        }
    }

    fn complete(&mut self, place: Place) {
        let schedule = self.schedule(place.rank);
        let state = &mut self.ranks[place.rank];
        let dependents = match &state.tail {
            Some(tail) if place.round == schedule.full_rounds => tail,
            _ => &state.body,
        };
        let Some(flight) = state.flights.get_mut(&place.round) else { return };
        for &next in dependents.of(place.step) {
            flight.pending[next as usize] -= 1;
            if flight.pending[next as usize] == 0 {
                self.ready.push(Place { step: next as usize, ..place });
            }
        }
        flight.left -= 1;
        if flight.left == 0 {
            self.end_rounds(place.rank);
            self.start_rounds(place.rank);
        }
    }

    fn step(&mut self, place: Place) -> Result<(), Fault> {
        let plan = self.schedule(place.rank).plan(place.round);
        match &plan.steps[place.step].op {
            Op::Phase(_) => self.submit(place)?,
            &Op::Send { to, src, tag } => {
                let key = Key { from: place.rank, to: to as usize, round: place.round, tag };
                self.post(key, Posted { place, span: src, is_send: true })?;
            }
            &Op::Recv { from, dst, tag } => {
                let key = Key { from: from as usize, to: place.rank, round: place.round, tag };
                self.post(key, Posted { place, span: dst, is_send: false })?;
            }
            Op::Reduce { dst, srcs, finish } => {
                let sources: Vec<(usize, Span)> = srcs.iter().map(|s| (place.rank, *s)).collect();
                let cells = self.combine(place, &sources, *finish)?;
                self.write(place.rank, place.round, *dst, &cells);
                self.complete(place);
            }
            Op::Copy { dst, src } => {
                let cells = self.combine(place, &[(place.rank, *src)], false)?;
                self.write(place.rank, place.round, *dst, &cells);
                self.complete(place);
            }
        }
        Ok(())
    }

    /// One side of a message; it moves when the other side is there.
    fn post(&mut self, key: Key, mine: Posted) -> Result<(), Fault> {
        let Some(other) = self.posted.remove(&key) else {
            self.posted.insert(key, mine);
            return Ok(());
        };
        let (send, recv) = if mine.is_send { (mine, other) } else { (other, mine) };
        let cells = self.combine(send.place, &[(key.from, send.span)], false)?;
        self.write(key.to, key.round, recv.span, &cells);
        self.messages += 1;
        let (from, to) = (self.world.shape.node_of(key.from), self.world.shape.node_of(key.to));
        if from != to {
            self.links[from].0 += send.span.len;
            self.links[to].1 += send.span.len;
        }
        self.complete(send.place);
        self.complete(recv.place);
        Ok(())
    }

    /// A rank is ready for a phase. Phases are submitted in order, and run when all ranks of the node have.
    fn submit(&mut self, place: Place) -> Result<(), Fault> {
        let state = &mut self.ranks[place.rank];
        if let Some(flight) = state.flights.get_mut(&place.round) {
            flight.ready[place.step] = true;
        }
        let is_ready = |s: &RankState, (round, step): (usize, usize)| {
            s.flights.get(&round).is_some_and(|f| f.ready[step])
        };
        while state.order.get(state.submitted).is_some_and(|&next| is_ready(state, next)) {
            state.submitted += 1;
        }
        let node = self.world.shape.node_of(place.rank);
        let members = self.world.shape.ranks_on(node);
        while members.iter().all(|&r| self.ranks[r as usize].submitted > self.joined[node]) {
            let number = self.joined[node];
            self.joined[node] += 1;
            self.phase(members, number)?;
        }
        Ok(())
    }

    fn phase(&mut self, members: &[u32], number: usize) -> Result<(), Fault> {
        let place = |run: &Run<'_>, r: u32| {
            let (round, step) = run.ranks[r as usize].order[number];
            Place { rank: r as usize, round, step }
        };
        let first = place(self, members[0]);
        let plan = self.schedule(first.rank).plan(first.round);
        let Op::Phase(moves) = &plan.steps[first.step].op else { return Ok(()) };
        // All are read before any is written: moves of a phase do not see each other.
        let mut results: Vec<(&Move, Vec<Cell>)> = Vec::with_capacity(moves.len());
        for m in moves {
            let sources: Vec<(usize, Span)> = match m.from {
                Who::One(l) => vec![(members[l as usize] as usize, m.src)],
                Who::All => members.iter().map(|&r| (r as usize, m.src)).collect(),
            };
            results.push((m, self.combine(first, &sources, m.finish && m.from == Who::All)?));
        }
        for (m, cells) in results {
            match m.to {
                Who::One(l) => self.write(members[l as usize] as usize, first.round, m.dst, &cells),
                Who::All => members.iter().for_each(|&r| self.write(r as usize, first.round, m.dst, &cells)),
            }
        }
        for &r in members {
            let done = place(self, r);
            self.complete(done);
        }
        Ok(())
    }

    /// Where `span` lies in a rank's cells in a round, in elements.
    fn place(&self, rank: usize, round: usize, span: Span) -> (Buf, Range<usize>) {
        let (schedule, span) = (self.schedule(rank), self.world.home(rank, span));
        let shift = match span.buf {
            Buf::Scratch => round % schedule.window * schedule.scratch_stride(),
            Buf::Input | Buf::Output => round * schedule.round_bytes,
        };
        let elem = self.world.calls[rank].elem;
        let from = (span.off + shift) / elem;
        (span.buf, from..from + span.len / elem)
    }

    fn source(&self, rank: usize, round: usize, span: Span) -> &[Cell] {
        let (buf, range) = self.place(rank, round, span);
        if range.is_empty() { &[] } else { &self.cells(rank, buf)[range] }
    }

    fn write(&mut self, rank: usize, round: usize, span: Span, cells: &[Cell]) {
        let (buf, range) = self.place(rank, round, span);
        if range.is_empty() {
            return;
        }
        let state = &mut self.ranks[rank];
        let buf = match buf {
            Buf::Input => &mut state.input,
            Buf::Output => &mut state.output,
            Buf::Scratch => &mut state.scratch,
        };
        buf[range].copy_from_slice(cells);
    }

    /// The sources' cells combined one by one, on behalf of `place`.
    fn combine(&mut self, place: Place, sources: &[(usize, Span)], finish: bool) -> Result<Vec<Cell>, Fault> {
        let slices: Vec<Vec<Cell>> =
            sources.iter().map(|&(rank, span)| self.source(rank, place.round, span).to_vec()).collect();
        let base = self.place(sources[0].0, place.round, sources[0].1).1.start;
        let mut result = slices[0].clone();
        let mut parts = Vec::with_capacity(slices.len());
        let mut known = None;
        for (i, cell) in result.iter_mut().enumerate() {
            let element = base + i;
            if let Some(other) =
                slices.iter().find(|s| s[i].element != cell.element || !s[i].value.is_defined())
            {
                if !other[i].value.is_defined() {
                    return Err(Fault::Undefined { place, element });
                }
                let (one, other) = (cell.element as usize, other[i].element as usize);
                return Err(Fault::Mixed { place, element, one, other });
            }
            // Neighbours mostly have the same history.
            if known.is_none() || slices.iter().zip(&parts).any(|(s, p)| s[i].value != *p) {
                parts.clear();
                parts.extend(slices.iter().map(|s| s[i].value));
                known = Some(self.values.combine(&parts, finish).map_err(|wrong| match wrong {
                    Wrong::Twice(contributor) => Fault::Twice { place, element, contributor },
                    Wrong::Finished => Fault::CombinedAfterFinish { place, element },
                })?);
            }
            cell.value = known.unwrap_or(cell.value);
        }
        Ok(result)
    }

    fn check_links(&self) -> Result<(), Fault> {
        for (node, &(sent, received)) in self.links.iter().enumerate() {
            let stated =
                self.world.shape.ranks_on(node).iter().map(|&r| self.schedule(r as usize).link_bytes);
            // With splits a rank knows its own traffic only.
            let own_only = self.world.calls[0].splits.is_some();
            let bound = if own_only { stated.sum() } else { stated.min().unwrap_or(0) };
            for (way, bytes) in [(Way::Out, sent), (Way::In, received)] {
                if bytes > bound {
                    return Err(Fault::Link { node, way, bytes, bound });
                }
            }
        }
        Ok(())
    }

    /// Nothing moves any more, though every message has its counterpart.
    fn stuck(&self) -> Fault {
        let mut posted: Vec<(&Key, &Posted)> = self.posted.iter().collect();
        posted.sort_by_key(|(_, p)| (p.place.round, p.place.rank, p.place.step));
        let mut blocked: Vec<Blocked> = posted
            .into_iter()
            .map(|(key, p)| {
                let peer = if p.is_send { key.to } else { key.from };
                Blocked { place: p.place, waiting: format!("rank {peer} to post tag {}", key.tag) }
            })
            .collect();
        for (rank, state) in self.ranks.iter().enumerate() {
            let node = self.world.shape.node_of(rank);
            let waits = state.order.get(self.joined[node]).filter(|_| state.submitted > self.joined[node]);
            if let Some(&(round, step)) = waits {
                let late = |r: &&u32| self.ranks[**r as usize].submitted <= self.joined[node];
                let missing: Vec<&u32> = self.world.shape.ranks_on(node).iter().filter(late).collect();
                let waiting = format!("ranks {missing:?} to submit the phase");
                blocked.push(Blocked { place: Place { rank, round, step }, waiting });
            }
        }
        let count = blocked.len();
        blocked.truncate(LISTED);
        Fault::Deadlock { count, blocked }
    }
}

fn state(world: &World, rank: usize) -> RankState {
    let schedule = &world.schedules[rank];
    let (holder, given) = world.given(rank);
    let cells = |buf: Buf| {
        let mut cells = vec![Cell::UNDEFINED; world.elements(rank, buf)];
        if buf == holder {
            cells[given.clone()].iter_mut().enumerate().for_each(|(i, cell)| *cell = Cell::of(i, rank));
        }
        cells
    };
    let mut scratch = cells(Buf::Scratch);
    if let (Collective::Barrier, Some(first)) = (world.calls[rank].collective, scratch.first_mut()) {
        *first = Cell::of(0, rank);
    }
    RankState {
        body: Dependents::new(&schedule.body),
        tail: schedule.tail.as_ref().map(|t| Dependents::new(t)),
        flights: HashMap::new(),
        started: 0,
        done: 0,
        order: phase_order(schedule),
        submitted: 0,
        input: cells(Buf::Input),
        output: cells(Buf::Output),
        scratch,
    }
}

/// Every phase of every round by its place, see [`Schedule`].
fn phase_order(schedule: &Schedule) -> Vec<(usize, usize)> {
    let mut order = Vec::new();
    for round in 0..schedule.rounds() {
        for (i, step) in schedule.plan(round).phases().into_iter().enumerate() {
            order.push(((round + i * schedule.lag, i), (round, step as usize)));
        }
    }
    order.sort_unstable();
    order.into_iter().map(|(_, phase)| phase).collect()
}
