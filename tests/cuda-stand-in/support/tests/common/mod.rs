//! The C functions the tests call, as plain Rust.
// A panic is a test's report; the vendors' functions have the names and arguments they have.
#![allow(dead_code, non_snake_case, clippy::unwrap_used, clippy::too_many_arguments)]

use smddp_standin::{Control, Rank, paths};
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::time::{Duration, Instant};

macro_rules! library {
    ($name:ident, $path:ident, { $($function:ident($($arg:ident: $type:ty),*) $(-> $result:ty)?;)* }) => {
        pub struct $name { $($function: unsafe extern "C" fn($($type),*) -> library!(@ $($result)?),)* }

        impl $name {
            pub fn load() -> &'static Self {
                static LOADED: std::sync::OnceLock<$name> = std::sync::OnceLock::new();
                LOADED.get_or_init(|| {
                    // SAFETY: the stand-in's, which may be loaded any time.
                    let library = unsafe { libloading::Library::new(&paths().$path) }.unwrap();
                    let library = Box::leak(Box::new(library));
                    // SAFETY: the types are those of the vendor's headers.
                    Self { $($function: unsafe { *library.get(stringify!($function).as_bytes()).unwrap() },)* }
                })
            }

            $(pub fn $function(&self, $($arg: $type),*) -> library!(@ $($result)?) {
                // SAFETY: tests pass live pointers, or null to see it refused.
                unsafe { (self.$function)($($arg),*) }
            })*
        }
    };
    (@ $result:ty) => { $result };
    (@) => { c_int };
}

pub type Handle = usize;

library!(Cuda, cuda, {
    cuInit(flags: c_uint);
    cuDriverGetVersion(out: *mut c_int);
    cuGetErrorName(code: c_int, out: *mut *const c_char);
    cuDeviceGet(out: *mut c_int, ordinal: c_int);
    cuDeviceGetCount(out: *mut c_int);
    cuDeviceGetName(out: *mut c_char, len: c_int, device: c_int);
    cuDeviceGetAttribute(out: *mut c_int, attribute: c_int, device: c_int);
    cuDevicePrimaryCtxRetain(out: *mut Handle, device: c_int);
    cuDevicePrimaryCtxRelease_v2(device: c_int);
    cuCtxSetCurrent(context: Handle);
    cuCtxSynchronize();
    cuStreamCreate(out: *mut Handle, flags: c_uint);
    cuStreamDestroy_v2(stream: Handle);
    cuStreamSynchronize(stream: Handle);
    cuStreamQuery(stream: Handle);
    cuStreamWaitEvent(stream: Handle, event: Handle, flags: c_uint);
    cuStreamWaitValue32_v2(stream: Handle, address: u64, value: u32, flags: c_uint);
    cuStreamWriteValue32_v2(stream: Handle, address: u64, value: u32, flags: c_uint);
    cuStreamWaitValue64_v2(stream: Handle, address: u64, value: u64, flags: c_uint);
    cuStreamBatchMemOp_v2(stream: Handle, count: c_uint, params: *const [u64; 6], flags: c_uint);
    cuLaunchHostFunc(stream: Handle, function: extern "C" fn(*mut c_void), data: *mut c_void);
    cuThreadExchangeStreamCaptureMode(mode: *mut c_int);
    cuEventCreate(out: *mut Handle, flags: c_uint);
    cuEventRecord(event: Handle, stream: Handle);
    cuEventQuery(event: Handle);
    cuEventSynchronize(event: Handle);
    cuEventDestroy_v2(event: Handle);
    cuEventElapsedTime(out: *mut f32, start: Handle, end: Handle);
    cuMemAlloc_v2(out: *mut u64, len: usize);
    cuMemFree_v2(address: u64);
    cuMemAllocAsync(out: *mut u64, len: usize, stream: Handle);
    cuMemFreeAsync(address: u64, stream: Handle);
    cuMemHostAlloc(out: *mut *mut u8, len: usize, flags: c_uint);
    cuMemFreeHost(host: *mut u8);
    cuMemHostRegister_v2(host: *mut u8, len: usize, flags: c_uint);
    cuMemHostUnregister(host: *mut u8);
    cuMemHostGetDevicePointer_v2(out: *mut u64, host: *mut u8, flags: c_uint);
    cuMemcpyDtoHAsync_v2(host: *mut u8, device: u64, len: usize, stream: Handle);
    cuMemcpyHtoDAsync_v2(device: u64, host: *const u8, len: usize, stream: Handle);
    cuMemcpyDtoDAsync_v2(to: u64, from: u64, len: usize, stream: Handle);
    cuMemcpy2DAsync_v2(copy: *const Copy2d, stream: Handle);
    cuMemcpyDtoH_v2(host: *mut u8, device: u64, len: usize);
    cuMemcpyHtoD_v2(device: u64, host: *const u8, len: usize);
    cuMemsetD8Async(address: u64, value: u8, count: usize, stream: Handle);
    cuMemsetD32Async(address: u64, value: u32, count: usize, stream: Handle);
    cuMemGetInfo_v2(free: *mut usize, total: *mut usize);
    cuPointerGetAttribute(out: *mut c_int, attribute: c_uint, address: u64);
});

