//! What the environment says about the job: a pure function over a map of variables.
//!
//! Names are filled one by one: SageMaker sets MASTER_ADDR and MASTER_PORT but no RANK, Slurm sets no master, a
//! user may export only some. The order for each name is: torch's own (RANK, …), then the launcher's.
//!
//! Invariants:
//! 1. What is returned is consistent: `rank < size`, `local_rank < local_size <= size`.
//! 2. Torch's names and those of mpirun (Open MPI, PMI) must agree when both are there, for one of the two
//!    would make another job of it. Slurm's need not: `srun torchrun` and `srun spawn.py` start several ranks a
//!    task, and an `mpirun` inside an allocation inherits the batch step's variables. So do PMI's names where it is
//!    srun that sets them (`--mpi=pmi2`): every step has them, whatever it starts.
//! 3. Under torchrun (TORCHELASTIC_RUN_ID) only torch's names count.

use std::collections::BTreeMap;

use crate::error::{Error, Result};
use crate::slurm;

/// More ranks than any machine has; above it a value is garbage.
const MOST_RANKS: usize = 1 << 22;

/// A snapshot of environment variables. Values that are empty or not UTF-8 count as absent.
#[derive(Clone, Debug, Default)]
pub struct Vars(BTreeMap<String, String>);

impl Vars {
    /// This process's environment, now.
    pub fn from_process() -> Vars {
        Vars::from_pairs(
            std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?))),
        )
    }

    pub fn from_pairs<K: Into<String>, V: Into<String>>(pairs: impl IntoIterator<Item = (K, V)>) -> Vars {
        Vars(pairs.into_iter().map(|(k, v)| (k.into(), v.into())).collect())
    }

    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(|v| v.trim()).filter(|v| !v.is_empty())
    }

    pub fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    fn has_prefix(&self, prefix: &str) -> bool {
        self.0.range(prefix.to_owned()..).next().is_some_and(|(k, _)| k.starts_with(prefix))
    }
}

/// What started this process, when it is something that MPI or we can ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launcher {
    /// Open MPI's mpirun.
    OpenMpi,
    /// A PMI launcher: MPICH's and Intel's mpirun, Cray's.
    Pmi,
    /// srun.
    Slurm,
    /// A PMIx launcher that says our rank but not how many we are (prterun).
    Pmix,
}

impl std::fmt::Display for Launcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Launcher::OpenMpi => "mpirun (Open MPI)",
            Launcher::Pmi => "mpirun (PMI)",
            Launcher::Slurm => "srun",
            Launcher::Pmix => "a PMIx launcher",
        })
    }
}

/// The job as the variables tell it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Env {
    pub rank: Option<usize>,
    pub size: Option<usize>,
    pub local_rank: Option<usize>,
    pub local_size: Option<usize>,
    pub master_addr: Option<String>,
    pub master_port: Option<u16>,
    pub launcher: Option<Launcher>,
    /// What tells this run from another: launcher's job id, torchrun's run id. (Not its restart count, of which the
    /// agents have counts of their own.)
    pub job: Option<String>,
    /// Where the launcher's daemon of this host listens: equal on all ranks of a job's host, and on those of no other
    /// job of its network, as ids need not be (mpiruns of two containers may have one host name and one process id).
    pub daemon: Option<String>,
    /// Started by torchrun.
    pub elastic: bool,
    /// Torch's names make another world than the launcher's: several ranks a task.
    pub own_world: bool,
}

impl Env {
    /// Whether every rank is known to run on this host.
    pub fn one_host(&self) -> bool {
        self.size.is_some() && self.size == self.local_size
    }
}

/// The variables of one source.
struct Names {
    rank: &'static [&'static str],
    size: &'static [&'static str],
    local_rank: &'static [&'static str],
    local_size: &'static [&'static str],
}

const TORCH: Names = Names {
    rank: &["RANK"],
    size: &["WORLD_SIZE"],
    local_rank: &["LOCAL_RANK"],
    local_size: &["LOCAL_WORLD_SIZE"],
};

