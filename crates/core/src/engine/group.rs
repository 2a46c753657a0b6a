//! One process group inside the engine: its transport, its queue, the call it runs now, its messages under way.
//!
//! Invariants
//! - **G1** collectives run one after the other, in the order started; messages run beside them. Those that move data
//!   are numbered; peers tell their messages apart by these numbers.
//! - **G2** receives from any rank take what has come, in the order they were started; a message that a receive names
//!   the sender of is never taken. They fail as soon as nobody is left to send, or a rank of another node was lost who might have.
//! - **G3** after a failure the operations at fault have its error, and all others an `Aborted` that quotes it; the transports have
//!   forgotten the group's work, so its memory is free; every later operation fails at once.
//! - **G4** `advance` goes on until only a start, a completion, a gate that opens, or a message for an open receive can
//!   move it again: after the first two the group is `stirred`, and polls that bring nothing need not call it.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use crate::call::{Call, Collective};
use crate::engine::execution::{Execution, Hands, Route, Start, Workspace, post};
use crate::engine::graph::{Ready, SCRAP};
use crate::engine::numbers::Stream;
use crate::engine::op::{BRIEF, OpState, PointToPoint, Work};
use crate::engine::staging::{Loan, Staging};
use crate::error::{Error, Result, Site};
use crate::memory::Region;
use crate::topology::GroupShape;
use crate::transport::{Arith, Buffers, Ctx, Fabric, Gone, Message, MsgKey, NodeLocal, Patience, PhaseRun};

/// What the engine needs to know of a group.
pub struct Seat<L> {
    /// Random identity, equal on all members.
    pub id: u64,
    pub name: Arc<str>,
    pub rank: usize,
    pub shape: Arc<GroupShape>,
    pub local: L,
    /// By group rank.
    pub routes: Vec<Route>,
}

/// A [`Ctx`] is: group index, 16 bits; message flag, 1 bit; message index, 15 bits; execution's own, 32 bits.
const MESSAGE: u64 = 1 << 47;
const MESSAGES: usize = 1 << 15;

/// Group index of a mark.
pub fn group_of(ctx: Ctx) -> usize {
    (ctx.0 >> 48) as usize
}

/// A call of a [plain](Ready::is_plain) schedule whose caller waits for it.
pub struct Immediate<'a> {
    pub ready: &'a Arc<Ready>,
    pub input: Region,
    pub output: Region,
    pub call: Call,
    /// Makes the operation, should the call not be over at once.
    pub op: &'a dyn Fn() -> Arc<OpState>,
}

/// What became of an [`Immediate`].
pub enum Tried {
    Done,
    /// It is under way, or has failed, as this operation.
    Later(Arc<OpState>),
    /// It was not begun: other work comes first.
    NotNow,
}

struct Active {
    op: Arc<OpState>,
    execution: Execution,
    loan: Loan,
}

pub struct Group<L> {
    pub seat: Seat<L>,
    index: usize,
    queue: VecDeque<Arc<OpState>>,
    active: Option<Active>,
    messages: Vec<Option<Arc<OpState>>>,
    messages_left: usize,
    /// What is queued or under way [weighs](OpState::weight) in all.
    weight: usize,
    /// Messages, by index, that wait for any rank to send (G2).
    open: Vec<usize>,
    /// What `advance` looks at may have changed since it ran last (G4).
    stirred: bool,
    next_seq: u64,
    spare: Workspace,
    /// The phase that last ran on the spot: the next one differs little.
    at_once: Option<PhaseRun>,
    scrap: Box<Scrap>,
    /// Set once, and read by whoever asks, without the driver's lock.
    failed: Arc<OnceLock<Error>>,
}

/// Scratch of the call that runs on the spot (G1: there is one at a time).
#[repr(align(64))]
struct Scrap([u8; SCRAP]);

impl<L: NodeLocal> Group<L> {
    pub fn new(index: usize, seat: Seat<L>) -> Group<L> {
        Group {
            seat,
            index,
            queue: VecDeque::new(),
            active: None,
            messages: Vec::new(),
            messages_left: 0,
            weight: 0,
            open: Vec::new(),
            stirred: false,
            next_seq: 0,
            spare: Workspace::default(),
            at_once: None,
            scrap: Box::new(Scrap([0; SCRAP])),
            failed: Arc::default(),
        }
    }

    /// Whether anything is queued or under way.
    pub fn is_busy(&self) -> bool {
        self.active.is_some() || !self.queue.is_empty() || self.messages_left > 0
    }

