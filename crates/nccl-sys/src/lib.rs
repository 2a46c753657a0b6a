//! The part of NCCL this project calls, found at run time. No NCCL is needed to build.
//!
//! - **N1** the copy the process has loaded already (torch's) comes first: all ranks of a communicator must run the same
//!   NCCL, and two copies in one process would fight over the device.
//! - **N2** a library in use is never unloaded: its threads outlive every communicator. One that is too old is: it would
//!   be the one that the process has loaded.
//! - **N3** [`Config`] is the layout of NCCL 2.18: later libraries read only the fields its `version` knows and take
//!   defaults for the rest.
//!
//! Source of signatures: nccl.h, 2.18 to 2.30.

use std::ffi::{CStr, OsStr, c_char, c_int, c_void};
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};

use libloading::os::unix::{Library as Handle, RTLD_LOCAL, RTLD_NOW};

/// `ncclResult_t`.
pub type Status = c_int;
pub const SUCCESS: Status = 0;
/// Of communicators that do not block: the call goes on, until [`Nccl::comm_error`] finds another status.
pub const IN_PROGRESS: Status = 7;

pub type Comm = *mut c_void;
pub type Stream = *mut c_void;

/// `ncclDataType_t`.
pub mod dtype {
    use std::ffi::c_int;
    pub const INT8: c_int = 0;
    pub const UINT8: c_int = 1;
    pub const INT32: c_int = 2;
    pub const INT64: c_int = 4;
    pub const FLOAT16: c_int = 6;
    pub const FLOAT32: c_int = 7;
    pub const FLOAT64: c_int = 8;
    pub const BFLOAT16: c_int = 9;
}

/// `ncclRedOp_t`.
pub mod op {
    use std::ffi::c_int;
    pub const SUM: c_int = 0;
    pub const PROD: c_int = 1;
    pub const MAX: c_int = 2;
    pub const MIN: c_int = 3;
    pub const AVG: c_int = 4;
}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct UniqueId(pub [u8; 128]);

/// `NCCL_CONFIG_UNDEF_INT`.
const UNDEFINED: c_int = c_int::MIN;

/// `ncclConfig_t` as of 2.18 (N3).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
    /// Padding in 2.18; `trafficClass` since 2.26, which not every release resets by version.
    traffic_class: c_int,
}

impl Config {
    /// A blocking communicator, unless NCCL_COMM_BLOCKING says otherwise; `max_ctas` limits the multiprocessors it uses (None: NCCL's choice).
    pub fn blocking(max_ctas: Option<u32>) -> Config {
        Config {
            size: size_of::<Config>(),
            magic: 0xcafe_beef,
            version: 21_800,
            blocking: 1,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: max_ctas.map_or(UNDEFINED, |n| n as c_int),
            net_name: std::ptr::null(),
            split_share: UNDEFINED,
            traffic_class: UNDEFINED,
        }
    }
}

/// The oldest NCCL accepted: the first whose configuration is [`Config`].
pub const MINIMUM: c_int = 21_800;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    #[error(
        "no usable NCCL found; tried {}. A CUDA build of PyTorch brings one, so does `pip install nvidia-nccl-cu13`; or name its file in SMDDP_NCCL",
        .tried.join("; ")
    )]
    NotFound { tried: Vec<String> },
    #[error("{path} is NCCL {}, 2.18 or later is needed. Update it, or name another in SMDDP_NCCL", shown(*.found))]
    TooOld { path: String, found: c_int },
    #[error("{path} lacks the function {symbol}: it is no usable NCCL. Name another in SMDDP_NCCL")]
    Broken { path: String, symbol: &'static str },
}

impl LoadError {
    /// What was found, without what to do.
    fn found(&self) -> String {
        match self {
            LoadError::NotFound { tried } => tried.join("; "),
            LoadError::TooOld { path, found } => format!("{path}: NCCL {}, not 2.18 or later", shown(*found)),
            LoadError::Broken { path, symbol } => format!("{path}: lacks the function {symbol}"),
        }
    }
}

/// A version code as people write it: 22809 is 2.28.9.
pub fn shown(code: c_int) -> String {
    format!("{}.{}.{}", code / 10_000, code / 100 % 100, code % 100)
}

