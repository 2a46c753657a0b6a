//! The machine's libfabric, with NICs that reach the memory of devices: of the CUDA stand-in's, which is host memory.
//!
//! All calls go to the real library, but for these: `fi_getinfo` finds what was asked for with FI_HMEM too, memory of CUDA
//! devices is registered as the host memory that it is, and FI_OPT_CUDA_API_PERMITTED is taken. Objects get copies of their
//! tables of functions with those entries changed; the copies are never freed, as the library is never unloaded.
//!
//! Memory of devices is registered only after the promise that no CUDA calls are needed, as a provider that makes some can wait
//! for the stream that waits for it. With SMDDP_STANDIN_CUDA_CALLS=1 this one makes some, and says so.
//!
//! With SMDDP_STANDIN_MR_LOCAL=1 a NIC also wants what it sends and receives to be registered, as EFA's does.

// What fails here fails a test: a panic is the report.
#![allow(clippy::expect_used)]

use std::ffi::{c_char, c_int, c_void};
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use smddp_libfabric_sys::abi::*;
use smddp_libfabric_sys::{Library, places};

/// Folders in which the real libfabric may lie, beside the usual ones; as PATH is written.
const DIRS: &str = "SMDDP_STANDIN_LIBRARY_DIRS";

/// No CUDA calls are made: FI_OPT_CUDA_API_PERMITTED was set to 0.
static FORBIDDEN: AtomicBool = AtomicBool::new(false);
/// Bytes registered so far.
static REGISTERED: AtomicU64 = AtomicU64::new(0);

#[unsafe(no_mangle)]
extern "C" fn smddp_standin_fabric_registered() -> u64 {
    REGISTERED.load(Ordering::SeqCst)
}

fn is_on(switch: &str) -> bool {
    std::env::var_os(switch).is_some_and(|value| value == "1")
}

fn wants_local_registration() -> bool {
    is_on("SMDDP_STANDIN_MR_LOCAL")
}

fn real() -> &'static Library {
    static REAL: OnceLock<Library> = OnceLock::new();
    REAL.get_or_init(|| {
        let dirs = std::env::var_os(DIRS).unwrap_or_default();
        let dirs: Vec<PathBuf> = std::env::split_paths(&dirs).collect();
        Library::load(&places("", false, &dirs)).expect("the stand-in needs a real libfabric")
    })
}

/// A copy of a table of `size` bytes, for good.
///
/// # Safety
/// `table` has so many bytes.
unsafe fn copied<T>(table: *const T, size: usize) -> *mut T {
    let words = size.max(size_of::<T>()).div_ceil(size_of::<u64>());
    let copy = Vec::leak(vec![0u64; words]).as_mut_ptr();
    // SAFETY: by the caller's word; as much room.
    unsafe { std::ptr::copy_nonoverlapping(table.cast::<u8>(), copy.cast::<u8>(), size) };
    copy.cast()
}

/// The functions behind the changed entries: one provider's, as a process uses one.
#[derive(Default)]
struct Behind {
    domain: OnceLock<Domain>,
    endpoint: OnceLock<Endpoint>,
    reg: OnceLock<Reg>,
    setopt: OnceLock<SetOpt>,
}

type Domain = unsafe extern "C" fn(*mut fid_fabric, *mut fi_info, *mut *mut fid_domain, *mut c_void) -> c_int;
type Endpoint = unsafe extern "C" fn(*mut fid_domain, *mut fi_info, *mut *mut fid_ep, *mut c_void) -> c_int;
type Reg = unsafe extern "C" fn(
    *mut fid,
    *const c_void,
    usize,
    u64,
    u64,
    u64,
    u64,
    *mut *mut fid_mr,
    *mut c_void,
) -> c_int;
type SetOpt = unsafe extern "C" fn(*mut fid, c_int, c_int, *const c_void, usize) -> c_int;

static BEHIND: Behind = Behind {
    domain: OnceLock::new(),
    endpoint: OnceLock::new(),
    reg: OnceLock::new(),
    setopt: OnceLock::new(),
};

#[unsafe(no_mangle)]
extern "C" fn fi_version() -> u32 {
    real().version.raw()
}

