//! What this host tells: its identity, the addresses others reach it by, free ports, and the process that
//! launched us.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
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
        if peer.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0)).ok()?;
    socket.connect(peer).ok()?;
    let ip = socket.local_addr().ok()?.ip();
    // An address of the link alone says nothing on another host, which has links of its own.
    let of_link = matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
    (!ip.is_loopback() && !ip.is_unspecified() && !of_link).then_some(ip)
}

/// How many addresses of a host are worth telling.
pub(crate) const MOST_ADDRESSES: usize = 8;

/// This host's own addresses, by the routes that leave it, IPv4 before IPv6.
pub(crate) fn addresses() -> Vec<IpAddr> {
    // Where the kernel lacks a protocol, its file is missing.
    let table = |file: &str| std::fs::read_to_string(file).unwrap_or_default();
    let mut targets = route_targets(&table("/proc/net/route"));
    targets.extend(ipv6_route_targets(&table("/proc/net/ipv6_route")));
    distinct(targets.into_iter().filter_map(source_towards))
}

/// The addresses in `own`, which is this host's, in the order in which hosts with the addresses `peers` are likely to reach
/// them: first those that our routes to the peers start from, and of these first the ones in networks that we are in ourselves: a
/// gateway may let nothing through. No name service is asked: it may be slow, or know nothing.
pub(crate) fn reachable_addresses(own: &[IpAddr], peers: &[&[IpAddr]]) -> Vec<IpAddr> {
    let networks = networks(&std::fs::read_to_string("/proc/net/route").unwrap_or_default());
    reachable_by(own, peers, &networks, source_towards)
}

fn reachable_by(
    own: &[IpAddr],
    peers: &[&[IpAddr]],
    networks: &[(Ipv4Addr, Ipv4Addr)],
    source: impl Fn(SocketAddr) -> Option<IpAddr>,
) -> Vec<IpAddr> {
    let is_near = |ip: &IpAddr| match ip {
        IpAddr::V4(ip) => networks.iter().any(|(network, mask)| ip & mask == *network),
        IpAddr::V6(_) => false,
    };
    // An address that we have too is one of a network that each host has for itself (bridges, NAT): it leads nowhere.
    let theirs = peers.iter().copied().flatten().filter(|ip| !own.contains(ip));
    let (near, far): (Vec<_>, Vec<_>) = theirs.partition(|ip| is_near(ip));
    let sources = near.into_iter().chain(far).filter_map(|&ip| source(SocketAddr::new(ip, 9)));
    distinct(sources.chain(own.iter().copied()))
}

/// (network, mask) of the routes of `/proc/net/route` that need no gateway.
fn networks(table: &str) -> Vec<(Ipv4Addr, Ipv4Addr)> {
    let network = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [_, destination, gateway, _, _, _, _, mask, ..] = fields[..] else { return None };
        let (network, gateway, mask) = (ipv4(destination)?, ipv4(gateway)?, ipv4(mask)?);
        (gateway.is_unspecified() && !mask.is_unspecified()).then_some((network, mask))
    };
    table.lines().skip(1).filter_map(network).collect()
}

/// As `/proc/net/route` writes it: numbers are in the machine's order, addresses lie in the network's.
fn ipv4(hex: &str) -> Option<Ipv4Addr> {
    u32::from_str_radix(hex, 16).ok().map(|number| Ipv4Addr::from(number.to_ne_bytes()))
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
        let (destination, gateway) = (ipv4(destination)?, ipv4(gateway)?);
        let first = Ipv4Addr::from_bits(destination.to_bits() | 1);
        Some(SocketAddr::new(if gateway.is_unspecified() { first } else { gateway }.into(), 9))
    };
    table.lines().skip(1).filter_map(target).collect()
}

