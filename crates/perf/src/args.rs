//! What the command line may say, and the messages for what it may not.

use std::convert::Infallible;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use smddp::{Collective, DType, ReduceOp};
use smddp_core::settings::parse_bytes;

use crate::report::csv_name;
use crate::workload::shape;

/// Measures collectives in the manner of nccl-tests, shows the plans behind them, and what this machine offers.
#[derive(Parser, Debug)]
#[command(name = "smddp-perf", version, about, after_help = EXAMPLES)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "\
Examples:
  smddp-perf all_reduce --np 2 --min 4 --max 256M --dtype f32,bf16
  smddp-perf all_reduce --np 4 --nodes 2 --plot all_reduce.svg
  smddp-perf all_reduce --np 2 --shared --min 64K --max 256M
  mpirun -n 4 smddp-perf all_gather --json result.json
  smddp-perf all_reduce --device cuda --np 2 --nodes 2 --max 256M
  smddp-perf plan all_reduce --nodes 4 --local 2 --bytes 16M
  smddp-perf info";

#[derive(Subcommand, Debug)]
pub enum Command {
    /// Every rank ends with the combination of all ranks' buffers
    #[command(name = "all_reduce", visible_alias = "allreduce")]
    AllReduce(Bench),
    /// Every rank ends with its block of the combination
    #[command(name = "reduce_scatter")]
    ReduceScatter(Bench),
    /// Every rank ends with all ranks' blocks
    #[command(name = "all_gather", visible_alias = "allgather")]
    AllGather(Bench),
    /// Every rank sends a block of its own to every other
    #[command(name = "all_to_all", visible_alias = "alltoall")]
    AllToAll(Bench),
    /// Every rank ends with the root's buffer
    #[command(name = "broadcast")]
    Broadcast(Bench),
    /// The root ends with the combination of all ranks' buffers
    #[command(name = "reduce")]
    Reduce(Bench),
    /// The root ends with all ranks' blocks
    #[command(name = "gather")]
    Gather(Bench),
    /// Every rank ends with its block of the root's buffer
    #[command(name = "scatter")]
    Scatter(Bench),
    /// No rank goes on before all have come
    #[command(name = "barrier")]
    Barrier(Bench),
    /// Every rank sends to the next rank and receives from the one before
    #[command(name = "sendrecv")]
    SendRecv(Bench),
    /// Print the plan of a collective: what each rank sends, receives and reduces
    Plan(PlanArgs),
    /// Show what was found on this machine and what would be used
    Info(InfoArgs),
    /// Turn CSV files written by --csv into Markdown tables, or one plot
    Compare(CompareArgs),
}

