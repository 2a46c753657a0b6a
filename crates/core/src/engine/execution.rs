//! The interpreter: runs one rank's schedule over a node-local transport and a fabric, without ever blocking.
//!
//! Invariants
//! - **X1** a step starts when all steps it names have completed, never earlier.
//! - **X2** phases are submitted in the order of [`Schedule`](crate::plan::Schedule)'s places, on every rank alike.
//! - **X3** round `c` opens only when round `c - window` has completed, so scratch is never shared by two open rounds.

use std::sync::Arc;

use crate::call::PackedCall;
use crate::engine::graph::Ready;
use crate::error::{Error, Result};
use crate::far::FarCall;
use crate::memory::Region;
use crate::plan::{Op, Span, StepId};
use crate::reduce;
use crate::transport::{Arith, Buffers, Ctx, Fabric, Message, MsgKey, NodeLocal, PhaseRun};

/// How group ranks are reached.
#[derive(Clone, Copy, Debug)]
pub enum Route {
    /// Local rank on this node.
    Local(u32),
    /// Peer id of the fabric.
    Fabric(u32),
}

/// What an execution works with while it advances.
pub struct Hands<'a, L, F> {
    pub local: &'a mut L,
    pub fabric: Option<&'a mut F>,
    /// By group rank.
    pub routes: &'a [Route],
}

/// Step and round of a completion, inside the 32 low bits of a [`Ctx`].
const STEP_BITS: u32 = 24;

/// One round in flight.
#[derive(Debug, Default)]
struct Round {
    number: usize,
    /// Steps not completed; 0: the slot is free.
    left: usize,
    needs: Vec<u16>,
}

/// Storage that outlives one execution, so that the next allocates nothing.
#[derive(Debug, Default)]
pub struct Workspace {
    rounds: Vec<Round>,
    /// (slot, step) whose dependencies are met; phases wait for their place in the lane instead.
    ready: Vec<(u32, StepId)>,
    sources: Vec<Region>,
}

/// One call in progress.
pub struct Execution {
    ready: Arc<Ready>,
    buffers: Buffers,
    far: Option<FarCall>,
    arith: Arith,
    call: PackedCall,
    group: u64,
    seq: u64,
    /// High bits of every Ctx of this execution.
    mark: u64,
    work: Workspace,
    next_round: usize,
    finished_rounds: usize,
    /// Place in the lane: wave and phase index.
    wave: usize,
    phase: usize,
    /// Messages given to the fabric and not yet completed.
    pub on_fabric: usize,
    /// Phases completed, of all rounds.
    pub phases_done: usize,
}

/// Everything that identifies a call to the interpreter.
pub struct Start {
    pub ready: Arc<Ready>,
    pub buffers: Buffers,
    pub far: Option<FarCall>,
    pub arith: Arith,
    pub call: PackedCall,
    pub group: u64,
    pub seq: u64,
    pub mark: u64,
}

impl Execution {
    pub fn new(start: Start, mut work: Workspace) -> Execution {
        let window = start.ready.window();
        work.ready.clear();
        work.rounds.resize_with(window.max(work.rounds.len()), Round::default);
        for round in &mut work.rounds {
            round.left = 0;
        }
        Execution {
            ready: start.ready,
            buffers: start.buffers,
            far: start.far,
            arith: start.arith,
            call: start.call,
            group: start.group,
            seq: start.seq,
            mark: start.mark,
            work,
            next_round: 0,
            finished_rounds: 0,
            wave: 0,
            phase: 0,
            on_fabric: 0,
            phases_done: 0,
        }
    }

    /// Of a [plain](Ready::is_plain) schedule whose phase is with the transport.
    pub fn begun(start: Start, work: Workspace) -> Execution {
        let mut execution = Execution::new(start, work);
        execution.open_rounds();
        execution.phase = 1;
        execution
    }

    /// Takes the storage back.
    pub fn into_workspace(self) -> Workspace {
        self.work
    }

    pub fn is_done(&self) -> bool {
        self.finished_rounds == self.ready.schedule.rounds()
    }