macro_rules! table {
    ($($field:ident = $symbol:literal: fn($($arg:ty),*) $(-> $result:ty)?;)*) => {
        /// NCCL's functions, each with the contract of its documentation.
        #[derive(Debug)]
        pub struct Nccl {
            pub version: c_int,
            /// The file loaded, or the name the dynamic linker resolved.
            pub path: String,
            $(pub $field: table!(@type ($($arg),*) $($result)?),)*
            _handle: ManuallyDrop<Handle>,
        }

        impl Nccl {
            fn resolve(path: &str, handle: Handle) -> Result<Nccl, LoadError> {
                $(
                    // SAFETY: the symbol has this signature by nccl.h; the library stays loaded (N2).
                    let $field = unsafe { handle.get::<table!(@type ($($arg),*) $($result)?)>(concat!($symbol, "\0").as_bytes()) }
                        .map(|symbol| *symbol)
                        .map_err(|_| LoadError::Broken { path: path.to_owned(), symbol: $symbol })?;
                )*
                Ok(Nccl { version: 0, path: path.to_owned(), $($field,)* _handle: ManuallyDrop::new(handle) })
            }
        }
    };
    (@type ($($arg:ty),*) $result:ty) => { unsafe extern "C" fn($($arg),*) -> $result };
    (@type ($($arg:ty),*)) => { unsafe extern "C" fn($($arg),*) -> Status };
}

table! {
    error_string = "ncclGetErrorString": fn(Status) -> *const c_char;
    last_error = "ncclGetLastError": fn(Comm) -> *const c_char;
    unique_id = "ncclGetUniqueId": fn(*mut UniqueId);
    comm_init = "ncclCommInitRankConfig": fn(*mut Comm, c_int, UniqueId, c_int, *mut Config);
    comm_destroy = "ncclCommDestroy": fn(Comm);
    comm_abort = "ncclCommAbort": fn(Comm);
    comm_error = "ncclCommGetAsyncError": fn(Comm, *mut Status);
    group_start = "ncclGroupStart": fn();
    group_end = "ncclGroupEnd": fn();
    all_reduce = "ncclAllReduce": fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream);
    reduce_scatter = "ncclReduceScatter": fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream);
    all_gather = "ncclAllGather": fn(*const c_void, *mut c_void, usize, c_int, Comm, Stream);
    broadcast = "ncclBroadcast": fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream);
    reduce = "ncclReduce": fn(*const c_void, *mut c_void, usize, c_int, c_int, c_int, Comm, Stream);
    send = "ncclSend": fn(*const c_void, usize, c_int, c_int, Comm, Stream);
    recv = "ncclRecv": fn(*mut c_void, usize, c_int, c_int, Comm, Stream);
}

impl Nccl {
    /// The file named by the user, and no other; the copy this process has loaded (N1); else the first usable one of
    /// `libnccl.so.2` and `libnccl.so` as the dynamic linker finds them, then those files in `dirs`.
    pub fn load(named: &str, dirs: &[PathBuf]) -> Result<Nccl, LoadError> {
        if !named.is_empty() {
            return open(OsStr::new(named), 0)
                .map_err(|e| LoadError::NotFound { tried: vec![e] })
                .and_then(checked);
        }
        let mut tried = Vec::new();
        let mut places: Vec<(PathBuf, c_int)> = loaded().into_iter().map(|p| (p, RTLD_NOLOAD)).collect();
        places.push((PathBuf::from("libnccl.so.2"), RTLD_NOLOAD));
        places.extend(["libnccl.so.2", "libnccl.so"].map(|name| (PathBuf::from(name), 0)));
        let inside = |dir: &PathBuf| ["libnccl.so.2", "libnccl.so"].map(|name| dir.join(name));
        places.extend(dirs.iter().flat_map(inside).filter(|f| f.is_file()).map(|f| (f, 0)));
        for (place, flag) in places {
            match open(place.as_os_str(), flag).map(checked) {
                Ok(Ok(found)) => return Ok(found),
                Ok(Err(unusable)) if flag == RTLD_NOLOAD => return Err(unusable),
                Ok(Err(unusable)) => tried.push(unusable.found()),
                Err(why) if flag == 0 => tried.push(why),
                Err(_) => {}
            }
        }
        Err(LoadError::NotFound { tried })
    }

    /// NCCL's own words for a status, with what the failing call said.
    pub fn explain(&self, status: Status) -> String {
        let text = |found: *const c_char| {
            // SAFETY: NCCL returns null or a terminated string that lives at least until its next call on this thread.
            (!found.is_null()).then(|| unsafe { CStr::from_ptr(found) }.to_string_lossy().trim().to_owned())
        };
        // SAFETY: any status may be asked for.
        let general =
            text(unsafe { (self.error_string)(status) }).unwrap_or_else(|| format!("NCCL error {status}"));
        // SAFETY: a null communicator asks for the thread's last error.
        match text(unsafe { (self.last_error)(std::ptr::null_mut()) }).filter(|t| !t.is_empty()) {
            Some(last) => format!("{general}: {last}"),
            None => general,
        }
    }
}

/// Only take a library the process has loaded already.
const RTLD_NOLOAD: c_int = 4;

