//! The world of a program without torch, and what the process is started with.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use pyo3::prelude::*;
use smddp::{Error, Settings};
use smddp_bootstrap::Vars;

use crate::communicator::Communicator;
use crate::ending;
use crate::errors::raise;
use crate::group::Group;
use crate::handle::watchful;

/// All ranks of the job, found through MPI, launcher variables, or alone.
#[pyclass(frozen, module = "smdistributed_rs._core")]
pub struct World {
    communicator: Group,
    local_rank: usize,
    local_size: usize,
    how: String,
    /// None after `shutdown`.
    inner: Mutex<Option<smddp::World>>,
}

impl World {
    fn take(&self) -> Option<smddp::World> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

#[pymethods]
impl World {
    /// Joins the job; every rank calls it.
    #[staticmethod]
    fn init(py: Python<'_>, library_dirs: Vec<PathBuf>) -> PyResult<World> {
        // With the interpreter held, by which Python's threads set variables.
        smddp::fabric::prepare_environment();
        let settings = raise(py, Settings::from_env())?;
        let joined = watchful(py, || smddp::World::init_with(settings, &library_dirs))?;
        let inner = raise(py, joined)?;
        Ok(World {
            communicator: Group::new(inner.communicator().clone()),
            local_rank: inner.local_rank(),
            local_size: inner.local_size(),
            how: inner.how().to_owned(),
            inner: Mutex::new(Some(inner)),
        })
    }

    /// The group of all ranks.
    fn communicator(&self) -> Communicator {
        Communicator { inner: self.communicator.clone() }
    }

    #[getter]
    fn local_rank(&self) -> usize {
        self.local_rank
    }

    #[getter]
    fn local_size(&self) -> usize {
        self.local_size
    }

    /// How the ranks found each other.
    #[getter]
    fn how(&self) -> String {
        self.how.clone()
    }

    /// A group of `ranks`, in this order; None on the ranks that are not in it. Every rank of the world calls it.
    fn new_group(&self, py: Python<'_>, ranks: Vec<usize>) -> PyResult<Option<Communicator>> {
        let made = watchful(py, || match &*self.inner.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(world) => world.new_group(&ranks),
            None => Err(Error::Bootstrap {
                what: "this world was shut down".to_owned(),
                hint: "Call smdistributed_rs.init() for a new one".to_owned(),
            }),
        })?;
        Ok(raise(py, made)?.map(Communicator::wrap))
    }

    /// Leaves the job: the group of all ranks ends, and MPI with it where we started MPI.
    fn shutdown(&self, py: Python<'_>) -> PyResult<()> {
        watchful(py, || drop(self.take()))
    }
}

impl Drop for World {
    /// P1: leaving can wait for others. It is not done at all once the interpreter is gone, for atexit was the time for it,
    /// nor by a process that ends without leaving.
    fn drop(&mut self) {
        let mut world = self.take();
        if !ending::stays() {
            let _ = Python::try_attach(|py| py.detach(|| drop(world.take())));
        }
        std::mem::forget(world);
    }
}

/// Those of RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT that are missing and that the
/// launcher of this process tells; empty without a launcher.
#[pyfunction]
pub fn launcher_variables(py: Python<'_>, library_dirs: Vec<PathBuf>) -> PyResult<Vec<(String, String)>> {
    let vars = Vars::from_process();
    let settings = raise(py, Settings::from_env())?;
    let told = py.detach(|| {
        let dirs = smddp::library_dirs(&library_dirs);
        smddp_bootstrap::launcher_env(&settings, &dirs, &vars).map_err(Error::from)
    });
    raise(py, told)
}
