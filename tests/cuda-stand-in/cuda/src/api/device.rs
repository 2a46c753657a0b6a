//! Initialisation, errors, devices and contexts.

use crate::code::Code;
use crate::context::{self, device};
use crate::entry::{Out, api, initialize};
use smddp_standin::switches::{GpuDirect, Switches, WaitValue};
use std::ffi::{c_char, c_int, c_uint};
use std::sync::OnceLock;

const NAME: &std::ffi::CStr = c"smddp stand-in";

/// Copies with the final NUL, cut to `len` bytes.
fn put_text(out: &Out<c_char>, len: c_int, text: &[u8]) -> crate::code::Result {
    let Some(room) = usize::try_from(len).ok().filter(|len| *len > 0) else {
        return Err(Code::INVALID_VALUE);
    };
    let to = out.address().cast::<u8>();
    if to.is_null() {
        return Err(Code::INVALID_VALUE);
    }
    let count = text.len().min(room - 1);
    // SAFETY: the C caller's buffer of `len` bytes.
    unsafe { to.copy_from(text.as_ptr(), count) };
    // SAFETY: as above; count < len.
    unsafe { to.add(count).write(0) };
    Ok(())
}

fn attribute(attribute: c_int) -> Option<c_int> {
    let memops = c_int::from(Switches::get().wait_value != WaitValue::Unsupported);
    Some(match attribute {
        // Multiprocessors, threads a block, warp.
        16 => 132,
        1 => 1024,
        10 => 32,
        // Can map host memory, unified addressing, concurrent kernels, copy engines.
        19 | 41 | 31 => 1,
        40 => 3,
        75 => 9,
        76 => 0,
        // Bus, slot, domain: see cuDeviceGetPCIBusId.
        33 | 34 | 50 => return None,
        // Host pointers of registered memory are the device's.
        91 => c_int::from(!Switches::get().host_alias),
        99 | 115 | 78 => 1,
        // Memory operations: the old ones 92 to 94, of 64 bits 122, NOR 123.
        92..=94 | 122 | 123 => memops,
        // GPUDirect: the flush of remote writes, whether there is any, in what order writes arrive.
        98 => c_int::from(Switches::get().gpudirect == GpuDirect::Flush),
        116 => c_int::from(Switches::get().gpudirect != GpuDirect::Off),
        118 if matches!(Switches::get().gpudirect, GpuDirect::Ordered | GpuDirect::Coherent) => 100,
        // Host memory through the host's page tables.
        100 => c_int::from(Switches::get().gpudirect == GpuDirect::Coherent),
        // And without a module of its own, by dmabuf: none.
        117..=119 | 124 => 0,
        134 => -1,
        other if (1..=150).contains(&other) => 0,
        _ => return None,
    })
}

/// One description for codes that CUDA has not.
fn describe(code: c_int) -> Option<(*const c_char, *const c_char)> {
    Code(code).describe().map(|(name, text)| (name.as_ptr(), text.as_ptr()))
}

