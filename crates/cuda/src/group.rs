//! A process group's calls on CUDA memory, and which way each goes.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::time::{Duration, Instant};

use smddp_core::communicator::{Communicator, Handle};
use smddp_core::error::Site;
use smddp_core::settings::Settings;
use smddp_core::transport::Transports;
use smddp_core::{Collective, Error, Region, Result};
use smddp_cuda_sys as sys;

use crate::call::{DeviceCall, DeviceMessage, check_to_oneself, missing};
use crate::device::{Device, Event, Visit, wait};
use crate::hierarchical::Hierarchy;
use crate::life::Life;
use crate::nccl::NcclComm;
use crate::past::{Events, Past};
use crate::path::Path;
use crate::select::{Selection, Way};
use crate::setup::{
    MULTIPROCESSORS, Members, agreed, every_bus, meet, on_all, refuse_shared_device, settle_direct,
};
use crate::stager::{Scratch, Stager};
use crate::watch::{Communicators, Watch};

/// How often a host that waits for the device looks.
const WAIT_STEP: Duration = Duration::from_micros(50);

/// How long the end waits for a call that is being enqueued.
const FAREWELL: Duration = Duration::from_secs(5);

/// What a group's CUDA side is made of.
pub struct DeviceOptions<T: Transports> {
    /// All members: the group's own communicator, or another of the same ranks where one is [wanted](crate::Wanted).
    pub host: Communicator<T>,
    /// Of the ranks that [`Wanted::rail`](crate::Wanted) names.
    pub rail: Option<Communicator<T>>,
    /// The device's number.
    pub device: i32,
    pub settings: Settings,
    /// Folders in which NCCL may lie, beside the usual ones.
    pub library_dirs: Vec<PathBuf>,
}

/// A call that was enqueued.
pub struct Started<T: Transports> {
    number: Number,
    /// Of its part on the host; none: it has none.
    handle: Option<Handle<T>>,
    /// Its life, where NCCL has a part in it.
    life: Option<Arc<Life>>,
    past: Past,
}

/// A call among those of its group.
#[derive(Clone, Copy)]
struct Number {
    collective: Collective,
    seq: u64,
}

impl<T: Transports> Started<T> {
    /// Where it ends on its stream.
    pub fn past(&self) -> &Past {
        &self.past
    }

    /// The error it ended with, as far as is known: that of NCCL's part, or of the part on the host.
    pub fn error(&self) -> Option<Error> {
        let of_nccl = self.life.as_ref().and_then(|life| life.error());
        of_nccl.or_else(|| self.handle.as_ref().and_then(Handle::result).and_then(Result::err))
    }
}

/// What is made at the first use.
struct Parts<T: Transports> {
    stager: Option<Stager>,
    /// Orders a call's stream behind another.
    before: Event,
    /// The host's part of the last call. The host waits for no call, so that one failed is known when it is asked, at
    /// the latest by the next call.
    last: Option<Handle<T>>,
    /// The way of the last call of NCCL's in a group that has two communicators, and where it ends.
    by_nccl: Option<(Way, Past)>,
}

impl<T: Transports> Parts<T> {
    /// Lets `stream` wait for the last call on the other communicator than that of `way`: kernels of two that wait for each
    /// other's place on some device would never end. NCCL itself keeps the order of one.
    fn follow_other(&self, way: Way, stream: sys::Stream) -> Result<()> {
        match &self.by_nccl {
            // SAFETY: the caller's stream, which is one of the group's device.
            Some((last, past)) if *last != way => unsafe { past.order(stream.addr() as u64) },
            _ => Ok(()),
        }
    }

    fn stager(&mut self) -> Result<&mut Stager> {
        self.stager.as_mut().ok_or_else(missing)
    }

    /// Whether an exchange between nodes is still to come. A device that cannot be asked has none.
    fn is_under_way(&self, device: &Device) -> bool {
        let is_at_rest = |stager: &Stager| device.visit().and_then(|_visit| stager.is_at_rest());
        self.stager.as_ref().is_some_and(|stager| !is_at_rest(stager).unwrap_or(true))
    }
}

/// The CUDA side of a process group. Calls are made by all members in the same order.
pub struct DeviceGroup<T: Transports> {
    host: Communicator<T>,
    rail: Option<Communicator<T>>,
    device: Arc<Device>,
    path: Path,
    settings: Settings,
    selection: Selection,
    /// Where NCCL has a part in the calls.
    watch: Option<Watch<T>>,
    /// Calls made.
    calls: AtomicU64,
    /// The process that made it; one forked from it has no device.
    process: u32,
    events: Arc<Events>,
    /// Held while a call is enqueued, so that calls of several threads do not mingle.
    parts: Mutex<Parts<T>>,
}

