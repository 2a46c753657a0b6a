//! A process group as its user holds it: checks arguments, finds the plan, hands the operation to the engine.

mod handle;
#[cfg(test)]
mod tests;
mod typed;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Duration;

use rustc_hash::FxHashMap;

use crate::call::{Call, Collective};
use crate::dtype::DType;
use crate::engine::Engine;
use crate::engine::graph::Ready;
use crate::engine::group::{Immediate, Seat, Tried};
use crate::engine::numbers::{MessageNumbers, Stream};
use crate::engine::op::{GroupKey, OpState, PointToPoint, Work, nanos};
use crate::error::{Error, Result, Site};
use crate::interrupt;
use crate::memory::{Owner, Region};
use crate::plan::{CallShape, Tuning, schedule};
use crate::reduce;
use crate::request::{Blocks, Request};
use crate::shared::{OwnParts, Shared};
use crate::topology::GroupShape;
use crate::transport::{Fabric, MsgKey, NodeLocal, Transports};

pub use handle::Handle;

/// Plans kept; beyond that the cache starts anew.
const PLANS_KEPT: usize = 256;
/// Bytes below which a call on shared memory goes through slots, as any other: two meetings cost more than a copy.
const SHARED_FROM: usize = 16 << 10;
/// How long destroying a group waits for work that is under way.
const LINGER: Duration = Duration::from_secs(5);

/// The plans made so far.
#[derive(Default)]
struct Plans {
    /// Callers choose the keys, and nobody gains by making them collide.
    made: FxHashMap<CallShape, Arc<Ready>>,
    /// The one used last: most calls repeat the one before.
    last: Option<(CallShape, Arc<Ready>)>,
}

struct Inner<T: Transports> {
    engine: Arc<Engine<T>>,
    key: GroupKey,
    name: Arc<str>,
    rank: usize,
    shape: Arc<GroupShape>,
    /// What carries bytes in a node.
    local: String,
    tuning: Tuning,
    timeout_nanos: AtomicU64,
    plans: Mutex<Plans>,
    /// Number of the next message by (peer, tag, sending).
    message_numbers: Arc<MessageNumbers>,
    /// Collectives called.
    calls: AtomicU64,
    aborted: AtomicBool,
    closed: AtomicBool,
    failed: Arc<OnceLock<Error>>,
    /// What the group had failed with, once it is taken down: `index` may be another group's from then on.
    ended: OnceLock<Option<Error>>,
    shared: OwnParts,
    /// Shared memory that was ever made in the group.
    shared_made: AtomicU64,
}

impl<T: Transports> Inner<T> {
    fn close(&self) {
        if self.closed.swap(true, Ordering::AcqRel) || !self.engine.is_ours() {
            return;
        }
        let _ = self.ended.set(self.engine.remove(self.key, LINGER));
    }
}

impl<T: Transports> Drop for Inner<T> {
    fn drop(&mut self) {
        self.close();
    }
}

/// A process group. Cheap to clone; the last clone's end, or [`shutdown`](Self::shutdown), takes the group down.
pub struct Communicator<T: Transports> {
    inner: Arc<Inner<T>>,
}

impl<T: Transports> Clone for Communicator<T> {
    fn clone(&self) -> Self {
        Communicator { inner: Arc::clone(&self.inner) }
    }
}

/// Shared memory that is entered in a group: dropped, it leaves. No call on it may be under way then.
pub struct SharedEntry<T: Transports> {
    group: Weak<Inner<T>>,
    number: u64,
    _registered: Option<Registered<T>>,
}

/// Memory that the fabric, which is the process's and outlives groups, has registered: dropped, it is taken back. No call
/// on it may be under way then.
pub struct Registered<T: Transports> {
    engine: Weak<Engine<T>>,
    memory: Region,
}

impl<T: Transports> Drop for Registered<T> {
    fn drop(&mut self) {
        if let Some(engine) = self.engine.upgrade().filter(|engine| engine.is_ours()) {
            let _ = engine.with_fabric_if_any(|fabric| {
                fabric.deregister(self.memory);
                Ok(())
            });
        }
    }
}

impl<T: Transports> Drop for SharedEntry<T> {
    fn drop(&mut self) {
        let Some(group) = self.group.upgrade() else { return };
        group.shared.leave(self.number);
        if !group.closed.load(Ordering::Acquire) && group.engine.is_ours() {
            let leave = |local: &mut T::Local| {
                local.leave_shared(self.number);
                Ok(())
            };
            // A group that is gone has forgotten the memory already.
            let _ = group.engine.with_local(group.key, leave);
        }
    }
}

