//! What this host tells: its identity, the addresses others reach it by, free ports, and the process that
//! launched us.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::ops::RangeInclusive;
use std::path::PathBuf;

use smddp_core::process;

/// A random number from the kernel.
pub(crate) fn random_u64() -> u64 {
    match process::random() {
        Ok(bytes) => u64::from_le_bytes(bytes),
        Err(error) => {
            // A kernel without getrandom: the hasher's keys are random too.
            tracing::debug!("getrandom failed: {error}");
            use std::hash::{BuildHasher, Hasher};
            std::collections::hash_map::RandomState::new().build_hasher().finish()
        }
    }
}

/// FNV-1a over labelled parts: the same on every host and in every build, unlike std's hashers.
/// (Fowler, Noll, Vo: <http://www.isthe.com/chongo/tech/comp/fnv/>.)
pub(crate) fn hash(parts: &[&str]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for part in parts {
        // The length keeps ("ab", "c") and ("a", "bc") apart.
        for byte in (part.len() as u64).to_le_bytes().iter().chain(part.as_bytes()) {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
    // FNV's low bits mix poorly for short inputs.
    (hash ^ (hash >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Sixteen bytes from labelled parts.
pub(crate) fn hash_16(parts: &[&str]) -> [u8; 16] {
    let mut out = [0; 16];
    for (half, salt) in out.chunks_exact_mut(8).zip(["low", "high"]) {
        let salted: Vec<&str> = std::iter::once(salt).chain(parts.iter().copied()).collect();
        half.copy_from_slice(&hash(&salted).to_le_bytes());
    }
    out
}

/// Equal for two processes that reach each other at 127.0.0.1: same boot, same network namespace.
pub(crate) fn loopback_identity() -> [u8; 16] {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let net = std::fs::read_link("/proc/self/ns/net").unwrap_or_default();
    if boot.is_empty() || net.as_os_str().is_empty() {
        // Cannot tell: be equal to nobody.
        let mut alone = [0; 16];
        alone[..8].copy_from_slice(&random_u64().to_le_bytes());
        return alone;
    }
    hash_16(&[boot.trim(), &net.to_string_lossy()])
}

pub(crate) fn name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// The local address from which `peer` is reached, by the routing table; nothing is sent.
fn source_towards(peer: SocketAddr) -> Option<IpAddr> {
    let any: IpAddr =
        if peer.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { std::net::Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0)).ok()?;
    socket.connect(peer).ok()?;
    let ip = socket.local_addr().ok()?.ip();
    (!ip.is_loopback() && !ip.is_unspecified()).then_some(ip)
}

/// How many addresses of a host are worth telling.
pub(crate) const MOST_ADDRESSES: usize = 8;

/// This host's own addresses, by the routes that leave it.
pub(crate) fn addresses() -> Vec<IpAddr> {
    let routes = std::fs::read_to_string("/proc/net/route").unwrap_or_default();
    distinct(route_targets(&routes).into_iter().filter_map(source_towards))
}

/// The addresses in `own`, which is this host's, in the order in which hosts with the addresses `peers` are likely to reach
/// them: first those that our routes to the peers start from. No name service is asked: it may be slow, or know nothing.
pub(crate) fn reachable_addresses(own: &[IpAddr], peers: &[&[IpAddr]]) -> Vec<IpAddr> {
    reachable_by(own, peers, source_towards)
}

fn reachable_by(
    own: &[IpAddr],
    peers: &[&[IpAddr]],
    source: impl Fn(SocketAddr) -> Option<IpAddr>,
) -> Vec<IpAddr> {
    // An address that we have too is one of a network that each host has for itself (bridges, NAT): it leads nowhere.
    let theirs = peers.iter().copied().flatten().filter(|ip| !own.contains(ip));
    let sources = theirs.filter_map(|&ip| source(SocketAddr::new(ip, 9)));
    distinct(sources.chain(own.iter().copied()))
}

fn distinct(addresses: impl Iterator<Item = IpAddr>) -> Vec<IpAddr> {
    let mut found = Vec::new();
    for ip in addresses {
        if !found.contains(&ip) {
            found.push(ip);
        }
    }
    found.truncate(MOST_ADDRESSES);
    found
}

/// One address behind each IPv4 route of `/proc/net/route`.
fn route_targets(table: &str) -> Vec<SocketAddr> {
    let target = |line: &str| -> Option<SocketAddr> {
        let mut fields = line.split_whitespace();
        let (interface, destination, gateway) = (fields.next()?, fields.next()?, fields.next()?);
        if interface == "lo" {
            return None;
        }
        // Numbers are written in the machine's order, addresses lie in the network's.
        let read = |hex: &str| u32::from_str_radix(hex, 16).ok().map(|n| u32::from_be_bytes(n.to_ne_bytes()));
        let (destination, gateway) = (read(destination)?, read(gateway)?);
        let ip = if gateway != 0 { gateway } else { destination | 1 };
        Some(SocketAddr::new(Ipv4Addr::from(ip).into(), 9))
    };
    table.lines().skip(1).filter_map(target).collect()
}

/// Ports that few kernels give to outgoing connections: what lies below the usual range of those.
const USUALLY_QUIET: RangeInclusive<u16> = 10_000..=32_767;

/// Ports outside those the kernel gives to outgoing connections, from this text of `ip_local_port_range`.
fn quiet_ports(range: &str) -> RangeInclusive<u16> {
    const LOW: u16 = *USUALLY_QUIET.start();
    let mut numbers = range.split_whitespace().filter_map(|n| n.parse::<u16>().ok());
    let (low, high) = (numbers.next().unwrap_or(32_768), numbers.next().unwrap_or(60_999));
    if low > LOW + 2_000 {
        LOW..=low - 1
    } else if high < 62_000 {
        high + 1..=65_000
    } else {
        // The kernel takes them all; anything will do.
        20_000..=32_000
    }
}

/// A port derived from `job`, the same for all its ranks: of all hosts, which may each have a range of their own, or
/// outside that of this one.
pub(crate) fn derived_port(job: &str, one_host: bool) -> u16 {
    derived_port_beside(&local_port_range(), job, one_host)
}

fn derived_port_beside(range: &str, job: &str, one_host: bool) -> u16 {
    let ports = if one_host { quiet_ports(range) } else { USUALLY_QUIET };
    spread(&ports, hash(&["port", job]))
}

fn local_port_range() -> String {
    std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default()
}

fn spread(range: &RangeInclusive<u16>, number: u64) -> u16 {
    let width = u64::from(range.end() - range.start()) + 1;
    range.start() + (number % width) as u16
}

/// A port free now on this host, outside the ephemeral range when one can be found.
pub(crate) fn free_port() -> Option<u16> {
    let range = quiet_ports(&local_port_range());
    let quiet = std::iter::repeat_with(|| spread(&range, random_u64())).take(64);
    quiet.chain([0]).find_map(|port| {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).ok()?;
        Some(listener.local_addr().ok()?.port())
    })
}

/// The process that started the ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LauncherProcess {
    pub(crate) program: Option<PathBuf>,
    /// Process id and start time: no other process of this boot has both.
    pub(crate) id: String,
}

/// The nearest ancestor whose environment lacks `variable`, which the launcher sets for its ranks: mpirun itself
/// or its daemon, however many shells and wrappers lie between. `None` when an ancestor cannot be read.
pub(crate) fn launcher_process(variable: &str) -> Option<LauncherProcess> {
    const DEEPEST: usize = 64;
    let marker = format!("{variable}=").into_bytes();
    let mut pid = std::process::id();
    for _ in 0..DEEPEST {
        pid = stat_fields(pid)?.0;
        if pid <= 1 {
            return None;
        }
        let environment = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
        if !environment.split(|&b| b == 0).any(|v| v.starts_with(&marker)) {
            let (_, started) = stat_fields(pid)?;
            let program = std::fs::read_link(format!("/proc/{pid}/exe")).ok();
            return Some(LauncherProcess { program, id: format!("process {pid} started {started}") });
        }
    }
    None
}

/// (parent, start time) of a process.
fn stat_fields(pid: u32) -> Option<(u32, u64)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may hold spaces and brackets; what follows the last bracket is regular, from field 3 on.
    let (_, fields) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = fields.split_whitespace().collect();
    Some((fields.get(1)?.parse().ok()?, fields.get(19)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quiet_ports_avoid_the_ephemeral_range() {
        assert_eq!(quiet_ports("32768\t60999\n"), 10_000..=32_767);
        assert_eq!(quiet_ports("1024 60999"), 61_000..=65_000);
        assert_eq!(quiet_ports("1024 65535"), 20_000..=32_000);
        assert_eq!(quiet_ports("garbage"), 10_000..=32_767);
        for range in [10_000..=32_767, 61_000..=65_000] {
            for number in 0..5000u64 {
                assert!(range.contains(&spread(&range, hash(&[&number.to_string()]))));
            }
        }
    }

    #[test]
    fn derived_ports_are_spread() {
        let ports: std::collections::HashSet<u16> =
            (0..1000).map(|i| derived_port(&format!("job@{i}"), true)).collect();
        assert!(ports.len() > 900, "{}", ports.len());
        assert_eq!(derived_port("a", true), derived_port("a", true));
    }

    #[test]
    fn hosts_with_ranges_of_their_own_derive_one_port() {
        let ports = ["32768 60999", "1024 60999", "1024 65535"].map(|r| derived_port_beside(r, "a", false));
        assert!(ports.iter().all(|&port| port == ports[0] && USUALLY_QUIET.contains(&port)), "{ports:?}");
        assert_ne!(derived_port_beside("1024 60999", "a", true), ports[0]);
    }

    #[test]
    fn hashes_keep_parts_apart() {
        assert_ne!(hash(&["ab", "c"]), hash(&["a", "bc"]));
        assert_ne!(hash_16(&["a"])[..8], hash_16(&["a"])[8..]);
    }

    #[test]
    fn routes_give_targets_in_network_order() {
        let table = "Iface\tDestination\tGateway\tFlags\n\
            eth0\t00000000\t010200C0\t0003\nlo\t0000007F\t00000000\t0001\neth0\t000200C0\t00000000\t0001\nx y";
        let expected: Vec<SocketAddr> = vec!["192.0.2.1:9".parse().unwrap(), "192.0.2.1:9".parse().unwrap()];
        if cfg!(target_endian = "little") {
            assert_eq!(route_targets(table), expected);
        }
    }

    #[test]
    fn the_addresses_that_routes_to_the_peers_start_from_come_first() {
        let ip = |text: &str| -> IpAddr { text.parse().unwrap() };
        // Each host has the same address towards its own NAT.
        let own = [ip("10.0.2.15"), ip("172.16.0.1"), ip("192.168.56.11")];
        let (two, three) = ([ip("10.0.2.15"), ip("192.168.56.12")], [ip("10.0.2.15"), ip("192.168.56.13")]);
        let source = |peer: SocketAddr| match peer.ip().to_string().as_str() {
            "192.168.56.12" | "192.168.56.13" => Some(ip("192.168.56.11")),
            other => panic!("{other} is ours"),
        };
        let found = reachable_by(&own, &[&two, &three], source);
        assert_eq!(found, [ip("192.168.56.11"), ip("10.0.2.15"), ip("172.16.0.1")]);
        assert_eq!(reachable_by(&own, &[&two], |_| None), own);
        let many: Vec<IpAddr> = (0..20).map(|i| IpAddr::from([10, 0, 0, i])).collect();
        assert_eq!(reachable_by(&many, &[], |_| None), many[..MOST_ADDRESSES]);
    }

    #[test]
    fn our_parent_is_found_by_a_variable_only_we_have() {
        // A variable nobody has: the parent itself.
        let parent = launcher_process("SMDDP_TEST_NOBODY_HAS_THIS").unwrap();
        assert!(
            parent.id.starts_with(&format!("process {} ", std::os::unix::process::parent_id())),
            "{parent:?}"
        );
        // A variable every ancestor has would lead to pid 1.
        assert_ne!(launcher_process("PATH"), Some(parent));
    }
}
