//! MPI as the way to find each other: one exchange of addresses, then nothing until the end of the process.
//!
//! Invariants:
//! 1. MPI is initialised at most once, and finalised only if we initialised it and nobody else finalised it.
//! 2. MPI calls have no deadline of their own. Each runs under a watchdog that ends the process, with a message,
//!    when the deadline passes: an MPI call cannot be taken back.
//! 3. MPI is used by the thread that called in; [`finalize`] belongs on the same thread (FUNNELED).
//! 4. What one rank decides for all is decided after an exchange, by all alike, or sent by rank 0 with its error if
//!    it failed: no rank is left waiting in an MPI call another will not make.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use smddp_core::process;
use smddp_core::settings::Settings;
use smddp_mpi_sys::{Abi, Family, Mpi, Search};

use crate::env::{Env, Launcher, Vars};
use crate::error::{Error, Result};
use crate::host::{self, MOST_ADDRESSES};

/// The MPI of this process, once it was used.
struct Loaded {
    mpi: &'static Mpi,
    /// We called MPI_Init, in this process (not in one it was forked from).
    ours: Option<u32>,
}

/// How long the end of a process whose job has failed waits for the other ranks: they may never come to theirs.
const AFTER_FAILURE: Duration = Duration::from_secs(30);

static LOADED: Mutex<Option<Loaded>> = Mutex::new(None);

/// An initialised MPI that agrees with the launcher's variables.
pub(crate) struct World {
    pub(crate) mpi: &'static Mpi,
    pub(crate) rank: usize,
    pub(crate) size: usize,
}

impl From<smddp_mpi_sys::Error> for Error {
    fn from(error: smddp_mpi_sys::Error) -> Error {
        let hint = match &error {
            smddp_mpi_sys::Error::NotFound { .. } => {
                "Set SMDDP_MPI to the libmpi of the mpirun in use, or SMDDP_BOOTSTRAP=env to do without MPI"
            }
            smddp_mpi_sys::Error::Symbol { .. } => "Set SMDDP_MPI to a complete libmpi",
            smddp_mpi_sys::Error::Call { .. } | smddp_mpi_sys::Error::Buffer { .. } => {
                "Set SMDDP_BOOTSTRAP=env to do without MPI"
            }
        };
        Error::Mpi { reason: error.to_string(), hint: hint.to_owned() }
    }
}

/// Whether this was started in a way in which MPI knows the job.
pub(crate) fn may_know(env: &Env, vars: &Vars) -> bool {
    let launched = match env.launcher {
        Some(Launcher::OpenMpi | Launcher::Pmi | Launcher::Pmix) => true,
        // Under a plain srun each task would be an MPI job of its own.
        Some(Launcher::Slurm) => vars.has("PMIX_RANK"),
        None => false,
    };
    launched && !env.own_world && env.size != Some(1)
}

/// Where to look for the launcher's MPI.
pub(crate) fn search(settings: &Settings, vars: &Vars, env: &Env, dirs: &[PathBuf]) -> Search {
    let explicit = settings.text("SMDDP_MPI");
    let (family, marker) = match env.launcher {
        Some(Launcher::OpenMpi) => (Some(Family::OpenMpi), "OMPI_COMM_WORLD_RANK"),
        Some(Launcher::Pmix) => (Some(Family::OpenMpi), "PMIX_RANK"),
        Some(Launcher::Pmi) => (Some(Family::Pmi), "PMI_RANK"),
        Some(Launcher::Slurm) => (vars.has("PMIX_RANK").then_some(Family::OpenMpi), "SLURM_PROCID"),
        None => (None, ""),
    };
    let launcher = env.launcher.and_then(|_| host::launcher_process(marker)?.program);
    let mut prefixes: Vec<PathBuf> = vars.get("OPAL_PREFIX").map(PathBuf::from).into_iter().collect();
    if env.launcher.is_some() {
        prefixes.extend(mpirun_prefixes(vars.get("PATH").unwrap_or_default()));
    }
    Search {
        explicit: (!explicit.is_empty()).then(|| PathBuf::from(explicit)),
        family,
        launcher,
        prefixes,
        dirs: dirs.to_vec(),
    }
}