impl<T: Transports> Communicator<T> {
    /// Seats a group whose transports are connected. `timeout` is that of operations that give none.
    pub fn new(
        engine: Arc<Engine<T>>,
        seat: Seat<T::Local>,
        tuning: Tuning,
        timeout: Duration,
    ) -> Result<Communicator<T>> {
        let (name, rank, shape) = (Arc::clone(&seat.name), seat.rank, Arc::clone(&seat.shape));
        let local = seat.local.describe();
        let (key, failed) = engine.add(seat)?;
        let inner = Inner {
            engine,
            key,
            name,
            rank,
            shape,
            local,
            tuning,
            timeout_nanos: AtomicU64::new(nanos(timeout)),
            plans: Mutex::default(),
            message_numbers: Arc::default(),
            calls: AtomicU64::new(0),
            aborted: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            failed,
            ended: OnceLock::new(),
            shared: OwnParts::default(),
            shared_made: AtomicU64::new(0),
        };
        Ok(Communicator { inner: Arc::new(inner) })
    }

    /// This process's number in the group, from 0.
    pub fn rank(&self) -> usize {
        self.inner.rank
    }

    /// How many ranks the group has.
    pub fn size(&self) -> usize {
        self.inner.shape.size()
    }

    /// The group's name, as errors and logs say it.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Random identity, equal on all members.
    pub fn id(&self) -> u64 {
        self.inner.key.id
    }

    /// Which ranks are on which node.
    pub fn shape(&self) -> &GroupShape {
        &self.inner.shape
    }

    /// How many collectives this rank has called.
    pub fn calls(&self) -> u64 {
        self.inner.calls.load(Ordering::Relaxed)
    }

    /// The time limit of operations that give none.
    pub fn timeout(&self) -> Duration {
        Duration::from_nanos(self.inner.timeout_nanos.load(Ordering::Relaxed))
    }

    /// Sets it, for operations that start from now on.
    pub fn set_timeout(&self, timeout: Duration) {
        self.inner.timeout_nanos.store(nanos(timeout), Ordering::Relaxed);
    }

    /// The algorithm of the last collective started here, as the selection table names it.
    pub fn last_algorithm(&self) -> String {
        let Ok(plans) = self.inner.plans.lock() else { return String::new() };
        plans.last.as_ref().map_or("none", |(_, ready)| ready.schedule.algorithm).to_owned()
    }

    /// One line for people: shape, shared memory, fabric and kernels.
    pub fn describe(&self) -> String {
        let shape = self.shape();
        let fabric = match shape.node_count() {
            1 => None,
            _ => self.inner.engine.fabric_info(|f| f.describe()),
        };
        format!(
            "{} ranks on {} node(s) ({shape}), {} in a node{}, {} kernels",
            shape.size(),
            shape.node_count(),
            self.inner.local,
            fabric.map_or_else(String::new, |f| format!(", {f} between nodes")),
            reduce::variant()
        )
    }

    /// Fabric bytes by peer of the process: (peer id, sent, received).
    pub fn traffic(&self) -> Vec<(u32, u64, u64)> {
        self.inner.engine.fabric_info(|f| f.traffic()).unwrap_or_default()
    }

    /// Starts a collective.
    ///
    /// # Safety
    /// The request's regions stay valid, and are not written by anybody else, until the handle is done.
    pub unsafe fn start(&self, request: &Request) -> Result<Handle<T>> {
        let op = Arc::new(self.collective(request, self.admit(request)?));
        self.inner.engine.submit(Arc::clone(&op));
        Ok(Handle::operation(&self.inner.engine, op))
    }

    /// Runs a collective; the caller's thread drives it. An [`interrupt`] aborts the group.
    ///
    /// # Safety
    /// The request's regions are valid, and not written by anybody else, during the call.
    pub unsafe fn run(&self, request: &Request) -> Result<()> {
        if interrupt::is_watched() {
            // SAFETY: as here.
            return unsafe { self.run_watched(request) };
        }
        match self.drive(request, None)? {
            Some(op) => self.inner.engine.wait(&op, None),
            None => Ok(()),
        }
    }

