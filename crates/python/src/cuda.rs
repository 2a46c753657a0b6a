//! The CUDA side of a process group.

use std::path::PathBuf;
use std::time::Instant;

use pyo3::prelude::*;
use smddp::cuda::{DeviceCall, DeviceMessage, DeviceOptions, Memory, Wanted};
use smddp::{Region, Request, Settings};

use crate::arguments::{Numbers, seconds};
use crate::communicator::{Communicator, extend};
use crate::dlpack;
use crate::errors::{exception, raise};
use crate::group::Detached;
use crate::handle::{SLICE, watchful};

/// A process group's calls on CUDA memory. Addresses and lengths are taken as given: the package checks what it passes.
#[pyclass(frozen, module = "smdistributed_rs._core")]
pub struct DeviceGroup {
    inner: Detached<smddp::DeviceGroup>,
    device: i32,
    /// Rank and size.
    place: (usize, usize),
}

#[pymethods]
impl DeviceGroup {
    /// What the CUDA side of `group` is to be made with: whether `host` is a communicator of its own, of all members, and the members of
    /// the `rail`.
    #[staticmethod]
    fn wanted(py: Python<'_>, group: &Communicator) -> PyResult<(bool, Option<Vec<usize>>)> {
        let settings = raise(py, Settings::from_env())?;
        let wanted = Wanted::of(group.inner.shape(), group.inner.rank(), &settings);
        Ok((wanted.own, wanted.rail))
    }

    /// Every member calls it at the same point, with the communicators that are `wanted`; the group's own as `host`, else.
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
            host: (*host.inner).clone(),
            rail: rail.map(|r| (*r.inner).clone()),
            device,
            settings: raise(py, Settings::from_env())?,
            library_dirs,
        };
        let made = watchful(py, || smddp::DeviceGroup::new(options))?;
        let place = (host.inner.rank(), host.inner.size());
        Ok(DeviceGroup { inner: Detached::new(raise(py, made)?), device, place })
    }

    /// Enqueues one call on `stream` (its address), after that stream's work and that of `behind`; what is enqueued on
    /// it later comes after the call. Other arguments as of `Communicator.start`, addresses those of the device. Waits
    /// for the device where streams cannot wait for words, or have no places for more pieces, only.
    #[pyo3(signature = (stream, behind, collective, dtype, op, root, count, input, output, timeout=None, counts=None, splits=None))]
    #[allow(clippy::too_many_arguments, reason = "a call and its memory, in numbers")]
    fn start(
        &self,
        py: Python<'_>,
        stream: u64,
        behind: Option<u64>,
        collective: u8,
        dtype: u8,
        op: u8,
        root: usize,
        count: usize,
        input: (usize, usize),
        output: (usize, usize),
        timeout: Option<f64>,
        counts: Option<Vec<usize>>,
        splits: Option<(Vec<usize>, Vec<usize>)>,
    ) -> PyResult<DeviceHandle> {
        let numbers = Numbers { collective, dtype, op, root, count };
        let mut request = numbers.request(py, Region::EMPTY, Region::EMPTY)?;
        extend(py, &mut request, timeout, counts, splits)?;
        self.enqueue(py, stream, behind, request, input, output)
    }

    /// The short way for dense tensors on the group's device; None: nothing was done, these tensors need the long way.
    /// Without `input` the call is in place.
    #[pyo3(signature = (stream, behind, collective, op, root, output, input=None, timeout=None))]
    #[allow(clippy::too_many_arguments, reason = "a call and its tensors")]
    fn start_tensors(
        &self,
        py: Python<'_>,
        stream: u64,
        behind: Option<u64>,
        collective: u8,
        op: u8,
        root: usize,
        output: &Bound<'_, PyAny>,
        input: Option<&Bound<'_, PyAny>>,
        timeout: Option<f64>,
    ) -> PyResult<Option<DeviceHandle>> {
        let tensors = dlpack::tensors(py, self.place.1, collective, op, root, output, input);
        let Some(tensors) = tensors.filter(|t| t.device == Some(self.device)) else { return Ok(None) };
        let mut request = tensors.numbers.request(py, Region::EMPTY, Region::EMPTY)?;
        if !tensors.are_apart(&request, self.place) {
            return Ok(None);
        }
        request.timeout = seconds(py, request.collective.name(), timeout)?;
        self.enqueue(py, stream, behind, request, tensors.input, tensors.output).map(Some)
    }

    /// Whether messages go from device to device, by `exchange`.
    #[getter]
    fn carries_messages(&self) -> bool {
        self.inner.carries_messages()
    }

    /// Enqueues messages that move together: (rank, whether it is sent to, address, bytes). Streams as of `start`.
    #[pyo3(signature = (stream, behind, messages, timeout=None))]
    fn exchange(
        &self,
        py: Python<'_>,
        stream: u64,
        behind: Option<u64>,
        messages: Vec<(usize, bool, u64, usize)>,
        timeout: Option<f64>,
    ) -> PyResult<DeviceHandle> {
        let timeout = seconds(py, "send and recv", timeout)?;
        let message = |(peer, is_sent, address, bytes)| DeviceMessage {
            peer,
            memory: Memory { address, bytes },
            is_sent,
        };
        let messages: Vec<DeviceMessage> = messages.into_iter().map(message).collect();
        // SAFETY: as in `enqueue`.
        let started = py.detach(|| unsafe { self.inner.exchange(&messages, timeout, stream, behind) });
        Ok(DeviceHandle { inner: Detached::new(raise(py, started)?) })
    }

    /// Blocks until the device is past the call, which raises its error, or for `timeout` seconds: TimeoutError.
    fn wait(&self, py: Python<'_>, handle: &DeviceHandle, timeout: f64) -> PyResult<()> {
        let limit = seconds(py, "wait", Some(timeout))?.unwrap_or_default();
        let since = Instant::now();
        let slice = || self.inner.wait_for(&handle.inner, (since, limit), SLICE);
        while !raise(py, py.detach(slice))? {
            py.check_signals()?;
        }
        Ok(())
    }

    /// The exception the group failed with, if it did.
    fn failure(&self, py: Python<'_>) -> Option<PyErr> {
        py.detach(|| self.inner.failure()).map(|e| exception(py, &e))
    }

    fn describe(&self, py: Python<'_>) -> String {
        py.detach(|| self.inner.describe())
    }

    /// Every rank's calls fail; streams that wait for other ranks are released.
    fn abort(&self, py: Python<'_>, reason: String) {
        py.detach(|| self.inner.abort(&reason));
    }

    /// Frees everything; waits, within limits, for what is enqueued. A signal ends that wait, and nothing is freed yet.
    fn shutdown(&self, py: Python<'_>) -> PyResult<()> {
        let since = Instant::now();
        while !py.detach(|| self.inner.finish_for(since, SLICE)) {
            py.check_signals()?;
        }
        py.detach(|| self.inner.shutdown());
        Ok(())
    }
}

