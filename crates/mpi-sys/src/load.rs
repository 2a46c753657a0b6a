//! Where an MPI library is looked for, and how its ABI is told.

use std::ffi::{c_int, c_void};
use std::path::{Path, PathBuf};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use crate::abi::{Abi, Allgather, Bcast, CommInt, Finalize, Flag, Handle, InitThread, Version};
use crate::calls::Mpi;
use crate::error::Error;

/// Only take a library the process has loaded already (Linux; the same on glibc and musl).
const RTLD_NOLOAD: c_int = 4;

/// Open MPI 4 opens plug-ins that expect libmpi's symbols to be visible to all, hence `RTLD_GLOBAL`.
const FLAGS: c_int = RTLD_NOW | RTLD_GLOBAL;

/// Which kind of launcher started this process, as its variables tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// `OMPI_*` or `PMIX_*` variables.
    OpenMpi,
    /// `PMI_*` variables: MPICH, Intel MPI, Cray.
    Pmi,
}

const OPEN_MPI: &[&str] = &["libmpi.so.40"];
const PMI: &[&str] = &["libmpi_abi.so.1", "libmpi_abi.so.0", "libmpi.so.12", DEBIAN_MPICH];
const ANY: &[&str] = &["libmpi.so.40", "libmpi_abi.so.1", "libmpi_abi.so.0", "libmpi.so.12", DEBIAN_MPICH];
/// What Debian calls MPICH's libmpi.so.12.
const DEBIAN_MPICH: &str = "libmpich.so.12";

/// Where to look, in this order:
///
/// 1. `explicit` alone, when given;
/// 2. a library the process has loaded already (mpi4py, a program linked with MPI);
/// 3. beside the launcher that started us: `launcher`'s `../lib`, then each of `prefixes`' `lib`. Before the
///    system's copy, because two releases of Open MPI share one soname and only the launcher's own fits;
/// 4. by soname, as the dynamic linker finds it;
/// 5. in each of `dirs` (libraries that came as Python wheels).
#[derive(Clone, Debug, Default)]
pub struct Search {
    /// A file the user named.
    pub explicit: Option<PathBuf>,
    /// Decides the names looked for; `None` looks for all.
    pub family: Option<Family>,
    /// The launcher's program file.
    pub launcher: Option<PathBuf>,
    /// Install prefixes, such as `OPAL_PREFIX`.
    pub prefixes: Vec<PathBuf>,
    /// Library directories.
    pub dirs: Vec<PathBuf>,
}

impl Search {
    fn names(&self) -> &'static [&'static str] {
        match self.family {
            Some(Family::OpenMpi) => OPEN_MPI,
            Some(Family::Pmi) => PMI,
            None => ANY,
        }
    }

    /// Steps 3 to 5 as things to give to the dynamic linker.
    fn candidates(&self) -> Vec<PathBuf> {
        let mut before: Vec<PathBuf> = Vec::new();
        let launcher_prefix = self.launcher.as_deref().and_then(Path::parent).and_then(Path::parent);
        for prefix in launcher_prefix.into_iter().chain(self.prefixes.iter().map(PathBuf::as_path)) {
            for lib in ["lib", "lib64"] {
                before.push(prefix.join(lib));
            }
        }
        let existing = |dirs: &[PathBuf]| -> Vec<PathBuf> {
            dirs.iter()
                .flat_map(|dir| self.names().iter().map(move |name| dir.join(name)))
                .filter(|file| file.is_file())
                .collect()
        };
        let mut all = existing(&before);
        all.extend(self.names().iter().map(PathBuf::from));
        all.extend(existing(&self.dirs));
        all
    }
}

impl Mpi {
    /// Finds and loads a library as `search` says.
    ///
    /// # Errors
    /// [`Error::NotFound`] with every attempt, or [`Error::Symbol`] when the file named explicitly is no MPI.
    pub fn load(search: &Search) -> Result<Mpi, Error> {
        if let Some(file) = &search.explicit {
            let library = open(file, FLAGS).map_err(|reason| Error::NotFound { tried: vec![reason] })?;
            return bind(library, file);
        }
        if let Some(found) = in_process(search) {
            return Ok(found);
        }
        let mut tried = Vec::new();
        for file in search.candidates() {
            match open(&file, FLAGS) {
                Ok(library) => match bind(library, &file) {
                    Ok(mpi) => return Ok(mpi),
                    Err(error) => tried.push(error.to_string()),
                },
                Err(reason) => tried.push(reason),
            }
        }
        Err(Error::NotFound { tried })
    }
}

/// An MPI somebody else has loaded; the launcher's family first.
fn in_process(search: &Search) -> Option<Mpi> {
    for name in search.names().iter().chain(ANY) {
        let file = Path::new(name);
        if let Ok(library) = open(file, FLAGS | RTLD_NOLOAD)
            && let Ok(mpi) = bind(library, file)
        {
            return Some(mpi);
        }
    }
    // A program linked with an MPI under another name (Cray's, or a static one).
    let program = Library::this();
    has(&program, "MPI_Init_thread").then(|| bind(program, Path::new("(this program)")).ok())?
}