/// The install prefixes of the first mpirun on `path`: where it lies, and where it points to.
fn mpirun_prefixes(path: &str) -> Vec<PathBuf> {
    let found = std::env::split_paths(path).map(|dir| dir.join("mpirun")).find(|file| file.is_file());
    let Some(file) = found else { return Vec::new() };
    let prefix = |file: &Path| file.parent().and_then(Path::parent).map(Path::to_path_buf);
    let mut prefixes: Vec<PathBuf> = prefix(&file).into_iter().collect();
    if let Some(real) = std::fs::canonicalize(&file).ok().as_deref().and_then(prefix)
        && !prefixes.contains(&real)
    {
        prefixes.push(real);
    }
    prefixes
}

/// Loads MPI, initialises it unless somebody has, and checks that it is the launcher's.
///
/// # Errors
/// [`Error::Mpi`] when there is none, it is finalised already, or it does not know the job the launcher started.
/// All ranks see the same of these where all hosts have the same software.
pub(crate) fn world(
    settings: &Settings,
    vars: &Vars,
    env: &Env,
    dirs: &[PathBuf],
    deadline: Instant,
) -> Result<World> {
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    let loaded = match &mut *loaded {
        Some(loaded) => loaded,
        none => {
            let mpi = Box::leak(Box::new(Mpi::load(&search(settings, vars, env, dirs))?));
            none.insert(Loaded { mpi, ours: None })
        }
    };
    let mpi = loaded.mpi;
    if mpi.finalized()? {
        return Err(Error::Mpi {
            reason: "it was finalised already, and cannot be started twice in a process".to_owned(),
            hint: "Set SMDDP_BOOTSTRAP=env, or finalise MPI at the end of the program".to_owned(),
        });
    }
    let foreign = |says: String| Error::Mpi {
        reason: format!("{} {says}: it belongs to another launcher", mpi.path().display()),
        hint: "Set SMDDP_MPI to the libmpi of the mpirun in use, or SMDDP_BOOTSTRAP=env to do without MPI"
            .to_owned(),
    };
    if env.launcher == Some(Launcher::OpenMpi) && mpi.abi() != Abi::OpenMpi {
        // MPICH would not return from MPI_Init: it ends the process where it meets PMIx instead of PMI.
        return Err(foreign(format!("has the {}, the job was started by Open MPI", mpi.abi())));
    }
    if !mpi.initialized()? {
        watched("MPI_Init_thread", deadline, || mpi.init())?;
        loaded.ours = Some(std::process::id());
    }
    let (rank, size) = (mpi.rank()?, mpi.size()?);
    tracing::debug!("rank {rank} of {size} by {} ({}, {})", mpi.version()?, mpi.abi(), mpi.path().display());
    match env.size {
        Some(expected) if expected != size => {
            Err(foreign(format!("says the job has {size} ranks, the launcher says {expected}")))
        }
        _ => Ok(World { mpi, rank, size }),
    }
}

/// Runs an MPI call under the deadline (invariant 2).
fn watched<T, E: Into<Error>>(
    what: &'static str,
    deadline: Instant,
    call: impl FnOnce() -> Result<T, E>,
) -> Result<T, Error> {
    let (done, waiting) = channel::<()>();
    let watchdog = std::thread::Builder::new().name("smddp-mpi-watch".to_owned()).spawn(move || {
        let left = deadline.saturating_duration_since(Instant::now());
        match waiting.recv_timeout(left) {
            Ok(()) | Err(RecvTimeoutError::Disconnected) => {}
            Err(RecvTimeoutError::Timeout) => {
                eprintln!(
                    "smddp: {what} did not return within {:.0} s; ending this process. Some rank has not come to the same \
                     point: look at the other ranks' output, or raise SMDDP_TIMEOUT",
                    left.as_secs_f64()
                );
                std::process::abort();
            }
        }
    });
    let thread = watchdog.map_err(|error| Error::Mpi {
        reason: format!("no thread to watch over {what}: {error}"),
        hint: "Raise the process limit (ulimit -u)".to_owned(),
    })?;
    let result = call();
    drop(done);
    // It ends as soon as the channel closes.
    let _ = thread.join();
    result.map_err(Into::into)
}

