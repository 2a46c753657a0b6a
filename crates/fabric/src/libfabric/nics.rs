//! Which NICs there are, and which are used.

use std::ffi::{CStr, CString, c_char};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use smddp_core::settings::Settings;
use smddp_libfabric_sys::abi::*;
use smddp_libfabric_sys::{API_VERSION, Library};

use crate::error::Error;
use crate::wire::MAX_RAILS;

/// One NIC of a provider.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NicInfo {
    pub provider: String,
    /// Network interface or libfabric domain.
    pub name: String,
    /// Its address, where it is an IP address.
    pub address: Option<IpAddr>,
    /// Bits a second; 0 when not known.
    pub speed: usize,
    /// Whether it would be used with the settings in force.
    pub chosen: bool,
}

impl NicInfo {
    fn is_loopback(&self) -> bool {
        self.name == "lo" || self.address.is_some_and(|a| a.is_loopback())
    }

    /// Reaches only this host: bridges of containers and virtual machines.
    fn is_virtual(&self) -> bool {
        ["docker", "veth", "virbr", "br-", "cni", "flannel", "cali"].iter().any(|p| self.name.starts_with(p))
    }

    /// Lower is better: one address of each NIC is used.
    fn address_rank(&self) -> u8 {
        match self.address {
            Some(IpAddr::V4(a)) if a.is_link_local() => 2,
            Some(IpAddr::V6(a)) if a.is_unicast_link_local() => 3,
            Some(IpAddr::V4(_)) | None => 0,
            Some(IpAddr::V6(_)) => 1,
        }
    }
}

/// A NIC with what is needed to open it.
pub struct Nic {
    pub info: NicInfo,
    pub(super) raw: Info,
}

/// An owned `fi_info`.
pub(super) struct Info {
    library: Arc<Library>,
    pub ptr: *mut fi_info,
}

// SAFETY: an `fi_info` is plain memory without ties to a thread.
unsafe impl Send for Info {}

impl Drop for Info {
    fn drop(&mut self) {
        // SAFETY: allocated by this library, freed once.
        unsafe { (self.library.fi_freeinfo)(self.ptr) }
    }
}

/// What the settings ask for.
#[derive(Clone, Debug)]
pub struct Wish {
    pub provider: String,
    /// Interfaces by name; empty: chosen here.
    pub names: Vec<String>,
    /// 0: chosen here.
    pub rails: usize,
    /// With access to the memory of devices, where there is such a NIC.
    pub devices: bool,
    pub place: Place,
}

/// A process's number among those of its host that do the same, and how many they are.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    pub number: usize,
    pub of: usize,
}

impl Place {
    pub const ALONE: Place = Place { number: 0, of: 1 };
}

impl Wish {
    pub fn of(settings: &Settings, place: Place) -> Wish {
        let names = settings.text("SMDDP_NICS").split(',').map(str::trim).filter(|n| !n.is_empty());
        Wish {
            provider: provider(settings.text("SMDDP_PROVIDER"), &foreign_filter(), efa_device()),
            names: names.map(str::to_owned).collect(),
            rails: settings.number("SMDDP_RAILS").min(MAX_RAILS),
            devices: settings.text("SMDDP_GPUDIRECT") == "on",
            place,
        }
    }
}

/// The setting; else what FI_PROVIDER plainly names; else efa where there is such a device, else tcp.
fn provider(setting: &str, filter: &str, efa: bool) -> String {
    if !setting.is_empty() {
        return setting.to_owned();
    }
    let plain = !filter.is_empty() && !filter.contains(['^', ',']);
    match filter {
        "efa" if !efa => "tcp".to_owned(),
        _ if plain => filter.to_owned(),
        _ if efa => "efa".to_owned(),
        _ => "tcp".to_owned(),
    }
}

fn foreign_filter() -> String {
    std::env::var("FI_PROVIDER").unwrap_or_default()
}

/// Whether FI_PROVIDER was taken out, and nobody told yet.
static TAKEN_OUT: AtomicBool = AtomicBool::new(false);