const OPEN_MPI: Names = Names {
    rank: &["OMPI_COMM_WORLD_RANK"],
    size: &["OMPI_COMM_WORLD_SIZE"],
    local_rank: &["OMPI_COMM_WORLD_LOCAL_RANK"],
    local_size: &["OMPI_COMM_WORLD_LOCAL_SIZE"],
};

const PMI: Names = Names {
    rank: &["PMI_RANK"],
    size: &["PMI_SIZE"],
    local_rank: &["MPI_LOCALRANKID", "PMI_LOCAL_RANK", "SLURM_LOCALID"],
    local_size: &["MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"],
};

const SLURM: Names = Names {
    rank: &["SLURM_PROCID"],
    size: &["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"],
    local_rank: &["SLURM_LOCALID"],
    local_size: &[],
};

const PMIX: Names = Names {
    rank: &["PMIX_RANK"],
    size: &[],
    local_rank: &["PMIX_LOCAL_RANK"],
    local_size: &["PMIX_LOCAL_SIZE"],
};

impl Launcher {
    fn names(self) -> &'static Names {
        match self {
            Launcher::OpenMpi => &OPEN_MPI,
            Launcher::Pmi => &PMI,
            Launcher::Slurm => &SLURM,
            Launcher::Pmix => &PMIX,
        }
    }

    /// Whether its ranks are MPI's ranks, each one process (invariant 2).
    fn is_mpirun(self) -> bool {
        match self {
            Launcher::OpenMpi | Launcher::Pmi => true,
            Launcher::Slurm | Launcher::Pmix => false,
        }
    }
}

/// A value and the variable it came from.
#[derive(Clone, Copy, Debug)]
struct Found {
    value: usize,
    name: &'static str,
}

