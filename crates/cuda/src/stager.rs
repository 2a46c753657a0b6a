//! Runs a collective on device memory as operations on pinned slots, pieces following one another.
//!
//! Calls whose rows differ in length pass as one piece (`pieces.rs`) through memory of their own, which is kept for later such calls:
//! unregistering memory waits for the device, and so, perhaps, for other ranks.
//!
//! The host waits, within the call's limit,
//! - for the first piece where [`UNDER_WAY`] are under way (384 MiB in slots of the default size; larger slots hold more, since pieces
//!   grow with the call), half as many where NCCL has a part in each. A piece takes four places in each of our streams, some more
//!   with GPUDirect, and about as many in the caller's, or eight with NCCL. Drivers have some thousand, and who enqueues more waits
//!   inside of them, with their locks;
//! - for its copies and for each exchange, where streams cannot wait for words.
//!
//! No other thread can do the first for the caller: the caller's stream would wait for what is yet to be enqueued, and who frees
//! memory waits for that stream with the very locks that enqueuing the rest needs. So all is enqueued that a stream waits for,
//! but for words that the exchange on the host stores, which needs no driver.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use smddp_core::communicator::{Communicator, Handle};
use smddp_core::error::Site;
use smddp_core::gate::{Gate, SLOTS};
use smddp_core::request::Request;
use smddp_core::transport::Transports;
use smddp_core::{Collective, Error, Region, Result};
use smddp_cuda_sys as sys;

use crate::call::DeviceCall;
use crate::device::{self, Arrival, Device, DeviceMemory, Event, Stream, wait};
use crate::direct::{Direct, DirectPiece};
use crate::pieces::{self, ALIGN, Rows};
use crate::pinned::{Pinned, SharedWords};
use crate::quiet::Uses;

/// How long words are tried before the log says so. A busy device may take longer than that.
const PROBE_BRIEF: Duration = Duration::from_secs(2);
/// How long at most: on a device that takes waits and never sees words, a job must start all the same.
const PROBE_LONGEST: Duration = Duration::from_secs(60);
/// Pieces whose exchange is not over.
const UNDER_WAY: usize = 192;
/// Slots, and halves of them, begin where all element types may, and what kernels read at once.
const APART: usize = 256;
/// How often a host that waits for the device looks.
const WAIT_STEP: Duration = Duration::from_micros(50);
/// How long the end waits for the device.
const DRAIN_LIMIT: Duration = Duration::from_secs(5);

/// Whether streams of a device see words, by its number, as far as that was tried: it stays so.
static TRIED: Mutex<Vec<(i32, bool)>> = Mutex::new(Vec::new());

/// Half of a slot holds inputs, half outputs; calls in place use the first.
struct Slot {
    memory: Pinned,
    /// Recorded behind the last copy out (C4).
    free: Event,
    /// Uses so far (gate W1).
    value: u32,
}

/// Memory of a call of its own, then of the next such one: pinning takes long.
struct Borrowed {
    memory: Pinned,
    /// Behind the call's last copy; none: only a part of the call was enqueued, which may be at work until the stager's end.
    past: Option<Event>,
}

impl Borrowed {
    /// An event that cannot be asked for is not past.
    fn is_free(&self) -> bool {
        self.past.as_ref().is_some_and(|past| past.is_done().unwrap_or(false))
    }
}

/// What is pinned for so many bytes: up to a quarter more, so that it has room for the next call of about as many.
fn roomy(bytes: usize) -> usize {
    bytes.next_multiple_of((bytes.next_power_of_two() / 8).max(ALIGN))
}

/// Whether slots have memory on the device too, half as much as on the host.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scratch {
    None,
    OnDevice,
}

