//! The job this process belongs to.

use std::ops::Deref;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use smddp_core::settings::Settings;
use smddp_core::store::Store;
use smddp_core::{Error, Result};
use smddp_cuda::{DeviceOptions, Wanted};

use crate::connect::{GroupOptions, connect};
use crate::dirs::library_dirs;
use crate::transports::{Communicator, DeviceGroup};

/// All ranks of the job. Derefs to the [`Communicator`] over all of them. MPI starts once in a process: a world
/// made after one that used it has ended finds the others by the launcher's variables; over several hosts, by MASTER_ADDR and
/// MASTER_PORT.
pub struct World {
    communicator: Communicator,
    store: Arc<dyn Store>,
    settings: Settings,
    dirs: Vec<PathBuf>,
    how: String,
    groups: AtomicU64,
}

impl World {
    /// Joins the job: by MPI when started by `mpirun` and an MPI is found, else by the launcher's variables
    /// (`RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`, or Open MPI's, PMI's, Slurm's), else alone.
    pub fn init() -> Result<World> {
        World::init_with(Settings::from_env()?, &[])
    }

    /// As [`init`](Self::init), with settings of one's own and more folders in which MPI and libfabric may lie.
    pub fn init_with(settings: Settings, extra_dirs: &[PathBuf]) -> Result<World> {
        let dirs = library_dirs(extra_dirs);
        let timeout = settings.seconds("SMDDP_TIMEOUT");
        let job = smddp_bootstrap::join(&settings, &dirs, Instant::now() + timeout)?;
        let communicator = connect(GroupOptions {
            name: "world".to_owned(),
            scope: "world".to_owned(),
            rank: job.rank,
            size: job.size,
            store: Arc::clone(&job.store),
            timeout,
            settings: settings.clone(),
            library_dirs: dirs.clone(),
        })?;
        Ok(World {
            communicator,
            store: job.store,
            settings,
            dirs,
            how: job.how.to_string(),
            groups: AtomicU64::new(0),
        })
    }

    /// This rank's number among those of its node, from 0.
    pub fn local_rank(&self) -> usize {
        self.shape().local_of(self.rank())
    }

    /// How many ranks this node has.
    pub fn local_size(&self) -> usize {
        self.shape().local_size(self.rank())
    }

    /// How the ranks found each other, for people.
    pub fn how(&self) -> &str {
        &self.how
    }

    /// The group of all ranks, for those that take one; a world's methods are this one's.
    pub fn communicator(&self) -> &Communicator {
        &self.communicator
    }

    /// A group of some of the world's ranks, in the order given. Every rank of the world calls it, with the same list;
    /// those not in it get `None`.
    pub fn new_group(&self, ranks: &[usize]) -> Result<Option<Communicator>> {
        let number = self.groups.fetch_add(1, Ordering::Relaxed);
        let mut seen = vec![false; self.size()];
        for &rank in ranks {
            self.shape().check_rank("new_group", "ranks", rank)?;
            if std::mem::replace(&mut seen[rank], true) {
                return Err(Error::Argument {
                    op: "new_group".to_owned(),
                    argument: "ranks",
                    expected: "each rank once".to_owned(),
                    given: format!("rank {rank} twice"),
                    hint: "Remove the duplicate".to_owned(),
                });
            }
        }
        if !seen[self.rank()] {
            return Ok(None);
        }
        self.meet(format!("group {number}"), format!("group/{number}"), ranks).map(Some)
    }

    /// The world's calls on memory of this CUDA device. Every rank calls it.
    pub fn on_device(&self, device: i32) -> Result<DeviceGroup> {
        let number = self.groups.fetch_add(1, Ordering::Relaxed);
        let wanted = Wanted::of(self.shape(), self.rank(), &self.settings);
        let all: Vec<usize> = (0..self.size()).collect();
        let own = wanted
            .own
            .then(|| self.meet("world".to_owned(), format!("device/{number}"), &all))
            .transpose()?;
        let rail = wanted.rail.map(|ranks| {
            let local = self.local_rank();
            self.meet(format!("rail {local}"), format!("rail/{number}/{local}"), &ranks)
        });
        let rail = rail.transpose()?;
        DeviceGroup::new(DeviceOptions {
            host: own.unwrap_or_else(|| self.communicator.clone()),
            rail,
            device,
            settings: self.settings.clone(),
            library_dirs: self.dirs.clone(),
        })
    }

    /// Meets `ranks`, this one among them, in a scope that nobody else uses.
    fn meet(&self, name: String, scope: String, ranks: &[usize]) -> Result<Communicator> {
        connect(GroupOptions {
            name,
            scope,
            rank: ranks.iter().position(|&rank| rank == self.rank()).unwrap_or_default(),
            size: ranks.len(),
            store: Arc::clone(&self.store),
            timeout: self.timeout(),
            settings: self.settings.clone(),
            library_dirs: self.dirs.clone(),
        })
    }
}

impl Deref for World {
    type Target = Communicator;

    fn deref(&self) -> &Communicator {
        &self.communicator
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.communicator.shutdown();
        // After a panic the other ranks are not at their end: MPI would wait for them, and mpirun ends the job anyway.
        if std::thread::panicking() {
            return;
        }
        let limit = smddp_bootstrap::mpi::finalize_limit(&self.settings);
        if let Err(error) = smddp_bootstrap::mpi::finalize(limit) {
            tracing::warn!("leaving MPI: {error}");
        }
    }
}
