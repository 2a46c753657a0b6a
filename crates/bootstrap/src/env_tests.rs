use proptest::prelude::*;

use super::*;

fn vars(pairs: &[(&str, &str)]) -> Vars {
    Vars::from_pairs(pairs.iter().copied())
}

fn job_of(pairs: &[(&str, &str)]) -> Env {
    read(&vars(pairs), false).unwrap()
}

/// The variable an error names.
fn blamed(pairs: &[(&str, &str)]) -> String {
    match read(&vars(pairs), false) {
        Err(Error::Variable { name, .. }) => name,
        other => panic!("{pairs:?} gave {other:?}"),
    }
}

const TORCHRUN: &[(&str, &str)] = &[
    ("RANK", "5"),
    ("WORLD_SIZE", "8"),
    ("LOCAL_RANK", "1"),
    ("LOCAL_WORLD_SIZE", "4"),
    ("MASTER_ADDR", "h0"),
    ("MASTER_PORT", "29500"),
    ("TORCHELASTIC_RUN_ID", "abc"),
    ("TORCHELASTIC_RESTART_COUNT", "2"),
];

const OMPI: &[(&str, &str)] = &[
    ("OMPI_COMM_WORLD_RANK", "1"),
    ("OMPI_COMM_WORLD_SIZE", "2"),
    ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
    ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
    ("PMIX_RANK", "1"),
    ("PMIX_NAMESPACE", "prterun-vm-9413@1"),
];

const HYDRA: &[(&str, &str)] = &[
    ("PMI_RANK", "2"),
    ("PMI_SIZE", "4"),
    ("MPI_LOCALRANKID", "0"),
    ("MPI_LOCALNRANKS", "2"),
    ("PMI_FD", "9"),
];

const SRUN: &[(&str, &str)] = &[
    ("SLURM_PROCID", "6"),
    ("SLURM_STEP_NUM_TASKS", "7"),
    ("SLURM_NTASKS", "7"),
    ("SLURM_LOCALID", "0"),
    ("SLURM_NODEID", "3"),
    ("SLURM_STEP_TASKS_PER_NODE", "2(x3),1"),
    ("SLURM_JOB_ID", "77"),
    ("SLURM_STEP_ID", "0"),
];

#[test]
fn nothing_is_an_empty_job() {
    assert_eq!(job_of(&[]), Env::default());
    assert_eq!(job_of(&[("RANK", ""), ("HOME", "/root")]), Env::default());
}

#[test]
fn each_launchers_names_are_read() {
    let env = job_of(TORCHRUN);
    assert_eq!((env.rank, env.size, env.local_rank, env.local_size), (Some(5), Some(8), Some(1), Some(4)));
    assert_eq!((env.launcher, env.elastic, env.one_host()), (None, true, false));
    assert_eq!(env.job.as_deref(), Some("elastic abc"));

    let env = job_of(OMPI);
    assert_eq!((env.rank, env.size, env.local_rank, env.local_size), (Some(1), Some(2), Some(1), Some(2)));
    assert_eq!((env.launcher, env.one_host()), (Some(Launcher::OpenMpi), true));
    assert_eq!(env.job.as_deref(), Some("mpi prterun-vm-9413@1"));

    let env = job_of(HYDRA);
    assert_eq!((env.rank, env.size, env.local_rank, env.local_size), (Some(2), Some(4), Some(0), Some(2)));
    assert_eq!((env.launcher, env.job), (Some(Launcher::Pmi), None));

    let env = job_of(SRUN);
    assert_eq!((env.rank, env.size, env.local_rank, env.local_size), (Some(6), Some(7), Some(0), Some(1)));
    assert_eq!((env.launcher, env.job.as_deref()), (Some(Launcher::Slurm), Some("slurm 77.0")));

    let env = job_of(&[("PMIX_RANK", "3"), ("PMIX_NAMESPACE", "x")]);
    assert_eq!((env.rank, env.size, env.launcher), (Some(3), None, Some(Launcher::Pmix)));
}

