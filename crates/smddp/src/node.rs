//! Which ranks share a node.

use std::num::NonZero;

use smddp_core::settings::Settings;

/// Two ranks share memory when their identities are equal: same kernel (boot id), host name, /dev/shm and network
/// namespace (segments are handed over through abstract sockets, which do not cross one), and the same
/// `SMDDP_NODE_ID`, with which one machine plays several nodes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NodeId {
    /// Compared.
    pub label: String,
    /// For people.
    pub name: String,
}

impl NodeId {
    pub fn of_this_process(settings: &Settings) -> NodeId {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let uname = rustix::system::uname();
        let host = uname.nodename().to_string_lossy().into_owned();
        let named = settings.text("SMDDP_NODE_ID");
        let parts = Parts {
            boot: boot.trim(),
            host: &host,
            shm: rustix::fs::stat("/dev/shm").map_or(0, |s| s.st_dev),
            net: rustix::fs::stat("/proc/self/ns/net").map_or(0, |s| s.st_ino),
            named,
        };
        let label = parts.label();
        let name = if named.is_empty() { host } else { format!("{named}@{host}") };
        NodeId { label, name }
    }
}

/// What ranks that share memory have in common.
#[derive(Clone, Copy)]
struct Parts<'a> {
    boot: &'a str,
    host: &'a str,
    shm: u64,
    net: u64,
    named: &'a str,
}

impl Parts<'_> {
    fn label(self) -> String {
        let Parts { boot, host, shm, net, named } = self;
        format!("{boot}/{host}/{shm:x}/{net:x}/{named}")
    }
}

/// Cores this process may run on.
pub fn cores() -> Vec<usize> {
    match rustix::thread::sched_getaffinity(None) {
        Ok(set) => (0..rustix::thread::CpuSet::MAX_CPU).filter(|&c| set.is_set(c)).collect(),
        // More than the set has room for.
        Err(_) => (0..std::thread::available_parallelism().map_or(1, NonZero::get)).collect(),
    }
}

/// Whether ranks outnumber the cores that they may run on. `ranks`: the cores of each.
pub fn are_crowded(ranks: &[&[usize]]) -> bool {
    let mut cores: Vec<usize> = ranks.iter().flat_map(|cores| cores.iter().copied()).collect();
    cores.sort_unstable();
    cores.dedup();
    ranks.len() > cores.len()
}

/// How many of the cores `mine` their rank owns, when each is shared evenly by the ranks that may run on it. `ranks`: the
/// cores of each, its own among them.
pub fn owned(mine: &[usize], ranks: &[&[usize]]) -> usize {
    let sharing = |core: &usize| ranks.iter().filter(|cores| cores.contains(core)).count().max(1);
    let share: f64 = mine.iter().map(|core| 1.0 / sharing(core) as f64).sum();
    // Thirds do not add up to one.
    (share + 1e-6) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_are_shared_evenly_by_who_may_run_on_them() {
        let all: Vec<usize> = (0..12).collect();
        let (low, high) = all.split_at(8);
        assert_eq!(owned(&all, &[&all]), 12);
        assert_eq!(owned(&all, &[&all, &all, &all]), 4);
        assert_eq!(owned(&all, &[&all[..]; 5]), 2);
        assert_eq!(owned(&all, &[&all[..]; 13]), 0);
        assert_eq!([low, high].map(|cores| owned(cores, &[low, high])), [8, 4]);
        assert_eq!([low, &all[..]].map(|cores| owned(cores, &[low, &all])), [4, 8]);
        assert!(are_crowded(&[low; 9]) && !are_crowded(&[low; 8]) && !are_crowded(&[low, high]));
    }

    #[test]
    fn ranks_that_differ_in_any_part_share_no_memory() {
        let here = Parts { boot: "b", host: "h", shm: 1, net: 1, named: "" };
        let elsewhere = [
            Parts { boot: "c", ..here },
            Parts { host: "i", ..here },
            Parts { shm: 2, ..here },
            Parts { net: 2, ..here },
            Parts { named: "n", ..here },
        ];
        let mut labels: Vec<String> = elsewhere.map(Parts::label).into();
        labels.push(here.label());
        labels.sort();
        labels.dedup();
        assert_eq!(labels.len(), 6, "{labels:?}");
    }

    #[test]
    fn a_name_of_its_own_makes_a_node_of_its_own() {
        let with = |id: &str| {
            let vars = [("SMDDP_NODE_ID".to_owned(), id.to_owned())];
            NodeId::of_this_process(&Settings::from_vars(vars).unwrap())
        };
        assert_eq!(with("a"), with("a"));
        assert_ne!(with("a"), with("b"));
        assert_ne!(with("a"), with(""));
        assert!(!cores().is_empty());
    }
}
