//! `smddp-perf`: measures collectives, shows plans, and says what this machine offers.

mod args;
mod bench;
mod chart;
mod compare;
mod device;
mod info;
mod launch;
mod measure;
mod plan;
mod report;
mod row;
mod workload;

use std::path::Path;
use std::process::{ExitCode, ExitStatus};
use std::time::Duration;

use clap::Parser;
use clap::error::ErrorKind;

use args::{Cli, Command};

/// What the program ends with when its arguments cannot be done, and when what it did went wrong.
const USAGE: u8 = 2;
const FAILED: u8 = 1;

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
    fn file(path: &Path, reason: impl std::fmt::Display) -> Failure {
        Failure::File { path: path.display().to_string(), reason: reason.to_string() }
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Usage(text)) => {
            // As clap prints its own, so that all bad arguments look alike.
            let error = clap::Error::raw(ErrorKind::ValueValidation, format!("{text}\n"));
            let _ = error.print();
            ExitCode::from(USAGE)
        }
        Err(Failure::SaidByRank0(status)) => ExitCode::from(status),
        Err(failure) => {
            eprintln!("smddp-perf: {failure}");
            ExitCode::from(FAILED)
        }
    }
}

fn run(command: &Command) -> Result<(), Failure> {
    if let Some((collective, options)) = command.bench() {
        return bench::run(collective, options);
    }
    match command {
        Command::Plan(options) => plan::run(options),
        Command::Info(options) => info::run(options),
        Command::Compare(options) => compare::run(options),
        _ => Ok(()),
    }
}

/// Writes to standard output; a reader that went away (`| head`) is no failure.
fn print(text: &str) -> Result<(), Failure> {
    use std::io::Write;
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.map_err(|e| Failure::file(Path::new("standard output"), e)),
    }
}
