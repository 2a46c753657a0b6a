//! CSV files of several libraries, side by side: Markdown tables or one drawing.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;

use crate::args::CompareArgs;
use crate::chart::{self, Panel, Series, size_label};
use crate::failure::Failure;
use crate::output::print;
use crate::report::{CSV_HEADER, foreign_csv};

/// One line of a CSV file.
#[derive(Clone, Debug)]
struct Line {
    label: String,
    op: String,
    dtype: String,
    world: usize,
    bytes: usize,
    /// µs, of the fastest batch.
    fastest: f64,
    /// GB/s of it.
    busbw: f64,
    wrong: bool,
}

/// (collective, type, ranks)
type Key = (String, String, usize);

type BySize<T> = BTreeMap<usize, BTreeMap<String, T>>;

/// The figures of one label at one size, over all rounds.
#[derive(Clone, Copy, Debug)]
struct Figure {
    micros: f64,
    busbw: f64,
    /// Half of what lies between the quartiles of the rounds, over their median; where that is asked for.
    spread: Option<f64>,
}

impl Figure {
    /// Of the rounds' fastest batches, (µs, GB/s), of which there is one at least: the fastest, or the one in the middle.
    fn of(mut rounds: Vec<(f64, f64)>, median: bool) -> Figure {
        rounds.sort_by(|a, b| a.0.total_cmp(&b.0));
        let at = |share: f64| {
            let place = (rounds.len() - 1) as f64 * share;
            let (below, above) = (rounds[place.floor() as usize].0, rounds[place.ceil() as usize].0);
            below + (above - below) * place.fract()
        };
        if !median {
            return Figure { micros: rounds[0].0, busbw: rounds[0].1, spread: None };
        }
        let micros = at(0.5);
        // What is moved is the same in all rounds.
        let moved = rounds[rounds.len() - 1].0 * rounds[rounds.len() - 1].1;
        let spread = (at(0.75) - at(0.25)) / 2.0 / micros.max(1e-9);
        Figure { micros, busbw: moved / micros.max(1e-9), spread: Some(spread) }
    }
}

pub fn run(options: &CompareArgs) -> Result<(), Failure> {
    let mut lines = Vec::new();
    for file in &options.files {
        let text = std::fs::read_to_string(file).map_err(|e| Failure::file(file, e))?;
        lines.extend(parse(file, &text)?);
    }
    let table = Table::new(&lines, options);
    if table.groups.is_empty() {
        return Err(Failure::Usage(format!(
            "no line matches --op, --dtype, --world and --from; these files hold {}",
            held(&lines)
        )));
    }
    for label in options.ratio.iter().flat_map(|(a, b)| [a, b]).chain(&options.against) {
        if !table.labels.contains(label) {
            eprintln!(
                "smddp-perf: no line is labelled '{label}'; the labels are {}",
                table.labels.join(", ")
            );
        }
    }
    match &options.svg {
        Some(path) => std::fs::write(path, table.svg(options)?).map_err(|e| Failure::file(path, e)),
        None => print(&table.markdown(options)),
    }
}

/// The collectives, types and numbers of ranks of `lines`, each once.
fn held(lines: &[Line]) -> String {
    let each: BTreeSet<String> = lines.iter().map(|l| format!("{} {} {}", l.op, l.dtype, l.world)).collect();
    if each.is_empty() { "no results".to_owned() } else { Vec::from_iter(each).join(", ") }
}

fn parse(path: &Path, text: &str) -> Result<Vec<Line>, Failure> {
    let mut rows = text.lines();
    if rows.next() != Some(CSV_HEADER) {
        return Err(foreign_csv(path));
    }
    let mut lines = Vec::new();
    for (number, row) in rows.enumerate() {
        let f: Vec<&str> = row.split(',').collect();
        let line = || -> Option<Line> {
            Some(Line {
                label: f[0].to_owned(),
                op: f[1].to_owned(),
                dtype: f[2].to_owned(),
                world: f[3].parse().ok()?,
                bytes: f[4].parse().ok()?,
                fastest: f[7].parse().ok()?,
                busbw: f[9].parse::<f64>().ok()? * f[6].parse::<f64>().ok()?
                    / f[7].parse::<f64>().ok()?.max(1e-9),
                wrong: f[10] == "WRONG",
            })
        };
        match f.get(10) {
            // A call that a library does not offer has no time.
            Some(&"unsupported") => {}
            Some(_) => lines.push(line().ok_or_else(|| {
                Failure::file(path, format!("line {}: a number was expected: {row}", number + 2))
            })?),
            None => {
                return Err(Failure::file(path, format!("line {}: 11 columns expected: {row}", number + 2)));
            }
        }
    }
    Ok(lines)
}

