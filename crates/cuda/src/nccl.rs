//! One NCCL communicator.
//!
//! - **K1** one thread at a time uses it, which has its *turn*: for a call, until that is enqueued, and for its end.
//! - **K2** a call of a communicator that does not block (NCCL_COMM_BLOCKING=0) goes on in a thread of NCCL's and is looked at until it
//!   is enqueued; whoever looks lets go when the communicator is to end. So it ends with its turn, as NCCL wants it.
//! - **K3** a call of one that blocks may hang in NCCL with the turn, and only an abort ends that. It comes [`FAREWELL`] later, without
//!   the turn (ADR 0037).
//! - **K4** NCCL ends a communicator only when the program's graphs that hold calls of it are destroyed, which may be never. So where
//!   calls were captured its end is not waited for as long.
//! - **K5** NCCL destroys only what is well. Who ends a communicator in order asks first ([`NcclComm::health`]) and fails the calls of one
//!   that is not, which is aborted. After a destroy that fails nothing follows: it has freed the communicator or not, and an
//!   abort on the same thread, which it leaves in a group of NCCL's, would do nothing.

use std::ffi::{c_int, c_void};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError, mpsc};
use std::time::{Duration, Instant};

use smddp_core::settings::Settings;
use smddp_core::{Collective, DType, Error, ReduceOp, Result};
use smddp_cuda_sys::Stream;
use smddp_nccl_sys as sys;
use sys::{Config, Nccl, UniqueId};

use crate::call::{DeviceCall, DeviceMessage, missing};
use crate::device::Device;

const MEETING: &str = "meeting the other ranks";
/// How long the end of a communicator may take before it is left behind.
const FAREWELL: Duration = Duration::from_secs(5);
/// The same where graphs hold its calls (K4): as long as one needs whose graphs are no more.
const BRIEF_FAREWELL: Duration = Duration::from_millis(500);
/// How long a call that does not hang may take.
const SOON: Duration = Duration::from_millis(50);

/// How long a call that goes on without its caller is looked at as often as can be, and then every so long.
const BRIEF: Duration = Duration::from_micros(200);
const LOOK_STEP: Duration = Duration::from_micros(50);

static LIBRARY: Mutex<Option<Arc<Nccl>>> = Mutex::new(None);

/// NCCL, loaded at first use.
pub(crate) fn library(named: &str, dirs: &[PathBuf]) -> Result<Arc<Nccl>> {
    let mut place = LIBRARY.lock().map_err(|_| Error::Internal("loading NCCL panicked before".to_owned()))?;
    if let Some(nccl) = place.as_ref() {
        return Ok(Arc::clone(nccl));
    }
    let nccl = Nccl::load(named, dirs).map_err(|e| Error::Library {
        library: "NCCL",
        reason: e.to_string(),
        hint: "SMDDP_CUDA=staged does without it".to_owned(),
    })?;
    tracing::info!(path = nccl.path, version = sys::shown(nccl.version), "NCCL");
    let nccl = Arc::new(nccl);
    *place = Some(Arc::clone(&nccl));
    Ok(nccl)
}

/// Version and file of the NCCL that would be used; for `smddp-perf info`.
pub fn found(settings: &Settings, dirs: &[PathBuf]) -> Result<String> {
    let nccl = library(settings.text("SMDDP_NCCL"), dirs)?;
    Ok(format!("{} ({})", sys::shown(nccl.version), nccl.path))
}

/// A new communicator's identity, made by one rank for all.
pub(crate) fn unique_id(nccl: &Nccl) -> Result<UniqueId> {
    let mut id = UniqueId([0; 128]);
    // SAFETY: a place for the identity.
    check(nccl, "making an identity", unsafe { (nccl.unique_id)(&raw mut id) })?;
    Ok(id)
}

fn check(nccl: &Nccl, what: &str, status: sys::Status) -> Result<()> {
    if status == sys::SUCCESS {
        return Ok(());
    }
    Err(Error::Transport {
        transport: "NCCL",
        reason: format!("{what}: {}. NCCL_DEBUG=WARN makes it say more", nccl.explain(status)),
    })
}

