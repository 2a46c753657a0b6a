//! The torch `Store` a process group is given, as the runtime's store.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use pyo3::exceptions::PyException;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDelta};
use smddp::{Error, Result, Store};
use smddp_core::error::Site;

use crate::errors::text;

/// Attaches to the interpreter for each call (**P1**); only group creation makes such calls.
pub struct PyStore {
    store: Py<PyAny>,
    /// What the runtime's errors cannot carry: see [`interrupt`](Self::interrupt).
    interrupt: Mutex<Option<PyErr>>,
}

impl PyStore {
    pub fn new(store: Py<PyAny>) -> PyStore {
        PyStore { store, interrupt: Mutex::new(None) }
    }

    /// What ended a call of the store and says nothing of it: Ctrl-C, or `sys.exit` in a handler of signals.
    pub fn interrupt(&self) -> Option<PyErr> {
        self.interrupt.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// The runtime's error for one that a call raised.
    fn broken(&self, py: Python<'_>, call: &str, key: &str, error: PyErr) -> Error {
        let what = format!("the store failed in {call}('{key}'): {}", text(py, &error));
        if !error.is_instance_of::<PyException>(py) {
            *self.interrupt.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        }
        let hint =
            "Is the process that serves the store (rank 0, or torchrun's agent) still alive and reachable?";
        Error::Bootstrap { what, hint: hint.to_owned() }
    }

    fn wait_and_get(&self, py: Python<'_>, key: &str, left: Duration) -> PyResult<Vec<u8>> {
        let store = self.store.bind(py);
        // Torch's stores take whole milliseconds and cut off the rest: one that gave up before the deadline would be
        // taken for a broken one. Nor is it ever zero, which would mean "no time-out" to some.
        let left = Duration::from_millis(left.as_millis().min(86_400_000 * 365) as u64 + 1);
        let (seconds, micros) = (left.as_secs(), left.subsec_micros() as i32);
        let delta = PyDelta::new(py, (seconds / 86_400) as i32, (seconds % 86_400) as i32, micros, true)?;
        let waited = store.call_method1("wait", (vec![key], delta));
        // An exchange waits for a few seconds at a time, and torch's stores look at no signals meanwhile. First of all: what
        // makes a text of an error would run the signal's handler, and lose its exception.
        py.check_signals()?;
        waited?;
        store.call_method1("get", (key,))?.extract::<Vec<u8>>()
    }
}

impl Store for PyStore {
    fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        Python::attach(|py| {
            self.store
                .bind(py)
                .call_method1("set", (key, PyBytes::new(py, value)))
                .map_err(|e| self.broken(py, "set", key, e))?;
            Ok(())
        })
    }

    fn get(&self, key: &str, deadline: Instant) -> Result<Vec<u8>> {
        let start = Instant::now();
        let left = deadline.saturating_duration_since(start);
        Python::attach(|py| {
            self.wait_and_get(py, key, left).map_err(|e| {
                let is_over = Instant::now() >= deadline && e.is_instance_of::<PyException>(py);
                let broken = self.broken(py, "get", key, e);
                // A store says "timed out" in its own words, each in others; the clock says it for all.
                if is_over {
                    Error::Timeout { site: Site::unknown(), waited: start.elapsed(), missing: Vec::new() }
                } else {
                    broken
                }
            })
        })
    }

    fn add(&self, key: &str, amount: i64) -> Result<i64> {
        Python::attach(|py| {
            self.store
                .bind(py)
                .call_method1("add", (key, amount))
                .and_then(|v| v.extract::<i64>())
                .map_err(|e| self.broken(py, "add", key, e))
        })
    }
}
