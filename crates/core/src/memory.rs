//! Regions of memory that belong to somebody else for the length of an operation.
//!
//! Invariants
//! - **R1** whoever makes a [`Region`] promises that its bytes stay mapped, and are touched by nobody else in a way
//!   that races, until the operation it is given to has completed or been aborted and withdrawn.
//! - **R2** every access goes through [`Region::slice`], which checks bounds.
//! - **R3** two regions passed to one copy either do not overlap or are the same region. Calls whose input and output overlap
//!   otherwise than in place are refused ([`Request::check_apart`](crate::request::Request::check_apart)).

use std::ptr::NonNull;

use crate::order::{Order, Walk};

/// Whose memory a region is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    Host,
    /// The CUDA device of this number. The address is the device's: the host never reads or writes there.
    Cuda(i32),
}

/// `len` bytes at `ptr`. Plain data: copying it copies no bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: a Region is an address and a length; R1 makes its user responsible for the memory behind it.
unsafe impl Send for Region {}
// SAFETY: as above; a shared Region gives no access that an owned one does not.
unsafe impl Sync for Region {}

impl Region {
    pub const EMPTY: Region = Region { ptr: NonNull::dangling(), len: 0 };

    /// # Safety
    /// R1: the memory is valid for reads and writes until every operation given this region is over.
    /// A region that is only ever a source may point to read-only memory. One of a device's memory is given to nobody but
    /// [`Fabric`](crate::transport::Fabric)s that were told of it.
    pub unsafe fn new(ptr: *mut u8, len: usize) -> Region {
        match NonNull::new(ptr) {
            Some(ptr) if len > 0 => Region { ptr, len },
            _ => Region::EMPTY,
        }
    }

    /// The region of a slice; the caller keeps the slice borrowed until the operation is over (R1).
    ///
    /// # Safety
    /// As [`Region::new`].
    pub unsafe fn of<T: Copy>(slice: &mut [T]) -> Region {
        // SAFETY: passed on to the caller.
        unsafe { Region::new(slice.as_mut_ptr().cast(), size_of_val(slice)) }
    }

    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether a byte belongs to both.
    pub fn overlaps(&self, other: Region) -> bool {
        let (ours, theirs) = (self.as_ptr() as usize, other.as_ptr() as usize);
        !self.is_empty() && !other.is_empty() && ours < theirs + other.len && theirs < ours + self.len
    }