/// Whether a call within a group lets the group go on.
fn goes_on(status: sys::Status) -> bool {
    matches!(status, sys::SUCCESS | sys::IN_PROGRESS)
}

/// What NCCL has found beside the calls of a communicator, such as a lost peer; [`sys::IN_PROGRESS`] while one goes on.
///
/// # Safety
/// A live communicator, which is this thread's meanwhile.
unsafe fn state(nccl: &Nccl, comm: sys::Comm) -> sys::Status {
    let mut found = sys::SUCCESS;
    // SAFETY: the caller's communicator, and a place for the answer.
    let status = unsafe { (nccl.comm_error)(comm, &raw mut found) };
    if status == sys::SUCCESS { found } else { status }
}

/// What became of a call that goes on in a thread of NCCL's; none: it goes on still, and `is_given_up`.
///
/// # Safety
/// A live communicator, which is this thread's meanwhile.
unsafe fn outcome(nccl: &Nccl, comm: sys::Comm, is_given_up: impl Fn() -> bool) -> Option<sys::Status> {
    let since = Instant::now();
    while !is_given_up() {
        // SAFETY: passed on.
        let found = unsafe { state(nccl, comm) };
        if found != sys::IN_PROGRESS {
            return Some(found);
        }
        if since.elapsed() < BRIEF { std::thread::yield_now() } else { std::thread::sleep(LOOK_STEP) }
    }
    None
}

/// A communicator's pointer on its way between threads.
struct Raw(sys::Comm);

// SAFETY: communicators may be used from any thread, one at a time; `NcclComm::turn` sees to that.
unsafe impl Send for Raw {}

pub(crate) struct NcclComm {
    nccl: Arc<Nccl>,
    device: Arc<Device>,
    raw: Raw,
    rank: usize,
    size: usize,
    /// Held during each call on the communicator.
    turn: Arc<Mutex<()>>,
    /// Set before `raw` is freed, and looked at, with the turn, before it is used.
    ended: AtomicBool,
    /// Calls that graphs were captured of.
    captured: AtomicUsize,
    /// The process that made it; in one forked from it, it is nobody's.
    process: u32,
}

impl Drop for NcclComm {
    /// Peers that are still there must not wait for it.
    fn drop(&mut self) {
        if self.process == std::process::id()
            && let Some(ending) = self.begin_end(true)
        {
            ending.wait();
        }
    }
}

// SAFETY: as for `Raw`.
unsafe impl Sync for NcclComm {}

/// Ranks on their way to a communicator. Dropped early, the thread that waits for them is left behind.
pub(crate) struct Meeting {
    nccl: Arc<Nccl>,
    device: Arc<Device>,
    rank: usize,
    size: usize,
    told: mpsc::Receiver<Result<Raw>>,
    is_given_up: Arc<AtomicBool>,
}

impl Drop for Meeting {
    fn drop(&mut self) {
        self.is_given_up.store(true, Ordering::Release);
    }
}

impl Meeting {
    /// Waits so long; none: not all have come yet.
    pub(crate) fn wait(&self, step: Duration) -> Option<Result<NcclComm>> {
        let met = match self.told.recv_timeout(step) {
            Err(mpsc::RecvTimeoutError::Timeout) => return None,
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                Err(Error::Internal("the thread that meets for NCCL panicked".to_owned()))
            }
            Ok(met) => met,
        };
        Some(met.map(|raw| NcclComm {
            nccl: Arc::clone(&self.nccl),
            device: Arc::clone(&self.device),
            raw,
            rank: self.rank,
            size: self.size,
            turn: Arc::default(),
            ended: AtomicBool::new(false),
            captured: AtomicUsize::new(0),
            process: std::process::id(),
        }))
    }
}

