//! `smddp-perf info`: what was found on this machine, and what would be used.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use smddp::Settings;
use smddp::slots::Origin;
use smddp_core::order::Order;
use smddp_core::reduce;

use crate::args::InfoArgs;
use crate::failure::Failure;
use crate::output::print;

/// A heading with its lines: name, what was found, and for some what it means.
struct Section {
    title: &'static str,
    lines: Vec<(String, String, String)>,
}

impl Section {
    fn new(title: &'static str) -> Section {
        Section { title, lines: Vec::new() }
    }

    fn add(&mut self, name: impl Into<String>, value: impl Into<String>) {
        self.lines.push((name.into(), value.into(), String::new()));
    }
}

pub fn run(options: &InfoArgs) -> Result<(), Failure> {
    let settings = Settings::from_env()?;
    let sections =
        [node(&settings), processor(&settings), network(), libraries(&settings), job(), in_force(&settings)];
    if options.json { print(&format!("{:#}\n", as_json(&sections))) } else { print(&as_text(&sections)) }
}

fn as_text(sections: &[Section]) -> String {
    let mut out = format!("smddp-perf {}\n", env!("CARGO_PKG_VERSION"));
    for section in sections {
        let _ = writeln!(out, "\n{}", section.title);
        let width = section.lines.iter().map(|l| l.0.len()).max().unwrap_or(0);
        let values = section.lines.iter().map(|l| l.1.len()).max().unwrap_or(0);
        for (name, value, note) in &section.lines {
            let line = if note.is_empty() {
                format!("  {name:width$}  {value}")
            } else {
                format!("  {name:width$}  {value:values$}  {note}")
            };
            let _ = writeln!(out, "{}", line.trim_end());
        }
    }
    out
}

fn as_json(sections: &[Section]) -> Value {
    let mut all = Map::new();
    for section in sections {
        let mut lines = Map::new();
        for (name, value, _) in &section.lines {
            lines.insert(name.clone(), json!(value));
        }
        all.insert(section.title.to_owned(), Value::Object(lines));
    }
    Value::Object(all)
}

fn node(settings: &Settings) -> Section {
    let mut s = Section::new("Node");
    let id = smddp::NodeId::of_this_process(settings);
    s.add("name", id.name);
    s.add("identity", id.label);
    s.add("kernel", read("/proc/sys/kernel/osrelease"));
    s.add("memory", memory());
    s.add("/dev/shm", free_bytes("/dev/shm"));
    s
}