    /// Whether any of it is better not left until somebody waits for it: what is not brief, or needs another node.
    pub fn wants_thread(&self) -> bool {
        self.weight > BRIEF || (self.seat.shape.node_count() > 1 && self.is_busy())
    }

    /// Whether any of it is in the hands of the fabric.
    pub fn waits_for_fabric(&self) -> bool {
        self.messages_left > 0 || self.active.as_ref().is_some_and(|a| a.execution.on_fabric > 0)
    }

    fn mark(&self) -> u64 {
        (self.index as u64) << 48
    }

    /// Takes an operation up (G1). A refused one is finished with the reason.
    pub fn start<F: Fabric>(
        &mut self,
        op: Arc<OpState>,
        fabric: Option<&mut F>,
        finished: &mut Vec<Arc<OpState>>,
    ) -> Result<()> {
        if let Some(why) = self.failed.get() {
            conclude(&op, Err(after(why, op.site())), finished);
            return Ok(());
        }
        match op.work {
            Work::Collective { ref ready, .. } => {
                op.seq.store(self.next_seq, Ordering::Relaxed);
                self.next_seq += u64::from(!ready.schedule.is_nothing());
                self.weight = self.weight.saturating_add(op.weight());
                self.queue.push_back(op);
                self.stirred = true;
                Ok(())
            }
            Work::Message(message) => {
                // Its number is taken: the peer would take the next one for it, so there can be no next one.
                let slot = self.keep_message(op, finished)?;
                self.post(slot, message, fabric)
            }
            Work::ReceiveAny { .. } => {
                let slot = self.keep_message(op, finished).ok();
                self.open.extend(slot);
                Ok(())
            }
        }
    }

    /// The index of a message that is under way from now on. Where there are too many it has failed.
    fn keep_message(&mut self, op: Arc<OpState>, finished: &mut Vec<Arc<OpState>>) -> Result<usize> {
        let Some(slot) = self.free_message() else {
            let error = Error::Resource {
                what: op.call.to_string(),
                resource: "message slots",
                reason: format!("{MESSAGES} messages of group '{}' are under way", self.seat.name),
                hint: "Wait for some of them before you start others".to_owned(),
            };
            conclude(&op, Err(error.clone()), finished);
            return Err(error);
        };
        self.weight = self.weight.saturating_add(op.weight());
        self.messages[slot] = Some(op);
        self.messages_left += 1;
        Ok(slot)
    }

    fn post<F: Fabric>(
        &mut self,
        slot: usize,
        PointToPoint { peer, key, region, send }: PointToPoint,
        fabric: Option<&mut F>,
    ) -> Result<()> {
        let Some(op) = &self.messages[slot] else {
            return Err(Error::Internal(format!("message {slot} is not under way")));
        };
        op.seq.store(key.number(), Ordering::Relaxed);
        let ctx = Ctx(self.mark() | MESSAGE | (slot as u64) << 32);
        let mut message = Message { key, peer: 0, peer_rank: peer as u32, region, call: op.call.pack(), ctx };
        let mut hands = Hands { local: &mut self.seat.local, fabric, routes: &self.seat.routes };
        post(&mut hands, peer, &mut message, send)
    }

    /// Gives messages that have come to the receives from any rank that wait for one (G2). True when any was.
    fn match_open<F: Fabric>(&mut self, mut fabric: Option<&mut F>) -> Result<bool> {
        let mut moved = false;
        let mut at = 0;
        while at < self.open.len() {
            let slot = self.open[at];
            match self.find_sender(slot, fabric.as_deref_mut())? {
                Some(found) => {
                    self.open.remove(at);
                    self.post(slot, found, fabric.as_deref_mut())?;
                    moved = true;
                }
                None => at += 1,
            }
        }
        Ok(moved)
    }

    /// An error where no message can come for the receives from any rank that wait (G2).
    fn look_for_senders<F: Fabric>(&mut self, mut fabric: Option<&mut F>) -> Result<()> {
        // What was taken already is to be finished first.
        if self.open.is_empty() || self.messages_left > self.open.len() {
            return Ok(());
        }
        match self.any_sender(fabric.as_deref_mut()) {
            // Behind that look: what a rank had sent before it went has come by now.
            Err(Error::PeerLost { .. }) if self.match_open(fabric)? => Ok(()),
            senders => senders,
        }
    }