/// Sets libfabric's variables for what this machine has, unless they are as they should be.
///
/// SageMaker sets FI_PROVIDER=efa on every instance type. Without such a device it would hide every provider, so it is taken
/// out of libfabric's sight.
///
/// libfabric's efa ends the process at its first fork (a DataLoader's worker, a program that is run) where the kernel does
/// not copy registered memory then (before 5.13), unless FI_EFA_FORK_SAFE or libibverbs' own variables are set. That costs a
/// system call a registration there; where the kernel does copy, it changes nothing.
///
/// Called before libfabric is loaded, which reads them. Programs whose other threads may set variables meanwhile call it
/// before that under a lock of theirs: then nothing is left to do here.
pub fn prepare_environment() {
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    if efa_device() {
        if wants_fork_safety(|name| std::env::var_os(name).is_some(), uses_verbs()) {
            // SAFETY: Rust's own accesses are locked, Python's by its interpreter, which its binding holds. Of C code that
            // might read the environment in another thread at this very moment none is known.
            unsafe { std::env::set_var("FI_EFA_FORK_SAFE", "1") };
        }
    } else if foreign_filter() == "efa" {
        // SAFETY: as above.
        unsafe { std::env::remove_var("FI_PROVIDER") };
        TAKEN_OUT.store(true, Ordering::Relaxed);
    }
}

/// Says once, when libfabric is needed, what [`prepare_environment`] has taken out.
pub fn tell_what_was_taken_out() {
    if TAKEN_OUT.swap(false, Ordering::Relaxed) {
        tracing::warn!("FI_PROVIDER=efa, but this machine has no EFA device: using tcp");
    }
}

/// Not where it was chosen, either way. Not with huge pages, which efa refuses together with it. Nor where libibverbs is in
/// use: once memory is registered it refuses, and efa opens nothing.
fn wants_fork_safety(is_set: impl Fn(&str) -> bool, uses_verbs: bool) -> bool {
    let chosen = ["FI_EFA_FORK_SAFE", "RDMAV_FORK_SAFE", "IBV_FORK_SAFE", "RDMAV_HUGEPAGES_SAFE"];
    !uses_verbs && !chosen.into_iter().any(is_set)
}

/// Whether somebody in this process has loaded libibverbs.
fn uses_verbs() -> bool {
    std::fs::read_to_string("/proc/self/maps").is_ok_and(|maps| maps.contains("/libibverbs.so"))
}

/// Whether an Elastic Fabric Adapter is here.
pub fn efa_device() -> bool {
    let Ok(devices) = std::fs::read_dir("/sys/class/infiniband") else { return false };
    devices.flatten().any(|device| {
        std::fs::read_link(device.path().join("device/driver"))
            .is_ok_and(|driver| driver.file_name().is_some_and(|name| name == "efa"))
    })
}

/// All NICs the provider offers for what we do; those without remote writes, or without access to devices where that is
/// wished for, only when none has them.
pub fn find(library: &Arc<Library>, wish: &Wish) -> Result<Vec<Nic>, Error> {
    const MESSAGES: u64 = FI_MSG | FI_TAGGED;
    let devices = if wish.devices { FI_HMEM } else { 0 };
    for caps in [MESSAGES | FI_RMA | devices, MESSAGES | devices, MESSAGES | FI_RMA] {
        let found = ask(library, &wish.provider, caps)?;
        if !found.is_empty() {
            return Ok(found);
        }
    }
    ask(library, &wish.provider, MESSAGES)
}

