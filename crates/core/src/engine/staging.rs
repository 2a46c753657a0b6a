//! Registered staging memory, lent to operations for their scratch. Bounded: what does not fit is mapped
//! for the time of one operation, so that an operation never waits for another's memory.

use std::ptr;

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use crate::error::{Error, Result};
use crate::memory::Region;

const ALIGN: usize = 4096;

/// Page-aligned zeroed memory of its own: a mapping, so that pages nobody touched cost nothing, and all of it goes back
/// to the system at the end, where the allocator would keep it.
struct Block {
    region: Region,
}

impl Block {
    fn new(bytes: usize) -> Result<Block> {
        let len = bytes.max(1).next_multiple_of(ALIGN);
        // SAFETY: a new mapping at an address the kernel chooses.
        let mapped = unsafe {
            mmap_anonymous(ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)
        };
        let start = mapped.map_err(|e| Error::Resource {
            what: "staging for a collective".to_owned(),
            resource: "memory",
            reason: format!("{bytes} bytes could not be mapped: {e}"),
            hint: "Lower SMDDP_STAGING or SMDDP_CHUNK".to_owned(),
        })?;
        // SAFETY: freshly mapped, unmapped only in drop; Staging hands out disjoint pieces (R1, R3 of `memory`).
        Ok(Block { region: unsafe { Region::new(start.cast(), len) } })
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length; no operation that uses it is left (Staging's owner withdrew them).
        // It fails only for arguments that are no mapping.
        let _ = unsafe { munmap(self.region.as_ptr().cast(), self.region.len()) };
    }
}

/// A piece of staging, given back with [`Staging::give_back`].
pub struct Loan {
    pub region: Region,
    own: Option<Block>,
}

impl Loan {
    pub fn none() -> Loan {
        Loan { region: Region::EMPTY, own: None }
    }
}

/// First fit over one block; few loans are out at once.
pub struct Staging {
    block: Option<Block>,
    size: usize,
    /// (offset, length) of loans, ascending.
    lent: Vec<(usize, usize)>,
}

impl Staging {
    pub fn new(size: usize) -> Staging {
        Staging { block: None, size, lent: Vec::new() }
    }

    /// The whole memory, made now if need be: for registration with the fabric.
    pub fn whole(&mut self) -> Result<Region> {
        if self.block.is_none() {
            self.block = Some(Block::new(self.size)?);
        }
        Ok(self.block.as_ref().map_or(Region::EMPTY, |b| b.region))
    }

    pub fn lend(&mut self, bytes: usize) -> Result<Loan> {
        if bytes == 0 {
            return Ok(Loan::none());
        }
        let need = bytes.next_multiple_of(ALIGN);
        let whole = self.whole()?;
        let mut start = 0;
        let mut place = self.lent.len();
        for (i, &(off, len)) in self.lent.iter().enumerate() {
            if off - start >= need {
                place = i;
                break;
            }
            start = off + len;
        }
        if start + need <= whole.len() {
            self.lent.insert(place, (start, need));
            return Ok(Loan { region: whole.slice(start, bytes), own: None });
        }
        let own = Block::new(bytes)?;
        Ok(Loan { region: own.region.slice(0, bytes), own: Some(own) })
    }

    pub fn give_back(&mut self, loan: Loan) {
        if loan.own.is_some() || loan.region.is_empty() {
            return;
        }
        if let Some(block) = &self.block {
            let off = loan.region.as_ptr() as usize - block.region.as_ptr() as usize;
            self.lent.retain(|&(o, _)| o != off);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loans_are_disjoint_and_come_back() {
        let mut staging = Staging::new(1 << 16);
        let a = staging.lend(10_000).unwrap();
        let b = staging.lend(20_000).unwrap();
        let c = staging.lend(30_000).unwrap();
        let big = staging.lend(1 << 20).unwrap();
        let range = |l: &Loan| (l.region.as_ptr() as usize, l.region.as_ptr() as usize + l.region.len());
        let mut all = [range(&a), range(&b), range(&c), range(&big)];
        all.sort_unstable();
        assert!(all.windows(2).all(|w| w[0].1 <= w[1].0), "{all:?}");
        assert!(big.own.is_some() && c.own.is_none());
        let at = b.region.as_ptr();
        staging.give_back(b);
        staging.give_back(big);
        assert_eq!(staging.lend(20_000).unwrap().region.as_ptr(), at);
        assert_eq!(staging.lend(0).unwrap().region.len(), 0);
    }
}
