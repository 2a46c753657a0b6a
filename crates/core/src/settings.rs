//! The one table of settings: name, type, default, environment variable and meaning of each.
//!
//! Parsing, validation, `smddp-perf info`, and the docs page are all made from [`TABLE`].

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::time::Duration;

use crate::error::{Error, Result};

/// What a value must look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Any text.
    Text,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// A count within these bounds.
    Count(u64, u64),
    /// Bytes within these bounds; K, M and G (powers of 1024) are understood.
    Bytes(u64, u64),
    /// Seconds, fractions allowed, above 0.
    Seconds,
}

/// One row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Environment variable.
    pub name: &'static str,
    pub kind: Kind,
    pub default: &'static str,
    pub meaning: &'static str,
}

const fn row(name: &'static str, kind: Kind, default: &'static str, meaning: &'static str) -> Row {
    Row { name, kind, default, meaning }
}

pub const TABLE: &[Row] = &[
    row(
        "SMDDP_NODE_ID",
        Kind::Text,
        "",
        "a name by which one machine plays several nodes: ranks with different names are on different nodes. Equal names join nothing: boot id, host name, /dev/shm and network namespace must be equal too",
    ),
    row(
        "SMDDP_BOOTSTRAP",
        Kind::Choice(&["auto", "mpi", "env", "single"]),
        "auto",
        "how ranks find each other when no store is given",
    ),
    row(
        "SMDDP_TIMEOUT",
        Kind::Seconds,
        "1800",
        "time limit of an operation, and of finding the other ranks, when the caller gives none. Groups of torch have one of their own: the timeout of init_process_group and new_group",
    ),
    row("SMDDP_MPI", Kind::Text, "", "path of the MPI library to load"),
    row("SMDDP_LIBFABRIC", Kind::Text, "", "path of the libfabric library to load"),
    row(
        "SMDDP_PROVIDER",
        Kind::Text,
        "",
        "libfabric provider between nodes (default: the one that FI_PROVIDER names, else efa where there is such a device, else tcp)",
    ),
    row(
        "SMDDP_NICS",
        Kind::Text,
        "",
        "comma-separated network interfaces or libfabric domains to use (default: all the provider offers; over IP the one of the default route; loopback last)",
    ),
    row(
        "SMDDP_RAILS",
        Kind::Count(0, 64),
        "0",
        "number of NICs to stripe over, at most 8; 0: all of them, but one where the provider runs over IP",
    ),
    row(
        "SMDDP_FABRIC_MODE",
        Kind::Choice(&["auto", "rma", "tagged"]),
        "auto",
        "how large messages travel: remote writes, or tagged messages",
    ),
    row(
        "SMDDP_EAGER",
        Kind::Bytes(64, 65536),
        "8K",
        "largest message that travels without asking the receiver",
    ),
    row("SMDDP_STRIPE", Kind::Bytes(4096, 1 << 30), "128K", "smallest piece of a message given to one rail"),
    row(
        "SMDDP_STAGING",
        Kind::Bytes(1 << 20, 1 << 30),
        "16M",
        "registered staging memory of a process for the fabric",
    ),
    row(
        "SMDDP_CHUNK",
        Kind::Bytes(0, 1 << 30),
        "0",
        "bytes of the user's buffer in one round of a call between nodes; 0: chosen by size and shape",
    ),
    row(
        "SMDDP_SHM_SLOT",
        Kind::Bytes(4096, 4 << 20),
        "",
        "bytes of one shared-memory slot (default: what probes of 0.1 s find best at the first three starts on a machine, else 128K). Only for a process's first groups, up to 12 MiB of slots (8 groups by default, one at least); later groups have at most 4 slots of 64K",
    ),
    row(
        "SMDDP_SHM_SLOTS",
        Kind::Count(2, 64),
        "",
        "shared-memory slots a rank has in each group (default: as the probes find, else 4; no probe where this or SMDDP_SHM_SLOT is given)",
    ),
    row(
        "SMDDP_SHM_SINGLE_COPY",
        Kind::Choice(&["auto", "on", "off"]),
        "auto",
        "copy large blocks directly between processes, where the kernel allows it (process_vm_readv, process_vm_writev). In groups on one node: all_to_all from 512 KiB; all_gather of two ranks, 512 KiB to 8 MiB; broadcast of two ranks, and scatter and gather of any number, 256 KiB to 32 MiB. In every group: messages within a node from 256 KiB. auto: unless the probe found slots faster",
    ),
    row(
        "SMDDP_SHM_HAND_BACK",
        Kind::Choice(&["auto", "on", "off"]),
        "auto",
        "after reading a slot that no other rank reads, write to its cache lines, so that the owner's next write is faster (true on some CPUs). auto: if the probe measured a gain",
    ),
    row(
        "SMDDP_SHM_FOUR_PAGES",
        Kind::Choice(&["auto", "on", "off"]),
        "auto",
        "read what another rank has written, from 32 KiB on, and shared tensors, from 16 MiB on, a little of each of four pages in turn (faster on some CPUs, slower on others). auto: where a set of the first cache has 12 lines or more",
    ),
    row(
        "SMDDP_SHM_STREAM",
        Kind::Bytes(0, 1 << 40),
        "",
        "results at least this large (all ranks of a node together) bypass the caches, by non-temporal stores, except for all_reduce and reduce; 0: never (default: half the last-level cache, at most 64M). Where it is 32M or less, what a rank copies from its own input bypasses them from half that size",
    ),
    row(
        "SMDDP_ALGORITHM",
        Kind::Text,
        "",
        "overrides the algorithm between nodes: collective[:from-to]=algorithm, comma-separated, e.g. all_reduce=ring or all_reduce:64K-=sharded; the first entry that fits a call counts. An all_to_all of uneven blocks counts as 0 bytes",
    ),
    row(
        "SMDDP_SPIN",
        Kind::Count(0, 1_000_000),
        "64",
        "polls before a waiting rank yields its core. No effect where ranks outnumber cores: there it is 0",
    ),
    row(
        "SMDDP_SIMD",
        Kind::Choice(&["auto", "portable"]),
        "auto",
        "reduction kernels: the fastest the CPU has, or the portable ones (same bits)",
    ),
    row(
        "SMDDP_REDUCE_THREADS",
        Kind::Count(1, 64),
        "",
        "threads of a rank, the calling one included, that reduce 1 MiB and more together, as of large data in shared memory (default: one for each core that is its own when the ranks of the machine share the cores they may run on evenly, at most 4)",
    ),
    row(
        "SMDDP_CUDA",
        Kind::Choice(&["auto", "nccl", "staged"]),
        "auto",
        "how tensors in CUDA memory go. auto: by NCCL inside a node, through the host's pinned memory between nodes; nccl: by NCCL alone, also between nodes and for one rank; staged: all through the host's memory, which lets ranks share a device",
    ),
    row(
        "SMDDP_CUDA_ALGORITHM",
        Kind::Text,
        "",
        "overrides how CUDA tensors go where several nodes have equally many ranks each, more than one; no effect elsewhere: collective[:from-to]=way, comma-separated; the ways are hierarchical, staged and nccl (NCCL over all ranks, by its own network). The same on all ranks",
    ),
    row(
        "SMDDP_NCCL",
        Kind::Text,
        "",
        "path of the NCCL library to load (default: the copy PyTorch has loaded)",
    ),
    row(
        "SMDDP_GPUDIRECT",
        Kind::Choice(&["off", "on"]),
        "off",
        "whether NICs read and write the memory of CUDA devices between nodes, for messages larger than SMDDP_EAGER, where provider and devices can (FI_HMEM); on all ranks or on none",
    ),
    row(
        "SMDDP_CUDA_SLOT",
        Kind::Bytes(64 << 10, 1 << 30),
        "4M",
        "bytes of one slot of pinned memory for CUDA tensors",
    ),
    row(
        "SMDDP_CUDA_SLOTS",
        Kind::Count(1, 32),
        "8",
        "slots of pinned memory a rank has in each group for CUDA tensors",
    ),
    row(
        "SMDDP_TORCH_GROUP",
        Kind::Choice(&["auto", "group", "backend"]),
        "auto",
        "what torch gets: a process group of ours (least cost a call), or a backend inside torch's own (its hooks see the calls)",
    ),
    row("SMDDP_LOG", Kind::Text, "warn", "log filter, as in RUST_LOG"),
];

