//! Memory: allocation, pinning, copies, fills, what a pointer is.

use crate::capture;
use crate::code::{Code, Result};
use crate::context;
use crate::entry::{In, Out, api};
use crate::memory::{self, Kind, Span, device_span, host_span, poison};
use crate::stream::Stream;
use smddp_standin::switches::{Poison, Switches};
use std::ffi::{c_int, c_uint};
use std::sync::Arc;

/// Queues the copy. The destination is poisoned from the time the switch says until the copy is done.
fn queue_copy(stream: &Arc<Stream>, name: &'static str, to: Span, from: Span, marks: bool) -> Result<u64> {
    if marks {
        poison(&to, Poison::Enqueue)?;
    }
    let (late, source) = (to.clone(), from);
    Ok(stream.enqueue(name, move || {
        if marks {
            poison(&late, Poison::Start)?;
            std::thread::sleep(Switches::get().copy_time);
        }
        to.copy_from(&source)
    }))
}

/// CUDA_MEMCPY2D.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Copy2d {
    from: Side2d,
    to: Side2d,
    width: usize,
    height: usize,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Side2d {
    x: usize,
    y: usize,
    kind: c_int,
    host: u64,
    device: u64,
    array: u64,
    pitch: usize,
}

/// What attribute 11 says; longer ones are refused.
const MAX_PITCH: usize = i32::MAX as usize;

impl Side2d {
    /// The rows' places. All that lies between their ends belongs to one allocation.
    fn rows(&self, width: usize, height: usize) -> Result<Vec<Span>> {
        if self.pitch < self.x + width || self.pitch > MAX_PITCH {
            return Err(Code::INVALID_VALUE);
        }
        let at = |start: u64, row: usize| start + ((self.y + row) * self.pitch + self.x) as u64;
        let span = |row, len| match self.kind {
            1 => host_span(at(self.host, row), len).and_then(|span| match span.is_pinned() {
                true => Ok(span),
                false => Err(Code::NOT_SUPPORTED),
            }),
            2 => device_span(at(self.device, row), len),
            _ => Err(Code::NOT_SUPPORTED),
        };
        span(0, (height - 1) * self.pitch + width)?;
        (0..height).map(|row| span(row, width)).collect()
    }
}

/// Between a device and pinned memory, which is all that is asked for here.
fn rows(name: &'static str, copy: &Copy2d, stream: usize) -> Result {
    let stream = context::stream(stream)?;
    if copy.width == 0 || copy.height == 0 {
        return Ok(());
    }
    let (from, to) = (copy.from.rows(copy.width, copy.height)?, copy.to.rows(copy.width, copy.height)?);
    let marks = copy.to.kind == 1;
    let poison = move |to: &[Span], now| to.iter().filter(|_| marks).try_for_each(|span| poison(span, now));
    poison(&to, Poison::Enqueue)?;
    stream.enqueue(name, move || {
        poison(&to, Poison::Start)?;
        if marks {
            std::thread::sleep(Switches::get().copy_time);
        }
        to.iter().zip(&from).try_for_each(|(to, from)| to.copy_from(from))
    });
    Ok(())
}

fn to_host(name: &'static str, host: usize, device: u64, len: usize, stream: usize, wait: bool) -> Result {
    let stream = context::stream(stream)?;
    if len == 0 {
        return Ok(());
    }
    let (to, from) = (host_span(host as u64, len)?, device_span(device, len)?);
    let pinned = to.is_pinned();
    let place = queue_copy(&stream, name, to, from, pinned)?;
    // Into pageable memory the driver copies itself: done on return.
    if wait || !pinned { stream.synchronize(place) } else { Ok(()) }
}

fn to_device(name: &'static str, device: u64, host: usize, len: usize, stream: usize, wait: bool) -> Result {
    let stream = context::stream(stream)?;
    if len == 0 {
        return Ok(());
    }
    let (to, from) = (device_span(device, len)?, host_span(host as u64, len)?);
    let place = if from.is_pinned() {
        queue_copy(&stream, name, to, from, false)?
    } else {
        // From pageable memory the driver stages first: the source may change once it returns.
        let staged = from.snapshot()?;
        stream.enqueue(name, move || {
            // SAFETY: `staged` is as long as the span.
            unsafe { to.write_from(staged.as_ptr()) }
        })
    };
    if wait { stream.synchronize(place) } else { Ok(()) }
}

fn on_device(name: &'static str, to: u64, from: u64, len: usize, stream: usize, wait: bool) -> Result {
    let stream = context::stream(stream)?;
    if len == 0 {
        return Ok(());
    }
    let place = queue_copy(&stream, name, device_span(to, len)?, device_span(from, len)?, false)?;
    if wait { stream.synchronize(place) } else { Ok(()) }
}

