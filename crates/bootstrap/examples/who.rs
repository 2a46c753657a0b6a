//! Prints who this process is in its job and what all ranks said, by whatever way the job can be joined:
//! `mpirun -n 4 who`, `torchrun --no-python … who`, or alone.
//!
//! For tests, by variables: `WHO_LIBRARY_DIRS` (searched last for libraries), `WHO_MPI_FIRST` (initialise this MPI
//! as if a user's mpi4py had), `WHO_EXIT` (this rank ends without a word after joining), `WHO_SLEEP` (this rank never
//! joins).

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use smddp_bootstrap::{Vars, env, exchange, join, launcher_env, mpi};
use smddp_core::settings::Settings;
use smddp_mpi_sys::{Mpi, Search};

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// Somebody else's MPI: initialised before us, and to be finalised after us.
fn foreign_mpi() -> Result<Option<Mpi>, smddp_mpi_sys::Error> {
    let Some(path) = variable("WHO_MPI_FIRST") else { return Ok(None) };
    let mpi = Mpi::load(&Search { explicit: Some(PathBuf::from(path)), ..Search::default() })?;
    mpi.init()?;
    Ok(Some(mpi))
}

fn run() -> Result<(), Box<dyn std::error::Error>> {
    let settings = Settings::from_env()?;
    let dirs: Vec<PathBuf> =
        std::env::split_paths(&std::env::var_os("WHO_LIBRARY_DIRS").unwrap_or_default()).collect();
    let vars = Vars::from_process();
    let rank = env::read(&vars, true)?.rank.unwrap_or(0).to_string();
    if variable("WHO_SLEEP") == Some(rank.clone()) {
        std::thread::sleep(Duration::from_secs(3600));
    }
    let foreign = foreign_mpi()?;

    let exported = launcher_env(&settings, &dirs, &vars)?;
    let exported: Vec<String> = exported.into_iter().map(|(name, value)| format!("{name}={value}")).collect();

    let deadline = Instant::now() + settings.seconds("SMDDP_TIMEOUT");
    let job = join(&settings, &dirs, deadline)?;
    if variable("WHO_EXIT") == Some(rank) {
        std::process::exit(7);
    }
    let said = format!("{}*{}", job.rank, job.rank * job.rank);
    let all = exchange::all_gather(&*job.store, "who", job.rank, job.size, said.as_bytes(), deadline)?;
    let all: Vec<String> = all.iter().map(|bytes| String::from_utf8_lossy(bytes).into_owned()).collect();
    let number = |n: Option<usize>| n.map_or_else(|| "?".to_owned(), |n| n.to_string());
    // One write a line: the ranks share the terminal.
    println!(
        "rank={} size={} local={}/{} how={:?} id={} all={} exported={} mpi={}",
        job.rank,
        job.size,
        number(job.local_rank),
        number(job.local_size),
        job.how,
        job.job_id,
        all.join(","),
        exported.join(","),
        mpi::description().unwrap_or_default()
    );
    drop(job);
    mpi::finalize(Duration::from_secs(60))?;
    if let Some(foreign) = foreign {
        println!("foreign finalized={}", foreign.finalized()?);
        foreign.finalize()?;
    }
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