/// Variables that begin with our prefix but are no settings: AWS's library's, and those of our tests.
const FOREIGN: &[&str] = &["SMDDP_AG_", "SMDDP_STANDIN_", "SMDDP_TEST_"];

/// The settings in force. Read once, at start; pass it on rather than reading again.
#[derive(Clone, Debug)]
pub struct Settings {
    values: BTreeMap<&'static str, String>,
}

impl Default for Settings {
    fn default() -> Self {
        Settings { values: TABLE.iter().map(|r| (r.name, r.default.to_owned())).collect() }
    }
}

impl Settings {
    /// From this process's environment. An unknown `SMDDP_…` name or an impossible value is an error.
    pub fn from_env() -> Result<Settings> {
        let ours = std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("SMDDP_"));
        let text = |(name, value): (OsString, OsString)| {
            let name = name.to_string_lossy().into_owned();
            let value = value.into_string().map_err(|raw| Error::Setting {
                name: name.clone(),
                given: raw.to_string_lossy().into_owned(),
                expected: "expected UTF-8 text".to_owned(),
                hint: "Unset it or give it a readable value".to_owned(),
            })?;
            Ok((name, value))
        };
        Self::from_vars(ours.map(text).collect::<Result<Vec<_>>>()?)
    }

    /// As [`from_env`](Self::from_env), from these variables. An empty value counts as unset.
    pub fn from_vars(vars: impl IntoIterator<Item = (String, String)>) -> Result<Settings> {
        let mut settings = Settings::default();
        for (name, value) in vars {
            if name.starts_with("SMDDP_") && !value.is_empty() && !FOREIGN.iter().any(|p| name.starts_with(p))
            {
                settings.set(&name, &value)?;
            }
        }
        Ok(settings)
    }

    /// Changes one setting, checked.
    pub fn set(&mut self, name: &str, value: &str) -> Result<()> {
        let Some(row) = TABLE.iter().find(|r| r.name == name) else {
            let near = nearest(name);
            return Err(Error::Setting {
                name: name.to_owned(),
                given: value.to_owned(),
                expected: "there is no such setting".to_owned(),
                hint: format!("Did you mean {near}? `smddp-perf info` lists them all"),
            });
        };
        if let Err(expected) = check(row.kind, value) {
            return Err(Error::Setting {
                name: name.to_owned(),
                given: value.to_owned(),
                expected: format!("expected {expected}"),
                hint: format!("It means: {}; default '{}'", row.meaning, row.default),
            });
        }
        self.values.insert(row.name, value.to_owned());
        Ok(())
    }

    /// The text of a setting; empty when unset and without default.
    ///
    /// # Panics
    /// When `name` is not in [`TABLE`].
    pub fn text(&self, name: &str) -> &str {
        match self.values.get(name) {
            Some(v) => v,
            None => panic!("{name} is not in the settings table"),
        }
    }

    /// The number of a `Count` or `Bytes` setting.
    pub fn number(&self, name: &str) -> usize {
        parse_bytes(self.text(name)).unwrap_or(0) as usize
    }

    /// The same, where one was given or there is a default.
    pub fn number_set(&self, name: &str) -> Option<usize> {
        parse_bytes(self.text(name)).map(|n| n as usize)
    }

    pub fn seconds(&self, name: &str) -> Duration {
        Duration::from_secs_f64(self.text(name).parse().unwrap_or(1800.0))
    }

    /// (row, value in force) of every setting.
    pub fn rows(&self) -> impl Iterator<Item = (&'static Row, &str)> {
        TABLE.iter().map(|r| (r, self.text(r.name)))
    }
}