/// How long [`finalize`] may wait. At a clean end as long as an operation may (SMDDP_TIMEOUT): a rank that still writes a
/// last checkpoint is late, not lost, and mpirun would end it if another rank gave up. Not for long where any group has failed.
pub fn finalize_limit(settings: &Settings) -> Duration {
    limit_after(settings, process::has_failed())
}

fn limit_after(settings: &Settings, failed: bool) -> Duration {
    if failed { AFTER_FAILURE } else { settings.seconds("SMDDP_TIMEOUT").max(AFTER_FAILURE) }
}

/// Finalises MPI if it was us who initialised it and nobody has taken the [`duty`]; else, and the second time, does
/// nothing. See [`Duty::finalize`].
///
/// # Errors
/// [`Error::Mpi`] when MPI refused.
pub fn finalize(limit: Duration) -> Result<()> {
    duty().map_or(Ok(()), |duty| duty.finalize(limit))
}

/// That MPI is to be finalised in this process, by whoever has this.
#[derive(Debug)]
pub struct Duty {
    mpi: &'static Mpi,
    /// A forked child has a copy, and no duty.
    process: u32,
}

/// Takes the duty to finalise MPI, if it was us who initialised it: from now on [`finalize`] does nothing. For who
/// knows better than a drop whether the process comes to a normal end.
pub fn duty() -> Option<Duty> {
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    let loaded = loaded.as_mut()?;
    let process = loaded.ours.take_if(|process| *process == std::process::id())?;
    Some(Duty { mpi: loaded.mpi, process })
}

impl Duty {
    /// For the normal end of a process, on the thread that joined: MPI waits there for every rank. After `limit` the process
    /// is ended; see [`finalize_limit`].
    ///
    /// After an abnormal end (an exception, a panic) do not call it: the other ranks are not at their end, and mpirun ends
    /// the job by itself when a rank goes without it.
    ///
    /// # Errors
    /// [`Error::Mpi`] when MPI refused.
    pub fn finalize(self, limit: Duration) -> Result<()> {
        if self.process == std::process::id() && !self.mpi.finalized()? {
            watched("MPI_Finalize", Instant::now() + limit, || self.mpi.finalize())?;
        }
        Ok(())
    }
}

/// The MPI this process uses, for people: name and version, ABI, file. `None` until it was used.
pub fn description() -> Option<String> {
    let loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    Some(describe(loaded.as_ref()?.mpi))
}

/// The MPI that [`crate::join`] would use if this process were started by a launcher, as [`description`] has it. It is
/// loaded, but not initialised.
///
/// # Errors
/// [`Error::Mpi`] when none is found, [`Error::Variable`] for impossible launcher variables.
pub fn found(settings: &Settings, dirs: &[PathBuf]) -> Result<String> {
    let vars = Vars::from_process();
    let mut search = search(settings, &vars, &crate::env::read(&vars, false)?, dirs);
    search.prefixes.extend(mpirun_prefixes(vars.get("PATH").unwrap_or_default()));
    Ok(describe(&Mpi::load(&search)?))
}

fn describe(mpi: &Mpi) -> String {
    let version = mpi.version().unwrap_or_default();
    // Open MPI's text goes on with the builder's name, MPICH's with its whole configuration.
    let version = version.split([',', '\n']).next().unwrap_or_default().trim();
    format!("{version} ({}, {})", mpi.abi(), mpi.path().display())
}

