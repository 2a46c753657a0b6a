//! The end of the process: of MPI, which Python's atexit comes too early for, since only exit() knows the status, and of
//! groups, which are not left when it ends by an exception.
//!
//! Invariants
//! - **E1** what runs in exit() touches neither the interpreter, which is gone, nor what keeps data in destroyed
//!   thread-locals, as `tracing` does.

use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use pyo3::prelude::*;
use smddp::Settings;
use smddp_bootstrap::mpi::{self, Duty};

static STAYS: AtomicBool = AtomicBool::new(false);

/// Groups that the interpreter drops from now on are not left: the others hear that this process has ended.
#[pyfunction]
pub fn end_without_leaving() {
    STAYS.store(true, Ordering::Relaxed);
}

pub fn stays() -> bool {
    STAYS.load(Ordering::Relaxed)
}

static OWED: Mutex<Option<(Duty, Settings)>> = Mutex::new(None);

/// MPI is finalised in exit() and not before, if this process ends with status 0; it waits there for the other ranks, at
/// most as long as an operation may. With another status it is left without a word: mpirun then ends the job. False
/// where MPI is not ours to finalise, or this is arranged already.
#[pyfunction]
pub fn finalize_mpi_at_exit() -> bool {
    let Some(duty) = mpi::duty() else { return false };
    // They were good when MPI was started.
    let settings = Settings::from_env().unwrap_or_default();
    *OWED.lock().unwrap_or_else(PoisonError::into_inner) = Some((duty, settings));
    if !call_in_exit() {
        settle(0);
    }
    true
}

fn settle(status: c_int) {
    let owed = OWED.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some((duty, settings)) = owed
        && status == 0
        && let Err(error) = duty.finalize(mpi::finalize_limit(&settings))
    {
        eprintln!("smddp: leaving MPI: {error}");
    }
}

/// Has [`settle`] called with the process's status; false where exit() tells it to nobody.
#[cfg(target_env = "gnu")]
fn call_in_exit() -> bool {
    unsafe extern "C" {
        fn on_exit(function: extern "C" fn(c_int, *mut c_void), argument: *mut c_void) -> c_int;
    }
    extern "C" fn in_exit(status: c_int, _: *mut c_void) {
        settle(status);
    }
    // SAFETY: as glibc declares it. The function stays where it is, for Python never unloads a library, and takes
    // nothing from its argument.
    unsafe { on_exit(in_exit, std::ptr::null_mut()) == 0 }
}

#[cfg(not(target_env = "gnu"))]
fn call_in_exit() -> bool {
    false
}
