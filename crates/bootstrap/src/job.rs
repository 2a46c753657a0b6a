//! A job: its ranks find one another, by MPI or by TCP, and share a store.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use smddp_core::settings::Settings;
use smddp_core::store::Store;

use crate::env::{self, Env, Vars};
use crate::error::{Error, Result};
use crate::tcp_store::{self, Identity, Listen, TcpStore};
use crate::{host, master, mpi, single};

/// Our store's ports are MASTER_PORT plus multiples of this. Not 1: people give neighbouring ports to
/// neighbouring jobs.
pub const STORE_PORT_STEP: u16 = 311;
const STORE_PORTS: u16 = 4;

/// A job as one of its ranks sees it.
#[derive(Clone)]
pub struct Job {
    pub rank: usize,
    pub size: usize,
    /// This rank's number among those of its host, where somebody said it.
    pub local_rank: Option<usize>,
    /// How many ranks this host has, where somebody said it.
    pub local_size: Option<usize>,
    /// Shared by all ranks. Its last owner's drop leaves the store; rank 0's waits up to
    /// [`tcp_store::LINGER`] for the others to have left.
    pub store: Arc<dyn Store>,
    /// Equal on all ranks, different for each run where the launcher tells runs apart.
    pub job_id: String,
    /// Which way was taken, for people.
    pub how: &'static str,
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Job(rank {} of {}, {}, id {})", self.rank, self.size, self.how, self.job_id)
    }
}

/// Finds the other ranks and waits until all of them have come.
///
/// `library_dirs`: where libraries that came as wheels lie; searched last.
///
/// # Errors
/// [`Error::Variable`] for impossible or contradicting variables; [`Error::Unreachable`], [`Error::Missing`] at
/// the deadline; [`Error::Disagree`] when ranks contradict one another; [`Error::Mpi`] when MPI alone may be used
/// and cannot.
pub fn join(settings: &Settings, library_dirs: &[PathBuf], deadline: Instant) -> Result<Job> {
    join_with(settings, library_dirs, &Vars::from_process(), deadline)
}

/// [`join`], with the variables given.
///
/// # Errors
/// As [`join`].
pub fn join_with(
    settings: &Settings,
    library_dirs: &[PathBuf],
    vars: &Vars,
    deadline: Instant,
) -> Result<Job> {
    let mode = settings.text("SMDDP_BOOTSTRAP");
    if mode == "single" {
        return Ok(single("single process, as SMDDP_BOOTSTRAP says"));
    }
    let env = env::read(vars, mode == "env")?;
    let try_mpi = mode == "mpi" || (mode == "auto" && mpi::may_know(&env, vars));
    if try_mpi {
        match mpi::world(settings, vars, &env, library_dirs, deadline) {
            Ok(world) => return join_by_mpi(&world, &env, deadline),
            Err(error) if mode == "mpi" => return Err(error),
            Err(error) => tracing::info!("not by MPI: {error}"),
        }
    }
    match (env.rank, env.size) {
        (Some(rank), Some(size)) => join_by_tcp(rank, size, &env, vars, deadline),
        _ if env.launcher.is_some() || mode == "env" => Err(Error::NoWay {
            what: "the number of ranks is not known: no MPI to ask, and no WORLD_SIZE".to_owned(),
            hint: "Set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, or SMDDP_MPI to the launcher's libmpi"
                .to_owned(),
        }),
        _ => Ok(single("single process: no launcher")),
    }
}

fn single(how: &'static str) -> Job {
    Job {
        rank: 0,
        size: 1,
        local_rank: Some(0),
        local_size: Some(1),
        store: Arc::new(single::LocalStore::new()),
        job_id: format!("{:016x}", host::random_u64()),
        how,
    }
}

fn job_id(secret: &[u8; 16]) -> String {
    // The id is shown to people, the secret is not.
    let hex: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{:016x}", host::hash(&["id", &hex]))
}