struct Table {
    /// Labels in the order they first appear.
    labels: Vec<String>,
    /// In the order they first appear: by size, by label.
    groups: Vec<(Key, BySize<Figure>)>,
    wrong: Vec<String>,
}

impl Table {
    fn new(lines: &[Line], options: &CompareArgs) -> Table {
        let mut table = Table { labels: Vec::new(), groups: Vec::new(), wrong: Vec::new() };
        let mut rounds: Vec<BySize<Vec<(f64, f64)>>> = Vec::new();
        let fits = |l: &&Line| {
            options.op.as_ref().is_none_or(|op| *op == l.op)
                && options.dtype.as_ref().is_none_or(|d| *d == l.dtype)
                && options.world.is_none_or(|w| w == l.world)
                && l.bytes >= options.from
        };
        for line in lines.iter().filter(fits) {
            if !table.labels.contains(&line.label) {
                table.labels.push(line.label.clone());
            }
            if line.wrong {
                table.wrong.push(format!("{} {} {} {}", line.label, line.op, line.dtype, line.bytes));
            }
            let key = (line.op.clone(), line.dtype.clone(), line.world);
            let place = table.groups.iter().position(|(k, _)| *k == key).unwrap_or_else(|| {
                table.groups.push((key, BySize::new()));
                rounds.push(BySize::new());
                table.groups.len() - 1
            });
            let row = rounds[place].entry(line.bytes).or_default();
            row.entry(line.label.clone()).or_default().push((line.fastest, line.busbw));
        }
        for ((_, sizes), rounds) in table.groups.iter_mut().zip(rounds) {
            let figures = |row: BTreeMap<String, Vec<_>>| {
                row.into_iter().map(|(label, rounds)| (label, Figure::of(rounds, options.median))).collect()
            };
            sizes.extend(rounds.into_iter().map(|(bytes, row)| (bytes, figures(row))));
        }
        table
    }

    fn labels_of(&self, sizes: &BySize<Figure>) -> Vec<&String> {
        self.labels.iter().filter(|l| sizes.values().any(|row| row.contains_key(*l))).collect()
    }

    fn markdown(&self, options: &CompareArgs) -> String {
        let mut out = String::new();
        let unit = if options.busbw { "bus bandwidth in GB/s" } else { "µs" };
        let which = which(options);
        for (key, sizes) in &self.groups {
            let labels = self.labels_of(sizes);
            let _ = writeln!(out, "\n**{}, {}, {} ranks** ({unit}, {which})\n", key.0, key.1, key.2);
            let _ = write!(out, "| size |");
            for label in &labels {
                let _ = write!(out, " {label} |");
            }
            let ratios = options.ratio.iter().filter(|(a, b)| labels.contains(&a) && labels.contains(&b));
            let ratios: Vec<_> = ratios.collect();
            for (slower, faster) in &ratios {
                let _ = write!(out, " {slower} / {faster} |");
            }
            let against = options.against.as_ref().filter(|a| labels.contains(a));
            if let Some(label) = against {
                let _ = write!(out, " best other / {label} |");
            }
            let columns = labels.len() + 1 + ratios.len() + usize::from(against.is_some());
            let _ = writeln!(out, "\n|{}", " --: |".repeat(columns));
            for (bytes, row) in sizes {
                let cells = cells(row, &labels, &ratios, options.busbw);
                let last = against.map_or_else(String::new, |a| best_other(row, a));
                let _ = writeln!(out, "| {} |{cells}{last}", size_label(*bytes));
            }
        }
        if !self.wrong.is_empty() {
            let _ = writeln!(out, "\nWRONG results: {}", self.wrong.join("; "));
        }
        out
    }