impl<T: Transports> DeviceGroup<T> {
    /// Every member calls it at the same point.
    pub fn new(options: DeviceOptions<T>) -> Result<DeviceGroup<T>> {
        let DeviceOptions { host, rail, device, settings, library_dirs } = options;
        let selection = agreed(&host, Selection::new(&settings), "reading its settings")?;
        let opened = Device::open(device).and_then(|d| Ok((d.bus_id()?, d.visit()?, d)));
        let (bus_id, _visit, device) = agreed(&host, opened, "opening its CUDA device")?;
        let path = Path::of(host.shape(), &settings);
        if matches!(path, Path::Nccl | Path::Hierarchical) {
            let buses = every_bus(&host, &bus_id)?;
            // Where a device may be shared is said to each rank for itself.
            agreed(&host, refuse_shared_device(&host, &buses), "looking for shared devices")?;
        }
        let mut parts = agreed(&host, make_parts(&host, path, &device, &settings), "making its staging")?;
        let between = rail.as_ref().filter(|_| path == Path::Hierarchical).unwrap_or(&host);
        settle_direct(&host, between, &settings, parts.stager.as_mut())?;
        let has_flat = path == Path::Hierarchical && selection.has_flat();
        let has_flat = on_all(&host, has_flat, "SMDDP_CUDA_ALGORITHM with the way nccl")?;
        let met = |members| meet(&host, &device, &settings, &library_dirs, members);
        let first = match path {
            Path::Nccl => Some(met(Members::All)?),
            Path::Hierarchical => Some(met(Members::OfNode)?),
            Path::Staged | Path::Alone => None,
        };
        let flat = if has_flat { Some(met(Members::All)?) } else { None };
        let watched = |first| Watch::new(&host, rail.as_ref(), Communicators { first, flat }, &device);
        let watch = match first.map(watched) {
            Some(watch) => Some(agreed(&host, watch, "watching NCCL")?),
            None => None,
        };
        let events = Events::new(&device);
        let group = DeviceGroup {
            host,
            rail,
            device,
            path,
            settings,
            selection,
            watch,
            calls: AtomicU64::new(0),
            process: std::process::id(),
            events,
            parts: Mutex::new(parts),
        };
        tracing::info!(group = group.host.name(), "{}", group.describe());
        Ok(group)
    }

    pub fn path(&self) -> Path {
        self.path
    }

    /// One line for people.
    pub fn describe(&self) -> String {
        let parts = self.free_parts();
        let parts = parts.as_deref();
        let nccl = self.watch.as_ref().map(Watch::nccl);
        let flat = nccl.and_then(|n| n.flat.as_ref()).map(|_| "some calls over all ranks".to_owned());
        let nccl = nccl.map(|n| format!("NCCL {}", n.first.version()));
        let words =
            parts.and_then(|p| p.stager.as_ref()).map(|s| if s.is_by_words() { "" } else { " (host waits)" });
        let staged = words.map(|w| {
            format!(
                "{} slots of {} bytes{w}",
                self.settings.text("SMDDP_CUDA_SLOTS"),
                self.settings.text("SMDDP_CUDA_SLOT")
            )
        });
        let how = match self.path {
            Path::Nccl if self.host.shape().node_count() == 1 => "one node",
            Path::Nccl => "NCCL in a node and between nodes",
            Path::Hierarchical => "NCCL in a node, staged between nodes",
            Path::Staged => "staged through the host",
            Path::Alone => "one rank",
        };
        let limit =
            (self.path == Path::Hierarchical).then(|| format!("at most {MULTIPROCESSORS} multiprocessors"));
        let direct = parts.and_then(|p| p.stager.as_ref()?.direct_from());
        let direct = direct.map(|least| format!("GPUDirect for messages of {least} bytes and more"));
        let more: Vec<String> =
            nccl.into_iter().chain(limit).chain(flat).chain(staged).chain(direct).collect();
        format!("CUDA device {}: {how}; {}", self.device.ordinal, more.join(", "))
    }

