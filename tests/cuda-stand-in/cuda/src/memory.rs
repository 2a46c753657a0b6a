//! Memory that streams may use: what the device allocated, pinned host memory, and what tests label as such.
//! Every address an operation touches is looked up here when it is queued and again when it runs.

use crate::code::{Code, Result};
use crate::context;
use crate::entry::lock;
use smddp_standin::abi::Leaks;
use smddp_standin::switches::{Poison, Switches};
use std::alloc::{Layout, alloc, dealloc};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// cuMemAlloc and cuMemAllocAsync.
    Device,
    /// A test's memory, labelled as the device's.
    Adopted,
    /// cuMemHostAlloc.
    Pinned,
    /// cuMemHostRegister.
    Registered,
    /// Not ours at all: host memory, or any with `SMDDP_STANDIN_ANY_POINTER`.
    Foreign,
}

/// Addresses of pinned memory as devices see them, with `SMDDP_STANDIN_HOST_ALIAS`: above all user memory.
const ALIAS: u64 = 1 << 60;
const ALIGN: usize = 256;
const FRESH: u8 = 0xCD;
const FREED: u8 = 0xDD;
pub const POISON: u8 = 0xA5;

pub struct Region {
    pub kind: Kind,
    pub device: i32,
    pub flags: u32,
    /// As devices address it.
    pub address: u64,
    base: *mut u8,
    pub len: usize,
    /// False once freed. Held for reading while bytes are touched, so that freeing waits for that.
    live: RwLock<bool>,
    /// We allocated it, and free it when nobody refers to it any more.
    layout: Option<Layout>,
}

// SAFETY: the pointer is only followed by the functions below, which treat what it points to as memory that
// a device changes at any time: by raw copies and atomics, never by reference.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Drop for Region {
    fn drop(&mut self) {
        if let Some(layout) = self.layout {
            // SAFETY: allocated with this layout in `allocate`; the last reference is going away.
            unsafe { dealloc(self.base, layout) };
        }
    }
}

/// By address as devices see it. Regions do not overlap.
static REGIONS: Mutex<BTreeMap<u64, Arc<Region>>> = Mutex::new(BTreeMap::new());

fn is_device(kind: Kind) -> bool {
    matches!(kind, Kind::Device | Kind::Adopted)
}

fn alias(kind: Kind) -> u64 {
    if Switches::get().host_alias && !is_device(kind) { ALIAS } else { 0 }
}

pub fn used(device: i32) -> u64 {
    let regions = lock(&REGIONS);
    regions.values().filter(|r| r.kind == Kind::Device && r.device == device).map(|r| r.len as u64).sum()
}

/// Device memory or pinned host memory; gives the host's address (for device memory both are the same).
pub fn allocate(kind: Kind, device: i32, len: usize, flags: u32) -> Result<u64> {
    if len == 0 {
        return Err(Code::INVALID_VALUE);
    }
    let limit = Switches::get().memory;
    if kind == Kind::Device && (len as u64 > limit || used(device) > limit - len as u64) {
        return Err(Code::OUT_OF_MEMORY);
    }
    let layout = Layout::from_size_align(len, ALIGN).map_err(|_| Code::OUT_OF_MEMORY)?;
    // SAFETY: the layout is not empty.
    let base = unsafe { alloc(layout) };
    if base.is_null() {
        return Err(Code::OUT_OF_MEMORY);
    }
    // SAFETY: just allocated with this length.
    unsafe { base.write_bytes(FRESH, len) };
    let address = base as u64 + alias(kind);
    let live = RwLock::new(true);
    let region = Region { kind, device, flags, address, base, len, live, layout: Some(layout) };
    lock(&REGIONS).insert(address, Arc::new(region));
    Ok(base as u64)
}

