//! The measuring job: joins the world, measures every size, reports on rank 0.

use std::fs::File;
use std::io::IsTerminal;
use std::path::Path;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use smddp::{Collective, DType, ReduceOp, Settings, World};

use crate::args::{Bench, Device};
use crate::device::Gpu;
use crate::failure::{FAILED, Failure, USAGE};
use crate::measure::{Effort, measure};
use crate::output::print;
use crate::report::{self, Header};
use crate::row::Row;
use crate::workload::Kind;
use crate::{chart, info, launch};

/// An operation of a benchmark that takes longer has failed, unless SMDDP_TIMEOUT says otherwise.
const OPERATION_LIMIT: &str = "120";

pub fn run(collective: Collective, options: &Bench) -> Result<(), Failure> {
    if options.started {
        launch::follow_the_starter()?;
        if !options.no_bind {
            launch::bind();
        }
        return rank(collective, options);
    }
    if let Some(np) = options.np
        && !launch::launched()
    {
        options.check(collective, np).map_err(Failure::Usage)?;
        if np > 1 {
            return launch::run(np, options.nodes, Duration::from_secs_f64(options.limit));
        }
    }
    rank(collective, options)
}

/// The part of one rank.
fn rank(collective: Collective, options: &Bench) -> Result<(), Failure> {
    let mut settings = Settings::from_env()?;
    if std::env::var_os("SMDDP_TIMEOUT").is_none() {
        settings.set("SMDDP_TIMEOUT", OPERATION_LIMIT)?;
    }
    let world = World::init_with(settings, &[])?;
    let speaks = world.rank() == 0;
    if let Err(text) = check(collective, options, world.size()) {
        return Err(if speaks { Failure::Usage(text) } else { Failure::SaidByRank0(USAGE) });
    }
    let outcome = measure_all(&world, collective, options);
    if let Err(failure) = &outcome
        && !matches!(failure, Failure::Wrong { .. })
    {
        world.abort(&failure.to_string());
    }
    world.shutdown();
    match outcome {
        Err(Failure::Wrong { .. }) if !speaks => Err(Failure::SaidByRank0(FAILED)),
        other => other,
    }
}

fn check(collective: Collective, options: &Bench, world: usize) -> Result<(), String> {
    match options.np {
        Some(np) if np != world => {
            Err(format!("--np {np}, but the launcher started {world} ranks: leave --np out under a launcher"))
        }
        _ => options.check(collective, world),
    }?;
    if options.nodes > 1 && !options.started {
        return Err("--nodes is for ranks that --np starts: leave it out under a launcher, where SMDDP_NODE_ID tells a \
                    rank's node"
            .to_owned());
    }
    Ok(())
}

fn measure_all(world: &World, collective: Collective, options: &Bench) -> Result<(), Failure> {
    let jobs = jobs(collective, options);
    let mut header = header(world, options);
    let gpu = match options.device {
        Device::Cpu => None,
        Device::Cuda => Some(Gpu::open(world, options.driver.as_deref())?),
    };
    if let Some(gpu) = &gpu {
        header.device = gpu.describe();
    }
    let mut output = Output::new(world.rank() == 0, options, collective, &header, jobs.len())?;
    let mut rows = Vec::with_capacity(jobs.len());
    let effort = Effort { budget: options.budget, batch: options.batch };
    for (kind, dtype, bytes) in jobs {
        output.begin(kind, dtype, bytes);
        let measured = match &gpu {
            Some(gpu) => gpu.measure(world, kind, dtype, bytes, effort),
            None => measure(world, kind, dtype, bytes, effort),
        };
        if let Some(row) = measured? {
            output.row(&row)?;
            rows.push(row);
        }
    }
    output.finish(&header, &rows)?;
    if let Some(gpu) = &gpu {
        gpu.end();
    }
    let wrong = rows.iter().filter(|r| r.right == Some(false)).count();
    if wrong > 0 {
        return Err(Failure::Wrong { wrong, rows: rows.len() });
    }
    Ok(())
}

/// Everything to measure, in the order of the table.
fn jobs(collective: Collective, options: &Bench) -> Vec<(Kind, DType, usize)> {
    let kind = |op| Kind {
        collective,
        op,
        root: options.root,
        shared: options.shared,
        fresh: options.fresh || options.used,
        used: options.used,
    };
    if collective == Collective::Barrier {
        return vec![(kind(ReduceOp::Sum), DType::U8, 0)];
    }
    let ops = if collective.reduces() { options.op.as_slice() } else { &[ReduceOp::Sum] };
    let mut jobs = Vec::new();
    for &op in ops {
        for &dtype in &options.dtype {
            jobs.extend(options.sizes(dtype).map(|bytes| (kind(op), dtype, bytes)));
        }
    }
    jobs
}

