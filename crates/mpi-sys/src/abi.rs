//! How libraries of the three ABIs are called: what differs are the values of handles and constants.

use std::ffi::{c_char, c_int, c_void};

/// Whose values the library uses for handles and constants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Abi {
    /// Open MPI's own (`libmpi.so.40`): handles are addresses of exported objects.
    OpenMpi,
    /// The MPICH ABI (`libmpi.so.12`; also Intel MPI, Cray MPI, MVAPICH): handles are C `int`s.
    Mpich,
    /// The standard ABI of MPI 5 (`libmpi_abi.so`): handles are small fixed pointers.
    Standard,
}

impl std::fmt::Display for Abi {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Abi::OpenMpi => "Open MPI ABI",
            Abi::Mpich => "MPICH ABI",
            Abi::Standard => "MPI standard ABI",
        })
    }
}

/// A communicator or datatype handle of any ABI, as it travels in a register.
///
/// MPICH's handles are C `int`s: the callee reads the low 32 bits, which is where both x86-64 and aarch64 pass them.
pub(crate) type Handle = usize;

/// Thread level asked for: only the calling thread talks to MPI.
pub(crate) fn funneled(abi: Abi) -> c_int {
    match abi {
        Abi::OpenMpi | Abi::Mpich => 1,
        Abi::Standard => 1024,
    }
}

pub(crate) type Flag = unsafe extern "C" fn(*mut c_int) -> c_int;
pub(crate) type InitThread =
    unsafe extern "C" fn(*mut c_int, *mut *mut *mut c_char, c_int, *mut c_int) -> c_int;
pub(crate) type Finalize = unsafe extern "C" fn() -> c_int;
pub(crate) type CommInt = unsafe extern "C" fn(Handle, *mut c_int) -> c_int;
pub(crate) type Bcast = unsafe extern "C" fn(*mut c_void, c_int, Handle, c_int, Handle) -> c_int;
pub(crate) type Allgather =
    unsafe extern "C" fn(*const c_void, c_int, Handle, *mut c_void, c_int, Handle, Handle) -> c_int;
pub(crate) type Version = unsafe extern "C" fn(*mut c_char, *mut c_int) -> c_int;
