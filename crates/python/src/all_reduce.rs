//! What torch has for a group's `allreduce`: the commonest call of all goes straight to the runtime.

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict, PyTuple};

use crate::communicator::Communicator;

/// A group's `allreduce`, as `torch.distributed` calls it: the commonest call ends in here without a frame of Python, the
/// others go to `long`. An object with `__call__` and no function, since torch's C++ half takes functions that are not
/// Python's for its own.
#[pyclass(frozen, module = "smdistributed_rs._core")]
pub struct AllReduce {
    group: Py<Communicator>,
    /// The module that says whether a profiler is to see the calls.
    profiler: Py<PyAny>,
    /// What a call that is over returns.
    done: Py<PyAny>,
    /// A weak method: a strong one would make the group keep itself alive.
    long: Py<PyAny>,
}

#[pymethods]
impl AllReduce {
    #[new]
    fn new(group: Py<Communicator>, profiler: Py<PyAny>, done: Py<PyAny>, long: Py<PyAny>) -> AllReduce {
        AllReduce { group, profiler, done, long }
    }

    #[pyo3(signature = (*args, **named))]
    fn __call__(
        &self,
        py: Python<'_>,
        args: &Bound<'_, PyTuple>,
        named: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Py<PyAny>> {
        if named.is_none()
            && args.len() == 2
            && !is_true(&self.profiler.bind(py).getattr(intern!(py, "_is_profiler_enabled"))?)
            && self.group.get().sum_now(py, &args.get_item(0)?, &args.get_item(1)?)?
        {
            return Ok(self.done.clone_ref(py));
        }
        self.long.bind(py).call0()?.call(args, named).map(Bound::unbind)
    }
}

fn is_true(object: &Bound<'_, PyAny>) -> bool {
    object.cast_exact::<PyBool>().is_ok_and(|b| b.is_true())
}
