//! An operation under way.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pyo3::prelude::*;
use smddp::Error;
use smddp_core::interrupt;

use crate::arguments::seconds as limit_of;
use crate::callback;
use crate::errors::{exception, raise};
use crate::group::Group;

/// How long a wait may keep a signal (Ctrl-C) waiting.
pub const SLICE: Duration = Duration::from_millis(250);

/// An operation under way. Keeps its group alive, and, until it is seen to be over, the objects whose memory it uses.
#[pyclass(frozen, module = "smdistributed_rs._core")]
pub struct Handle {
    inner: smddp::Handle,
    keep: Mutex<Keep>,
    group: Group,
}

/// Objects whose memory an operation uses.
pub type Keep = [Option<Py<PyAny>>; 2];

impl Handle {
    pub fn new(inner: smddp::Handle, keep: Keep, group: &Group) -> Handle {
        Handle { inner, keep: Mutex::new(keep), group: group.clone() }
    }

    /// Of an operation that is over, whoever keeps this.
    fn let_go(&self) {
        drop(self.take_kept());
    }

    fn take_kept(&self) -> Keep {
        std::mem::take(&mut *self.keep.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Waits with the interpreter detached (**P1**), looking at signals now and then.
pub fn wait(py: Python<'_>, handle: &smddp::Handle, limit: Option<Duration>) -> PyResult<()> {
    // A limit beyond what a clock can show is none.
    let until = limit.and_then(|l| Instant::now().checked_add(l));
    loop {
        let slice = until.map_or(SLICE, |u| SLICE.min(u.saturating_duration_since(Instant::now())));
        let waited = py.detach(|| handle.wait(Some(slice)));
        // It may have ended just after the slice had.
        if let Some(result) = handle.result() {
            return raise(py, result);
        }
        if !matches!(waited, Err(Error::Timeout { .. })) || until.is_some_and(|u| Instant::now() >= u) {
            return raise(py, waited);
        }
        py.check_signals()?;
    }
}

/// Runs what waits for other ranks, beside operations, with the interpreter detached (**P1**), looking at signals now and
/// then: an exception of theirs ends the waits, and is raised.
pub fn watchful<T: Send>(py: Python<'_>, waits: impl FnOnce() -> T + Send) -> PyResult<T> {
    let raised = Arc::new(Mutex::new(None));
    let place = Arc::clone(&raised);
    let look = move || {
        let looked = Python::try_attach(|py| py.check_signals());
        let Some(Err(error)) = looked else { return false };
        *place.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        true
    };
    let result = py.detach(|| interrupt::during(look, waits));
    let raised = raised.lock().unwrap_or_else(PoisonError::into_inner).take();
    match raised {
        Some(error) => {
            py.detach(|| drop(result));
            Err(error)
        }
        None => Ok(result),
    }
}

#[pymethods]
impl Handle {
    /// Waits until the operation is over, helping it along; raises its error. After `timeout` seconds (None: the
    /// group's limit decides) raises TimeoutError, and the operation goes on.
    #[pyo3(signature = (timeout=None))]
    fn wait(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<()> {
        let timeout = limit_of(py, "wait", timeout)?;
        let waited = wait(py, &self.inner, timeout);
        self.is_done();
        waited
    }

    /// Changes the operation's time limit, counted from its start.
    fn set_timeout(&self, py: Python<'_>, seconds: f64) -> PyResult<()> {
        if let Some(limit) = limit_of(py, "set_timeout", Some(seconds))? {
            self.inner.set_timeout(limit);
        }
        Ok(())
    }

    /// Whether the operation is over, well or not.
    fn is_done(&self) -> bool {
        let is_done = self.inner.is_done();
        if is_done {
            self.let_go();
        }
        is_done
    }

    /// The exception the operation ended with; None when it went well or is under way.
    fn error(&self, py: Python<'_>) -> Option<PyErr> {
        self.inner.result().and_then(Result::err).map(|e| exception(py, &e))
    }

    /// The rank a message comes from, once that is known; None of everything but a receive.
    fn source(&self) -> Option<usize> {
        self.inner.source()
    }

    /// Calls `callback(error or None)` once the operation is over: at once, on this thread, if it is; else on a callback thread.
    fn on_done(&self, callback: Py<PyAny>) {
        self.inner.on_done(Box::new(move |result| callback::run(&callback, result)));
    }
}

impl Drop for Handle {
    /// P2: an operation nobody waits for any more still owns its memory.
    fn drop(&mut self) {
        if !self.inner.is_done() {
            let (keep, group) = (self.take_kept(), self.group.clone());
            self.inner.on_done(Box::new(move |_| {
                drop(keep);
                group.leave_without_python();
            }));
        }
    }
}
