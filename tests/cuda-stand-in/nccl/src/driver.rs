//! The stand-in for CUDA that this library works with.

use crate::error::{Error, Result};
use smddp_standin::abi::{SpanHandle, TABLE_SYMBOL, Table, VERSION};
use std::ffi::{CString, c_int, c_void};
use std::path::PathBuf;
use std::sync::OnceLock;

/// The driver's table. The driver is the one `SMDDP_STANDIN_CUDA` names, else the one beside this library.
fn table() -> &'static Table {
    static TABLE: OnceLock<&'static Table> = OnceLock::new();
    TABLE.get_or_init(|| {
        load().unwrap_or_else(|why| {
            eprintln!("smddp stand-in for NCCL: {why}");
            std::process::abort();
        })
    })
}

fn load() -> std::result::Result<&'static Table, String> {
    let named = std::env::var_os("SMDDP_STANDIN_CUDA").map(PathBuf::from);
    let path = named.or_else(beside).ok_or("cannot tell where this library lies")?;
    // SAFETY: our own library; loading it runs no code that needs anything from us.
    let library = unsafe { libloading::Library::new(&path) }.map_err(|why| why.to_string())?;
    let library = Box::leak(Box::new(library));
    // SAFETY: the type the stand-in exports under this name.
    let get = unsafe { library.get::<extern "C" fn() -> *const Table>(TABLE_SYMBOL) }
        .map_err(|why| format!("{} is no stand-in driver: {why}", path.display()))?;
    // SAFETY: a static of a library that is never unmapped.
    let table = unsafe { &*get() };
    if table.version == VERSION {
        Ok(table)
    } else {
        Err(format!("{} has interface {}, not {VERSION}: build both anew", path.display(), table.version))
    }
}

/// The file mapped where this very function is, and its neighbour.
fn beside() -> Option<PathBuf> {
    let here = beside as *const () as usize;
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let line = maps.lines().find(|line| {
        let range = line.split(' ').next().and_then(|range| range.split_once('-'));
        let bounds = range.map(|(a, b)| (usize::from_str_radix(a, 16), usize::from_str_radix(b, 16)));
        matches!(bounds, Some((Ok(start), Ok(end))) if (start..end).contains(&here))
    })?;
    let file = PathBuf::from(&line[line.find('/')?..]);
    let mut folder = file.parent()?;
    // Cargo may hand out its hard link's other name.
    if folder.ends_with("deps") {
        folder = folder.parent()?;
    }
    Some(folder.join("libsmddp_standin_cuda.so"))
}

fn check(code: c_int, what: &str) -> Result {
    if code == 0 { Ok(()) } else { Err(Error::cuda(code, what)) }
}

/// Counts a call of `name`; the code of the fault that was asked for it.
pub fn enter(name: &str) -> i32 {
    let name = CString::new(name).unwrap_or_default();
    // SAFETY: `name` lives through the call.
    unsafe { (table().enter)(name.as_ptr()) }
}

pub fn current_device() -> Result<i32> {
    let mut device = 0;
    // SAFETY: `device` is valid for writing.
    check(unsafe { (table().current_device)(&mut device) }, "cuCtxGetDevice")?;
    Ok(device)
}

/// The error that broke the context, if one did.
pub fn context_error() -> Option<i32> {
    // SAFETY: of the text no byte is wanted, so its place is not touched.
    let code = unsafe { (table().lasting_error)(std::ptr::null_mut(), 0) };
    (code != 0).then_some(code)
}

/// The graph that is captured from a stream.
pub fn graph(stream: usize) -> Option<u64> {
    // SAFETY: a handle, which is looked up.
    let graph = unsafe { (table().graph)(stream as *mut c_void) };
    (graph != 0).then_some(graph)
}

pub fn graph_lives(graph: u64) -> bool {
    (table().graph_lives)(graph)
}

/// Says how many communicators live.
pub fn tell_communicators(count: usize) {
    (table().communicators)(count as u64);
}

/// Counts an operation that waits for peers.
pub struct Parked;

impl Parked {
    pub fn new() -> Self {
        (table().park)(true);
        Self
    }
}

impl Drop for Parked {
    fn drop(&mut self) {
        (table().park)(false);
    }
}

type Boxed = Box<dyn FnOnce() -> c_int + Send>;

unsafe extern "C" fn run(data: *mut c_void) -> c_int {
    // SAFETY: made by `launch`, and run once.
    let work = unsafe { Box::from_raw(data.cast::<Boxed>()) };
    work()
}

/// Runs `work` on the first of `streams`, ordered after and before what the others hold. The context breaks with what it gives but 0.
pub fn launch(name: &str, streams: &[usize], work: impl FnOnce() -> c_int + Send + 'static) -> Result {
    let name = CString::new(name).unwrap_or_default();
    let handles: Vec<*mut c_void> = streams.iter().map(|stream| *stream as *mut c_void).collect();
    let boxed: Boxed = Box::new(work);
    let data = Box::into_raw(Box::new(boxed)).cast::<c_void>();
    // SAFETY: name and handles live through the call; `run` takes back what `data` is.
    let code = unsafe { (table().launch)(name.as_ptr(), handles.as_ptr(), handles.len(), run, data) };
    if code != 0 {
        // SAFETY: the table promises that it did not and will not run.
        drop(unsafe { Box::from_raw(data.cast::<Boxed>()) });
    }
    check(code, "a launch: the stream is not valid, or the context has failed")
}

/// Device memory that an operation reads or writes.
pub struct Buffer {
    address: usize,
    span: SpanHandle,
    len: usize,
}

// SAFETY: the handle may be used by any thread; the driver guards what is behind it.
unsafe impl Send for Buffer {}

impl Buffer {
    /// `what` names the argument. An empty buffer may be anywhere.
    pub fn new(address: usize, len: usize, what: &str) -> Result<Self> {
        let mut span = std::ptr::null_mut();
        if len > 0 {
            // SAFETY: `span` is valid for writing.
            let code = unsafe { (table().span)(address as u64, len, &mut span) };
            if code != 0 {
                let text = format!("{what} {address:#x} is not a valid pointer to {len} bytes of a device");
                return Err(Error::new(crate::error::Code::INVALID_ARGUMENT, text));
            }
        }
        Ok(Self { address, span, len })
    }

    /// Whether both are the same memory, or there is none.
    pub fn is_at(&self, other: &Self) -> bool {
        self.address == other.address || self.len == 0
    }

    pub fn read(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.len];
        if self.len > 0 {
            // SAFETY: the span is ours until dropped, and `bytes` as long as it.
            check(unsafe { (table().span_read)(self.span, bytes.as_mut_ptr()) }, "reading a freed buffer")?;
        }
        Ok(bytes)
    }

    pub fn write(&self, bytes: &[u8]) -> Result {
        if self.len != bytes.len() {
            return Err(Error::new(
                crate::error::Code::INTERNAL,
                format!("{} bytes for {}", bytes.len(), self.len),
            ));
        }
        if self.len > 0 {
            // SAFETY: as above.
            check(unsafe { (table().span_write)(self.span, bytes.as_ptr()) }, "writing a freed buffer")?;
        }
        Ok(())
    }

    pub fn fill(&self, byte: u8) -> Result {
        if self.len > 0 {
            // SAFETY: as above.
            check(unsafe { (table().span_fill)(self.span, byte) }, "writing a freed buffer")?;
        }
        Ok(())
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if !self.span.is_null() {
            // SAFETY: given back once.
            unsafe { (table().span_drop)(self.span) };
        }
    }
}
