//! Memory that the ranks of a node share: a call on it moves nothing through slots.
//!
//! Invariants
//! - **M1** a group's ranks enter the same memory under the same number, each with its own part of it first and the
//!   peers' parts as this process sees them; they enter it before any of them makes a call on it.
//! - **M2** what is entered stays mapped until it has left again, and leaves only when no call on it is under way.

use std::any::Any;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use crate::memory::Region;

/// Memory of every rank of the node, as this process sees it.
#[derive(Clone)]
pub struct Shared {
    /// The same on all ranks of the group.
    pub number: u64,
    /// By local rank, this one's included.
    pub parts: Vec<Region>,
    /// This rank's local rank.
    pub own: usize,
    /// Keeps the parts mapped (M2).
    pub keep: Arc<dyn Any + Send + Sync>,
}

impl Shared {
    pub fn own(&self) -> Region {
        self.parts[self.own]
    }
}

/// Where in a [`Shared`] a rank's data lies: what ranks tell one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Place {
    pub number: u64,
    pub offset: u64,
}

/// The place of `region` when it lies within `part`, which is entered under `number`.
pub fn place(number: u64, part: Region, region: Region) -> Option<Place> {
    let offset = (region.as_ptr() as usize).checked_sub(part.as_ptr() as usize)?;
    let end = offset.checked_add(region.len())?;
    (end <= part.len()).then_some(Place { number, offset: offset as u64 })
}

/// This rank's own parts, for callers: whether a call's memory is shared.
#[derive(Default)]
pub(crate) struct OwnParts {
    /// Groups that share nothing pay one look at this.
    count: AtomicUsize,
    parts: RwLock<Vec<(u64, Region)>>,
}

impl OwnParts {
    pub(crate) fn enter(&self, number: u64, part: Region) {
        self.change(|parts| parts.push((number, part)));
    }

    pub(crate) fn leave(&self, number: u64) {
        self.change(|parts| parts.retain(|(entered, _)| *entered != number));
    }

    fn change(&self, change: impl FnOnce(&mut Vec<(u64, Region)>)) {
        let mut parts = self.parts.write().unwrap_or_else(PoisonError::into_inner);
        change(&mut parts);
        self.count.store(parts.len(), Ordering::Release);
    }

    #[inline]
    pub(crate) fn contain(&self, region: Region) -> bool {
        self.count.load(Ordering::Acquire) > 0 && self.look_for(region)
    }

    fn look_for(&self, region: Region) -> bool {
        let parts = self.parts.read().unwrap_or_else(PoisonError::into_inner);
        parts.iter().any(|&(number, part)| place(number, part, region).is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_is_found_only_where_it_lies_whole_and_while_it_is_entered() {
        let mut bytes = [0u8; 64];
        // SAFETY: nothing is read or written through it.
        let all = unsafe { Region::of(&mut bytes) };
        let part = all.slice(16, 32);
        let parts = OwnParts::default();
        assert!(!parts.contain(part));
        parts.enter(7, part);
        assert!(parts.contain(part) && parts.contain(part.slice(4, 28)));
        assert!(!parts.contain(all.slice(15, 8)) && !parts.contain(all.slice(16, 33)) && !parts.contain(all));
        assert_eq!(place(7, part, part.slice(4, 8)), Some(Place { number: 7, offset: 4 }));
        parts.leave(7);
        assert!(!parts.contain(part));
    }
}
