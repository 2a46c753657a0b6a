//! Streams: order within one, and what the legacy default stream adds between several.

use crate::code::{Code, Result};
use crate::context::{self, Device};
use crate::entry::{self, lock};
use crate::queue::{Op, Queue, wait_parked};
use smddp_standin::switches::{OneQueue, Switches};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Waits for all blocking streams of its device, and they for it.
    Legacy,
    Blocking,
    NonBlocking,
}

#[derive(Default)]
struct Progress {
    queued: u64,
    done: u64,
}

pub struct Stream {
    handle: usize,
    device: i32,
    pub kind: Kind,
    pub priority: i32,
    queue: Arc<Queue>,
    progress: Mutex<Progress>,
    changed: Condvar,
    /// Number of the graph that is captured, 0 for none. Only said: what it is given runs all the same.
    captures: AtomicU64,
}

impl fmt::Display for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "stream {:#x} of device {}", self.handle, self.device)
    }
}

/// Graphs captured so far, and how many of the first of them were destroyed.
static GRAPHS: AtomicU64 = AtomicU64::new(0);
static DESTROYED: AtomicU64 = AtomicU64::new(0);

/// Streams that capture.
static CAPTURES: AtomicU64 = AtomicU64::new(0);

pub fn captures_under_way() -> bool {
    CAPTURES.load(Ordering::SeqCst) > 0
}

pub fn destroy_graphs() {
    DESTROYED.store(GRAPHS.load(Ordering::SeqCst), Ordering::SeqCst);
}

pub fn graph_lives(graph: u64) -> bool {
    graph > DESTROYED.load(Ordering::SeqCst)
}

/// With `SMDDP_STANDIN_ONE_QUEUE` all streams share this one, as hardware with one connection does.
fn shared_queue() -> &'static Arc<Queue> {
    static QUEUE: OnceLock<Arc<Queue>> = OnceLock::new();
    QUEUE.get_or_init(Arc::default)
}

impl Stream {
    pub fn new(handle: usize, device: i32, kind: Kind, priority: i32) -> Self {
        let shares = Switches::get().one_queue != OneQueue::Off;
        let queue = if shares { Arc::clone(shared_queue()) } else { Arc::default() };
        Self {
            handle,
            device,
            kind,
            priority,
            queue,
            progress: Mutex::default(),
            changed: Condvar::new(),
            captures: AtomicU64::new(0),
        }
    }

    pub fn handle(&self) -> usize {
        self.handle
    }

    pub fn device(&self) -> &'static Device {
        context::device_known(self.device)
    }

    /// The same in every run for the stream made first, second, …: delays hang on it.
    pub fn serial(&self) -> u64 {
        self.handle as u64
    }

    /// Queues `action`; gives its place.
    pub fn enqueue(
        self: &Arc<Self>,
        name: &'static str,
        action: impl FnOnce() -> Result + Send + 'static,
    ) -> u64 {
        self.enqueue_after(name, Vec::new(), false, action)
    }

    /// As [`Stream::enqueue`], after other streams' places. `always`: see [`Op::always`].
    pub fn enqueue_after(
        self: &Arc<Self>,
        name: &'static str,
        mut after: Vec<(Arc<Self>, u64)>,
        always: bool,
        action: impl FnOnce() -> Result + Send + 'static,
    ) -> u64 {
        let _driver = entry::driver_shared();
        // One lock a device: the place taken and what it is after belong together, so nothing waits in a circle.
        let order = lock(&self.device().order);
        after.extend(self.device().implied(self));
        let seq = {
            let mut progress = lock(&self.progress);
            progress.queued += 1;
            progress.queued
        };
        let op = Op { stream: Arc::clone(self), seq, name, after, action: Box::new(action), always };
        self.queue.push(op);
        drop(order);
        seq
    }

    pub fn is_capturing(&self) -> bool {
        self.graph() != 0
    }

    pub fn graph(&self) -> u64 {
        self.captures.load(Ordering::SeqCst)
    }

    pub fn set_capturing(&self, captures: bool) {
        let graph = if captures { GRAPHS.fetch_add(1, Ordering::SeqCst) + 1 } else { 0 };
        let before = self.captures.swap(graph, Ordering::SeqCst);
        match (before != 0, captures) {
            (false, true) => CAPTURES.fetch_add(1, Ordering::SeqCst),
            (true, false) => CAPTURES.fetch_sub(1, Ordering::SeqCst),
            _ => 0,
        };
    }

    /// The place of what was queued last.
    pub fn place(&self) -> u64 {
        lock(&self.progress).queued
    }

    pub fn is_done(&self, place: u64) -> bool {
        lock(&self.progress).done >= place
    }

    pub fn done(&self, seq: u64) {
        lock(&self.progress).done = seq;
        self.changed.notify_all();
    }

    fn wait_some(&self, place: u64, time: Duration) -> bool {
        let progress = lock(&self.progress);
        let (progress, _) = self
            .changed
            .wait_timeout_while(progress, time, |progress| progress.done < place)
            .unwrap_or_else(PoisonError::into_inner);
        progress.done >= place
    }

    /// Another stream's thread waits for `place` of this one, for operation `who`.
    pub fn wait_parked(&self, place: u64, who: &str) -> Result {
        wait_parked(
            || format!("{self}, which {who} is ordered after"),
            |time| Ok(self.wait_some(place, time)),
        )
    }

    /// The host waits for `place`. Whatever blocks the stream gives up in time, and then this does.
    pub fn synchronize(&self, place: u64) -> Result {
        let start = Instant::now();
        let limit = Switches::get().hang_limit * 4 + Duration::from_secs(5);
        while !self.wait_some(place, Duration::from_millis(100)) {
            if start.elapsed() > limit {
                entry::break_context(Code::LAUNCH_TIMEOUT, format!("the host gave up waiting for {self}"));
            }
            if let Some((code, _)) = entry::lasting_error()
                && start.elapsed() > limit
            {
                return Err(code);
            }
        }
        entry::lasting_error().map_or(Ok(()), |(code, _)| Err(code))
    }

    pub fn close(&self) {
        if Switches::get().one_queue == OneQueue::Off {
            self.queue.close();
        }
    }
}

/// Handles of streams and events: never null, never an address.
pub fn next_handle() -> usize {
    static NEXT: AtomicU64 = AtomicU64::new(0x5100);
    NEXT.fetch_add(0x10, Ordering::Relaxed) as usize
}