    fn any_sender<F: Fabric>(&mut self, mut fabric: Option<&mut F>) -> Result<()> {
        let (mut left, mut lost, mut others) = (None, None, false);
        for rank in (0..self.seat.routes.len()).filter(|&rank| rank != self.seat.rank) {
            let gone = match (self.seat.routes[rank], fabric.as_deref_mut()) {
                (Route::Local(local), _) => self.seat.local.gone(local as usize),
                (Route::Fabric(id), Some(fabric)) => {
                    (!fabric.can_come(self.seat.id, id, rank as u32)?).then_some(Gone::Left)
                }
                (Route::Fabric(_), None) => None,
            };
            match gone {
                None => others = true,
                Some(Gone::Left) => left = Some(rank),
                // Many a program ends without leaving its groups: others may go on.
                Some(how) => lost = Some(self.lost(rank, how)),
            }
        }
        match (lost, left) {
            _ if others => Ok(()),
            (Some(lost), _) => Err(lost),
            (None, Some(peer)) => Err(Error::PeerLost {
                site: Site::unknown(),
                peer,
                node: self.seat.shape.node_of(peer).to_string(),
                reason: "no rank is left that could send: their process groups are destroyed".to_owned(),
            }),
            (None, None) => Ok(()),
        }
    }

    /// The first rank whose next message of the receive's tag has come.
    fn find_sender<F: Fabric>(
        &mut self,
        slot: usize,
        mut fabric: Option<&mut F>,
    ) -> Result<Option<PointToPoint>> {
        let Some(op) = &self.messages[slot] else { return Ok(None) };
        let Work::ReceiveAny { tag, region, numbers, source } = &op.work else { return Ok(None) };
        for peer in (0..self.seat.routes.len()).filter(|&peer| peer != self.seat.rank) {
            let key = |number| MsgKey { group: self.seat.id, seq: MsgKey::P2P | number, tag: *tag };
            let route = self.seat.routes[peer];
            let came = |number| match (route, fabric.as_deref_mut()) {
                (Route::Local(local), _) => self.seat.local.has_come(local, &key(number)),
                (Route::Fabric(id), Some(fabric)) => fabric.has_come(id, &key(number)),
                (Route::Fabric(_), None) => false,
            };
            if let Some(number) = numbers.take_if(Stream { peer, tag: *tag, send: false }, came)? {
                // Set once: the receive leaves `open` with it.
                let _ = source.set(peer);
                return Ok(Some(PointToPoint { peer, key: key(number), region: *region, send: false }));
            }
        }
        Ok(None)
    }

    fn free_message(&mut self) -> Option<usize> {
        if let Some(i) = self.messages.iter().position(Option::is_none) {
            return Some(i);
        }
        if self.messages.len() == MESSAGES {
            return None;
        }
        self.messages.push(None);
        Some(self.messages.len() - 1)
    }

    /// A transport has done what was marked `ctx`.
    pub fn complete(&mut self, ctx: Ctx, finished: &mut Vec<Arc<OpState>>) -> Result<()> {
        self.stirred = true;
        if ctx.0 & MESSAGE == 0 {
            return match &mut self.active {
                Some(active) => active.execution.complete(ctx.0 as u32),
                None => Err(Error::Internal(format!("completion {:#x} with no call running", ctx.0))),
            };
        }
        let slot = (ctx.0 >> 32) as usize & (MESSAGES - 1);
        match self.messages.get_mut(slot).and_then(Option::take) {
            Some(op) => {
                self.messages_left -= 1;
                self.weight = self.weight.saturating_sub(op.weight());
                conclude(&op, Ok(()), finished);
                Ok(())
            }
            None => Err(Error::Internal(format!("completion {:#x} names no message", ctx.0))),
        }
    }

    /// Whether `advance` may find anything to do (G4).
    #[inline]
    pub fn can_advance(&self) -> bool {
        self.stirred
            || !self.open.is_empty()
            || (self.active.is_none() && self.queue.front().is_some_and(|op| op.may_begin()))
    }

    /// Whether the next call waits for its gate, which rings no bell when it opens.
    pub fn is_gated(&self) -> bool {
        self.active.is_none() && self.queue.front().is_some_and(|op| !op.may_begin())
    }

