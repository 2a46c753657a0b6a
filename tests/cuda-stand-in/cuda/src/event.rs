//! Events: each record is a new generation; who waits means the generation of the time of the call.

use crate::code::{Code, Result};
use crate::entry::lock;
use crate::queue::wait_parked;
use crate::stream::{Stream, next_handle};
use smddp_standin::switches::{OneQueue, Switches};
use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

const DISABLE_TIMING: u32 = 2;
const INTERPROCESS: u32 = 4;

#[derive(Default)]
struct State {
    recorded: u64,
    done: u64,
    at: Option<Instant>,
    /// Where it was recorded last.
    last: Option<(Arc<Stream>, u64)>,
    /// That stream captured a graph.
    captured: bool,
}

pub struct Event {
    handle: usize,
    timing: bool,
    state: Mutex<State>,
    changed: Condvar,
}

static EVENTS: Mutex<BTreeMap<usize, Arc<Event>>> = Mutex::new(BTreeMap::new());

pub fn create(flags: u32) -> Result<usize> {
    if flags > 7 || flags & INTERPROCESS != 0 && flags & DISABLE_TIMING == 0 {
        return Err(Code::INVALID_VALUE);
    }
    let event = Event {
        handle: next_handle(),
        timing: flags & DISABLE_TIMING == 0,
        state: Mutex::default(),
        changed: Condvar::new(),
    };
    let handle = event.handle;
    lock(&EVENTS).insert(handle, Arc::new(event));
    Ok(handle)
}

pub fn find(handle: usize) -> Result<Arc<Event>> {
    lock(&EVENTS).get(&handle).cloned().ok_or(Code::INVALID_HANDLE)
}

/// Work that refers to it goes on.
pub fn destroy(handle: usize) -> Result {
    lock(&EVENTS).remove(&handle).map(|_| ()).ok_or(Code::INVALID_HANDLE)
}

pub fn live() -> usize {
    lock(&EVENTS).len()
}

impl Event {
    pub fn record(self: &Arc<Self>, stream: &Arc<Stream>) {
        let generation = {
            let mut state = lock(&self.state);
            state.recorded += 1;
            state.captured = stream.is_capturing();
            state.recorded
        };
        let event = Arc::clone(self);
        let place = stream.enqueue_after("cuEventRecord", Vec::new(), true, move || {
            let mut state = lock(&event.state);
            state.done = state.done.max(generation);
            state.at = Some(Instant::now());
            event.changed.notify_all();
            Ok(())
        });
        lock(&self.state).last = Some((Arc::clone(stream), place));
    }

    fn wait_some(&self, generation: u64, time: Duration) -> bool {
        let state = lock(&self.state);
        let (state, _) = self
            .changed
            .wait_timeout_while(state, time, |state| state.done < generation)
            .unwrap_or_else(PoisonError::into_inner);
        state.done >= generation
    }

    /// What is queued on `stream` later waits for the generation recorded last; for none, if there is none.
    pub fn hold(self: &Arc<Self>, stream: &Arc<Stream>) {
        let (generation, last) = {
            let state = lock(&self.state);
            (state.recorded, state.last.clone())
        };
        let event = Arc::clone(self);
        // Where one queue serves all streams in any order, it must know; elsewhere the operation waits by itself.
        let after = last.filter(|_| Switches::get().one_queue == OneQueue::Any).into_iter().collect();
        stream.enqueue_after("cuStreamWaitEvent", after, false, move || {
            let what = || format!("record {generation} of event {:#x}", event.handle);
            wait_parked(what, |time| Ok(event.wait_some(generation, time)))
        });
    }

    pub fn query(&self) -> Result {
        let state = lock(&self.state);
        match state.done >= state.recorded {
            _ if state.captured => Err(Code::CAPTURED_EVENT),
            true => Ok(()),
            false => Err(Code::NOT_READY),
        }
    }

    pub fn synchronize(&self) -> Result {
        let state = lock(&self.state);
        if state.captured {
            return Err(Code::CAPTURED_EVENT);
        }
        let last = state.last.clone();
        drop(state);
        last.map_or(Ok(()), |(stream, place)| stream.synchronize(place))
    }

    pub fn milliseconds_to(&self, end: &Self) -> Result<f32> {
        if !self.timing || !end.timing {
            return Err(Code::INVALID_HANDLE);
        }
        self.query()?;
        end.query()?;
        let at = |event: &Self| lock(&event.state).at.ok_or(Code::INVALID_HANDLE);
        let (start, end) = (at(self)?, at(end)?);
        let forth = end.saturating_duration_since(start).as_secs_f32();
        let back = start.saturating_duration_since(end).as_secs_f32();
        Ok((forth - back) * 1e3)
    }
}
