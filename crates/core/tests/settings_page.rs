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

Settings are environment variables. They are read when a group is made, `SMDDP_BOOTSTRAP` and `SMDDP_MPI` by the import under
mpirun already; what a process has once, such as its log, its network and `SMDDP_SPIN`, goes by its first group.
`SMDDP_CHUNK`, `SMDDP_ALGORITHM`, `SMDDP_STAGING`, `SMDDP_EAGER` and `SMDDP_STRIPE` must be equal on all ranks of a group: else
making it is an error. The others should be, but for those that name parts of a node.

An unknown name that begins with `SMDDP_`, or a value outside those given here, is an error that says what was expected; names
that begin with `SMDDP_AG_` (AWS's library), `SMDDP_STANDIN_` or `SMDDP_TEST_` (tests) are left alone. `smddp-perf info` prints the
values in force.

Numbers of bytes may end in `K`, `M` or `G` (powers of 1024).

";

const ALGORITHMS: &str = "
## Algorithms

What `SMDDP_ALGORITHM` may name, for groups over several nodes; on one node there is nothing to choose. Sizes are those of
all blocks of a call together. `smddp-perf plan` shows which one would run, and what each is expected to take.

| Collective | Algorithms between nodes |
| --- | --- |
";

fn page() -> String {
    let rows: String = TABLE.iter().map(line).collect();
    let algorithms: String = Collective::ALL.into_iter().filter_map(algorithms_of).collect();
    format!(
        "{INTRODUCTION}| Setting | Values | Default | Meaning |\n| --- | --- | --- | --- |\n{rows}{ALGORITHMS}{algorithms}"
    )
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
