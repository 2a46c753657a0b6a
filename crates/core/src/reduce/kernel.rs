//! The loops behind every reduction. A strip of accumulators, which fits into registers, goes over all sources before its
//! result is written, so that the ways of all sources and of the result through the caches overlap. What is left of a strip, and
//! results that go past the caches, are reduced in blocks on the stack, which stay in the first-level cache.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::element::Element;
use super::op::Op;
use crate::memory::{Region, settle};
use crate::order::{Order, Walk};

/// Elements reduced at a time in registers, and on the stack.
const STRIP: usize = 64;
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

/// How a reduction goes over memory.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pass {
    pub store: Store,
    /// Of results that are stored past the caches it is always straight.
    pub order: Order,
}

/// How a result is stored.
#[derive(Clone, Copy, Debug, Default)]
pub enum Store {
    /// As anything is.
    #[default]
    Cached,
    /// Past the caches ([`Region::stream_from`]), where nobody reads it soon.
    PastCaches,
    /// In a second place as well, apart from the first, as long, and like it the very region of a source or apart from all.
    Twice(Region),
}

/// What is to be reduced where, lengths checked.
#[derive(Clone, Copy)]
pub struct Job<'a> {
    pub dst: Region,
    pub srcs: &'a [Region],
    /// What the result is divided by, for averages.
    pub divisor: Option<u32>,
    pub pass: Pass,
}

impl Job<'_> {
    /// The elements `range` of `src`.
    #[inline(always)]
    fn read<R>(src: &Region, range: &Range<usize>) -> *const [R] {
        let part = src.slice(range.start * size_of::<R>(), range.len() * size_of::<R>());
        std::ptr::slice_from_raw_parts(part.as_ptr().cast::<R>(), range.len())
    }

    /// The elements `range` of `dst`.
    #[inline(always)]
    fn write<R>(dst: &Region, range: &Range<usize>) -> *mut [R] {
        Job::read::<R>(dst, range).cast_mut()
    }
}

/// Reduces the elements `range` of `job`. Inlined into a function per instruction set, and compiled for that.
#[inline(always)]
pub fn drive<E: Element, O: Op<E::Acc>>(job: Job<'_>, range: Range<usize>) {
    const { assert!(align_of::<E::Raw>() == 1) };
    let streams = matches!(job.pass.store, Store::PastCaches);
    let strips = if streams { 0 } else { range.len() / STRIP };
    let rest = range.start + strips * STRIP;
    if strips > 0 {
        drive_strips::<E, O>(job, range.start..rest);
    }
    if rest < range.end {
        drive_blocks::<E, O>(job, rest..range.end);
    }
    if streams {
        settle();
    }
}

/// As [`drive`], of whole strips. No closures here: they would be compiled for every CPU alike.
#[inline(always)]
fn drive_strips<E: Element, O: Op<E::Acc>>(job: Job<'_>, range: Range<usize>) {
    debug_assert!(range.len().is_multiple_of(STRIP));
    let targets = Targets::<E>::new(&job, &range);
    let strips = range.len() / STRIP;
    let walk = Walk::new(job.pass.order, strips, const { STRIP * size_of::<E::Raw>() });
    if let [a, b] = job.srcs {
        // The usual case is written out, for its sources' bounds to be checked once.
        let a = Job::read::<E::Raw>(a, &range).cast::<[E::Raw; STRIP]>();
        let b = Job::read::<E::Raw>(b, &range).cast::<[E::Raw; STRIP]>();
        for n in 0..strips {
            let i = walk.place(n);
            let mut acc = [E::Acc::default(); STRIP];
            // SAFETY: as in `gather`; `i` is one of the range's strips.
            unsafe { E::pair::<O>(&mut acc, &*a.add(i), &*b.add(i)) };
            targets.put(i, acc, job.divisor);
        }
    } else {
        for n in 0..strips {
            let i = walk.place(n);
            let start = range.start + i * STRIP;
            let mut acc = [E::Acc::default(); STRIP];
            gather::<E, O>(&mut acc, job.srcs, &(start..start + STRIP));
            targets.put(i, acc, job.divisor);
        }
    }
}

