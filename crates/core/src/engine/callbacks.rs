//! Threads that run completion callbacks.
//!
//! A callback may block: torch's PowerSGD hook waits, inside the callback of one all-reduce, for the next one. So
//! callbacks run neither on the progress thread nor on a helping caller, and one that blocks holds up no other: when all
//! threads are busy, another is started. Idle threads end.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::engine::op::OpState;

/// Idle time after which a thread ends.
const PATIENCE: Duration = Duration::from_secs(10);
/// More callbacks than this blocking at once wait for each other.
const MOST_THREADS: usize = 256;

#[derive(Default)]
struct State {
    queue: VecDeque<Arc<OpState>>,
    idle: usize,
    threads: usize,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    news: Condvar,
}

/// See the module's text.
#[derive(Default)]
pub struct Callbacks {
    shared: Arc<Shared>,
}

impl Callbacks {
    /// Runs the callbacks of a finished operation soon.
    pub fn run(&self, op: Arc<OpState>) {
        let mut state = self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.queue.push_back(op);
        if state.idle >= state.queue.len() || state.threads >= MOST_THREADS {
            self.shared.news.notify_one();
            return;
        }
        state.threads += 1;
        drop(state);
        let shared = Arc::clone(&self.shared);
        let started =
            std::thread::Builder::new().name("smddp-callback".to_owned()).spawn(move || shared.serve());
        if let Err(error) = started {
            tracing::warn!("no thread for callbacks ({error}): running them here");
            let mut state = self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.threads -= 1;
            let left: Vec<_> = state.queue.drain(..).collect();
            drop(state);
            left.iter().for_each(|op| op.run_callbacks());
        }
    }
}

impl Shared {
    fn serve(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(op) = state.queue.pop_front() {
                drop(state);
                op.run_callbacks();
                state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            state.idle += 1;
            let (woken, timeout) =
                self.news.wait_timeout(state, PATIENCE).unwrap_or_else(PoisonError::into_inner);
            state = woken;
            state.idle -= 1;
            if timeout.timed_out() && state.queue.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }
}