fn ask(library: &Arc<Library>, provider: &str, caps: u64) -> Result<Vec<Nic>, Error> {
    let name = CString::new(provider).map_err(|_| no_nic(provider, &[], "a provider's name"))?;
    // SAFETY: null asks for an empty, fully allocated fi_info (A2).
    let hints = unsafe { (library.fi_dupinfo)(ptr::null()) };
    if hints.is_null() {
        return Err(call_error(library, "fi_allocinfo", provider, -12));
    }
    let hints = Info { library: library.clone(), ptr: hints };
    // SAFETY: allocated by the library with all attributes (A2).
    unsafe { fill(&mut *hints.ptr, caps, &name) };
    let mut list = ptr::null_mut();
    // SAFETY: hints as documented; `list` receives a list to be freed.
    let code =
        unsafe { (library.fi_getinfo)(API_VERSION, ptr::null(), ptr::null(), 0, hints.ptr, &mut list) };
    // SAFETY: allocated above; the name belongs to `name`, and the library must not free it.
    unsafe { (*(*hints.ptr).fabric_attr).prov_name = ptr::null_mut() };
    match code as isize {
        0 => {}
        code if code == -FI_ENODATA => return Ok(Vec::new()),
        code => return Err(call_error(library, "fi_getinfo", provider, code)),
    }
    let list = Info { library: library.clone(), ptr: list };
    let mut found: Vec<Nic> = Vec::new();
    let mut next = list.ptr;
    while !next.is_null() {
        // SAFETY: an element of the library's list.
        if let Some(nic) = unsafe { read(library, next) } {
            found.push(nic);
        }
        // SAFETY: as above.
        next = unsafe { (*next).next };
    }
    // "tcp" also matches layered providers such as "tcp;ofi_rxm": the plain one is meant where it exists.
    if found.iter().any(|n| n.info.provider == provider) {
        found.retain(|n| n.info.provider == provider);
    }
    Ok(found)
}

/// # Safety
/// `hints` came from `fi_dupinfo(NULL)`.
unsafe fn fill(hints: &mut fi_info, caps: u64, provider: &CStr) {
    hints.caps = caps;
    hints.mode = 0;
    // SAFETY: all attributes are allocated (A2).
    unsafe {
        (*hints.ep_attr).kind = FI_EP_RDM;
        (*hints.fabric_attr).prov_name = provider.as_ptr().cast_mut();
        let domain = &mut *hints.domain_attr;
        domain.threading = FI_THREAD_DOMAIN;
        domain.control_progress = FI_PROGRESS_MANUAL;
        domain.data_progress = FI_PROGRESS_MANUAL;
        domain.resource_mgmt = FI_RM_ENABLED;
        domain.av_type = FI_AV_TABLE;
        domain.mr_mode = FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY;
        if caps & FI_HMEM != 0 {
            domain.mr_mode |= FI_MR_HMEM;
        }
        // Transfers are numbered in 4 bytes.
        domain.cq_data_size = 4;
    }
}

/// # Safety
/// `info` is an element of a list from `fi_getinfo`.
unsafe fn read(library: &Arc<Library>, info: *mut fi_info) -> Option<Nic> {
    // SAFETY: the library's attributes are set in every element; the copy is owned by `raw`.
    unsafe {
        let raw = (library.fi_dupinfo)(info);
        if raw.is_null() {
            return None;
        }
        let raw = Info { library: library.clone(), ptr: raw };
        let link = if (*info).nic.is_null() { ptr::null_mut() } else { (*(*info).nic).link_attr };
        let info = NicInfo {
            provider: text((*(*info).fabric_attr).prov_name),
            name: text((*(*info).domain_attr).name),
            address: address(&*info),
            speed: if link.is_null() { 0 } else { (*link).speed },
            chosen: false,
        };
        Some(Nic { info, raw })
    }
}

/// # Safety
/// Null or a C string.
unsafe fn text(from: *const c_char) -> String {
    if from.is_null() {
        return String::new();
    }
    // SAFETY: not null, a C string by the caller's word.
    unsafe { CStr::from_ptr(from) }.to_string_lossy().into_owned()
}

/// The source address, where it is a socket address.
fn address(info: &fi_info) -> Option<IpAddr> {
    if info.src_addr.is_null() || !matches!(info.addr_format, 1..=3 | 17) {
        return None;
    }
    // SAFETY: the library gives `src_addrlen` bytes there.
    let bytes = unsafe { std::slice::from_raw_parts(info.src_addr.cast::<u8>(), info.src_addrlen) };
    socket_address(bytes).map(|address| address.ip())
}