#[test]
fn names_are_filled_one_by_one() {
    // SageMaker: a master, and everything else from mpirun.
    let mut pairs = OMPI.to_vec();
    pairs.extend([("MASTER_ADDR", "algo-1"), ("MASTER_PORT", "7777")]);
    let env = job_of(&pairs);
    assert_eq!(
        (env.rank, env.master_addr.as_deref(), env.master_port),
        (Some(1), Some("algo-1"), Some(7777))
    );
    // A user's RANK, the rest from mpirun.
    let mut pairs = OMPI.to_vec();
    pairs.push(("RANK", "1"));
    assert_eq!((job_of(&pairs).rank, job_of(&pairs).size), (Some(1), Some(2)));
    // srun --mpi=pmi2: local names from Slurm.
    let mut pairs = SRUN.to_vec();
    pairs.extend([("PMI_RANK", "6"), ("PMI_SIZE", "7")]);
    let env = job_of(&pairs);
    assert_eq!((env.launcher, env.local_rank, env.local_size), (Some(Launcher::Pmi), Some(0), Some(1)));
    assert_eq!(env.job.as_deref(), Some("slurm 77.0"));
}

#[test]
fn a_batch_step_is_no_launcher() {
    let env = job_of(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "4"), ("SLURM_JOB_ID", "7")]);
    assert_eq!((env.rank, env.launcher), (None, None));
    // mpirun inside an allocation: Slurm's leftovers neither count nor contradict.
    let mut pairs = SRUN.to_vec();
    pairs.extend(OMPI);
    assert_eq!((job_of(&pairs).rank, job_of(&pairs).size), (Some(1), Some(2)));
}

/// `srun --mpi=pmi2`, or MpiDefault=pmi2: every step has PMI's names, whatever it starts.
#[test]
fn pmi_of_srun_is_not_an_mpiruns() {
    let mut step = SRUN.to_vec();
    step.extend([("PMI_RANK", "6"), ("PMI_SIZE", "7")]);
    // Several ranks a task.
    let mut pairs = step.clone();
    pairs.extend([("RANK", "9"), ("WORLD_SIZE", "14")]);
    let env = job_of(&pairs);
    assert_eq!((env.rank, env.size, env.local_rank, env.local_size), (Some(9), Some(14), None, None));
    // MPICH's mpirun within such a step is one.
    pairs.extend([("MPI_LOCALRANKID", "0"), ("MPI_LOCALNRANKS", "2")]);
    assert_eq!(blamed(&pairs), "WORLD_SIZE");
    // A step of one task is a shell, or a program of its own.
    let mut pairs = SRUN.to_vec();
    pairs.extend([("PMI_RANK", "0"), ("PMI_SIZE", "1"), ("SLURM_PROCID", "0"), ("SLURM_NODEID", "0")]);
    pairs.extend([("SLURM_STEP_NUM_TASKS", "1"), ("SLURM_STEP_TASKS_PER_NODE", "1")]);
    let env = job_of(&pairs);
    assert_eq!((env.rank, env.size, env.launcher), (Some(0), Some(1), Some(Launcher::Slurm)));
    pairs.extend([("RANK", "1"), ("WORLD_SIZE", "4")]);
    assert_eq!((job_of(&pairs).rank, job_of(&pairs).size), (Some(1), Some(4)));
}

#[test]
fn several_ranks_a_task_make_their_own_world() {
    let mut pairs = SRUN.to_vec();
    pairs.extend([("RANK", "9"), ("WORLD_SIZE", "14"), ("SLURM_LOCALID", "0")]);
    let env = job_of(&pairs);
    assert_eq!((env.rank, env.size, env.local_rank, env.local_size), (Some(9), Some(14), None, None));
}

