//! Starting ranks on this machine when no launcher did.
//!
//! - **L1** every child ends with the starter, however the starter ends: children ask the kernel for it.
//! - **L2** the first child that fails gives the others a short while to say why they fail too, then they are killed,
//!   by the process handle they were started with.

use std::net::TcpListener;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use crate::failure::Failure;

/// How long the others may go on after one rank has failed.
const GRACE: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(10);

/// Variables by which a launcher tells a process the size of its job.
const WORLD_SIZE: [&str; 4] = ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK"];

/// Whether a launcher (mpirun, torchrun, srun) started this process as one of several ranks.
pub fn launched() -> bool {
    launched_by(|name| std::env::var(name).ok())
}

/// A step of Slurm counts when it has several tasks: batch scripts and shells in an allocation are one.
fn launched_by(variable: impl Fn(&str) -> Option<String>) -> bool {
    let several = |tasks: String| tasks.parse::<usize>().is_ok_and(|tasks| tasks > 1);
    WORLD_SIZE.iter().any(|name| variable(name).is_some())
        || variable("SLURM_STEP_NUM_TASKS").is_some_and(several)
}

/// Called first by a started rank (L1).
pub fn follow_the_starter() -> Result<(), Failure> {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .map_err(|e| Failure::Start(format!("the kernel refused to tie this rank to its starter: {e}")))?;
    Ok(())
}

/// Gives this rank its share of the cores, when there are as many cores as ranks: two ranks that the kernel has put on one
/// core measure its scheduler. Not one core each where there are more: a host that waits for a device keeps the
/// progress thread off a core that the two share.
pub fn bind() {
    let number = |name| std::env::var(name).ok().and_then(|v| v.parse::<usize>().ok());
    let (Some(rank), Some(size)) = (number("RANK"), number("WORLD_SIZE")) else { return };
    let Ok(allowed) = rustix::thread::sched_getaffinity(None) else { return };
    let cores: Vec<usize> = (0..rustix::thread::CpuSet::MAX_CPU).filter(|&c| allowed.is_set(c)).collect();
    if size > cores.len() {
        return;
    }
    let share = cores.len() / size;
    let mut own = rustix::thread::CpuSet::new();
    cores.iter().skip(rank % size * share).take(share).for_each(|&core| own.set(core));
    // A refusal costs precision, nothing else.
    let _ = rustix::thread::sched_setaffinity(None, &own);
}

/// Starts `np` copies of this program with this command line, spread over `nodes` emulated nodes; waits for them.
pub fn run(np: usize, nodes: usize, limit: Duration) -> Result<(), Failure> {
    let program = std::env::current_exe().map_err(|e| Failure::Start(format!("own path unknown: {e}")))?;
    let master = free_port()?;
    let port = master.local_addr().map_err(no_port)?.port();
    let mut ranks = Ranks { children: Vec::with_capacity(np) };
    for rank in 0..np {
        let place = Place::new(rank, np, nodes);
        let mut command = Command::new(&program);
        command.args(std::env::args_os().skip(1)).arg("--started");
        command.env("RANK", rank.to_string()).env("WORLD_SIZE", np.to_string());
        command.env("LOCAL_RANK", place.local.to_string()).env("LOCAL_WORLD_SIZE", place.of.to_string());
        command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
        if std::env::var_os("SMDDP_BOOTSTRAP").is_none() {
            command.env("SMDDP_BOOTSTRAP", "env");
        }
        if nodes > 1 {
            command.env("SMDDP_NODE_ID", format!("emulated-node-{}", place.node));
        }
        let child = command.spawn().map_err(|e| Failure::Start(format!("rank {rank}: {e}")))?;
        ranks.children.push(child);
    }
    ranks.wait(limit)
}

/// Where a rank sits when `np` ranks are dealt to `nodes` in order, as evenly as they go.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    node: usize,
    local: usize,
    of: usize,
}

impl Place {
    fn new(rank: usize, np: usize, nodes: usize) -> Place {
        let first = |node: usize| (node * np).div_ceil(nodes);
        let node = rank * nodes / np;
        Place { node, local: rank - first(node), of: first(node + 1) - first(node) }
    }
}

