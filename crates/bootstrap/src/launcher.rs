//! Torch's variables from a bare mpirun's or srun's: what `import smdistributed_rs` exports.

use std::path::PathBuf;
use std::time::Instant;

use smddp_core::settings::Settings;

use crate::env::{self, Env, Launcher, Vars};
use crate::error::{Error, Result};
use crate::{host, master, mpi};

/// The variables torch needs and does not find: of RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR,
/// MASTER_PORT those that are missing. Nothing outside of a launcher, nothing under torchrun, and nothing in a shell that
/// srun has started (`srun --pty`): what is started there has ranks of its own, and would take the shell's for them.
///
/// The master, where it is not given, is the same on all ranks:
/// - one host: 127.0.0.1, and a port derived from the launcher's job id and where its daemon listens (or from the
///   launcher's process where, as with MPICH, there is no id), outside the host's ephemeral range. Two jobs of one host meet
///   on a port by a chance of 1 in 20 000 or so; torch then reports the address in use. MPI is not started for this.
/// - several hosts: SMDATAPARALLEL_SERVER_ADDR where SageMaker sets it; else rank 0 chooses its address and a free port, and
///   tells all by MPI; without MPI, Slurm's first node and a port derived from the job's id.
///
/// # Errors
/// [`Error::Variable`] for contradicting or impossible variables, [`Error::NoWay`] when nobody can tell the
/// master, with what to set.
pub fn launcher_env(settings: &Settings, dirs: &[PathBuf], vars: &Vars) -> Result<Vec<(String, String)>> {
    let mode = settings.text("SMDDP_BOOTSTRAP");
    let env = env::read(vars, mode == "env")?;
    let is_shell = env.launcher == Some(Launcher::Slurm) && env.size == Some(1) && vars.has("SLURM_PTY_PORT");
    if env.launcher.is_none() || mode == "single" || is_shell {
        return Ok(Vec::new());
    }
    let master = master::without_mpi(&env, vars)?;
    // An MPI that was not told of its job may end the process instead of saying so.
    let no_mpi = mode == "env" || (mode != "mpi" && !mpi::may_know(&env, vars));
    let known = env.size.is_some() && (master.is_some() || no_mpi);
    let places = if known {
        Places { env: env.clone(), master: master.or_else(|| master::of_slurm(&env, vars)) }
    } else {
        match ask_mpi(settings, dirs, vars, &env) {
            Ok(places) => Places { master: master.or(places.master), ..places },
            Err(error) => Places { env: env.clone(), master: Some(fall_back(&env, vars, error)?) },
        }
    };
    let Some((addr, port)) = places.master else {
        return Err(no_master("no variable tells it, and MPI is ruled out here"));
    };
    let number = |n: Option<usize>| n.map(|n| n.to_string());
    let all = [
        ("RANK", number(places.env.rank)),
        ("WORLD_SIZE", number(places.env.size)),
        ("LOCAL_RANK", number(places.env.local_rank)),
        ("LOCAL_WORLD_SIZE", number(places.env.local_size)),
        ("MASTER_ADDR", Some(addr)),
        ("MASTER_PORT", Some(port.to_string())),
    ];
    let missing = all.into_iter().filter(|(name, _)| !vars.has(name));
    Ok(missing.filter_map(|(name, value)| Some((name.to_owned(), value?))).collect())
}

/// Every rank's place and the job's master.
struct Places {
    env: Env,
    master: Option<(String, u16)>,
}

