//! The commonest call of all, `dist.all_reduce(tensor)`, read from torch's objects in one step.

use std::time::Duration;

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBool, PyDelta, PyDeltaAccess, PyList, PyType};
use smddp::{Collective, Request};

use crate::arguments::region;
use crate::dlpack;

/// Torch's own functions behind two attributes and a comparison: called directly, they cost a third less.
struct Names {
    options: Py<PyType>,
    sum: Py<PyAny>,
    get_async: Py<PyAny>,
    get_reduction: Py<PyAny>,
    equal: Py<PyAny>,
}

impl Names {
    fn of(options: &Bound<'_, PyType>, sum: &Bound<'_, PyAny>) -> PyResult<Names> {
        let getter = |name| -> PyResult<Py<PyAny>> { Ok(options.getattr(name)?.getattr("fget")?.unbind()) };
        let reduction = options.call0()?.getattr("reduceOp")?;
        Ok(Names {
            options: options.clone().unbind(),
            sum: sum.clone().unbind(),
            get_async: getter("asyncOp")?,
            get_reduction: getter("reduceOp")?,
            equal: reduction.get_type().getattr("__eq__")?.unbind(),
        })
    }
}

static NAMES: PyOnceLock<Names> = PyOnceLock::new();

/// Tells what torch's tensors, the options of all_reduce and the reduction SUM are; False when tensors cannot be read
/// without torch's own functions.
#[pyfunction]
pub fn use_torch(
    py: Python<'_>,
    tensor: &Bound<'_, PyType>,
    options: &Bound<'_, PyType>,
    sum: &Bound<'_, PyAny>,
) -> PyResult<bool> {
    let readable = dlpack::use_tensor_type(tensor)?;
    // Torch before 2.6 does not say which calls are asynchronous.
    if readable && options.hasattr("asyncOp")? {
        NAMES.get_or_try_init(py, || Names::of(options, sum))?;
    }
    Ok(readable)
}

/// The request of a synchronous sum of one dense CPU tensor; None for every other call.
pub fn plain_sum(
    py: Python<'_>,
    tensors: &Bound<'_, PyAny>,
    options: &Bound<'_, PyAny>,
) -> PyResult<Option<Request>> {
    let Some(names) = NAMES.get(py) else { return Ok(None) };
    if !options.get_type().is(names.options.bind(py)) {
        return Ok(None);
    }
    let Ok(tensors) = tensors.cast_exact::<PyList>() else { return Ok(None) };
    if tensors.len() != 1 || is_true(&names.get_async.bind(py).call1((options,))?) {
        return Ok(None);
    }
    let reduction = names.get_reduction.bind(py).call1((options,))?;
    if !is_true(&names.equal.bind(py).call1((reduction, names.sum.bind(py)))?) {
        return Ok(None);
    }
    let tensor = dlpack::describe(py, &tensors.get_item(0)?);
    let Some(tensor) = tensor.filter(|t| t.device.is_none()) else { return Ok(None) };
    let whole = region(tensor.memory());
    Ok(Some(Request::new(Collective::AllReduce, tensor.dtype, tensor.count, whole, whole)))
}

fn is_true(object: &Bound<'_, PyAny>) -> bool {
    object.cast_exact::<PyBool>().is_ok_and(|b| b.is_true())
}

/// The time limit a call was given; torch says "none" by a negative one.
pub fn limit(py: Python<'_>, options: &Bound<'_, PyAny>) -> PyResult<Option<Duration>> {
    let timeout = options.getattr(intern!(py, "timeout"))?;
    let delta = timeout.cast::<PyDelta>()?;
    let days = i64::from(delta.get_days()) * 86_400;
    let micros = (days + i64::from(delta.get_seconds())) * 1_000_000 + i64::from(delta.get_microseconds());
    Ok(u64::try_from(micros).ok().filter(|&m| m > 0).map(Duration::from_micros))
}
