//! Memory that a group's ranks share.

use std::os::fd::BorrowedFd;

use pyo3::prelude::*;
use smddp::Mapped;

use crate::arguments::region;
use crate::communicator::Communicator;
use crate::errors::{argument, raise};
use crate::group::Detached;
use crate::handle::watchful;

/// Memory of this rank that the other ranks of its group map too, where they can. Whoever uses its address keeps it.
#[pyclass(frozen, module = "smdistributed_rs._core")]
pub struct SharedMemory {
    inner: Detached<smddp::SharedMemory>,
}

#[pymethods]
impl SharedMemory {
    /// `bytes` of zeros on every rank; all ranks call this.
    #[staticmethod]
    fn allocate(py: Python<'_>, group: &Communicator, bytes: usize) -> PyResult<SharedMemory> {
        let made = watchful(py, || smddp::SharedMemory::new(&group.inner, bytes))?;
        Ok(SharedMemory { inner: Detached::new(raise(py, made)?) })
    }

    /// Shares (file descriptor, address, bytes) of memory that maps the file from its beginning, and outlives this; None on
    /// a rank that has none, and then on all. All ranks call this.
    #[staticmethod]
    fn over(
        py: Python<'_>,
        group: &Communicator,
        memory: Option<(i32, usize, usize)>,
    ) -> PyResult<Option<SharedMemory>> {
        let mapped = |(fd, address, bytes)| {
            if fd < 0 {
                return Err(argument("shared memory", "memory", "an open file", fd, "Reinstall the package"));
            }
            // SAFETY: not -1, and the caller's file is open during this call.
            let file = unsafe { BorrowedFd::borrow_raw(fd) };
            Ok(Mapped { file, memory: region((address, bytes)) })
        };
        let mapped = raise(py, memory.map(mapped).transpose())?;
        // SAFETY: as the caller promises.
        let shared = watchful(py, || unsafe { smddp::SharedMemory::over(&group.inner, mapped) })?;
        Ok(raise(py, shared)?.map(|inner| SharedMemory { inner: Detached::new(inner) }))
    }

    #[getter]
    fn address(&self) -> usize {
        self.inner.region().as_ptr() as usize
    }

    /// Why the ranks do not share it; None when they do.
    #[getter]
    fn why_not(&self) -> Option<&str> {
        self.inner.why_not()
    }
}
