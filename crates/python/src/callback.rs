//! Python callbacks of finished operations (**P3**).
//!
//! They run on threads the interpreter does not know. One that waits for the interpreter while it ends is ended by force,
//! and with it, through C++ frames that do not bear that, the process; so the gate closes before the interpreter ends.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pyo3::prelude::*;
use smddp::Result;

use crate::errors::exception;

/// How long the end of the process waits for callbacks under way.
const PATIENCE: Duration = Duration::from_secs(5);

struct Gate {
    closed: bool,
    /// Callbacks under way.
    inside: usize,
}

static GATE: Mutex<Gate> = Mutex::new(Gate { closed: false, inside: 0 });
static LEFT: Condvar = Condvar::new();

fn gate() -> MutexGuard<'static, Gate> {
    GATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `callback(error or None)`, on this thread: one of the runtime's for callbacks, or the one that asked for it when the
/// operation was over already. Nothing happens once the interpreter is about to end: nobody is left to be told.
pub fn run(callback: &Py<PyAny>, result: &Result<()>) {
    {
        let mut gate = gate();
        if gate.closed {
            return;
        }
        gate.inside += 1;
    }
    // None: the interpreter is gone already.
    let _ = Python::try_attach(|py| {
        let error = result.as_ref().err().map(|e| exception(py, e));
        if let Err(error) = callback.call1(py, (error,)) {
            error.write_unraisable(py, Some(callback.bind(py)));
        }
    });
    gate().inside -= 1;
    LEFT.notify_all();
}

/// Lets callbacks under way end, and starts no more. For the end of the process.
#[pyfunction]
pub fn stop_callbacks(py: Python<'_>) {
    py.detach(|| {
        let mut gate = gate();
        gate.closed = true;
        // One that takes longer is left to itself.
        let _ = LEFT.wait_timeout_while(gate, PATIENCE, |gate| gate.inside > 0);
    });
}