/// "64K" → 65536. K, M, G are powers of 1024; a trailing "iB" or "B" is allowed.
pub fn parse_bytes(text: &str) -> Option<u64> {
    let t = text.trim();
    let t = t.strip_suffix("iB").or_else(|| t.strip_suffix('B')).unwrap_or(t).trim();
    let (digits, unit) = match t.chars().last()? {
        'k' | 'K' => (&t[..t.len() - 1], 1u64 << 10),
        'm' | 'M' => (&t[..t.len() - 1], 1 << 20),
        'g' | 'G' => (&t[..t.len() - 1], 1 << 30),
        _ => (t, 1),
    };
    digits.trim().parse::<u64>().ok()?.checked_mul(unit)
}

fn check(kind: Kind, value: &str) -> std::result::Result<(), String> {
    match kind {
        Kind::Text => Ok(()),
        Kind::Choice(words) => {
            if words.contains(&value) {
                Ok(())
            } else {
                Err(format!("one of {}", words.join(", ")))
            }
        }
        Kind::Count(lo, hi) => match value.parse::<u64>() {
            Ok(n) if (lo..=hi).contains(&n) => Ok(()),
            _ => Err(format!("a whole number from {lo} to {hi}")),
        },
        Kind::Bytes(lo, hi) => match parse_bytes(value) {
            Some(n) if (lo..=hi).contains(&n) => Ok(()),
            _ => Err(format!("bytes from {lo} to {hi}, such as 64K or 4M")),
        },
        Kind::Seconds => match value.parse::<f64>() {
            Ok(s) if s > 0.0 && s < 1e9 => Ok(()),
            _ => Err("seconds above 0".to_owned()),
        },
    }
}