/// What each rank tells the others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    /// See [`host::loopback_identity`].
    pub(crate) network: [u8; 16],
    /// The rank the launcher's variables give, if any.
    pub(crate) claimed: Option<usize>,
    /// See [`host::addresses`].
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) host: String,
}

const RECORD: usize = 16 + 8 + 1 + 16 * MOST_ADDRESSES + 1 + 255;
/// What rank 0 tells all: status, length, text.
const WORD: usize = 1024;

impl Record {
    fn of_this(env: &Env) -> Record {
        Record {
            network: host::loopback_identity(),
            claimed: env.rank,
            addresses: host::addresses(),
            host: host::name(),
        }
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = self.network.to_vec();
        out.extend(self.claimed.map_or(u64::MAX, |r| r as u64).to_le_bytes());
        // IPv4 as mapped into IPv6.
        let addresses = &self.addresses[..self.addresses.len().min(MOST_ADDRESSES)];
        out.push(addresses.len() as u8);
        for address in addresses {
            let address = match address {
                IpAddr::V4(ip) => ip.to_ipv6_mapped(),
                IpAddr::V6(ip) => *ip,
            };
            out.extend(address.octets());
        }
        let name = &self.host.as_bytes()[..self.host.len().min(255)];
        out.push(name.len() as u8);
        out.extend(name);
        out.resize(RECORD, 0);
        out
    }

    fn decode(bytes: &[u8]) -> Option<Record> {
        let (network, rest) = bytes.split_first_chunk::<16>()?;
        let (claimed, rest) = rest.split_first_chunk::<8>()?;
        let (&count, rest) = rest.split_first()?;
        let (addresses, rest) = rest.split_at_checked(usize::from(count) * 16)?;
        let address = |bytes: &[u8]| Some(IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?).to_canonical());
        let (&length, rest) = rest.split_first()?;
        let claimed = u64::from_le_bytes(*claimed);
        Some(Record {
            network: *network,
            claimed: (claimed != u64::MAX).then_some(claimed as usize),
            addresses: addresses.chunks_exact(16).filter_map(address).collect(),
            host: String::from_utf8_lossy(rest.get(..usize::from(length))?).into_owned(),
        })
    }
}

impl World {
    /// Everybody's record, in rank order.
    ///
    /// # Errors
    /// [`Error::Disagree`] on every rank when somebody's variables give another rank than MPI does.
    pub(crate) fn records(&self, env: &Env, deadline: Instant) -> Result<Vec<Record>> {
        let mine = Record::of_this(env).encode();
        let all = watched("MPI_Allgather", deadline, || self.mpi.all_gather(&mine))?;
        let records: Option<Vec<Record>> = all.iter().map(|bytes| Record::decode(bytes)).collect();
        let records = records.ok_or_else(|| Error::Mpi {
            reason: "the ranks' records cannot be read".to_owned(),
            hint: "Use the same release of this library on all hosts".to_owned(),
        })?;
        for (rank, record) in records.iter().enumerate() {
            if let Some(claimed) = record.claimed
                && claimed != rank
            {
                return Err(Error::Disagree {
                    what: format!(
                        "rank {rank} by MPI (on {}) is rank {claimed} by its environment. Unset RANK, or set SMDDP_BOOTSTRAP=env",
                        record.host
                    ),
                });
            }
        }
        Ok(records)
    }

    /// Rank 0's `choose`, on all ranks; its error too.
    pub(crate) fn by_zero(
        &self,
        deadline: Instant,
        choose: impl FnOnce() -> Result<Vec<u8>>,
    ) -> Result<Vec<u8>> {
        let mut failure = None;
        let mut word = vec![0u8; WORD];
        if self.rank == 0 {
            let (status, mut text) = match choose() {
                Ok(bytes) => (1, bytes),
                Err(error) => {
                    let text = error.to_string().into_bytes();
                    failure = Some(error);
                    (0, text)
                }
            };
            text.truncate(WORD - 3);
            word[0] = status;
            word[1..3].copy_from_slice(&(text.len() as u16).to_le_bytes());
            word[3..3 + text.len()].copy_from_slice(&text);
        }
        watched("MPI_Bcast", deadline, || self.mpi.bcast(&mut word, 0))?;
        if let Some(error) = failure {
            return Err(error);
        }
        let length = usize::from(u16::from_le_bytes([word[1], word[2]]));
        let text = word.get(3..3 + length).unwrap_or_default().to_vec();
        match word[0] {
            1 => Ok(text),
            _ => Err(Error::Disagree { what: format!("rank 0 failed: {}", String::from_utf8_lossy(&text)) }),
        }
    }
}

