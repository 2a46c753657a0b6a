//! MPI without linking one: the ten functions a bootstrap needs, loaded at run time.
//!
//! Every MPI exports the same C functions; what differs are the *values* of handles and constants. Only
//! `MPI_COMM_WORLD`, `MPI_BYTE` and `MPI_THREAD_FUNNELED` are needed here, and each handle travels as one
//! pointer-sized integer: Open MPI's are addresses, MPICH's and the standard's are small integers.
//!
//! Invariants:
//! 1. A loaded library is never closed: MPI libraries leave threads and exit handlers behind.
//! 2. The ABI is decided from what the library exports, never from its file name.
//! 3. Nothing here reads the environment; [`Search`] says all there is to know.

mod load;

use std::ffi::{c_char, c_int, c_void};
use std::path::{Path, PathBuf};

pub use load::{Family, Search};

/// A communicator or datatype handle of any ABI, as it travels in a register.
///
/// MPICH's handles are C `int`s: the callee reads the low 32 bits, which is where both x86-64 and aarch64 pass them.
type Handle = usize;

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

/// What went wrong with MPI.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No candidate could be loaded; every attempt with its reason.
    #[error("no MPI library found; tried {}", tried.join("; "))]
    NotFound { tried: Vec<String> },

    /// A file was loaded but is not an MPI library this crate understands.
    #[error("{}: the symbol {symbol} is missing", path.display())]
    Symbol { path: PathBuf, symbol: String },

    /// An MPI function returned something else than `MPI_SUCCESS`.
    #[error("{function} failed with code {code}")]
    Call { function: &'static str, code: i32 },

    /// The caller gave a buffer MPI cannot describe.
    #[error("{function}: {what}")]
    Buffer { function: &'static str, what: String },
}

/// Thread level asked for: only the calling thread talks to MPI.
fn funneled(abi: Abi) -> c_int {
    match abi {
        Abi::OpenMpi | Abi::Mpich => 1,
        Abi::Standard => 1024,
    }
}

/// The largest text any MPI writes into a version buffer is 8192 bytes (MPICH); twice that is allotted.
const VERSION_ROOM: usize = 16384;

type Flag = unsafe extern "C" fn(*mut c_int) -> c_int;
type InitThread = unsafe extern "C" fn(*mut c_int, *mut *mut *mut c_char, c_int, *mut c_int) -> c_int;
type Finalize = unsafe extern "C" fn() -> c_int;
type CommInt = unsafe extern "C" fn(Handle, *mut c_int) -> c_int;
type Bcast = unsafe extern "C" fn(*mut c_void, c_int, Handle, c_int, Handle) -> c_int;
type Allgather =
    unsafe extern "C" fn(*const c_void, c_int, Handle, *mut c_void, c_int, Handle, Handle) -> c_int;
type Version = unsafe extern "C" fn(*mut c_char, *mut c_int) -> c_int;

/// A loaded MPI library: functions and the handles of its ABI.
#[derive(Debug)]
pub struct Mpi {
    path: PathBuf,
    abi: Abi,
    world: Handle,
    byte: Handle,
    initialized: Flag,
    finalized: Flag,
    init_thread: InitThread,
    finalize: Finalize,
    comm_rank: CommInt,
    comm_size: CommInt,
    bcast: Bcast,
    allgather: Allgather,
    library_version: Version,
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
    /// Finds and loads a library as `search` says.
    ///
    /// # Errors
    /// [`Error::NotFound`] with every attempt, or [`Error::Symbol`] when the file named explicitly is no MPI.
    pub fn load(search: &Search) -> Result<Mpi, Error> {
        load::load(search)
    }

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