api! {
    fn cuInit(flags: c_uint) {
        if flags != 0 {
            return Err(Code::INVALID_VALUE);
        }
        if context::count() == 0 {
            return Err(Code::NO_DEVICE);
        }
        initialize();
        Ok(())
    }

    fn cuDriverGetVersion(out: Out<c_int>) {
        out.set(Switches::get().driver_version)
    }

    fn cuGetErrorName(code: c_int, out: Out<*const c_char>) {
        out.set(describe(code).map_or(std::ptr::null(), |(name, _)| name))?;
        describe(code).map(|_| ()).ok_or(Code::INVALID_VALUE)
    }

    fn cuGetErrorString(code: c_int, out: Out<*const c_char>) {
        out.set(describe(code).map_or(std::ptr::null(), |(_, text)| text))?;
        describe(code).map(|_| ()).ok_or(Code::INVALID_VALUE)
    }

    fn cuDeviceGet(out: Out<c_int>, ordinal: c_int) {
        out.set(device(ordinal)?.ordinal)
    }

    fn cuDeviceGetCount(out: Out<c_int>) {
        out.set(context::count())
    }

    fn cuDeviceGetName(out: Out<c_char>, len: c_int, ordinal: c_int) {
        device(ordinal)?;
        put_text(&out, len, NAME.to_bytes())
    }

    fn cuDeviceGetPCIBusId(out: Out<c_char>, len: c_int, ordinal: c_int) {
        let bus = device(ordinal)?.ordinal + 1;
        put_text(&out, len, format!("0000:{bus:02X}:00.0").as_bytes())
    }

    fn cuDeviceGetUuid_v2(out: Out<[u8; 16]>, ordinal: c_int) {
        let mut uuid = *b"smddp stand-in\0\0";
        uuid[15] = device(ordinal)?.ordinal as u8;
        out.set(uuid)
    }

    fn cuDeviceTotalMem_v2(out: Out<usize>, ordinal: c_int) {
        device(ordinal)?;
        out.set(Switches::get().memory as usize)
    }

    fn cuDeviceGetAttribute(out: Out<c_int>, wanted: c_int, ordinal: c_int) {
        let ordinal = device(ordinal)?.ordinal;
        out.set(match wanted {
            33 => ordinal + 1,
            34 | 50 => 0,
            wanted => attribute(wanted).ok_or(Code::INVALID_VALUE)?,
        })
    }

    fn cuDeviceCanAccessPeer(out: Out<c_int>, one: c_int, other: c_int) {
        out.set(c_int::from(device(one)?.ordinal != device(other)?.ordinal))
    }

    fn cuDevicePrimaryCtxRetain(out: Out<usize>, ordinal: c_int) {
        let device = device(ordinal)?;
        out.set(device.context())?;
        device.retain();
        Ok(())
    }

    fn cuDevicePrimaryCtxRelease_v2(ordinal: c_int) {
        device(ordinal)?.release()
    }

    fn cuDevicePrimaryCtxGetState(ordinal: c_int, flags: Out<c_uint>, active: Out<c_int>) {
        let device = device(ordinal)?;
        flags.set(0)?;
        active.set(c_int::from(device.is_active()))
    }

    fn cuDevicePrimaryCtxSetFlags_v2(ordinal: c_int, _flags: c_uint) {
        device(ordinal).map(|_| ())
    }

    fn cuCtxGetCurrent(out: Out<usize>) {
        out.set(context::current_handle())
    }

    fn cuCtxSetCurrent(context: usize) {
        context::set_current(context)
    }

    fn cuCtxPushCurrent_v2(context: usize) {
        context::push_current(context)
    }

    fn cuCtxPopCurrent_v2(out: Out<usize>) {
        out.set_if_wanted(context::pop_current()?);
        Ok(())
    }

    fn cuCtxGetDevice(out: Out<c_int>) {
        out.set(context::current()?.ordinal)
    }

    fn cuCtxGetApiVersion(context: usize, out: Out<c_uint>) {
        if context != 0 {
            context::of_handle(context)?;
        }
        out.set(3020)
    }

    fn cuCtxGetFlags(out: Out<c_uint>) {
        context::current()?;
        out.set(0)
    }

    fn cuCtxSetFlags(_flags: c_uint) {
        context::current().map(|_| ())
    }

    fn cuCtxSynchronize() {
        context::current()?.synchronize()
    }

    fn cuCtxGetStreamPriorityRange(least: Out<c_int>, greatest: Out<c_int>) {
        context::current()?;
        least.set_if_wanted(0);
        greatest.set_if_wanted(-5);
        Ok(())
    }

    /// The real one leads to every function of the driver. NCCL and the CUDA runtime start with it: they
    /// cannot run on the stand-in, and must see that at once.
    fn cuGetProcAddress_v2(_name: *const c_char, out: Out<usize>, _version: c_int, _flags: u64, found: Out<c_int>) {
        static TOLD: OnceLock<()> = OnceLock::new();
        TOLD.get_or_init(|| eprintln!("smddp stand-in for CUDA: the real NCCL or CUDA runtime cannot run on it"));
        out.set_if_wanted(0);
        found.set_if_wanted(1);
        Err(Code::NOT_SUPPORTED)
    }
}