    /// Starts whatever can start. True when anything did.
    pub fn advance<L: NodeLocal, F: Fabric>(&mut self, hands: &mut Hands<'_, L, F>) -> Result<bool> {
        let mut moved = false;
        loop {
            let mut again = self.open_rounds();
            while let Some((slot, step)) = self.work.ready.pop() {
                self.run(slot as usize, step, hands)?;
                again = true;
            }
            while self.submit_phase(hands)? {
                again = true;
            }
            if !again {
                return Ok(moved);
            }
            moved = true;
        }
    }

    /// A step this execution gave to a transport is done; `low` are the low bits of its mark.
    pub fn complete(&mut self, low: u32) -> Result<()> {
        let slot = (low >> STEP_BITS) as usize;
        let step = low & ((1 << STEP_BITS) - 1);
        let Some(round) = self.work.rounds.get(slot).filter(|r| r.left > 0) else {
            return Err(Error::Internal(format!("completion {low:#x} for a round that is not open")));
        };
        let plan = self.ready.plan(round.number);
        match plan.steps.get(step as usize).map(|s| &s.op) {
            Some(Op::Send { .. } | Op::Recv { .. }) => self.on_fabric = self.on_fabric.saturating_sub(1),
            Some(Op::Phase(_)) => self.phases_done += 1,
            Some(Op::Reduce { .. } | Op::Copy { .. }) | None => {
                return Err(Error::Internal(format!("completion {low:#x} names no message or phase")));
            }
        }
        self.finish_step(slot, step);
        Ok(())
    }

    /// Opens as many rounds as the window allows (X3).
    fn open_rounds(&mut self) -> bool {
        let total = self.ready.schedule.rounds();
        let window = self.ready.window();
        let mut opened = false;
        while self.next_round < total {
            let slot = self.next_round % window;
            if self.work.rounds[slot].left > 0 {
                break;
            }
            let graph = self.ready.graph(self.next_round);
            let steps = graph.needs.len();
            let round = &mut self.work.rounds[slot];
            round.number = self.next_round;
            round.left = steps;
            round.needs.clear();
            round.needs.extend_from_slice(&graph.needs);
            self.next_round += 1;
            opened = true;
            if steps == 0 {
                self.finished_rounds += 1;
                continue;
            }
            let plan = self.ready.plan(round.number);
            for (i, &needs) in graph.needs.iter().enumerate() {
                if needs == 0 && !matches!(plan.steps[i].op, Op::Phase(_)) {
                    self.work.ready.push((slot as u32, i as StepId));
                }
            }
        }
        opened
    }

    /// X2: submits the phase whose turn it is, when its dependencies are met.
    fn submit_phase<L: NodeLocal, F: Fabric>(&mut self, hands: &mut Hands<'_, L, F>) -> Result<bool> {
        let schedule = &self.ready.schedule;
        let (total, lag) = (schedule.rounds(), schedule.lag);
        loop {
            if self.ready.phases == 0 || self.wave >= total + (self.ready.phases - 1) * lag {
                return Ok(false);
            }
            if self.phase >= self.ready.phases {
                self.phase = 0;
                self.wave += 1;
                continue;
            }
            let number = match self.wave.checked_sub(self.phase * lag) {
                Some(number) if number < total => number,
                _ => {
                    self.phase += 1;
                    continue;
                }
            };
            let Some(&step) = self.ready.graph(number).phases.get(self.phase) else {
                self.phase += 1;
                continue;
            };
            let slot = number % self.ready.window();
            let round = &self.work.rounds[slot];
            if round.number != number || round.left == 0 || round.needs[step as usize] > 0 {
                return Ok(false);
            }
            hands.local.submit(PhaseRun {
                plan: Arc::clone(self.ready.plan(number)),
                step,
                shift: number * schedule.round_bytes,
                buffers: self.round_buffers(slot),
                arith: self.arith,
                call: self.call,
                seq: self.seq,
                ctx: self.ctx(slot, step),
            })?;
            self.phase += 1;
            return Ok(true);
        }
    }

    fn ctx(&self, slot: usize, step: StepId) -> Ctx {
        Ctx(self.mark | (slot as u64) << STEP_BITS | u64::from(step))
    }

