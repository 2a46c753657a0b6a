//! The CUDA side of a process group.

use std::path::PathBuf;

use pyo3::prelude::*;
use smddp::cuda::{DeviceCall, DeviceOptions, Memory, Path};
use smddp::{Region, Settings};

use crate::arguments::Numbers;
use crate::communicator::{Communicator, extend};
use crate::errors::{exception, raise};
use crate::handle::Handle;

/// A process group's calls on CUDA memory. Addresses and lengths are taken as given: the package checks what it passes.
#[pyclass(frozen, module = "smdistributed_rs._core")]
pub struct DeviceGroup {
    inner: smddp::DeviceGroup,
}

#[pymethods]
impl DeviceGroup {
    /// Every member calls it at the same point. `rail` is the group of the ranks with this one's local rank on all
    /// nodes, where there are several nodes of equally many ranks.
    #[new]
    #[pyo3(signature = (host, rail, device, library_dirs))]
    fn new(
        py: Python<'_>,
        host: &Communicator,
        rail: Option<&Communicator>,
        device: i32,
        library_dirs: Vec<PathBuf>,
    ) -> PyResult<DeviceGroup> {
        let options = DeviceOptions {
            host: host.inner.clone(),
            rail: rail.map(|r| r.inner.clone()),
            device,
            settings: raise(py, Settings::from_env())?,
            library_dirs,
        };
        let made = py.detach(|| smddp::DeviceGroup::new(options));
        Ok(DeviceGroup { inner: raise(py, made)? })
    }

    /// Enqueues one call behind the work of `stream` (its address); what is enqueued on it later comes after the call.
    /// Arguments as of `Communicator.start`, addresses those of the device. The handle is that of the part on the host;
    /// None: it has none. Never waits for the device.
    #[pyo3(signature = (stream, collective, dtype, op, root, count, input, output, timeout=None, counts=None, splits=None))]
    #[allow(clippy::too_many_arguments, reason = "a call and its memory, in numbers")]
    fn start(
        &self,
        py: Python<'_>,
        stream: u64,
        collective: u8,
        dtype: u8,
        op: u8,
        root: usize,
        count: usize,
        input: (u64, usize),
        output: (u64, usize),
        timeout: Option<f64>,
        counts: Option<Vec<usize>>,
        splits: Option<(Vec<usize>, Vec<usize>)>,
    ) -> PyResult<Option<Handle>> {
        let numbers = Numbers { collective, dtype, op, root, count };
        let mut request = numbers.request(py, Region::EMPTY, Region::EMPTY)?;
        extend(py, &mut request, timeout, counts, splits)?;
        let memory = |(address, bytes)| Memory { address, bytes };
        let call = DeviceCall {
            collective: request.collective,
            dtype: request.dtype,
            op: request.op,
            root,
            count,
            input: memory(input),
            output: memory(output),
            counts: request.counts,
            splits: request.splits,
            timeout: request.timeout,
        };
        // SAFETY: the package passes memory and stream of the group's device, and keeps the memory for the stream
        // (`record_stream`, or by running on the caller's own).
        let started = py.detach(|| unsafe { self.inner.start(&call, stream) });
        Ok(raise(py, started)?.map(|handle| Handle::new(handle, [None, None])))
    }

    /// Whether calls pass through the host, so that their errors are told by a handle.
    fn is_staged(&self) -> bool {
        matches!(self.inner.path(), Path::Staged | Path::Hierarchical)
    }

    /// The exception the group failed with, if it did.
    fn failure(&self, py: Python<'_>) -> Option<PyErr> {
        py.detach(|| self.inner.failure()).map(|e| exception(py, &e))
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }

    /// Every rank's calls fail; streams that wait for other ranks are released.
    fn abort(&self, py: Python<'_>, reason: String) {
        py.detach(|| self.inner.abort(&reason));
    }

    /// Frees everything; waits, within limits, for what is enqueued.
    fn shutdown(&self, py: Python<'_>) {
        py.detach(|| self.inner.shutdown());
    }
}