/// Where a range of strips goes.
struct Targets<E: Element> {
    dst: *mut [E::Raw; STRIP],
    /// A second place, or null.
    also: *mut [E::Raw; STRIP],
}

impl<E: Element> Targets<E> {
    #[inline(always)]
    fn new(job: &Job<'_>, range: &Range<usize>) -> Self {
        let also = match &job.pass.store {
            Store::Twice(also) => Job::write::<E::Raw>(also, range).cast(),
            Store::Cached | Store::PastCaches => std::ptr::null_mut(),
        };
        Targets { dst: Job::write::<E::Raw>(&job.dst, range).cast(), also }
    }

    /// Stores strip `i`, all sources of which have been read.
    #[inline(always)]
    fn put(&self, i: usize, mut acc: [E::Acc; STRIP], divisor: Option<u32>) {
        if let Some(divisor) = divisor {
            for acc in &mut acc {
                *acc = E::divide(*acc, divisor);
            }
        }
        // SAFETY: `write` checked the bounds (R2 of `memory`) of all strips; alignment is 1; R1 there makes the bytes valid and ours alone; no
        // references to sources, which may be the same bytes (K5), are left.
        unsafe {
            if self.also.is_null() {
                E::emit(&mut *self.dst.add(i), &acc);
            } else {
                // Rounded once.
                let mut results = [E::Raw::default(); STRIP];
                E::emit(&mut results, &acc);
                *self.dst.add(i) = results;
                *self.also.add(i) = results;
            }
        }
    }
}

/// As [`drive`], a block at a time.
#[inline(always)]
fn drive_blocks<E: Element, O: Op<E::Acc>>(job: Job<'_>, range: Range<usize>) {
    let mut block = Block::new(range.len());
    let streams = matches!(job.pass.store, Store::PastCaches);
    let mut results = streams.then(|| Block::<E::Raw>::new(range.len()));
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
            let size = size_of::<E::Raw>();
            // SAFETY: `results` stays borrowed until the copy is over.
            job.dst.slice(part.start * size, part.len() * size).stream_from(unsafe { Region::of(results) });
        } else {
            // SAFETY: as in `Targets::put`.
            E::emit(unsafe { &mut *Job::write::<E::Raw>(&job.dst, &part) }, acc);
            if let Store::Twice(also) = &job.pass.store {
                // SAFETY: as above.
                E::emit(unsafe { &mut *Job::write::<E::Raw>(also, &part) }, acc);
            }
        }
        start = part.end;
    }
}

/// As [`drive`], one element at a time and without a block: what costs least where there are few.
#[inline(always)]
pub fn drive_few<E: Element, O: Op<E::Acc>>(job: Job<'_>, range: Range<usize>) {
    const { assert!(align_of::<E::Raw>() == 1) };
    let Some((first, rest)) = job.srcs.split_first() else { return };
    for i in range {
        let one = i..i + 1;
        // SAFETY: `read` checks the bounds (R2 of `memory`); alignment is 1; R1 there makes the bytes valid and unwritten meanwhile.
        let read = |src: &Region| E::widen(unsafe { *Job::read::<E::Raw>(src, &one).cast::<E::Raw>() });
        let all = rest.iter().fold(read(first), |acc, src| O::apply(acc, read(src)));
        let result = job.divisor.map_or(all, |divisor| E::divide(all, divisor));
        // SAFETY: as above; the bytes are ours alone to write, and this element of all sources has been read (K5).
        unsafe { *Job::write::<E::Raw>(&job.dst, &one).cast::<E::Raw>() = E::narrow(result) };
        if let Store::Twice(also) = &job.pass.store {
            // SAFETY: as above.
            unsafe { *Job::write::<E::Raw>(also, &one).cast::<E::Raw>() = E::narrow(result) };
        }
    }
}

/// The reduction of all sources' elements `part`.
#[inline(always)]
fn gather<E: Element, O: Op<E::Acc>>(acc: &mut [E::Acc], srcs: &[Region], part: &Range<usize>) {
    // SAFETY: `read` checks the bounds (R2 of `memory`); alignment is 1; R1 there makes the bytes valid and unwritten meanwhile, and
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