#[unsafe(no_mangle)]
extern "C" fn fi_strerror(code: c_int) -> *const c_char {
    real().strerror(code)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn fi_dupinfo(info: *const fi_info) -> *mut fi_info {
    // SAFETY: the caller's arguments.
    unsafe { (real().fi_dupinfo)(info) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn fi_freeinfo(info: *mut fi_info) {
    // SAFETY: the caller's arguments.
    unsafe { (real().fi_freeinfo)(info) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn fi_getinfo(
    version: u32,
    node: *const c_char,
    service: *const c_char,
    flags: u64,
    hints: *const fi_info,
    out: *mut *mut fi_info,
) -> c_int {
    // SAFETY: the caller's arguments; the copy of the hints is ours to change and to free.
    unsafe {
        let wanted = if hints.is_null() { 0 } else { (*hints).caps & FI_HMEM };
        let plain = (real().fi_dupinfo)(hints);
        (*plain).caps &= !FI_HMEM;
        (*(*plain).domain_attr).mr_mode &= !FI_MR_HMEM;
        let code = (real().fi_getinfo)(version, node, service, flags, plain, out);
        (real().fi_freeinfo)(plain);
        let mut next = if code == 0 { *out } else { std::ptr::null_mut() };
        while !next.is_null() {
            (*next).caps |= wanted;
            if wants_local_registration() {
                (*(*next).domain_attr).mr_mode |= FI_MR_LOCAL;
            }
            next = (*next).next;
        }
        code
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn fi_fabric(
    attr: *mut fi_fabric_attr,
    out: *mut *mut fid_fabric,
    context: *mut c_void,
) -> c_int {
    // SAFETY: the caller's arguments; a live object when it went well.
    unsafe {
        let code = (real().fi_fabric)(attr, out, context);
        if code == 0 {
            let fabric = *out;
            let table = copied((*fabric).ops, (*(*fabric).ops).size);
            BEHIND.domain.get_or_init(|| (*table).domain.expect("every provider has it"));
            (*table).domain = Some(open_domain);
            (*fabric).ops = table;
        }
        code
    }
}

unsafe extern "C" fn open_domain(
    fabric: *mut fid_fabric,
    info: *mut fi_info,
    out: *mut *mut fid_domain,
    context: *mut c_void,
) -> c_int {
    // SAFETY: the caller's arguments; a live object when it went well.
    unsafe {
        (*info).caps &= !FI_HMEM;
        (*(*info).domain_attr).mr_mode &= !FI_MR_LOCAL;
        let open = BEHIND.domain.get().expect("kept with the table");
        let code = open(fabric, info, out, context);
        if code == 0 {
            let domain = *out;
            let table = copied((*domain).ops, (*(*domain).ops).size);
            BEHIND.endpoint.get_or_init(|| (*table).endpoint.expect("every provider has it"));
            (*table).endpoint = Some(open_endpoint);
            (*domain).ops = table;
            let table = copied((*domain).mr, (*(*domain).mr).size);
            BEHIND.reg.get_or_init(|| (*table).reg.expect("every provider has it"));
            (*table).reg = Some(register);
            (*table).regattr = Some(register_of_device);
            (*domain).mr = table;
        }
        code
    }
}

unsafe extern "C" fn open_endpoint(
    domain: *mut fid_domain,
    info: *mut fi_info,
    out: *mut *mut fid_ep,
    context: *mut c_void,
) -> c_int {
    // SAFETY: the caller's arguments; a live object when it went well.
    unsafe {
        let open = BEHIND.endpoint.get().expect("kept with the table");
        let code = open(domain, info, out, context);
        if code == 0 {
            let ep = *out;
            let table = copied((*ep).ops, (*(*ep).ops).size);
            BEHIND.setopt.get_or_init(|| (*table).setopt.expect("every provider has it"));
            (*table).setopt = Some(set_option);
            (*ep).ops = table;
        }
        code
    }
}

unsafe extern "C" fn set_option(
    ep: *mut fid,
    level: c_int,
    option: c_int,
    value: *const c_void,
    len: usize,
) -> c_int {
    if option == FI_OPT_CUDA_API_PERMITTED {
        const EOPNOTSUPP: c_int = 95;
        assert_eq!((level, len), (FI_OPT_ENDPOINT, 1));
        // SAFETY: one byte, as was looked at.
        let permitted = unsafe { *value.cast::<u8>() } != 0;
        if !permitted && is_on("SMDDP_STANDIN_CUDA_CALLS") {
            return -EOPNOTSUPP;
        }
        FORBIDDEN.store(!permitted, Ordering::SeqCst);
        return 0;
    }
    // SAFETY: the caller's arguments.
    unsafe { BEHIND.setopt.get().expect("kept with the table")(ep, level, option, value, len) }
}

#[allow(clippy::too_many_arguments)]
unsafe extern "C" fn register(
    domain: *mut fid,
    start: *const c_void,
    len: usize,
    access: u64,
    offset: u64,
    key: u64,
    flags: u64,
    out: *mut *mut fid_mr,
    context: *mut c_void,
) -> c_int {
    REGISTERED.fetch_add(len as u64, Ordering::SeqCst);
    // SAFETY: the caller's arguments.
    unsafe {
        let register = BEHIND.reg.get().expect("kept with the table");
        register(domain, start, len, access, offset, key, flags, out, context)
    }
}

/// As libfabric does, whose memory it is.
fn ask_the_driver(address: *const c_void) {
    type Ask = unsafe extern "C" fn(*mut u64, u32, u64) -> c_int;
    const MEMORY_TYPE: u32 = 2;
    static DRIVER: OnceLock<libloading::Library> = OnceLock::new();
    let driver = DRIVER.get_or_init(|| {
        let file = std::env::var_os("SMDDP_STANDIN_CUDA").expect("the stand-in of the driver is named");
        // SAFETY: loaded already, or a library whose loading runs no code.
        unsafe { libloading::Library::new(file) }.expect("the driver is there")
    });
    let mut kind = 0;
    // SAFETY: the function's type by the driver API, and a place for its answer.
    unsafe {
        let ask = driver.get::<Ask>(b"cuPointerGetAttribute\0").expect("the driver has it");
        assert_eq!(ask(&raw mut kind, MEMORY_TYPE, address.addr() as u64), 0, "no memory of a device's");
    }
}

unsafe extern "C" fn register_of_device(
    domain: *mut fid,
    attr: *const fi_mr_attr,
    flags: u64,
    out: *mut *mut fid_mr,
) -> c_int {
    // SAFETY: the caller's arguments.
    unsafe {
        let attr = &*attr;
        assert!(attr.iface == FI_HMEM_CUDA && attr.iov_count == 1, "only devices' memory comes here");
        assert!(FORBIDDEN.load(Ordering::SeqCst), "memory of a device, and CUDA calls are permitted");
        let part = &*attr.mr_iov;
        let (start, len) = (part.iov_base.cast_const(), part.iov_len);
        ask_the_driver(start);
        register(domain, start, len, attr.access, attr.offset, attr.requested_key, flags, out, attr.context)
    }
}
