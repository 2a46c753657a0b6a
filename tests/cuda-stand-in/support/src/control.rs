//! A test's hands on the stand-in driver of its own process.

use crate::abi::{Leaks, TABLE_SYMBOL, Table, VERSION};
use std::ffi::{CString, c_char, c_void};
use std::path::Path;

/// Faults, counts and leaks of the stand-in driver in this process.
pub struct Control {
    table: &'static Table,
}

/// Bytes that this process has registered with the stand-in of libfabric so far.
pub fn registered_bytes() -> u64 {
    // SAFETY: one of ours, which is never unloaded.
    let library =
        unsafe { libloading::Library::new(&crate::paths().fabric) }.expect("the stand-in was built");
    let library = std::mem::ManuallyDrop::new(library);
    // SAFETY: the function's type.
    let count = unsafe { library.get::<extern "C" fn() -> u64>(b"smddp_standin_fabric_registered") };
    count.expect("the stand-in has it")()
}

impl Control {
    /// Of the driver at `path`, which is loaded if it is not yet, and stays loaded.
    pub fn of(path: &Path) -> Result<Self, String> {
        // SAFETY: the library is ours; loading it runs no code that needs anything from us.
        let library = unsafe { libloading::Library::new(path) }.map_err(|why| why.to_string())?;
        // Its threads run until the process ends: it must never be unmapped.
        let library = Box::leak(Box::new(library));
        // SAFETY: this is the type the stand-in exports under this name.
        let table = unsafe { library.get::<extern "C" fn() -> *const Table>(TABLE_SYMBOL) }
            .map_err(|why| format!("{} is no stand-in driver: {why}", path.display()))?;
        // SAFETY: a static of a library that is never unmapped.
        let table = unsafe { &*table() };
        if table.version != VERSION {
            return Err(format!("{} has interface {}, not {VERSION}", path.display(), table.version));
        }
        Ok(Self { table })
    }

    /// From now on the `nth` call (1 = the next) of `function` fails with `code`.
    pub fn fail(&self, function: &str, nth: u64, code: i32) {
        let name = c_name(function);
        // SAFETY: `name` lives through the call.
        unsafe { (self.table.fail)(name.as_ptr(), nth, false, code) }
    }

    /// How often `function` (of the driver or of NCCL) was called.
    pub fn calls(&self, function: &str) -> u64 {
        let name = c_name(function);
        // SAFETY: `name` lives through the call.
        unsafe { (self.table.calls)(name.as_ptr()) }
    }

    /// What was made and not given back.
    pub fn leaks(&self) -> Leaks {
        let mut leaks = Leaks::default();
        // SAFETY: `leaks` is valid for writing.
        unsafe { (self.table.leaks)(&mut leaks) };
        leaks
    }

    /// Operations at the head of their streams that wait for an event, a value or a peer.
    pub fn parked(&self) -> u64 {
        (self.table.parked)()
    }

    /// Operations that streams have done.
    pub fn executed(&self) -> u64 {
        (self.table.executed)()
    }

    /// Says from now on that a graph is captured from `stream`, or that none is; what it is given runs all the same.
    pub fn capture(&self, stream: usize, captures: bool) -> Result<(), i32> {
        // SAFETY: a handle, which is looked up; what is no stream is refused.
        code(unsafe { (self.table.capture)(std::ptr::without_provenance_mut(stream), captures) })
    }

    /// Destroys all graphs captured so far.
    pub fn destroy_graphs(&self) {
        (self.table.destroy_graphs)();
    }

    /// The error that every call gives since an operation failed on a stream, and its text.
    pub fn lasting_error(&self) -> Option<(i32, String)> {
        let mut text = [0u8; 512];
        // SAFETY: `text` is valid for its length.
        let code = unsafe { (self.table.lasting_error)(text.as_mut_ptr().cast::<c_char>(), text.len()) };
        let end = text.iter().position(|byte| *byte == 0).unwrap_or(text.len());
        (code != 0).then(|| (code, String::from_utf8_lossy(&text[..end]).into_owned()))
    }

    /// Labels `len` bytes of host memory as memory of `device`, until [`Control::disown`].
    ///
    /// # Safety
    /// They stay valid, and are used by streams only, until then.
    pub unsafe fn adopt(&self, ptr: *mut u8, len: usize, device: i32) -> Result<(), i32> {
        // SAFETY: the caller's promise.
        code(unsafe { (self.table.adopt)(ptr.cast::<c_void>(), len, device) })
    }

    pub fn disown(&self, ptr: *mut u8) -> Result<(), i32> {
        // SAFETY: an address that was not adopted is refused.
        code(unsafe { (self.table.disown)(ptr.cast::<c_void>()) })
    }
}

fn code(code: i32) -> Result<(), i32> {
    if code == 0 { Ok(()) } else { Err(code) }
}

fn c_name(name: &str) -> CString {
    CString::new(name).expect("a function's name has no NUL")
}
