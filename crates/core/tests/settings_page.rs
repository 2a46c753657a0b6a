//! `docs/settings.md` is made from the table of settings, and says what it says.
//!
//! `UPDATE_DOCS=1 cargo test -p smddp-core --test settings_page` writes it anew.

use std::path::Path;

use smddp_core::Collective;
use smddp_core::plan::candidates;
use smddp_core::settings::{Kind, Row, TABLE, parse_bytes};

const INTRODUCTION: &str = "\
# Settings

<!-- Made from the table in crates/core/src/settings.rs; do not edit by hand:
UPDATE_DOCS=1 cargo test -p smddp-core --test settings_page -->

Most jobs need none. Settings are environment variables, read when a group is made; `SMDDP_BOOTSTRAP` and `SMDDP_MPI` also by the
import under mpirun. `SMDDP_SPIN`, `SMDDP_STAGING`, `SMDDP_SIMD`, `SMDDP_REDUCE_THREADS` and those of the network belong to the
process: its first group decides, and they are read again only after all groups are destroyed. `SMDDP_LOG` is read once.

`SMDDP_CHUNK`, `SMDDP_ALGORITHM`, `SMDDP_STAGING`, `SMDDP_EAGER`, `SMDDP_STRIPE`, `SMDDP_CUDA`, `SMDDP_CUDA_ALGORITHM`,
`SMDDP_CUDA_SLOT` and `SMDDP_CUDA_SLOTS` must be equal on all ranks, or making a group fails. The first rank of each node chooses its shared-memory slots.

