//! Why the program ends without having done its work, and with what.

use std::path::Path;
use std::process::ExitStatus;
use std::time::Duration;

/// What the program ends with when its arguments cannot be done, and when what it did went wrong.
pub const USAGE: u8 = 2;
pub const FAILED: u8 = 1;

/// Why the program ends without having done its work.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error("{0}")]
    Usage(String),
    #[error("starting ranks: {0}")]
    Start(String),
    #[error("rank {rank} failed ({status}); the others were ended. What it said is above")]
    Rank { rank: usize, status: ExitStatus },
    #[error(
        "the job did not end within {} s; ranks still running: {running:?}; all were ended. Raise --limit if that was too short",
        limit.as_secs_f64()
    )]
    Limit { limit: Duration, running: Vec<usize> },
    #[error("{path}: {reason}")]
    File { path: String, reason: String },
    #[error("{wrong} of {rows} results are wrong")]
    Wrong { wrong: usize, rows: usize },
    /// All ranks found the same, and rank 0 says it; all end with its status, of which a launcher reports one.
    #[error("see rank 0")]
    SaidByRank0(u8),
    #[error(transparent)]
    Smddp(#[from] smddp::Error),
}

impl Failure {
    pub fn file(path: &Path, reason: impl std::fmt::Display) -> Failure {
        Failure::File { path: path.display().to_string(), reason: reason.to_string() }
    }
}