    /// Enqueues a call on `stream`, which is past it only when it is over; `behind`: a stream whose work so far comes
    /// before the call too.
    ///
    /// # Safety
    /// The ranges are memory of the group's device, not used otherwise until `stream` is past the call; both are
    /// streams of that device.
    pub unsafe fn start(&self, call: &DeviceCall, stream: u64, behind: Option<u64>) -> Result<Started<T>> {
        let request = call.request(call.count, Region::EMPTY, Region::EMPTY);
        self.host.check_call(&request, call.input.bytes, call.output.bytes)?;
        let name = call.collective.name();
        call.input.check(name, "input").and_then(|()| call.output.check(name, "output"))?;
        let (input, output) = (call.input.place(), call.output.place());
        request.check_apart(self.host.rank(), self.host.size(), input, output)?;
        let stream = stream as sys::Stream;
        let (mut parts, _visit) = self.enter(name, stream, behind)?;
        let (number, life) = self.announce(call.collective, call.timeout)?;
        let way = self.way_of_two(call);
        let followed = way.map_or(Ok(()), |way| parts.follow_other(way, stream));
        let started = followed.and_then(|()| self.enqueue(&mut parts, call, stream));
        let started = self.end_of(number, life, stream, started);
        if let Ok(Started { handle, past, .. }) = &started {
            parts.last = handle.clone().or_else(|| parts.last.take());
            parts.by_nccl = way.map(|way| (way, past.clone())).or_else(|| parts.by_nccl.take());
        }
        started
    }

    /// The way of a call that NCCL has a part in, in a group with two communicators.
    fn way_of_two(&self, call: &DeviceCall) -> Option<Way> {
        self.watch.as_ref()?.nccl().flat.as_ref()?;
        Some(self.selection.way(call, self.host.size())).filter(|way| *way != Way::Staged)
    }

    fn enqueue(
        &self,
        parts: &mut Parts<T>,
        call: &DeviceCall,
        stream: sys::Stream,
    ) -> Result<Option<Handle<T>>> {
        match self.path {
            Path::Alone => self.alone(call, stream).map(|()| None),
            Path::Nccl => self.nccl()?.enqueue(call, stream).map(|()| None),
            Path::Staged => parts.stager()?.enqueue(&self.host, call, stream),
            Path::Hierarchical => self.hierarchical(parts, call, stream),
        }
    }

    /// Whether messages between ranks go from device to device ([`exchange`](Self::exchange)); else they go through the
    /// host's group.
    pub fn carries_messages(&self) -> bool {
        self.path == Path::Nccl
    }

    /// Enqueues messages that move together, as [`start`](Self::start) enqueues a call. Between two ranks messages match in
    /// the order in which both enqueue them; `stream` is past them when all have been met.
    ///
    /// # Safety
    /// As [`start`](Self::start).
    pub unsafe fn exchange(
        &self,
        messages: &[DeviceMessage],
        timeout: Option<Duration>,
        stream: u64,
        behind: Option<u64>,
    ) -> Result<Started<T>> {
        const OP: Collective = Collective::SendRecv;
        if !self.carries_messages() {
            return Err(Error::Internal("messages of this group go through the host".to_owned()));
        }
        for message in messages {
            let (op, argument) = if message.is_sent { ("send", "dst") } else { ("recv", "src") };
            self.host.shape().check_rank(op, argument, message.peer)?;
            message.memory.check(op, "tensor")?;
        }
        check_to_oneself(messages, self.host.rank())?;
        let stream = stream as sys::Stream;
        let (_parts, _visit) = self.enter(OP.name(), stream, behind)?;
        let (number, life) = self.announce(OP, timeout)?;
        let exchanged = self.nccl().and_then(|nccl| nccl.exchange_messages(messages, stream));
        self.end_of(number, life, stream, exchanged.map(|()| None))
    }

    /// Numbers a call that is about to be enqueued, and has it watched where NCCL has a part in it.
    fn announce(
        &self,
        collective: Collective,
        timeout: Option<Duration>,
    ) -> Result<(Number, Option<Arc<Life>>)> {
        let number = Number { collective, seq: self.calls.fetch_add(1, Ordering::Relaxed) };
        let announced = self.watch.as_ref().map(|watch| watch.announce(collective, number.seq, timeout));
        let life = announced.transpose().map_err(|error| error.at(&self.site(number)))?;
        Ok((number, life))
    }

