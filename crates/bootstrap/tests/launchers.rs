//! The example `who` under every mpirun there is, and by variables alone.
//!
//! `SMDDP_TEST_MPIRUNS=path1:path2` says which launchers to use; one that is missing fails the tests, as does an empty
//! list. Without it those found on PATH and in the active virtual environment are used, and what was not run is printed;
//! with SMDDP_TEST_REQUIRE_MPI=1 it fails the tests.

// A test file of its own counts as no test for clippy.toml.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Only stops hangs.
const LIMIT: Duration = Duration::from_secs(120);

#[derive(Clone, Debug)]
struct Launcher {
    program: PathBuf,
    open_mpi: bool,
}

impl Launcher {
    fn new(program: PathBuf) -> Launcher {
        let version = Command::new(&program).arg("--version").output().unwrap();
        let text = String::from_utf8_lossy(&version.stdout).into_owned();
        // Open MPI 4 calls itself OpenRTE when it is not called mpirun.
        let open_mpi = text.contains("Open MPI") || text.contains("OpenRTE");
        assert!(open_mpi || text.contains("HYDRA"), "{} is no mpirun known here: {text}", program.display());
        Launcher { open_mpi, program }
    }

    fn prefix(&self) -> PathBuf {
        self.program.parent().unwrap().parent().unwrap().to_path_buf()
    }

    fn command(&self, ranks: usize) -> Command {
        let mut command = Command::new(&self.program);
        command.args(["-n", &ranks.to_string()]);
        if self.open_mpi {
            command.arg("--oversubscribe");
        }
        allow_root(&mut command);
        clean(&mut command);
        command.arg(who());
        command
    }
}

/// Containers run as root, which Open MPI 4 and 5 refuse, each by its own name.
fn allow_root(command: &mut Command) {
    for name in ["OMPI", "PRTE"] {
        command.env(format!("{name}_ALLOW_RUN_AS_ROOT"), "1");
        command.env(format!("{name}_ALLOW_RUN_AS_ROOT_CONFIRM"), "1");
    }
}

/// Nothing of the environment the tests run in may tell a job.
fn clean(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy();
        let job = ["SMDDP_", "OMPI_COMM", "PMI", "SLURM_", "MASTER_", "TORCHELASTIC", "LOCAL_", "MPI_LOCAL"];
        if job.iter().any(|p| name.starts_with(p)) || ["RANK", "WORLD_SIZE"].contains(&name.as_ref()) {
            command.env_remove(name.as_ref());
        }
    }
    command.env("SMDDP_TIMEOUT", "60");
}

/// The example, freshly built: `cargo test --test …` alone would leave an old one.
fn who() -> PathBuf {
    static WHO: OnceLock<PathBuf> = OnceLock::new();
    WHO.get_or_init(|| {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["build", "--quiet", "--example", "who", "--manifest-path"]);
        let status = cargo.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")).status().unwrap();
        assert!(status.success());
        let test = std::env::current_exe().unwrap();
        let who = test.parent().unwrap().parent().unwrap().join("examples/who");
        assert!(who.is_file(), "{} was not built: is this another profile?", who.display());
        who
    })
    .clone()
}

/// Says that something could not be tried, or fails where nothing may be passed over.
fn not_run(why: &str) {
    let required = std::env::var("SMDDP_TEST_REQUIRE_MPI").is_ok_and(|v| v == "1");
    assert!(!required, "SMDDP_TEST_REQUIRE_MPI=1, but: {why}");
    eprintln!("NOT RUN: {why}");
}

fn launchers() -> Vec<Launcher> {
    if let Some(list) = std::env::var_os("SMDDP_TEST_MPIRUNS") {
        let programs: Vec<PathBuf> =
            std::env::split_paths(&list).filter(|path| !path.as_os_str().is_empty()).collect();
        for program in &programs {
            assert!(program.is_file(), "SMDDP_TEST_MPIRUNS names {}, which is not there", program.display());
        }
        assert!(!programs.is_empty(), "SMDDP_TEST_MPIRUNS is set but empty");
        return programs.into_iter().map(Launcher::new).collect();
    }
    const NAMES: [&str; 4] = ["mpirun.openmpi", "mpirun.mpich", "mpirun", "mpiexec.hydra"];
    // scripts/setup gives MPICH an environment of its own within the other.
    let in_environment = |venv| ["bin", "mpich/bin"].map(|dir| Path::new(&venv).join(dir));
    let mut dirs: Vec<PathBuf> =
        std::env::var_os("VIRTUAL_ENV").map(in_environment).into_iter().flatten().collect();
    dirs.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    for name in NAMES {
        let mut there = false;
        for program in dirs.iter().map(|dir| dir.join(name)).filter(|file| file.is_file()) {
            there = true;
            if seen.insert(std::fs::canonicalize(&program).unwrap()) {
                found.push(Launcher::new(program));
            }
        }
        if !there {
            // One is as good as another here; what takes two families says so itself.
            eprintln!("NOT RUN: {name} is not installed");
        }
    }
    if found.is_empty() {
        not_run("no mpirun is installed");
    }
    found
}

