//! What every exported function does first: counting, faults asked for, the context's lasting error.

use crate::code::{Code, Result};
use smddp_standin::switches::{Fault, Switches};
use std::cell::Cell;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Defines functions of the driver's C API. The body gives a [`Result`]; what it needs of pointers comes as
/// [`In`], [`Out`] and plain addresses, so that bodies hold no unsafe code.
macro_rules! api {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),* $(,)?) $body:block)*) => {$(
        $(#[$doc])*
        #[unsafe(no_mangle)]
        pub extern "C" fn $name($($arg: $type),*) -> i32 {
            $crate::entry::call(stringify!($name), || -> $crate::code::Result { $body })
        }
    )*};
}
pub(crate) use api;

/// A C caller's pointer to where a result goes. Only the C ABI makes one.
#[repr(transparent)]
pub struct Out<T>(*mut T);

impl<T> Out<T> {
    pub fn set(&self, value: T) -> Result {
        if self.0.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        // SAFETY: the C caller passed it as the place of a result of this type; the API has it be writable.
        unsafe { self.0.write_unaligned(value) };
        Ok(())
    }

    /// For results that may be left out.
    pub fn set_if_wanted(&self, value: T) {
        if !self.0.is_null() {
            // SAFETY: as above.
            unsafe { self.0.write_unaligned(value) };
        }
    }

    pub fn address(&self) -> *mut T {
        self.0
    }

    /// The same place for a smaller type, where the API says that the result has that.
    pub fn narrow<U>(&self) -> Out<U> {
        const { assert!(size_of::<U>() <= size_of::<T>()) };
        Out(self.0.cast())
    }
}

/// A C caller's pointer to an argument whose place takes a result. Only the C ABI makes one.
#[repr(transparent)]
pub struct InOut<T>(*mut T);

impl<T: Copy> InOut<T> {
    pub fn get(&self) -> Result<T> {
        In(self.0.cast_const()).read(1)?.first().copied().ok_or(Code::INVALID_VALUE)
    }

    pub fn set(&self, value: T) -> Result {
        Out(self.0).set(value)
    }
}

/// A C caller's pointer to an array of arguments. Only the C ABI makes one.
#[repr(transparent)]
pub struct In<T>(*const T);

impl<T: Copy> In<T> {
    pub fn read(&self, count: usize) -> Result<Vec<T>> {
        if self.0.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        // SAFETY: the C caller passed an array of `count` elements.
        Ok((0..count).map(|i| unsafe { self.0.add(i).read_unaligned() }).collect())
    }
}

/// A lock whose holder panicked still guards consistent data: every change here is a single step.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Default)]
struct Calls {
    counts: HashMap<String, u64>,
    faults: Option<Vec<Fault>>,
}

fn calls() -> MutexGuard<'static, Calls> {
    static CALLS: OnceLock<Mutex<Calls>> = OnceLock::new();
    lock(CALLS.get_or_init(Mutex::default))
}

/// Counts a call and gives the fault that was asked for it.
pub fn enter(name: &str) -> Result {
    let mut calls = calls();
    let count = calls.counts.entry(name.into()).or_default();
    *count += 1;
    let count = *count;
    let faults = calls.faults.get_or_insert_with(|| Switches::get().faults.clone());
    match faults.iter().find(|f| f.function == name && (f.nth == count || f.always && f.nth < count)) {
        Some(fault) => Err(Code(fault.code)),
        None => Ok(()),
    }
}

/// Counts what is no call.
pub fn count(name: &str) {
    *calls().counts.entry(name.into()).or_default() += 1;
}

pub fn count_of(name: &str) -> u64 {
    calls().counts.get(name).copied().unwrap_or(0)
}

/// From now on the `nth` call of `name` fails.
pub fn fail(name: &str, nth: u64, always: bool, code: i32) {
    let mut calls = calls();
    let before = calls.counts.get(name).copied().unwrap_or(0);
    let faults = calls.faults.get_or_insert_with(|| Switches::get().faults.clone());
    faults.push(Fault { function: name.into(), nth: before + nth.max(1), always, code });
}

static INITIALIZED: AtomicBool = AtomicBool::new(false);
static LASTING: Mutex<Option<(Code, String)>> = Mutex::new(None);

thread_local! {
    /// This thread serves a queue: it runs callbacks, which may not call the driver.
    static SERVES: Cell<bool> = const { Cell::new(false) };
}

pub fn initialize() {
    INITIALIZED.store(true, Ordering::Release);
}

pub fn thread_serves_queue() {
    SERVES.set(true);
}

/// The context is broken from now on, as after a fault of a kernel; the first error stays.
pub fn break_context(code: Code, text: String) {
    let mut lasting = lock(&LASTING);
    if lasting.is_none() {
        if !Switches::get().quiet {
            eprintln!("smddp stand-in for CUDA: error {}: {text}", code.0);
        }
        *lasting = Some((code, text));
    }
}

pub fn lasting_error() -> Option<(Code, String)> {
    lock(&LASTING).clone()
}

/// These work before cuInit and after the context broke.
const ALWAYS: [&str; 4] = ["cuInit", "cuDriverGetVersion", "cuGetErrorName", "cuGetErrorString"];

pub fn call(name: &str, body: impl FnOnce() -> Result) -> i32 {
    let checked = || {
        enter(name)?;
        if SERVES.get() {
            return Err(Code::NOT_PERMITTED);
        }
        if !ALWAYS.contains(&name) {
            if !INITIALIZED.load(Ordering::Acquire) {
                return Err(Code::NOT_INITIALIZED);
            }
            if let Some((code, _)) = lasting_error() {
                return Err(code);
            }
        }
        body()
    };
    // A panic must not cross into C.
    match catch_unwind(AssertUnwindSafe(checked)) {
        Ok(Ok(())) => 0,
        Ok(Err(code)) => code.0,
        Err(_) => {
            eprintln!("smddp stand-in for CUDA: {name} panicked");
            Code::UNKNOWN.0
        }
    }
}

/// With `SMDDP_STANDIN_FREE_LOCK`: the lock that drivers hold in cuMemFree while they wait for the device,
/// and that whoever queues an operation, or asks for an event or a stream, needs.
static DRIVER: RwLock<()> = RwLock::new(());

/// Counted when freeing begins to wait for the device, with or without the lock.
const FREEING: &str = "free";

pub fn driver_shared() -> Option<RwLockReadGuard<'static, ()>> {
    Switches::get().free_lock.then(|| DRIVER.read().unwrap_or_else(PoisonError::into_inner))
}

pub fn driver_alone() -> Option<RwLockWriteGuard<'static, ()>> {
    let alone = Switches::get().free_lock.then(|| DRIVER.write().unwrap_or_else(PoisonError::into_inner));
    // For tests, which may want to go on only then.
    count(FREEING);
    alone
}
