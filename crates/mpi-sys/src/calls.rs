//! A loaded library's functions, called with what its ABI wants.

use std::ffi::{c_char, c_int, c_void};
use std::path::{Path, PathBuf};

use crate::abi::{Abi, Allgather, Bcast, CommInt, Finalize, Flag, Handle, InitThread, Version, funneled};
use crate::error::Error;

/// The largest text any MPI writes into a version buffer is 8192 bytes (MPICH); twice that is allotted.
const VERSION_ROOM: usize = 16384;

/// A loaded MPI library: functions and the handles of its ABI.
#[derive(Debug)]
pub struct Mpi {
    pub(crate) path: PathBuf,
    pub(crate) abi: Abi,
    pub(crate) world: Handle,
    pub(crate) byte: Handle,
    pub(crate) initialized: Flag,
    pub(crate) finalized: Flag,
    pub(crate) init_thread: InitThread,
    pub(crate) finalize: Finalize,
    pub(crate) comm_rank: CommInt,
    pub(crate) comm_size: CommInt,
    pub(crate) bcast: Bcast,
    pub(crate) allgather: Allgather,
    pub(crate) library_version: Version,
}

fn check(function: &'static str, code: c_int) -> Result<(), Error> {
    if code == 0 { Ok(()) } else { Err(Error::Call { function, code }) }
}

fn length(function: &'static str, bytes: usize) -> Result<c_int, Error> {
    c_int::try_from(bytes).map_err(|_| Error::Buffer {
        function,
        what: format!("{bytes} bytes are more than an MPI count can say ({})", c_int::MAX),
    })
}

impl Mpi {
    /// The file the library came from, or the name under which it was found in the process.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn abi(&self) -> Abi {
        self.abi
    }

    /// Whether somebody has called `MPI_Init`.
    pub fn initialized(&self) -> Result<bool, Error> {
        self.flag("MPI_Initialized", self.initialized)
    }

    /// Whether somebody has called `MPI_Finalize`.
    pub fn finalized(&self) -> Result<bool, Error> {
        self.flag("MPI_Finalized", self.finalized)
    }

    fn flag(&self, name: &'static str, function: Flag) -> Result<bool, Error> {
        let mut flag: c_int = 0;
        // SAFETY: both flag functions may be called at any time, from any thread, and write one int.
        check(name, unsafe { function(&mut flag) })?;
        Ok(flag != 0)
    }

    /// `MPI_Init_thread(FUNNELED)`: from now on only the calling thread may use MPI.
    ///
    /// Blocks until every rank of the job has come; MPI knows no deadline. Call it once, when
    /// [`Mpi::initialized`] says no.
    pub fn init(&self) -> Result<(), Error> {
        let mut provided: c_int = 0;
        // SAFETY: null argc and argv are allowed since MPI-2; `provided` is a valid int.
        let code = unsafe {
            (self.init_thread)(std::ptr::null_mut(), std::ptr::null_mut(), funneled(self.abi), &mut provided)
        };
        check("MPI_Init_thread", code)
    }

    /// `MPI_Finalize`: collective, blocks until every rank of the job calls it or ends.
    pub fn finalize(&self) -> Result<(), Error> {
        // SAFETY: MPI reports a wrong state (not initialised, called twice) itself; no memory is passed.
        check("MPI_Finalize", unsafe { (self.finalize)() })
    }

    /// This process's rank in `MPI_COMM_WORLD`.
    pub fn rank(&self) -> Result<usize, Error> {
        self.world_int("MPI_Comm_rank", self.comm_rank)
    }

    /// The number of ranks in `MPI_COMM_WORLD`.
    pub fn size(&self) -> Result<usize, Error> {
        self.world_int("MPI_Comm_size", self.comm_size)
    }

    fn world_int(&self, name: &'static str, function: CommInt) -> Result<usize, Error> {
        let mut value: c_int = 0;
        // SAFETY: `world` is the handle of this library's ABI; the function writes one int.
        check(name, unsafe { function(self.world, &mut value) })?;
        usize::try_from(value).map_err(|_| Error::Call { function: name, code: value })
    }

    /// Copies `root`'s `bytes` to every rank. All ranks give the same length.
    pub fn bcast(&self, bytes: &mut [u8], root: usize) -> Result<(), Error> {
        let count = length("MPI_Bcast", bytes.len())?;
        let root = length("MPI_Bcast", root)?;
        // SAFETY: the buffer holds `count` bytes and is exclusively borrowed until the blocking call returns.
        let code =
            unsafe { (self.bcast)(bytes.as_mut_ptr().cast::<c_void>(), count, self.byte, root, self.world) };
        check("MPI_Bcast", code)
    }

    /// Every rank's `mine`, in rank order. All ranks give the same length.
    pub fn all_gather(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        let size = self.size()?;
        let count = length("MPI_Allgather", mine.len())?;
        let mut all = vec![0u8; mine.len() * size];
        // SAFETY: `mine` holds `count` bytes and `all` `count` bytes for each of the `size` ranks; both live
        // until the blocking call returns.
        let code = unsafe {
            (self.allgather)(
                mine.as_ptr().cast::<c_void>(),
                count,
                self.byte,
                all.as_mut_ptr().cast::<c_void>(),
                count,
                self.byte,
                self.world,
            )
        };
        check("MPI_Allgather", code)?;
        if mine.is_empty() {
            return Ok(vec![Vec::new(); size]);
        }
        Ok(all.chunks_exact(mine.len()).map(<[u8]>::to_vec).collect())
    }

    /// The library's own name and version, first line only.
    pub fn version(&self) -> Result<String, Error> {
        let mut room = vec![0u8; VERSION_ROOM];
        let mut length: c_int = 0;
        // SAFETY: the room is larger than MPI_MAX_LIBRARY_VERSION_STRING of every ABI (at most 8192).
        let code = unsafe { (self.library_version)(room.as_mut_ptr().cast::<c_char>(), &mut length) };
        check("MPI_Get_library_version", code)?;
        let end = usize::try_from(length).unwrap_or(0).min(room.len());
        let text = String::from_utf8_lossy(&room[..end]);
        // MPICH sets it as a table; one line reads better.
        let words: Vec<&str> =
            text.lines().next().unwrap_or("").trim_matches('\0').split_whitespace().collect();
        Ok(words.join(" "))
    }
}