/// Memory that somebody else owns becomes `kind`.
pub fn label(kind: Kind, device: i32, host: u64, len: usize, flags: u32) -> Result {
    if host == 0 || len == 0 {
        return Err(Code::INVALID_VALUE);
    }
    let address = host + alias(kind);
    let mut regions = lock(&REGIONS);
    let below = regions.range(..address + len as u64).next_back();
    if below.is_some_and(|(_, region)| region.address + region.len as u64 > address) {
        return Err(Code::ALREADY_REGISTERED);
    }
    let live = RwLock::new(true);
    let region = Region { kind, device, flags, address, base: host as *mut u8, len, live, layout: None };
    regions.insert(address, Arc::new(region));
    Ok(())
}

/// Takes the region out that begins at `host` as the host sees it; `wrong` if there is none of this kind.
/// From then on operations that were queued with it fail.
pub fn remove(kind: Kind, host: u64, wrong: Code) -> Result {
    let region = {
        let mut regions = lock(&REGIONS);
        let address = host.wrapping_add(alias(kind));
        match regions.get(&address) {
            Some(region) if region.kind == kind => regions.remove(&address).ok_or(wrong)?,
            _ => return Err(wrong),
        }
    };
    let mut live = region.live.write().unwrap_or_else(PoisonError::into_inner);
    *live = false;
    if region.layout.is_some() {
        // SAFETY: our allocation of this length; nobody touches it while `live` is held for writing.
        unsafe { region.base.write_bytes(FREED, region.len) };
    }
    Ok(())
}

fn at(regions: &BTreeMap<u64, Arc<Region>>, address: u64) -> Option<Arc<Region>> {
    let (_, region) = regions.range(..=address).next_back()?;
    (address - region.address < region.len as u64).then(|| Arc::clone(region))
}

/// The region that holds `address` as devices see it.
pub fn region_at(address: u64) -> Option<Arc<Region>> {
    at(&lock(&REGIONS), address)
}

/// The region that holds `address` as the host sees it.
pub fn host_region_at(address: u64) -> Option<Arc<Region>> {
    let regions = lock(&REGIONS);
    at(&regions, address).or_else(|| at(&regions, address.wrapping_add(ALIAS)))
}

/// `address` is in `region`, as the host or as devices see it.
fn offset(region: &Region, address: u64) -> u64 {
    let base = region.base as u64;
    if address.wrapping_sub(base) < region.len as u64 { address - base } else { address - region.address }
}

/// How devices see `address`, which is in `region`.
pub fn device_address(region: &Region, address: u64) -> u64 {
    region.address + offset(region, address)
}

/// How the host sees `address`, which is in `region`.
pub fn host_address(region: &Region, address: u64) -> u64 {
    region.base as u64 + offset(region, address)
}

/// Part of a region, or of memory that is not ours.
#[derive(Clone)]
pub struct Span {
    region: Arc<Region>,
    ptr: *mut u8,
    pub len: usize,
}

// SAFETY: as for Region, which keeps the memory.
unsafe impl Send for Span {}

fn part(region: Arc<Region>, address: u64, start: u64, len: usize) -> Result<Span> {
    let offset = (address - start) as usize;
    if len > region.len - offset {
        return Err(Code::INVALID_VALUE);
    }
    let ptr = region.base.wrapping_add(offset);
    Ok(Span { region, ptr, len })
}

fn foreign(address: u64, len: usize) -> Span {
    let base = address as *mut u8;
    let region = Region {
        kind: Kind::Foreign,
        device: 0,
        flags: 0,
        address,
        base,
        len,
        live: RwLock::new(true),
        layout: None,
    };
    Span { region: Arc::new(region), ptr: base, len }
}

/// What a device may use at `address`: its own memory, or pinned host memory as it sees it.
pub fn device_span(address: u64, len: usize) -> Result<Span> {
    match region_at(address) {
        Some(region) => {
            let start = region.address;
            part(region, address, start, len)
        }
        None if Switches::get().any_pointer && address != 0 => Ok(foreign(address, len)),
        None => Err(Code::INVALID_VALUE),
    }
}