    /// As [`run`](Self::run), in a thread whose waits may end early.
    #[cold]
    unsafe fn run_watched(&self, request: &Request) -> Result<()> {
        // SAFETY: this returns only when the operation is over.
        let Some(handle) = (unsafe { self.run_for(request, interrupt::EVERY) })? else { return Ok(()) };
        loop {
            let waited = handle.wait(Some(interrupt::EVERY));
            // It may have ended just after the slice had.
            if let Some(result) = handle.result() {
                return result;
            }
            if !matches!(waited, Err(Error::Timeout { .. })) {
                return waited;
            }
            if interrupt::came() {
                self.abort("interrupted");
                return handle.wait(None);
            }
        }
    }

    /// As [`run`](Self::run), but when `limit` has passed hands back the operation, still under way: for callers that
    /// must look around now and then, at signals for instance.
    ///
    /// # Safety
    /// As [`start`](Self::start).
    pub unsafe fn run_for(&self, request: &Request, limit: Duration) -> Result<Option<Handle<T>>> {
        if self.is_trivial(request)? {
            return Ok(None);
        }
        let Some(op) = self.drive(request, Some(limit))? else { return Ok(None) };
        match op.result() {
            Some(result) => result.clone().map(|()| None),
            // The limit has passed; or a driver panicked, as waiting on the handle will tell.
            None => Ok(Some(Handle::operation(&self.inner.engine, op))),
        }
    }

    /// Starts a collective and helps until it is over or `limit` has passed. `None`: it went well and needed no operation.
    #[inline(always)]
    fn drive(&self, request: &Request, limit: Option<Duration>) -> Result<Option<Arc<OpState>>> {
        let ready = self.admit(request)?;
        let op = || Arc::new(self.collective(request, Arc::clone(&ready)));
        if ready.is_plain && request.gate.is_none() && request.far.is_none() {
            let (input, output) = (request.input, request.output);
            let call =
                Immediate { ready: &ready, input, output, call: request.call(ready.is_shared), op: &op };
            match self.inner.engine.run_now(self.inner.key, &call, limit) {
                Tried::Done => return Ok(None),
                Tried::Later(op) => return Ok(Some(op)),
                Tried::NotNow => {}
            }
        }
        let op = op();
        // The operation knows how it ended.
        let _ = self.inner.engine.run(&op, limit);
        Ok(Some(op))
    }

    /// Whether a call was over as soon as it was made: one rank's data is already where it is to be. Never waits.
    pub fn is_trivial(&self, request: &Request) -> Result<bool> {
        let one = self.size() == 1 && !request.collective.rooted() && request.gate.is_none();
        let in_place = request.input.as_ptr() == request.output.as_ptr();
        let usable =
            !self.inner.closed.load(Ordering::Acquire) && !self.inner.aborted.load(Ordering::Acquire);
        if !(one && in_place && usable) {
            return Ok(false);
        }
        self.check(request)?;
        self.inner.calls.fetch_add(1, Ordering::Relaxed);
        Ok(true)
    }

    /// Starts sending `data` to group rank `to`.
    ///
    /// # Safety
    /// As [`start`](Self::start).
    pub unsafe fn start_send(&self, to: usize, tag: u64, dtype: DType, data: Region) -> Result<Handle<T>> {
        self.message(&Stream { peer: to, tag, send: true }, dtype, data, false)
    }

    /// Starts receiving into `data` from group rank `from`.
    ///
    /// # Safety
    /// As [`start`](Self::start).
    pub unsafe fn start_recv(&self, from: usize, tag: u64, dtype: DType, data: Region) -> Result<Handle<T>> {
        self.message(&Stream { peer: from, tag, send: false }, dtype, data, false)
    }

    /// Starts receiving into `data` from whichever rank's next message of `tag` comes first; [`Handle::source`] says
    /// whose it was. The message must have the length of `data`. One that a receive started elsewhere waits for by its
    /// sender's rank is left to that receive.
    ///
    /// # Safety
    /// As [`start`](Self::start).
    pub unsafe fn start_recv_any(&self, tag: u64, dtype: DType, data: Region) -> Result<Handle<T>> {
        self.check_open("recv")?;
        if self.size() == 1 {
            return Err(argument("recv", "from", "a group of more ranks", "this rank alone", "Copy instead"));
        }
        let count = whole_elements("recv", dtype, data.len())?;
        let numbers = Arc::clone(&self.inner.message_numbers);
        let work = Work::ReceiveAny { tag, region: data, numbers, source: OnceLock::new() };
        let op = Arc::new(self.op(Call::new(Collective::SendRecv, dtype, count as u64), work, None));
        self.inner.engine.submit(Arc::clone(&op));
        Ok(Handle::operation(&self.inner.engine, op))
    }

