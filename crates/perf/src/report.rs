//! A run's results: for people, for programs (JSON), and for `smddp-perf compare` (CSV).

use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::Path;

use serde_json::{Value, json};
use smddp::{Collective, ReduceOp};

use crate::failure::Failure;
use crate::row::{OnDevice, Row};

/// What the job is, as far as it was found.
#[derive(Clone, Debug)]
pub struct Header {
    pub world: usize,
    /// Nodes by ranks on each, e.g. "2x2".
    pub shape: String,
    /// How the ranks found each other.
    pub bootstrap: String,
    /// Transports, provider, rails.
    pub transports: String,
    pub cpu: String,
    /// See [`crate::args::Bench`]'s `shared`, `fresh` and `used`; empty: none of them.
    pub data: String,
    /// How calls on CUDA memory go; empty: they were on the CPU's.
    pub device: String,
}

impl Header {
    pub fn text(&self, command: &str) -> String {
        let mut t = format!("# smddp-perf {} {command}\n", env!("CARGO_PKG_VERSION"));
        for line in self.transports.lines() {
            let _ = writeln!(t, "# {line}");
        }
        let _ = writeln!(t, "# found each other by {}", self.bootstrap);
        let _ = writeln!(t, "# {}", self.cpu);
        if !self.data.is_empty() {
            let _ = writeln!(t, "# {}", self.data);
        }
        if !self.device.is_empty() {
            let _ = writeln!(t, "# {}", self.device);
            t.push_str("# host: the host's part of a call; copies: those to and from pinned memory alone, both ways at once;\n");
            t.push_str("# on host: the same call on the CPU's memory; of bound: the call over the longer of these two\n");
        }
        t.push_str("# time: median and fastest batch of about 1 ms, slowest rank; bandwidths in 1e9 bytes/s, of the median\n#\n");
        let more = if self.device.is_empty() {
            String::new()
        } else {
            format!(" {:>9} {:>11} {:>11} {:>8}", "host us", "copies us", "on host us", "of bound")
        };
        let _ = writeln!(
            t,
            "# {:>10} {:>12} {:>9} {:>7} {:>5} {:>11} {:>11} {:>9} {:>9} {:>7}{more}  algorithm",
            "bytes", "elements", "type", "op", "root", "median us", "fastest us", "algbw", "busbw", "check"
        );
        t
    }
}

pub fn line(row: &Row) -> String {
    let reduces = if row.collective.reduces() { row.op.name() } else { "-" };
    let root = if row.collective.rooted() { row.root.to_string() } else { "-".to_owned() };
    format!(
        "{:>12} {:>12} {:>9} {:>7} {:>5} {:>11.2} {:>11.2} {:>9.3} {:>9.3} {:>7}{}  {}",
        row.bytes,
        row.count,
        row.dtype.name(),
        reduces,
        root,
        row.median * 1e6,
        row.fastest * 1e6,
        row.algbw(),
        row.busbw(),
        verdict(row),
        row.device.as_ref().map(|d| device_columns(d, row.median)).unwrap_or_default(),
        row.algorithm
    )
}

fn device_columns(device: &OnDevice, median: f64) -> String {
    let us = |time: Option<f64>| time.map_or("-".to_owned(), |t| format!("{:.2}", t * 1e6));
    let bound = device.bound().map_or("-".to_owned(), |b| format!("{:.2}", median / b));
    let host = Some(device.host);
    format!(" {:>9} {:>11} {:>11} {bound:>8}", us(host), us(device.copies), us(device.on_host))
}

/// The closing line: how many rows were right, and the mean bandwidth as nccl-tests prints it.
pub fn summary(rows: &[Row]) -> String {
    let wrong = rows.iter().filter(|r| r.right == Some(false)).count();
    let mean = rows.iter().map(Row::busbw).sum::<f64>() / rows.len().max(1) as f64;
    format!("#\n# {} sizes, {} wrong; mean busbw {mean:.3} GB/s", rows.len(), wrong)
}

pub fn verdict(row: &Row) -> &'static str {
    match row.right {
        Some(true) => "ok",
        Some(false) => "WRONG",
        None => "-",
    }
}

pub fn as_json(header: &Header, rows: &[Row]) -> Value {
    let rows: Vec<Value> = rows
        .iter()
        .map(|r| {
            json!({
                "collective": r.collective.name(), "dtype": r.dtype.name(),
                "op": if r.collective.reduces() { json!(r.op.name()) } else { Value::Null },
                "root": if r.collective.rooted() { json!(r.root) } else { Value::Null },
                "bytes": r.bytes, "elements": r.count, "calls": r.calls,
                "median_us": r.median * 1e6, "fastest_us": r.fastest * 1e6,
                "algbw_GBps": r.algbw(), "busbw_GBps": r.busbw(),
                "correct": r.right, "algorithm": r.algorithm,
                "host_us": r.device.as_ref().map(|d| d.host * 1e6),
                "copies_us": r.device.as_ref().and_then(|d| d.copies).map(|t| t * 1e6),
                "on_host_us": r.device.as_ref().and_then(|d| d.on_host).map(|t| t * 1e6),
            })
        })
        .collect();
    json!({
        "version": env!("CARGO_PKG_VERSION"), "ranks": header.world, "shape": header.shape,
        "bootstrap": header.bootstrap, "transports": header.transports, "cpu": header.cpu, "data": header.data,
        "device": header.device, "rows": rows,
    })
}

