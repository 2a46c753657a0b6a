//! Which ranks share a node.

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
        let shm = rustix::fs::stat("/dev/shm").map_or(0, |s| s.st_dev);
        let net = rustix::fs::stat("/proc/self/ns/net").map_or(0, |s| s.st_ino);
        let named = settings.text("SMDDP_NODE_ID");
        let label = format!("{}/{host}/{shm:x}/{net:x}/{named}", boot.trim());
        let name = if named.is_empty() { host } else { format!("{named}@{host}") };
        NodeId { label, name }
    }
}

/// Cores this process may run on.
pub fn cores() -> Vec<usize> {
    match rustix::thread::sched_getaffinity(None) {
        Ok(set) => (0..rustix::thread::CpuSet::MAX_CPU).filter(|&c| set.is_set(c)).collect(),
        Err(_) => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
