//! What the engine asks of a transport. Both kinds are poll-based and never block.
//!
//! Rules common to both
//! - **T1** a submitted run or message owns its regions until its [`Ctx`] comes back from `poll`, or until
//!   `withdraw` of its group has returned.
//! - **T2** nothing relies on the order in which messages arrive; messages match by sender and [`MsgKey`] alone.
//! - **T3** every first contact of an operation compares [`PackedCall`]s; unequal calls are `Error::Mismatch`.
//! - **T4** `poll` allocates nothing in steady state and returns soon (at most about one slot's copy, or a MiB each way by the kernel).

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::atomics::AtomicUsize;
use crate::call::PackedCall;
use crate::dtype::{DType, ReduceOp};
use crate::error::{Error, Result};
use crate::memory::{Owner, Region};
use crate::plan::data::{Buf, Plan, Span};
use crate::shared::Shared;
use crate::yields::{LOOK_OUT, LookOut, Yields};

/// The engine's own mark on a submitted piece of work; comes back unchanged when it is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ctx(pub u64);

/// How contributions are combined, with everything a kernel needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arith {
    pub dtype: DType,
    pub op: ReduceOp,
    /// Size of the whole group: what `Avg` divides by where a step says `finish`.
    pub world: u32,
}

/// The three buffers a plan's spans refer to. For in-place calls `input` and `output` are the same region.
#[derive(Clone, Copy, Debug)]
pub struct Buffers {
    pub input: Region,
    pub output: Region,
    pub scratch: Region,
}

impl Buffers {
    /// The bytes of `span` in the round that starts `shift` bytes into the user's buffers (see [`crate::plan::Schedule`]).
    #[inline]
    pub fn at(&self, span: Span, shift: usize) -> Region {
        match span.buf {
            Buf::Input => self.input.slice(span.off + shift, span.len),
            Buf::Output => self.output.slice(span.off + shift, span.len),
            Buf::Scratch => self.scratch.slice(span.off, span.len),
        }
    }
}

/// One phase of a plan handed to the node's transport: step `step` of `plan` is an `Op::Phase`.
#[derive(Clone, Debug)]
pub struct PhaseRun {
    pub plan: Arc<Plan>,
    pub step: u32,
    pub shift: usize,
    pub buffers: Buffers,
    pub arith: Arith,
    pub call: PackedCall,
    /// The call's number in its group.
    pub seq: u64,
    pub ctx: Ctx,
}

/// Identifies one message between two ranks; both sides derive it from the plan, so it is never exchanged ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct MsgKey {
    /// Random identity of the group, agreed when it was made.
    pub group: u64,
    /// The operation's number in its group; for point-to-point, [`MsgKey::P2P`] | number of that (pair, tag)'s message.
    pub seq: u64,
    /// Round and tag of the plan's step; for point-to-point, the user's tag.
    pub tag: u64,
}

impl MsgKey {
    /// Set in `seq` of point-to-point messages, so that they never meet a collective's.
    pub const P2P: u64 = 1 << 63;

    /// Whether it is of a message point to point.
    pub fn is_p2p(&self) -> bool {
        self.seq & MsgKey::P2P != 0
    }

    /// The operation's, or that of the message of its pair and tag.
    pub fn number(&self) -> u64 {
        self.seq & !MsgKey::P2P
    }
}

/// A send or a receive of exactly `region.len()` bytes. A length that differs from the peer's is a mismatch.
#[derive(Clone, Copy, Debug)]
pub struct Message {
    pub key: MsgKey,
    pub peer: u32,
    /// Group rank of `peer`, for errors.
    pub peer_rank: u32,
    pub region: Region,
    pub call: PackedCall,
    pub ctx: Ctx,
}

/// How long what runs on the spot, a phase or a receive, waits for its peers: some looks one behind the other, then some with the core yielded
/// before each, for a peer that shares it; no longer than nobody else of this process waits. Where yields are dear, looks alone in
/// place of them, if there are to be any.
#[derive(Clone, Copy, Debug)]
pub struct Patience<'a> {
    looks: u32,
    yields: u32,
    may_spin: bool,
    look_out: LookOut,
    /// Who else waits meanwhile, and how to yield to them; none: never.
    company: Option<(&'a AtomicUsize, &'a Yields)>,
}

