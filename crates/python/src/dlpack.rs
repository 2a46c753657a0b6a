//! Tensors by DLPack: what its C structures say, read without copying.
//!
//! Layouts follow the DLPack header (major version 1). Two ways in: a capsule from `__dlpack__()` (any library), and
//! the table of C functions some libraries put on their tensor type (`__dlpack_c_exchange_api__`), which describes a
//! tensor in tens of nanoseconds; the path of small calls is built on it.

use std::ffi::{CStr, c_int, c_void};
use std::ptr;
use std::sync::OnceLock;

use pyo3::exceptions::PyValueError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyCapsuleMethods, PyType};
use smddp::{Collective, DType, Request};

use crate::arguments::{Numbers, region};
use crate::negative::is_negative;

const CPU: i32 = 1;
const CUDA: i32 = 2;
/// The CPU's, pinned for CUDA.
const CUDA_HOST: i32 = 3;
const MAJOR: u32 = 1;
/// Addresses below may be offsets into a storage that was given back: torch is asked. Few programs have memory there.
pub const DOUBTED: usize = 1 << 36;

#[repr(C)]
struct DlTensor {
    data: *mut c_void,
    device_type: i32,
    device_id: i32,
    ndim: i32,
    code: u8,
    bits: u8,
    lanes: u16,
    shape: *const i64,
    strides: *const i64,
    byte_offset: u64,
}

#[repr(C)]
struct ExchangeHeader {
    major: u32,
    minor: u32,
    previous: *const ExchangeHeader,
}

type Describe = unsafe extern "C" fn(*mut c_void, *mut DlTensor) -> c_int;

#[repr(C)]
struct ExchangeApi {
    header: ExchangeHeader,
    allocate: *const c_void,
    managed_from_object: *const c_void,
    managed_to_object: *const c_void,
    describe: Option<Describe>,
    current_stream: *const c_void,
}

/// What a capsule of DLPack from version 1 on holds; an older one has the tensor first, and no flags.
#[repr(C)]
struct Versioned {
    major: u32,
    minor: u32,
    context: *const c_void,
    deleter: *const c_void,
    flags: u64,
    tensor: DlTensor,
}

/// `DLPACK_FLAG_BITMASK_…` of [`Versioned::flags`].
const READ_ONLY: u64 = 1;
const IS_COPIED: u64 = 2;
const IS_SUBBYTE_TYPE_PADDED: u64 = 4;

impl DlTensor {
    const EMPTY: DlTensor = DlTensor {
        data: ptr::null_mut(),
        device_type: 0,
        device_id: 0,
        ndim: 0,
        code: 0,
        bits: 0,
        lanes: 0,
        shape: ptr::null(),
        strides: ptr::null(),
        byte_offset: 0,
    };

    /// (sizes, strides) of the dimensions; no strides means dense.
    ///
    /// # Safety
    /// The structure was filled by its producer and that tensor is alive.
    unsafe fn extent(&self) -> (&[i64], Option<&[i64]>) {
        let ndim = usize::try_from(self.ndim).unwrap_or(0);
        if ndim == 0 || self.shape.is_null() {
            return (&[], None);
        }
        // SAFETY: DLPack promises `ndim` entries behind both pointers.
        unsafe {
            let strides = (!self.strides.is_null()).then(|| std::slice::from_raw_parts(self.strides, ndim));
            (std::slice::from_raw_parts(self.shape, ndim), strides)
        }
    }

    fn dtype(&self) -> Option<DType> {
        if self.lanes != 1 {
            return None;
        }
        Some(match (self.code, self.bits) {
            (6, 8) => DType::Bool,
            (1, 8) => DType::U8,
            (0, 8) => DType::I8,
            (0, 16) => DType::I16,
            (0, 32) => DType::I32,
            (0, 64) => DType::I64,
            (2, 16) => DType::F16,
            (4, 16) => DType::BF16,
            (2, 32) => DType::F32,
            (2, 64) => DType::F64,
            _ => return None,
        })
    }

    /// Bytes of one element; None where that is no whole number. Types of less than a byte are packed, across lanes too,
    /// unless they are said to be `padded`.
    fn itemsize(&self, padded: bool) -> Option<usize> {
        let (bits, lanes) = (usize::from(self.bits), usize::from(self.lanes.max(1)));
        let all = if padded && lanes == 1 { bits.next_multiple_of(8) } else { bits * lanes };
        (all % 8 == 0).then_some(all / 8)
    }

