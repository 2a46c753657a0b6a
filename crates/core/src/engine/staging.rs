//! Registered staging memory, lent to operations for their scratch. Bounded: what does not fit comes from the heap
//! for the time of one operation, so that an operation never waits for another's memory.

use std::alloc::Layout;

use crate::error::{Error, Result};
use crate::memory::Region;

const ALIGN: usize = 4096;

/// Page-aligned zeroed memory of its own.
struct Block {
    region: Region,
    layout: Layout,
}

impl Block {
    fn new(bytes: usize) -> Result<Block> {
        let fail = |reason: String| Error::Resource {
            what: "staging for a collective".to_owned(),
            resource: "memory",
            reason,
            hint: "Lower SMDDP_STAGING or SMDDP_CHUNK".to_owned(),
        };
        let layout =
            Layout::from_size_align(bytes.max(1), ALIGN).map_err(|e| fail(format!("{bytes} bytes: {e}")))?;
        // SAFETY: the layout's size is at least 1.
        let ptr = unsafe { std::alloc::alloc_zeroed(layout) };
        if ptr.is_null() {
            return Err(fail(format!("{bytes} bytes could not be allocated")));
        }
        // SAFETY: freshly allocated, freed only in drop; Staging hands out disjoint pieces (R1, R3).
        Ok(Block { region: unsafe { Region::new(ptr, layout.size()) }, layout })
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout; no operation that uses it is left (Staging's owner withdrew them).
        unsafe { std::alloc::dealloc(self.region.as_ptr(), self.layout) }
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