/// The known name at the smallest edit distance from `name` (Wagner and Fischer 1974).
fn nearest(name: &str) -> &'static str {
    let score = |candidate: &str| {
        let mut previous: Vec<usize> = (0..=candidate.len()).collect();
        for (i, a) in name.bytes().enumerate() {
            let mut row = vec![i + 1];
            for (j, b) in candidate.bytes().enumerate() {
                let change = previous[j] + usize::from(a != b);
                row.push(change.min(previous[j + 1] + 1).min(row[j] + 1));
            }
            previous = row;
        }
        previous[candidate.len()]
    };
    TABLE.iter().map(|r| r.name).min_by_key(|n| score(n)).unwrap_or("SMDDP_LOG")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(name: &str, value: &str) -> Result<Settings> {
        Settings::from_vars([(name.to_owned(), value.to_owned())])
    }

    #[test]
    fn every_default_is_valid() {
        // An empty one is none.
        for row in TABLE.iter().filter(|row| !row.default.is_empty()) {
            assert_eq!(check(row.kind, row.default), Ok(()), "{}", row.name);
        }
    }

    #[test]
    fn an_unknown_name_is_refused_and_the_near_one_named() {
        let text = from("SMDDP_PROVIDR", "tcp").unwrap_err().to_string();
        assert!(text.contains("SMDDP_PROVIDER"), "{text}");
    }

    #[test]
    fn an_impossible_value_is_refused_with_what_was_expected() {
        let text = from("SMDDP_SHM_SLOT", "12").unwrap_err().to_string();
        assert!(text.contains("from 4096"), "{text}");
        assert!(from("SMDDP_TIMEOUT", "-1").is_err());
        assert!(from("SMDDP_BOOTSTRAP", "magic").is_err());
    }

    #[test]
    fn values_are_read() {
        let s = from("SMDDP_SHM_SLOT", "1M").unwrap();
        assert_eq!(s.number("SMDDP_SHM_SLOT"), 1 << 20);
        assert_eq!(s.seconds("SMDDP_TIMEOUT"), Duration::from_secs(1800));
        assert!(from("SMDDP_AG_SCRATCH_BUFFER_SIZE_BYTES", "8192").is_ok());
        assert!(from("OTHER", "x").is_ok());
        assert_eq!(from("SMDDP_SHM_SLOT", "").unwrap().number_set("SMDDP_SHM_SLOT"), None);
    }
}
