//! MPI without linking one: the ten functions a bootstrap needs, loaded at run time.
//!
//! Every MPI exports the same C functions; what differs are the *values* of handles and constants. Only
//! `MPI_COMM_WORLD`, `MPI_BYTE` and `MPI_THREAD_FUNNELED` are needed here, and each handle travels as one
//! pointer-sized integer: Open MPI's are addresses, MPICH's and the standard's are small integers.
//!
//! Invariants:
//! 1. A library in use is never closed: MPI libraries leave threads and exit handlers behind. One that lacks a function is
//!    closed before it has done anything: its symbols, visible to all, would stand before the next library's own.
//! 2. The ABI is decided from what the library exports, never from its file name.
//! 3. Nothing here reads the environment; [`Search`] says all there is to know.

mod abi;
mod calls;
mod error;
mod load;

pub use abi::Abi;
pub use calls::Mpi;
pub use error::Error;
pub use load::{Family, Search};
