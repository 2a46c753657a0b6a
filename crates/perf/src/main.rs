//! `smddp-perf`: measures collectives, shows plans, and says what this machine offers.

mod args;
mod bench;
mod chart;
mod compare;
mod device;
mod failure;
mod info;
mod launch;
mod measure;
mod output;
mod plan;
mod report;
mod row;
mod workload;

use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

use args::{Cli, Command};
use failure::{FAILED, Failure, USAGE};

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
