//! The part of the CUDA driver API this project calls, found at run time. No CUDA is needed to build.
//!
//! - **D1** a symbol is looked up once, by the name that carries the ABI meant (`…_v2`); a driver that lacks one is an
//!   error that names it, never a call into nothing.
//! - **D2** the library is never unloaded: the driver's threads outlive whoever loaded it.
//!
//! Source of signatures: the CUDA driver API reference.

use std::ffi::{CStr, OsStr, c_char, c_int, c_uint, c_void};
use std::mem::ManuallyDrop;

/// `CUresult`.
pub type Status = c_int;
pub const SUCCESS: Status = 0;
pub const NOT_READY: Status = 600;
pub const NOT_SUPPORTED: Status = 801;

pub type Device = c_int;
pub type Context = *mut c_void;
pub type Stream = *mut c_void;
pub type Event = *mut c_void;
/// `CUdeviceptr`.
pub type DevicePtr = u64;

pub const STREAM_NON_BLOCKING: c_uint = 1;
pub const EVENT_DISABLE_TIMING: c_uint = 2;
pub const HOST_REGISTER_PORTABLE_MAPPED: c_uint = 1 | 2;
/// `CU_STREAM_WAIT_VALUE_GEQ`: cyclic, `(int32)(*addr - value) >= 0`.
pub const WAIT_VALUE_GEQ: c_uint = 0;
pub const WRITE_VALUE_DEFAULT: c_uint = 0;
/// `CU_STREAM_WAIT_VALUE_FLUSH`: what others wrote to the device before the word is then visible to the stream.
pub const WAIT_VALUE_FLUSH: c_uint = 1 << 30;

/// `CUdevice_attribute`.
pub const CAN_FLUSH_REMOTE_WRITES: c_int = 98;
pub const PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES: c_int = 100;
pub const GPU_DIRECT_RDMA_SUPPORTED: c_int = 116;
/// From 100 on, the device itself sees writes in the order in which they came.
pub const GPU_DIRECT_RDMA_WRITES_ORDERING: c_int = 118;
pub const DMA_BUF_SUPPORTED: c_int = 124;

/// `CU_STREAM_CAPTURE_MODE_RELAXED`: the thread's calls never disturb another thread's capture.
pub const CAPTURE_MODE_RELAXED: c_int = 2;

/// `CU_MEMORYTYPE_HOST`, `CU_MEMORYTYPE_DEVICE`.
pub const MEMORY_HOST: c_int = 1;
pub const MEMORY_DEVICE: c_int = 2;
/// Rows may lie so far from one another at most (`CU_DEVICE_ATTRIBUTE_MAX_PITCH` of all devices so far).
pub const MAX_PITCH: usize = c_int::MAX as usize;

/// One side of [`Copy2d`].
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Side2d {
    pub x: usize,
    pub y: usize,
    pub memory: c_int,
    pub host: *mut c_void,
    pub device: DevicePtr,
    pub array: *mut c_void,
    /// Bytes from one row to the next.
    pub pitch: usize,
}

/// `CUDA_MEMCPY2D`: rows of equal length, evenly spaced on both sides.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Copy2d {
    pub from: Side2d,
    pub to: Side2d,
    /// Bytes of a row.
    pub width: usize,
    pub height: usize,
}

const SONAME: &str = "libcuda.so.1";

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    #[error(
        "{name} could not be loaded: {reason}. Install NVIDIA's driver; in a container, start it with GPUs"
    )]
    NotFound { name: String, reason: String },
    #[error("{name} lacks the function {symbol}: its driver is too old. Install one for CUDA 11.7 or later")]
    TooOld { name: String, symbol: &'static str },
}

macro_rules! table {
    ($($field:ident = $symbol:literal: fn($($arg:ty),*);)*) => {
        /// The driver's functions. Safe to call from any thread; each has the contract of the CUDA reference.
        #[derive(Debug)]
        pub struct Driver {
            $(pub $field: unsafe extern "C" fn($($arg),*) -> Status,)*
            _handle: ManuallyDrop<libloading::Library>,
        }

        impl Driver {
            fn resolve(name: &str, handle: libloading::Library) -> Result<Driver, LoadError> {
                $(
                    // SAFETY: the symbol has this signature by the CUDA driver API; the library stays loaded (D2).
                    let $field = unsafe { handle.get::<unsafe extern "C" fn($($arg),*) -> Status>(concat!($symbol, "\0")) }
                        .map(|symbol| *symbol)
                        .map_err(|_| LoadError::TooOld { name: name.to_owned(), symbol: $symbol })?;
                )*
                Ok(Driver { $($field,)* _handle: ManuallyDrop::new(handle) })
            }
        }
    };
}