/// CUDA_MEMCPY2D.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Copy2d {
    pub from: Side2d,
    pub to: Side2d,
    pub width: usize,
    pub height: usize,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Side2d {
    pub x: usize,
    pub y: usize,
    pub kind: c_uint,
    pub host: *const u8,
    pub device: u64,
    pub array: usize,
    pub pitch: usize,
}

impl Side2d {
    pub fn host(host: *const u8, pitch: usize) -> Self {
        Self { x: 0, y: 0, kind: 1, host, device: 0, array: 0, pitch }
    }

    pub fn device(device: u64, pitch: usize) -> Self {
        Self { x: 0, y: 0, kind: 2, host: std::ptr::null(), device, array: 0, pitch }
    }
}

pub type UniqueId = [u8; 128];
/// ncclUniqueId goes by value, as the struct it is.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Id(pub UniqueId);

library!(Nccl, nccl, {
    ncclGetVersion(out: *mut c_int);
    ncclGetUniqueId(out: *mut Id);
    ncclCommInitRank(out: *mut Handle, ranks: c_int, id: Id, rank: c_int);
    ncclCommInitRankConfig(out: *mut Handle, ranks: c_int, id: Id, rank: c_int, config: *const Config);
    ncclCommSplit(comm: Handle, color: c_int, key: c_int, out: *mut Handle, config: *const Config);
    ncclCommFinalize(comm: Handle);
    ncclCommDestroy(comm: Handle);
    ncclCommAbort(comm: Handle);
    ncclCommGetAsyncError(comm: Handle, out: *mut c_int);
    ncclGetLastError(comm: Handle) -> *const c_char;
    ncclGetErrorString(code: c_int) -> *const c_char;
    ncclCommCount(comm: Handle, out: *mut c_int);
    ncclCommUserRank(comm: Handle, out: *mut c_int);
    ncclCommCuDevice(comm: Handle, out: *mut c_int);
    ncclGroupStart();
    ncclGroupEnd();
    ncclAllReduce(from: u64, to: u64, count: usize, dtype: c_int, op: c_int, comm: Handle, stream: Handle);
    ncclReduceScatter(from: u64, to: u64, count: usize, dtype: c_int, op: c_int, comm: Handle, stream: Handle);
    ncclAllGather(from: u64, to: u64, count: usize, dtype: c_int, comm: Handle, stream: Handle);
    ncclBroadcast(from: u64, to: u64, count: usize, dtype: c_int, root: c_int, comm: Handle, stream: Handle);
    ncclReduce(from: u64, to: u64, count: usize, dtype: c_int, op: c_int, root: c_int, comm: Handle, stream: Handle);
    ncclSend(from: u64, count: usize, dtype: c_int, peer: c_int, comm: Handle, stream: Handle);
    ncclRecv(to: u64, count: usize, dtype: c_int, peer: c_int, comm: Handle, stream: Handle);
    ncclRedOpCreatePreMulSum(out: *mut c_int, scalar: *const c_void, dtype: c_int, residence: c_int, comm: Handle);
    ncclRedOpDestroy(op: c_int, comm: Handle);
    ncclCommRegister(comm: Handle, buffer: u64, size: usize, out: *mut Handle);
    ncclCommDeregister(comm: Handle, handle: Handle);
});

/// ncclConfig_t as of 2.18.
#[repr(C)]
pub struct Config {
    pub size: usize,
    pub magic: u32,
    pub version: u32,
    pub blocking: c_int,
    pub rest: [c_int; 7],
}

impl Config {
    pub fn blocking(blocking: c_int) -> Self {
        let (magic, size) = (0xcafe_beef, size_of::<Self>());
        Self { size, magic, version: 21800, blocking, rest: [c_int::MIN; 7] }
    }
}