/// (local rank, local size) of `rank` by who shares its network.
pub(crate) fn local(records: &[Record], rank: usize) -> (usize, usize) {
    let same = |r: &&Record| r.network == records[rank].network && r.host == records[rank].host;
    (records[..rank].iter().filter(same).count(), records.iter().filter(same).count())
}

/// Whether all ranks reach one another at 127.0.0.1.
pub(crate) fn one_network(records: &[Record]) -> bool {
    records.windows(2).all(|pair| pair[0].network == pair[1].network)
}

/// Addresses of rank 0 for the other hosts, the likeliest first. For rank 0.
pub(crate) fn addresses_of_zero(records: &[Record]) -> Vec<IpAddr> {
    let own = &records[0].addresses;
    let mut peers: Vec<&[IpAddr]> = Vec::new();
    for record in records {
        // Two peers show the interface, as thousands would.
        if peers.len() < 2 && record.addresses != *own && !peers.contains(&record.addresses.as_slice()) {
            peers.push(&record.addresses);
        }
    }
    host::reachable_addresses(own, &peers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record(network: u8, host: &str) -> Record {
        Record { network: [network; 16], claimed: None, addresses: Vec::new(), host: host.to_owned() }
    }

    #[test]
    fn local_ranks_count_those_on_the_same_host() {
        let records = [record(1, "a"), record(2, "b"), record(1, "a"), record(2, "b"), record(2, "b")];
        let locals: Vec<_> = (0..5).map(|r| local(&records, r)).collect();
        assert_eq!(locals, [(0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]);
        assert!(!one_network(&records) && one_network(&records[..1]));
    }

    #[test]
    fn a_watched_call_returns_its_value() {
        let deadline = Instant::now() + Duration::from_secs(60);
        assert_eq!(watched("nothing", deadline, || Ok::<_, Error>(3)), Ok(3));
    }

    #[test]
    fn a_clean_end_waits_as_long_as_an_operation_may() {
        let mut settings = Settings::default();
        assert_eq!(limit_after(&settings, false), Duration::from_secs(1800));
        assert_eq!(limit_after(&settings, true), AFTER_FAILURE);
        settings.set("SMDDP_TIMEOUT", "0.5").unwrap();
        assert_eq!(limit_after(&settings, false), AFTER_FAILURE);
    }

    #[test]
    fn nothing_is_finalised_that_was_not_initialised() {
        assert_eq!(finalize(Duration::from_secs(1)), Ok(()));
        assert!(duty().is_none());
    }

    proptest! {
        #[test]
        fn records_read_back(
            network: [u8; 16],
            claimed in prop::option::of(0usize..1000),
            mut addresses: Vec<IpAddr>,
            host in "[a-z.]{0,300}",
        ) {
            // Of all IPv6 addresses those that stand for IPv4 come back as such.
            addresses.iter_mut().for_each(|ip| *ip = ip.to_canonical());
            let given = Record { network, claimed, addresses, host };
            let mut kept = given.clone();
            kept.addresses.truncate(MOST_ADDRESSES);
            kept.host.truncate(255);
            prop_assert_eq!(given.encode().len(), RECORD);
            prop_assert_eq!(Record::decode(&given.encode()), Some(kept));
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes: Vec<u8>) {
            let _ = Record::decode(&bytes);
        }
    }
}
