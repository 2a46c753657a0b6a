//! The commonest call of all, `dist.all_reduce(tensor)`, read from torch's objects in one step.

use std::ptr;
use std::time::Duration;

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDelta, PyDeltaAccess, PyList, PyType};
use smddp::{Collective, Request};

use crate::arguments::region;
use crate::dlpack;
use crate::peek::read;

/// Where torch's options of all_reduce have what says "a synchronous sum". Its own getters cost half a microsecond, more
/// than all the rest of a small call.
///
/// An object that pybind11 made holds a pointer to its C++ value right behind Python's header. Nobody promises so, nor
/// where in the value the two fields are: both are found out with values of every kind, read in a way that cannot fault,
/// and where they are not found calls go the long way.
struct Options {
    class: Py<PyType>,
    reduction_at: usize,
    async_at: usize,
}

/// Bytes of a value that are looked at; the options are longer.
const LOOKED_AT: usize = 64;
const SUM: u8 = 0;

/// Address of the C++ value of a pybind11 object.
///
/// # Safety
/// `object` is longer than its header by a pointer.
unsafe fn value_of(object: &Bound<'_, PyAny>) -> usize {
    let header = size_of::<pyo3::ffi::PyObject>();
    // SAFETY: the caller's contract; the object is alive.
    unsafe { object.as_ptr().cast::<u8>().add(header).cast::<usize>().read_unaligned() }
}

impl Options {
    /// `reductions`: all reductions of the enumeration, which are numbered.
    fn find(class: &Bound<'_, PyType>, reductions: &[Bound<'_, PyAny>]) -> PyResult<Option<Options>> {
        let header = size_of::<pyo3::ffi::PyObject>();
        let length = class.getattr("__basicsize__")?.extract::<usize>()?;
        if length < header + size_of::<usize>() {
            return Ok(None);
        }
        // Which offsets were right for all values so far.
        let (mut reduction, mut asynchronous) = ([true; LOOKED_AT], [true; LOOKED_AT]);
        for given in reductions {
            let number = given.call_method0("__int__")?.extract::<u8>()?;
            for is_async in [false, true] {
                let options = class.call0()?;
                options.setattr("reduceOp", given)?;
                options.setattr("asyncOp", is_async)?;
                // SAFETY: just compared with the object's length.
                let Some(bytes) = read::<LOOKED_AT>(unsafe { value_of(&options) }) else { return Ok(None) };
                for (at, &byte) in bytes.iter().enumerate() {
                    reduction[at] &= byte == number;
                    asynchronous[at] &= byte == u8::from(is_async);
                }
            }
        }
        let only = |right: &[bool]| {
            let mut found = (0..LOOKED_AT).filter(|&at| right[at]);
            found.next().filter(|_| found.next().is_none())
        };
        let (Some(reduction_at), Some(async_at)) = (only(&reduction), only(&asynchronous)) else {
            return Ok(None);
        };
        Ok(Some(Options { class: class.clone().unbind(), reduction_at, async_at }))
    }

    /// Whether `options` say "a synchronous sum"; false also for what is not of torch's class.
    fn are_plain(&self, options: &Bound<'_, PyAny>) -> bool {
        if !options.get_type().is(self.class.bind(options.py())) {
            return false;
        }
        // SAFETY: of exactly the class whose objects were long enough.
        let value = unsafe { value_of(options) };
        if value == 0 {
            return false; // made, but not begun
        }
        let value = ptr::with_exposed_provenance::<u8>(value);
        // SAFETY: a value of the class in which both fields were found, owned by the object, which is alive.
        unsafe { value.add(self.reduction_at).read() == SUM && value.add(self.async_at).read() == 0 }
    }
}

static OPTIONS: PyOnceLock<Option<Options>> = PyOnceLock::new();

/// Tells what torch's tensors, the options of all_reduce and the reductions are; False when tensors cannot be read without
/// torch's own functions.
#[pyfunction]
pub fn use_torch(
    py: Python<'_>,
    tensor: &Bound<'_, PyType>,
    options: &Bound<'_, PyType>,
    reductions: Vec<Bound<'_, PyAny>>,
) -> PyResult<bool> {
    let readable = dlpack::use_tensor_type(tensor)?;
    // Torch before 2.6 does not say which calls are asynchronous.
    if readable && options.hasattr("asyncOp")? {
        OPTIONS.get_or_try_init(py, || Options::find(options, &reductions))?;
    }
    Ok(readable)
}

/// Whether small calls go the shortest way with this torch.
#[pyfunction]
pub fn reads_options(py: Python<'_>) -> bool {
    OPTIONS.get(py).is_some_and(Option::is_some)
}

/// The request of a synchronous sum of one dense CPU tensor; None for every other call.
pub fn plain_sum(
    py: Python<'_>,
    tensors: &Bound<'_, PyAny>,
    options: &Bound<'_, PyAny>,
) -> PyResult<Option<Request>> {
    if !OPTIONS.get(py).and_then(Option::as_ref).is_some_and(|known| known.are_plain(options)) {
        return Ok(None);
    }
    let Ok(tensors) = tensors.cast_exact::<PyList>() else { return Ok(None) };
    if tensors.len() != 1 {
        return Ok(None);
    }
    let tensor = dlpack::describe(py, &tensors.get_item(0)?);
    let Some(tensor) = tensor.filter(|t| t.device.is_none()) else { return Ok(None) };
    let whole = region(tensor.memory());
    Ok(Some(Request::new(Collective::AllReduce, tensor.dtype, tensor.count, whole, whole)))
}

/// The time limit a call was given; torch says "none" by a negative one.
pub fn limit(py: Python<'_>, options: &Bound<'_, PyAny>) -> PyResult<Option<Duration>> {
    let timeout = options.getattr(intern!(py, "timeout"))?;
    let delta = timeout.cast::<PyDelta>()?;
    let days = i64::from(delta.get_days()) * 86_400;
    let micros = (days + i64::from(delta.get_seconds())) * 1_000_000 + i64::from(delta.get_microseconds());
    Ok(u64::try_from(micros).ok().filter(|&m| m > 0).map(Duration::from_micros))
}