fn open(file: &Path, flags: c_int) -> Result<Library, String> {
    // SAFETY: loading runs the initialisers of an MPI library, or of the file the user named as one.
    unsafe { Library::open(Some(file), flags) }.map_err(|error| {
        // The dynamic linker's own words are in the source.
        let reason = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
        let name = file.display().to_string();
        if reason.contains(&name) { reason } else { format!("{name}: {reason}") }
    })
}

/// The address of a symbol.
fn symbol(library: &Library, name: &str) -> Option<*mut c_void> {
    // SAFETY: only the address is taken; what it is used as is decided (and justified) by the caller.
    let found = unsafe { library.get::<*mut c_void>(name.as_bytes()) }.ok()?;
    let address = found.into_raw();
    (!address.is_null()).then_some(address.cast())
}

fn has(library: &Library, name: &str) -> bool {
    symbol(library, name).is_some()
}

/// Tells the ABI: a library that reports a standard ABI version is standard; one that exports Open MPI's world
/// object is Open MPI; everything else speaks the MPICH ABI.
fn decide(library: &Library) -> Abi {
    if let Some(address) = symbol(library, "MPI_Abi_get_version") {
        type AbiVersion = unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int;
        // SAFETY: the MPI standard fixes this function's signature.
        let version: AbiVersion = unsafe { std::mem::transmute::<*mut c_void, AbiVersion>(address) };
        let (mut major, mut minor): (c_int, c_int) = (0, 0);
        // SAFETY: callable before MPI_Init; writes two ints.
        if unsafe { version(&mut major, &mut minor) } == 0 && major > 0 {
            return Abi::Standard;
        }
    }
    if has(library, "ompi_mpi_comm_world") { Abi::OpenMpi } else { Abi::Mpich }
}

/// (`MPI_COMM_WORLD`, `MPI_BYTE`) of an ABI.
fn handles(library: &Library, path: &Path, abi: Abi) -> Result<(Handle, Handle), Error> {
    let object = |name: &str| match symbol(library, name) {
        Some(address) => Ok(address as Handle),
        None => Err(Error::Symbol { path: path.to_owned(), symbol: name.to_owned() }),
    };
    match abi {
        Abi::OpenMpi => Ok((object("ompi_mpi_comm_world")?, object("ompi_mpi_byte")?)),
        Abi::Mpich => Ok((0x4400_0000, 0x4c00_010d)),
        Abi::Standard => Ok((0x101, 0x247)),
    }
}

fn bind(library: Library, path: &Path) -> Result<Mpi, Error> {
    macro_rules! function {
        ($name:literal, $kind:ty) => {
            match symbol(&library, $name) {
                // SAFETY: the MPI standard fixes this function's signature; handles are pointer-sized here.
                Some(address) => unsafe { std::mem::transmute::<*mut c_void, $kind>(address) },
                None => return Err(Error::Symbol { path: path.to_owned(), symbol: $name.to_owned() }),
            }
        };
    }
    let initialized = function!("MPI_Initialized", Flag);
    let abi = decide(&library);
    let (world, byte) = handles(&library, path, abi)?;
    let mpi = Mpi {
        path: path.to_owned(),
        abi,
        world,
        byte,
        initialized,
        finalized: function!("MPI_Finalized", Flag),
        init_thread: function!("MPI_Init_thread", InitThread),
        finalize: function!("MPI_Finalize", Finalize),
        comm_rank: function!("MPI_Comm_rank", CommInt),
        comm_size: function!("MPI_Comm_size", CommInt),
        bcast: function!("MPI_Bcast", Bcast),
        allgather: function!("MPI_Allgather", Allgather),
        library_version: function!("MPI_Get_library_version", Version),
    };
    // Invariant 1: never closed.
    std::mem::forget(library);
    Ok(mpi)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_launchers_own_copy_comes_before_the_systems_and_wheels_come_last() {
        let root = std::env::temp_dir().join(format!("smddp-mpi-sys-{}", std::process::id()));
        let lib = root.join("launcher/lib");
        let wheel = root.join("wheel");
        std::fs::create_dir_all(&lib).unwrap();
        std::fs::create_dir_all(&wheel).unwrap();
        std::fs::write(lib.join("libmpi.so.40"), b"").unwrap();
        std::fs::write(wheel.join("libmpi.so.40"), b"").unwrap();
        let search = Search {
            family: Some(Family::OpenMpi),
            launcher: Some(root.join("launcher/bin/prterun")),
            prefixes: vec![root.join("absent")],
            dirs: vec![wheel.clone()],
            ..Search::default()
        };
        let expected = [lib.join("libmpi.so.40"), PathBuf::from("libmpi.so.40"), wheel.join("libmpi.so.40")];
        assert_eq!(search.candidates(), expected);
        std::fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn a_file_that_is_no_library_is_named() {
        let search = Search { explicit: Some(PathBuf::from("/nonexistent/libmpi.so")), ..Search::default() };
        let text = Mpi::load(&search).unwrap_err().to_string();
        assert!(text.contains("/nonexistent/libmpi.so") && text.contains("No such file"), "{text}");
    }

    #[test]
    fn a_library_that_is_no_mpi_is_refused_by_its_missing_symbol() {
        let search = Search { explicit: Some(PathBuf::from("libc.so.6")), ..Search::default() };
        match Mpi::load(&search) {
            Err(Error::Symbol { symbol, .. }) => assert_eq!(symbol, "MPI_Initialized"),
            other => panic!("{other:?}"),
        }
    }
}
