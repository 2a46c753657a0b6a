//! Operations that begin when somebody else says so: words shared with a device.
//!
//! A device writes `ready` when the operation's input lies in memory and waits for `done` before it takes the output.
//! Between the two nobody calls the device's driver: the progress thread reads one word and stores the other.
//!
//! Invariants
//! - **W1** a slot's values grow by one with every use; they are compared cyclically, so they may wrap.
//! - **W2** `done` is stored once for every gated operation, well ended or failed, and only after its memory is free:
//!   what waits for it never waits for ever.

use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

/// A word with a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Line(AtomicU32);

/// How many slots one page of words has.
pub const SLOTS: usize = 32;

type Page = [Line; 2 * SLOTS];

/// Pairs of words in memory that a device can be given the address of: a page of its own.
#[derive(Debug)]
pub struct Words {
    page: NonNull<Page>,
}

// SAFETY: the page is this object's own, and holds atomic words alone.
unsafe impl Send for Words {}
// SAFETY: as above.
unsafe impl Sync for Words {}

impl Words {
    pub fn new() -> std::io::Result<Words> {
        // SAFETY: a new mapping at an address the kernel chooses, zero at first, as a page of words may be.
        let start = unsafe {
            mmap_anonymous(
                ptr::null_mut(),
                Self::BYTES,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }?;
        let words = Words { page: NonNull::new(start.cast()).ok_or(std::io::ErrorKind::OutOfMemory)? };
        // A forked child must not take the page's place while the device writes to it. It gets an empty one.
        // SAFETY: the mapping just made.
        unsafe { madvise(start, Self::BYTES, Advice::LinuxWipeOnFork) }?;
        Ok(words)
    }

    /// Of the whole page.
    pub const BYTES: usize = size_of::<Page>();

    /// Where the page begins.
    pub fn start(&self) -> *mut u8 {
        self.page.as_ptr().cast()
    }

    /// Of the word that says that a slot's input is there.
    pub fn ready(&self, slot: usize) -> &AtomicU32 {
        &self.lines()[2 * slot].0
    }

    /// Of the word that says that a slot's output is there.
    pub fn done(&self, slot: usize) -> &AtomicU32 {
        &self.lines()[2 * slot + 1].0
    }

    /// Whether the slot's use of this value has left its gate.
    pub fn is_left(&self, slot: usize, value: u32) -> bool {
        reached(self.done(slot).load(Ordering::Acquire), value)
    }

    fn lines(&self) -> &Page {
        // SAFETY: mapped until drop, aligned as a page, and valid whatever it holds.
        unsafe { self.page.as_ref() }
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length, and borrowed by nobody any more.
        let _ = unsafe { munmap(self.start().cast(), Self::BYTES) };
    }
}

/// One use of one slot.
#[derive(Clone, Debug)]
pub struct Gate {
    pub words: Arc<Words>,
    pub slot: usize,
    /// What `ready` must have reached, and what `done` will be.
    pub value: u32,
}

impl Gate {
    /// Whether the operation may begin. What the device wrote before the word is then visible.
    #[inline]
    pub fn is_open(&self) -> bool {
        reached(self.words.ready(self.slot).load(Ordering::Acquire), self.value)
    }

    /// Says that the output is there, or never will be (W2).
    pub fn leave(&self) {
        self.words.done(self.slot).store(self.value, Ordering::Release);
    }
}

/// W1: as the device compares, `(int32)(word - value) >= 0`.
#[inline]
fn reached(word: u32, value: u32) -> bool {
    (word.wrapping_sub(value) as i32) >= 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_compared_cyclically() {
        assert!(reached(5, 5) && reached(6, 5) && !reached(4, 5));
        assert!(reached(0, u32::MAX) && !reached(u32::MAX, 0));
    }

    #[test]
    fn words_do_not_share_lines_and_fill_a_page() {
        let words = Words::new().unwrap();
        assert_eq!(Words::BYTES, 4096);
        let address = |w: &AtomicU32| std::ptr::from_ref(w) as usize;
        assert_eq!(address(words.done(0)) - address(words.ready(0)), 64);
        assert_eq!(address(words.ready(0)) % 4096, 0);
        assert_eq!(address(words.ready(0)), words.start() as usize);
    }

    #[test]
    fn a_gate_opens_at_its_value_and_says_when_it_is_left() {
        let gate = Gate { words: Arc::new(Words::new().unwrap()), slot: 3, value: 1 };
        assert!(!gate.is_open() && !gate.words.is_left(3, 1));
        gate.words.ready(3).store(1, Ordering::Release);
        assert!(gate.is_open());
        gate.leave();
        assert_eq!(gate.words.done(3).load(Ordering::Acquire), 1);
        assert!(gate.words.is_left(3, 0) && gate.words.is_left(3, 1) && !gate.words.is_left(3, 2));
    }
}