    fn round_buffers(&self, slot: usize) -> Buffers {
        let stride = self.ready.schedule.scratch_stride();
        if stride == 0 {
            return self.buffers;
        }
        Buffers { scratch: self.buffers.scratch.slice(slot * stride, stride), ..self.buffers }
    }

    fn run<L: NodeLocal, F: Fabric>(
        &mut self,
        slot: usize,
        step: StepId,
        hands: &mut Hands<'_, L, F>,
    ) -> Result<()> {
        let number = self.work.rounds[slot].number;
        let buffers = self.round_buffers(slot);
        let shift = number * self.ready.schedule.round_bytes;
        let ready = Arc::clone(&self.ready);
        match &ready.plan(number).steps[step as usize].op {
            Op::Phase(_) => Err(Error::Internal("a phase outside the lane".to_owned())),
            Op::Send { to, src, tag } => {
                let region = self.of_message(&buffers, *src, shift);
                let message = self.message(slot, step, number, *to, *tag, region);
                self.post(hands, *to as usize, message, true)
            }
            Op::Recv { from, dst, tag } => {
                let region = self.of_message(&buffers, *dst, shift);
                let message = self.message(slot, step, number, *from, *tag, region);
                self.post(hands, *from as usize, message, false)
            }
            Op::Reduce { dst, srcs, finish } => {
                let mut sources = std::mem::take(&mut self.work.sources);
                sources.clear();
                sources.extend(srcs.iter().map(|s| buffers.at(*s, shift)));
                reduce::combine(self.arith, *finish, buffers.at(*dst, shift), &sources);
                self.work.sources = sources;
                self.finish_step(slot, step);
                Ok(())
            }
            Op::Copy { dst, src } => {
                buffers.at(*dst, shift).copy_from(buffers.at(*src, shift));
                self.finish_step(slot, step);
                Ok(())
            }
        }
    }

    /// Where the bytes of a message lie. Far calls have one round: nothing is shifted (F4).
    fn of_message(&self, buffers: &Buffers, span: Span, shift: usize) -> Region {
        self.far.and_then(|far| far.of_message(span)).unwrap_or_else(|| buffers.at(span, shift))
    }

    fn message(
        &self,
        slot: usize,
        step: StepId,
        number: usize,
        peer: u32,
        tag: u32,
        region: Region,
    ) -> Message {
        Message {
            key: MsgKey { group: self.group, seq: self.seq, tag: (number as u64) << 32 | u64::from(tag) },
            peer,
            peer_rank: peer,
            region,
            call: self.call,
            ctx: self.ctx(slot, step),
        }
    }

    fn post<L: NodeLocal, F: Fabric>(
        &mut self,
        hands: &mut Hands<'_, L, F>,
        rank: usize,
        mut message: Message,
        send: bool,
    ) -> Result<()> {
        self.on_fabric += 1;
        post(hands, rank, &mut message, send)
    }

    fn finish_step(&mut self, slot: usize, step: StepId) {
        let round = &mut self.work.rounds[slot];
        let number = round.number;
        round.left -= 1;
        if round.left == 0 {
            self.finished_rounds += 1;
            return;
        }
        let plan = self.ready.plan(number);
        for &next in self.ready.graph(number).dependents(step) {
            let needs = &mut round.needs[next as usize];
            *needs -= 1;
            if *needs == 0 && !matches!(plan.steps[next as usize].op, Op::Phase(_)) {
                self.work.ready.push((slot as u32, next));
            }
        }
    }
}

/// Gives a message to the transport that reaches `rank`.
pub fn post<L: NodeLocal, F: Fabric>(
    hands: &mut Hands<'_, L, F>,
    rank: usize,
    message: &mut Message,
    send: bool,
) -> Result<()> {
    match hands.routes[rank] {
        Route::Local(local) => {
            message.peer = local;
            if send { hands.local.send(*message) } else { hands.local.recv(*message) }
        }
        Route::Fabric(id) => {
            message.peer = id;
            match &mut hands.fabric {
                Some(fabric) if send => fabric.send(*message),
                Some(fabric) => fabric.recv(*message),
                None => Err(Error::Internal("a group over several nodes without a fabric".to_owned())),
            }
        }
    }
}