fn memory() -> String {
    let text = read("/proc/meminfo");
    let field = |name: &str| {
        let line = text.lines().find(|l| l.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse::<f64>().ok()
    };
    match (field("MemTotal:"), field("MemAvailable:")) {
        (Some(total), Some(free)) => {
            format!("{:.1} GiB, {:.1} GiB available", total / f64::from(1 << 20), free / f64::from(1 << 20))
        }
        _ => "unknown".to_owned(),
    }
}

fn free_bytes(path: &str) -> String {
    match rustix::fs::statvfs(path) {
        Ok(s) => format!("{:.1} GiB free", (s.f_bavail * s.f_frsize) as f64 / f64::from(1 << 30)),
        Err(e) => format!("{e} (not needed: segments are memfds)"),
    }
}

fn processor(settings: &Settings) -> Section {
    let mut s = Section::new("Processor");
    s.add("model", model());
    s.add("cores", cores_text());
    for (name, size) in caches() {
        s.add(name, size);
    }
    reduce::use_portable(settings.text("SMDDP_SIMD") == "portable");
    let all: Vec<&str> = reduce::Variant::available().map(|v| v.name()).collect();
    s.add("shared-memory slots", slots(settings));
    s.add("kernels", format!("{} (this CPU runs {})", reduce::variant().name(), all.join(", ")));
    s
}

/// One line for the head of a measurement.
pub fn cpu_line() -> String {
    format!("cpu: {}, {}, kernels: {}", model(), cores_text(), reduce::variant().name())
}

fn slots(settings: &Settings) -> String {
    let (choice, origin) = smddp::slots::known(settings);
    let geometry = choice.geometry;
    let why = match origin {
        Origin::Settings => "as set",
        Origin::Probe => "found best on this machine",
        Origin::Usual => "usual; the first jobs of several ranks measure which are best",
    };
    let single_copy = match (choice.single_copy.mutual, choice.single_copy.alone) {
        (true, true) => "",
        (true, false) => ", faster than single copies where one rank gives or takes alone",
        (false, true) => ", faster than single copies where all take from one another",
        (false, false) => ", faster than single copies",
    };
    let hands_back = if choice.hands_back { ", cache lines handed back" } else { "" };
    let four_pages = smddp::caches::far(settings) == Order::FourPages;
    let pages = if four_pages { ", four pages read at once" } else { "" };
    format!("{} of {} KiB ({why}{single_copy}{hands_back}{pages})", geometry.slots, geometry.slot >> 10)
}

fn model() -> String {
    let text = read("/proc/cpuinfo");
    let line = text.lines().find(|l| l.starts_with("model name") || l.starts_with("CPU part"));
    line.and_then(|l| l.split_once(':')).map_or("unknown", |(_, v)| v.trim()).to_owned()
}

fn cores_text() -> String {
    let allowed = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let online = read("/sys/devices/system/cpu/online");
    format!("{allowed} usable by this process (online: {online})")
}

/// Caches of the first core: name and size, with who shares them.
fn caches() -> Vec<(String, String)> {
    let base = Path::new("/sys/devices/system/cpu/cpu0/cache");
    let mut found = Vec::new();
    for index in entries(base).into_iter().filter(|p| name_of(p).starts_with("index")) {
        let field = |name: &str| read(index.join(name));
        let kind = match field("type").as_str() {
            "Data" => "d",
            "Instruction" => "i",
            _ => "",
        };
        found.push((
            format!("L{}{kind}", field("level")),
            format!("{}, shared by cores {}", field("size"), field("shared_cpu_list")),
        ));
    }
    found
}

fn network() -> Section {
    let mut s = Section::new("Network interfaces");
    for path in entries(Path::new("/sys/class/net")) {
        let field = |name: &str| read(path.join(name));
        let speed = match field("speed").parse::<i64>() {
            Ok(mbit) if mbit > 0 => format!("{mbit} Mbit/s"),
            _ => "speed unknown".to_owned(),
        };
        s.add(name_of(&path), format!("{}, {speed}, MTU {}", field("operstate"), field("mtu")));
    }
    for path in entries(Path::new("/sys/class/infiniband")) {
        let driver = std::fs::read_link(path.join("device/driver")).map(|d| name_of(&d)).unwrap_or_default();
        s.add(name_of(&path), format!("RDMA device, driver {driver}"));
    }
    if s.lines.is_empty() {
        s.add("none", "only ranks of one node can talk");
    }
    s
}

fn libraries(settings: &Settings) -> Section {
    let mut s = Section::new("Libraries");
    let dirs = smddp::library_dirs(&[]);
    match smddp::fabric::found(settings, &dirs) {
        Ok(text) => s.add("libfabric", text),
        Err(e) => s.add("libfabric", format!("none: {e}")),
    }
    for (name, nics) in providers(settings, &dirs) {
        s.add(name, nics);
    }
    match smddp::bootstrap::mpi::found(settings, &dirs) {
        Ok(text) => s.add("MPI", text),
        Err(e) => s.add("MPI", format!("none: {e}")),
    }
    s.add("NCCL", nccl(settings, &dirs));
    let shown: Vec<String> = dirs.iter().map(|d| d.display().to_string()).collect();
    s.add("looked in", format!("the system's folders, {}", shown.join(", ")));
    s
}

/// Providers that carry data between nodes and that this library knows, best first.
const PROVIDERS: [&str; 6] = ["efa", "cxi", "verbs", "psm3", "opx", "tcp"];

/// One line for each provider found: its NICs, and which of them would be used.
fn providers(settings: &Settings, dirs: &[PathBuf]) -> Vec<(String, String)> {
    let nics = |settings: &Settings| smddp::fabric::probe(settings, dirs).unwrap_or_default();
    let used = nics(settings).into_iter().find(|n| n.chosen).map(|n| n.provider);
    let mut lines = Vec::new();
    for provider in PROVIDERS {
        let mut asked = settings.clone();
        // A setting that names NICs of one provider would leave none of another.
        if asked.set("SMDDP_PROVIDER", provider).is_err() {
            continue;
        }
        let found = nics(&asked);
        if found.is_empty() {
            continue;
        }
        let here = used.as_deref() == Some(provider);
        let names: Vec<String> = found.iter().map(|n| nic(n, here)).collect();
        let mark = if here { " (would be used, over those with *)" } else { "" };
        lines.push((format!("provider {provider}"), names.join(", ") + mark));
    }
    lines
}

fn nic(info: &smddp::fabric::NicInfo, provider_used: bool) -> String {
    let mut text = info.name.clone();
    if let Some(address) = info.address {
        let _ = write!(text, " {address}");
    }
    if info.speed > 0 {
        let _ = write!(text, " {:.0} Gbit/s", info.speed as f64 / 1e9);
    }
    if provider_used && info.chosen {
        text.push('*');
    }
    text
}

/// The one that would be used, and how many GPUs there are. Torch's copy lies in a wheel, and nobody has loaded it here.
fn nccl(settings: &Settings, dirs: &[PathBuf]) -> String {
    let in_wheels = dirs
        .iter()
        .flat_map(|d| entries(d))
        .filter(|p| name_of(p).starts_with("python3"))
        .map(|p| p.join("site-packages/nvidia/nccl/lib"));
    let places: Vec<PathBuf> = in_wheels.chain(dirs.iter().cloned()).collect();
    let gpus = entries(Path::new("/proc/driver/nvidia/gpus")).len();
    match smddp::cuda::nccl_found(settings, &places) {
        Ok(text) => format!("{text}; {gpus} NVIDIA GPUs"),
        Err(e) => format!("none: {e}; {gpus} NVIDIA GPUs"),
    }
}

fn job() -> Section {
    let mut s = Section::new("Launcher");
    for name in [
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "PMI_RANK",
        "PMI_SIZE",
        "SLURM_PROCID",
        "SLURM_NTASKS",
    ] {
        if let Ok(value) = std::env::var(name) {
            s.add(name, value);
        }
    }
    if s.lines.is_empty() {
        s.add("none", "no launcher's variables are set: this process would be a world of its own");
    }
    s
}

fn in_force(settings: &Settings) -> Section {
    let mut s = Section::new("Settings in force");
    for (row, value) in settings.rows() {
        let mark = if value == row.default { "" } else { " (changed)" };
        let value = if value.is_empty() { "-" } else { value };
        s.lines.push((row.name.to_owned(), format!("{value}{mark}"), row.meaning.to_owned()));
    }
    s
}

fn read(path: impl AsRef<Path>) -> String {
    std::fs::read_to_string(path).map(|t| t.trim().to_owned()).unwrap_or_default()
}

/// What is in a folder, sorted; nothing when there is no such folder.
fn entries(path: &Path) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> =
        std::fs::read_dir(path).map(|d| d.flatten().map(|e| e.path()).collect()).unwrap_or_default();
    all.sort();
    all
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_setting_is_shown_with_its_meaning_and_changes_are_marked() {
        let mut settings = Settings::default();
        settings.set("SMDDP_SPIN", "7").unwrap();
        let text = as_text(&[in_force(&settings)]);
        for (row, _) in Settings::default().rows() {
            assert!(text.contains(row.name) && text.contains(row.meaning), "{}", row.name);
        }
        assert!(text.contains("7 (changed)"), "{text}");
        let json = as_json(&[in_force(&settings)]);
        assert_eq!(json["Settings in force"]["SMDDP_SPIN"], "7 (changed)");
    }

    #[test]
    fn this_machine_has_a_processor() {
        assert!(cpu_line().contains("usable"));
        assert!(memory().contains("GiB"));
    }
}