    /// Fails the group on every rank; every waiter gets `Error::Aborted` with `reason`.
    pub fn abort(&self, reason: &str) {
        self.inner.aborted.store(true, Ordering::Release);
        if self.inner.ended.get().is_some() {
            return;
        }
        let error = Error::Aborted { site: self.site(""), reason: reason.to_owned() };
        // The one error possible is a driver that panicked; then there is nobody left to tell.
        let _ = self.inner.engine.abort(self.inner.key, &error);
    }

    /// Why the group failed, if it did. Takes in peers' news of it first, and may wait some milliseconds for whoever drives.
    pub fn failure(&self) -> Option<Error> {
        self.failure_after(Engine::look)
    }

    /// As [`failure`](Self::failure), as far as is known without waiting for anybody.
    pub fn known_failure(&self) -> Option<Error> {
        self.failure_after(Engine::look_if_free)
    }

    fn failure_after(&self, look: impl FnOnce(&Engine<T>, GroupKey)) -> Option<Error> {
        let inner = &self.inner;
        if inner.ended.get().is_none() && inner.failed.get().is_none() {
            look(&inner.engine, inner.key);
        }
        inner.ended.get().map_or_else(|| inner.failed.get().cloned(), Clone::clone)
    }

    /// The error for a rank of this node whose process has ended, if there is one, whether or not a call here waits for it.
    pub fn ended_peer(&self) -> Option<Error> {
        if self.inner.ended.get().is_some() { None } else { self.inner.engine.ended_peer(self.inner.key) }
    }

    /// Waits up to 5 s for outstanding work, and frees everything. Later calls are errors.
    pub fn shutdown(&self) {
        self.inner.close();
    }

    fn site(&self, op: &str) -> Site {
        Site { rank: self.inner.rank, group: self.inner.name.to_string(), op: op.to_owned(), seq: 0 }
    }

    fn check_open(&self, op: &str) -> Result<()> {
        if self.inner.closed.load(Ordering::Acquire) {
            return Err(Error::Aborted { site: self.site(op), reason: "the group was destroyed".to_owned() });
        }
        if !self.inner.engine.is_ours() {
            return Err(Error::forked(self.site(op)));
        }
        Ok(())
    }

    /// Starts a message. Who `waits` for it anyway waits a little on the spot.
    fn message(&self, stream: &Stream, dtype: DType, region: Region, waits: bool) -> Result<Handle<T>> {
        let count = self.check_message(stream, dtype, region.len())?;
        let number = self.inner.message_numbers.take(*stream)?;
        let Stream { peer, tag, send } = *stream;
        let key = MsgKey { group: self.inner.key.id, seq: MsgKey::P2P | number, tag };
        let message = PointToPoint { peer, key, region, send };
        let call = Call::new(Collective::SendRecv, dtype, count as u64);
        let op = || Arc::new(self.op(call, Work::Message(message), None));
        Ok(match self.inner.engine.message(self.inner.key, (&message, &call), waits, op) {
            Some(op) => Handle::operation(&self.inner.engine, op),
            None => Handle::over(&message),
        })
    }

    /// What can be known of a message before it is started. Elements of it.
    fn check_message(&self, stream: &Stream, dtype: DType, bytes: usize) -> Result<usize> {
        let (name, argument_name) = if stream.send { ("send", "to") } else { ("recv", "from") };
        self.check_open(name)?;
        self.inner.shape.check_rank(name, argument_name, stream.peer)?;
        if stream.peer == self.inner.rank {
            return Err(argument(
                name,
                "peer",
                "another rank",
                format!("this rank, {}", stream.peer),
                "Copy instead",
            ));
        }
        whole_elements(name, dtype, bytes)
    }

    fn op(&self, call: Call, work: Work, timeout: Option<Duration>) -> OpState {
        let timeout = timeout.unwrap_or_else(|| self.timeout());
        OpState::new(call, work, self.inner.key, Arc::clone(&self.inner.name), self.inner.rank, timeout)
    }

    /// Checks and counts a call, and finds its plan.
    #[inline(always)]
    fn admit(&self, request: &Request) -> Result<Arc<Ready>> {
        self.check_open(request.collective.name())?;
        self.check(request)?;
        let ready = self.plan(request)?;
        self.inner.calls.fetch_add(1, Ordering::Relaxed);
        Ok(ready)
    }

