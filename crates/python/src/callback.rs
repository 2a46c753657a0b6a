//! Python callbacks of finished operations (**P3**).

use pyo3::prelude::*;
use smddp::Result;

use crate::errors::exception;

/// `callback(error or None)`, on this thread: one of the runtime's for callbacks, or the one that asked for it when the
/// operation was over already.
pub fn run(callback: &Py<PyAny>, result: &Result<()>) {
    // None: the interpreter is shutting down; nobody is left to be told.
    let _ = Python::try_attach(|py| {
        let error = result.as_ref().err().map(|e| exception(py, e));
        if let Err(error) = callback.call1(py, (error,)) {
            error.write_unraisable(py, Some(callback.bind(py)));
        }
    });
}