    /// A drawing holds one group: bandwidth and time by size, a line for each label.
    fn svg(&self, options: &CompareArgs) -> Result<String, Failure> {
        let [(key, sizes)] = self.groups.as_slice() else {
            let all: Vec<String> =
                self.groups.iter().map(|(k, _)| format!("{} {} {}", k.0, k.1, k.2)).collect();
            return Err(Failure::Usage(format!(
                "--svg draws one collective, type and number of ranks; these files hold {}: choose with --op, --dtype, --world",
                all.join(", ")
            )));
        };
        let series = |value: &dyn Fn(&Figure) -> f64| -> Vec<Series> {
            let points = |label: &String| {
                sizes.iter().filter_map(|(b, row)| Some((*b as f64, value(row.get(label)?)))).collect()
            };
            self.labels_of(sizes).into_iter().map(|l| Series { name: l.clone(), points: points(l) }).collect()
        };
        let which = which(options);
        let panels = [
            Panel { title: format!("time, µs ({which})"), linear: false, series: series(&|b| b.micros) },
            Panel {
                title: format!("bus bandwidth, GB/s ({which})"),
                linear: true,
                series: series(&|b| b.busbw),
            },
        ];
        let title = options.title.clone().unwrap_or_else(|| format!("{} of {}", key.0, key.1));
        Ok(chart::svg(&title, &format!("{} of {}, {} ranks", key.0, key.1, key.2), &panels))
    }
}

fn which(options: &CompareArgs) -> &'static str {
    if options.median { "median round" } else { "fastest batch" }
}

fn cells(
    row: &BTreeMap<String, Figure>,
    labels: &[&String],
    ratios: &[&(String, String)],
    busbw: bool,
) -> String {
    let fastest = row.values().map(|b| b.micros).fold(f64::INFINITY, f64::min);
    let mut out = String::new();
    for label in labels {
        let _ = match row.get(*label) {
            None => write!(out, " - |"),
            Some(b) => {
                let spread = b.spread.map_or_else(String::new, |share| format!(" ±{:.0} %", share * 100.0));
                let shown = short(if busbw { b.busbw } else { b.micros }) + &spread;
                if b.micros == fastest { write!(out, " **{shown}** |") } else { write!(out, " {shown} |") }
            }
        };
    }
    for (slower, faster) in ratios {
        let _ = match (row.get(slower), row.get(faster)) {
            (Some(slow), Some(fast)) => write!(out, " {}x |", short(slow.micros / fast.micros)),
            _ => write!(out, " - |"),
        };
    }
    out
}

/// How many times as long the best of the others takes as `label`.
fn best_other(row: &BTreeMap<String, Figure>, label: &String) -> String {
    let others = row.iter().filter(|(l, _)| *l != label).map(|(_, b)| b.micros);
    match (row.get(label), others.reduce(f64::min)) {
        (Some(one), Some(best)) => format!(" {}x |", short(best / one.micros)),
        _ => " - |".to_owned(),
    }
}