impl Command {
    /// The collective to measure and its options, when this command measures.
    pub fn bench(&self) -> Option<(Collective, &Bench)> {
        Some(match self {
            Command::AllReduce(b) => (Collective::AllReduce, b),
            Command::ReduceScatter(b) => (Collective::ReduceScatter, b),
            Command::AllGather(b) => (Collective::AllGather, b),
            Command::AllToAll(b) => (Collective::AllToAll, b),
            Command::Broadcast(b) => (Collective::Broadcast, b),
            Command::Reduce(b) => (Collective::Reduce, b),
            Command::Gather(b) => (Collective::Gather, b),
            Command::Scatter(b) => (Collective::Scatter, b),
            Command::Barrier(b) => (Collective::Barrier, b),
            Command::SendRecv(b) => (Collective::SendRecv, b),
            Command::Plan(_) | Command::Info(_) | Command::Compare(_) => return None,
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Device {
    Cpu,
    Cuda,
}

#[derive(Args, Debug, Clone)]
pub struct Bench {
    /// Start this many ranks on this machine (not needed under mpirun, torchrun or srun)
    #[arg(long, value_name = "N", value_parser = parse_count)]
    pub np: Option<usize>,
    /// With --np: spread the ranks over this many emulated nodes
    #[arg(long, value_name = "M", default_value = "1", value_parser = parse_count)]
    pub nodes: usize,
    /// With --np: end the job after this many seconds
    #[arg(long, value_name = "SECONDS", default_value = "900", allow_negative_numbers = true, value_parser = parse_seconds)]
    pub limit: f64,
    /// With --np: leave ranks free to move between cores; else each has its own share of them where there are enough
    #[arg(long)]
    pub no_bind: bool,
    /// Smallest size in bytes; K, M and G are powers of 1024
    #[arg(long, value_name = "BYTES", default_value = "4", value_parser = parse_size)]
    pub min: usize,
    /// Largest size in bytes
    #[arg(long, value_name = "BYTES", default_value = "16M", value_parser = parse_size)]
    pub max: usize,
    /// Each size is this many times the one before
    #[arg(long, value_name = "F", default_value = "4", value_parser = parse_factor)]
    pub factor: usize,
    /// Element types, comma-separated: f32, bf16, f16, f64, i8 to i64, u8, bool
    #[arg(long, value_name = "TYPES", default_value = "f32", value_delimiter = ',', value_parser = parse_dtype)]
    pub dtype: Vec<DType>,
    /// Reductions, comma-separated: sum, avg, product, min, max, band, bor, bxor
    #[arg(long, value_name = "OPS", default_value = "sum", value_delimiter = ',', value_parser = parse_op)]
    pub op: Vec<ReduceOp>,
    /// The root of broadcast, reduce, gather and scatter; others have none
    #[arg(long, value_name = "RANK", default_value = "0")]
    pub root: usize,
    /// Seconds of timing per size
    #[arg(long, value_name = "SECONDS", default_value = "0.3", allow_negative_numbers = true, value_parser = parse_seconds)]
    pub budget: f64,
    /// Seconds a batch of calls takes about: more where the first calls are faster than a network can go on
    #[arg(long, value_name = "SECONDS", default_value = "0.001", allow_negative_numbers = true, value_parser = parse_seconds)]
    pub batch: f64,
    /// Write all results as JSON to FILE, or to standard output with "-"
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Draw bus bandwidth and time by size
    #[arg(long, value_name = "FILE.svg")]
    pub plot: Option<PathBuf>,
    /// Append rows to a CSV file, which `smddp-perf compare` reads
    #[arg(long, value_name = "FILE")]
    pub csv: Option<PathBuf>,
    /// What the rows are called in the CSV
    #[arg(long, value_name = "NAME", default_value = "smddp")]
    pub label: String,
    /// Whose memory the tensors are in: cpu or cuda
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: Device,
    /// Data that other ranks read lies in memory that the ranks of a node share; on the CPU
    #[arg(long)]
    pub shared: bool,
    /// Inputs are written anew before each call, which begins at a moment that the ranks of a node agree on; on the CPU
    #[arg(long)]
    pub fresh: bool,
    /// As --fresh, and the time includes reading the whole result
    #[arg(long)]
    pub used: bool,
    /// With --device cuda: take the driver from this file. For tests.
    #[arg(long, hide = true)]
    pub driver: Option<PathBuf>,
    /// Given by the starter to the ranks it starts.
    #[arg(long, hide = true)]
    pub started: bool,
}

#[derive(Args, Debug)]
pub struct PlanArgs {
    /// The collective, e.g. all_reduce
    #[arg(value_parser = parse_collective)]
    pub collective: Collective,
    /// Number of nodes; 2 unless --local has a list
    #[arg(long, value_parser = parse_count)]
    pub nodes: Option<usize>,
    /// Ranks on each node; a comma-separated list gives each node its own number
    #[arg(long, default_value = "2", value_delimiter = ',', value_parser = parse_count)]
    pub local: Vec<usize>,
    /// Size of the message, as in a measurement
    #[arg(long, default_value = "16M", value_parser = parse_size)]
    pub bytes: usize,
    /// Element type, as in a measurement
    #[arg(long, value_name = "TYPE", default_value = "f32", value_parser = parse_dtype)]
    pub dtype: DType,
    /// The root of broadcast, reduce, gather and scatter; others have none
    #[arg(long, value_name = "RANK", default_value = "0")]
    pub root: usize,
    /// Use this algorithm instead of the one the table selects
    #[arg(long)]
    pub algorithm: Option<String>,
    /// Show only this rank's steps
    #[arg(long)]
    pub rank: Option<usize>,
    /// Draw the first round instead of printing it
    #[arg(long, value_name = "FILE.svg")]
    pub svg: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub struct InfoArgs {
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Debug)]
pub struct CompareArgs {
    /// Files written by --csv; rows of all of them are compared
    #[arg(required = true, value_name = "FILE.csv")]
    pub files: Vec<PathBuf>,
    /// Only this collective, such as all_reduce, or as the CSV names it (allreduce, allreduce_max, ...)
    #[arg(long, value_parser = parse_csv_op)]
    pub op: Option<String>,
    /// Only this element type, such as f32, or as the CSV names it (float32, bfloat16, ...)
    #[arg(long, value_parser = parse_csv_dtype)]
    pub dtype: Option<String>,
    /// Only this number of ranks
    #[arg(long)]
    pub world: Option<usize>,
    /// Leave out sizes below this
    #[arg(long, default_value = "0", value_parser = parse_size)]
    pub from: usize,
    /// Bus bandwidth in GB/s instead of microseconds
    #[arg(long)]
    pub busbw: bool,
    /// Of each round's fastest batch the median over all rounds, and half the interquartile range, instead of the fastest
    /// batch of all
    #[arg(long)]
    pub median: bool,
    /// Add a column: how many times as long the first label takes as the second
    #[arg(long, value_name = "SLOWER/FASTER", value_parser = parse_ratio)]
    pub ratio: Vec<(String, String)>,
    /// Add a column: how many times as long the best of all other labels takes as this one
    #[arg(long, value_name = "LABEL")]
    pub against: Option<String>,
    /// Draw instead of printing
    #[arg(long, value_name = "FILE.svg")]
    pub svg: Option<PathBuf>,
    /// Title of the drawing
    #[arg(long)]
    pub title: Option<String>,
}

impl Bench {
    /// What no single argument shows: relations between them. `world` is the number of ranks.
    pub fn check(&self, collective: Collective, world: usize) -> Result<(), String> {
        if self.min > self.max {
            return Err(format!(
                "--min {} is above --max {}: give a smaller --min or a larger --max",
                self.min, self.max
            ));
        }
        if self.nodes > world {
            return Err(format!(
                "--nodes {} needs at least as many ranks, there are {world}: raise --np",
                self.nodes
            ));
        }
        if self.root >= world {
            return Err(format!(
                "--root {} is not a rank: with {world} ranks give 0 to {}",
                self.root,
                world - 1
            ));
        }
        if collective == Collective::SendRecv && world < 2 {
            return Err(
                "sendrecv needs at least 2 ranks: give --np 2, or start it with mpirun -n 2".to_owned()
            );
        }
        let reads_nobody =
            matches!(collective, Collective::Scatter | Collective::SendRecv | Collective::Barrier);
        if self.shared && (reads_nobody || self.device != Device::Cpu) {
            let what = "--shared is for collectives whose ranks all have data, on the CPU";
            return Err(format!("{what}: leave it out"));
        }
        if (self.fresh || self.used) && (collective == Collective::Barrier || self.device != Device::Cpu) {
            let given = if self.used { "--used" } else { "--fresh" };
            return Err(format!("{given} is for collectives with data on the CPU: leave it out"));
        }
        if self.label.contains([',', '"', '\n']) {
            return Err(format!("--label '{}': a label holds no comma, quote or line end", self.label));
        }
        let has_none = matches!(collective, Collective::SendRecv | Collective::Barrier);
        if self.device == Device::Cuda && has_none {
            return Err(format!("--device cuda: {collective} is measured on the CPU only"));
        }
        let measured =
            |dtype: DType| self.sizes(dtype).any(|bytes| shape(collective, dtype, bytes, world).is_some());
        if let Some(&dtype) = self.dtype.iter().find(|d| collective != Collective::Barrier && !measured(**d))
        {
            if self.max < dtype.size() {
                return Err(format!(
                    "--max {} holds no element of {dtype} ({} bytes)",
                    self.max,
                    dtype.size()
                ));
            }
            return Err(format!(
                "no size from --min {} to --max {} holds an element of {dtype} for each of {world} ranks: raise --max",
                self.min, self.max
            ));
        }
        if collective.reduces() {
            for op in &self.op {
                if let Some(dtype) = self.dtype.iter().find(|d| !op.supports(**d)) {
                    return Err(format!(
                        "--op {op} is not defined for --dtype {dtype}: leave one of them out"
                    ));
                }
            }
        }
        Ok(())
    }

    /// The sizes to measure, in bytes.
    pub fn sizes(&self, dtype: DType) -> impl Iterator<Item = usize> {
        let larger = |bytes: &usize| bytes.checked_mul(self.factor);
        std::iter::successors(Some(self.min.max(dtype.size())), larger).take_while(|&bytes| bytes <= self.max)
    }
}

fn parse_size(text: &str) -> Result<usize, String> {
    match parse_bytes(text) {
        Some(n) if n <= 1 << 40 => Ok(n as usize),
        _ => Err("expected bytes with K, M or G (powers of 1024), such as 4, 64K or 256M".to_owned()),
    }
}

fn parse_count(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(n) if (1..=65536).contains(&n) => Ok(n),
        _ => Err("expected a whole number from 1".to_owned()),
    }
}

fn parse_factor(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(n) if n >= 2 => Ok(n),
        _ => Err("expected a whole number from 2, such as 2 or 4".to_owned()),
    }
}

fn parse_seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(s) if s > 0.0 && s <= 1e6 => Ok(s),
        _ => Err("expected seconds above 0, such as 0.3".to_owned()),
    }
}