fn ask_mpi(settings: &Settings, dirs: &[PathBuf], vars: &Vars, env: &Env) -> Result<Places> {
    let deadline = Instant::now() + settings.seconds("SMDDP_TIMEOUT");
    let world = mpi::world(settings, vars, env, dirs, deadline)?;
    let records = world.records(env, deadline)?;
    let one = mpi::one_network(&records);
    let word = world.by_zero(deadline, || {
        let addr = match &env.master_addr {
            Some(addr) => addr.clone(),
            None if one => "127.0.0.1".to_owned(),
            None => {
                let found = mpi::addresses_of_zero(&records);
                found.first().ok_or_else(|| no_master("rank 0 finds no address of its own"))?.to_string()
            }
        };
        let port = env.master_port.or_else(host::free_port);
        let port = port.ok_or_else(|| no_master("rank 0 finds no free port"))?;
        Ok(format!("{port} {addr}").into_bytes())
    })?;
    let word = String::from_utf8_lossy(&word);
    let master = word.split_once(' ').and_then(|(port, addr)| Some((addr.to_owned(), port.parse().ok()?)));
    let (local_rank, local_size) = mpi::local(&records, world.rank);
    Ok(Places {
        env: Env {
            rank: Some(world.rank),
            size: Some(world.size),
            local_rank: env.local_rank.or(Some(local_rank)),
            local_size: env.local_size.or(Some(local_size)),
            ..env.clone()
        },
        master,
    })
}

fn fall_back(env: &Env, vars: &Vars, error: Error) -> Result<(String, u16)> {
    match (env.size, master::of_slurm(env, vars)) {
        (Some(_), Some(master)) => Ok(master),
        _ => Err(no_master(&error.to_string())),
    }
}

