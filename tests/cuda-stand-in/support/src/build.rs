//! Where the stand-in libraries are; cargo builds them when a test first asks.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// The stand-in libraries. Children of a test find them by [`Paths::env`] without building again.
#[derive(Clone, Debug)]
pub struct Paths {
    pub cuda: PathBuf,
    pub nccl: PathBuf,
    pub fabric: PathBuf,
}

const CUDA: (&str, &str) = ("smddp-standin-cuda", "SMDDP_STANDIN_CUDA");
const NCCL: (&str, &str) = ("smddp-standin-nccl", "SMDDP_STANDIN_NCCL");
const FABRIC: (&str, &str) = ("smddp-standin-fabric", "SMDDP_STANDIN_FABRIC");

impl Paths {
    /// Variables for a child process, in which [`paths`] then answers the same.
    pub fn env(&self) -> [(&'static str, PathBuf); 3] {
        [(CUDA.1, self.cuda.clone()), (NCCL.1, self.nccl.clone()), (FABRIC.1, self.fabric.clone())]
    }
}

/// The libraries that `SMDDP_STANDIN_CUDA`, `…_NCCL` and `…_FABRIC` name, else those that cargo builds now.
///
/// # Panics
/// If they cannot be built: a test that needs them can then say nothing.
pub fn paths() -> &'static Paths {
    static PATHS: OnceLock<Paths> = OnceLock::new();
    let named = |(_, variable): (&str, &str)| std::env::var_os(variable).map(PathBuf::from);
    PATHS.get_or_init(|| match (named(CUDA), named(NCCL), named(FABRIC)) {
        (Some(cuda), Some(nccl), Some(fabric)) => Paths { cuda, nccl, fabric },
        _ => build().unwrap_or_else(|why| panic!("cannot build the stand-in libraries: {why}")),
    })
}

/// Asks cargo itself where it put them: the target directory has many ways to be elsewhere.
fn build() -> Result<Paths, String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["build", "--locked", "--message-format=json", "-p", CUDA.0, "-p", NCCL.0, "-p", FABRIC.0])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|why| format!("cargo: {why}"))?;
    if !output.status.success() {
        return Err(format!("cargo: {}", output.status));
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    let find = |package: &str| {
        let target = package.replace('-', "_");
        messages.lines().find_map(|line| library(line, &target)).ok_or(format!("no library of {package}"))
    };
    Ok(Paths { cuda: find(CUDA.0)?, nccl: find(NCCL.0)?, fabric: find(FABRIC.0)? })
}

/// The file that the compiler message `line` says was made of `target`.
fn library(line: &str, target: &str) -> Option<PathBuf> {
    let message: serde_json::Value = serde_json::from_str(line).ok()?;
    (message["reason"] == "compiler-artifact" && message["target"]["name"] == target).then_some(())?;
    message["filenames"][0].as_str().map(PathBuf::from)
}