/// Short names (f32) and long ones (float32).
pub fn parse_dtype(text: &str) -> Result<DType, String> {
    let short = |d: DType| match d {
        DType::Bool => "bool",
        DType::U8 => "u8",
        DType::I8 => "i8",
        DType::I16 => "i16",
        DType::I32 => "i32",
        DType::I64 => "i64",
        DType::F16 => "f16",
        DType::BF16 => "bf16",
        DType::F32 => "f32",
        DType::F64 => "f64",
    };
    DType::ALL
        .into_iter()
        .find(|&d| short(d) == text || d.name() == text)
        .ok_or_else(|| format!("expected one of {}", DType::ALL.map(short).join(", ")))
}

fn parse_ratio(text: &str) -> Result<(String, String), String> {
    match text.split_once('/') {
        Some((a, b)) if !a.is_empty() && !b.is_empty() => Ok((a.to_owned(), b.to_owned())),
        _ => Err("expected two labels, such as gloo/smddp".to_owned()),
    }
}

fn parse_op(text: &str) -> Result<ReduceOp, String> {
    ReduceOp::from_name(text)
        .ok_or_else(|| format!("expected one of {}", ReduceOp::ALL.map(ReduceOp::name).join(", ")))
}

fn parse_collective(text: &str) -> Result<Collective, String> {
    if text == "sendrecv" {
        // As the command that measures it is called. What a plan cannot be of is said there.
        return Ok(Collective::SendRecv);
    }
    Collective::from_name(text)
        .ok_or_else(|| format!("expected one of {}", Collective::PLANNED.map(Collective::name).join(", ")))
}