table! {
    init = "cuInit": fn(c_uint);
    driver_version = "cuDriverGetVersion": fn(*mut c_int);
    device_count = "cuDeviceGetCount": fn(*mut c_int);
    device_get = "cuDeviceGet": fn(*mut Device, c_int);
    device_attribute = "cuDeviceGetAttribute": fn(*mut c_int, c_int, Device);
    device_name = "cuDeviceGetName": fn(*mut c_char, c_int, Device);
    device_bus_id = "cuDeviceGetPCIBusId": fn(*mut c_char, c_int, Device);
    primary_retain = "cuDevicePrimaryCtxRetain": fn(*mut Context, Device);
    primary_release = "cuDevicePrimaryCtxRelease_v2": fn(Device);
    ctx_current = "cuCtxGetCurrent": fn(*mut Context);
    ctx_set = "cuCtxSetCurrent": fn(Context);
    capture_mode = "cuThreadExchangeStreamCaptureMode": fn(*mut c_int);
    stream_create = "cuStreamCreateWithPriority": fn(*mut Stream, c_uint, c_int);
    stream_destroy = "cuStreamDestroy_v2": fn(Stream);
    stream_query = "cuStreamQuery": fn(Stream);
    stream_synchronize = "cuStreamSynchronize": fn(Stream);
    stream_wait_event = "cuStreamWaitEvent": fn(Stream, Event, c_uint);
    stream_write_value = "cuStreamWriteValue32_v2": fn(Stream, DevicePtr, u32, c_uint);
    stream_wait_value = "cuStreamWaitValue32_v2": fn(Stream, DevicePtr, u32, c_uint);
    stream_is_capturing = "cuStreamIsCapturing": fn(Stream, *mut c_int);
    event_create = "cuEventCreate": fn(*mut Event, c_uint);
    event_record = "cuEventRecord": fn(Event, Stream);
    event_query = "cuEventQuery": fn(Event);
    event_destroy = "cuEventDestroy_v2": fn(Event);
    copy_to_host = "cuMemcpyDtoHAsync_v2": fn(*mut c_void, DevicePtr, usize, Stream);
    copy_to_device = "cuMemcpyHtoDAsync_v2": fn(DevicePtr, *const c_void, usize, Stream);
    copy_on_device = "cuMemcpyDtoDAsync_v2": fn(DevicePtr, DevicePtr, usize, Stream);
    copy_rows = "cuMemcpy2DAsync_v2": fn(*const Copy2d, Stream);
    host_register = "cuMemHostRegister_v2": fn(*mut c_void, usize, c_uint);
    host_unregister = "cuMemHostUnregister": fn(*mut c_void);
    host_device_pointer = "cuMemHostGetDevicePointer_v2": fn(*mut DevicePtr, *mut c_void, c_uint);
    memory_allocate = "cuMemAlloc_v2": fn(*mut DevicePtr, usize);
    memory_free = "cuMemFree_v2": fn(DevicePtr);
    error_name = "cuGetErrorName": fn(Status, *mut *const c_char);
    error_string = "cuGetErrorString": fn(Status, *mut *const c_char);
}

impl Driver {
    /// The machine's driver.
    pub fn load() -> Result<Driver, LoadError> {
        Driver::load_file(OsStr::new(SONAME))
    }

    /// A library of this file name; tests name their stand-in so.
    pub fn load_file(file: &OsStr) -> Result<Driver, LoadError> {
        let name = file.to_string_lossy().into_owned();
        // SAFETY: the driver's initialisers have no requirements on their caller.
        let handle = unsafe { libloading::Library::new(file) }
            .map_err(|e| LoadError::NotFound { name: name.clone(), reason: innermost(&e) })?;
        Driver::resolve(&name, handle)
    }

    /// The driver's own words for a status, e.g. "CUDA_ERROR_OUT_OF_MEMORY: out of memory".
    pub fn explain(&self, status: Status) -> String {
        let text = |get: unsafe extern "C" fn(Status, *mut *const c_char) -> Status| {
            let mut found: *const c_char = std::ptr::null();
            // SAFETY: `found` is a place for a pointer to a string that lives as long as the library.
            let ok = unsafe { get(status, &raw mut found) } == SUCCESS && !found.is_null();
            // SAFETY: as above: a terminated string.
            ok.then(|| unsafe { CStr::from_ptr(found) }.to_string_lossy().into_owned())
        };
        match (text(self.error_name), text(self.error_string)) {
            (Some(name), Some(meaning)) => format!("{name}: {meaning}"),
            (Some(name), None) => name,
            _ => format!("CUDA error {status}"),
        }
    }
}

/// The dynamic linker's own words, which are in the source.
fn innermost(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_driver_is_an_error_that_says_what_to_do() {
        let error = Driver::load_file(OsStr::new("libsmddp-no-such-driver.so")).unwrap_err();
        let said = error.to_string();
        assert!(
            said.contains("libsmddp-no-such-driver.so") && said.contains("Install NVIDIA's driver"),
            "{said}"
        );
        // The dynamic linker's own words.
        assert!(said.contains("No such file"), "{said}");
    }

    #[test]
    fn a_library_without_the_functions_is_named_with_the_first_one_missing() {
        let error = Driver::load_file(OsStr::new("libc.so.6")).unwrap_err();
        assert_eq!(error, LoadError::TooOld { name: "libc.so.6".to_owned(), symbol: "cuInit" });
    }
}