    /// Drives the running call, and begins the next one. True when anything moved.
    pub fn advance<F: Fabric>(
        &mut self,
        mut fabric: Option<&mut F>,
        staging: &mut Staging,
        finished: &mut Vec<Arc<OpState>>,
    ) -> Result<bool> {
        let mut moved = !self.open.is_empty() && self.match_open(fabric.as_deref_mut())?;
        self.stirred = false;
        loop {
            if self.active.is_none() {
                match self.queue.pop_front_if(|op| op.may_begin()) {
                    Some(op) => {
                        let begun = self.begin(Arc::clone(&op), staging);
                        // The group is about to fail, and no longer knows of this one.
                        self.active =
                            Some(begun.inspect_err(|why| conclude(&op, Err(why.clone()), finished))?);
                    }
                    None => return Ok(moved),
                }
                moved = true;
            }
            let Some(active) = &mut self.active else { return Ok(moved) };
            let mut hands = Hands {
                local: &mut self.seat.local,
                fabric: fabric.as_deref_mut(),
                routes: &self.seat.routes,
            };
            moved |= active.execution.advance(&mut hands)?;
            if !active.execution.is_done() {
                return Ok(moved);
            }
            if let Some(done) = self.active.take() {
                self.spare = done.execution.into_workspace();
                staging.give_back(done.loan);
                self.weight = self.weight.saturating_sub(done.op.weight());
                conclude(&done.op, Ok(()), finished);
            }
        }
    }

    /// Runs a call on the spot, where nothing is under way (G1); an error is the group's. The transport waits
    /// as long as `patience` lasts.
    pub fn run_now(&mut self, call: &Immediate<'_>, patience: &mut Patience<'_>) -> (Tried, Result<()>) {
        if self.failed.get().is_some() || self.is_busy() {
            return (Tried::NotNow, Ok(()));
        }
        let (ready, arith, mark) = (call.ready, self.arith(&call.call), self.mark());
        // SAFETY: the box stays where it is as long as the group, whose transport alone is given the region (R1 of `memory`).
        let scratch = unsafe { Region::of(&mut self.scrap.0) };
        let buffers = Buffers { input: call.input, output: call.output, scratch };
        let packed = call.call.pack();
        let seq = self.next_seq;
        self.next_seq += 1;
        let (plan, ctx) = (ready.plan(0), Ctx(mark));
        let run = match &mut self.at_once {
            Some(run) if Arc::ptr_eq(&run.plan, plan) => {
                (run.buffers, run.arith, run.call, run.seq, run.ctx) = (buffers, arith, packed, seq, ctx);
                run
            }
            other => {
                let plan = Arc::clone(plan);
                other.insert(PhaseRun { plan, step: 0, shift: 0, buffers, arith, call: packed, seq, ctx })
            }
        };
        let outcome = self.seat.local.run_now(run, patience);
        if matches!(outcome, Ok(true)) {
            return (Tried::Done, Ok(()));
        }
        let op = (call.op)();
        op.seq.store(seq, Ordering::Relaxed);
        let group = self.seat.id;
        let start =
            Start { ready: Arc::clone(ready), buffers, far: None, arith, call: packed, group, seq, mark };
        let execution = Execution::begun(start, std::mem::take(&mut self.spare));
        self.weight = self.weight.saturating_add(op.weight());
        self.active = Some(Active { op: Arc::clone(&op), execution, loan: Loan::none() });
        (Tried::Later(op), outcome.map(|_| ()))
    }

    /// Moves a message of a call on the spot; true: it is over. False: nothing was done.
    pub fn message_now(&mut self, message: &PointToPoint, call: &Call, patience: &mut Patience<'_>) -> bool {
        let PointToPoint { peer, key, region, send } = *message;
        let Route::Local(local) = self.seat.routes[peer] else { return false };
        if self.failed.get().is_some() {
            return false;
        }
        // The transport has nothing to report.
        let ctx = Ctx(self.mark());
        let message = Message { key, peer: local, peer_rank: peer as u32, region, call: call.pack(), ctx };
        if send { self.seat.local.send_now(&message) } else { self.seat.local.recv_now(&message, patience) }
    }

    fn arith(&self, call: &Call) -> Arith {
        Arith { dtype: call.dtype, op: call.op, world: self.seat.shape.size() as u32 }
    }