fn join_by_mpi(world: &mpi::World, env: &Env, deadline: Instant) -> Result<Job> {
    const HOW: &str = "MPI";
    if world.size == 1 {
        return Ok(single(HOW));
    }
    let records = world.records(env, deadline)?;
    let one = mpi::one_network(&records);
    let mut hosted = None;
    let word = world.by_zero(deadline, || {
        let secret = tcp_store::random_secret();
        let identity = Identity { rank: 0, size: world.size, secret };
        let store = TcpStore::host(identity, &Listen { loopback: one, ports: vec![0] }, deadline)?;
        let port = store.port().unwrap_or(0);
        let addresses = if one { vec!["127.0.0.1".to_owned()] } else { addresses_for(&records, env) };
        hosted = Some(store);
        let mut word = secret.to_vec();
        for (i, address) in addresses.iter().enumerate() {
            let space = if i > 0 { " " } else { "" };
            word.extend(format!("{space}{}", with_port(address, port)).into_bytes());
        }
        Ok(word)
    })?;
    let (secret, addresses) = word.split_first_chunk::<16>().ok_or_else(|| Error::Disagree {
        what: "rank 0 gave no address; all hosts must have the same release of this library".to_owned(),
    })?;
    let identity = Identity { rank: world.rank, size: world.size, secret: *secret };
    let store = match hosted {
        Some(store) => store,
        None => {
            let text = String::from_utf8_lossy(addresses);
            let candidates: Vec<String> = text.split(' ').map(str::to_owned).collect();
            TcpStore::connect(identity, &candidates, deadline)?
        }
    };
    store.ready(deadline)?;
    let (local_rank, local_size) = mpi::local(&records, world.rank);
    Ok(Job {
        rank: world.rank,
        size: world.size,
        local_rank: env.local_rank.or(Some(local_rank)),
        local_size: env.local_size.or(Some(local_size)),
        store: Arc::new(store),
        job_id: job_id(secret),
        how: HOW,
    })
}

/// Addresses at which other hosts may reach rank 0: what the user says first.
fn addresses_for(records: &[mpi::Record], env: &Env) -> Vec<String> {
    let mut all: Vec<String> = env.master_addr.iter().filter(|a| !is_loopback(a)).cloned().collect();
    all.extend(mpi::addresses_of_zero(records).iter().map(IpAddr::to_string));
    if all.is_empty() {
        all.push(host::name());
    }
    all
}

fn with_port(address: &str, port: u16) -> String {
    match address.parse::<IpAddr>() {
        Ok(ip) => std::net::SocketAddr::new(ip, port).to_string(),
        Err(_) => format!("{address}:{port}"),
    }
}