pub(crate) struct Stager {
    device: Arc<Device>,
    words: SharedWords,
    uses: Arc<Uses>,
    slots: Vec<Slot>,
    /// Before the memory that it tells the network of.
    direct: Option<Direct>,
    scratch: Option<DeviceMemory>,
    next: usize,
    half: usize,
    to_host: Stream,
    to_device: Stream,
    begin: Event,
    end: Event,
    /// Orders `to_device` behind `to_host` (C5).
    handed_over: Event,
    /// Slot and value of pieces, as they were started; the exchanges of the first ones may be over.
    under_way: VecDeque<(usize, u32)>,
    /// Memory of calls that did not fit a slot; what was used last comes last.
    borrowed: Vec<Borrowed>,
    /// Whether words can be written and waited for from streams; else the host waits for the device.
    by_words: bool,
}

impl Stager {
    /// `count` slots of `bytes`; the device must have been entered.
    pub(crate) fn new<T: Transports>(
        device: &Arc<Device>,
        host: &Communicator<T>,
        (count, bytes): (usize, usize),
        scratch: Scratch,
    ) -> Result<Stager> {
        let count = count.clamp(1, SLOTS);
        let slot = |_| {
            let memory = Pinned::new(device, bytes)?.registered(host);
            Ok(Slot { memory, free: Event::new(device)?, value: 0 })
        };
        let words = SharedWords::new(device)?;
        let half = bytes / 2 / APART * APART;
        let mut stager = Stager {
            device: Arc::clone(device),
            uses: Uses::new(&words.words),
            words,
            slots: (0..count).map(slot).collect::<Result<_>>()?,
            direct: None,
            scratch: match scratch {
                Scratch::None => None,
                Scratch::OnDevice => Some(DeviceMemory::new(device, count * half)?),
            },
            next: 0,
            half,
            to_host: Stream::new(device)?,
            to_device: Stream::new(device)?,
            begin: Event::new(device)?,
            end: Event::new(device)?,
            handed_over: Event::new(device)?,
            under_way: VecDeque::new(),
            borrowed: Vec::new(),
            by_words: false,
        };
        stager.by_words = queues_are_many() && stager.has_words(host)?;
        if !stager.by_words {
            tracing::warn!(
                "streams cannot wait for words here: the host waits for the device in each exchange of CUDA tensors"
            );
        }
        Ok(stager)
    }

    /// Whether the device is waited for by words.
    pub(crate) fn is_by_words(&self) -> bool {
        self.by_words
    }