    fn begin(&mut self, op: Arc<OpState>, staging: &mut Staging) -> Result<Active> {
        let Work::Collective { ready, input, output, far } = &op.work else {
            return Err(Error::Internal("a message in the queue of collectives".to_owned()));
        };
        let loan = staging.lend(ready.scratch())?;
        let start = Start {
            ready: Arc::clone(ready),
            buffers: Buffers { input: *input, output: *output, scratch: loan.region },
            far: *far,
            arith: self.arith(&op.call),
            call: op.call.pack(),
            group: self.seat.id,
            seq: op.seq.load(Ordering::Relaxed),
            mark: self.mark(),
        };
        let execution = Execution::new(start, std::mem::take(&mut self.spare));
        Ok(Active { op, execution, loan })
    }

    /// What is under way, the running call first, and then what is queued.
    fn operations(&self) -> impl Iterator<Item = &Arc<OpState>> {
        let running = self.active.iter().map(|active| &active.op);
        running.chain(self.messages.iter().flatten()).chain(&self.queue)
    }

    /// The operation that has waited past its time limit, if any. Limits are each call's own: one in the queue may be over before those
    /// of all before it.
    pub fn overdue(&self, now: Instant) -> Option<Arc<OpState>> {
        // Who is queued waits for whom the running call waits.
        let of_calls = self.active.as_ref().map_or(0, |active| self.hearsay(active));
        let shares = |op: &OpState| if matches!(op.work, Work::Collective { .. }) { of_calls } else { 0 };
        self.operations().find(|op| op.overdue(now, shares(op))).cloned()
    }

    /// How many shares of `HEARSAY` the running call, and those behind it, wait beyond its limit, because the rank it waits for may
    /// itself be waiting, and then knows better who is missing.
    ///
    /// First-hand is who has not seen the ranks of its own node come to the call. Ranks of other nodes may be stuck for
    /// want of a rank of theirs; and a rank of this node that has come, or that only passes on what comes from
    /// elsewhere, is stuck for want of another.
    fn hearsay(&self, active: &Active) -> u32 {
        if self.seat.shape.node_count() == 1 {
            return 0;
        }
        let passed_on = matches!(active.op.call.collective, Collective::Broadcast | Collective::Scatter);
        match (active.execution.on_fabric > 0, active.execution.phases_done > 0 || passed_on) {
            (false, false) => 0,
            (true, _) => 1,
            (false, true) => 2,
        }
    }

    /// Group ranks that the running work waits for. A receive from any rank waits for all.
    pub fn missing<F: Fabric>(&self, fabric: Option<&F>) -> Vec<usize> {
        let node = self.seat.shape.ranks_on(self.seat.shape.node_of(self.seat.rank));
        let mut ranks: Vec<usize> = self
            .seat
            .local
            .waiting_for()
            .into_iter()
            .filter_map(|l| node.get(l).map(|&r| r as usize))
            .collect();
        ranks.extend(fabric.into_iter().flat_map(|f| f.waiting_for(self.seat.id)));
        if !self.open.is_empty() {
            ranks.extend((0..self.seat.routes.len()).filter(|&rank| rank != self.seat.rank));
        }
        ranks.sort_unstable();
        ranks.dedup();
        ranks
    }

    /// Why what is under way will never end, if that is known: ranks that it waits for are gone.
    pub fn lost_peer<F: Fabric>(&mut self, mut fabric: Option<&mut F>) -> Option<Error> {
        let aborted = fabric.as_deref_mut().and_then(|fabric| fabric.aborted(self.seat.id));
        if aborted.is_some() {
            return aborted;
        }
        match self.seat.local.lost_peer() {
            Some((local, gone)) => Some(self.lost(self.rank_of(local)?, gone)),
            None => self.look_for_senders(fabric).err(),
        }
    }

    /// A member of this node whose process has ended, whether or not any work here waits for it.
    pub fn ended_peer(&mut self) -> Option<Error> {
        let rank = self.seat.local.ended_peer().and_then(|local| self.rank_of(local))?;
        Some(self.lost(rank, Gone::Ended))
    }

    /// The group rank of one of this node.
    fn rank_of(&self, local: usize) -> Option<usize> {
        let node = self.seat.shape.node_of(self.seat.rank);
        self.seat.shape.ranks_on(node).get(local).map(|&rank| rank as usize)
    }

    fn lost(&self, peer: usize, gone: Gone) -> Error {
        let reason = match gone {
            Gone::Ended => "its process has ended",
            Gone::Left => "it has destroyed the group",
            Gone::Failed => "its group has failed",
        };
        let node = format!("{} (this one)", self.seat.shape.node_of(peer));
        Error::PeerLost { site: Site::unknown(), peer, node, reason: reason.to_owned() }
    }