/// Three digits are all a measurement holds.
fn short(v: f64) -> String {
    if v < 10.0 {
        format!("{v:.2}")
    } else if v < 100.0 {
        format!("{v:.1}")
    } else {
        format!("{v:.0}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    const CSV: &str = "label,op,dtype,world,bytes,iters,median_us,min_us,algbw_GBps,busbw_GBps,check
smddp,allreduce,float32,2,4,100,2.00,1.00,0.0020,0.0020,ok
gloo,allreduce,float32,2,4,100,300.00,200.00,0.0000,0.0000,ok
smddp,allreduce,float32,2,4,100,4.00,0.50,0.0010,0.0010,ok
ours2,allgather,float32,2,4,0,,,,,unsupported
gloo,allreduce,float32,2,16,100,300.00,200.00,0.0000,0.0000,WRONG
";

    fn options(more: &str) -> CompareArgs {
        let line = format!("smddp-perf compare x.csv{more}");
        match crate::args::Cli::try_parse_from(line.split(' ')).unwrap().command {
            crate::args::Command::Compare(c) => c,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_best_round_counts_and_the_fastest_is_bold() {
        let options = options(" --ratio gloo/smddp --ratio gloo/absent");
        let lines = parse(Path::new("x.csv"), CSV).unwrap();
        let text = Table::new(&lines, &options).markdown(&options);
        assert!(text.contains("| 4 B | **0.50** | 200 | 400x |"), "{text}");
        assert!(text.contains("| 16 B | - | **200** | - |"), "{text}");
        assert!(text.contains("WRONG results: gloo allreduce float32 16"), "{text}");
    }

    #[test]
    fn one_label_is_set_against_the_best_of_the_others() {
        let options = options(" --against smddp");
        let csv = format!("{CSV}mpi,allreduce,float32,2,4,100,9.00,1.00,0.0010,0.0010,ok\n");
        let lines = parse(Path::new("x.csv"), &csv).unwrap();
        let text = Table::new(&lines, &options).markdown(&options);
        assert!(text.contains("| size | smddp | gloo | mpi | best other / smddp |"), "{text}");
        assert!(text.contains("| 4 B | **0.50** | 200 | 1.00 | 2.00x |"), "{text}");
        assert!(text.contains("| 16 B | - | **200** | - | - |"), "{text}");
    }

    #[test]
    fn the_round_in_the_middle_counts_with_what_lies_around_it() {
        let row = |label: &str, fastest: f64| {
            format!("{label},allreduce,float32,2,4,100,90.00,{fastest:.2},1.0,2.0,ok\n")
        };
        let all: String =
            [10.0, 50.0, 20.0, 30.0, 40.0].map(|time| row("a", time) + &row("b", 2.0 * time)).concat();
        let lines = parse(Path::new("x.csv"), &format!("{CSV_HEADER}\n{all}")).unwrap();
        let text =
            Table::new(&lines, &options(" --median --against a")).markdown(&options(" --median --against a"));
        assert!(text.contains("(µs, median round)"), "{text}");
        assert!(text.contains("| 4 B | **30.0 ±33 %** | 60.0 ±33 % | 2.00x |"), "{text}");
        // 2 GB/s in 90 µs are 6 in 30.
        let busbw = options(" --median --busbw");
        assert!(Table::new(&lines, &busbw).markdown(&busbw).contains("| **6.00 ±33 %** |"), "{text}");
    }

    #[test]
    fn quartiles_may_lie_between_two_rounds() {
        let of = |times: &[f64]| Figure::of(times.iter().map(|t| (*t, 90.0 / t)).collect(), true);
        for (times, median, spread) in [
            (&[40.0, 10.0, 20.0][..], 20.0, 7.5 / 20.0),
            (&[80.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0], 45.0, 17.5 / 45.0),
            (&[10.0, 20.0], 15.0, 2.5 / 15.0),
            (&[10.0], 10.0, 0.0),
        ] {
            let figure = of(times);
            assert_eq!((figure.micros, figure.spread), (median, Some(spread)), "{times:?}");
            assert!((figure.busbw - 90.0 / median).abs() < 1e-12, "{times:?}: {}", figure.busbw);
        }
    }

    #[test]
    fn broken_files_are_named_with_their_line() {
        let bad = CSV.replace("300.00,200.00,0.0000,0.0000,ok", "x,200.00,0.0000,0.0000,ok");
        let text = parse(Path::new("x.csv"), &bad).unwrap_err().to_string();
        assert!(text.contains("x.csv") && text.contains("line 3"), "{text}");
        assert!(parse(Path::new("x.csv"), "a,b\n").is_err());
        assert!(parse(Path::new("x.csv"), &format!("{CSV_HEADER}\nshort\n")).is_err());
    }

    #[test]
    fn a_drawing_needs_one_group() {
        let two = format!("{CSV}smddp,allgather,float32,2,4,100,2.00,1.00,0.0020,0.0020,ok\n");
        let lines = parse(Path::new("x.csv"), &two).unwrap();
        let all = options("");
        assert!(Table::new(&lines, &all).svg(&all).is_err());
        let one = options(" --op allreduce");
        assert!(Table::new(&lines, &one).svg(&one).unwrap().contains("gloo"));
    }
}