/// cuMemcpy and cuMemcpyAsync find out by themselves what the addresses are.
fn any_way(name: &'static str, to: u64, from: u64, len: usize, stream: usize, wait: bool) -> Result {
    let on_host = |address| match memory::region_at(address) {
        Some(region) => matches!(region.kind, Kind::Pinned | Kind::Registered),
        None => true,
    };
    match (on_host(to), on_host(from)) {
        (true, true) => {
            let stream = context::stream(stream)?;
            let (to, from) = (host_span(to, len)?, host_span(from, len)?);
            let free = to.is_pinned() && from.is_pinned();
            let place = queue_copy(&stream, name, to, from, free)?;
            if wait || !free { stream.synchronize(place) } else { Ok(()) }
        }
        (true, false) => to_host(name, to as usize, from, len, stream, wait),
        (false, true) => to_device(name, to, from as usize, len, stream, wait),
        (false, false) => on_device(name, to, from, len, stream, wait),
    }
}

fn fill(name: &'static str, address: u64, pattern: &[u8], count: usize, stream: usize, wait: bool) -> Result {
    let stream = context::stream(stream)?;
    if count == 0 {
        return Ok(());
    }
    if !address.is_multiple_of(pattern.len() as u64) {
        return Err(Code::INVALID_VALUE);
    }
    let span = device_span(address, count.checked_mul(pattern.len()).ok_or(Code::INVALID_VALUE)?)?;
    let pattern = pattern.to_vec();
    let place = stream.enqueue(name, move || span.fill_with(&pattern));
    if wait { stream.synchronize(place) } else { Ok(()) }
}