/// What a CSV calls the collective; what is no name of ours may be another library's.
fn parse_csv_op(text: &str) -> Result<String, Infallible> {
    Ok(Collective::from_name(text).map_or_else(|| text.to_owned(), |known| csv_name(known).to_owned()))
}

fn parse_csv_dtype(text: &str) -> Result<String, Infallible> {
    Ok(parse_dtype(text).map_or_else(|_| text.to_owned(), |known| known.name().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bench(line: &str) -> Result<Bench, String> {
        let words = std::iter::once("smddp-perf").chain(line.split(' '));
        let cli = Cli::try_parse_from(words).map_err(|e| e.to_string())?;
        let (collective, bench) = cli.command.bench().ok_or("not a measurement")?;
        bench.check(collective, bench.np.unwrap_or(1))?;
        Ok(bench.clone())
    }

    #[test]
    fn a_full_line_is_read() {
        let b = bench(
            "all_reduce --np 4 --nodes 2 --min 4 --max 256M --factor 4 --dtype f32,bfloat16 --op sum,max",
        )
        .unwrap();
        assert_eq!((b.np, b.nodes, b.min, b.max, b.factor), (Some(4), 2, 4, 256 << 20, 4));
        assert_eq!(b.dtype, [DType::F32, DType::BF16]);
        assert_eq!(b.op, [ReduceOp::Sum, ReduceOp::Max]);
    }

    #[test]
    fn impossible_lines_say_what_was_expected() {
        for (line, part) in [
            ("all_reduce --max 12Q", "such as 4, 64K"),
            ("all_reduce --dtype f33", "expected one of bool, u8"),
            ("all_reduce --op plus", "expected one of sum, avg"),
            ("all_reduce --np 0", "whole number from 1"),
            ("all_reduce --factor 1", "whole number from 2"),
            ("all_reduce --budget -1", "seconds above 0"),
            ("all_reduce --batch 0", "seconds above 0"),
            ("all_reduce --min 1M --max 1K", "is above --max"),
            ("all_reduce --np 2 --nodes 3", "raise --np"),
            ("broadcast --np 2 --root 2", "with 2 ranks give 0 to 1"),
            ("sendrecv --np 1", "at least 2 ranks"),
            ("all_reduce --op band", "not defined for --dtype float32"),
            ("all_reduce --min 1 --max 2", "holds no element"),
            ("al_reduce", "all_reduce"),
        ] {
            let text = bench(line).unwrap_err();
            assert!(text.contains(part), "{line}: {text}");
        }
    }
}