/// Files named like NCCL among those this process has mapped.
fn loaded() -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    maps.lines().find_map(|line| {
        let path = Path::new(line.get(line.find('/')?..)?);
        path.file_name()?.to_str()?.starts_with("libnccl.so").then(|| path.to_owned())
    })
}

fn open(file: &OsStr, flag: c_int) -> Result<(String, Handle), String> {
    let path = file.to_string_lossy().into_owned();
    // SAFETY: NCCL's initialisers have no requirements on their caller.
    match unsafe { Handle::open(Some(file), RTLD_NOW | RTLD_LOCAL | flag) } {
        Ok(handle) => Ok((path, handle)),
        Err(error) => {
            let reason = innermost(&error);
            Err(if reason.contains(&path) { reason } else { format!("{path}: {reason}") })
        }
    }
}

/// The dynamic linker's own words, which are in the source.
fn innermost(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

/// The version comes first: an old library lacks functions too, and is old before all.
fn checked((path, handle): (String, Handle)) -> Result<Nccl, LoadError> {
    const VERSION: &str = "ncclGetVersion";
    let mut found = 0;
    // SAFETY: the symbol has this signature by nccl.h; the library stays loaded (N2).
    let ask = unsafe { handle.get::<unsafe extern "C" fn(*mut c_int) -> Status>(VERSION.as_bytes()) }
        .map(|symbol| *symbol)
        .map_err(|_| LoadError::Broken { path: path.clone(), symbol: VERSION })?;
    // SAFETY: `found` is a place for an integer; the call needs no device.
    let status = unsafe { ask(&raw mut found) };
    if status != SUCCESS || found < MINIMUM {
        return Err(LoadError::TooOld { path, found });
    }
    Ok(Nccl { version: found, ..Nccl::resolve(&path, handle)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_is_that_of_2_18() {
        assert_eq!(size_of::<Config>(), 48);
        assert_eq!(std::mem::offset_of!(Config, net_name), 32);
        assert_eq!(std::mem::offset_of!(Config, split_share), 40);
    }

    #[test]
    fn a_missing_nccl_is_an_error_that_says_what_to_do() {
        let said = Nccl::load("/no/such/libnccl.so", &[]).unwrap_err().to_string();
        assert!(said.contains("/no/such/libnccl.so") && said.contains("SMDDP_NCCL"), "{said}");
        // The dynamic linker's own words.
        assert!(said.contains("No such file"), "{said}");
    }

    #[test]
    fn another_library_is_refused_by_the_first_function_it_lacks() {
        let error = Nccl::load("libc.so.6", &[]).unwrap_err();
        assert_eq!(error, LoadError::Broken { path: "libc.so.6".to_owned(), symbol: "ncclGetVersion" });
    }

    /// A library with NCCL's version and no more of it, in a folder of its own.
    fn old_nccl(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("smddp-old-nccl-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let (source, library) = (folder.join("old.c"), folder.join(name));
        std::fs::write(&source, "int ncclGetVersion(int *version) { *version = 21003; return 0; }").unwrap();
        // What links Rust's programs here.
        let mut cc = std::process::Command::new("cc");
        let built = cc.args(["-shared", "-fPIC", "-o"]).args([&library, &source]);
        assert!(built.status().unwrap().success());
        library
    }

    /// Older ones than 2.14 lack functions of the table; what helps is a newer one.
    #[test]
    fn an_old_nccl_is_refused_by_its_version() {
        let library = old_nccl("libold.so");
        let path = library.to_str().unwrap().to_owned();
        let error = Nccl::load(&path, &[]).unwrap_err();
        std::fs::remove_dir_all(library.parent().unwrap()).unwrap();
        assert_eq!(error, LoadError::TooOld { path, found: 21_003 });
        let said = error.to_string();
        assert!(said.contains("2.10.3") && said.contains("2.18"), "{said}");
    }

    #[test]
    fn an_unusable_nccl_does_not_end_the_search() {
        let old = ["libnccl.so.2", "libnccl.so"].map(old_nccl);
        let folders = old.each_ref().map(|library| library.parent().unwrap().to_owned());
        let found = Nccl::load("", &folders);
        folders.iter().for_each(|folder| std::fs::remove_dir_all(folder).unwrap());
        // Where the machine has an NCCL, that comes first.
        if let Err(error) = found {
            let said = error.to_string();
            assert!(old.iter().all(|file| said.contains(file.to_str().unwrap())), "{said}");
            assert!(said.contains("2.10.3"), "{said}");
        }
    }

    #[test]
    fn versions_are_shown_as_people_write_them() {
        assert_eq!(shown(22_809), "2.28.9");
    }
}