    /// Address and element count of a dense tensor; None when it has gaps or another order.
    ///
    /// # Safety
    /// As [`DlTensor::extent`].
    unsafe fn dense(&self) -> Option<(usize, usize)> {
        // SAFETY: passed on to the caller.
        let (shape, strides) = unsafe { self.extent() };
        let mut expected = 1i64;
        let mut count = 1i64;
        for (dim, &size) in shape.iter().enumerate().rev() {
            if let Some(strides) = strides
                && size > 1
                && strides[dim] != expected
            {
                return None;
            }
            expected = expected.checked_mul(size.max(1))?;
            count = count.checked_mul(size)?;
        }
        Some((self.data as usize + usize::try_from(self.byte_offset).ok()?, usize::try_from(count).ok()?))
    }
}

/// The tensor type of the short way, and its function.
struct TensorType {
    class: Py<PyType>,
    describe: Describe,
}

static TENSOR: OnceLock<TensorType> = OnceLock::new();

/// Takes `cls`'s C exchange table for the short way of collectives; false when it has none this module understands.
pub fn use_tensor_type(cls: &Bound<'_, PyType>) -> PyResult<bool> {
    if TENSOR.get().is_some() {
        return Ok(true);
    }
    let Ok(attribute) = cls.getattr("__dlpack_c_exchange_api__") else { return Ok(false) };
    let Ok(capsule) = attribute.cast_into::<PyCapsule>() else { return Ok(false) };
    let name: &CStr = c"dlpack_exchange_api";
    let Ok(table) = capsule.pointer_checked(Some(name)) else { return Ok(false) };
    // SAFETY: a capsule of this name holds the table, which lives as long as the process; the header, whose layout is
    // the same in all versions, is read before anything else.
    let api = unsafe {
        let header = table.cast::<ExchangeHeader>();
        if header.as_ref().major != MAJOR {
            return Ok(false);
        }
        table.cast::<ExchangeApi>().as_ref()
    };
    let Some(describe) = api.describe else { return Ok(false) };
    let _ = TENSOR.set(TensorType { class: cls.clone().unbind(), describe });
    Ok(true)
}

/// Where a dense tensor is, and what of.
#[derive(Clone, Copy)]
pub struct Dense {
    /// Number of its CUDA device; none: the CPU.
    pub device: Option<i32>,
    pub dtype: DType,
    pub address: usize,
    /// In elements.
    pub count: usize,
}

impl Dense {
    /// (address, bytes)
    pub fn memory(&self) -> (usize, usize) {
        (self.address, self.count * self.dtype.size())
    }
}

/// Describes `object`, when it is a dense tensor of exactly the known class on the CPU or a CUDA device.
pub fn describe(py: Python<'_>, object: &Bound<'_, PyAny>) -> Option<Dense> {
    let tensor = TENSOR.get()?;
    if !object.get_type().is(tensor.class.bind(py)) {
        return None;
    }
    let mut view = DlTensor::EMPTY;
    // SAFETY: the object is of the class that gave the function, and we hold the interpreter.
    let status = unsafe { (tensor.describe)(object.as_ptr().cast(), &mut view) };
    if status != 0 {
        // Says why it cannot be described (sparse, conjugated, ...); the long way finds its own words.
        drop(PyErr::take(py));
        return None;
    }
    let device = match view.device_type {
        CPU => None,
        CUDA => Some(view.device_id),
        _ => return None,
    };
    // SAFETY: just filled, and `object` is alive.
    let (address, count) = unsafe { view.dense() }?;
    (address >= DOUBTED || count == 0 || has_memory(py, object)).then_some(())?;
    // SAFETY: of exactly the known class, that of all who look for the place.
    if unsafe { is_negative(object) } {
        return None;
    }
    Some(Dense { device, dtype: view.dtype()?, address, count })
}

/// Whether a tensor's storage was not given back. One that was has no address, and a view of it has its offset for one.
fn has_memory(py: Python<'_>, tensor: &Bound<'_, PyAny>) -> bool {
    let storage = tensor.call_method0(intern!(py, "untyped_storage"));
    let address = storage.and_then(|storage| storage.call_method0(intern!(py, "data_ptr")));
    address.and_then(|address| address.extract::<usize>()).is_ok_and(|address| address != 0)
}

/// One collective over dense tensors of one device.
pub struct Tensors {
    /// Number of the CUDA device; none: the CPU.
    pub device: Option<i32>,
    pub numbers: Numbers,
    /// (address, bytes)
    pub input: (usize, usize),
    pub output: (usize, usize),
}

impl Tensors {
    /// Whether a call, of `rank` of `size`, may have them: not if they overlap otherwise than in place.
    pub fn are_apart(&self, request: &Request, (rank, size): (usize, usize)) -> bool {
        request.check_apart(rank, size, region(self.input), region(self.output)).is_ok()
    }