fn no_master(why: &str) -> Error {
    Error::NoWay {
        what: format!("the ranks cannot agree on a master address: {}", why.trim_end_matches('.')),
        hint: "Set MASTER_ADDR to a name of rank 0's host and MASTER_PORT to a free port there, on all ranks"
            .to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exported(pairs: &[(&str, &str)]) -> std::collections::BTreeMap<String, String> {
        let mut settings = Settings::default();
        // No test process may start MPI.
        settings.set("SMDDP_MPI", "/nonexistent/libmpi.so").unwrap();
        launcher_env(&settings, &[], &Vars::from_pairs(pairs.iter().copied())).unwrap().into_iter().collect()
    }

    fn ompi(rank: &'static str) -> Vec<(&'static str, &'static str)> {
        vec![
            ("OMPI_COMM_WORLD_RANK", rank),
            ("OMPI_COMM_WORLD_SIZE", "2"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", rank),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
            ("PMIX_NAMESPACE", "prterun-vm-1@1"),
        ]
    }

    #[test]
    fn outside_of_a_launcher_and_under_torchrun_there_is_nothing() {
        assert!(exported(&[]).is_empty());
        assert!(exported(&[("RANK", "0"), ("WORLD_SIZE", "1")]).is_empty());
        let mut torchrun = ompi("1");
        torchrun.extend([("TORCHELASTIC_RUN_ID", "x"), ("RANK", "0"), ("WORLD_SIZE", "1")]);
        assert!(exported(&torchrun).is_empty());
    }

    #[test]
    fn one_host_gets_all_six_and_the_same_master_on_all_ranks() {
        let (zero, one) = (exported(&ompi("0")), exported(&ompi("1")));
        assert_eq!(zero.len(), 6);
        assert_eq!((zero["RANK"].as_str(), one["RANK"].as_str()), ("0", "1"));
        assert_eq!((one["LOCAL_RANK"].as_str(), one["LOCAL_WORLD_SIZE"].as_str()), ("1", "2"));
        assert_eq!(one["MASTER_ADDR"], "127.0.0.1");
        assert_eq!(zero["MASTER_PORT"], one["MASTER_PORT"]);
        let mut other = ompi("0");
        other.push(("PMIX_NAMESPACE", "prterun-vm-2@1"));
        assert_ne!(exported(&other)["MASTER_PORT"], zero["MASTER_PORT"]);
    }

    /// Two containers in the host's network: both mpiruns have its name, and the same process id.
    #[test]
    fn jobs_of_one_id_on_one_host_have_ports_of_their_own() {
        let at = |daemon, size| {
            let mut pairs = ompi("0");
            pairs.extend([("OMPI_COMM_WORLD_SIZE", size), ("PMIX_SERVER_URI2", daemon)]);
            pairs.push(("SMDATAPARALLEL_SERVER_ADDR", "algo-1"));
            exported(&pairs)["MASTER_PORT"].clone()
        };
        let (one, other) =
            ("prterun-vm-1@0.0;tcp4://127.0.0.1:4001", "prterun-vm-1@0.0;tcp4://127.0.0.1:4002");
        assert_eq!(at(one, "2"), at(one, "2"));
        assert_ne!(at(one, "2"), at(other, "2"));
        assert_eq!(at(one, "4"), at(other, "4"), "hosts have daemons of their own");
    }

    /// Lightning, say, takes LOCAL_RANK for the sign that ranks were started already.
    #[test]
    fn a_shell_of_srun_is_left_alone() {
        let step = [
            ("SLURM_PROCID", "0"),
            ("SLURM_STEP_NUM_TASKS", "1"),
            ("SLURM_LOCALID", "0"),
            ("SLURM_NODEID", "0"),
            ("SLURM_STEP_NODELIST", "n1"),
            ("SLURM_JOB_ID", "9"),
            ("SLURM_STEP_ID", "0"),
        ];
        assert_eq!(exported(&step)["WORLD_SIZE"], "1");
        let mut shell = step.to_vec();
        shell.push(("SLURM_PTY_PORT", "40001"));
        assert!(exported(&shell).is_empty());
        // What it starts itself may still lack a master.
        shell.extend([("RANK", "1"), ("WORLD_SIZE", "2")]);
        assert!(exported(&shell).contains_key("MASTER_PORT"));
    }

    #[test]
    fn what_is_there_is_left_alone() {
        let mut pairs = ompi("1");
        pairs.extend([("MASTER_ADDR", "algo-1"), ("MASTER_PORT", "7777"), ("LOCAL_RANK", "1")]);
        let names: Vec<String> = exported(&pairs).into_keys().collect();
        assert_eq!(names, ["LOCAL_WORLD_SIZE", "RANK", "WORLD_SIZE"]);
    }

    #[test]
    fn several_hosts_use_sagemakers_server_or_slurms_first_node() {
        let mut pairs = ompi("1");
        pairs.extend([("OMPI_COMM_WORLD_SIZE", "4"), ("SMDATAPARALLEL_SERVER_ADDR", "algo-1")]);
        pairs.push(("SMDATAPARALLEL_SERVER_PORT", "7592"));
        let all = exported(&pairs);
        assert_eq!((all["MASTER_ADDR"].as_str(), all["MASTER_PORT"].as_str()), ("algo-1", "7594"));

        let srun = [
            ("SLURM_PROCID", "2"),
            ("SLURM_STEP_NUM_TASKS", "4"),
            ("SLURM_LOCALID", "0"),
            ("SLURM_NODEID", "1"),
            ("SLURM_STEP_TASKS_PER_NODE", "2(x2)"),
            ("SLURM_STEP_NODELIST", "gpu[07-08]"),
            ("SLURM_JOB_ID", "9"),
            ("SLURM_STEP_ID", "0"),
        ];
        let all = exported(&srun);
        assert_eq!((all["MASTER_ADDR"].as_str(), all["LOCAL_WORLD_SIZE"].as_str()), ("gpu07", "2"));
        let vars = Vars::from_pairs(srun);
        assert!(
            !mpi::may_know(&env::read(&vars, false).unwrap(), &vars),
            "MPI is not started under a plain srun"
        );
    }

    #[test]
    fn without_any_way_the_error_says_what_to_set() {
        let mut pairs = ompi("1");
        pairs.push(("OMPI_COMM_WORLD_SIZE", "4"));
        for (name, value) in [("SMDDP_MPI", "/nonexistent/libmpi.so"), ("SMDDP_BOOTSTRAP", "env")] {
            let mut settings = Settings::default();
            settings.set(name, value).unwrap();
            let error =
                launcher_env(&settings, &[], &Vars::from_pairs(pairs.clone())).unwrap_err().to_string();
            assert!(error.contains("Set MASTER_ADDR") && error.contains("MASTER_PORT"), "{error}");
        }
    }
}
