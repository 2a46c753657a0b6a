//! What can go wrong with MPI.

use std::path::PathBuf;

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
