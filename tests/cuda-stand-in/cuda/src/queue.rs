//! A queue of operations served in order by one thread; streams feed it.

use crate::code::{Code, Result};
use crate::entry::{self, lock};
use crate::stream::Stream;
use smddp_standin::switches::{OneQueue, Switches};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// One operation of a stream.
pub struct Op {
    pub stream: Arc<Stream>,
    /// Its place in the stream, from 1.
    pub seq: u64,
    pub name: &'static str,
    /// Places in other streams that must be done before.
    pub after: Vec<(Arc<Stream>, u64)>,
    pub action: Box<dyn FnOnce() -> Result + Send>,
    /// Runs even if the context is broken: it tells waiters that the operation is over.
    pub always: bool,
}

#[derive(Default)]
struct State {
    ops: VecDeque<Op>,
    started: bool,
    closed: bool,
}

#[derive(Default)]
pub struct Queue {
    state: Mutex<State>,
    changed: Condvar,
}

/// Operations given to a queue that had no room count as calls of this name.
const FULL: &str = "full queue";
/// What runs first where any order will do.
const FIRST: &str = "cuStreamWaitValue32";

static PARKED: AtomicU64 = AtomicU64::new(0);
static EXECUTED: AtomicU64 = AtomicU64::new(0);

/// Operations that wait at the head of their queue.
pub fn parked() -> u64 {
    PARKED.load(Ordering::SeqCst)
}

pub fn executed() -> u64 {
    EXECUTED.load(Ordering::SeqCst)
}

pub fn park(waits: bool) {
    if waits {
        PARKED.fetch_add(1, Ordering::SeqCst);
    } else {
        PARKED.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Waits until `done` says so, counted as parked meanwhile. Past the limit the context breaks: a test that
/// hangs has to end, and to say why.
pub fn wait_parked(what: impl Fn() -> String, mut done: impl FnMut(Duration) -> Result<bool>) -> Result {
    if done(Duration::ZERO)? {
        return Ok(());
    }
    park(true);
    let limit = Switches::get().hang_limit;
    let start = Instant::now();
    let result = loop {
        match done(Duration::from_millis(20)) {
            Ok(true) => break Ok(()),
            // A broken context does nothing more.
            Ok(false) if let Some((code, _)) = entry::lasting_error() => break Err(code),
            Ok(false) if start.elapsed() < limit => {}
            Ok(false) => {
                entry::break_context(
                    Code::LAUNCH_TIMEOUT,
                    format!("after {} s still waiting for {}", limit.as_secs(), what()),
                );
                break Err(Code::LAUNCH_TIMEOUT);
            }
            Err(code) => break Err(code),
        }
    };
    park(false);
    result
}

impl State {
    fn take(&mut self) -> Option<Op> {
        if Switches::get().one_queue != OneQueue::Any {
            return self.ops.pop_front();
        }
        let mut streams: Vec<&Stream> = Vec::new();
        let mut may_run = Vec::new();
        for (at, op) in self.ops.iter().enumerate() {
            if streams.iter().any(|stream| std::ptr::eq(*stream, &*op.stream)) {
                continue;
            }
            streams.push(&op.stream);
            if op.after.iter().all(|(other, place)| other.is_done(*place)) {
                may_run.push(at);
            }
        }
        let first = may_run.iter().find(|at| self.ops[**at].name == FIRST).or(may_run.first())?;
        self.ops.remove(*first)
    }
}

impl Queue {
    /// Blocks while there is no room, whatever locks its caller holds: as drivers do.
    pub fn push(self: &Arc<Self>, op: Op) {
        let depth = Switches::get().queue_depth;
        let mut state = lock(&self.state);
        if depth > 0 && state.ops.len() >= depth {
            entry::count(FULL);
            let is_full = |state: &mut State| state.ops.len() >= depth && entry::lasting_error().is_none();
            state = self.changed.wait_while(state, is_full).unwrap_or_else(PoisonError::into_inner);
        }
        state.ops.push_back(op);
        if !state.started {
            state.started = true;
            let queue = Arc::clone(self);
            let spawned =
                std::thread::Builder::new().name("standin-stream".into()).spawn(move || queue.serve());
            if let Err(why) = spawned {
                entry::break_context(Code::UNKNOWN, format!("no thread for a stream: {why}"));
            }
        }
        self.changed.notify_all();
    }

    /// The thread ends when everything queued is done.
    pub fn close(&self) {
        lock(&self.state).closed = true;
        self.changed.notify_all();
    }

    fn serve(&self) {
        entry::thread_serves_queue();
        loop {
            let mut state = lock(&self.state);
            let op = loop {
                if let Some(op) = state.take() {
                    self.changed.notify_all();
                    break op;
                }
                if state.closed && state.ops.is_empty() {
                    return;
                }
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            };
            drop(state);
            run(op);
        }
    }
}

fn run(op: Op) {
    let Op { stream, seq, name, after, action, always } = op;
    let result = after
        .iter()
        .try_for_each(|(other, place)| other.wait_parked(*place, name))
        .and_then(|()| entry::enter("stream"));
    std::thread::sleep(Switches::get().delay(stream.serial(), seq));
    if let Err(code) = result {
        entry::break_context(code, format!("{name} on {stream} could not start"));
    }
    if always || entry::lasting_error().is_none() {
        // A panic in an operation must not leave its stream unserved for ever.
        match std::panic::catch_unwind(std::panic::AssertUnwindSafe(action)) {
            Ok(Ok(())) => {}
            Ok(Err(code)) => {
                entry::break_context(code, format!("{name}, operation {seq} of {stream}, failed"))
            }
            Err(_) => entry::break_context(Code::LAUNCH_FAILED, format!("{name} on {stream} panicked")),
        }
    }
    EXECUTED.fetch_add(1, Ordering::SeqCst);
    stream.done(seq);
}