impl<'a> Patience<'a> {
    pub fn new(looks: u32, yields: u32, others: &'a AtomicUsize, way: &'a Yields) -> Patience<'a> {
        let (may_spin, company) = (looks > 0, Some((others, way)));
        Patience { looks, yields, may_spin, look_out: LookOut::default(), company }
    }

    /// Without yields.
    pub fn of_looks(looks: u32) -> Patience<'static> {
        Patience { looks, yields: 0, may_spin: true, look_out: LookOut::default(), company: None }
    }

    /// Waits a little after a look in vain. False: it is at its end.
    #[inline]
    pub fn wait(&mut self) -> bool {
        if self.looks > 0 {
            self.looks -= 1;
            std::hint::spin_loop();
            return true;
        }
        self.wait_longer()
    }

    fn wait_longer(&mut self) -> bool {
        let Some((others, way)) = self.company else { return false };
        if self.yields == 0 || others.load(Ordering::Relaxed) > 0 {
            return false;
        }
        if self.may_spin && way.are_dear() {
            std::hint::spin_loop();
            return self.look_out.lasts(LOOK_OUT);
        }
        self.yields -= 1;
        way.give_way();
        true
    }
}

/// Where a rank of a node sleeps, and what others ring to wake it. Cheap to share between threads.
pub trait Bell: Send + Sync {
    /// The value to pass to `wait`; read it before the last poll that found nothing.
    fn value(&self) -> u32;
    /// Sleeps until rung after `value` was read, or `limit` has passed.
    fn wait(&self, value: u32, limit: Duration);
    /// Wakes the sleeper, from any thread of this process.
    fn ring(&self);
}

/// How a rank of the node is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gone {
    /// Its process has ended, and it had not left the group.
    Ended,
    /// It has left the group in good order.
    Left,
    /// The group has failed there, and it could not tell why.
    Failed,
}

/// The ranks of one group on one node: phases and messages in shared memory.
///
/// Peers are named by their local rank within the group's node. Every member submits the same phases in the
/// same order.
pub trait NodeLocal: Send {
    /// Queues a phase. Phases run in the order submitted; several may be in flight.
    fn submit(&mut self, run: PhaseRun) -> Result<()>;
    /// Runs a phase on the spot, as far as `patience` goes; for callers whose group has nothing under way
    /// here. `Ok(false)`: it is under way as if submitted.
    fn run_now(&mut self, run: &PhaseRun, patience: &mut Patience<'_>) -> Result<bool> {
        let _ = patience;
        self.submit(run.clone())?;
        Ok(false)
    }
    /// Takes note of memory that the node's ranks share. Runs whose call is [marked](PackedCall::is_shared) have the
    /// [source](crate::plan::source_of) of their collective in such memory on every rank, and take it from there.
    fn enter_shared(&mut self, shared: Shared) -> Result<()> {
        let _ = shared;
        Err(Error::Internal("this transport cannot share memory".to_owned()))
    }
    /// Forgets it.
    fn leave_shared(&mut self, number: u64) {
        let _ = number;
    }
    fn send(&mut self, message: Message) -> Result<()>;
    fn recv(&mut self, message: Message) -> Result<()>;
    /// Sends a message on the spot, where this rank alone can. True: it is over. False: nothing was done.
    fn send_now(&mut self, message: &Message) -> bool {
        let _ = message;
        false
    }
    /// Receives on the spot what has come, or comes while `patience` lasts. True: it is over. False: nothing was done.
    fn recv_now(&mut self, message: &Message, patience: &mut Patience<'_>) -> bool {
        let _ = (message, patience);
        false
    }
    /// Whether a message that no receive was posted for has begun to come from a peer with `key`. Until it has, polls
    /// take in what that peer sends.
    fn has_come(&mut self, peer: u32, key: &MsgKey) -> bool;

    /// Makes progress; appends the marks of what is done. True when anything moved. An error is the group's: the caller
    /// [aborts](Self::abort) before anybody has his memory back.
    fn poll(&mut self, done: &mut Vec<Ctx>) -> Result<bool>;

    /// Announces that this rank is about to sleep on its bell, so that peers ring it. The caller polls once more
    /// between `arm` and `wait`.
    fn arm(&mut self);
    fn disarm(&mut self);
    fn bell(&self) -> Arc<dyn Bell>;

    /// Local ranks that the oldest unfinished work waits for.
    fn waiting_for(&self) -> Vec<usize>;

    /// A local rank that unfinished work waits for in vain. Asked only after fruitless waiting, as the next two; may make
    /// system calls, never blocks.
    fn lost_peer(&mut self) -> Option<(usize, Gone)> {
        None
    }

    /// Whether a local rank is gone, and nothing of it lies here to be taken in: for receives from any rank, which post nothing.
    fn gone(&mut self, peer: usize) -> Option<Gone> {
        let _ = peer;
        None
    }

    /// A local rank whose process has ended, whether or not anything here waits for it: for work that goes elsewhere.
    fn ended_peer(&mut self) -> Option<usize> {
        None
    }

    /// Tells the node's other members of this group why it failed here: their next poll returns `Error::Aborted`
    /// with that text. Forgets all queued work; nothing submitted is touched afterwards.
    fn abort(&mut self, why: &Error);

