//! Typed errors become the exception classes of `smdistributed_rs.errors`, with their facts as attributes.

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::PyType;
use smddp::Error;
use smddp_core::error::Site;

const MODULE: &str = "smdistributed_rs.errors";

/// The exception for `error`. Failing to make it is itself an exception, never a panic.
pub fn exception(py: Python<'_>, error: &Error) -> PyErr {
    build(py, error).unwrap_or_else(|e| e)
}

/// `result` as Python wants it.
pub fn raise<T>(py: Python<'_>, result: smddp::Result<T>) -> PyResult<T> {
    result.map_err(|e| exception(py, &e))
}

/// An argument this layer refuses by itself.
pub fn argument(op: &str, argument: &'static str, expected: &str, given: impl ToString, hint: &str) -> Error {
    Error::Argument {
        op: op.to_owned(),
        argument,
        expected: expected.to_owned(),
        given: given.to_string(),
        hint: hint.to_owned(),
    }
}

fn build(py: Python<'_>, error: &Error) -> PyResult<PyErr> {
    let class = py.import(MODULE)?.getattr(class_name(error))?.cast_into::<PyType>().map_err(PyErr::from)?;
    let raised = class.call1((error.to_string(),))?;
    match error {
        Error::Argument { op, argument, expected, given, .. } => {
            raised.setattr("op", op)?;
            raised.setattr("argument", *argument)?;
            raised.setattr("expected", expected)?;
            raised.setattr("given", given)?;
        }
        Error::Unsupported { op, reduce, dtype } => {
            raised.setattr("op", op)?;
            raised.setattr("reduction", reduce.name())?;
            raised.setattr("dtype", dtype.name())?;
        }
        Error::Mismatch { site, ours, peer, theirs } => {
            set_site(&raised, site)?;
            raised.setattr("ours", ours)?;
            raised.setattr("peer", *peer)?;
            raised.setattr("theirs", theirs)?;
        }
        Error::Timeout { site, waited, missing } => {
            set_site(&raised, site)?;
            raised.setattr("waited", waited.as_secs_f64())?;
            raised.setattr("missing", missing)?;
        }
        Error::PeerLost { site, peer, node, reason } => {
            set_site(&raised, site)?;
            raised.setattr("peer", *peer)?;
            raised.setattr("node", node)?;
            raised.setattr("reason", reason)?;
        }
        Error::Aborted { site, reason } => {
            set_site(&raised, site)?;
            raised.setattr("reason", reason)?;
        }
        Error::Setting { name, given, .. } => {
            raised.setattr("name", name)?;
            raised.setattr("given", given)?;
        }
        Error::Bootstrap { .. }
        | Error::Library { .. }
        | Error::Resource { .. }
        | Error::Transport { .. }
        | Error::Internal(_) => {}
    }
    Ok(PyErr::from_value(raised))
}

fn class_name(error: &Error) -> &'static str {
    match error {
        Error::Argument { .. } => "ArgumentError",
        Error::Unsupported { .. } => "UnsupportedError",
        Error::Mismatch { .. } => "MismatchError",
        Error::Timeout { .. } => "TimeoutError",
        Error::PeerLost { .. } => "PeerLostError",
        Error::Aborted { .. } => "AbortedError",
        Error::Setting { .. } => "SettingError",
        Error::Bootstrap { .. } => "BootstrapError",
        Error::Library { .. } => "LibraryError",
        Error::Resource { .. } => "ResourceError",
        Error::Transport { .. } => "TransportError",
        Error::Internal(_) => "InternalError",
    }
}

fn set_site(raised: &Bound<'_, PyAny>, site: &Site) -> PyResult<()> {
    raised.setattr("rank", site.rank)?;
    raised.setattr("group", &site.group)?;
    raised.setattr("op", &site.op)?;
    raised.setattr("seq", site.seq)
}

/// The text of a Python exception, for errors that cross the other way.
pub fn text(py: Python<'_>, error: &PyErr) -> String {
    if error.is_instance_of::<PyRuntimeError>(py) { error.value(py).to_string() } else { error.to_string() }
}