/// One address behind each IPv6 route of `/proc/net/ipv6_route` that leaves this host, that of the default route first.
fn ipv6_route_targets(table: &str) -> Vec<SocketAddr> {
    // Of the kernel's linux/route.h and linux/ipv6_route.h.
    const UP: u32 = 0x1;
    const REJECT: u32 = 0x200;
    const LOCAL: u32 = 0x8000_0000;
    // Any host's: a router is usually known by an address of the link alone.
    const ANYWHERE: Ipv6Addr = Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 1);
    let target = |line: &str| -> Option<(bool, SocketAddr)> {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [destination, length, _, _, _, _, _, _, flags, interface] = fields[..] else { return None };
        let flags = u32::from_str_radix(flags, 16).ok()?;
        let ip = Ipv6Addr::from_bits(u128::from_str_radix(destination, 16).ok()? | 1);
        let leaves = interface != "lo" && flags & (UP | REJECT | LOCAL) == UP;
        if !leaves || ip.is_unicast_link_local() || ip.is_multicast() {
            return None;
        }
        let default = u8::from_str_radix(length, 16).ok()? == 0;
        Some((default, SocketAddr::new(if default { ANYWHERE } else { ip }.into(), 9)))
    };
    let (defaults, others): (Vec<_>, Vec<_>) =
        table.lines().filter_map(target).partition(|&(default, _)| default);
    defaults.into_iter().chain(others).map(|(_, target)| target).collect()
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
    fn ipv6_routes_that_leave_the_host_give_targets_the_default_first() {
        let table = "\
20010db8000500000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000001 00000000 00000001     eth0
fe800000000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000002 00000000 00000001     eth0
00000000000000000000000000000000 00 00000000000000000000000000000000 00 fe800000000000000000000000000001 00000400 00000003 00000000 00000003     eth0
00000000000000000000000000000001 80 00000000000000000000000000000000 00 00000000000000000000000000000000 00000000 00000004 00000000 80200001       lo
20010db8000500000000000000000007 80 00000000000000000000000000000000 00 00000000000000000000000000000000 00000000 00000004 00000000 80200001     eth0
ff000000000000000000000000000000 08 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000003 00000000 00000001     eth0
20010db8000900000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 ffffffff 00000001 00000000 00000200       lo
00000000000000000000000000000000 00 00000000000000000000000000000000 00 00000000000000000000000000000000 ffffffff 00000001 00000000 00200200       lo
garbage";
        let expected: Vec<SocketAddr> =
            vec!["[2000::1]:9".parse().unwrap(), "[2001:db8:5::1]:9".parse().unwrap()];
        assert_eq!(ipv6_route_targets(table), expected);
        assert!(ipv6_route_targets("").is_empty());
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
        let found = reachable_by(&own, &[&two, &three], &[], source);
        assert_eq!(found, [ip("192.168.56.11"), ip("10.0.2.15"), ip("172.16.0.1")]);
        assert_eq!(reachable_by(&own, &[&two], &[], |_| None), own);
        let many: Vec<IpAddr> = (0..20).map(|i| IpAddr::from([10, 0, 0, i])).collect();
        assert_eq!(reachable_by(&many, &[], &[], |_| None), many[..MOST_ADDRESSES]);
    }

    /// Hosts with an interface of the internet's, which may let nothing in, and one of their own network.
    #[test]
    fn a_network_that_hosts_share_comes_before_a_gateway() {
        let ip = |text: &str| -> IpAddr { text.parse().unwrap() };
        let table = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
            eth0\t00000000\t017100CB\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
            eth0\t007100CB\t00000000\t0001\t0\t0\t0\tC0FFFFFF\t0\t0\t0\n\
            eth1\t0000000A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n";
        let (own, peer) = ([ip("203.0.113.7"), ip("10.0.0.7")], [ip("203.0.113.200"), ip("10.0.0.8")]);
        let source = |to: SocketAddr| Some(own[usize::from(to.ip() == peer[1])]);
        let found = reachable_by(&own, &[&peer], &networks(table), source);
        assert_eq!(found, [own[1], own[0]]);
        assert_eq!(reachable_by(&own, &[&peer], &[], source), own);
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