api! {
    fn cuMemGetInfo_v2(free: Out<usize>, total: Out<usize>) {
        let used = memory::used(context::current()?.ordinal);
        free.set(Switches::get().memory.saturating_sub(used) as usize)?;
        total.set(Switches::get().memory as usize)
    }

    fn cuMemAlloc_v2(out: Out<u64>, len: usize) {
        capture::refuse()?;
        out.set(memory::allocate(Kind::Device, context::current()?.ordinal, len, 0)?)
    }

    fn cuMemFree_v2(address: u64) {
        capture::refuse()?;
        context::current()?;
        if address == 0 { Ok(()) } else { memory::free_device(address) }
    }

    fn cuMemAllocAsync(out: Out<u64>, len: usize, stream: usize) {
        let device = context::stream(stream)?.device().ordinal;
        out.set(memory::allocate(Kind::Device, device, len, 0)?)
    }

    fn cuMemFreeAsync(address: u64, stream: usize) {
        let stream = context::stream(stream)?;
        if address == 0 {
            return Ok(());
        }
        memory::region_at(address)
            .filter(|region| region.kind == Kind::Device && region.address == address)
            .ok_or(Code::INVALID_VALUE)?;
        stream.enqueue("cuMemFreeAsync", move || memory::remove(Kind::Device, address, Code::INVALID_VALUE));
        Ok(())
    }

    fn cuMemGetAddressRange_v2(base: Out<u64>, len: Out<usize>, address: u64) {
        let region = memory::region_at(address).ok_or(Code::INVALID_VALUE)?;
        base.set_if_wanted(region.address);
        len.set_if_wanted(region.len);
        Ok(())
    }

    fn cuMemHostAlloc(out: Out<u64>, len: usize, flags: c_uint) {
        capture::refuse()?;
        let device = context::current()?.ordinal;
        if flags > 7 {
            return Err(Code::INVALID_VALUE);
        }
        out.set(memory::allocate(Kind::Pinned, device, len, flags)?)
    }

    fn cuMemAllocHost_v2(out: Out<u64>, len: usize) {
        capture::refuse()?;
        out.set(memory::allocate(Kind::Pinned, context::current()?.ordinal, len, 0)?)
    }

    /// Pinned memory is freed when no device can use it any more.
    fn cuMemFreeHost(host: u64) {
        capture::refuse()?;
        let current = context::current()?;
        if host == 0 {
            return Ok(());
        }
        let region = memory::host_region_at(host).filter(|r| r.kind == Kind::Pinned).ok_or(Code::INVALID_VALUE)?;
        let device = context::device(region.device).unwrap_or(current);
        let _driver = crate::entry::driver_alone();
        device.synchronize()?;
        memory::remove(Kind::Pinned, host, Code::INVALID_VALUE)
    }

    fn cuMemHostRegister_v2(host: u64, len: usize, flags: c_uint) {
        capture::refuse()?;
        let device = context::current()?.ordinal;
        if flags > 15 {
            return Err(Code::INVALID_VALUE);
        }
        memory::label(Kind::Registered, device, host, len, flags)
    }

    /// As freeing pinned memory: when no device can use it any more.
    fn cuMemHostUnregister(host: u64) {
        capture::refuse()?;
        let current = context::current()?;
        let region = memory::host_region_at(host).filter(|r| r.kind == Kind::Registered).ok_or(Code::NOT_REGISTERED)?;
        let device = context::device(region.device).unwrap_or(current);
        let _driver = crate::entry::driver_alone();
        device.synchronize()?;
        memory::remove(Kind::Registered, host, Code::NOT_REGISTERED)
    }

    fn cuMemHostGetDevicePointer_v2(out: Out<u64>, host: u64, flags: c_uint) {
        context::current()?;
        if flags != 0 {
            return Err(Code::INVALID_VALUE);
        }
        let region = memory::host_region_at(host).ok_or(Code::INVALID_VALUE)?;
        if !matches!(region.kind, Kind::Pinned | Kind::Registered) {
            return Err(Code::INVALID_VALUE);
        }
        out.set(memory::device_address(&region, host))
    }

    fn cuMemHostGetFlags(out: Out<c_uint>, host: u64) {
        let region = memory::host_region_at(host).ok_or(Code::INVALID_VALUE)?;
        out.set(region.flags)
    }

    fn cuMemcpyDtoHAsync_v2(host: usize, device: u64, len: usize, stream: usize) {
        to_host("cuMemcpyDtoHAsync", host, device, len, stream, false)
    }

    fn cuMemcpyHtoDAsync_v2(device: u64, host: usize, len: usize, stream: usize) {
        to_device("cuMemcpyHtoDAsync", device, host, len, stream, false)
    }

    fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, len: usize, stream: usize) {
        on_device("cuMemcpyDtoDAsync", to, from, len, stream, false)
    }

    fn cuMemcpy2DAsync_v2(copy: In<Copy2d>, stream: usize) {
        let copy = copy.read(1)?;
        rows("cuMemcpy2DAsync", copy.first().ok_or(Code::INVALID_VALUE)?, stream)
    }

    fn cuMemcpyAsync(to: u64, from: u64, len: usize, stream: usize) {
        any_way("cuMemcpyAsync", to, from, len, stream, false)
    }

    fn cuMemcpyDtoH_v2(host: usize, device: u64, len: usize) {
        to_host("cuMemcpyDtoH", host, device, len, 0, true)
    }

    fn cuMemcpyHtoD_v2(device: u64, host: usize, len: usize) {
        to_device("cuMemcpyHtoD", device, host, len, 0, true)
    }

    fn cuMemcpyDtoD_v2(to: u64, from: u64, len: usize) {
        on_device("cuMemcpyDtoD", to, from, len, 0, true)
    }

    fn cuMemcpy(to: u64, from: u64, len: usize) {
        any_way("cuMemcpy", to, from, len, 0, true)
    }

    fn cuMemsetD8Async(address: u64, value: u8, count: usize, stream: usize) {
        fill("cuMemsetD8Async", address, &[value], count, stream, false)
    }

    fn cuMemsetD16Async(address: u64, value: u16, count: usize, stream: usize) {
        fill("cuMemsetD16Async", address, &value.to_ne_bytes(), count, stream, false)
    }

    fn cuMemsetD32Async(address: u64, value: u32, count: usize, stream: usize) {
        fill("cuMemsetD32Async", address, &value.to_ne_bytes(), count, stream, false)
    }

    fn cuMemsetD8_v2(address: u64, value: u8, count: usize) {
        fill("cuMemsetD8", address, &[value], count, 0, true)
    }

    fn cuMemsetD32_v2(address: u64, value: u32, count: usize) {
        fill("cuMemsetD32", address, &value.to_ne_bytes(), count, 0, true)
    }

    fn cuPointerGetAttribute(out: Out<u64>, attribute: c_uint, address: u64) {
        let _driver = crate::entry::driver_shared();
        // Host pointers are asked about as well.
        let region = memory::region_at(address)
            .or_else(|| memory::host_region_at(address))
            .ok_or(Code::INVALID_VALUE)?;
        let device = context::device(region.device)?;
        let host = matches!(region.kind, Kind::Pinned | Kind::Registered);
        let word = |value: c_int| out.narrow::<c_int>().set(value);
        match attribute {
            1 => out.set(device.context() as u64),
            // Host or device.
            2 => word(if host { 1 } else { 2 }),
            3 => out.set(memory::device_address(&region, address)),
            4 if host => out.set(memory::host_address(&region, address)),
            // Managed: never. Ordinal. Start and size of the region. Mapped.
            8 => out.narrow::<u8>().set(0),
            9 => word(region.device),
            11 => out.set(region.address),
            12 => out.set(region.len as u64),
            13 => out.narrow::<u8>().set(1),
            _ => Err(Code::INVALID_VALUE),
        }
    }
}