    /// `len` bytes from `offset`.
    ///
    /// # Panics
    /// When they are not inside the region: a plan that was not checked against its buffers.
    #[inline]
    pub fn slice(&self, offset: usize, len: usize) -> Region {
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= self.len),
            "range {offset}+{len} outside a region of {} bytes",
            self.len
        );
        if len == 0 {
            return Region::EMPTY;
        }
        // SAFETY: offset < self.len, so the sum stays inside the allocation R1 promises.
        Region { ptr: unsafe { self.ptr.add(offset) }, len }
    }

    /// Asks for the cache lines of this memory, to write into them soon; where the machine has no such instruction, does
    /// nothing.
    #[inline]
    pub fn fetch_for_writing(&self) {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        for at in (0..self.len).step_by(64) {
            // `_mm_prefetch` asks for reading only, unless the whole program is built for machines that have this.
            // SAFETY: within the region (R1); the instruction changes nothing, and does nothing where there is none.
            unsafe {
                let line = self.ptr.as_ptr().add(at);
                std::arch::asm!("prefetchw [{}]", in(reg) line, options(nostack, preserves_flags, readonly));
            }
        }
    }

    /// Copies `from` into `self`; lengths must be equal. Copying a region onto itself does nothing.
    #[inline]
    pub fn copy_from(&self, from: Region) {
        assert_eq!(self.len, from.len, "copy between regions of different length");
        if self.ptr == from.ptr {
            return;
        }
        // SAFETY: R1 (both valid), R2 (lengths checked), R3 (no partial overlap).
        unsafe { std::ptr::copy_nonoverlapping(from.ptr.as_ptr(), self.ptr.as_ptr(), self.len) }
    }

    /// As [`copy_from`](Self::copy_from), in this order where `from` begins with a cache line: reads that cross lines would cost more
    /// than it gains.
    pub fn copy_in(&self, order: Order, from: Region) {
        const LINE: usize = 64;
        let walk = Walk::new(order, self.len / LINE, LINE);
        let begins_line = (from.ptr.as_ptr() as usize).is_multiple_of(LINE);
        if walk.far() == 0 || !begins_line || self.ptr == from.ptr {
            return self.copy_from(from);
        }
        assert_eq!(self.len, from.len, "copy between regions of different length");
        let [to, at] = [self, &from].map(|region| region.ptr.as_ptr().cast::<[u8; LINE]>());
        for line in (0..walk.far()).map(|n| walk.place(n)) {
            // SAFETY: the lines below `far` lie within both regions, whose lengths are equal (R1, R2); R3. Bytes have no alignment.
            unsafe { std::ptr::copy_nonoverlapping(at.add(line), to.add(line), 1) };
        }
        let rest = walk.far() * LINE;
        self.slice(rest, self.len - rest).copy_from(from.slice(rest, from.len - rest));
    }

    /// As [`copy_from`](Self::copy_from), and [claims](Self::claim) the lines of `from`.
    #[inline]
    pub fn take_from(&self, from: Region) {
        assert_eq!(self.len, from.len, "copy between regions of different length");
        // Few lines at a time: they are still in the first cache when they are written to.
        const STEP: usize = 256;
        let mut start = 0;
        while start < self.len {
            let len = STEP.min(self.len - start);
            let part = from.slice(start, len);
            self.slice(start, len).copy_from(part);
            part.claim();
            start += len;
        }
    }

    /// Writes a byte of each cache line back, but perhaps of the last: the lines belong to this core's cache then, from where
    /// another core that writes to them next gets them in one step. If both had them to read, it would have to wait until
    /// this one gives its up, which takes long on some CPUs (docs/adr/0024). Nobody else may touch this memory meanwhile.
    #[inline]
    pub fn claim(&self) {
        for at in (0..self.len).step_by(64) {
            // SAFETY: within the region, which is valid for reads and writes (R1).
            unsafe {
                let byte = self.ptr.as_ptr().add(at);
                byte.write_volatile(byte.read_volatile());
            }
        }
    }

    /// As [`copy_from`](Self::copy_from), past the caches: for much data that nobody reads soon. What it writes need not be
    /// fetched first, and pushes nothing else out. Behind the last such copy comes [`settle`].
    #[inline]
    pub fn stream_from(&self, from: Region) {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        {
            const LINE: usize = 64;
            let head = self.ptr.as_ptr().align_offset(LINE).min(self.len);
            let lines = (self.len - head) / LINE;
            if self.ptr == from.ptr || lines == 0 {
                return self.copy_from(from);
            }
            assert_eq!(self.len, from.len, "copy between regions of different length");
            let tail = head + lines * LINE;
            self.slice(0, head).copy_from(from.slice(0, head));
            // SAFETY: lines `head..tail` of both are within the regions (R1, R2), apart from each other (R3), and aligned in
            // `self`; every x86-64 has these instructions.
            unsafe { stream_lines(self.ptr.as_ptr().add(head), from.ptr.as_ptr().add(head), lines) };
            self.slice(tail, self.len - tail).copy_from(from.slice(tail, self.len - tail));
        }
        #[cfg(not(all(target_arch = "x86_64", not(miri))))]
        self.copy_from(from);
    }
}