impl DeviceGroup {
    /// `request` without its memory, which is the device's.
    fn enqueue(
        &self,
        py: Python<'_>,
        stream: u64,
        behind: Option<u64>,
        request: Request,
        input: (usize, usize),
        output: (usize, usize),
    ) -> PyResult<DeviceHandle> {
        let memory = |(address, bytes)| Memory { address: address as u64, bytes };
        let call = DeviceCall {
            collective: request.collective,
            dtype: request.dtype,
            op: request.op,
            root: request.root,
            count: request.count,
            input: memory(input),
            output: memory(output),
            counts: request.counts,
            splits: request.splits,
            timeout: request.timeout,
        };
        // SAFETY: the package passes memory and streams of the group's device, and keeps the memory for the stream
        // (`record_stream`, or by running on the caller's own).
        let started = py.detach(|| unsafe { self.inner.start(&call, stream, behind) });
        Ok(DeviceHandle { inner: Detached::new(raise(py, started)?) })
    }
}

/// A call that was enqueued. Its memory is kept by whoever enqueued it.
#[pyclass(frozen, module = "smdistributed_rs._core")]
pub struct DeviceHandle {
    inner: Detached<smddp::StartedOnDevice>,
}

#[pymethods]
impl DeviceHandle {
    /// Makes `stream` wait for the call's end.
    fn order(&self, py: Python<'_>, stream: u64) -> PyResult<()> {
        // SAFETY: the package passes streams of the group's device.
        let ordered = py.detach(|| unsafe { self.inner.past().order(stream) });
        raise(py, ordered)
    }

    /// What was enqueued on the call's `stream` since is part of the call.
    fn extend(&self, py: Python<'_>, stream: u64) -> PyResult<()> {
        // SAFETY: as in `order`.
        let extended = py.detach(|| unsafe { self.inner.past().extend(stream) });
        raise(py, extended)
    }

    /// Whether the device is past the call.
    fn is_past(&self, py: Python<'_>) -> PyResult<bool> {
        let done = py.detach(|| self.inner.past().is_done());
        raise(py, done)
    }

    /// Whether the call was captured in a graph: the device is never past it.
    fn is_captured(&self) -> bool {
        self.inner.past().is_captured()
    }

    /// The exception the call ended with, as far as is known.
    fn error(&self, py: Python<'_>) -> Option<PyErr> {
        self.inner.error().map(|e| exception(py, &e))
    }
}
