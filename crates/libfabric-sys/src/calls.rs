//! The calls that libfabric's headers define as inline functions: through an object's table of functions (A4).
//!
//! Results are libfabric's: 0 or a count, or a negative error; `-FI_ENOSYS` where a provider lacks the entry.

use std::ffi::{c_int, c_void};
use std::mem::offset_of;

use crate::abi::*;

/// Calls entry `$entry` of the table `$ops`, or gives `-FI_ENOSYS` (A4).
macro_rules! through {
    ($ops:expr, $table:ty, $entry:ident ( $($argument:expr),* )) => {{
        let ops: *const $table = $ops;
        // SAFETY: the caller passes a live object, whose table pointer is null or valid for `size` bytes (A1).
        let function = unsafe {
            if ops.is_null() || (*ops).size <= offset_of!($table, $entry) { None } else { (*ops).$entry }
        };
        match function {
            // SAFETY: the table's declaration gives this entry's type; arguments are the caller's responsibility.
            Some(function) => unsafe { function($($argument),*) },
            None => -(FI_ENOSYS as c_int) as _,
        }
    }};
}

/// # Safety
/// Every function here: pointers are live objects of the library's making, buffers stay valid until the
/// operation's completion has been read, and calls on one domain never run at the same time.
pub unsafe fn close(object: *mut fid) -> c_int {
    // SAFETY: a live object (see above).
    through!(unsafe { (*object).ops }, fi_ops, close(object))
}

/// # Safety
/// As [`close`].
pub unsafe fn bind(object: *mut fid, to: *mut fid, flags: u64) -> c_int {
    // SAFETY: a live object (see above).
    through!(unsafe { (*object).ops }, fi_ops, bind(object, to, flags))
}

/// # Safety
/// As [`close`]; `argument` is what `command` needs.
pub unsafe fn control(object: *mut fid, command: c_int, argument: *mut c_void) -> c_int {
    // SAFETY: a live object (see above).
    through!(unsafe { (*object).ops }, fi_ops, control(object, command, argument))
}

/// # Safety
/// As [`close`].
pub unsafe fn domain(fabric: *mut fid_fabric, info: *mut fi_info, out: *mut *mut fid_domain) -> c_int {
    // SAFETY: a live object (see above).
    through!(unsafe { (*fabric).ops }, fi_ops_fabric, domain(fabric, info, out, std::ptr::null_mut()))
}

/// # Safety
/// As [`close`].
pub unsafe fn trywait(fabric: *mut fid_fabric, objects: *mut *mut fid, count: c_int) -> c_int {
    // SAFETY: a live object (see above).
    through!(unsafe { (*fabric).ops }, fi_ops_fabric, trywait(fabric, objects, count))
}

/// # Safety
/// As [`close`].
pub unsafe fn av_open(domain: *mut fid_domain, attr: *mut fi_av_attr, out: *mut *mut fid_av) -> c_int {
    // SAFETY: a live object (see above).
    through!(unsafe { (*domain).ops }, fi_ops_domain, av_open(domain, attr, out, std::ptr::null_mut()))
}

/// # Safety
/// As [`close`].
pub unsafe fn cq_open(domain: *mut fid_domain, attr: *mut fi_cq_attr, out: *mut *mut fid_cq) -> c_int {
    // SAFETY: a live object (see above).
    through!(unsafe { (*domain).ops }, fi_ops_domain, cq_open(domain, attr, out, std::ptr::null_mut()))
}

/// # Safety
/// As [`close`].
pub unsafe fn endpoint(domain: *mut fid_domain, info: *mut fi_info, out: *mut *mut fid_ep) -> c_int {
    // SAFETY: a live object (see above).
    through!(unsafe { (*domain).ops }, fi_ops_domain, endpoint(domain, info, out, std::ptr::null_mut()))
}

/// # Safety
/// As [`close`].
pub unsafe fn mr_reg(
    domain: *mut fid_domain,
    memory: *const c_void,
    len: usize,
    access: u64,
    key: u64,
    out: *mut *mut fid_mr,
) -> c_int {
    // SAFETY: a live object (see above).
    let (ops, object) = unsafe { ((*domain).mr, &raw mut (*domain).fid) };
    through!(ops, fi_ops_mr, reg(object, memory, len, access, 0, key, 0, out, std::ptr::null_mut()))
}

/// # Safety
/// As [`close`]; `attr` is in full (A1).
pub unsafe fn mr_regattr(domain: *mut fid_domain, attr: &fi_mr_attr, out: *mut *mut fid_mr) -> c_int {
    // SAFETY: a live object (see above).
    let (ops, object) = unsafe { ((*domain).mr, &raw mut (*domain).fid) };
    through!(ops, fi_ops_mr, regattr(object, attr, 0, out))
}