/// Copies so many cache lines of 64 bytes past the caches.
///
/// # Safety
/// Both are valid for that, do not overlap, and `to` is aligned to a line.
#[cfg(all(target_arch = "x86_64", not(miri)))]
#[inline]
unsafe fn stream_lines(to: *mut u8, from: *const u8, lines: usize) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};
    for line in 0..lines {
        // SAFETY: passed on to the caller.
        unsafe {
            let (to, from) = (to.cast::<__m128i>().add(line * 4), from.cast::<__m128i>().add(line * 4));
            let parts = [0, 1, 2, 3].map(|i| _mm_loadu_si128(from.add(i)));
            (0..4).for_each(|i| _mm_stream_si128(to.add(i), parts[i]));
        }
    }
}

/// What was [streamed](Region::stream_from) by this thread so far is seen by whoever sees what it writes next.
#[inline]
pub fn settle() {
    // SAFETY: it orders stores, nothing else; every x86-64 has it.
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    unsafe {
        std::arch::x86_64::_mm_sfence()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_past_the_caches_arrives_at_any_address_and_nothing_else_changes() {
        const ROOM: usize = 400;
        let source: Vec<u8> = (0..ROOM).map(|i| i as u8 ^ 0x5c).collect();
        for (to, from, len) in
            (0..130).flat_map(|to| (0..3).flat_map(move |from| (0..230).map(move |len| (to, from, len))))
        {
            let (mut target, mut source) = (vec![0u8; ROOM], source.clone());
            // SAFETY: both vectors outlive the regions, and are not touched while they are in use.
            let (into, out) = unsafe { (Region::of(&mut target), Region::of(&mut source)) };
            into.slice(to, len).stream_from(out.slice(from, len));
            settle();
            let mut expected = vec![0u8; ROOM];
            expected[to..to + len].copy_from_slice(&source[from..from + len]);
            assert_eq!(target, expected, "{len} bytes from {from} to {to}");
        }
    }

    #[test]
    fn what_is_taken_arrives_and_stays_where_it_was() {
        for (from, len) in (0..70).flat_map(|from| [0, 1, 63, 64, 65, 255, 256, 700].map(|len| (from, len))) {
            let (mut target, mut source) = (vec![0xa5u8; 800], (0..800).map(|i| i as u8).collect::<Vec<_>>());
            // SAFETY: both vectors outlive the regions, and are not touched while they are in use.
            let (into, out) = unsafe { (Region::of(&mut target), Region::of(&mut source)) };
            into.slice(3, len).take_from(out.slice(from, len));
            assert!(source.iter().enumerate().all(|(i, byte)| *byte == i as u8), "{len} bytes from {from}");
            assert_eq!(target[3..3 + len], source[from..from + len]);
            assert!(target[..3].iter().chain(&target[3 + len..]).all(|byte| *byte == 0xa5));
        }
    }

    #[test]
    #[should_panic(expected = "different length")]
    fn lengths_must_agree_past_the_caches_too() {
        let mut memory = vec![0u8; 1000];
        // SAFETY: as above.
        let all = unsafe { Region::of(&mut memory) };
        all.slice(0, 200).stream_from(all.slice(500, 300));
    }

    /// From the beginning of a line and not, longer and shorter than four pages.
    #[test]
    fn any_order_copies_the_same() {
        const MARGIN: usize = 128;
        for (len, to, from) in [16_384, 40_000, 16_383, 65_536, 0]
            .into_iter()
            .flat_map(|len| [(len, 0, 0), (len, 3, 64), (len, 64, 1)])
        {
            let mut source: Vec<u8> = (0..len + 2 * MARGIN).map(|i| (i * 7 / 3) as u8).collect();
            let mut target = vec![0xa5; len + 2 * MARGIN];
            let from = from + source.as_ptr().align_offset(64);
            // SAFETY: both vectors outlive the regions, and are not touched while they are in use.
            let (into, out) = unsafe { (Region::of(&mut target), Region::of(&mut source)) };
            into.slice(to, len).copy_in(Order::FourPages, out.slice(from, len));
            assert!(target[to..to + len] == source[from..from + len], "{len} bytes from {from} to {to}");
            assert!(target[..to].iter().chain(&target[to + len..]).all(|byte| *byte == 0xa5), "{len}, {to}");
        }
    }
}