impl NcclComm {
    /// Begins to meet the other ranks. `max_ctas` limits the multiprocessors it uses (None: NCCL's choice).
    pub(crate) fn meet(
        nccl: &Arc<Nccl>,
        device: &Arc<Device>,
        id: UniqueId,
        (rank, size): (usize, usize),
        max_ctas: Option<u32>,
    ) -> Result<Meeting> {
        let (tell, told) = mpsc::channel();
        let (library, place) = (Arc::clone(nccl), Arc::clone(device));
        let is_given_up = Arc::new(AtomicBool::new(false));
        let unwanted = Arc::clone(&is_given_up);
        let meet = move || {
            let made = place.enter().and_then(|()| {
                join(&library, id, (rank, size), max_ctas, || unwanted.load(Ordering::Acquire))
            });
            // Where nobody listens any more, the ranks that came late must not wait for this one.
            if let Err(mpsc::SendError(Ok(unwanted))) = tell.send(made) {
                // SAFETY: the communicator just made, which nobody else has. Its failure leaves nothing to do.
                let _ = unsafe { (library.comm_abort)(unwanted.0) };
            }
        };
        std::thread::Builder::new().name("smddp-nccl-init".to_owned()).spawn(meet).map_err(|e| {
            Error::Resource {
                what: "meeting for NCCL".to_owned(),
                resource: "threads",
                reason: e.to_string(),
                hint: "Raise the process limit (ulimit -u)".to_owned(),
            }
        })?;
        Ok(Meeting { nccl: Arc::clone(nccl), device: Arc::clone(device), rank, size, told, is_given_up })
    }

    pub(crate) fn version(&self) -> String {
        sys::shown(self.nccl.version)
    }

    /// An error NCCL found beside the calls, such as a lost peer. Who else asks, or makes a call, is done soon; none is found
    /// while one hangs (K3).
    pub(crate) fn health(&self) -> Result<()> {
        let Some(_turn) = turn_within(&self.turn, SOON) else { return Ok(()) };
        if self.ended.load(Ordering::Acquire) {
            return Ok(());
        }
        // SAFETY: our communicator, which has not ended, and our turn.
        let found = unsafe { state(&self.nccl, self.raw.0) };
        if found == sys::IN_PROGRESS { Ok(()) } else { check(&self.nccl, "meanwhile", found) }
    }

    /// A graph holds one more call (K4).
    pub(crate) fn note_capture(&self) {
        self.captured.fetch_add(1, Ordering::Relaxed);
    }

    /// Enqueues a call on `stream`.
    pub(crate) fn enqueue(&self, call: &DeviceCall, stream: Stream) -> Result<()> {
        let name = call.collective.name();
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        if self.ended.load(Ordering::Acquire) {
            return Err(missing());
        }
        // SAFETY: the ranges are vouched for by the caller of the group's `start`, and checked for length there.
        let status = unsafe { self.issue(call, stream)? };
        self.enqueued(name, status)
    }

    /// Whether a call that returned `status` is enqueued; it may take its time (K2). The turn is this thread's.
    fn enqueued(&self, name: &str, status: sys::Status) -> Result<()> {
        if status != sys::IN_PROGRESS {
            return check(&self.nccl, name, status);
        }
        // SAFETY: our communicator, which has not ended, since that sets `ended` first and then needs the turn.
        match unsafe { outcome(&self.nccl, self.raw.0, || self.ended.load(Ordering::Acquire)) } {
            Some(status) => check(&self.nccl, name, status),
            None => Err(missing()),
        }
    }

    /// Enqueues calls that NCCL launches together.
    pub(crate) fn enqueue_all(&self, calls: &[DeviceCall], stream: Stream) -> Result<()> {
        let [first, more @ ..] = calls else { return Ok(()) };
        if more.is_empty() {
            return self.enqueue(first, stream);
        }
        let name = first.collective.name();
        self.together(name, calls, |call| {
            // SAFETY: as in `enqueue`.
            unsafe { self.issue(call, stream) }
        })
    }

    /// Enqueues messages that NCCL moves together: none of them waits for another.
    pub(crate) fn exchange_messages(&self, messages: &[DeviceMessage], stream: Stream) -> Result<()> {
        const NAME: &str = "messages";
        let (n, comm, bytes) = (&self.nccl, self.raw.0, sys::dtype::UINT8);
        self.together(NAME, messages, |m| {
            let (address, len, peer) = (m.memory.address, m.memory.bytes, m.peer as c_int);
            if len == 0 {
                return Ok(sys::SUCCESS);
            }
            // SAFETY: the memory is vouched for by the caller of the group's `exchange`.
            Ok(unsafe {
                if m.is_sent {
                    (n.send)(address as *const c_void, len, bytes, peer, comm, stream)
                } else {
                    (n.recv)(address as *mut c_void, len, bytes, peer, comm, stream)
                }
            })
        })
    }