struct Ended {
    success: bool,
    out: String,
    err: String,
}

/// A process that does not outlive its test, not even one of whose siblings has failed.
struct Running(Child);

impl Running {
    /// Asks it to end: a launcher that is asked politely ends its ranks too. Then makes it.
    fn stop(&mut self) {
        if matches!(self.0.try_wait(), Ok(Some(_))) {
            return;
        }
        let pid = rustix::process::Pid::from_child(&self.0);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let end = Instant::now() + Duration::from_secs(5);
        while Instant::now() < end && matches!(self.0.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop();
    }
}

fn finish(mut running: Running) -> Ended {
    fn drain(mut pipe: impl Read + Send + 'static) -> std::thread::JoinHandle<String> {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            let _ = pipe.read_to_end(&mut bytes);
            String::from_utf8_lossy(&bytes).into_owned()
        })
    }
    let child = &mut running.0;
    let (out, err) = (drain(child.stdout.take().unwrap()), drain(child.stderr.take().unwrap()));
    let end = Instant::now() + LIMIT;
    let status = loop {
        if let Some(status) = running.0.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > end {
            running.stop();
            panic!("did not end within {LIMIT:?}:\n{}\n{}", out.join().unwrap(), err.join().unwrap());
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    Ended { success: status.success(), out: out.join().unwrap(), err: err.join().unwrap() }
}

fn start(command: &mut Command) -> Running {
    Running(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
}

fn run(command: &mut Command) -> Ended {
    finish(start(command))
}

/// The fields of `who`'s line; "mpi" is the rest of it.
fn fields(line: &str) -> BTreeMap<String, String> {
    let (line, mpi) = line.split_once(" mpi=").unwrap();
    let (line, how) = line.split_once(" how=\"").unwrap();
    let (how, rest) = how.split_once('"').unwrap();
    let pairs = line.split(' ').chain(rest.split_whitespace());
    let mut all: BTreeMap<String, String> =
        pairs.map(|p| p.split_once('=').map(|(k, v)| (k.to_owned(), v.to_owned())).unwrap()).collect();
    all.insert("how".to_owned(), how.to_owned());
    all.insert("mpi".to_owned(), mpi.to_owned());
    all
}

/// Checks that `size` ranks came, once each, and agree; returns their fields by rank.
fn check(ended: &Ended, size: usize, how: &str) -> Vec<BTreeMap<String, String>> {
    assert!(ended.success, "failed:\n{}\n{}", ended.out, ended.err);
    let mut ranks: Vec<_> = ended.out.lines().filter(|l| l.starts_with("rank=")).map(fields).collect();
    ranks.sort_by_key(|f| f["rank"].parse::<usize>().unwrap());
    let numbers: Vec<String> = ranks.iter().map(|f| f["rank"].clone()).collect();
    let expected: Vec<String> = (0..size).map(|r| r.to_string()).collect();
    assert_eq!(numbers, expected, "{}", ended.out);
    let all: Vec<String> = (0..size).map(|r| format!("{r}*{}", r * r)).collect();
    for f in &ranks {
        assert_eq!((f["size"].as_str(), f["how"].as_str()), (size.to_string().as_str(), how));
        assert_eq!(f["all"], all.join(","));
        assert_eq!(f["id"], ranks[0]["id"]);
    }
    ranks
}

const MPI: &str = "MPI";
const TCP: &str = "launcher variables and TCP";

fn each(what: &str, mut test: impl FnMut(&Launcher)) {
    for launcher in launchers() {
        eprintln!("{what}: {}", launcher.program.display());
        test(&launcher);
    }
}

#[test]
fn every_mpirun_makes_a_job_with_its_own_mpi() {
    each("job", |launcher| {
        for size in [2, 4] {
            let ended = run(&mut launcher.command(size));
            let ranks = check(&ended, size, MPI);
            let locals: BTreeSet<&str> = ranks.iter().map(|f| f["local"].as_str()).collect();
            let expected: Vec<String> = (0..size).map(|l| format!("{l}/{size}")).collect();
            assert_eq!(locals, expected.iter().map(String::as_str).collect());
            let lib = launcher.prefix().join("lib");
            let own =
                ["libmpi.so.40", "libmpi_abi.so.1", "libmpi.so.12"].iter().any(|l| lib.join(l).is_file());
            for f in &ranks {
                let mpi = &f["mpi"];
                // Two releases of one MPI share a soname: the launcher's own must be taken.
                assert!(!own || mpi.contains(lib.to_str().unwrap()), "{mpi}");
                assert_eq!(mpi.contains("Open MPI ABI"), launcher.open_mpi, "{mpi}");
            }
        }
    });
}

#[test]
fn every_mpirun_gives_torchs_variables_the_same_master_on_all_ranks() {
    each("variables", |launcher| {
        let ended = run(&mut launcher.command(3));
        let ranks = check(&ended, 3, MPI);
        let mut masters = BTreeSet::new();
        for f in &ranks {
            let exported: BTreeMap<&str, &str> =
                f["exported"].split(',').map(|pair| pair.split_once('=').unwrap()).collect();
            assert_eq!((exported["RANK"], exported["WORLD_SIZE"]), (f["rank"].as_str(), "3"));
            assert_eq!(format!("{}/{}", exported["LOCAL_RANK"], exported["LOCAL_WORLD_SIZE"]), f["local"]);
            masters.insert((exported["MASTER_ADDR"], exported["MASTER_PORT"]));
        }
        assert_eq!(masters.len(), 1, "{masters:?}");
        assert_eq!(masters.first().unwrap().0, "127.0.0.1");

        let mut command = launcher.command(2);
        command.env("MASTER_ADDR", "localhost").env("MASTER_PORT", "29477");
        for f in check(&run(&mut command), 2, MPI) {
            assert!(!f["exported"].contains("MASTER"), "{}", f["exported"]);
        }
    });
}

#[test]
fn every_mpirun_does_without_mpi() {
    each("no MPI", |launcher| {
        for (name, value) in [("SMDDP_BOOTSTRAP", "env"), ("SMDDP_MPI", "/nonexistent/libmpi.so")] {
            check(&run(launcher.command(3).env(name, value)), 3, TCP);
        }
        // Where MPI is a must, its absence is an error that says what to do.
        let mut command = launcher.command(2);
        command.env("SMDDP_BOOTSTRAP", "mpi").env("SMDDP_MPI", "/nonexistent/libmpi.so");
        let ended = run(&mut command);
        assert!(!ended.success && ended.err.contains("SMDDP_MPI"), "{}\n{}", ended.out, ended.err);
    });
}

/// Libraries beside the launcher that fit it, by the ABI they are to be recognised as.
fn libraries(launcher: &Launcher) -> Vec<(PathBuf, &'static str)> {
    let all = if launcher.open_mpi {
        vec![("libmpi.so.40", "Open MPI ABI")]
    } else {
        vec![("libmpi.so.12", "MPICH ABI"), ("libmpi_abi.so.1", "MPI standard ABI")]
    };
    let lib = launcher.prefix().join("lib");
    all.into_iter().map(|(name, abi)| (lib.join(name), abi)).filter(|(file, _)| file.is_file()).collect()
}

#[test]
fn each_abi_is_recognised() {
    let mut abis = BTreeSet::new();
    each("ABI", |launcher| {
        for (library, abi) in libraries(launcher) {
            abis.insert(abi);
            let ended = run(launcher.command(2).env("SMDDP_MPI", &library));
            for f in check(&ended, 2, MPI) {
                assert!(f["mpi"].contains(&format!("({abi}, ")), "{} is not {abi}", f["mpi"]);
            }
        }
    });
    for abi in ["Open MPI ABI", "MPICH ABI", "MPI standard ABI"] {
        if !abis.contains(abi) {
            not_run(&format!("no library of the {abi} beside a launcher"));
        }
    }
}

#[test]
fn an_mpi_somebody_else_initialised_is_used_and_left_to_them() {
    each("foreign", |launcher| {
        for (library, abi) in libraries(launcher) {
            // Not named by a setting: it must be found in the process, and not another beside it.
            let ended = run(launcher.command(2).env("WHO_MPI_FIRST", &library));
            for f in check(&ended, 2, MPI) {
                assert!(f["mpi"].contains(abi), "{}", f["mpi"]);
            }
            assert_eq!(ended.out.matches("foreign finalized=false").count(), 2, "{}", ended.out);
        }
    });
}

#[test]
fn another_launchers_mpi_is_noticed() {
    let all = launchers();
    let mut ran = 0;
    for launcher in &all {
        for other in all.iter().filter(|other| other.open_mpi != launcher.open_mpi) {
            let Some((library, _)) = libraries(other).into_iter().next() else { continue };
            eprintln!("{} with {}", launcher.program.display(), library.display());
            let ended = run(launcher.command(2).env("SMDDP_MPI", &library));
            check(&ended, 2, TCP);
            let mut command = launcher.command(2);
            let ended = run(command.env("SMDDP_MPI", &library).env("SMDDP_BOOTSTRAP", "mpi"));
            assert!(!ended.success && ended.err.contains("belongs to another launcher"), "{}", ended.err);
            ran += 1;
        }
    }
    if ran == 0 {
        not_run("needs launchers of two families, each with its library beside it");
    }
}

#[test]
fn contradicting_variables_are_refused_under_mpirun() {
    each("contradiction", |launcher| {
        let mut command = launcher.command(2);
        // On all ranks: mpirun of Open MPI 5 may hang when it ends a rank that is within MPI_Init.
        command.env("RANK", "0").env("WORLD_SIZE", "3");
        let ended = run(&mut command);
        assert!(!ended.success && ended.err.contains("environment variable WORLD_SIZE"), "{}", ended.err);
    });
}

#[test]
fn a_rank_that_ends_or_never_comes_does_not_hang_the_job() {
    each("abnormal", |launcher| {
        let ended = run(launcher.command(3).env("WHO_EXIT", "1"));
        assert!(!ended.success, "{}", ended.out);
        let ended = run(launcher.command(3).env("WHO_SLEEP", "1").env("SMDDP_TIMEOUT", "1"));
        assert!(!ended.success && ended.err.contains("did not return within 1 s"), "{}", ended.err);
    });
}

/// A master port of this job alone as long as the listener lives; our store listens on others.
fn port() -> (std::net::TcpListener, String) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    (listener, port)
}

fn plain(pairs: &[(&str, &str)]) -> Command {
    let mut command = Command::new(who());
    clean(&mut command);
    command.envs(pairs.iter().copied());
    command
}

#[test]
fn variables_alone_make_a_job() {
    // By the host's own name, thus not on the loopback.
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    for addr in ["127.0.0.1", "localhost", &name] {
        let (_held, port) = port();
        let children: Vec<Running> = ["2", "0", "1"]
            .iter()
            .map(|rank| {
                start(&mut plain(&[
                    ("RANK", rank),
                    ("WORLD_SIZE", "3"),
                    ("MASTER_ADDR", addr),
                    ("MASTER_PORT", &port),
                ]))
            })
            .collect();
        let mut all = Ended { success: true, out: String::new(), err: String::new() };
        for ended in children.into_iter().map(finish) {
            all.success &= ended.success;
            all.out += &ended.out;
            all.err += &ended.err;
        }
        for f in check(&all, 3, TCP) {
            assert_eq!((f["local"].as_str(), f["exported"].as_str()), ("?/?", ""));
        }
    }
}

#[test]
fn ranks_that_contradict_one_another_are_all_told() {
    let (_held, port) = port();
    let with = |rank, size| {
        let pairs = [
            ("RANK", rank),
            ("WORLD_SIZE", size),
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", port.as_str()),
        ];
        start(&mut plain(&pairs))
    };
    let children = [with("0", "3"), with("1", "3"), with("1", "3")];
    let ended: Vec<Ended> = children.into_iter().map(finish).collect();
    for e in &ended {
        assert!(!e.success && e.err.contains("two processes say they are rank 1"), "{}", e.err);
    }
    let ended: Vec<Ended> = [with("0", "2"), with("1", "4")].into_iter().map(finish).collect();
    for e in &ended {
        assert!(!e.success && e.err.contains("4 ranks, rank 0 says 2"), "{}", e.err);
    }
}

#[test]
fn ranks_that_do_not_come_are_named() {
    let (_held, port) = port();
    let with = |rank| {
        let pairs = [
            ("RANK", rank),
            ("WORLD_SIZE", "3"),
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", port.as_str()),
            ("SMDDP_TIMEOUT", "1"),
        ];
        run(&mut plain(&pairs))
    };
    let zero = with("0");
    assert!(!zero.success && zero.err.contains("ranks 1, 2"), "{}", zero.err);
    let one = with("1");
    assert!(!one.success && one.err.contains("could not reach rank 0"), "{}", one.err);
}

#[test]
fn alone_it_is_a_job_of_one() {
    let ended = run(&mut plain(&[]));
    let ranks = check(&ended, 1, "single process: no launcher");
    assert_eq!((ranks[0]["local"].as_str(), ranks[0]["exported"].as_str()), ("0/1", ""));
    let ended = run(&mut plain(&[("SMDDP_BOOTSTRAP", "env")]));
    assert!(!ended.success && ended.err.contains("Set RANK, WORLD_SIZE"), "{}", ended.err);
}
