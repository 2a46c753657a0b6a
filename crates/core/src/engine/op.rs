//! One operation as its caller sees it: started, perhaps waited for, done once.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::thread::futex;

use crate::call::Call;
use crate::engine::graph::Ready;
use crate::engine::numbers::MessageNumbers;
use crate::error::{Error, Result, Site};
use crate::far::FarCall;
use crate::gate::Gate;
use crate::memory::Region;
use crate::transport::MsgKey;

pub type Callback = Box<dyn FnOnce(&Result<()>) + Send>;

/// Which group is meant: its place in the engine, and whose it must be. Places are used again.
#[derive(Clone, Copy, Debug)]
pub struct GroupKey {
    pub index: usize,
    pub id: u64,
}

/// What an operation does.
pub enum Work {
    Collective {
        ready: Arc<Ready>,
        input: Region,
        output: Region,
        far: Option<FarCall>,
    },
    Message(PointToPoint),
    /// A receive from whichever rank's next message of `tag` comes first; `source` tells which that was.
    ReceiveAny {
        tag: u64,
        region: Region,
        numbers: Arc<MessageNumbers>,
        source: OnceLock<usize>,
    },
}

/// A message to or from one rank.
#[derive(Clone, Copy, Debug)]
pub struct PointToPoint {
    /// Group rank of the other side.
    pub peer: usize,
    pub key: MsgKey,
    pub region: Region,
    pub send: bool,
}

/// How long a call past its limit waits for the word of a rank that may know better who is missing; at most a quarter
/// of the limit.
const HEARSAY: Duration = Duration::from_millis(500);

/// What moves so few bytes, in a tenth of a millisecond or so, is brief: it gains nothing by going on beside what its caller computes.
pub const BRIEF: usize = 1 << 20;

/// As it is kept in atomics; what is too long for it is 584 years.
pub fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Shared by the caller, the engine and whoever waits.
pub struct OpState {
    pub call: Call,
    pub work: Work,
    pub group: GroupKey,
    pub group_name: Arc<str>,
    pub rank: usize,
    /// What the operation waits for before it begins, and tells when it is over.
    pub gate: Option<Gate>,
    /// Nanoseconds.
    timeout: AtomicU64,
    pub started: Instant,
    /// Number in its group; given when the engine takes it up.
    pub seq: AtomicU64,
    /// 0 pending, 1 pending with sleepers, 2 done. A futex.
    state: AtomicU32,
    result: OnceLock<Result<()>>,
    has_callbacks: AtomicBool,
    callbacks: Mutex<Vec<Callback>>,
}

const PENDING: u32 = 0;
const SLEPT_ON: u32 = 1;
const DONE: u32 = 2;

impl OpState {
    pub fn new(
        call: Call,
        work: Work,
        group: GroupKey,
        group_name: Arc<str>,
        rank: usize,
        timeout: Duration,
    ) -> OpState {
        OpState {
            call,
            work,
            group,
            group_name,
            rank,
            gate: None,
            timeout: AtomicU64::new(nanos(timeout)),
            started: Instant::now(),
            seq: AtomicU64::new(0),
            state: AtomicU32::new(PENDING),
            result: OnceLock::new(),
            has_callbacks: AtomicBool::new(false),
            callbacks: Mutex::new(Vec::new()),
        }
    }

    /// Whether the operation may begin.
    #[inline]
    pub fn may_begin(&self) -> bool {
        self.gate.as_ref().is_none_or(Gate::is_open)
    }

    /// Bytes it moves, about, for who judges whether operations are brief; those that wait for a device are not.
    pub fn weight(&self) -> usize {
        match &self.work {
            _ if self.gate.is_some() => BRIEF + 1,
            Work::Collective { input, output, .. } => input.len().max(output.len()),
            Work::Message(message) => message.region.len(),
            Work::ReceiveAny { region, .. } => region.len(),
        }
    }

    /// Whether it alone is brief.
    pub fn is_brief(&self) -> bool {
        self.weight() <= BRIEF
    }

    #[inline]
    pub fn is_done(&self) -> bool {
        self.state.load(Ordering::Acquire) == DONE
    }

