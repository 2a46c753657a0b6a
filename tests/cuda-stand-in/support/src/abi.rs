//! What the stand-in driver offers beside CUDA's own functions: to the stand-in NCCL and to tests.

use std::ffi::{c_char, c_int, c_void};

/// The one symbol the driver exports beside `cu…`: `extern "C" fn() -> *const Table`.
pub const TABLE_SYMBOL: &[u8] = b"smddpStandinTable\0";

/// Grows with every change of [`Table`]: libraries of two builds must not meet.
pub const VERSION: u32 = 4;

/// A piece of work for a stream. Returns 0, or the error that the whole context shall have from then on.
pub type Work = unsafe extern "C" fn(data: *mut c_void) -> c_int;

/// A range of registered memory that stays valid, though perhaps freed by its owner, until it is dropped.
pub type SpanHandle = *mut c_void;

/// Counts of one kind of memory.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leaks {
    pub device_regions: u64,
    pub device_bytes: u64,
    pub pinned_regions: u64,
    pub registered_regions: u64,
    pub streams: u64,
    pub events: u64,
    /// Of NCCL.
    pub communicators: u64,
}

/// Functions returning `c_int` return a CUDA error code, 0 for success.
#[repr(C)]
pub struct Table {
    pub version: u32,
    /// Counts a call of `name` and says which code it shall fail with, if any.
    pub enter: unsafe extern "C" fn(name: *const c_char) -> c_int,
    /// From now on the `nth` call of `name` (1 = the next) fails with `code`; with `always`, all later ones too.
    pub fail: unsafe extern "C" fn(name: *const c_char, nth: u64, always: bool, code: c_int),
    /// Calls of `name` so far.
    pub calls: unsafe extern "C" fn(name: *const c_char) -> u64,
    pub leaks: unsafe extern "C" fn(out: *mut Leaks),
    /// Stream operations that wait right now: for an event, a value or a peer.
    pub parked: extern "C" fn() -> u64,
    /// Counts an operation that waits (`true`) or no longer does.
    pub park: extern "C" fn(waits: bool),
    /// So many communicators of NCCL live.
    pub communicators: extern "C" fn(count: u64),
    /// The context's lasting error, 0 if none; its text goes to `text`, cut to `len` bytes.
    pub lasting_error: unsafe extern "C" fn(text: *mut c_char, len: usize) -> c_int,
    /// Labels host memory as memory of `device`.
    pub adopt: unsafe extern "C" fn(ptr: *mut c_void, len: usize, device: c_int) -> c_int,
    pub disown: unsafe extern "C" fn(ptr: *mut c_void) -> c_int,
    /// Says from now on that a graph is captured from `stream`, or that none is.
    pub capture: unsafe extern "C" fn(stream: *mut c_void, captures: bool) -> c_int,
    /// Operations that run, and have run, on streams.
    pub executed: extern "C" fn() -> u64,
    /// The number of the graph that is captured from `stream`, 0 for none; whether it was not destroyed yet.
    pub graph: unsafe extern "C" fn(stream: *mut c_void) -> u64,
    pub graph_lives: extern "C" fn(graph: u64) -> bool,
    /// All that were captured so far.
    pub destroy_graphs: extern "C" fn(),

    pub current_device: unsafe extern "C" fn(out: *mut c_int) -> c_int,
    /// Queues `work` on the first of `streams`; it starts after what all of them hold by now, and what they
    /// get later starts after it. `data` is `work`'s: it runs exactly once if 0 is returned, else never.
    pub launch: unsafe extern "C" fn(
        name: *const c_char,
        streams: *const *mut c_void,
        count: usize,
        work: Work,
        data: *mut c_void,
    ) -> c_int,
    pub span: unsafe extern "C" fn(addr: u64, len: usize, out: *mut SpanHandle) -> c_int,
    pub span_read: unsafe extern "C" fn(span: SpanHandle, to: *mut u8) -> c_int,
    pub span_write: unsafe extern "C" fn(span: SpanHandle, from: *const u8) -> c_int,
    pub span_fill: unsafe extern "C" fn(span: SpanHandle, byte: u8) -> c_int,
    pub span_drop: unsafe extern "C" fn(span: SpanHandle),
}