fn header(world: &World, options: &Bench) -> Header {
    Header {
        world: world.size(),
        shape: world.shape().to_string(),
        bootstrap: match smddp::bootstrap::mpi::description() {
            Some(mpi) => format!("{}: {mpi}", world.how()),
            None => world.how().to_owned(),
        },
        transports: world.describe(),
        cpu: info::cpu_line(),
        data: use_of_data(options),
        device: String::new(),
    }
}

/// In what the calls differ from those on inputs that nobody writes in between.
fn use_of_data(options: &Bench) -> String {
    let mut told = Vec::new();
    if options.shared {
        told.push("data that other ranks read lies in memory that the ranks of a node share");
    }
    if options.fresh || options.used {
        told.push("inputs are written anew before each call");
    }
    if options.used {
        told.push("a call ends when each rank looks at its result");
    }
    told.join("; ")
}

/// Where rank 0's results go; the other ranks have one that does nothing.
struct Output<'a> {
    speaks: bool,
    options: &'a Bench,
    bar: ProgressBar,
}

impl<'a> Output<'a> {
    fn new(
        speaks: bool,
        options: &'a Bench,
        collective: Collective,
        header: &Header,
        jobs: usize,
    ) -> Result<Self, Failure> {
        let bar = if speaks && std::io::stderr().is_terminal() {
            let bar = ProgressBar::with_draw_target(Some(jobs as u64), ProgressDrawTarget::stderr());
            if let Ok(style) = ProgressStyle::with_template("{bar:24} {pos}/{len} {msg} {elapsed}") {
                bar.set_style(style);
            }
            bar
        } else {
            ProgressBar::hidden()
        };
        let output = Output { speaks, options, bar };
        output.check_files()?;
        if output.shows_table() {
            print(&header.text(report_name(collective)))?;
        }
        Ok(output)
    }

    /// A file that cannot be written is better known before the measurement than after it.
    fn check_files(&self) -> Result<(), Failure> {
        let json = self.options.json.iter().filter(|p| *p != Path::new("-"));
        for path in json.chain(&self.options.csv).chain(&self.options.plot).filter(|_| self.speaks) {
            let open = File::options().append(true).create(true).open(path);
            open.map_err(|e| Failure::file(path, e))?;
        }
        match &self.options.csv {
            Some(path) if self.speaks => report::check_csv(path),
            _ => Ok(()),
        }
    }

    /// JSON on standard output takes the table's place.
    fn shows_table(&self) -> bool {
        self.speaks && self.options.json.as_deref() != Some(Path::new("-"))
    }

    fn begin(&self, kind: Kind, dtype: DType, bytes: usize) {
        self.bar.set_message(format!("{} {dtype} {}", kind.collective, chart::size_label(bytes)));
    }

    fn row(&mut self, row: &Row) -> Result<(), Failure> {
        self.bar.inc(1);
        if !self.speaks {
            return Ok(());
        }
        if let Some(path) = &self.options.csv {
            report::append_csv(path, &self.options.label, std::slice::from_ref(row))?;
        }
        if self.shows_table() {
            return self.bar.suspend(|| print(&format!("{}\n", report::line(row))));
        }
        Ok(())
    }

    fn finish(&self, header: &Header, rows: &[Row]) -> Result<(), Failure> {
        self.bar.finish_and_clear();
        if !self.speaks {
            return Ok(());
        }
        if self.shows_table() {
            print(&format!("{}\n", report::summary(rows)))?;
        }
        if let Some(path) = &self.options.json {
            let text = format!("{:#}\n", report::as_json(header, rows));
            if path == Path::new("-") {
                print(&text)?;
            } else {
                std::fs::write(path, text).map_err(|e| Failure::file(path, e))?;
            }
        }
        if let Some(path) = &self.options.plot {
            std::fs::write(path, chart::of_rows(header, rows)).map_err(|e| Failure::file(path, e))?;
        }
        Ok(())
    }
}

fn report_name(collective: Collective) -> &'static str {
    match collective {
        Collective::SendRecv => "sendrecv",
        other => other.name(),
    }
}