    /// Marks the end of what was enqueued. A call that failed midway fails the group: the others must not wait for the rest
    /// of it. One that failed since it was announced gets the reason for that, whatever became of its parts.
    fn end_of(
        &self,
        number: Number,
        life: Option<Arc<Life>>,
        stream: sys::Stream,
        enqueued: Result<Option<Handle<T>>>,
    ) -> Result<Started<T>> {
        let marked = enqueued.and_then(|handle| {
            // The other ways refuse captures.
            let is_captured = self.path == Path::Nccl && self.device.is_capturing(stream)?;
            Ok((handle, self.events.mark(stream, is_captured)?))
        });
        if let Some(error) = life.as_ref().and_then(|life| life.error()) {
            return Err(error);
        }
        match (marked, life) {
            (Ok((handle, past)), life) => {
                if let Some(life) = &life {
                    if past.is_captured() { life.ends() } else { life.enqueued(&past) }
                }
                if past.is_captured()
                    && let Ok(nccl) = self.nccl()
                {
                    nccl.note_capture();
                }
                Ok(Started { number, handle, life, past })
            }
            (Err(error), life) => {
                let watched = self.watch.as_ref().zip(life.as_ref());
                let error = match watched {
                    Some((watch, life)) => watch.refusal(error, life),
                    None => error,
                };
                let error = error.at(&self.site(number));
                if leaves_others_waiting(&error) {
                    self.fail(&error);
                }
                if let Some(life) = life {
                    life.ends();
                }
                Err(error)
            }
        }
    }

    /// Fails the group on every rank, from within a call.
    fn fail(&self, error: &Error) {
        match &self.watch {
            Some(watch) => watch.fail(error),
            None => self.host.abort(&error.to_string()),
        }
    }

    fn site(&self, number: Number) -> Site {
        let (rank, group) = (self.host.rank(), self.host.name().to_owned());
        Site { rank, group, op: number.collective.name().to_owned(), seq: number.seq }
    }

    /// Blocks the host until the device is past the call, or it has failed, or for `limit`: then Timeout.
    pub fn wait(&self, started: &Started<T>, limit: Duration) -> Result<()> {
        self.wait_for(started, (Instant::now(), limit), limit).map(|_| ())
    }

    /// As [`wait`](Self::wait), which began at `since`, for callers that must look around now and then, at signals for
    /// instance: whether the call is over, after `slice` at the latest.
    pub fn wait_for(
        &self,
        started: &Started<T>,
        (since, limit): (Instant, Duration),
        slice: Duration,
    ) -> Result<bool> {
        let begun = Instant::now();
        if started.past.is_captured() {
            return Err(Error::Argument {
                op: started.number.collective.name().to_owned(),
                argument: "timeout",
                expected: "none, for a call that was captured in a graph".to_owned(),
                given: format!("{:.1} s", limit.as_secs_f64()),
                hint: "Wait without one, which orders streams; the host waits for the graph's replay"
                    .to_owned(),
            });
        }
        loop {
            if let Some(error) = started.error().or_else(|| self.failure()) {
                return Err(error);
            }
            let is_done = started.past.is_done().inspect_err(|error| {
                if leaves_others_waiting(error) {
                    self.fail(error);
                }
            });
            if is_done? {
                let watched = self.watch.as_ref().zip(started.life.as_ref());
                let verdict = watched.map_or(Some(Ok(())), |(watch, life)| watch.verdict(life));
                if let Some(verdict) = verdict {
                    return verdict.map(|()| true);
                }
            }
            let waited = since.elapsed();
            if waited >= limit {
                let site = self.site(started.number);
                return Err(Error::Timeout { site, waited, missing: Vec::new() });
            }
            if begun.elapsed() >= slice {
                return Ok(false);
            }
            std::thread::sleep(WAIT_STEP.min(limit - waited));
        }
    }

    /// Why the group failed, if it did, as far as is known without waiting for anybody.
    pub fn failure(&self) -> Option<Error> {
        let watched = self.watch.as_ref().and_then(Watch::failure);
        watched.or_else(|| self.host.known_failure()).or_else(|| self.rail.as_ref()?.known_failure())
    }

    /// The time limit of later calls that are given none.
    pub fn set_timeout(&self, limit: Duration) {
        self.host.set_timeout(limit);
    }

    /// Fails the group on every rank.
    pub fn abort(&self, reason: &str) {
        // First what releases streams that wait for words, then NCCL's kernels, which wait for peers.
        self.host.abort(reason);
        if let Some(rail) = &self.rail {
            rail.abort(reason);
        }
        self.end(Some(self.failure().unwrap_or_else(|| self.shut_down())));
    }