    /// G3. Tells the other members. `of` is the operation whose error it is, where that is known.
    pub fn fail<F: Fabric>(
        &mut self,
        error: &Error,
        of: Option<&Arc<OpState>>,
        fabric: Option<&mut F>,
        staging: &mut Staging,
        finished: &mut Vec<Arc<OpState>>,
    ) {
        if self.failed.get().is_some() {
            return;
        }
        let ended: Vec<Arc<OpState>> = self.operations().cloned().collect();
        let own = self.owners(error, of, &ended);
        let first = of.or_else(|| ended.iter().zip(&own).find(|(_, own)| **own).map(|(op, _)| op));
        let why = error.clone().at(&first.map_or_else(|| self.site(), |op| op.site()));
        tracing::debug!(error = %why, "group failed");
        self.seat.local.abort(&why);
        self.withdraw(fabric, Some(&why));
        // The only place that sets it, by the holder of the driver's lock (E1).
        let _ = self.failed.set(why.clone());
        if let Some(active) = self.active.take() {
            self.spare = active.execution.into_workspace();
            staging.give_back(active.loan);
        }
        self.messages.clear();
        self.queue.clear();
        self.open.clear();
        (self.messages_left, self.weight) = (0, 0);
        for (op, own) in ended.iter().zip(own) {
            let result = if own { error.clone().at(&op.site()) } else { after(&why, op.site()) };
            conclude(op, Err(result), finished);
        }
    }

    /// Whose own error it is, of all [operations](Self::operations); the others learn that they failed with it.
    fn owners(&self, error: &Error, of: Option<&Arc<OpState>>, all: &[Arc<OpState>]) -> Vec<bool> {
        if let Some(of) = of {
            return all.iter().map(|op| Arc::ptr_eq(op, of)).collect();
        }
        let running = usize::from(self.active.is_some());
        let under_way = running + self.messages_left;
        let mut own: Vec<bool> =
            all.iter().enumerate().map(|(at, op)| at < under_way && is_of(error, op)).collect();
        if !own.contains(&true) {
            // It names none, or one that is over here: it is the running call's, or that of all messages.
            own[..if running > 0 { running } else { under_way }].fill(true);
        }
        own
    }

    pub fn withdraw<F: Fabric>(&mut self, fabric: Option<&mut F>, why: Option<&Error>) {
        if let Some(fabric) = fabric {
            let peers: Vec<u32> = self
                .seat
                .routes
                .iter()
                .filter_map(|r| match r {
                    Route::Fabric(id) => Some(*id),
                    Route::Local(_) => None,
                })
                .collect();
            if !peers.is_empty() {
                fabric.withdraw(self.seat.id, &peers, why);
            }
        }
    }

    pub fn failure(&self) -> Option<&Error> {
        self.failed.get()
    }

    /// Where the failure will be, for those who ask without the driver's lock.
    pub fn failure_place(&self) -> Arc<OnceLock<Error>> {
        Arc::clone(&self.failed)
    }

    pub fn site(&self) -> Site {
        Site {
            rank: self.seat.rank,
            group: self.seat.name.to_string(),
            op: String::new(),
            seq: self.next_seq,
        }
    }
}

/// Whether a transport's error may be that of `op`, which is under way. Transports know no operations: they name the peer, and of a
/// mismatch the call and its number, which messages with that peer may have in common.
fn is_of(error: &Error, op: &OpState) -> bool {
    // With whom it may have to do; none: with all.
    let (is_message, with) = match &op.work {
        Work::Collective { .. } => (false, None),
        Work::Message(message) => (true, Some(message.peer)),
        Work::ReceiveAny { source, .. } => (true, source.get().copied()),
    };
    let site = op.site();
    let is_named = || error.clone().at(&site).site().is_none_or(|named| *named == site);
    match error {
        Error::PeerLost { peer, .. } => with.is_none_or(|with| with == *peer),
        Error::Mismatch { peer, .. } if is_message => with == Some(*peer) && is_named(),
        _ => !is_message && is_named(),
    }
}

/// What an operation gets that was started, or queued, when the group had failed already.
fn after(why: &Error, site: Site) -> Error {
    match why {
        Error::Aborted { .. } => why.clone(),
        other => Error::Aborted { site, reason: format!("the group failed before: {other}") },
    }
}

fn conclude(op: &Arc<OpState>, result: Result<()>, finished: &mut Vec<Arc<OpState>>) {
    if op.finish(result) {
        finished.push(Arc::clone(op));
    }
}