#[test]
fn impossible_values_are_refused_by_name() {
    for (name, value) in [
        ("RANK", "-1"),
        ("RANK", "two"),
        ("RANK", "1.0"),
        ("RANK", "99999999999999999999"),
        ("RANK", "8"),
        ("WORLD_SIZE", "0"),
        ("LOCAL_RANK", "4"),
        ("LOCAL_WORLD_SIZE", "9"),
        ("LOCAL_WORLD_SIZE", "0"),
        ("MASTER_PORT", "0"),
        ("MASTER_PORT", "65536"),
        ("MASTER_PORT", "http"),
    ] {
        let mut pairs = TORCHRUN.to_vec();
        pairs.push((name, value));
        assert_eq!(blamed(&pairs), name, "{value}");
    }
    let mut pairs = SRUN.to_vec();
    pairs.push(("SLURM_STEP_TASKS_PER_NODE", "2(x3"));
    assert_eq!(blamed(&pairs), "SLURM_STEP_TASKS_PER_NODE");
    let mut pairs = SRUN.to_vec();
    pairs.push(("SLURM_NODEID", "4"));
    assert_eq!(blamed(&pairs), "SLURM_STEP_TASKS_PER_NODE");
    let mut pairs = SRUN.to_vec();
    pairs.push(("SLURM_PROCID", "7"));
    assert_eq!(blamed(&pairs), "SLURM_PROCID");
    assert_eq!(blamed(&[("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "2")]), "LOCAL_RANK");
}

#[test]
fn half_a_pair_names_the_missing_half() {
    assert_eq!(blamed(&[("RANK", "0")]), "WORLD_SIZE");
    assert_eq!(blamed(&[("WORLD_SIZE", "2")]), "RANK");
    assert_eq!(blamed(&[("OMPI_COMM_WORLD_RANK", "0")]), "OMPI_COMM_WORLD_SIZE");
    assert_eq!(blamed(&[("PMI_SIZE", "2")]), "PMI_RANK");
    assert_eq!(blamed(&[("SLURM_PROCID", "0"), ("SLURM_STEP_ID", "1")]), "SLURM_STEP_NUM_TASKS");
}

#[test]
fn torch_and_mpirun_must_agree_unless_torch_rules() {
    for (base, name, value) in
        [(OMPI, "RANK", "0"), (OMPI, "WORLD_SIZE", "4"), (HYDRA, "RANK", "0"), (OMPI, "LOCAL_RANK", "0")]
    {
        let mut pairs = base.to_vec();
        pairs.push((name, value));
        match read(&vars(&pairs), false) {
            Err(Error::Variable { name: blamed, expected, given, .. }) => {
                assert_eq!((blamed.as_str(), given.as_str()), (name, value));
                assert!(expected.contains("OMPI_") || expected.contains("PMI_"), "{expected}");
            }
            other => panic!("{other:?}"),
        }
    }
    let mut pairs = OMPI.to_vec();
    pairs.extend([("RANK", "3"), ("WORLD_SIZE", "4")]);
    let env = read(&vars(&pairs), true).unwrap();
    assert_eq!((env.rank, env.size, env.local_rank), (Some(3), Some(4), None));
}

#[test]
fn under_torchrun_mpirun_is_not_asked() {
    let mut pairs = TORCHRUN.to_vec();
    pairs.extend(OMPI);
    assert_eq!((job_of(&pairs).rank, job_of(&pairs).launcher), (Some(5), None));
}

proptest! {
    /// Whatever the values, reading ends in a typed error or in a consistent job (invariant 1).
    #[test]
    fn any_values_end_in_an_error_or_a_consistent_job(
        picks in prop::collection::vec((0usize..24, prop_oneof![
            (0u32..6).prop_map(|n| n.to_string()), "[-x0-9(),]{0,5}".prop_map(|s| s)
        ]), 0..14),
        torch_rules: bool,
    ) {
        const NAMES: [&str; 24] = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT",
            "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
            "OMPI_COMM_WORLD_LOCAL_SIZE", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS",
            "PMIX_RANK", "PMIX_NAMESPACE", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS",
            "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_ID", "SLURM_JOB_ID",
            "TORCHELASTIC_RUN_ID"];
        let vars = Vars::from_pairs(picks.into_iter().map(|(i, v)| (NAMES[i], v)));
        if let Ok(env) = read(&vars, torch_rules) {
            if let (Some(rank), Some(size)) = (env.rank, env.size) { prop_assert!(rank < size); }
            if let (Some(l), Some(n)) = (env.local_rank, env.local_size) { prop_assert!(l < n); }
            if let (Some(n), Some(size)) = (env.local_size, env.size) { prop_assert!(n <= size); }
            prop_assert!(env.rank.is_some() || env.size.is_none());
        }
    }
}