fn is_loopback(address: &str) -> bool {
    address == "localhost" || address.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// The ports of our store for a master port.
fn store_ports(master: u16) -> Vec<u16> {
    const LOWEST: u32 = 1024;
    let width = u32::from(u16::MAX) + 1 - LOWEST;
    let port = |k: u16| {
        let far = u32::from(master) + u32::from(k) * u32::from(STORE_PORT_STEP);
        (if far < LOWEST { far + LOWEST } else { (far - LOWEST) % width + LOWEST }) as u16
    };
    (1..=STORE_PORTS).map(port).collect()
}

fn join_by_tcp(rank: usize, size: usize, env: &Env, vars: &Vars, deadline: Instant) -> Result<Job> {
    const HOW: &str = "launcher variables and TCP";
    if size == 1 {
        return Ok(single("a job of one rank"));
    }
    let master = master::without_mpi(env, vars)?.or_else(|| master::of_slurm(env, vars));
    let Some((addr, port)) = master else {
        let name = if env.master_addr.is_none() { "MASTER_ADDR" } else { "MASTER_PORT" };
        return Err(Error::variable(
            name,
            "where rank 0 can be reached",
            "nothing",
            "Set MASTER_ADDR to a name of rank 0's host and MASTER_PORT to a free port there, on all ranks",
        ));
    };
    // Ranks that were told a port need not be of one launcher: each may be a step of its own.
    let told = !env.elastic && master::derived_port(env) != Some(port);
    let job = env.job.as_deref().filter(|_| !told).unwrap_or("");
    let secret = host::hash_16(&["job", job, &port.to_string()]);
    let identity = Identity { rank, size, secret };
    let loopback = env.one_host() || is_loopback(&addr);
    let ports = store_ports(port);
    let store = if rank == 0 {
        TcpStore::host(identity, &Listen { loopback, ports }, deadline)?
    } else {
        let addr = if loopback { "127.0.0.1" } else { &addr };
        let candidates: Vec<String> = ports.iter().map(|&port| with_port(addr, port)).collect();
        TcpStore::connect(identity, &candidates, deadline)?
    };
    store.ready(deadline)?;
    Ok(Job {
        rank,
        size,
        local_rank: env.local_rank,
        local_size: env.local_size,
        store: Arc::new(store),
        job_id: job_id(&secret),
        how: HOW,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn store_ports_are_four_distinct_ports_a_process_may_open() {
        for master in [1, 80, 1023, 1024, 7777, 29500, 60999, 65535] {
            let ports = store_ports(master);
            let distinct: std::collections::HashSet<u16> = ports.iter().copied().collect();
            assert_eq!(distinct.len(), 4, "{master}: {ports:?}");
            assert!(ports.iter().all(|&p| p >= 1024 && p != master), "{master}: {ports:?}");
        }
    }

    #[test]
    fn without_a_launcher_there_is_one_rank() {
        let soon = Instant::now() + std::time::Duration::from_secs(60);
        let job = join_with(&Settings::default(), &[], &Vars::default(), soon).unwrap();
        assert_eq!((job.rank, job.size), (0, 1));
        job.store.set("k", b"v").unwrap();
        assert_eq!(job.store.get("k", soon).unwrap(), b"v");
    }

    #[test]
    fn a_missing_master_is_named() {
        let vars = Vars::from_pairs([("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_PORT", "29500")]);
        let error = join_with(&Settings::default(), &[], &vars, Instant::now()).unwrap_err();
        assert!(matches!(&error, Error::Variable { name, .. } if name == "MASTER_ADDR"), "{error}");
    }

    /// Two ranks of one job by variables, each with some of its own.
    fn meet(each: [&[(&str, &str)]; 2]) {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let soon = Instant::now() + std::time::Duration::from_secs(20);
        let ranks = [0, 1].map(|rank: usize| {
            let (number, port) = (rank.to_string(), port.to_string());
            let mut pairs =
                vec![("RANK", number.as_str()), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1")];
            pairs.push(("MASTER_PORT", &port));
            pairs.extend(each[rank]);
            let vars = Vars::from_pairs(pairs);
            std::thread::spawn(move || {
                join_with(&Settings::default(), &[], &vars, soon).map(|job| job.job_id)
            })
        });
        let ids = ranks.map(|rank| rank.join().unwrap());
        assert!(ids[0].is_ok() && ids[0] == ids[1], "{ids:?}");
    }

    /// An agent that joined later has restarted less often than the others.
    #[test]
    fn agents_of_torchrun_may_have_counted_their_restarts_differently() {
        let run = ("TORCHELASTIC_RUN_ID", "x");
        meet([&[run, ("TORCHELASTIC_RESTART_COUNT", "1")], &[run, ("TORCHELASTIC_RESTART_COUNT", "0")]]);
    }

    /// `srun -n 1` once for each rank, with RANK and its sisters: the steps have their own numbers.
    #[test]
    fn ranks_with_a_master_in_common_may_be_steps_of_their_own() {
        let step = |id| {
            [
                ("SLURM_JOB_ID", "7"),
                ("SLURM_STEP_ID", id),
                ("SLURM_PROCID", "0"),
                ("SLURM_STEP_NUM_TASKS", "1"),
            ]
        };
        meet([&step("0"), &step("1")]);
    }

    /// Ranks as threads, by variables alone, while torch's own store sits on MASTER_PORT and a stranger on the first
    /// of our ports.
    #[test]
    fn variables_alone_suffice_beside_torchs_store() {
        let torch = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let master = torch.local_addr().unwrap().port();
        let _taken = std::net::TcpListener::bind(("127.0.0.1", store_ports(master)[0]));
        let soon = Instant::now() + std::time::Duration::from_secs(60);
        let ranks: Vec<_> = (0..3)
            .map(|rank| {
                let pairs = [
                    ("RANK", rank.to_string()),
                    ("WORLD_SIZE", "3".to_owned()),
                    ("MASTER_ADDR", "127.0.0.1".to_owned()),
                    ("MASTER_PORT", master.to_string()),
                ];
                std::thread::spawn(move || {
                    let job = join_with(&Settings::default(), &[], &Vars::from_pairs(pairs), soon).unwrap();
                    let all =
                        crate::exchange::all_gather(&*job.store, "g", rank, 3, &[rank as u8], soon).unwrap();
                    (job.job_id.clone(), all)
                })
            })
            .collect();
        let results: Vec<_> = ranks.into_iter().map(|r| r.join().unwrap()).collect();
        assert!(results.iter().all(|r| r == &results[0]), "{results:?}");
        assert_eq!(results[0].1, [[0], [1], [2]]);
    }
}
