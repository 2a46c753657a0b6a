//! What the stand-in offers beside the driver API: see `smddp_standin::abi`.

use crate::code::{Code, Result};
use crate::context;
use crate::entry;
use crate::memory::{self, Kind, Span};
use crate::{event, queue, stream as streams};
use smddp_standin::abi::{self, Leaks, SpanHandle, Table, Work};
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::atomic::{AtomicU64, Ordering};

static TABLE: Table = Table {
    version: abi::VERSION,
    enter,
    fail,
    calls,
    leaks,
    parked,
    park,
    communicators,
    lasting_error,
    adopt,
    disown,
    capture,
    executed,
    graph,
    graph_lives,
    destroy_graphs,
    current_device,
    launch,
    span,
    span_read,
    span_write,
    span_fill,
    span_drop,
};

#[unsafe(no_mangle)]
pub extern "C" fn smddpStandinTable() -> *const Table {
    &raw const TABLE
}

fn to_c(result: Result) -> c_int {
    result.err().map_or(0, |code| code.0)
}

/// # Safety
/// `name` is a C string.
unsafe fn text(name: *const c_char) -> String {
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
}

unsafe extern "C" fn enter(name: *const c_char) -> c_int {
    // SAFETY: the table's contract.
    to_c(entry::enter(&unsafe { text(name) }))
}

unsafe extern "C" fn fail(name: *const c_char, nth: u64, always: bool, code: c_int) {
    // SAFETY: the table's contract.
    entry::fail(&unsafe { text(name) }, nth, always, code);
}

unsafe extern "C" fn calls(name: *const c_char) -> u64 {
    // SAFETY: the table's contract.
    entry::count_of(&unsafe { text(name) })
}

unsafe extern "C" fn leaks(out: *mut Leaks) {
    let mut leaks = Leaks {
        streams: context::live_streams() as u64,
        events: event::live() as u64,
        communicators: COMMUNICATORS.load(Ordering::SeqCst),
        ..Leaks::default()
    };
    memory::count(&mut leaks);
    // SAFETY: the table's contract.
    unsafe { out.write(leaks) };
}

extern "C" fn parked() -> u64 {
    queue::parked()
}

extern "C" fn park(waits: bool) {
    queue::park(waits);
}

/// Those of NCCL that live.
static COMMUNICATORS: AtomicU64 = AtomicU64::new(0);

extern "C" fn communicators(count: u64) {
    COMMUNICATORS.store(count, Ordering::SeqCst);
}

extern "C" fn executed() -> u64 {
    queue::executed()
}

unsafe extern "C" fn lasting_error(to: *mut c_char, len: usize) -> c_int {
    let Some((code, text)) = entry::lasting_error() else { return 0 };
    if len > 0 {
        let count = text.len().min(len - 1);
        // SAFETY: by the table's contract `to` has `len` bytes.
        unsafe { to.cast::<u8>().copy_from(text.as_ptr(), count) };
        // SAFETY: as above; count < len.
        unsafe { to.add(count).write(0) };
    }
    code.0
}

unsafe extern "C" fn adopt(ptr: *mut c_void, len: usize, device: c_int) -> c_int {
    let label = |_| memory::label(Kind::Adopted, device, ptr as u64, len, 0);
    to_c(context::device(device).and_then(label))
}

unsafe extern "C" fn disown(ptr: *mut c_void) -> c_int {
    to_c(memory::remove(Kind::Adopted, ptr as u64, Code::INVALID_VALUE))
}

unsafe extern "C" fn capture(stream: *mut c_void, captures: bool) -> c_int {
    to_c(context::stream(stream as usize).map(|stream| stream.set_capturing(captures)))
}

unsafe extern "C" fn graph(stream: *mut c_void) -> u64 {
    context::stream(stream as usize).map_or(0, |stream| stream.graph())
}

extern "C" fn graph_lives(graph: u64) -> bool {
    streams::graph_lives(graph)
}