    pub fn result(&self) -> Option<&Result<()>> {
        if self.is_done() { self.result.get() } else { None }
    }

    pub fn site(&self) -> Site {
        Site {
            rank: self.rank,
            group: self.group_name.to_string(),
            op: self.call.to_string(),
            seq: self.seq.load(Ordering::Relaxed),
        }
    }

    /// Whether the time limit, and `shares` of `HEARSAY` after it, have passed.
    pub fn overdue(&self, now: Instant, shares: u32) -> bool {
        let waited = now.duration_since(self.started);
        let timeout = Duration::from_nanos(self.timeout.load(Ordering::Relaxed));
        waited > timeout && waited > timeout.saturating_add(HEARSAY.min(timeout / 4) * shares)
    }

    /// Changes the time limit, counted from the start.
    pub fn set_timeout(&self, timeout: Duration) {
        self.timeout.store(nanos(timeout), Ordering::Relaxed);
    }

    /// Makes it done, once; wakes the sleepers. True when callbacks wait to be run.
    pub fn finish(&self, result: Result<()>) -> bool {
        if self.result.set(result).is_err() {
            return false;
        }
        if let Some(gate) = &self.gate {
            gate.leave();
        }
        if self.state.swap(DONE, Ordering::SeqCst) == SLEPT_ON {
            // A failed wake-up only delays the sleeper to its next time limit.
            let _ = futex::wake(&self.state, futex::Flags::PRIVATE, u32::MAX);
        }
        self.has_callbacks.load(Ordering::SeqCst)
    }

    /// Runs what `on_done` left. Called with no lock held. One that panics, which its hook reports, ends neither the thread, which
    /// serves other operations yet, nor the callbacks behind it.
    pub fn run_callbacks(&self) {
        let Some(result) = self.result() else { return };
        let callbacks = match self.callbacks.lock() {
            Ok(mut list) => std::mem::take(&mut *list),
            Err(_) => return,
        };
        for callback in callbacks {
            let _ = catch_unwind(AssertUnwindSafe(|| callback(result)));
        }
    }

    /// Runs `callback` once the operation is over: at once, on this thread, if it is; else on a callback thread.
    pub fn on_done(&self, callback: Callback) {
        if let Ok(mut list) = self.callbacks.lock() {
            list.push(callback);
            self.has_callbacks.store(true, Ordering::SeqCst);
        }
        // Either the finisher sees the flag, or we see that it has finished (all four accesses are in one order, SeqCst);
        // whoever empties the list runs what was in it, so each callback runs once.
        if self.state.load(Ordering::SeqCst) == DONE {
            self.run_callbacks();
        }
    }

    /// Sleeps until done or `limit` has passed.
    pub fn sleep(&self, limit: Duration) {
        match self.state.compare_exchange(PENDING, SLEPT_ON, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) | Err(SLEPT_ON) => {}
            Err(_) => return,
        }
        let timeout =
            futex::Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
        // Woken, timed out, interrupted or changed already: the caller looks at the state again in every case.
        let _ = futex::wait(&self.state, futex::Flags::PRIVATE, SLEPT_ON, Some(&timeout));
    }

    pub fn timeout_error(&self, missing: Vec<usize>) -> Error {
        Error::Timeout { site: self.site(), waited: self.started.elapsed(), missing }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::Collective;
    use crate::dtype::DType;

    #[test]
    fn a_callback_that_panics_takes_no_other_with_it() {
        let call = Call::new(Collective::SendRecv, DType::U8, 0);
        let key = MsgKey { group: 0, seq: MsgKey::P2P, tag: 0 };
        let work = Work::Message(PointToPoint { peer: 0, key, region: Region::EMPTY, send: true });
        let group = GroupKey { index: 0, id: 0 };
        let op = OpState::new(call, work, group, "test".into(), 0, Duration::MAX);
        let ran = Arc::new(AtomicBool::new(false));
        let tell = Arc::clone(&ran);
        op.on_done(Box::new(|_| panic!("as it happens")));
        op.on_done(Box::new(move |_| tell.store(true, Ordering::Relaxed)));
        assert!(op.finish(Ok(())));
        op.run_callbacks();
        assert!(ran.load(Ordering::Relaxed));
    }
}