/// # Safety
/// As [`close`]; `address` is one address in the provider's format.
pub unsafe fn av_insert(av: *mut fid_av, address: *const c_void, out: *mut fi_addr_t) -> c_int {
    // SAFETY: a live object (see above).
    through!(unsafe { (*av).ops }, fi_ops_av, insert(av, address, 1, out, 0, std::ptr::null_mut()))
}

/// # Safety
/// As [`close`]; `entries` has room for `count` entries of the queue's format.
pub unsafe fn cq_read(cq: *mut fid_cq, entries: *mut c_void, count: usize) -> isize {
    // SAFETY: a live object (see above).
    through!(unsafe { (*cq).ops }, fi_ops_cq, read(cq, entries, count))
}

/// # Safety
/// As [`close`].
pub unsafe fn cq_readerr(cq: *mut fid_cq, entry: *mut fi_cq_err_entry) -> isize {
    // SAFETY: a live object (see above).
    through!(unsafe { (*cq).ops }, fi_ops_cq, readerr(cq, entry, 0))
}

/// # Safety
/// As [`close`]; `address` has room for `*len` bytes.
pub unsafe fn getname(ep: *mut fid_ep, address: *mut c_void, len: *mut usize) -> c_int {
    // SAFETY: a live object (see above).
    let (ops, object) = unsafe { ((*ep).cm, &raw mut (*ep).fid) };
    through!(ops, fi_ops_cm, getname(object, address, len))
}

/// # Safety
/// As [`close`].
pub unsafe fn cancel(ep: *mut fid_ep, context: *mut c_void) -> isize {
    // SAFETY: a live object (see above).
    let (ops, object) = unsafe { ((*ep).ops, &raw mut (*ep).fid) };
    through!(ops, fi_ops_ep, cancel(object, context))
}

/// # Safety
/// As [`close`].
pub unsafe fn recv(
    ep: *mut fid_ep,
    into: *mut c_void,
    len: usize,
    desc: *mut c_void,
    context: *mut c_void,
) -> isize {
    // SAFETY: a live object (see above).
    through!(unsafe { (*ep).msg }, fi_ops_msg, recv(ep, into, len, desc, FI_ADDR_UNSPEC, context))
}

/// # Safety
/// As [`close`].
pub unsafe fn send(
    ep: *mut fid_ep,
    from: *const c_void,
    len: usize,
    desc: *mut c_void,
    to: fi_addr_t,
    context: *mut c_void,
) -> isize {
    // SAFETY: a live object (see above).
    through!(unsafe { (*ep).msg }, fi_ops_msg, send(ep, from, len, desc, to, context))
}

/// Where a remote write goes: the peer, the address or offset in its memory, the key of that memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    pub peer: fi_addr_t,
    pub addr: u64,
    pub key: u64,
}

/// # Safety
/// As [`close`].
pub unsafe fn writedata(
    ep: *mut fid_ep,
    from: *const c_void,
    len: usize,
    desc: *mut c_void,
    data: u64,
    to: Target,
    context: *mut c_void,
) -> isize {
    // SAFETY: a live object (see above).
    let ops = unsafe { (*ep).rma };
    through!(ops, fi_ops_rma, writedata(ep, from, len, desc, data, to.peer, to.addr, to.key, context))
}

/// # Safety
/// As [`close`].
pub unsafe fn trecv(
    ep: *mut fid_ep,
    into: *mut c_void,
    len: usize,
    desc: *mut c_void,
    tag: u64,
    context: *mut c_void,
) -> isize {
    // SAFETY: a live object (see above).
    let ops = unsafe { (*ep).tagged };
    through!(ops, fi_ops_tagged, recv(ep, into, len, desc, FI_ADDR_UNSPEC, tag, 0, context))
}

/// # Safety
/// As [`close`].
pub unsafe fn tsend(
    ep: *mut fid_ep,
    from: *const c_void,
    len: usize,
    desc: *mut c_void,
    to: fi_addr_t,
    tag: u64,
    context: *mut c_void,
) -> isize {
    // SAFETY: a live object (see above).
    through!(unsafe { (*ep).tagged }, fi_ops_tagged, send(ep, from, len, desc, to, tag, context))
}

/// # Safety
/// As [`close`]; `value` is what `option` needs.
pub unsafe fn setopt(ep: *mut fid_ep, option: c_int, value: *const c_void, len: usize) -> c_int {
    // SAFETY: a live object (see above).
    let (ops, object) = unsafe { ((*ep).ops, &raw mut (*ep).fid) };
    through!(ops, fi_ops_ep, setopt(object, FI_OPT_ENDPOINT, option, value, len))
}