/// Reads a `struct sockaddr`: family in the first two bytes, then the port.
pub(super) fn socket_address(bytes: &[u8]) -> Option<SocketAddr> {
    const INET: u16 = 2;
    const INET6: u16 = 10;
    let port = u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?);
    let ip: IpAddr = match u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?) {
        INET => Ipv4Addr::from(<[u8; 4]>::try_from(bytes.get(4..8)?).ok()?).into(),
        INET6 => Ipv6Addr::from(<[u8; 16]>::try_from(bytes.get(8..24)?).ok()?).into(),
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

/// Chooses the rails: the interfaces named, in that order; else, where the provider runs over IP, the one that the
/// default route leaves by (others may lead nowhere), or as many as SMDDP_RAILS asks for; else all, as many as an address has
/// room for: over EFA those of a host's processes are spread over all there are. Loopback only when named or alone.
pub fn choose(found: Vec<Nic>, wish: &Wish) -> Result<Vec<Nic>, Error> {
    let infos: Vec<NicInfo> = found.iter().map(|n| n.info.clone()).collect();
    let rails = rails(&infos, wish, default_route().as_deref())?;
    let mut found: Vec<Option<Nic>> = found.into_iter().map(Some).collect();
    Ok(rails.into_iter().filter_map(|at| found[at].take()).collect())
}

/// The places in `found` of what [`choose`] chooses, where the default route leaves by the interface `route`.
fn rails(found: &[NicInfo], wish: &Wish, route: Option<&str>) -> Result<Vec<usize>, Error> {
    let mut best = one_address_each(found);
    let offered: Vec<String> = best.iter().map(|&at| found[at].name.clone()).collect();
    if !wish.names.is_empty() {
        let mut chosen = Vec::new();
        for name in &wish.names {
            match best.iter().position(|&at| found[at].name == *name) {
                Some(i) => chosen.push(best.remove(i)),
                None => return Err(no_nic(&wish.provider, &offered, &format!("SMDDP_NICS={name}"))),
            }
        }
        chosen.truncate(MAX_RAILS);
        return Ok(chosen);
    }
    let better: [fn(&NicInfo) -> bool; 3] =
        [|n| !n.is_loopback(), |n| !n.is_virtual(), |n| n.address_rank() < 2];
    for is_better in better {
        if best.iter().any(|&at| is_better(&found[at])) {
            best.retain(|&at| is_better(&found[at]));
        }
    }
    let over_ip = best.iter().any(|&at| found[at].address.is_some());
    best.sort_by_key(|&at| (route != Some(&found[at].name), &found[at].name));
    if best.iter().any(|&at| found[at].provider.starts_with("efa")) {
        // Each of these reaches all others, so that processes of a host need not begin with the same.
        let start = wish.place.number * best.len() / wish.place.of.max(1);
        let all = best.len();
        best.rotate_left(start % all);
    }
    best.truncate(match wish.rails {
        0 if over_ip => 1,
        0 => MAX_RAILS,
        n => n,
    });
    if best.is_empty() {
        return Err(no_nic(&wish.provider, &offered, "tagged messages between reliable datagram endpoints"));
    }
    Ok(best)
}

/// The places in `found` of the best address of every interface.
fn one_address_each(found: &[NicInfo]) -> Vec<usize> {
    let mut all: Vec<usize> = (0..found.len()).collect();
    all.sort_by_key(|&at| found[at].address_rank());
    let mut best: Vec<usize> = Vec::new();
    for at in all {
        if !best.iter().any(|&other| found[other].name == found[at].name) {
            best.push(at);
        }
    }
    best
}

/// The interface of the default route.
fn default_route() -> Option<String> {
    // Where the kernel lacks a protocol, its file is missing.
    let table = |file: &str| std::fs::read_to_string(file).unwrap_or_default();
    default_interface(&table("/proc/net/route"), &table("/proc/net/ipv6_route"))
}

/// Of these texts of `/proc/net/route` and `/proc/net/ipv6_route`: many hosts have IPv6 alone.
fn default_interface(ipv4: &str, ipv6: &str) -> Option<String> {
    let by_ipv4 = ipv4.lines().skip(1).find_map(|line| {
        let mut words = line.split_whitespace();
        let (name, to) = (words.next()?, words.next()?);
        (to == "00000000").then_some(name)
    });
    let by_ipv6 = || {
        ipv6.lines().find_map(|line| {
            let mut words = line.split_whitespace();
            let (to, length, name) = (words.next()?, words.next()?, words.last()?);
            // Loopback's refuse what no other route takes.
            (length == "00" && to.bytes().all(|digit| digit == b'0') && name != "lo").then_some(name)
        })
    };
    by_ipv4.or_else(by_ipv6).map(str::to_owned)
}

fn no_nic(provider: &str, offered: &[String], wanted: &str) -> Error {
    Error::NoNic {
        provider: provider.to_owned(),
        wanted: wanted.to_owned(),
        offered: if offered.is_empty() { "none".to_owned() } else { offered.join(", ") },
        hint: "Set SMDDP_PROVIDER (tcp works on every network) and SMDDP_NICS, and unset FI_PROVIDER",
    }
}

pub(super) fn call_error(library: &Library, call: &'static str, nic: &str, code: isize) -> Error {
    Error::Call { call, nic: nic.to_owned(), code, text: library.error_text(code) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forks_are_made_safe_where_nobody_has_chosen_and_it_is_early_enough() {
        assert!(wants_fork_safety(|_| false, false));
        assert!(!wants_fork_safety(|_| false, true));
        for name in ["FI_EFA_FORK_SAFE", "RDMAV_FORK_SAFE", "IBV_FORK_SAFE", "RDMAV_HUGEPAGES_SAFE"] {
            assert!(!wants_fork_safety(|other| other == name, false), "{name}");
        }
    }

    #[test]
    fn the_provider_follows_setting_then_filter_then_device() {
        assert_eq!(provider("verbs", "efa", true), "verbs");
        assert_eq!(provider("", "efa", true), "efa");
        assert_eq!(provider("", "efa", false), "tcp", "SageMaker's FI_PROVIDER on other instances");
        assert_eq!(provider("", "shm", false), "shm");
        assert_eq!(provider("", "^shm", true), "efa");
        assert_eq!(provider("", "", false), "tcp");
    }

    #[test]
    fn the_default_route_may_be_of_ipv6_alone() {
        let head = "Iface\tDestination\tGateway \tFlags\n";
        let ipv4 = format!("{head}eth1\t0000000A\t00000000\t0001\neth0\t00000000\t0100000A\t0003\n");
        let zeros = "0".repeat(32);
        let route = |to: &str, length, name| {
            format!("{to} {length} {zeros} 00 {zeros} 00000400 00000001 00000000 00000003 {name:>8}\n")
        };
        let lo = route(&zeros, "00", "lo");
        let ipv6 =
            route("20010db8000500000000000000000000", "40", "eth3") + &lo + &route(&zeros, "00", "eth2");
        assert_eq!(default_interface(&ipv4, &ipv6).as_deref(), Some("eth0"));
        assert_eq!(default_interface(head, &ipv6).as_deref(), Some("eth2"));
        assert_eq!(default_interface("", &lo), None);
    }

    fn nic(name: &str, address: &str) -> NicInfo {
        let address = (!address.is_empty()).then(|| address.parse().unwrap());
        NicInfo { provider: "tcp".to_owned(), name: name.to_owned(), address, speed: 0, chosen: false }
    }

    fn wish(names: &str, rails: usize) -> Wish {
        wish_at(names, rails, Place::ALONE)
    }

    fn wish_at(names: &str, rails: usize, place: Place) -> Wish {
        let names = names.split(',').filter(|n| !n.is_empty()).map(str::to_owned).collect();
        Wish { provider: "tcp".to_owned(), names, rails, devices: false, place }
    }

    /// "name address" of what is chosen, in that order.
    fn chosen(found: &[NicInfo], wish: &Wish, route: Option<&str>) -> Vec<String> {
        let places = rails(found, wish, route).unwrap();
        let one = |&at: &usize| match found[at].address {
            Some(address) => format!("{} {address}", found[at].name),
            None => found[at].name.clone(),
        };
        places.iter().map(one).collect()
    }

    #[test]
    fn the_rails_are_chosen_by_name_kind_address_and_route() {
        let lo = || nic("lo", "127.0.0.1");
        let eth = |n: u8| nic(&format!("eth{n}"), &format!("10.0.{n}.1"));
        let bridges = ["docker0", "veth12", "virbr0", "br-9f", "cni0", "flannel.1", "cali3"];
        let virtuals = || bridges.map(|name| nic(name, "172.17.0.1")).to_vec();
        // What is found, SMDDP_NICS, SMDDP_RAILS, the default route's interface, what is chosen.
        type Case<'a> = (Vec<NicInfo>, &'a str, usize, Option<&'a str>, &'a [&'a str]);
        let cases: &[Case<'_>] = &[
            // One interface over IP, the default route's before the first by name.
            (vec![eth(1), eth(0)], "", 0, None, &["eth0 10.0.0.1"]),
            (vec![eth(0), eth(1)], "", 0, Some("eth1"), &["eth1 10.0.1.1"]),
            (vec![eth(0), eth(1)], "", 0, Some("wlan0"), &["eth0 10.0.0.1"]),
            // The loopback, by its name or its address, only when it is alone or named.
            (vec![lo(), eth(0)], "", 0, Some("lo"), &["eth0 10.0.0.1"]),
            (vec![nic("any", "127.0.0.2"), eth(0)], "", 0, None, &["eth0 10.0.0.1"]),
            (vec![nic("any", "::1"), eth(0)], "", 9, None, &["eth0 10.0.0.1"]),
            (vec![lo()], "", 0, Some("eth0"), &["lo 127.0.0.1"]),
            (vec![eth(0), lo()], "lo", 0, None, &["lo 127.0.0.1"]),
            // Bridges of containers only when there is nothing else, the loopback aside.
            ([virtuals(), vec![eth(0)]].concat(), "", 8, Some("docker0"), &["eth0 10.0.0.1"]),
            (vec![lo(), nic("docker0", "172.17.0.1")], "", 0, None, &["docker0 172.17.0.1"]),
            (vec![eth(0), nic("docker0", "172.17.0.1")], "docker0", 0, None, &["docker0 172.17.0.1"]),
            (vec![nic("bridge", "10.1.0.1"), nic("br0", "10.2.0.1")], "", 0, None, &["br0 10.2.0.1"]),
            // One address of each: IPv4, then IPv6, then those that lead no further than the link.
            (
                vec![nic("a", "fe80::1"), nic("a", "fd00::1"), nic("a", "10.0.0.1")],
                "",
                9,
                None,
                &["a 10.0.0.1"],
            ),
            (
                vec![nic("a", "fe80::1"), nic("a", "169.254.0.1"), nic("a", "fd00::1")],
                "a",
                0,
                None,
                &["a fd00::1"],
            ),
            (vec![nic("a", "fe80::1"), nic("a", "169.254.0.1")], "", 0, None, &["a 169.254.0.1"]),
            (vec![nic("a", "10.0.0.2"), nic("a", "10.0.0.1")], "", 0, None, &["a 10.0.0.2"]),
            // An interface without a better address only when all are so.
            (vec![nic("a", "169.254.0.1"), eth(0)], "", 9, Some("a"), &["eth0 10.0.0.1"]),
            (vec![nic("a", "fe80::1"), nic("b", "fd00::1")], "", 0, Some("a"), &["b fd00::1"]),
            // As many as are asked for: the default route's first, then by name.
            (vec![eth(2), eth(1), eth(0)], "", 2, Some("eth2"), &["eth2 10.0.2.1", "eth0 10.0.0.1"]),
            (vec![eth(2), eth(1)], "", 5, None, &["eth1 10.0.1.1", "eth2 10.0.2.1"]),
            (vec![eth(1), eth(0), lo()], "", 3, None, &["eth0 10.0.0.1", "eth1 10.0.1.1"]),
            // As named, in that order, however many are asked for.
            (vec![lo(), eth(0), eth(1)], "eth1,lo", 1, Some("eth0"), &["eth1 10.0.1.1", "lo 127.0.0.1"]),
            // Where there are no addresses, all.
            (vec![nic("mlx1", ""), nic("mlx0", "")], "", 0, Some("eth0"), &["mlx0", "mlx1"]),
            (vec![nic("mlx1", ""), nic("mlx0", "")], "", 1, None, &["mlx0"]),
        ];
        for (found, names, rails, route, expected) in cases {
            let chosen = chosen(found, &wish(names, *rails), *route);
            assert_eq!(chosen, *expected, "{found:?}, SMDDP_NICS={names} SMDDP_RAILS={rails} {route:?}");
        }
        // More than an address has room for.
        let many: Vec<NicInfo> = (0..12).map(|n| nic(&format!("mlx{n:02}"), "")).collect();
        let names: Vec<&str> = many.iter().map(|n| n.name.as_str()).collect();
        assert_eq!(chosen(&many, &wish("", 0), None), names[..MAX_RAILS]);
        assert_eq!(chosen(&many, &wish(&names.join(","), 0), None), names[..MAX_RAILS]);
        // Over EFA each process of a host begins with others; elsewhere two first rails may have no way to each other.
        let place = Place { number: 4, of: 6 };
        assert_eq!(chosen(&many, &wish_at("", 0, place), None), names[..MAX_RAILS]);
        assert_eq!(chosen(&many, &wish_at(&names[..3].join(","), 0, place), None), names[..3]);
        let efa: Vec<NicInfo> =
            many.iter().map(|n| NicInfo { provider: "efa".to_owned(), ..n.clone() }).collect();
        assert_eq!(chosen(&efa, &wish_at("", 0, place), None), [&names[8..], &names[..4]].concat());
        assert_eq!(chosen(&efa, &wish_at("", 2, place), None), names[8..10]);
        assert_eq!(chosen(&efa, &wish_at(&names[..3].join(","), 0, place), None), names[..3]);
    }

    #[test]
    fn what_cannot_be_chosen_is_told_with_what_there_is() {
        let found = [nic("eth0", "10.0.0.1"), nic("eth1", "10.0.1.1")];
        for names in ["eth2", "eth0,eth2", "eth0,eth0"] {
            let error = rails(&found, &wish(names, 0), None).unwrap_err();
            let Error::NoNic { wanted, offered, .. } = error else { panic!("{names}: {error}") };
            let missing = names.rsplit(',').next().unwrap();
            assert_eq!((wanted, offered), (format!("SMDDP_NICS={missing}"), "eth0, eth1".to_owned()));
        }
        let error = rails(&[], &wish("", 0), None).unwrap_err();
        assert!(matches!(&error, Error::NoNic { offered, .. } if offered == "none"), "{error}");
    }

    #[test]
    fn as_many_rails_as_an_address_has_room_for() {
        let mut settings = Settings::default();
        for (asked, rails) in [("0", 0), ("3", 3), ("8", 8), ("9", MAX_RAILS)] {
            settings.set("SMDDP_RAILS", asked).unwrap();
            assert_eq!(Wish::of(&settings, Place::ALONE).rails, rails);
        }
        settings.set("SMDDP_NICS", " eth1 ,,lo").unwrap();
        assert_eq!(Wish::of(&settings, Place::ALONE).names, ["eth1", "lo"]);
    }
}