fn number(vars: &Vars, names: &[&'static str], most: usize) -> Result<Option<Found>> {
    for &name in names {
        if let Some(text) = vars.get(name) {
            return match text.parse::<usize>() {
                Ok(value) if value <= most => Ok(Some(Found { value, name })),
                _ => Err(Error::variable(
                    name,
                    format!("a whole number from 0 to {most}"),
                    format!("'{text}'"),
                    "The launcher sets it; unset it if nothing of yours needs it",
                )),
            };
        }
    }
    Ok(None)
}

/// Whether PMI's names, where they are there, are srun's (invariant 2). MPICH's mpirun says more than srun does.
fn pmi_is_of_srun(vars: &Vars) -> bool {
    vars.has("SLURM_STEP_ID") && !vars.has("MPI_LOCALRANKID")
}

/// Which launcher is at work, if any.
fn launcher(vars: &Vars) -> Option<Launcher> {
    // A step of one task is a shell, say: PMI's names tell nothing of what is started there.
    let pmi_of_one = pmi_is_of_srun(vars) && vars.get("PMI_SIZE") == Some("1");
    let slurm_step =
        vars.has("SLURM_PROCID") && (vars.has("SLURM_STEP_NUM_TASKS") || vars.has("SLURM_STEP_ID"));
    if vars.has_prefix("OMPI_COMM_WORLD_") {
        Some(Launcher::OpenMpi)
    } else if !pmi_of_one && (vars.has("PMI_RANK") || vars.has("PMI_SIZE")) {
        Some(Launcher::Pmi)
    } else if slurm_step {
        Some(Launcher::Slurm)
    } else if vars.has("PMIX_RANK") && vars.has("PMIX_NAMESPACE") {
        Some(Launcher::Pmix)
    } else {
        None
    }
}

/// Reads the job from `vars`. `torch_rules`: RANK and its sisters win without question over mpirun's names.
///
/// # Errors
/// [`Error::Variable`] for a value that is no such number, a rank outside its size, a name whose sister is
/// missing, and for torch's names contradicting mpirun's.
pub fn read(vars: &Vars, torch_rules: bool) -> Result<Env> {
    let elastic = vars.has("TORCHELASTIC_RUN_ID");
    let launcher = if elastic { None } else { launcher(vars) };
    let theirs = launcher.map(Launcher::names);
    let of_srun = launcher == Some(Launcher::Pmi) && pmi_is_of_srun(vars);
    let checked = launcher.is_some_and(Launcher::is_mpirun) && !of_srun && !torch_rules;

    let pick =
        |ours: &[&'static str], of: fn(&Names) -> &'static [&'static str], most| -> Result<Option<Found>> {
            let torch = number(vars, ours, most)?;
            let other = match theirs {
                Some(names) => number(vars, of(names), most)?,
                None => None,
            };
            if let (Some(torch), Some(other), true) = (torch, other, checked)
                && torch.value != other.value
            {
                return Err(Error::variable(
                    torch.name,
                    format!("{} as {} says", other.value, other.name),
                    torch.value.to_string(),
                    "Unset the wrong one, or set SMDDP_BOOTSTRAP=env to go by RANK and WORLD_SIZE alone",
                ));
            }
            Ok(torch.or(other))
        };
    let size = pick(TORCH.size, |n| n.size, MOST_RANKS)?;
    let rank = pick(TORCH.rank, |n| n.rank, MOST_RANKS)?;
    // Where torch's names make another world than the launcher's, the launcher's places are not ours.
    let launched = match theirs {
        Some(names) => number(vars, names.size, MOST_RANKS)?,
        None => None,
    };
    let same_world = launched.is_none_or(|l| size.is_none_or(|s| s.value == l.value));
    let local = |ours: &[&'static str], of: fn(&Names) -> &'static [&'static str]| {
        if same_world { pick(ours, of, MOST_RANKS) } else { number(vars, ours, MOST_RANKS) }
    };
    let local_rank = local(TORCH.local_rank, |n| n.local_rank)?;
    let mut local_size = local(TORCH.local_size, |n| n.local_size)?;
    if local_size.is_none() && same_world {
        local_size = slurm_local_size(vars, launcher, size)?;
    }

    check_size(rank, size, launcher)?;
    check_local(local_rank, local_size, size)?;
    let value = |found: Option<Found>| found.map(|f| f.value);
    Ok(Env {
        rank: value(rank),
        size: value(size),
        local_rank: value(local_rank),
        local_size: value(local_size),
        master_addr: vars.get("MASTER_ADDR").map(str::to_owned),
        master_port: master_port(vars)?,
        launcher,
        job: job(vars),
        daemon: if elastic { None } else { vars.get("PMIX_SERVER_URI2").map(str::to_owned) },
        elastic,
        own_world: !same_world,
    })
}

fn check_size(rank: Option<Found>, size: Option<Found>, launcher: Option<Launcher>) -> Result<()> {
    let missing = |name: &str, other: &str| {
        Err(Error::variable(
            name,
            format!("a number, since {other} is set"),
            "nothing",
            "Set both, or neither to run as a single process",
        ))
    };
    match (rank, size) {
        (None, None) => Ok(()),
        (Some(rank), None) => match launcher {
            // Only MPI knows how many we are.
            Some(Launcher::Pmix) => Ok(()),
            Some(Launcher::OpenMpi | Launcher::Pmi | Launcher::Slurm) | None => {
                missing(sister(rank.name), rank.name)
            }
        },
        (None, Some(size)) => missing(sister(size.name), size.name),
        (Some(_), Some(size)) if size.value == 0 => {
            Err(Error::variable(size.name, "1 or more", "0", "It is the number of ranks in the job"))
        }
        (Some(rank), Some(size)) if rank.value >= size.value => Err(Error::variable(
            rank.name,
            format!("a rank below {}={}", size.name, size.value),
            rank.value.to_string(),
            "Ranks are counted from 0",
        )),
        (Some(_), Some(_)) => Ok(()),
    }
}

/// The variable that must accompany `name`.
fn sister(name: &str) -> &'static str {
    match name {
        "RANK" => "WORLD_SIZE",
        "WORLD_SIZE" => "RANK",
        "OMPI_COMM_WORLD_RANK" => "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_SIZE" => "OMPI_COMM_WORLD_RANK",
        "PMI_RANK" => "PMI_SIZE",
        "PMI_SIZE" => "PMI_RANK",
        "SLURM_PROCID" => "SLURM_STEP_NUM_TASKS",
        "SLURM_STEP_NUM_TASKS" | "SLURM_NTASKS" => "SLURM_PROCID",
        _ => "WORLD_SIZE",
    }
}

fn check_local(rank: Option<Found>, local: Option<Found>, size: Option<Found>) -> Result<()> {
    if let Some(local) = local
        && local.value == 0
    {
        return Err(Error::variable(local.name, "1 or more", "0", "It is the number of ranks on this host"));
    }
    if let (Some(rank), Some(local)) = (rank, local)
        && rank.value >= local.value
    {
        return Err(Error::variable(
            rank.name,
            format!("a local rank below {}={}", local.name, local.value),
            rank.value.to_string(),
            "Local ranks are counted from 0 on each host",
        ));
    }
    let Some(size) = size else { return Ok(()) };
    let outside = |found: Found, expected: String| {
        let hint = "A host cannot hold more ranks than the job has";
        Err(Error::variable(found.name, expected, found.value.to_string(), hint))
    };
    match (rank, local) {
        (_, Some(local)) if local.value > size.value => {
            outside(local, format!("at most {}={}", size.name, size.value))
        }
        (Some(rank), _) if rank.value >= size.value => {
            outside(rank, format!("less than {}={}", size.name, size.value))
        }
        _ => Ok(()),
    }
}

/// Ranks on this node from Slurm's `2(x3),1` and our node number.
fn slurm_local_size(vars: &Vars, launcher: Option<Launcher>, size: Option<Found>) -> Result<Option<Found>> {
    let under_srun = match launcher {
        Some(Launcher::Slurm) => true,
        Some(Launcher::Pmi) => pmi_is_of_srun(vars),
        Some(Launcher::OpenMpi | Launcher::Pmix) | None => false,
    };
    let Some(size) = size.filter(|_| under_srun) else { return Ok(None) };
    for name in ["SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"] {
        let Some(text) = vars.get(name) else { continue };
        let bad = |given: String| {
            Error::variable(name, "tasks per node in Slurm's form, such as 2(x3),1", given, "srun sets it")
        };
        let all = slurm::tasks_in_all(text).ok_or_else(|| bad(format!("'{text}'")))?;
        if all != size.value {
            // The job's list, not this step's.
            continue;
        }
        let Some(node) = number(vars, &["SLURM_NODEID"], MOST_RANKS)? else { return Ok(None) };
        return match slurm::tasks_on(text, node.value) {
            Some(Ok(value)) => Ok(Some(Found { value, name })),
            _ => Err(bad(format!("'{text}', which has no node {} (SLURM_NODEID)", node.value))),
        };
    }
    Ok(None)
}

fn master_port(vars: &Vars) -> Result<Option<u16>> {
    let Some(text) = vars.get("MASTER_PORT") else { return Ok(None) };
    match text.parse::<u16>() {
        Ok(port) if port > 0 => Ok(Some(port)),
        _ => Err(Error::variable(
            "MASTER_PORT",
            "a port number from 1 to 65535",
            format!("'{text}'"),
            "Any free port of rank 0's host will do",
        )),
    }
}

/// The run's identity, equal on all its ranks and on no other run's.
fn job(vars: &Vars) -> Option<String> {
    let get = |name: &str| vars.get(name).map(str::to_owned);
    if let Some(run) = get("TORCHELASTIC_RUN_ID") {
        return Some(format!("elastic {run}"));
    }
    let mpi = ["PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID"];
    let mpi = mpi.iter().find_map(|name| get(name));
    let slurm =
        get("SLURM_JOB_ID").map(|id| format!("slurm {id}.{}", get("SLURM_STEP_ID").unwrap_or_default()));
    match (mpi, slurm) {
        (Some(mpi), _) => Some(format!("mpi {mpi}")),
        // Without a step there is only the allocation, which several runs may share.
        (None, Some(slurm)) if pmi_is_of_srun(vars) => Some(slurm),
        (None, _) => None,
    }
}

#[cfg(test)]
#[path = "env_tests.rs"]
mod tests;