    /// As the host's group takes it.
    pub fn request(&self, py: Python<'_>) -> PyResult<Request> {
        self.numbers.request(py, region(self.input), region(self.output))
    }
}

/// One collective over dense tensors; None when they need the long way.
pub fn tensors(
    py: Python<'_>,
    size: usize,
    collective: u8,
    op: u8,
    root: usize,
    output: &Bound<'_, PyAny>,
    input: Option<&Bound<'_, PyAny>>,
) -> Option<Tensors> {
    let into = describe(py, output)?;
    let from = match input {
        None => into,
        Some(input) => describe(py, input)?,
    };
    if from.dtype != into.dtype || from.device != into.device {
        return None;
    }
    let (count, from_count) = (into.count, from.count);
    // The short way takes only what is beyond doubt; the long way says what is wrong with the rest.
    let fits = match Collective::from_code(collective) {
        Some(Collective::AllReduce | Collective::Broadcast | Collective::Reduce) => input.is_none(),
        Some(Collective::AllGather) => count == from_count * size,
        Some(Collective::ReduceScatter) => from_count == count * size,
        Some(Collective::AllToAll) => count == from_count && count % size == 0,
        Some(Collective::Gather | Collective::Scatter | Collective::Barrier | Collective::SendRecv)
        | None => false,
    };
    if !fits {
        return None;
    }
    let count = match Collective::from_code(collective) {
        Some(Collective::AllGather) => from_count,
        Some(Collective::AllToAll) => count / size,
        _ => count,
    };
    let numbers = Numbers { collective, dtype: into.dtype as u8, op, root, count };
    Some(Tensors { device: into.device, numbers, input: from.memory(), output: into.memory() })
}

/// What a capsule describes; holds the capsule, and with it the memory.
#[pyclass(frozen, get_all, module = "smdistributed_rs._core")]
pub struct DlpackView {
    /// Address of the first element.
    address: usize,
    /// Sizes of the dimensions.
    shape: Vec<i64>,
    /// Name of the element type, or DLPack's numbers where it has none here.
    dtype: String,
    /// Bytes of one element; None where that is no whole number.
    itemsize: Option<usize>,
    /// Elements follow each other in C order without gaps.
    dense: bool,
    /// On the CPU.
    on_cpu: bool,
    /// Its producer says that it must not be written to.
    read_only: bool,
    /// Its producer says that it is a copy made for this capsule.
    is_copy: bool,
    /// The capsule.
    owner: Py<PyAny>,
}

/// Reads a capsule named `dltensor_versioned` or, as older libraries make them, `dltensor`, without consuming it.
#[pyfunction]
pub fn view_capsule(capsule: &Bound<'_, PyCapsule>) -> PyResult<DlpackView> {
    let refuse = |what| Err(PyValueError::new_err(format!("expected a fresh DLPack capsule{what}")));
    let (view, flags) = if let Ok(managed) = capsule.pointer_checked(Some(c"dltensor_versioned")) {
        // SAFETY: a capsule of this name holds a DLManagedTensorVersioned, whose version comes first, alive until the
        // capsule is consumed or collected; `owner` below keeps it.
        let managed = unsafe { managed.cast::<Versioned>().as_ref() };
        if managed.major != MAJOR {
            return refuse(format!(
                " of version {MAJOR}, given one of version {}.{}",
                managed.major, managed.minor
            ));
        }
        (&managed.tensor, managed.flags)
    } else if let Ok(managed) = capsule.pointer_checked(Some(c"dltensor")) {
        // SAFETY: likewise, a DLManagedTensor, which begins with its DLTensor.
        (unsafe { managed.cast::<DlTensor>().as_ref() }, 0)
    } else {
        return refuse(" named 'dltensor' or 'dltensor_versioned'".to_owned());
    };
    // SAFETY: its producer has filled it, and it is alive as said above.
    let (shape, dense) = unsafe { (view.extent().0.to_vec(), view.dense()) };
    let (code, bits) = (view.code, usize::from(view.bits));
    let dtype = match (view.dtype(), code) {
        (Some(dtype), _) => dtype.name().to_owned(),
        (None, 5) => format!("complex{bits}"),
        (None, _) => format!("dlpack({code}, {bits} bits, {} lanes)", view.lanes),
    };
    Ok(DlpackView {
        address: dense.map_or(view.data as usize, |(address, _)| address),
        shape,
        dtype,
        itemsize: view.itemsize(flags & IS_SUBBYTE_TYPE_PADDED != 0),
        dense: dense.is_some(),
        on_cpu: matches!(view.device_type, CPU | CUDA_HOST),
        read_only: flags & READ_ONLY != 0,
        is_copy: flags & IS_COPIED != 0,
        owner: capsule.clone().into_any().unbind(),
    })
}