    /// Has NCCL launch what `issue` enqueues of each item as one.
    fn together<I>(
        &self,
        name: &str,
        items: &[I],
        mut issue: impl FnMut(&I) -> Result<sys::Status>,
    ) -> Result<()> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        if self.ended.load(Ordering::Acquire) {
            return Err(missing());
        }
        // SAFETY: takes nothing; ended below, whatever happens between.
        check(&self.nccl, name, unsafe { (self.nccl.group_start)() })?;
        let issued = items.iter().try_for_each(|item| {
            let status = issue(item)?;
            if goes_on(status) { Ok(()) } else { check(&self.nccl, name, status) }
        });
        // SAFETY: begun above.
        let status = unsafe { (self.nccl.group_end)() };
        issued.and(self.enqueued(name, status))
    }

    /// # Safety
    /// The call's memory is the device's, of the lengths its collective wants, until the stream is past it.
    unsafe fn issue(&self, call: &DeviceCall, stream: Stream) -> Result<sys::Status> {
        let n = &self.nccl;
        let (from, to) = (call.input.address as *const c_void, call.output.address as *mut c_void);
        let (count, root, comm) = (call.count, call.root as c_int, self.raw.0);
        let bytes = count * call.dtype.size();
        if call.counts.is_some() || call.splits.is_some() {
            // SAFETY: passed on.
            return unsafe { self.uneven(call, stream) };
        }
        // SAFETY: passed on.
        Ok(unsafe {
            match call.collective {
                Collective::AllReduce => {
                    let (dtype, op) = reduction(call)?;
                    (n.all_reduce)(from, to, count, dtype, op, comm, stream)
                }
                Collective::Reduce => {
                    let (dtype, op) = reduction(call)?;
                    (n.reduce)(from, to, count, dtype, op, root, comm, stream)
                }
                Collective::ReduceScatter => {
                    let (dtype, op) = reduction(call)?;
                    (n.reduce_scatter)(from, to, count, dtype, op, comm, stream)
                }
                Collective::AllGather => (n.all_gather)(from, to, bytes, sys::dtype::UINT8, comm, stream),
                Collective::Broadcast => {
                    (n.broadcast)(from, to, bytes, sys::dtype::UINT8, root, comm, stream)
                }
                Collective::AllToAll | Collective::Gather | Collective::Scatter => {
                    let root_only = |wanted: bool| if wanted { bytes } else { 0 };
                    let (send, receive) = match call.collective {
                        Collective::Gather => {
                            (self.only(call.root, bytes), vec![root_only(call.root == self.rank); self.size])
                        }
                        Collective::Scatter => {
                            (vec![root_only(call.root == self.rank); self.size], self.only(call.root, bytes))
                        }
                        _ => (vec![bytes; self.size], vec![bytes; self.size]),
                    };
                    self.exchange(call, &send, &receive, stream)
                }
                Collective::Barrier | Collective::SendRecv => sys::SUCCESS,
            }
        })
    }

    /// `bytes` for one rank, nothing for the others.
    fn only(&self, rank: usize, bytes: usize) -> Vec<usize> {
        (0..self.size).map(|r| if r == rank { bytes } else { 0 }).collect()
    }

    /// # Safety
    /// As [`issue`](Self::issue).
    unsafe fn uneven(&self, call: &DeviceCall, stream: Stream) -> Result<sys::Status> {
        let size = call.dtype.size();
        if let Some((send, receive)) = &call.splits {
            let bytes = |counts: &[usize]| counts.iter().map(|c| c * size).collect::<Vec<_>>();
            // SAFETY: passed on.
            return Ok(unsafe { self.exchange(call, &bytes(send), &bytes(receive), stream) });
        }
        let counts = call.counts.as_deref().unwrap_or_default();
        let n = &self.nccl;
        let reduces = call.collective == Collective::ReduceScatter;
        let (dtype, op) = if reduces { reduction(call)? } else { (sys::dtype::UINT8, 0) };
        let mut at = 0u64;
        // SAFETY: passed on; offsets stay inside, since counts add up to the longer side's length.
        unsafe {
            let mut status = (n.group_start)();
            for (rank, &count) in counts.iter().enumerate() {
                let root = rank as c_int;
                if goes_on(status) && count > 0 {
                    status = if reduces {
                        let from = (call.input.address + at) as *const c_void;
                        (n.reduce)(
                            from,
                            call.output.address as *mut c_void,
                            count,
                            dtype,
                            op,
                            root,
                            self.raw.0,
                            stream,
                        )
                    } else {
                        let to = (call.output.address + at) as *mut c_void;
                        let from = call.input.address as *const c_void;
                        (n.broadcast)(from, to, count * size, dtype, root, self.raw.0, stream)
                    };
                }
                at += (count * size) as u64;
            }
            let ended = (n.group_end)();
            Ok(if goes_on(status) { ended } else { status })
        }
    }

    /// Every rank's bytes for every other, one after another in both ranges, as one group.
    ///
    /// # Safety
    /// As [`issue`](Self::issue).
    unsafe fn exchange(
        &self,
        call: &DeviceCall,
        send: &[usize],
        receive: &[usize],
        stream: Stream,
    ) -> sys::Status {
        let n = &self.nccl;
        let (mut from, mut to) = (call.input.address, call.output.address);
        // SAFETY: passed on.
        unsafe {
            let mut status = (n.group_start)();
            for peer in 0..self.size {
                let other = peer as c_int;
                if goes_on(status) && send[peer] > 0 {
                    let bytes = send[peer];
                    status =
                        (n.send)(from as *const c_void, bytes, sys::dtype::UINT8, other, self.raw.0, stream);
                }
                if goes_on(status) && receive[peer] > 0 {
                    let bytes = receive[peer];
                    status = (n.recv)(to as *mut c_void, bytes, sys::dtype::UINT8, other, self.raw.0, stream);
                }
                from += send[peer] as u64;
                to += receive[peer] as u64;
            }
            let ended = (n.group_end)();
            if goes_on(status) { ended } else { status }
        }
    }

    /// Begins to end the communicator, once; `failed`: without waiting for peers. None: that was begun before.
    pub(crate) fn begin_end(&self, failed: bool) -> Option<Ending> {
        if self.ended.swap(true, Ordering::AcqRel) {
            return None;
        }
        let (tell, told) = mpsc::channel();
        let (nccl, device, raw) = (Arc::clone(&self.nccl), Arc::clone(&self.device), Raw(self.raw.0));
        let turns = Arc::clone(&self.turn);
        let end = move || {
            let raw = raw;
            // Who looks after a call that does not block lets go now. One that hangs in the library is ended by an abort from
            // another thread, and by nothing else (K3).
            let turn = turn_within(&turns, FAREWELL);
            let failed = failed || turn.is_none();
            // Who waits may have given up.
            let _ = tell.send(());
            if device.enter().is_ok() {
                // SAFETY: our communicator, given to its end once, and used by no call that begins later (`ended`). Nobody else
                // is in a call of it, but for K3, where NCCL promises nothing: else the process would hang for good.
                let status =
                    unsafe { if failed { (nccl.comm_abort)(raw.0) } else { (nccl.comm_destroy)(raw.0) } };
                if let Err(error) = check(&nccl, "ending a communicator", status) {
                    tracing::warn!(%error, "what it holds may be left behind");
                }
            }
        };
        // Where there is no thread it does not end.
        std::thread::Builder::new().name("smddp-nccl-end".to_owned()).spawn(end).ok()?;
        Some(Ending { told, captured: self.captured.load(Ordering::Relaxed) })
    }
}

