//! A process group of the runtime.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pyo3::prelude::*;
use smddp::{DType, GroupOptions, Region, Request, Settings, Store};

use crate::arguments::{Numbers, counts, region, seconds};
use crate::dlpack;
use crate::errors::{argument, exception, raise};
use crate::group::Group;
use crate::handle::{Handle, Keep, SLICE, wait, watchful};
use crate::store::PyStore;
use crate::torch;

/// How long a call is worked on before its time limit is asked for.
const FIRST_SLICE: Duration = Duration::from_millis(20);

/// A process group. Addresses and lengths are taken as given: the package checks what it passes.
///
/// A call is (collective, dtype, op, root, count) in the codes of `smdistributed_rs._codes`, and two regions
/// (address, bytes). `count` is in elements, of the whole buffer or of one rank's block (all_gather, reduce_scatter,
/// gather, scatter, all_to_all). `timeout` is in seconds; None takes the group's.
#[pyclass(frozen, module = "smdistributed_rs._core")]
pub struct Communicator {
    pub(crate) inner: Group,
}

impl Communicator {
    pub fn wrap(inner: smddp::Communicator) -> Communicator {
        Communicator { inner: Group::new(inner) }
    }
}

#[pymethods]
impl Communicator {
    /// Meets the other members at the store; every member calls it.
    #[staticmethod]
    #[pyo3(signature = (store, rank, size, name, scope, timeout, library_dirs))]
    #[allow(clippy::too_many_arguments, reason = "one call from one place")]
    fn connect(
        py: Python<'_>,
        store: Py<PyAny>,
        rank: usize,
        size: usize,
        name: String,
        scope: String,
        timeout: f64,
        library_dirs: Vec<PathBuf>,
    ) -> PyResult<Communicator> {
        // With the interpreter held, by which Python's threads set variables.
        smddp::fabric::prepare_environment();
        let settings = raise(py, Settings::from_env())?;
        let limit = seconds(py, "init_process_group", Some(timeout))?;
        let store = Arc::new(PyStore::new(store));
        let options = GroupOptions {
            name,
            scope,
            rank,
            size,
            store: Arc::clone(&store) as Arc<dyn Store>,
            timeout: limit.unwrap_or(settings.seconds("SMDDP_TIMEOUT")),
            settings,
            library_dirs,
        };
        let connected = watchful(py, || smddp::connect(options))?;
        if let Some(interrupt) = store.interrupt() {
            py.detach(|| drop(connected));
            return Err(interrupt);
        }
        Ok(Communicator::wrap(raise(py, connected)?))
    }

    #[getter]
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    #[getter]
    fn size(&self) -> usize {
        self.inner.size()
    }

    #[getter]
    fn name(&self) -> String {
        self.inner.name().to_owned()
    }

    /// The node of each rank: nodes are numbered by their lowest rank.
    #[getter]
    fn nodes(&self) -> Vec<usize> {
        let shape = self.inner.shape();
        (0..shape.size()).map(|rank| shape.node_of(rank)).collect()
    }

    /// The time limit of an operation, in seconds.
    #[getter]
    fn timeout(&self) -> f64 {
        self.inner.timeout().as_secs_f64()
    }

    fn set_timeout(&self, py: Python<'_>, timeout: f64) -> PyResult<()> {
        if let Some(limit) = seconds(py, "set_timeout", Some(timeout))? {
            self.inner.set_timeout(limit);
        }
        Ok(())
    }

    /// Collectives called so far.
    #[getter]
    fn calls(&self) -> u64 {
        self.inner.calls()
    }

    /// Runs one call to its end, driving it from this thread.
    #[pyo3(signature = (collective, dtype, op, root, count, input, output, timeout=None, counts=None, splits=None))]
    #[allow(clippy::too_many_arguments, reason = "a call and its memory, in numbers")]
    fn run(
        &self,
        py: Python<'_>,
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
    ) -> PyResult<()> {
        let numbers = Numbers { collective, dtype, op, root, count };
        let mut request = numbers.request(py, region(input), region(output))?;
        extend(py, &mut request, timeout, counts, splits)?;
        self.finish(py, request, SLICE, |_| Ok(()))
    }

