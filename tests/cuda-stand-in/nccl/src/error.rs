//! NCCL's result codes, and the text of the last error.

use std::ffi::{CStr, CString};
use std::sync::{Mutex, MutexGuard, PoisonError};

#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Code(pub i32);

impl Code {
    pub const UNHANDLED_CUDA: Self = Self(1);
    pub const SYSTEM: Self = Self(2);
    pub const INTERNAL: Self = Self(3);
    pub const INVALID_ARGUMENT: Self = Self(4);
    pub const INVALID_USAGE: Self = Self(5);
    pub const REMOTE: Self = Self(6);
    pub const IN_PROGRESS: Self = Self(7);
}

/// A code and what happened, in words.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Error {
    pub code: Code,
    pub text: String,
}

pub type Result<T = ()> = std::result::Result<T, Error>;

impl Error {
    pub fn new(code: Code, text: impl Into<String>) -> Self {
        Self { code, text: text.into() }
    }

    pub fn cuda(code: i32, what: &str) -> Self {
        Self::new(Code::UNHANDLED_CUDA, format!("Cuda failure {code} in {what}"))
    }
}

pub fn describe(code: i32) -> &'static CStr {
    match code {
        0 => c"no error",
        1 => c"unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
        2 => c"unhandled system error (run with NCCL_DEBUG=INFO for details)",
        3 => c"internal error - please report this issue to the NCCL developers",
        4 => c"invalid argument (run with NCCL_DEBUG=WARN for details)",
        5 => c"invalid usage (run with NCCL_DEBUG=WARN for details)",
        6 => c"remote process exited or there was a network error",
        7 => c"NCCL operation in progress",
        8 => c"NCCL operation timeout",
        _ => c"unknown result code",
    }
}

/// A lock whose holder panicked still guards consistent data: every change is a single step.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

static LAST: Mutex<Option<&'static CStr>> = Mutex::new(None);

/// What ncclGetLastError answers from now on. Its caller keeps the pointer, so texts are never freed.
pub fn set_last(text: &str) {
    let text = CString::new(text.replace('\0', " ")).unwrap_or_default();
    *lock(&LAST) = Some(Box::leak(text.into_boxed_c_str()));
}

pub fn last() -> &'static CStr {
    lock(&LAST).unwrap_or(c"")
}