    /// Frees everything, once what is enqueued is over, or has failed, at the latest by the group's time limit. The group on the
    /// host is shut down later: what calls still need of it would fail, and nobody be told.
    pub fn shutdown(&self) {
        if self.process != std::process::id() {
            return;
        }
        self.finish_for(Instant::now(), Duration::MAX);
        self.take_down();
    }

    fn take_down(&self) {
        if let Some(rail) = &self.rail {
            rail.shutdown();
        }
        self.end(self.failure());
    }

    /// Waits for exchanges between nodes that are still to come, as [`shutdown`](Self::shutdown) does, which began at `since`; where that
    /// takes longer than the group's limit they fail, on all ranks. For callers that must look around now and then: whether
    /// that is over, after `slice` at the latest.
    pub fn finish_for(&self, since: Instant, slice: Duration) -> bool {
        if self.process != std::process::id() {
            return true;
        }
        let (begun, limit) = (Instant::now(), self.host.timeout());
        let is_under_way = || self.free_parts().is_some_and(|parts| parts.is_under_way(&self.device));
        while self.failure().is_none() && is_under_way() {
            let waited = since.elapsed();
            if waited >= limit {
                let (rank, group) = (self.host.rank(), self.host.name().to_owned());
                let site = Site { rank, group, op: "shutdown".to_owned(), seq: 0 };
                let error = Error::Timeout { site, waited, missing: Vec::new() };
                tracing::error!(
                    %error,
                    "calls on CUDA tensors are still under way: what they write is undefined. Synchronize the device \
                     before the group ends, or raise its time limit"
                );
                self.fail(&error);
                return true;
            }
            if begun.elapsed() >= slice {
                return false;
            }
            std::thread::sleep(WAIT_STEP);
        }
        true
    }

    /// Ends the parts, in order, or at once where the group has failed, as `why` says.
    fn end(&self, why: Option<Error>) {
        // A call that hangs while it is enqueued is ended as one of a group that has failed.
        let hangs = || {
            let error = self.free_parts().is_none().then(|| self.shut_down())?;
            self.fail(&error);
            Some(error)
        };
        let why = why.or_else(hangs);
        let end_stager = || match (self.free_parts(), self.device.visit()) {
            (Some(mut parts), _visit) => parts.stager = None,
            (None, _) => tracing::warn!("a call of group '{}' is still being enqueued", self.host.name()),
        };
        let end_nccl = || self.watch.iter().for_each(|watch| watch.end(why.as_ref()));
        // The stager's copies lie behind NCCL's kernels, which wait for their peers until NCCL is aborted; NCCL in order
        // waits for what the stager has enqueued.
        if why.is_some() {
            end_nccl();
            end_stager();
        } else {
            end_stager();
            end_nccl();
        }
    }

