//! The job's master, an address and a port, as far as it is known without asking anybody.

use crate::env::{Env, Launcher, Vars};
use crate::error::{Error, Result};
use crate::{host, slurm};

/// The master as far as variables tell it, for one host or several.
pub(crate) fn without_mpi(env: &Env, vars: &Vars) -> Result<Option<(String, u16)>> {
    if let (Some(addr), Some(port)) = (&env.master_addr, env.master_port) {
        return Ok(Some((addr.clone(), port)));
    }
    let sagemaker = vars.get("SMDATAPARALLEL_SERVER_ADDR");
    // SageMaker's own containers take the port after the next of its server's.
    let sagemaker_port = match vars.get("SMDATAPARALLEL_SERVER_PORT") {
        Some(text) => match text.parse::<u16>().ok().and_then(|port| port.checked_add(2)) {
            Some(port) => Some(port),
            None => {
                return Err(Error::variable(
                    "SMDATAPARALLEL_SERVER_PORT",
                    "a port number",
                    format!("'{text}'"),
                    "Set MASTER_ADDR and MASTER_PORT instead",
                ));
            }
        },
        None => None,
    };
    let single = env.one_host() || env.size == Some(1);
    let addr = env.master_addr.as_deref().or(sagemaker).or(single.then_some("127.0.0.1"));
    let port = env.master_port.or(sagemaker.and(sagemaker_port)).or_else(|| derived_port(env));
    Ok(addr.map(str::to_owned).zip(port))
}

/// The port that the launcher's job id gives, where there is one; on a single host its process will do. Hosts have daemons of
/// their own, so where there are several these do not count.
pub(crate) fn derived_port(env: &Env) -> Option<u16> {
    let single = env.one_host() || env.size == Some(1);
    let job = match (&env.job, &env.daemon) {
        (Some(job), Some(daemon)) if single => format!("{job} of {daemon}"),
        (Some(job), _) => job.clone(),
        (None, _) if single => launcher_id(env)?,
        (None, _) => return None,
    };
    Some(host::derived_port(&job, single))
}

/// Identity of the launcher's process on this host.
fn launcher_id(env: &Env) -> Option<String> {
    let marker = match env.launcher? {
        Launcher::OpenMpi => "OMPI_COMM_WORLD_RANK",
        Launcher::Pmi => "PMI_RANK",
        Launcher::Slurm => "SLURM_PROCID",
        Launcher::Pmix => "PMIX_RANK",
    };
    Some(host::launcher_process(marker)?.id)
}

/// Slurm's first node, where rank 0 runs in every usual distribution, and a port derived from the job.
pub(crate) fn of_slurm(env: &Env, vars: &Vars) -> Option<(String, u16)> {
    env.job.as_ref()?;
    let list = ["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"];
    let node = list.iter().find_map(|name| slurm::first_host(vars.get(name)?))?;
    let addr = env.master_addr.clone().unwrap_or(node);
    Some((addr, env.master_port.or_else(|| derived_port(env))?))
}
