//! Sealed files in memory, and mappings of them.

use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};
use rustix::process::{Resource, getrlimit};

use crate::error::ShmError;

pub(crate) fn out_of_memory(wanted: usize, reason: impl std::fmt::Display) -> ShmError {
    ShmError::Memory { wanted, reason: reason.to_string() }
}

/// A memfd of `len` bytes, none of them allocated yet, that can neither shrink nor grow.
pub(crate) fn create(name: &str, len: usize) -> Result<OwnedFd, ShmError> {
    // Beyond the limit the kernel would kill this process with a signal instead of returning an error.
    if let Some(limit) = getrlimit(Resource::Fsize).current
        && limit < len as u64
    {
        return Err(out_of_memory(len, format!("the limit on file size (ulimit -f) is {limit} bytes")));
    }
    // Beyond the machine's memory it would kill others first.
    let system = rustix::system::sysinfo();
    let total = (system.totalram as u64).saturating_mul(u64::from(system.mem_unit));
    if total < len as u64 {
        return Err(out_of_memory(len, format!("the machine has {total} bytes")));
    }
    let file = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
        .map_err(|e| ShmError::system("memfd_create", e))?;
    rustix::fs::ftruncate(&file, len as u64).map_err(|e| out_of_memory(len, e))?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
        .map_err(|e| ShmError::system("sealing a memfd", e))?;
    Ok(file)
}

/// Maps the first `len` bytes of `file`, which it has; `more` flags beside `SHARED`.
pub(crate) fn map(file: impl AsFd, len: usize, more: MapFlags) -> Result<NonNull<u8>, ShmError> {
    let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | more);
    // SAFETY: a new mapping at an address the kernel chooses touches nothing that exists.
    let base = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, access, flags, file, 0) };
    let base = base.map_err(|e| out_of_memory(len, format!("mmap: {e}")))?;
    NonNull::new(base.cast()).ok_or_else(|| out_of_memory(len, "mmap gave no address"))
}

/// Unmaps what [`map`] gave.
///
/// # Safety
/// `base` and `len` are of one mapping, and nothing uses it any more.
pub(crate) unsafe fn unmap(base: NonNull<u8>, len: usize) {
    // SAFETY: passed on to the caller.
    if let Err(error) = unsafe { rustix::mm::munmap(base.as_ptr().cast(), len) } {
        tracing::warn!(%error, "shared memory could not be unmapped");
    }
}