    /// A few words for people: what carries the bytes.
    fn describe(&self) -> String;
}

/// Messages between processes on different nodes. One for the whole process; groups share it.
pub trait Fabric: Send {
    /// What other processes need to reach this one (endpoint names of every rail, versions); opaque bytes.
    fn address(&self) -> Vec<u8>;
    /// Makes the process with `address` known; the same address gives the same id. `label` names it in errors.
    fn connect(&mut self, address: &[u8], label: &str) -> Result<u32>;

    /// Memory that will serve often as source and target: the engine's staging, what the ranks share, a device's.
    fn register(&mut self, memory: Region, owner: Owner) -> Result<()>;
    /// Takes that back, for the same region; no message is in it.
    fn deregister(&mut self, memory: Region);

    /// Bytes that a message in registered memory of a device has at least; none: there may be no such messages.
    fn least_device_message(&self) -> Option<usize>;

    /// `message.peer` is an id from `connect`.
    fn send(&mut self, message: Message) -> Result<()>;
    fn recv(&mut self, message: Message) -> Result<()>;
    /// Whether a message of [`MsgKey::P2P`] that no receive was posted for has come, or was announced, from a peer.
    fn has_come(&mut self, peer: u32, key: &MsgKey) -> bool;
    /// Whether messages of the group may still come from a peer, its `rank` there: asked while receives from any rank wait,
    /// which post nothing. An error where the peer was lost or the group has failed.
    fn can_come(&mut self, group: u64, peer: u32, rank: u32) -> Result<bool> {
        let _ = (group, peer, rank);
        Ok(true)
    }

    /// Why a peer has said that the group failed, where nothing was posted here that would fail: asked while other work of the
    /// group waits. Once.
    fn aborted(&mut self, group: u64) -> Option<Error> {
        let _ = group;
        None
    }

    /// Makes progress; appends the marks of what is done. An error here concerns one group when it says so in
    /// [`FabricFailure::group`], else every group that uses the fabric.
    fn poll(&mut self, done: &mut Vec<Ctx>) -> std::result::Result<bool, FabricFailure>;

    /// Forgets the group's messages; when it returns, nothing touches their regions any more.
    /// With `why`, tells the peers: their `poll` fails for that group with `Error::Aborted` and that text.
    fn withdraw(&mut self, group: u64, peers: &[u32], why: Option<&Error>);

    /// Group ranks (from `peer_rank`) with unfinished messages of `group`.
    fn waiting_for(&self, group: u64) -> Vec<usize>;

    /// Sleeps until something may have arrived or `limit` has passed. May simply sleep.
    fn doze(&mut self, limit: Duration);

    /// Bytes sent to and received from each peer so far, headers excluded: (peer id, sent, received).
    fn traffic(&self) -> Vec<(u32, u64, u64)>;

    /// One line for people: provider, version, rails, mode.
    fn describe(&self) -> String;
}

/// The transports an engine is built with.
pub trait Transports: 'static {
    type Local: NodeLocal;
    type Fabric: Fabric;
}

/// Why `Fabric::poll` failed.
#[derive(Clone, Debug)]
pub struct FabricFailure {
    pub group: Option<u64>,
    pub error: Error,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waits(mut patience: Patience<'_>) -> usize {
        (0..100).take_while(|_| patience.wait()).count()
    }

    #[test]
    fn patience_is_looks_and_then_yields_while_nobody_else_waits() {
        let others = AtomicUsize::new(0);
        assert_eq!(waits(Patience::of_looks(0)), 0);
        assert_eq!(waits(Patience::of_looks(3)), 3);
        // Where something computes on this core yields may become dear meanwhile: then once more, but not for ever.
        for _ in 0..100 {
            let way = Yields::default();
            let waited = waits(Patience::new(3, 4, &others, &way));
            assert!(waited == 7 || way.are_dear(), "{waited}");
            if !way.are_dear() {
                break;
            }
        }
        others.store(1, Ordering::Relaxed);
        assert_eq!(waits(Patience::new(3, 4, &others, &Yields::default())), 3);
    }

    #[test]
    fn where_yields_are_dear_patience_looks_on_instead() {
        let (others, way) = (AtomicUsize::new(0), Yields::dear());
        let mut patience = Patience::new(3, 4, &others, &way);
        while patience.wait() {}
        assert_eq!((patience.looks, patience.yields), (0, 4));
        // Without yields there is nothing in place of them; who may not spin yields.
        assert_eq!(waits(Patience::new(3, 0, &others, &way)), 3);
        assert_eq!(waits(Patience::new(0, 4, &others, &way)), 4);
    }
}
