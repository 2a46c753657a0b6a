//! Numbers from Python, checked.

use std::sync::Arc;
use std::time::Duration;

use pyo3::prelude::*;
use smddp::{Collective, DType, ReduceOp, Region, Request};

use crate::errors::{argument, exception};

/// Seconds as a duration; None stays None.
pub fn seconds(py: Python<'_>, op: &str, timeout: Option<f64>) -> PyResult<Option<Duration>> {
    let Some(given) = timeout else { return Ok(None) };
    match Duration::try_from_secs_f64(given) {
        Ok(limit) if !limit.is_zero() => Ok(Some(limit)),
        _ => Err(exception(
            py,
            &argument(op, "timeout", "seconds above 0", given, "Leave it out to use the group's time limit"),
        )),
    }
}

/// Memory given as (address, bytes).
pub fn region(memory: (usize, usize)) -> Region {
    // SAFETY: R1 of the runtime: P2 keeps the object behind the address alive, and the Python layer takes addresses
    // and lengths only from tensors and arrays it has checked.
    unsafe { Region::new(memory.0 as *mut u8, memory.1) }
}

/// One call, in the numbers Python passes.
pub struct Numbers {
    pub collective: u8,
    pub dtype: u8,
    pub op: u8,
    pub root: usize,
    pub count: usize,
}

impl Numbers {
    pub fn request(&self, py: Python<'_>, input: Region, output: Region) -> PyResult<Request> {
        let Some(collective) = Collective::from_code(self.collective) else {
            return Err(unknown(py, "a collective", "collective", self.collective));
        };
        let Some(dtype) = DType::from_code(self.dtype) else {
            return Err(unknown(py, collective.name(), "dtype", self.dtype));
        };
        let Some(op) = ReduceOp::from_code(self.op) else {
            return Err(unknown(py, collective.name(), "op", self.op));
        };
        let mut request = Request::new(collective, dtype, self.count, input, output);
        request.op = op;
        request.root = self.root;
        Ok(request)
    }
}

/// Element counts per rank, as the runtime wants them.
pub fn counts(given: Option<Vec<usize>>) -> Option<Arc<[usize]>> {
    given.map(Arc::from)
}

fn unknown(py: Python<'_>, op: &str, what: &'static str, code: u8) -> PyErr {
    exception(
        py,
        &argument(op, what, "a known code", code, "The package and its native half differ; reinstall it"),
    )
}
