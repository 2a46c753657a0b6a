//! The program as people start it. Every job has a limit, after which the program ends its own ranks; and the program one
//! of its own, after which it is ended itself.

#![allow(clippy::unwrap_used)]

use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Longer than every `--limit` below and what the program may take to end its ranks.
const LIMIT: Duration = Duration::from_secs(180);

/// A program that does not outlive its test. Its ranks end with it: the kernel sees to that.
struct Running(Child);

impl Running {
    /// Until it ends, or the limit does.
    fn wait(&mut self) -> Option<ExitStatus> {
        let end = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return Some(status);
            }
            if Instant::now() > end {
                return None;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn run(line: &str) -> Output {
    finish(&mut command(line), line)
}

/// As [`Command::output`], within the limit.
fn finish(command: &mut Command, line: &str) -> Output {
    fn drain(mut pipe: impl Read + Send + 'static) -> std::thread::JoinHandle<Vec<u8>> {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            pipe.read_to_end(&mut bytes).unwrap();
            bytes
        })
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut running = Running(command.spawn().unwrap_or_else(|e| panic!("{line}: {e}")));
    let pipes = (drain(running.0.stdout.take().unwrap()), drain(running.0.stderr.take().unwrap()));
    let status = running.wait();
    // Ends what holds the pipes.
    drop(running);
    let (stdout, stderr) = (pipes.0.join().unwrap(), pipes.1.join().unwrap());
    let said = || format!("{}{}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    let status = status.unwrap_or_else(|| panic!("{line}: did not end within {LIMIT:?}: {}", said()));
    Output { status, stdout, stderr }
}

fn command(line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_smddp-perf"));
    command.args(line.split(' '));
    // What an outer launcher or the caller's settings say is not meant for these jobs.
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        if ["SMDDP_", "OMPI_", "PMI", "SLURM_"].iter().any(|p| name.starts_with(p))
            || ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"].contains(&name.as_str())
        {
            command.env_remove(name);
        }
    }
    command
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn json(line: &str) -> Value {
    let output = run(&format!("{line} --json - --limit 120 --budget 0.001"));
    assert!(output.status.success(), "{line}: {}", text(&output));
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{line}: {e}: {}", text(&output)))
}

const WITH_DATA: [&str; 9] = [
    "all_reduce",
    "reduce_scatter",
    "all_gather",
    "all_to_all",
    "broadcast",
    "reduce",
    "gather",
    "scatter",
    "sendrecv",
];

#[test]
fn every_collective_is_right_on_three_ranks() {
    for collective in WITH_DATA {
        let result =
            json(&format!("{collective} --np 3 --min 16 --max 256K --factor 128 --dtype f32,bf16,i64"));
        let rows = result["rows"].as_array().unwrap();
        // 16 bytes hold no block of 8 bytes for each of 3 ranks.
        let whole = matches!(collective, "all_reduce" | "broadcast" | "reduce" | "sendrecv");
        assert_eq!(rows.len(), if whole { 9 } else { 8 }, "{collective}: {rows:?}");
        for row in rows {
            assert_eq!(row["correct"], true, "{collective}: {row}");
            assert!(row["fastest_us"].as_f64().unwrap() <= row["median_us"].as_f64().unwrap());
            assert!(!row["algorithm"].as_str().unwrap().is_empty());
        }
    }
}

#[test]
fn reductions_are_right_and_a_barrier_has_a_time() {
    let result =
        json("all_reduce --np 2 --min 64 --max 64 --dtype i32,u8 --op sum,avg,product,min,max,band,bor,bxor");
    let rows = result["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 16);
    assert!(rows.iter().all(|r| r["correct"] == true), "{rows:?}");
    let barrier = json("barrier --np 2");
    assert!(barrier["rows"][0]["median_us"].as_f64().unwrap() > 0.0);
    assert_eq!(barrier["rows"][0]["correct"], Value::Null);
}

#[test]
fn files_are_written_and_compared() {
    let folder = std::env::temp_dir().join(format!("smddp-perf-program-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let (csv, svg) = (folder.join("r.csv"), folder.join("r.svg"));
    for label in ["before", "after"] {
        let output = run(&format!(
            "all_reduce --np 2 --max 64 --budget 0.001 --limit 60 --label {label} --csv {} --plot {}",
            csv.display(),
            svg.display()
        ));
        assert!(output.status.success(), "{}", text(&output));
        assert!(text(&output).contains("3 sizes, 0 wrong"), "{}", text(&output));
    }
    assert!(std::fs::read_to_string(&svg).unwrap().contains("bus bandwidth"));
    let output = run(&format!("compare {} --ratio before/after", csv.display()));
    assert!(text(&output).contains("| size | before | after | before / after |"), "{}", text(&output));
    std::fs::remove_dir_all(&folder).unwrap();
}

/// A folder that goes with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("smddp-perf-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // The system's own cleaning takes what this leaves.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn reductions_are_kept_apart_in_a_csv_and_found_by_either_name() {
    let folder = Folder::new("ops");
    let csv = folder.0.join("r.csv");
    let line =
        format!("all_reduce --np 2 --op sum,max --max 4 --budget 0.001 --limit 60 --csv {}", csv.display());
    let output = run(&line);
    assert!(output.status.success(), "{}", text(&output));
    let written = std::fs::read_to_string(&csv).unwrap();
    assert!(written.contains("\nsmddp,allreduce,float32,2,4,"), "{written}");
    assert!(written.contains("\nsmddp,allreduce_max,float32,2,4,"), "{written}");
    // As the CSV names them, and as the command line of a measurement does.
    for (named, shown, other) in [
        ("--op allreduce --dtype float32", "**allreduce, float32, 2 ranks**", "allreduce_max"),
        ("--op all_reduce --dtype f32", "**allreduce, float32, 2 ranks**", "allreduce_max"),
        ("--op allreduce_max", "**allreduce_max, float32, 2 ranks**", "**allreduce,"),
    ] {
        let output = run(&format!("compare {} {named}", csv.display()));
        assert!(
            text(&output).contains(shown) && !text(&output).contains(other),
            "{named}: {}",
            text(&output)
        );
    }
    let output = run(&format!("compare {} --op all_gather", csv.display()));
    let held = "these files hold allreduce float32 2, allreduce_max float32 2";
    assert!(output.status.code() == Some(2) && text(&output).contains(held), "{}", text(&output));
    let output = run(&format!("compare {} --ratio smddp/gloo --against smdpp", csv.display()));
    for typo in ["gloo", "smdpp"] {
        let said = format!("no line is labelled '{typo}'; the labels are smddp");
        assert!(output.status.success() && text(&output).contains(&said), "{}", text(&output));
    }
}

#[test]
fn only_a_csv_of_ours_is_appended_to() {
    let folder = Folder::new("foreign");
    let notes = folder.0.join("notes.csv");
    std::fs::write(&notes, "a,b\n1,2\n").unwrap();
    let output = run(&format!("all_reduce --np 2 --max 4 --limit 60 --csv {}", notes.display()));
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(text(&output).contains("not a benchmark's CSV"), "{}", text(&output));
    assert_eq!(std::fs::read_to_string(&notes).unwrap(), "a,b\n1,2\n");
}

#[test]
fn results_tell_how_their_data_was_used() {
    for (given, told) in [
        ("", ""),
        (" --fresh", "inputs are written anew before each call"),
        (" --used", "each rank looks at its result"),
        (" --shared", "lies in memory that the ranks of a node share"),
    ] {
        let line = format!("all_reduce --np 2 --min 64K --max 64K{given}");
        let data = json(&line)["data"].as_str().unwrap().to_owned();
        assert!(data.contains(told) && data.is_empty() == told.is_empty(), "{line}: {data}");
        let table = run(&format!("{line} --budget 0.001 --limit 60"));
        assert!(text(&table).contains(&data), "{line}: {}", text(&table));
    }
}

/// A launcher's ranks are where it has put them.
#[test]
fn nodes_are_emulated_for_ranks_of_our_own_alone() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let number = port.local_addr().unwrap().port().to_string();
    let line = "all_reduce --nodes 2 --max 4 --budget 0.001";
    let ranks = ["0", "1"].map(|rank| {
        let mut command = command(line);
        command.env("RANK", rank).env("WORLD_SIZE", "2");
        command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", &number);
        std::thread::spawn(move || finish(&mut command, line))
    });
    let [zero, one] = ranks.map(|rank| rank.join().unwrap());
    assert_eq!((zero.status.code(), one.status.code()), (Some(2), Some(2)), "{}", text(&zero));
    assert!(text(&zero).contains("--nodes is for ranks that --np starts"), "{}", text(&zero));
    assert_eq!(text(&one), "");
}

#[test]
fn fresh_inputs_are_measured_for_every_collective() {
    for collective in WITH_DATA {
        for how in ["--fresh", "--used"] {
            let line = format!("{collective} --np 2 {how} --min 4K --max 64K --budget 0.001 --limit 60");
            let output = run(&line);
            assert!(output.status.success(), "{line}: {}", text(&output));
            assert!(text(&output).contains("3 sizes, 0 wrong"), "{line}: {}", text(&output));
        }
    }
}

#[test]
fn shared_memory_is_measured_for_every_collective_that_uses_it() {
    for collective in WITH_DATA.into_iter().filter(|&c| c != "scatter" && c != "sendrecv") {
        let result =
            json(&format!("{collective} --np 2 --shared --min 64K --max 1M --factor 16 --dtype f32"));
        let rows = result["rows"].as_array().unwrap();
        assert_eq!(rows.len(), 2, "{collective}");
        for row in rows {
            assert_eq!(row["correct"], true, "{row}");
            assert_eq!(row["algorithm"], "shared", "{row}");
        }
    }
}

#[test]
fn what_cannot_be_done_is_said_with_a_status() {
    for (line, status, part) in [
        ("all_reduce --np 2 --min 1M --max 1K", 2, "--max"),
        ("all_reduce --np 2 --dtype f33", 2, "bf16"),
        ("all_reduce --np 2 --device tpu", 2, "cuda"),
        ("barrier --np 2 --fresh", 2, "--fresh is for"),
        ("barrier --np 2 --used", 2, "--used is for"),
        ("scatter --np 2 --shared", 2, "--shared is for"),
        ("all_reduce --np 2 --label a,b", 2, "a label holds no comma"),
        ("barrier --np 2 --device cuda", 2, "on the CPU only"),
        ("all_reduce --np 2 --device cuda --driver /nonexistent/libcuda.so", 1, "/nonexistent/libcuda.so"),
        (
            "all_gather --np 3 --min 8 --max 20",
            2,
            "no size from --min 8 to --max 20 holds an element of float32 for each of 3 ranks",
        ),
        ("plan all_reduce --algorithm magic", 2, "known here"),
        ("plan all_reduce --nodes 3 --local 2,3", 2, "--local names 2 nodes, --nodes 3"),
        ("plan sendrecv", 2, "a message, not a plan"),
        ("plan magic", 2, "all_to_all, broadcast, reduce, gather, scatter, barrier\n"),
        ("compare /nonexistent.csv", 1, "/nonexistent.csv"),
        ("all_reduce --np 2 --max 16 --limit 60 --json /nonexistent/x.json", 1, "/nonexistent/x.json"),
        ("all_reduce --np 2 --min 64M --max 64M --budget 1000 --limit 1", 1, "did not end within 1 s"),
    ] {
        let output = run(line);
        assert_eq!(output.status.code(), Some(status), "{line}: {}", text(&output));
        assert!(text(&output).contains(part), "{line}: {}", text(&output));
    }
}

#[test]
fn info_and_plan_need_no_job() {
    let info = run("info");
    assert!(text(&info).contains("SMDDP_TIMEOUT") && text(&info).contains("Processor"), "{}", text(&info));
    let named = &smddp_standin::paths().nccl;
    let info = finish(command("info").env("SMDDP_NCCL", named), "info");
    let told = text(&info);
    let line = told.lines().find(|line| line.starts_with("  NCCL ")).unwrap_or_default();
    assert!(line.contains(&format!("({})", named.display())) && line.contains("NVIDIA GPUs"), "{told}");
    let plan = run("plan all_reduce --nodes 3 --local 2 --bytes 1M");
    assert!(text(&plan).contains("rank 5") && text(&plan).contains("modelled time"), "{}", text(&plan));
}

#[test]
fn plans_are_cut_as_set() {
    let line = "plan all_reduce --nodes 2 --local 1 --bytes 8M --rank 0";
    for (name, value, cut) in
        [("SMDDP_CHUNK", "64K", "128 rounds of 64 KiB"), ("SMDDP_STAGING", "1M", "64 rounds of 128 KiB")]
    {
        let plan = finish(command(line).env(name, value), line);
        assert!(text(&plan).contains(cut), "{name}: {}", text(&plan));
    }
}

/// On the stand-in for CUDA and NCCL, whose times mean nothing.
fn on_device(line: &str, nccl: &str) -> Value {
    let driver = smddp_standin::paths();
    let line = format!("{line} --device cuda --driver {}", driver.cuda.display());
    let mut command = command(&format!("{line} --json - --limit 120 --budget 0.001"));
    command.env("SMDDP_NCCL", &driver.nccl).env("SMDDP_CUDA", nccl).env("SMDDP_CUDA_SLOT", "64K");
    let output = finish(&mut command, &line);
    assert!(output.status.success(), "{line}: {}", text(&output));
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{line}: {e}: {}", text(&output)))
}

#[test]
fn cuda_memory_is_measured_on_every_way() {
    // Ranks, nodes, setting, the way, whether there are copies and the same on the host.
    for (np, nodes, setting, way, copies, on_host) in [
        (1, 1, "nccl", "nccl", false, false),
        (2, 1, "auto", "nccl", false, false),
        (2, 2, "auto", "staged", true, true),
        (4, 2, "auto", "nccl and staged", true, false),
    ] {
        for collective in ["all_reduce", "all_gather", "reduce_scatter"] {
            let line = format!("{collective} --np {np} --nodes {nodes} --min 64 --max 256K --factor 4096");
            let result = on_device(&line, setting);
            assert!(result["device"].as_str().unwrap().contains("CUDA device 0"), "{result}");
            let rows = result["rows"].as_array().unwrap();
            assert_eq!(rows.len(), 2, "{line}: {rows:?}");
            for row in rows {
                assert_eq!(row["correct"], true, "{line}: {row}");
                assert_eq!(row["algorithm"], way, "{line}: {row}");
                assert!(row["host_us"].as_f64().unwrap() > 0.0, "{line}: {row}");
                assert_eq!(row["copies_us"].is_number(), copies, "{line}: {row}");
                assert_eq!(row["on_host_us"].is_number(), on_host, "{line}: {row}");
            }
        }
    }
}