    /// Starts one call; `keep` is held until it is over.
    #[pyo3(signature = (collective, dtype, op, root, count, input, output, timeout=None, counts=None, splits=None, keep=None))]
    #[allow(clippy::too_many_arguments, reason = "a call and its memory, in numbers")]
    fn start(
        &self,
        py: Python<'_>,
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
        keep: Option<Py<PyAny>>,
    ) -> PyResult<Handle> {
        let numbers = Numbers { collective, dtype, op, root, count };
        let mut request = numbers.request(py, region(input), region(output))?;
        extend(py, &mut request, timeout, counts, splits)?;
        self.launch(py, request, [keep, None])
    }

    /// The short way for dense CPU tensors, blocking: one call from Python does everything. False: nothing was done,
    /// these tensors need the long way. Without `input` the call is in place.
    #[pyo3(signature = (collective, op, root, output, input=None, timeout=None))]
    #[allow(clippy::too_many_arguments, reason = "a call and its tensors")]
    fn run_tensors(
        &self,
        py: Python<'_>,
        collective: u8,
        op: u8,
        root: usize,
        output: &Bound<'_, PyAny>,
        input: Option<&Bound<'_, PyAny>>,
        timeout: Option<f64>,
    ) -> PyResult<bool> {
        let tensors = dlpack::tensors(py, self.inner.size(), collective, op, root, output, input);
        let Some(tensors) = tensors.filter(|t| t.device.is_none()) else { return Ok(false) };
        let mut request = tensors.request(py)?;
        if !tensors.are_apart(&request, self.place()) {
            return Ok(false);
        }
        request.timeout = seconds(py, "run_tensors", timeout)?;
        self.finish(py, request, SLICE, |_| Ok(()))?;
        Ok(true)
    }

    /// As `run_tensors`, asynchronous: a handle, or None when these tensors need the long way.
    #[pyo3(signature = (collective, op, root, output, input=None, timeout=None))]
    #[allow(clippy::too_many_arguments, reason = "a call and its tensors")]
    fn start_tensors(
        &self,
        py: Python<'_>,
        collective: u8,
        op: u8,
        root: usize,
        output: &Bound<'_, PyAny>,
        input: Option<&Bound<'_, PyAny>>,
        timeout: Option<f64>,
    ) -> PyResult<Option<Handle>> {
        let tensors = dlpack::tensors(py, self.inner.size(), collective, op, root, output, input);
        let Some(tensors) = tensors.filter(|t| t.device.is_none()) else { return Ok(None) };
        let mut request = tensors.request(py)?;
        if !tensors.are_apart(&request, self.place()) {
            return Ok(None);
        }
        request.timeout = seconds(py, "start_tensors", timeout)?;
        let keep = [Some(output.clone().unbind()), input.map(|i| i.clone().unbind())];
        self.launch(py, request, keep).map(Some)
    }

    /// The short way for a dense CPU tensor as a message to `peer`, or from it: a handle, or None when the tensor needs the long way.
    #[pyo3(signature = (sends, peer, tag, tensor))]
    fn start_message(
        &self,
        py: Python<'_>,
        sends: bool,
        peer: usize,
        tag: u64,
        tensor: &Bound<'_, PyAny>,
    ) -> PyResult<Option<Handle>> {
        let dense = dlpack::describe(py, tensor).filter(|dense| dense.device.is_none());
        let Some(dense) = dense else { return Ok(None) };
        let keep = Some(tensor.clone().unbind());
        self.message(py, sends, peer, tag, dense.dtype, region(dense.memory()), keep).map(Some)
    }

    /// Starts sending `memory` to `peer`, or receiving into it from there.
    #[pyo3(signature = (sends, peer, tag, dtype, memory, keep=None))]
    fn start_message_of(
        &self,
        py: Python<'_>,
        sends: bool,
        peer: usize,
        tag: u64,
        dtype: u8,
        memory: (usize, usize),
        keep: Option<Py<PyAny>>,
    ) -> PyResult<Handle> {
        let dtype = known_dtype(py, if sends { "send" } else { "recv" }, dtype)?;
        self.message(py, sends, peer, tag, dtype, region(memory), keep)
    }

    /// Starts receiving into `memory` from whichever rank's message of `tag` comes first.
    #[pyo3(signature = (tag, dtype, memory, keep=None))]
    fn start_recv_any(
        &self,
        py: Python<'_>,
        tag: u64,
        dtype: u8,
        memory: (usize, usize),
        keep: Option<Py<PyAny>>,
    ) -> PyResult<Handle> {
        let dtype = known_dtype(py, "recv", dtype)?;
        // SAFETY: P2; see `region`.
        let started = py.detach(|| unsafe { self.inner.start_recv_any(tag, dtype, region(memory)) });
        Ok(Handle::new(raise(py, started)?, [keep, None], &self.inner))
    }