/// A port of this job alone, as long as the listener lives: the library's own store listens on others.
fn free_port() -> Result<TcpListener, Failure> {
    TcpListener::bind(("127.0.0.1", 0)).map_err(no_port)
}

fn no_port(error: std::io::Error) -> Failure {
    Failure::Start(format!("no free port on 127.0.0.1: {error}"))
}

struct Ranks {
    children: Vec<Child>,
}

impl Ranks {
    fn wait(&mut self, limit: Duration) -> Result<(), Failure> {
        let start = Instant::now();
        let mut failed: Option<(usize, ExitStatus, Instant)> = None;
        loop {
            let mut running = Vec::new();
            for (rank, child) in self.children.iter_mut().enumerate() {
                match child.try_wait().map_err(|e| Failure::Start(format!("rank {rank}: {e}")))? {
                    None => running.push(rank),
                    Some(status) if !status.success() && failed.is_none() => {
                        failed = Some((rank, status, Instant::now()));
                    }
                    Some(_) => {}
                }
            }
            match (running.is_empty(), failed) {
                (true, None) => return Ok(()),
                (true, Some((rank, status, _))) => return Err(Failure::Rank { rank, status }),
                (false, Some((rank, status, at))) if at.elapsed() > GRACE => {
                    self.kill();
                    return Err(Failure::Rank { rank, status });
                }
                (false, None) if start.elapsed() > limit => {
                    self.kill();
                    return Err(Failure::Limit { limit, running });
                }
                (false, _) => std::thread::sleep(POLL),
            }
        }
    }

    fn kill(&mut self) {
        for child in &mut self.children {
            // An error means that it has ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        self.kill();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sleeper(seconds: &str) -> Child {
        Command::new("sleep").arg(seconds).spawn().unwrap()
    }

    #[test]
    fn launchers_are_known_by_their_variables() {
        let by = |set: &[(&str, &str)]| {
            launched_by(|name| {
                set.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
            })
        };
        assert!(
            by(&[("WORLD_SIZE", "1")]) && by(&[("PMI_SIZE", "2")]) && by(&[("SLURM_STEP_NUM_TASKS", "2")])
        );
        assert!(!by(&[]) && !by(&[("SLURM_STEP_NUM_TASKS", "1")]));
        // A batch script of a job with four tasks.
        assert!(!by(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "4")]));
    }

    #[test]
    fn ranks_are_dealt_evenly() {
        let places: Vec<_> = (0..5).map(|r| Place::new(r, 5, 2)).map(|p| (p.node, p.local, p.of)).collect();
        assert_eq!(places, [(0, 0, 3), (0, 1, 3), (0, 2, 3), (1, 0, 2), (1, 1, 2)]);
        assert_eq!(Place::new(3, 4, 2), Place { node: 1, local: 1, of: 2 });
        for (np, nodes) in [(7, 3), (8, 8), (9, 4), (1, 1)] {
            let of: usize =
                (0..np).map(|r| Place::new(r, np, nodes)).filter(|p| p.local == 0).map(|p| p.of).sum();
            assert_eq!(of, np);
        }
    }

    #[test]
    fn the_limit_ends_the_job_and_names_who_was_running() {
        let mut ranks = Ranks { children: vec![sleeper("0"), sleeper("600")] };
        match ranks.wait(Duration::from_millis(300)) {
            Err(Failure::Limit { running, .. }) => assert_eq!(running, [1]),
            other => panic!("{other:?}"),
        }
        assert!(ranks.children[1].try_wait().unwrap().is_some(), "still running");
    }

    #[test]
    fn the_first_failure_is_named_and_the_rest_killed() {
        let bad = Command::new("false").spawn().unwrap();
        let mut ranks = Ranks { children: vec![sleeper("600"), bad] };
        match ranks.wait(Duration::from_secs(60)) {
            Err(Failure::Rank { rank, .. }) => assert_eq!(rank, 1),
            other => panic!("{other:?}"),
        }
    }
}