An unknown name that begins with `SMDDP_`, or a value outside those given here, is an error that says what was expected. Names
that begin with `SMDDP_AG_` (AWS's library), `SMDDP_STANDIN_` or `SMDDP_TEST_` (tests) are left alone. `smddp-perf info` prints the
values in force. Which one to change when something is wrong: [troubleshoot](how-to/troubleshoot.md#which-setting-to-change).

Numbers of bytes may end in `K`, `M` or `G` (powers of 1024). A *rail* is one NIC as ranks use it; a *slot* is a piece of shared or
pinned memory through which data passes. Other words: [glossary](README.md#glossary).
";

/// The order of the page: a heading and its settings.
const GROUPS: [(&str, &[&str]); 6] = [
    (
        "Launching",
        &[
            "SMDDP_BOOTSTRAP",
            "SMDDP_TIMEOUT",
            "SMDDP_MPI",
            "SMDDP_NODE_ID",
            "SMDDP_SPIN",
            "SMDDP_TORCH_GROUP",
        ],
    ),
    (
        "Network",
        &[
            "SMDDP_LIBFABRIC",
            "SMDDP_PROVIDER",
            "SMDDP_NICS",
            "SMDDP_RAILS",
            "SMDDP_FABRIC_MODE",
            "SMDDP_EAGER",
            "SMDDP_STRIPE",
            "SMDDP_STAGING",
        ],
    ),
    (
        "Shared memory",
        &[
            "SMDDP_SHM_SLOT",
            "SMDDP_SHM_SLOTS",
            "SMDDP_SHM_SINGLE_COPY",
            "SMDDP_SHM_HAND_BACK",
            "SMDDP_SHM_FOUR_PAGES",
            "SMDDP_SHM_STREAM",
        ],
    ),
    ("Algorithms and arithmetic", &["SMDDP_ALGORITHM", "SMDDP_CHUNK", "SMDDP_SIMD", "SMDDP_REDUCE_THREADS"]),
    (
        "CUDA",
        &[
            "SMDDP_CUDA",
            "SMDDP_CUDA_ALGORITHM",
            "SMDDP_NCCL",
            "SMDDP_GPUDIRECT",
            "SMDDP_CUDA_SLOT",
            "SMDDP_CUDA_SLOTS",
        ],
    ),
    ("Diagnostics", &["SMDDP_LOG"]),
];

const ALGORITHMS: &str = "
## Algorithms

What `SMDDP_ALGORITHM` may name, for groups over several nodes; on one node there is nothing to choose. Sizes are those of
all blocks of a call together. `smddp-perf plan` shows which one would run, and what each is expected to take.

| Collective | Algorithms between nodes |
| --- | --- |
";

fn page() -> String {
    let groups: String = GROUPS.iter().map(section).collect();
    let algorithms: String = Collective::ALL.into_iter().filter_map(algorithms_of).collect();
    format!("{INTRODUCTION}{groups}{ALGORITHMS}{algorithms}")
}

fn section((heading, names): &(&str, &[&str])) -> String {
    let row = |name: &&str| TABLE.iter().find(|row| row.name == *name).unwrap_or_else(|| panic!("{name}"));
    let rows: String = names.iter().map(row).map(line).collect();
    format!("\n## {heading}\n\n| Setting | Values | Default | Meaning |\n| --- | --- | --- | --- |\n{rows}")
}

/// None where nothing may be named.
fn algorithms_of(collective: Collective) -> Option<String> {
    let names: Vec<String> = candidates(collective, 2).map(|name| format!("`{name}`")).collect();
    (!names.is_empty()).then(|| format!("| `{collective}` | {} |\n", names.join(", ")))
}

fn line(row: &Row) -> String {
    let default = if row.default.is_empty() { String::new() } else { format!("`{}`", row.default) };
    // Bars end cells; `<`, `>` and `*` would be read as markup.
    let meaning: String =
        row.meaning.chars().flat_map(|c| "|<>*".contains(c).then_some('\\').into_iter().chain([c])).collect();
    format!("| `{}` | {} | {default} | {meaning} |\n", row.name, values(row.kind))
}

fn values(kind: Kind) -> String {
    match kind {
        Kind::Text => "text".to_owned(),
        Kind::Choice(words) => words.iter().map(|w| format!("`{w}`")).collect::<Vec<_>>().join(", "),
        Kind::Count(least, most) => format!("{least} to {most}"),
        Kind::Bytes(least, most) => format!("{} to {} bytes", bytes(least), bytes(most)),
        Kind::Seconds => "seconds, above 0".to_owned(),
    }
}

/// As short as it can be written in the units a setting understands.
fn bytes(n: u64) -> String {
    let (unit, letter) = match n.trailing_zeros() {
        _ if n == 0 => (1, ""),
        30.. => (1 << 30, "G"),
        20.. => (1 << 20, "M"),
        10.. => (1 << 10, "K"),
        _ => (1, ""),
    };
    format!("{}{letter}", n / unit)
}

#[test]
fn the_page_is_up_to_date() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/settings.md");
    if std::env::var_os("UPDATE_DOCS").is_some_and(|v| v == "1") {
        std::fs::write(&path, page()).unwrap();
    }
    let written = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let expected = page();
    let differs = expected.lines().zip(written.lines()).find(|(a, b)| a != b);
    assert!(
        written == expected,
        "docs/settings.md is stale; write it with UPDATE_DOCS=1 cargo test -p smddp-core --test settings_page. \
         First difference (expected, written): {differs:?}"
    );
}

#[test]
fn every_setting_has_one_line_that_says_what_it_is() {
    let page = page();
    for row in TABLE {
        let start = format!("| `{}` |", row.name);
        let lines: Vec<&str> = page.lines().filter(|l| l.starts_with(&start)).collect();
        assert_eq!(lines.len(), 1, "{}", row.name);
        // Five bars make four cells; escaped ones are part of a cell.
        assert_eq!(lines[0].replace("\\|", "").matches('|').count(), 5, "{}", lines[0]);
        assert!(!row.meaning.is_empty() && !row.meaning.contains('\n'), "{}", row.name);
    }
}

#[test]
fn bounds_are_written_as_settings_read_them() {
    let bounds = TABLE.iter().flat_map(|row| match row.kind {
        Kind::Bytes(least, most) => vec![least, most],
        Kind::Text | Kind::Choice(_) | Kind::Count(..) | Kind::Seconds => vec![],
    });
    for n in bounds.chain([0, 1, 1023, 1024, 1 << 20, 3 << 30, 1025 << 10]) {
        assert_eq!(parse_bytes(&bytes(n)), Some(n), "{}", bytes(n));
    }
}