    /// Every waiter of every rank of the group gets AbortedError.
    fn abort(&self, py: Python<'_>, reason: String) {
        py.detach(|| self.inner.abort(&reason));
    }

    /// Waits, within limits, for what is under way and frees everything. Later calls are errors.
    fn shutdown(&self, py: Python<'_>) {
        py.detach(|| self.inner.shutdown());
    }

    /// The algorithm the last call ran, e.g. "hierarchical(sharded)".
    fn last_algorithm(&self) -> String {
        self.inner.last_algorithm()
    }

    /// The exception the group failed with, if it did.
    fn failure(&self, py: Python<'_>) -> Option<PyErr> {
        py.detach(|| self.inner.failure()).map(|e| exception(py, &e))
    }

    /// Transports, provider, rails and shape, for people.
    fn describe(&self, py: Python<'_>) -> String {
        py.detach(|| self.inner.describe())
    }
}

impl Communicator {
    /// Rank and size.
    fn place(&self) -> (usize, usize) {
        (self.inner.rank(), self.inner.size())
    }

    /// A synchronous sum of one dense CPU tensor, as torch passes it, from start to end. False: this is another call,
    /// and nothing was done.
    pub(crate) fn sum_now(
        &self,
        py: Python<'_>,
        tensors: &Bound<'_, PyAny>,
        options: &Bound<'_, PyAny>,
    ) -> PyResult<bool> {
        let Some(request) = torch::plain_sum(py, tensors, options)? else { return Ok(false) };
        // A call that is soon over need not ask for its time limit.
        self.finish(py, request, FIRST_SLICE, |handle| {
            if let Some(limit) = torch::limit(py, options)? {
                handle.set_timeout(limit);
            }
            Ok(())
        })?;
        Ok(true)
    }

    /// Runs a call to its end; `late` is asked when it is not over within `slice`.
    fn finish(
        &self,
        py: Python<'_>,
        request: Request,
        slice: Duration,
        late: impl FnOnce(&smddp::Handle) -> PyResult<()>,
    ) -> PyResult<()> {
        if raise(py, self.inner.is_trivial(&request))? {
            return Ok(());
        }
        // SAFETY: P2: the caller's frame holds the objects behind the regions until this returns, and it returns only
        // when the operation is over.
        let run = py.detach(|| unsafe { self.inner.run_for(&request, slice) });
        let Some(handle) = raise(py, run)? else { return Ok(()) };
        let result = late(&handle).and_then(|()| py.check_signals()).and_then(|()| wait(py, &handle, None));
        if !handle.is_done() {
            // Ctrl-C: nobody will wait for the call any more, and its memory is the caller's to free.
            py.detach(|| {
                self.inner.abort("interrupted");
                let _ = handle.wait(None);
            });
        }
        result
    }

    fn message(
        &self,
        py: Python<'_>,
        sends: bool,
        peer: usize,
        tag: u64,
        dtype: DType,
        memory: Region,
        keep: Option<Py<PyAny>>,
    ) -> PyResult<Handle> {
        // SAFETY: P2: the handle holds `keep`, whose memory this is; see `region`.
        let started = py.detach(|| unsafe {
            if sends {
                self.inner.start_send(peer, tag, dtype, memory)
            } else {
                self.inner.start_recv(peer, tag, dtype, memory)
            }
        });
        Ok(Handle::new(raise(py, started)?, [keep, None], &self.inner))
    }

    fn launch(&self, py: Python<'_>, request: Request, keep: Keep) -> PyResult<Handle> {
        // SAFETY: P2: the handle holds `keep`.
        let started = py.detach(|| unsafe { self.inner.start(&request) });
        Ok(Handle::new(raise(py, started)?, keep, &self.inner))
    }
}

pub(crate) fn extend(
    py: Python<'_>,
    request: &mut Request,
    timeout: Option<f64>,
    per_rank: Option<Vec<usize>>,
    splits: Option<(Vec<usize>, Vec<usize>)>,
) -> PyResult<()> {
    request.timeout = seconds(py, request.collective.name(), timeout)?;
    request.counts = counts(per_rank);
    request.splits = splits.map(|(send, receive)| (Arc::from(send), Arc::from(receive)));
    Ok(())
}

fn known_dtype(py: Python<'_>, op: &str, code: u8) -> PyResult<DType> {
    DType::from_code(code)
        .ok_or_else(|| exception(py, &argument(op, "dtype", "a known code", code, "Reinstall the package")))
}