    fn collective(&self, request: &Request, ready: Arc<Ready>) -> OpState {
        let call = request.call(ready.is_shared);
        let far = request.far_call(self.size(), self.inner.rank);
        let work = Work::Collective { ready, input: request.input, output: request.output, far };
        let mut op = self.op(call, work, request.timeout);
        op.gate.clone_from(&request.gate);
        op
    }

    fn plan(&self, request: &Request) -> Result<Arc<Ready>> {
        let key = CallShape {
            collective: request.collective,
            elem: request.dtype.size(),
            count: request.count,
            root: if request.collective.rooted() { request.root } else { 0 },
            counts: request.counts.clone(),
            splits: request.splits.clone(),
            shared: self.is_shared(request),
            far: request.far.is_some(),
        };
        let mut plans = self.inner.plans.lock().map_err(|_| poisoned())?;
        if let Some((_, ready)) = plans.last.as_ref().filter(|(last, _)| *last == key) {
            return Ok(Arc::clone(ready));
        }
        let ready = match plans.made.get(&key) {
            Some(ready) => Arc::clone(ready),
            None => {
                let schedule = schedule(&self.inner.shape, self.inner.rank, &key, &self.inner.tuning)?;
                if plans.made.len() >= PLANS_KEPT {
                    plans.made.clear();
                }
                let ready = Arc::new(Ready::new(schedule, key.shared));
                plans.made.insert(key.clone(), Arc::clone(&ready));
                ready
            }
        };
        plans.last = Some((key, Arc::clone(&ready)));
        Ok(ready)
    }

    /// Whether a call works in memory that its node's ranks share, which must pay what ranks tell one another first.
    fn is_shared(&self, request: &Request) -> bool {
        // Between nodes these two have ranks wait for one another more than they save (docs/performance-log.md).
        let waits = matches!(request.collective, Collective::Broadcast | Collective::AllGather);
        if waits && self.inner.shape.node_count() > 1 {
            return false;
        }
        let data = request.read_by_others(self.inner.rank);
        data.is_some_and(|data| data.len() >= SHARED_FROM && self.inner.shared.contain(data))
    }

    /// A number for memory that the ranks are about to share: the same on all ranks, which share memory in one order.
    pub fn next_shared(&self) -> u64 {
        self.inner.shared_made.fetch_add(1, Ordering::Relaxed)
    }

    /// Enters memory that this group's ranks share. Every rank does so with the same number before any calls on it.
    pub fn enter_shared(&self, shared: Shared) -> Result<SharedEntry<T>> {
        self.check_open("sharing memory")?;
        let (number, own) = (shared.number, shared.own());
        let engine = &self.inner.engine;
        engine.with_local(self.inner.key, |local| local.enter_shared(shared))?;
        let leaves_node = self.inner.shape.node_count() > 1;
        let registered = leaves_node.then(|| self.register(own, Owner::Host)).transpose();
        let registered = registered.unwrap_or_else(|error| {
            tracing::warn!(%error, "shared memory not registered: what leaves the node is copied");
            None
        });
        self.inner.shared.enter(number, own);
        Ok(SharedEntry { group: Arc::downgrade(&self.inner), number, _registered: registered })
    }

    /// Registers memory with the fabric, for the messages of this process.
    pub fn register(&self, memory: Region, owner: Owner) -> Result<Registered<T>> {
        let engine = &self.inner.engine;
        engine.with_fabric_if_any(|fabric| fabric.register(memory, owner))?;
        Ok(Registered { engine: Arc::downgrade(engine), memory })
    }

    /// Bytes that each message of a call with its data on a device must have at least; none: this group has no such calls
    /// (see [`crate::far`]), since its fabric reaches no device, or ranks share a node.
    pub fn least_device_message(&self) -> Option<usize> {
        let shape = &self.inner.shape;
        let is_alone = shape.node_count() > 1 && shape.even_local_size() == Some(1);
        let least = || self.inner.engine.fabric_info(|fabric| fabric.least_device_message()).flatten();
        is_alone.then(least).flatten()
    }

    // What is known of the call where it is made is known here, too.
    #[inline(always)]
    fn check(&self, request: &Request) -> Result<()> {
        request.check_far()?;
        let in_place =
            matches!(request.collective, Collective::AllReduce | Collective::Broadcast | Collective::Reduce);
        if in_place && request.input.as_ptr() != request.output.as_ptr() {
            return Err(argument(
                request.collective.name(),
                "input",
                "the same memory as the output",
                "other memory",
                "Copy it to the output first",
            ));
        }
        let (input, output) = (request.input, request.output);
        self.check_call(request, input.len(), output.len())?;
        if in_place { Ok(()) } else { request.check_apart(self.inner.rank, self.size(), input, output) }
    }