extern "C" fn destroy_graphs() {
    streams::destroy_graphs();
}

unsafe extern "C" fn current_device(out: *mut c_int) -> c_int {
    to_c(context::current().map(|device| {
        // SAFETY: the table's contract.
        unsafe { out.write(device.ordinal) };
    }))
}

/// Work of another library, which runs exactly once.
struct Job {
    work: Work,
    data: *mut c_void,
}

// SAFETY: by the table's contract `data` belongs to `work`, whichever thread runs it.
unsafe impl Send for Job {}

impl Job {
    fn run(self) -> Result {
        // SAFETY: called once, with the data it was queued with.
        match unsafe { (self.work)(self.data) } {
            0 => Ok(()),
            code => Err(Code(code)),
        }
    }
}

unsafe extern "C" fn launch(
    name: *const c_char,
    streams: *const *mut c_void,
    count: usize,
    work: Work,
    data: *mut c_void,
) -> c_int {
    // SAFETY: the table's contract.
    let name = unsafe { text(name) };
    let handles: Vec<usize> =
        // SAFETY: by the table's contract an array of `count`.
        (0..count).map(|i| unsafe { streams.add(i).read() } as usize).collect();
    to_c(launch_on(&name, &handles, Job { work, data }))
}

fn launch_on(name: &str, handles: &[usize], job: Job) -> Result {
    let streams = handles.iter().map(|handle| context::stream(*handle)).collect::<Result<Vec<_>>>()?;
    let (first, others) = streams.split_first().ok_or(Code::INVALID_VALUE)?;
    if let Some((code, _)) = entry::lasting_error() {
        return Err(code);
    }
    let after = others.iter().map(|other| (other.clone(), other.place())).collect();
    let name = intern(name);
    // Always: who queued it waits for it to run, and counts on that even if the context is broken.
    let place = first.enqueue_after(name, after, true, move || job.run());
    for other in others {
        other.enqueue_after(name, vec![(first.clone(), place)], false, || Ok(()));
    }
    Ok(())
}

/// Names of operations live for ever; there are few.
fn intern(name: &str) -> &'static str {
    use std::collections::BTreeSet;
    use std::sync::Mutex;
    static NAMES: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());
    let mut names = entry::lock(&NAMES);
    if let Some(known) = names.get(name) {
        return known;
    }
    let leaked: &'static str = Box::leak(name.to_string().into_boxed_str());
    names.insert(leaked);
    leaked
}

unsafe extern "C" fn span(address: u64, len: usize, out: *mut SpanHandle) -> c_int {
    to_c(memory::device_span(address, len).map(|span| {
        // SAFETY: the table's contract.
        unsafe { out.write(Box::into_raw(Box::new(span)).cast()) };
    }))
}

/// # Safety
/// `span` comes from [`span`] and was not dropped.
unsafe fn borrow<'a>(span: SpanHandle) -> &'a Span {
    // SAFETY: the caller's promise.
    unsafe { &*span.cast::<Span>() }
}

unsafe extern "C" fn span_read(span: SpanHandle, to: *mut u8) -> c_int {
    // SAFETY: the table's contract, for the handle and for `to`, which has the span's length.
    to_c(unsafe { borrow(span).read_to(to) })
}

unsafe extern "C" fn span_write(span: SpanHandle, from: *const u8) -> c_int {
    // SAFETY: the table's contract, for the handle and for `from`, which has the span's length.
    to_c(unsafe { borrow(span).write_from(from) })
}

unsafe extern "C" fn span_fill(span: SpanHandle, byte: u8) -> c_int {
    // SAFETY: the table's contract.
    to_c(unsafe { borrow(span) }.fill(byte))
}

unsafe extern "C" fn span_drop(span: SpanHandle) {
    // SAFETY: by the table's contract the handle is given back once, here.
    drop(unsafe { Box::from_raw(span.cast::<Span>()) });
}
