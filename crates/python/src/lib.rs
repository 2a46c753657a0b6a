//! `smdistributed_rs._core`: arguments in, handles out, the interpreter released.
//!
//! Invariants
//! - **P1** every call that can block runs with the interpreter detached; the torch store attaches for its calls only.
//! - **P2** memory given to an operation stays alive until the operation is over: a blocking call borrows it from the
//!   caller's frame, a `Handle` owns references, and a handle dropped early hands them to the operation.
//! - **P3** no thread that drives progress waits for the interpreter: completions that must run Python go to threads of
//!   their own (`callback.rs`).

mod all_reduce;
mod arguments;
mod callback;
mod communicator;
mod cuda;
mod dlpack;
mod ending;
mod errors;
mod group;
mod handle;
mod negative;
mod peek;
mod shared;
mod store;
mod torch;
mod world;

use pyo3::prelude::*;

/// The native half of smdistributed_rs.
#[pymodule(gil_used = false)]
mod _core {
    #[pymodule_export]
    use super::all_reduce::AllReduce;
    #[pymodule_export]
    use super::callback::stop_callbacks;
    #[pymodule_export]
    use super::communicator::Communicator;
    #[pymodule_export]
    use super::cuda::{DeviceGroup, DeviceHandle};
    #[pymodule_export]
    use super::dlpack::{DlpackView, view_capsule};
    #[pymodule_export]
    use super::ending::{end_without_leaving, finalize_mpi_at_exit};
    #[pymodule_export]
    use super::handle::Handle;
    #[pymodule_export]
    use super::negative::use_key_sets;
    #[pymodule_export]
    use super::shared::SharedMemory;
    #[pymodule_export]
    use super::torch::{reads_options, use_torch};
    #[pymodule_export]
    use super::world::{World, launcher_variables};

    use super::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("DOUBTED", dlpack::DOUBTED)?;
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
