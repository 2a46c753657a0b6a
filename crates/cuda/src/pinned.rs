//! Host memory a device can reach.

use std::ffi::c_void;
use std::ptr;
use std::sync::Arc;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use smddp_core::communicator::Communicator;
use smddp_core::gate::Words;
use smddp_core::memory::Owner;
use smddp_core::transport::Transports;
use smddp_core::{Error, Region, Result};
use smddp_cuda_sys as sys;

use crate::device::Device;

const PAGE: usize = 4096;

fn unpinned(bytes: usize, reason: &str) -> Error {
    Error::Resource {
        what: "staging for CUDA tensors".to_owned(),
        resource: "pinned memory",
        reason: format!("{bytes} bytes: {reason}"),
        hint: "Lower SMDDP_CUDA_SLOT or SMDDP_CUDA_SLOTS, or raise the limit of locked memory (ulimit -l)"
            .to_owned(),
    }
}

/// A forked child must not take the pages' place while the device writes to them.
///
/// # Safety
/// Whole pages that no child uses.
unsafe fn keep_from_children(start: *mut c_void, len: usize) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { madvise(start, len, Advice::LinuxDontFork) }
        .map_err(|e| unpinned(len, &format!("keeping it from forked children: {e}")))
}

/// # Safety
/// Memory that stays mapped until it has been unregistered.
unsafe fn register(device: &Device, start: *mut c_void, len: usize) -> Result<()> {
    // SAFETY: the caller's promise.
    let status = unsafe { (device.driver.host_register)(start, len, sys::HOST_REGISTER_PORTABLE_MAPPED) };
    if status == sys::SUCCESS { Ok(()) } else { Err(unpinned(len, &device.driver.explain(status))) }
}

/// A mapping registered with the device. Cached as ordinary memory: the host reads every byte of it.
pub(crate) struct Pinned {
    device: Arc<Device>,
    region: Region,
    /// With the network, until dropped.
    registered: Option<Box<dyn Send>>,
}

impl Pinned {
    /// The device must have been entered.
    pub(crate) fn new(device: &Arc<Device>, bytes: usize) -> Result<Pinned> {
        let len = bytes.max(1).next_multiple_of(PAGE);
        // SAFETY: a new mapping at an address the kernel chooses.
        let start = unsafe {
            mmap_anonymous(ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)
        }
        .map_err(|e| unpinned(len, &e.to_string()))?;
        // SAFETY: the mapping just made, which is unregistered in drop before it is unmapped.
        let made = unsafe { keep_from_children(start, len).and_then(|()| register(device, start, len)) };
        if let Err(error) = made {
            // SAFETY: mapped above, registered with nobody, used by nobody.
            let _ = unsafe { munmap(start, len) };
            return Err(error);
        }
        // SAFETY: mapped until drop (R1 of `memory`); the stager hands out disjoint pieces.
        let region = unsafe { Region::new(start.cast(), len) };
        Ok(Pinned { device: Arc::clone(device), region, registered: None })
    }

    /// Registers it with the network between the ranks of `host`, which else copies what it sends from here.
    pub(crate) fn registered<T: Transports>(mut self, host: &Communicator<T>) -> Pinned {
        match host.register(self.region, Owner::Host) {
            Ok(registered) => self.registered = Some(Box::new(registered)),
            Err(error) => {
                tracing::warn!(%error, "staging for CUDA tensors is not registered: it is copied once more")
            }
        }
        self
    }

    pub(crate) fn region(&self) -> Region {
        self.region
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        self.registered = None;
        let start = self.region.as_ptr().cast();
        // A thread without the context cannot unregister; then the pages stay, pinned, until the process ends.
        let Ok(_visit) = self.device.visit() else { return };
        // SAFETY: registered in `new`; its user drops it only when the device is done with it.
        let _ = unsafe { (self.device.driver.host_unregister)(start) };
        // SAFETY: mapped in `new` with this length.
        let _ = unsafe { munmap(start, self.region.len()) };
    }
}

/// The words of a stager, registered.
pub(crate) struct SharedWords {
    device: Arc<Device>,
    pub(crate) words: Arc<Words>,
    /// The device's address of the page.
    base: u64,
    is_left: bool,
}

impl SharedWords {
    /// The device must have been entered.
    pub(crate) fn new(device: &Arc<Device>) -> Result<SharedWords> {
        let words = Arc::new(Words::new().map_err(|e| unpinned(Words::BYTES, &e.to_string()))?);
        let page = words.start().cast();
        // SAFETY: a page of its own, kept by the Arc until drop has unregistered it, or for good.
        unsafe { register(device, page, Words::BYTES)? };
        let mut shared = SharedWords { device: Arc::clone(device), words, base: 0, is_left: false };
        // SAFETY: registered just now; a place for the address.
        let status = unsafe { (device.driver.host_device_pointer)(&raw mut shared.base, page, 0) };
        device.check("asking for the device's address of words", status)?;
        Ok(shared)
    }

    /// The device's address of a slot's "input is there".
    pub(crate) fn ready(&self, slot: usize) -> u64 {
        self.base + ptr::from_ref(self.words.ready(slot)).addr() as u64 - self.page()
    }

    /// The device's address of a slot's "output is there".
    pub(crate) fn done(&self, slot: usize) -> u64 {
        self.base + ptr::from_ref(self.words.done(slot)).addr() as u64 - self.page()
    }

    fn page(&self) -> u64 {
        self.words.start().addr() as u64
    }
}

impl SharedWords {
    /// The device may still write to the words: they stay where they are, registered.
    pub(crate) fn leave_behind(&mut self) {
        std::mem::forget(Arc::clone(&self.words));
        self.is_left = true;
    }
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        if self.is_left {
            return;
        }
        let Ok(_visit) = self.device.visit() else { return self.leave_behind() };
        // SAFETY: registered in `new`; the stager's streams are idle by now.
        let _ = unsafe { (self.device.driver.host_unregister)(self.words.start().cast()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_cannot_be_kept_from_children_says_so() {
        // SAFETY: no page begins there, so nothing is changed.
        let refused =
            unsafe { keep_from_children(ptr::without_provenance_mut(1), PAGE) }.unwrap_err().to_string();
        assert!(refused.contains("forked children") && refused.contains("4096 bytes"), "{refused}");
    }
}