    /// Whether words can be waited for; tried once on each device, for half of the group's time limit at most, since the other
    /// ranks wait meanwhile.
    fn has_words<T: Transports>(&mut self, host: &Communicator<T>) -> Result<bool> {
        let ordinal = self.device.ordinal;
        let tried = || TRIED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&(_, has_words)) = tried().iter().find(|&&(device, _)| device == ordinal) {
            return Ok(has_words);
        }
        let limit = PROBE_LONGEST.min(host.timeout() / 2);
        let found = self.probe(host, limit);
        // A device that is busy for longer than a short limit is no sign.
        if let Ok(Some(has_words)) = found
            && (has_words || limit == PROBE_LONGEST)
        {
            tried().push((ordinal, has_words));
        }
        tracing::debug!(?found, "words of streams");
        if matches!(found, Ok(Some(false))) {
            self.leave_streams()?;
        }
        Ok(matches!(found, Ok(Some(true))))
    }

    /// A wait that sees nothing of the host's heads a stream. A word of the device's own may end it, as waits for the whole device
    /// need; if not, what is enqueued from now on is not behind it, and its word stays where it is.
    fn leave_streams(&mut self) -> Result<()> {
        if let Err(error) = self.to_host.write_word(self.words.done(0), 1) {
            tracing::debug!(%error, "a stream waits for good");
        }
        self.words.leave_behind();
        (self.to_host, self.to_device) = (Stream::new(&self.device)?, Stream::new(&self.device)?);
        Ok(())
    }

    /// Tries both directions on the first slot's words, which are at 0. None: the group failed meanwhile.
    fn probe<T: Transports>(&mut self, host: &Communicator<T>, limit: Duration) -> Result<Option<bool>> {
        let gate = Gate { words: Arc::clone(&self.words.words), slot: 0, value: 1 };
        self.slots[0].value = 1;
        self.to_host.write_word(self.words.ready(0), 1)?;
        self.hand_over()?;
        let waits = self.to_device.wait_word(self.words.done(0), 1, Arrival::InOrder);
        let (since, mut is_told) = (Instant::now(), false);
        let mut within = |what: &dyn Fn() -> bool| {
            while !what() && since.elapsed() < limit && host.known_failure().is_none() {
                if since.elapsed() > PROBE_BRIEF && !is_told {
                    is_told = true;
                    tracing::warn!(
                        group = host.name(),
                        "the device is busy, or its streams do not see words; trying for {:.0} s. SMDDP_CUDA=nccl needs none",
                        limit.as_secs_f64()
                    );
                }
                std::thread::sleep(WAIT_STEP);
            }
            what()
        };
        let arrived = waits.is_ok() && within(&|| gate.is_open());
        gate.leave();
        waits?;
        let released = arrived && within(&|| self.to_device.is_idle().unwrap_or(false));
        Ok(if arrived && released { Some(true) } else { host.known_failure().is_none().then_some(false) })
    }

    /// Enqueues the call behind `stream`'s work and lets `stream` wait for its end. The handle is that of its last
    /// piece; none: there was nothing to move.
    pub(crate) fn enqueue<T: Transports>(
        &mut self,
        host: &Communicator<T>,
        call: &DeviceCall,
        stream: sys::Stream,
    ) -> Result<Option<Handle<T>>> {
        let enqueued = self.enqueue_all(host, call, stream);
        if enqueued.is_err() {
            self.leave_to(stream);
        }
        enqueued
    }

    fn enqueue_all<T: Transports>(
        &mut self,
        host: &Communicator<T>,
        call: &DeviceCall,
        stream: sys::Stream,
    ) -> Result<Option<Handle<T>>> {
        self.follow(stream)?;
        let last = if call.counts.is_some() || call.splits.is_some() {
            self.whole(host, call)?
        } else {
            self.pieces(host, call)?
        };
        self.order(stream, &self.to_device)?;
        Ok(last)
    }

    /// A call has failed midway: what was enqueued of it comes before what `stream` is given next, such as the next use of
    /// the call's memory. Where the driver fails in that too there is nothing left to do.
    pub(crate) fn leave_to(&self, stream: sys::Stream) {
        for ours in [&self.to_host, &self.to_device] {
            if let Err(error) = self.order(stream, ours) {
                tracing::warn!(%error, "copies of a call that failed are not ordered: its memory may be written later");
            }
        }
    }

    /// Lets `stream` wait for what `ours` was given so far.
    fn order(&self, stream: sys::Stream, ours: &Stream) -> Result<()> {
        self.end.record(ours.raw)?;
        wait(&self.device, stream, &self.end)
    }

    /// How many pieces may be under way at once.
    pub(crate) fn depth(&self) -> usize {
        self.slots.len()
    }

    /// Columns of a piece of `rows` rows, of `total` columns.
    pub(crate) fn columns(&self, call: &DeviceCall, rows: usize, total: usize) -> Result<usize> {
        pieces::columns(call, (rows, total), self.half)
    }

    /// The address of the device memory of the slot that is next, which has room for all rows of a piece; 0 without.
    pub(crate) fn scratch(&self) -> u64 {
        self.scratch.as_ref().map_or(0, |memory| memory.address + (self.next * self.half) as u64)
    }

    /// Registers the slots' memory on the device with the network between the ranks of `between`; the bytes that its messages
    /// have at least, or why there is no such thing. [`settle_direct`](Self::settle_direct) must follow.
    pub(crate) fn offer_direct<T: Transports>(&mut self, between: &Communicator<T>) -> Result<usize> {
        let bytes = self.slots.len() * self.half;
        let direct = Direct::new(&self.device, between, self.by_words, &mut self.scratch, bytes)?;
        let least = direct.least();
        self.direct = Some(direct);
        Ok(least)
    }

    /// Whether messages may go from and to the device's memory, and how long they are at least, on all ranks alike.
    pub(crate) fn settle_direct(&mut self, least: Option<usize>) {
        self.direct = match (self.direct.take(), least) {
            (Some(direct), Some(least)) => Some(direct.from(least)),
            _ => None,
        };
    }

    /// Bytes of the shortest message from and to the device's memory, where there are any.
    pub(crate) fn direct_from(&self) -> Option<usize> {
        self.direct.as_ref().map(Direct::least)
    }

    /// Enqueues a call of one piece behind `stream`'s work, which goes on without it; its rows go to `outputs`. The slot
    /// it passes through, to be told to [`join`](Self::join) before it is used again, [`depth`](Self::depth) pieces later.
    pub(crate) fn fork<T: Transports>(
        &mut self,
        host: &Communicator<T>,
        call: &DeviceCall,
        outputs: &[u64],
        stream: sys::Stream,
    ) -> Result<(usize, Handle<T>)> {
        self.follow(stream)?;
        let rows = Rows::of(call, host.rank(), host.size());
        let slot = self.next;
        let row = call.count * call.dtype.size();
        let inputs = |r: usize| call.input.address + (r * row) as u64;
        self.piece(host, call, &rows, call.count, (&inputs, &|r| outputs[r])).map(|handle| (slot, handle))
    }

    /// Lets `stream` wait for the piece in this slot.
    pub(crate) fn join(&self, slot: usize, stream: sys::Stream) -> Result<()> {
        wait(&self.device, stream, &self.slots[slot].free)
    }

    /// Lets `stream` wait for what was last in the slot that is next; nothing, where that is free.
    pub(crate) fn join_next(&self, stream: sys::Stream) -> Result<()> {
        self.join(self.next, stream)
    }

    /// Copies come behind what `stream` was given so far.
    fn follow(&self, stream: sys::Stream) -> Result<()> {
        self.begin.record(stream)?;
        self.to_host.wait(&self.begin)?;
        self.to_device.wait(&self.begin)
    }

    fn pieces<T: Transports>(
        &mut self,
        host: &Communicator<T>,
        call: &DeviceCall,
    ) -> Result<Option<Handle<T>>> {
        let rows = Rows::of(call, host.rank(), host.size());
        let size = call.dtype.size();
        let columns = self.columns(call, Rows::most(call.collective, host.size()), call.count)?;
        let row = call.count * size;
        let mut last = None;
        let mut from = 0;
        while from < call.count {
            let count = columns.min(call.count - from);
            let at = |start: u64, r: usize| start + (r * row + from * size) as u64;
            let inputs = |r: usize| at(call.input.address, r);
            let outputs = |r: usize| at(call.output.address, r);
            last = Some(self.piece(host, call, &rows, count, (&inputs, &outputs))?);
            from += count;
        }
        Ok(last)
    }

    /// `count` columns, of rows at these addresses.
    fn piece<T: Transports>(
        &mut self,
        host: &Communicator<T>,
        call: &DeviceCall,
        rows: &Rows,
        count: usize,
        (inputs, outputs): (&dyn Fn(usize) -> u64, &dyn Fn(usize) -> u64),
    ) -> Result<Handle<T>> {
        self.make_room(host, call)?;
        let on_device = self.scratch();
        let (slot, gate) = self.take_slot();
        let value = gate.value;
        let memory = self.slots[slot].memory.region();
        let width = count * call.dtype.size();
        let input = memory.slice(0, rows.input * width);
        let output = if rows.in_place { input } else { memory.slice(self.half, rows.output * width) };
        let request = call.request(count, input, output);

        self.to_host.wait(&self.slots[slot].free)?;
        let handle = if self.direct.as_ref().is_some_and(|direct| direct.carries(host, call, count)) {
            let piece = DirectPiece { request, rows, width, on_device, place: (host.rank(), host.size()) };
            self.through_device(host, &piece, gate, (inputs, outputs))?
        } else {
            self.copy_in(input, inputs, (rows.copied_in, width))?;
            let handle = self.exchange(host, &request, gate)?;
            self.copy_out(output, outputs, (rows.copied_out, width))?;
            handle
        };
        self.slots[slot].free.record(self.to_device.raw)?;
        self.under_way.push_back((slot, value));
        Ok(handle)
    }

    /// Rows at these places, to where they follow one another.
    fn copy_in(&self, to: Region, from: &dyn Fn(usize) -> u64, (rows, width): (usize, usize)) -> Result<()> {
        if rows == 0 {
            return Ok(());
        }
        match device::Rows::at(from, rows, width) {
            Some(from) => self.to_host.rows_to_host(to.as_ptr(), from, (rows, width)),
            None => (0..rows).try_for_each(|r| {
                self.to_host.copy_to_host(to.slice(r * width, width).as_ptr(), from(r), width)
            }),
        }
    }

    fn copy_out(&self, from: Region, to: &dyn Fn(usize) -> u64, (rows, width): (usize, usize)) -> Result<()> {
        if rows == 0 {
            return Ok(());
        }
        match device::Rows::at(to, rows, width) {
            Some(to) => self.to_device.rows_to_device(to, from.as_ptr(), (rows, width)),
            None => (0..rows).try_for_each(|r| {
                self.to_device.copy_to_device(to(r), from.slice(r * width, width).as_ptr(), width)
            }),
        }
    }

    /// A piece whose messages go from and to the slot's memory on the device; what this rank sums goes through the host.
    fn through_device<T: Transports>(
        &self,
        host: &Communicator<T>,
        piece: &DirectPiece<'_>,
        gate: Gate,
        (inputs, outputs): (&dyn Fn(usize) -> u64, &dyn Fn(usize) -> u64),
    ) -> Result<Handle<T>> {
        let DirectPiece { request, rows, width, on_device, place: (me, _) } = piece;
        let (collective, width) = (request.collective, *width);
        let (own, own_len) = piece.own_share();
        let row = |r: usize| on_device + (r * width) as u64;
        let first = if collective == Collective::AllGather { *me } else { 0 };
        for r in 0..rows.copied_in {
            self.device.copy_on_device(row(first + r), inputs(r), width, self.to_host.raw)?;
        }
        if own_len > 0 {
            let share = request.input.slice(own, own_len);
            self.to_host.copy_to_host(share.as_ptr(), on_device + own as u64, own_len)?;
        }
        let handle = self.exchange(host, &piece.far_request(), gate)?;
        let copy = |at: usize, len: usize| {
            let (to, from) = (outputs(0) + at as u64, on_device + at as u64);
            self.device.copy_on_device(to, from, len, self.to_device.raw)
        };
        match collective {
            Collective::AllReduce => {
                copy(0, own)?;
                copy(own + own_len, width - own - own_len)?;
                let sum = request.output.slice(own, own_len);
                self.to_device.copy_to_device(outputs(0) + own as u64, sum.as_ptr(), own_len)?;
            }
            Collective::ReduceScatter => {
                self.to_device.copy_to_device(outputs(0), request.output.as_ptr(), width)?;
            }
            _ => {
                for r in 0..rows.copied_out {
                    self.device.copy_on_device(outputs(r), row(r), width, self.to_device.raw)?;
                }
            }
        }
        Ok(handle)
    }

    /// A call with rows of different lengths.
    fn whole<T: Transports>(
        &mut self,
        host: &Communicator<T>,
        call: &DeviceCall,
    ) -> Result<Option<Handle<T>>> {
        self.make_room(host, call)?;
        let region = self.borrow(call.input.bytes + call.output.bytes + ALIGN)?;
        let (slot, gate) = self.take_slot();
        let value = gate.value;
        let (input, output) = (
            region.slice(0, call.input.bytes),
            region.slice(call.input.bytes.next_multiple_of(ALIGN), call.output.bytes),
        );
        self.to_host.wait(&self.slots[slot].free)?;
        self.to_host.copy_to_host(input.as_ptr(), call.input.address, input.len())?;
        let handle = self.exchange(host, &call.request(call.count, input, output), gate)?;
        self.to_device.copy_to_device(call.output.address, output.as_ptr(), output.len())?;
        self.slots[slot].free.record(self.to_device.raw)?;
        self.under_way.push_back((slot, value));
        let past = Event::new(&self.device)?;
        past.record(self.to_device.raw)?;
        if let Some(borrowed) = self.borrowed.last_mut() {
            borrowed.past = Some(past);
        }
        Ok(Some(handle))
    }

    /// Pinned memory that nobody uses, last in `borrowed`: the call that gets it says there where it is past it.
    fn borrow(&mut self, bytes: usize) -> Result<Region> {
        let mut free: Vec<Borrowed> = self.borrowed.extract_if(.., |borrowed| borrowed.is_free()).collect();
        let len = |borrowed: &Borrowed| borrowed.memory.region().len();
        let fitting = (0..free.len()).filter(|&at| len(&free[at]) >= bytes).min_by_key(|&at| len(&free[at]));
        let fitting = fitting.map(|at| free.remove(at).memory);
        let memory =
            fitting.map_or_else(|| Pinned::new(&self.device, roomy(bytes)), Ok).or_else(|error| {
                if free.is_empty() {
                    return Err(error);
                }
                // What is kept makes room.
                free.clear();
                Pinned::new(&self.device, bytes)
            })?;
        self.borrowed.splice(..0, free);
        let region = memory.region();
        self.borrowed.push(Borrowed { memory, past: None });
        Ok(region)
    }

    /// Waits, outside of the driver, until the streams have places for another piece.
    fn make_room<T: Transports>(&mut self, host: &Communicator<T>, call: &DeviceCall) -> Result<()> {
        let words = &self.words.words;
        // NCCL works in the scratch.
        let most = if self.scratch.is_some() { UNDER_WAY / 2 } else { UNDER_WAY };
        let under_way = &mut self.under_way;
        if !self.by_words {
            // Nothing is under way that the host has not waited for.
            under_way.clear();
            return Ok(());
        }
        let mut has_room = || {
            while under_way.front().is_some_and(|&(slot, value)| words.is_left(slot, value)) {
                under_way.pop_front();
            }
            Ok(under_way.len() < most)
        };
        wait_for(host, (call.collective, call.timeout), &mut has_room)
    }

    fn take_slot(&mut self) -> (usize, Gate) {
        let slot = self.next;
        self.next = (self.next + 1) % self.slots.len();
        let used = &mut self.slots[slot];
        used.value = used.value.wrapping_add(1);
        (slot, Gate { words: Arc::clone(&self.words.words), slot, value: used.value })
    }

    /// Behind the copies to the host, and before those to the device: the operation itself (C3).
    fn exchange<T: Transports>(
        &self,
        host: &Communicator<T>,
        request: &Request,
        gate: Gate,
    ) -> Result<Handle<T>> {
        let (slot, value) = (gate.slot, gate.value);
        if self.by_words {
            self.to_host.write_word(self.words.ready(slot), value)?;
            self.hand_over()?;
            let request = Request { gate: Some(gate), ..request.clone() };
            let beginning = self.uses.begin();
            // SAFETY: the memory, a slot's or borrowed, is freed at the stager's end only when this use's `done` says that
            // the operation has left it, or, if borrowed, behind the copy that waits for `done`; C4 keeps others out.
            let handle = unsafe { host.start(&request)? };
            beginning.started(slot, value);
            let arrival = self.direct.as_ref().map_or(Arrival::InOrder, Direct::arrival);
            self.to_device.wait_word(self.words.done(slot), value, arrival)?;
            return Ok(handle);
        }
        self.wait_for_input(host, request)?;
        // SAFETY: the memory stays until the operation is over, which is waited for here; C4 keeps others out.
        let handle = unsafe { host.start(request)? };
        // For as long as the operation's own limit lets it.
        handle.wait(None)?;
        Ok(handle)
    }

    /// What `to_device` is given from now on comes behind what `to_host` holds (C5).
    fn hand_over(&self) -> Result<()> {
        self.handed_over.record(self.to_host.raw)?;
        self.to_device.wait(&self.handed_over)
    }

    /// Blocks the host until the copies to it are done: kernels that never end may lie before them.
    fn wait_for_input<T: Transports>(&self, host: &Communicator<T>, request: &Request) -> Result<()> {
        wait_for(host, (request.collective, request.timeout), &mut || self.to_host.is_idle())
    }
}