    /// Ranks, reduction and lengths in bytes, before anything moves; the memory may be elsewhere than the request says.
    #[inline(always)]
    pub fn check_call(&self, request: &Request, input_bytes: usize, output_bytes: usize) -> Result<()> {
        let name = request.collective.name();
        if request.collective.reduces() && !request.op.supports(request.dtype) {
            return Err(Error::Unsupported { op: name.to_owned(), reduce: request.op, dtype: request.dtype });
        }
        if request.collective.rooted() {
            self.inner.shape.check_rank(name, "root", request.root)?;
        }
        if let Some((send, receive)) = &request.splits {
            let own = |splits: &Blocks| splits.get(self.inner.rank).copied();
            if own(send) != own(receive) {
                return Err(argument(
                    name,
                    "splits",
                    "as much from this rank to itself on both sides",
                    format!("{:?} sent, {:?} received", own(send), own(receive)),
                    "Ranks are counted from 0",
                ));
            }
        }
        let (input, output) = self.lengths(request)?;
        let size = request.dtype.size();
        for (argument_name, want, given) in [("input", input, input_bytes), ("output", output, output_bytes)]
        {
            if want.checked_mul(size) != Some(given) {
                return Err(argument(
                    name,
                    argument_name,
                    format!("{want} elements of {} ({} bytes)", request.dtype, want.saturating_mul(size)),
                    format!("{given} bytes"),
                    format!("The group '{}' has {} ranks", self.inner.name, self.size()),
                ));
            }
        }
        Ok(())
    }

    /// Elements of input and output.
    fn lengths(&self, request: &Request) -> Result<(usize, usize)> {
        let name = request.collective.name();
        let (n, count) = (self.size(), request.count);
        let is_root = request.root == self.inner.rank;
        let all = match &request.counts {
            Some(counts) => {
                if counts.len() != n {
                    return Err(argument(
                        name,
                        "counts",
                        format!("{n} numbers"),
                        counts.len().to_string(),
                        "One a rank",
                    ));
                }
                total(counts)
            }
            None => count.saturating_mul(n),
        };
        let own = request.counts.as_ref().map_or(count, |c| c[self.inner.rank]);
        Ok(match request.collective {
            Collective::AllReduce | Collective::Broadcast | Collective::Reduce => (count, count),
            Collective::Barrier => (0, 0),
            Collective::AllGather => (own, all),
            Collective::ReduceScatter => (all, own),
            Collective::AllToAll => match &request.splits {
                Some((send, recv)) if send.len() == n && recv.len() == n => (total(send), total(recv)),
                Some((send, recv)) => {
                    let given = format!("{} and {}", send.len(), recv.len());
                    return Err(argument(name, "splits", format!("{n} numbers each"), given, "One a rank"));
                }
                None => (all, all),
            },
            Collective::Gather => (count, if is_root { all } else { 0 }),
            Collective::Scatter => (if is_root { all } else { 0 }, count),
            Collective::SendRecv => {
                return Err(argument(
                    name,
                    "collective",
                    "a collective",
                    "a message",
                    "Use start_send or start_recv",
                ));
            }
        })
    }
}

/// Elements of all blocks; of too many to count, more than any memory has.
fn total(blocks: &Blocks) -> usize {
    blocks.iter().fold(0, |sum, &block| sum.saturating_add(block))
}

fn whole_elements(op: &str, dtype: DType, bytes: usize) -> Result<usize> {
    if bytes.is_multiple_of(dtype.size()) {
        return Ok(bytes / dtype.size());
    }
    Err(argument(
        op,
        "data",
        format!("whole elements of {dtype}"),
        format!("{bytes} bytes"),
        "Check count and dtype",
    ))
}

fn argument(
    op: &str,
    argument: &'static str,
    expected: impl Into<String>,
    given: impl Into<String>,
    hint: impl Into<String>,
) -> Error {
    Error::Argument {
        op: op.to_owned(),
        argument,
        expected: expected.into(),
        given: given.into(),
        hint: hint.into(),
    }
}

fn poisoned() -> Error {
    Error::Internal("a thread panicked while it held a group's table".to_owned())
}
