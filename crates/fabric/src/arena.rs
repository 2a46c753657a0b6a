//! A fixed number of equal slots in one mapping: what is registered once and posted often.

use std::ptr::null_mut;

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use smddp_core::memory::Region;

use crate::error::Error;

#[derive(Debug)]
pub struct Arena {
    whole: Region,
    slot: usize,
    free: Vec<u32>,
    count: usize,
}

impl Arena {
    /// `count` slots of `slot` bytes each, rounded up to whole cache lines; all free.
    pub fn new(count: usize, slot: usize) -> Result<Arena, Error> {
        let slot = slot.next_multiple_of(64);
        let bytes = (slot * count).max(1);
        // SAFETY: a fresh private mapping, owned by this value until it is dropped.
        let start = unsafe {
            mmap_anonymous(null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)
        }
        .map_err(|e| Error::Memory { bytes, reason: e.to_string() })?;
        // SAFETY: the mapping above; slots are handed out one owner at a time.
        let whole = unsafe { Region::new(start.cast(), bytes) };
        Ok(Arena { whole, slot, free: (0..count as u32).rev().collect(), count })
    }

    pub fn whole(&self) -> Region {
        self.whole
    }

    pub fn count(&self) -> usize {
        self.count
    }

    pub fn free(&self) -> usize {
        self.free.len()
    }

    pub fn take(&mut self) -> Option<u32> {
        self.free.pop()
    }

    pub fn give(&mut self, slot: u32) {
        debug_assert!(!self.free.contains(&slot), "slot {slot} given back twice");
        self.free.push(slot);
    }

    /// Offset of a slot in the mapping.
    pub fn offset(&self, slot: u32) -> usize {
        slot as usize * self.slot
    }

    /// The first `len` bytes of a slot.
    pub fn region(&self, slot: u32, len: usize) -> Region {
        assert!(len <= self.slot, "{len} bytes of a slot of {}", self.slot);
        self.whole.slice(self.offset(slot), len)
    }

    /// The bytes of a slot, for its owner to write.
    pub fn bytes_mut(&mut self, slot: u32, len: usize) -> &mut [u8] {
        let region = self.region(slot, len);
        // SAFETY: inside the mapping (checked by `region`); the exclusive borrow of the arena is the only Rust
        // access, and the caller owns the slot, so that no posted operation uses it.
        unsafe { std::slice::from_raw_parts_mut(region.as_ptr(), len) }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`; domains that posted from it are closed before their arenas go
        // (see `Endpoint`'s Drop).
        let _ = unsafe { munmap(self.whole.as_ptr().cast(), self.whole.len()) };
    }
}
