//! The one loop behind every reduction: a block of accumulators on the stack, which stays in the first-level cache,
//! goes over all sources before its result is written.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::element::Element;
use super::op::Op;
use crate::memory::{Region, settle};

/// Elements reduced at a time.
pub const BLOCK: usize = 512;

/// A block of accumulators, aligned so that no vector of them crosses a cache line.
#[repr(C, align(64))]
pub struct Block<A> {
    all: [MaybeUninit<A>; BLOCK],
    /// So many of them are initialized.
    usable: usize,
}

impl<A: Copy + Default> Block<A> {
    /// A block of which `count` are used, or all: small calls do not pay for more.
    #[inline(always)]
    pub fn new(count: usize) -> Self {
        let usable = count.min(BLOCK);
        let mut all = [MaybeUninit::uninit(); BLOCK];
        all[..usable].iter_mut().for_each(|one| _ = one.write(A::default()));
        Block { all, usable }
    }

    #[inline(always)]
    pub fn first(&mut self, count: usize) -> &mut [A] {
        // SAFETY: `new` has written so many.
        let usable = unsafe { self.all[..self.usable].assume_init_mut() };
        &mut usable[..count]
    }
}

/// What is to be reduced where, lengths checked.
#[derive(Clone, Copy)]
pub struct Job<'a> {
    pub dst: Region,
    pub srcs: &'a [Region],
    /// What the result is divided by, for averages.
    pub divisor: Option<u32>,
    /// The result is stored past the caches.
    pub streams: bool,
}

impl Job<'_> {
    /// The elements `range` of `src`.
    #[inline(always)]
    fn read<R>(src: &Region, range: &Range<usize>) -> *const [R] {
        let part = src.slice(range.start * size_of::<R>(), range.len() * size_of::<R>());
        std::ptr::slice_from_raw_parts(part.as_ptr().cast::<R>(), range.len())
    }

    /// Where the elements `range` of the result go.
    #[inline(always)]
    fn target<R>(&self, range: &Range<usize>) -> Region {
        self.dst.slice(range.start * size_of::<R>(), range.len() * size_of::<R>())
    }

    #[inline(always)]
    fn write<R>(&self, range: &Range<usize>) -> *mut [R] {
        std::ptr::slice_from_raw_parts_mut(self.target::<R>(range).as_ptr().cast::<R>(), range.len())
    }
}

/// Reduces the elements `range` of `job`. Inlined into a function per instruction set, and compiled for that.
#[inline(always)]
pub fn drive<E: Element, O: Op<E::Acc>>(job: Job<'_>, range: Range<usize>) {
    const { assert!(align_of::<E::Raw>() == 1) };
    let mut block = Block::new(range.len());
    let mut results = job.streams.then(|| Block::<E::Raw>::new(range.len()));
    let mut start = range.start;
    while start < range.end {
        let part = start..range.end.min(start + BLOCK);
        let acc = block.first(part.len());
        gather::<E, O>(acc, job.srcs, &part);
        if let Some(divisor) = job.divisor {
            for acc in acc.iter_mut() {
                *acc = E::divide(*acc, divisor);
            }
        }
        if let Some(results) = &mut results {
            let results = results.first(part.len());
            E::emit(results, acc);
            // SAFETY: `results` stays borrowed until the copy is over.
            job.target::<E::Raw>(&part).stream_from(unsafe { Region::of(results) });
        } else {
            // SAFETY: `write` checked the bounds (R2); alignment is 1; R1 makes the bytes valid and ours alone; the
            // references made in `gather`, which may be to the same bytes (K5), are gone.
            E::emit(unsafe { &mut *job.write::<E::Raw>(&part) }, acc);
        }
        start = part.end;
    }
    if job.streams {
        settle();
    }
}

/// As [`drive`], one element at a time and without a block: what costs least where there are few.
#[inline(always)]
pub fn drive_few<E: Element, O: Op<E::Acc>>(job: Job<'_>, range: Range<usize>) {
    const { assert!(align_of::<E::Raw>() == 1) };
    let Some((first, rest)) = job.srcs.split_first() else { return };
    for i in range {
        let one = i..i + 1;
        // SAFETY: `read` checks the bounds (R2); alignment is 1; R1 makes the bytes valid and unwritten meanwhile.
        let read = |src: &Region| E::widen(unsafe { *Job::read::<E::Raw>(src, &one).cast::<E::Raw>() });
        let all = rest.iter().fold(read(first), |acc, src| O::apply(acc, read(src)));
        let result = job.divisor.map_or(all, |divisor| E::divide(all, divisor));
        // SAFETY: as above; the bytes are ours alone to write, and this element of all sources has been read (K5).
        unsafe { *job.write::<E::Raw>(&one).cast::<E::Raw>() = E::narrow(result) };
    }
}

/// The reduction of all sources' elements `part`.
#[inline(always)]
fn gather<E: Element, O: Op<E::Acc>>(acc: &mut [E::Acc], srcs: &[Region], part: &Range<usize>) {
    // SAFETY: `read` checks the bounds (R2); alignment is 1; R1 makes the bytes valid and unwritten meanwhile, and
    // this function writes only to `acc`, which is on the stack.
    let read = |src: &Region| unsafe { &*Job::read::<E::Raw>(src, part) };
    let rest = match srcs {
        [] => return,
        [only] => {
            E::load(acc, read(only));
            return;
        }
        [a, b, rest @ ..] => {
            E::pair::<O>(acc, read(a), read(b));
            rest
        }
    };
    for src in rest {
        E::fold::<O>(acc, read(src));
    }
}