/// The host's end of a copy; [`Span::is_pinned`] says whether it may go on behind the caller's back.
pub fn host_span(address: u64, len: usize) -> Result<Span> {
    if address == 0 {
        return Err(Code::INVALID_VALUE);
    }
    match host_region_at(address) {
        Some(region) => {
            let start = region.base as u64;
            // From pinned memory into what follows it is a caller's mistake; cuMemcpy refuses it as well.
            part(region, address, start, len)
        }
        None => Ok(foreign(address, len)),
    }
}

impl Span {
    pub fn is_pinned(&self) -> bool {
        self.region.kind != Kind::Foreign
    }

    /// Touches the bytes, unless they were freed since this was queued.
    fn touch<T>(&self, what: impl FnOnce(*mut u8) -> T) -> Result<T> {
        let live = self.region.live.read().unwrap_or_else(PoisonError::into_inner);
        if !*live {
            return Err(Code::ILLEGAL_ADDRESS);
        }
        Ok(what(self.ptr))
    }

    pub fn fill(&self, byte: u8) -> Result {
        // SAFETY: live, and `len` bytes long by construction; foreign memory is the caller's promise.
        self.touch(|ptr| unsafe { ptr.write_bytes(byte, self.len) })
    }

    pub fn copy_from(&self, from: &Self) -> Result {
        debug_assert_eq!(self.len, from.len);
        // SAFETY: both live and of this length; they may overlap, which `copy` allows.
        self.touch(|to| from.touch(|from| unsafe { to.copy_from(from, self.len) }))?
    }

    /// Fills with a pattern of 2 or 4 bytes.
    pub fn fill_with(&self, pattern: &[u8]) -> Result {
        self.touch(|ptr| {
            for (i, chunk) in (0..self.len).step_by(pattern.len()).enumerate() {
                let len = pattern.len().min(self.len - chunk);
                // SAFETY: within the span.
                unsafe { ptr.add(i * pattern.len()).copy_from(pattern.as_ptr(), len) };
            }
        })
    }

    /// # Safety
    /// `to` is valid for `len` bytes.
    pub unsafe fn read_to(&self, to: *mut u8) -> Result {
        // SAFETY: live; `to` by the caller's promise.
        self.touch(|from| unsafe { to.copy_from(from, self.len) })
    }

    /// # Safety
    /// `from` is valid for `len` bytes.
    pub unsafe fn write_from(&self, from: *const u8) -> Result {
        // SAFETY: live; `from` by the caller's promise.
        self.touch(|to| unsafe { to.copy_from(from, self.len) })
    }

    /// The bytes now, in memory of our own.
    pub fn snapshot(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.len];
        // SAFETY: `bytes` is as long.
        unsafe { self.read_to(bytes.as_mut_ptr())? };
        Ok(bytes)
    }

    /// What `what` does with the address of an aligned word of memory that host and device share.
    pub fn with_word<T>(&self, what: impl FnOnce(*mut u8) -> T) -> Result<T> {
        if !(self.ptr as usize).is_multiple_of(self.len) {
            return Err(Code::INVALID_VALUE);
        }
        self.touch(what)
    }
}

/// Marks a destination as not yet written, if the switch says so for this point of time.
pub fn poison(span: &Span, now: Poison) -> Result {
    if Switches::get().poison == now { span.fill(POISON) } else { Ok(()) }
}

pub fn count(leaks: &mut Leaks) {
    for region in lock(&REGIONS).values() {
        match region.kind {
            Kind::Device | Kind::Adopted => {
                leaks.device_regions += 1;
                leaks.device_bytes += region.len as u64;
            }
            Kind::Pinned => leaks.pinned_regions += 1,
            Kind::Registered => leaks.registered_regions += 1,
            Kind::Foreign => {}
        }
    }
}

/// Frees device memory as the driver does: after everything the device has to do.
pub fn free_device(address: u64) -> Result {
    let region = region_at(address).filter(|r| r.kind == Kind::Device && r.address == address);
    let region = region.ok_or(Code::INVALID_VALUE)?;
    let _driver = crate::entry::driver_alone();
    context::device_known(region.device).synchronize()?;
    remove(Kind::Device, address, Code::INVALID_VALUE)
}