/// Columns shared with the benchmarks of other libraries (`benches/`), so that one table can hold all.
pub const CSV_HEADER: &str = "label,op,dtype,world,bytes,iters,median_us,min_us,algbw_GBps,busbw_GBps,check";

/// The collective in the column `op`, which goes on with the reduction where that is not the sum.
pub fn csv_name(collective: Collective) -> &'static str {
    match collective {
        Collective::AllReduce => "allreduce",
        Collective::AllGather => "allgather",
        Collective::AllToAll => "alltoall",
        Collective::ReduceScatter
        | Collective::Broadcast
        | Collective::Reduce
        | Collective::Gather
        | Collective::Scatter
        | Collective::Barrier => collective.name(),
        Collective::SendRecv => "sendrecv",
    }
}

pub fn csv_line(label: &str, row: &Row) -> String {
    let op = match row.op {
        op if row.collective.reduces() && op != ReduceOp::Sum => format!("_{op}"),
        _ => String::new(),
    };
    format!(
        "{label},{}{op},{},{},{},{},{:.2},{:.2},{:.4},{:.4},{}",
        csv_name(row.collective),
        row.dtype.name(),
        row.world,
        row.bytes,
        row.calls,
        row.median * 1e6,
        row.fastest * 1e6,
        row.algbw(),
        row.busbw(),
        if row.right == Some(false) { "WRONG" } else { "ok" }
    )
}

/// A file that [`append_csv`] may append to: one of ours, or an empty one.
pub fn check_csv(path: &Path) -> Result<(), Failure> {
    let mut first = String::new();
    let read = File::open(path).and_then(|file| BufReader::new(file).read_line(&mut first));
    match read {
        Ok(0) => Ok(()),
        Ok(_) if first.trim_end() == CSV_HEADER => Ok(()),
        // Text in no encoding of ours is another file, too.
        Err(e) if e.kind() != std::io::ErrorKind::InvalidData => Err(Failure::file(path, e)),
        Ok(_) | Err(_) => Err(foreign_csv(path)),
    }
}

pub fn foreign_csv(path: &Path) -> Failure {
    Failure::file(path, format!("not a benchmark's CSV: the first line is not \"{CSV_HEADER}\""))
}

/// Appends; writes the header line when the file is new. A label has no comma, quote or line end.
pub fn append_csv(path: &Path, label: &str, rows: &[Row]) -> Result<(), Failure> {
    let write = || -> std::io::Result<()> {
        let mut file = File::options().append(true).create(true).open(path)?;
        let mut text = String::new();
        if file.seek(SeekFrom::End(0))? == 0 {
            let _ = writeln!(text, "{CSV_HEADER}");
        }
        for row in rows {
            let _ = writeln!(text, "{}", csv_line(label, row));
        }
        file.write_all(text.as_bytes())
    };
    write().map_err(|e| Failure::file(path, e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use smddp::DType;

    fn row() -> Row {
        Row {
            collective: Collective::AllReduce,
            dtype: DType::F32,
            op: ReduceOp::Sum,
            root: 0,
            world: 4,
            bytes: 4_000_000,
            count: 1_000_000,
            calls: 100,
            median: 0.004,
            fastest: 0.002,
            right: Some(true),
            algorithm: "hierarchical(sharded)".to_owned(),
            device: None,
        }
    }

    #[test]
    fn csv_has_the_agreed_columns() {
        assert_eq!(
            csv_line("smddp", &row()),
            "smddp,allreduce,float32,4,4000000,100,4000.00,2000.00,1.0000,1.5000,ok"
        );
        assert_eq!(csv_line("x", &row()).split(',').count(), CSV_HEADER.split(',').count());
        assert!(csv_line("x", &Row { right: Some(false), ..row() }).ends_with("WRONG"));
    }

    #[test]
    fn a_csv_gets_one_header_however_often_it_is_appended() {
        let path = std::env::temp_dir().join(format!("smddp-perf-csv-{}", std::process::id()));
        append_csv(&path, "a", &[row()]).unwrap();
        append_csv(&path, "b", &[row()]).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(text.lines().count(), 3);
        assert_eq!(text.matches("median_us").count(), 1);
    }

    #[test]
    fn wrong_rows_are_counted_and_shown() {
        let bad = Row { right: Some(false), ..row() };
        assert!(line(&bad).contains("WRONG"));
        assert!(summary(&[row(), bad]).contains("2 sizes, 1 wrong"));
    }
}