/// Blocks the host until `is_there`, the group has failed, or the call's limit has passed.
fn wait_for<T: Transports>(
    host: &Communicator<T>,
    (collective, timeout): (Collective, Option<Duration>),
    is_there: &mut dyn FnMut() -> Result<bool>,
) -> Result<()> {
    if is_there()? {
        return Ok(());
    }
    let (since, limit) = (Instant::now(), timeout.unwrap_or_else(|| host.timeout()));
    loop {
        // First, since a failure ends what is waited for, too.
        if let Some(error) = host.known_failure() {
            return Err(error);
        }
        if is_there()? {
            return Ok(());
        }
        let waited = since.elapsed();
        if waited >= limit {
            let (rank, group) = (host.rank(), host.name().to_owned());
            let site = Site { rank, group, op: collective.name().to_owned(), seq: host.calls() };
            return Err(Error::Timeout { site, waited, missing: Vec::new() });
        }
        std::thread::sleep(WAIT_STEP.min(limit - waited));
    }
}

impl Drop for Stager {
    /// The group behind has ended or failed, so every wait is released (gate W2); what is enqueued soon runs out. Where that is
    /// not known the memory is not freed.
    fn drop(&mut self) {
        let device = Arc::clone(&self.device);
        let Ok(_visit) = device.visit() else { return self.leave_behind() };
        let until = Instant::now() + DRAIN_LIMIT;
        loop {
            match self.is_at_rest() {
                Ok(true) => return,
                Ok(false) if Instant::now() <= until => std::thread::sleep(Duration::from_micros(100)),
                Ok(false) => {
                    tracing::warn!("the device did not finish; its staging memory is left behind");
                    return self.leave_behind();
                }
                Err(error) => {
                    tracing::debug!(%error, "the device does not answer; its staging memory is left behind");
                    return self.leave_behind();
                }
            }
        }
    }
}