    /// The parts, once no call is being enqueued; none: one still is after [`FAREWELL`].
    fn free_parts(&self) -> Option<MutexGuard<'_, Parts<T>>> {
        let until = Instant::now() + FAREWELL;
        loop {
            match self.parts.try_lock() {
                Ok(parts) => return Some(parts),
                Err(TryLockError::Poisoned(parts)) => return Some(parts.into_inner()),
                Err(TryLockError::WouldBlock) if Instant::now() >= until => return None,
                Err(TryLockError::WouldBlock) => std::thread::sleep(WAIT_STEP),
            }
        }
    }

    fn shut_down(&self) -> Error {
        let (rank, group) = (self.host.rank(), self.host.name().to_owned());
        missing().at(&Site { rank, group, op: String::new(), seq: 0 })
    }

    fn nccl(&self) -> Result<&NcclComm> {
        self.watch.as_ref().map(|watch| &watch.nccl().first).ok_or_else(missing)
    }

    fn lock(&self) -> Result<MutexGuard<'_, Parts<T>>> {
        self.parts
            .lock()
            .map_err(|_| Error::Internal("a thread panicked while it enqueued a call".to_owned()))
    }

    /// What every call begins with: nothing has failed so far, and `stream` comes behind `behind`. Where that cannot be had the group
    /// fails as in the midst of a call, for the others make theirs.
    fn enter(
        &self,
        op: &str,
        stream: sys::Stream,
        behind: Option<u64>,
    ) -> Result<(MutexGuard<'_, Parts<T>>, Visit)> {
        let entered = self.try_enter(op, stream, behind);
        entered.inspect_err(|error| {
            if leaves_others_waiting(error) {
                self.fail(error);
            }
        })
    }

    fn try_enter(
        &self,
        op: &str,
        stream: sys::Stream,
        behind: Option<u64>,
    ) -> Result<(MutexGuard<'_, Parts<T>>, Visit)> {
        let parts = self.lock()?;
        let visit = self.device.visit()?;
        let behind = behind.map(|other| other as sys::Stream);
        if self.path != Path::Nccl {
            // A stream that comes behind one that captures takes part in the capture.
            [Some(stream), behind].into_iter().flatten().try_for_each(|s| self.refuse_capture(op, s))?;
        }
        if let Some(Err(error)) = parts.last.as_ref().and_then(Handle::result) {
            return Err(error);
        }
        // NCCL's kernels would wait for ranks that have heard of it already.
        if let Some(error) = self.failure() {
            return Err(error);
        }
        if let Some(other) = behind {
            parts.before.record(other)?;
            wait(&self.device, stream, &parts.before)?;
        }
        Ok((parts, visit))
    }

    fn refuse_capture(&self, op: &str, stream: sys::Stream) -> Result<()> {
        if !self.device.is_capturing(stream)? {
            return Ok(());
        }
        Err(Error::Argument {
            op: op.to_owned(),
            argument: "stream",
            expected: "one that captures no graph".to_owned(),
            given: "one that does".to_owned(),
            hint: "A replayed graph would not wait for other nodes: call it outside of the graph".to_owned(),
        })
    }

    fn alone(&self, call: &DeviceCall, stream: sys::Stream) -> Result<()> {
        let bytes = call.input.bytes.min(call.output.bytes);
        self.device.copy_on_device(call.output.address, call.input.address, bytes, stream)
    }

    /// Which way a call goes when there are several nodes, and several ranks on each.
    fn hierarchical(
        &self,
        parts: &mut Parts<T>,
        call: &DeviceCall,
        stream: sys::Stream,
    ) -> Result<Option<Handle<T>>> {
        let (Some(rail), Some(stager)) = (&self.rail, &mut parts.stager) else { return Err(missing()) };
        let flat = self.watch.as_ref().and_then(|watch| watch.nccl().flat.as_ref());
        match (self.selection.way(call, self.host.size()), flat) {
            (Way::Hierarchical, _) => {}
            (Way::Flat, Some(flat)) => return flat.enqueue(call, stream).map(|()| None),
            _ => return stager.enqueue(&self.host, call, stream),
        }
        let (shape, rank) = (self.host.shape(), self.host.rank());
        let is_source = match call.collective {
            Collective::AllReduce => true,
            Collective::Broadcast => call.root == rank,
            _ => false,
        };
        if is_source {
            self.device.copy_on_device(call.output.address, call.input.address, call.input.bytes, stream)?;
        }
        // The rail has a limit of its own, which it was made with.
        let call = DeviceCall { timeout: call.timeout.or(Some(self.host.timeout())), ..call.clone() };
        Hierarchy { nccl: self.nccl()?, rail, stager, shape, rank, stream }.enqueue(&call)
    }
}

impl<T: Transports> Drop for DeviceGroup<T> {
    /// Who did not shut it down does not wait for others, either: after an exception they may never come.
    fn drop(&mut self) {
        if self.process == std::process::id() {
            self.take_down();
        }
    }
}

/// Whether others may have begun a call that this rank does not carry to its end. One that is refused is refused everywhere, and
/// of a failed group they know.
fn leaves_others_waiting(error: &Error) -> bool {
    !matches!(error, Error::Argument { .. } | Error::Unsupported { .. } | Error::Aborted { .. })
}

/// The device must have been entered.
fn make_parts<T: Transports>(
    host: &Communicator<T>,
    path: Path,
    device: &Arc<Device>,
    settings: &Settings,
) -> Result<Parts<T>> {
    let slots = (settings.number("SMDDP_CUDA_SLOTS"), settings.number("SMDDP_CUDA_SLOT"));
    let stager = match path {
        Path::Staged => Some(Stager::new(device, host, slots, Scratch::None)?),
        Path::Hierarchical => Some(Stager::new(device, host, slots, Scratch::OnDevice)?),
        Path::Nccl | Path::Alone => None,
    };
    Ok(Parts { stager, before: Event::new(device)?, last: None, by_nccl: None })
}