pub const NON_BLOCKING: c_uint = 1;
pub const F32: c_int = 7;
pub const SUM: c_int = 0;

/// A driver that was started, and `device` current.
pub fn cuda_on(device: i32) -> (&'static Cuda, Control) {
    let cuda = Cuda::load();
    assert_eq!(cuda.cuInit(0), 0);
    let mut context = 0;
    assert_eq!(cuda.cuDevicePrimaryCtxRetain(&mut context, device), 0);
    assert_eq!(cuda.cuCtxSetCurrent(context), 0);
    (cuda, Control::of(&paths().cuda).unwrap())
}

pub fn cuda() -> (&'static Cuda, Control) {
    cuda_on(0)
}

impl Cuda {
    pub fn stream(&self) -> Handle {
        let mut stream = 0;
        assert_eq!(self.cuStreamCreate(&mut stream, NON_BLOCKING), 0);
        stream
    }

    pub fn event(&self) -> Handle {
        let mut event = 0;
        assert_eq!(self.cuEventCreate(&mut event, 2), 0);
        event
    }

    pub fn alloc(&self, len: usize) -> u64 {
        let mut address = 0;
        assert_eq!(self.cuMemAlloc_v2(&mut address, len), 0);
        address
    }

    pub fn pinned(&self, len: usize) -> Pinned {
        let mut host = std::ptr::null_mut();
        assert_eq!(self.cuMemHostAlloc(&mut host, len, 3), 0);
        let mut device = 0;
        assert_eq!(self.cuMemHostGetDevicePointer_v2(&mut device, host, 0), 0);
        let pinned = Pinned { host, device, len };
        pinned.fill(0);
        pinned
    }

    pub fn put(&self, floats: &[f32]) -> u64 {
        let address = self.alloc(floats.len() * 4);
        assert_eq!(self.cuMemcpyHtoD_v2(address, floats.as_ptr().cast(), floats.len() * 4), 0);
        address
    }

    pub fn get(&self, address: u64, count: usize) -> Vec<f32> {
        let mut floats = vec![0f32; count];
        assert_eq!(self.cuMemcpyDtoH_v2(floats.as_mut_ptr().cast(), address, count * 4), 0);
        floats
    }
}

/// Memory that streams and the host share.
pub struct Pinned {
    pub host: *mut u8,
    pub device: u64,
    pub len: usize,
}

// SAFETY: used by atomics and volatile access only.
unsafe impl Sync for Pinned {}

impl Pinned {
    pub fn fill(&self, byte: u8) {
        for i in 0..self.len {
            // SAFETY: within the allocation.
            unsafe { self.host.add(i).write_volatile(byte) };
        }
    }

    pub fn bytes(&self) -> Vec<u8> {
        // SAFETY: within the allocation.
        (0..self.len).map(|i| unsafe { self.host.add(i).read_volatile() }).collect()
    }

    pub fn word(&self, index: usize) -> &std::sync::atomic::AtomicU32 {
        assert!(index * 4 + 4 <= self.len);
        // SAFETY: within the allocation, which is aligned, and lives to the end of the test.
        unsafe { std::sync::atomic::AtomicU32::from_ptr(self.host.cast::<u32>().add(index)) }
    }
}

/// Waits for what must come; never for time.
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(60), "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

pub fn text(text: *const c_char) -> String {
    // SAFETY: C strings of the stand-ins live for ever.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// A communicator of all ranks, each on the device of its number.
pub fn comm(nccl: &Nccl, rank: &Rank) -> Handle {
    let (code, comm) = try_comm(nccl, rank, "id");
    assert_eq!(code, 0, "{}", text(nccl.ncclGetLastError(0)));
    comm
}

pub fn try_comm(nccl: &Nccl, rank: &Rank, name: &str) -> (c_int, Handle) {
    let id = unique_id(nccl, rank, name);
    let mut comm = 0;
    let code = nccl.ncclCommInitRank(&mut comm, rank.ranks as c_int, id, rank.rank as c_int);
    (code, comm)
}

pub fn unique_id(nccl: &Nccl, rank: &Rank, name: &str) -> Id {
    if rank.rank == 0 {
        let mut id = Id([0; 128]);
        assert_eq!(nccl.ncclGetUniqueId(&mut id), 0);
        rank.publish(name, &id.0);
    }
    Id(rank.receive(name).try_into().unwrap())
}

pub fn async_error(nccl: &Nccl, comm: Handle) -> c_int {
    let mut code = -1;
    assert_eq!(nccl.ncclCommGetAsyncError(comm, &mut code), 0);
    code
}