impl Stager {
    /// Whether neither the device nor an operation uses the memory any more.
    pub(crate) fn is_at_rest(&self) -> Result<bool> {
        Ok(self.to_host.is_idle()? && self.to_device.is_idle()? && self.uses.are_over())
    }

    /// Memory the device may still write to is never freed.
    fn leave_behind(&mut self) {
        for slot in self.slots.drain(..) {
            std::mem::forget(slot.memory);
        }
        for borrowed in self.borrowed.drain(..) {
            std::mem::forget(borrowed.memory);
        }
        std::mem::forget((self.direct.take(), self.scratch.take()));
        self.words.leave_behind();
    }
}

/// With few hardware queues a stream that waits stops others, computing ones among them.
fn queues_are_many() -> bool {
    const USUAL: u32 = 8;
    let set = std::env::var("CUDA_DEVICE_MAX_CONNECTIONS").ok().and_then(|v| v.parse::<u32>().ok());
    set.is_none_or(|n| n >= USUAL)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_calls_of_about_one_size_is_roomy_and_not_wasteful() {
        for bytes in [64, 100, 4097, 65_000, (1 << 20) + 1, 1 << 28] {
            let pinned = roomy(bytes);
            assert!((bytes..=bytes + bytes / 4 + ALIGN).contains(&pinned), "{bytes}: {pinned}");
        }
        assert_eq!(roomy(1_000_000), roomy(950_000));
    }
}