/// The end of a communicator, under way. Several go on at once: one may wait for what only the other ends.
#[must_use]
pub(crate) struct Ending {
    /// Told when it begins to end, disconnected when it has.
    told: mpsc::Receiver<()>,
    captured: usize,
}

impl Ending {
    /// Waits for it as long as makes sense.
    pub(crate) fn wait(self) {
        let limit = if self.captured > 0 { BRIEF_FAREWELL } else { FAREWELL };
        let is_late = |limit| matches!(self.told.recv_timeout(limit), Err(mpsc::RecvTimeoutError::Timeout));
        // It begins after FAREWELL at the latest, as soon as its thread gets time.
        if !is_late(2 * FAREWELL) && !is_late(limit) {
            return;
        }
        if self.captured > 0 {
            tracing::warn!(
                calls = self.captured,
                "CUDA graphs hold calls of an NCCL communicator; it ends when they are destroyed. Destroy graphs before their group"
            );
        } else {
            tracing::warn!("an NCCL communicator did not end in time; it is left behind");
        }
    }
}

fn turn_within(turn: &Mutex<()>, limit: Duration) -> Option<MutexGuard<'_, ()>> {
    let since = Instant::now();
    loop {
        match turn.try_lock() {
            Ok(turn) => return Some(turn),
            Err(TryLockError::Poisoned(turn)) => return Some(turn.into_inner()),
            Err(TryLockError::WouldBlock) if since.elapsed() >= limit => return None,
            Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}

/// Meets the other ranks; the device's context must be this thread's.
fn join(
    nccl: &Nccl,
    id: UniqueId,
    (rank, size): (usize, usize),
    max_ctas: Option<u32>,
    is_given_up: impl Fn() -> bool,
) -> Result<Raw> {
    let mut config = Config::blocking(max_ctas);
    let mut comm = Raw(std::ptr::null_mut());
    // SAFETY: places for the communicator and its configuration.
    let begun =
        unsafe { (nccl.comm_init)(&raw mut comm.0, size as c_int, id, rank as c_int, &raw mut config) };
    if begun != sys::IN_PROGRESS {
        return check(nccl, MEETING, begun).map(|()| comm);
    }
    // SAFETY: the communicator that is being made, which nobody else has.
    let met = match unsafe { outcome(nccl, comm.0, is_given_up) } {
        Some(status) => check(nccl, MEETING, status),
        None => Err(missing()),
    };
    if met.is_err() {
        // SAFETY: as above. A failure to end it leaves nothing to do.
        let _ = unsafe { (nccl.comm_abort)(comm.0) };
    }
    met.map(|()| comm)
}

/// Whether NCCL has the reduction of a call, if there is any.
pub(crate) fn has_reduction(call: &DeviceCall) -> bool {
    let averages_integers = call.op == ReduceOp::Avg && !call.dtype.is_float();
    !call.collective.reduces()
        || !matches!(call.op, ReduceOp::BitAnd | ReduceOp::BitOr | ReduceOp::BitXor)
            && call.dtype != DType::I16
            && !averages_integers
}

/// NCCL's type and reduction for a call that reduces.
fn reduction(call: &DeviceCall) -> Result<(c_int, c_int)> {
    let unsupported = || {
        Err(Error::Unsupported {
            op: format!("{} of CUDA tensors by NCCL", call.collective.name()),
            reduce: call.op,
            dtype: call.dtype,
        })
    };
    let dtype = match call.dtype {
        DType::Bool | DType::U8 => sys::dtype::UINT8,
        DType::I8 => sys::dtype::INT8,
        DType::I32 => sys::dtype::INT32,
        DType::I64 => sys::dtype::INT64,
        DType::F16 => sys::dtype::FLOAT16,
        DType::BF16 => sys::dtype::BFLOAT16,
        DType::F32 => sys::dtype::FLOAT32,
        DType::F64 => sys::dtype::FLOAT64,
        DType::I16 => return unsupported(),
    };
    let op = match (call.op, call.dtype) {
        // A sum of truth values is "or", a product "and".
        (ReduceOp::Sum | ReduceOp::Max | ReduceOp::BitOr, DType::Bool) => sys::op::MAX,
        (ReduceOp::Product | ReduceOp::Min | ReduceOp::BitAnd, DType::Bool) => sys::op::MIN,
        (ReduceOp::Sum, _) => sys::op::SUM,
        (ReduceOp::Avg, _) => sys::op::AVG,
        (ReduceOp::Product, _) => sys::op::PROD,
        (ReduceOp::Min, _) => sys::op::MIN,
        (ReduceOp::Max, _) => sys::op::MAX,
        (ReduceOp::BitAnd | ReduceOp::BitOr | ReduceOp::BitXor, _) => return unsupported(),
    };
    Ok((dtype, op))
}
