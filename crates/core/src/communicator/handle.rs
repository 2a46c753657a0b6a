//! What a call that was started gives its caller.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use crate::engine::Engine;
use crate::engine::op::{Callback, OpState, PointToPoint, Work};
use crate::error::Result;
use crate::transport::Transports;

/// An operation under way, or over.
pub struct Handle<T: Transports>(State<T>);

enum State<T: Transports> {
    Operation {
        engine: Arc<Engine<T>>,
        op: Arc<OpState>,
    },
    /// A message that was over as soon as it was started, and went well.
    Over {
        source: Option<usize>,
    },
}

impl<T: Transports> Clone for Handle<T> {
    fn clone(&self) -> Self {
        Handle(match &self.0 {
            State::Operation { engine, op } => {
                State::Operation { engine: Arc::clone(engine), op: Arc::clone(op) }
            }
            State::Over { source } => State::Over { source: *source },
        })
    }
}

/// Where a message that was received comes from.
fn source_of(message: &PointToPoint) -> Option<usize> {
    (!message.send).then_some(message.peer)
}

impl<T: Transports> Handle<T> {
    pub(super) fn operation(engine: &Arc<Engine<T>>, op: Arc<OpState>) -> Handle<T> {
        Handle(State::Operation { engine: Arc::clone(engine), op })
    }

    pub(super) fn over(message: &PointToPoint) -> Handle<T> {
        Handle(State::Over { source: source_of(message) })
    }

    /// Helps until the operation is done. When `limit` passes first, returns `Error::Timeout` and leaves the operation
    /// under way.
    pub fn wait(&self, limit: Option<Duration>) -> Result<()> {
        match &self.0 {
            State::Operation { engine, op } => engine.wait(op, limit),
            State::Over { .. } => Ok(()),
        }
    }

    /// Whether the operation is over, well or not. Never waits.
    pub fn is_done(&self) -> bool {
        match &self.0 {
            State::Operation { op, .. } => op.is_done(),
            State::Over { .. } => true,
        }
    }

    /// How the operation ended; `None` while it is under way.
    pub fn result(&self) -> Option<Result<()>> {
        match &self.0 {
            State::Operation { op, .. } => op.result().cloned(),
            State::Over { .. } => Some(Ok(())),
        }
    }

    /// Changes the operation's time limit, counted from its start.
    pub fn set_timeout(&self, timeout: Duration) {
        if let State::Operation { op, .. } = &self.0 {
            op.set_timeout(timeout);
        }
    }

    /// The group rank a message comes from, once that is known; `None` for everything but receives.
    pub fn source(&self) -> Option<usize> {
        match &self.0 {
            State::Over { source } => *source,
            State::Operation { op, .. } => match &op.work {
                Work::Message(message) => source_of(message),
                Work::ReceiveAny { source, .. } => source.get().copied(),
                Work::Collective { .. } => None,
            },
        }
    }

    /// Calls `f` once the operation is over: at once, on this thread, if it is; else on a callback thread.
    pub fn on_done(&self, f: Callback) {
        match &self.0 {
            State::Operation { engine, op } => {
                op.on_done(f);
                if !op.is_done() {
                    // Nobody may ever wait for it.
                    engine.wake_thread();
                }
            }
            // One that panics, which its hook reports, ends not its caller, as `OpState::run_callbacks` has it.
            State::Over { .. } => drop(catch_unwind(AssertUnwindSafe(|| f(&Ok(()))))),
        }
    }
}
