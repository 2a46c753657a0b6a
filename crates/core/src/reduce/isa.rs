//! Instruction sets: which the CPU has, and the reduction compiled for each.
//!
//! All but float16's conversions is plain code that the compiler turns into vectors of each set's width.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU8, Ordering};

use super::element::{BF16, Bool, Element, F16, F32, F64, I8, I16, I32, I64, LANES, U8};
use super::half;
use super::kernel::{Job, drive, drive_few};
use super::op::{And, Max, Min, Op, Or, Product, Sum, Xor};
use crate::dtype::{DType, ReduceOp};
use crate::transport::Arith;

/// A compiled variant of the kernels, to be had only where the CPU can run it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Variant(Set);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Set {
    Portable = 1,
    #[cfg(target_arch = "x86_64")]
    Avx2 = 2,
    #[cfg(target_arch = "x86_64")]
    Avx512 = 3,
}

impl Variant {
    pub const PORTABLE: Variant = Variant(Set::Portable);

    /// Those this CPU can run, slowest first.
    pub fn available() -> impl DoubleEndedIterator<Item = Variant> {
        [
            Some(Variant::PORTABLE),
            #[cfg(target_arch = "x86_64")]
            (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c"))
                .then_some(Variant(Set::Avx2)),
            #[cfg(target_arch = "x86_64")]
            (is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl"))
            .then_some(Variant(Set::Avx512)),
        ]
        .into_iter()
        .flatten()
    }

    pub const fn name(self) -> &'static str {
        match self.0 {
            Set::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => "avx512",
        }
    }
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The variant in force as its `Set`'s number; 0 until it is chosen.
static CURRENT: AtomicU8 = AtomicU8::new(0);

/// The variant in force.
pub fn variant() -> Variant {
    current()
}

/// Chooses the portable kernels (`true`), or the fastest this CPU has. The latter is the default.
pub fn use_portable(portable: bool) {
    let fastest = || Variant::available().next_back().unwrap_or(Variant::PORTABLE);
    let chosen = if portable { Variant::PORTABLE } else { fastest() };
    // Relaxed: every variant gives the same bits, so it does not matter which one a racing call takes.
    CURRENT.store(chosen.0 as u8, Ordering::Relaxed);
}

#[inline]
pub fn current() -> Variant {
    loop {
        match CURRENT.load(Ordering::Relaxed) {
            0 => use_portable(false),
            #[cfg(target_arch = "x86_64")]
            2 => return Variant(Set::Avx2),
            #[cfg(target_arch = "x86_64")]
            3 => return Variant(Set::Avx512),
            _ => return Variant::PORTABLE,
        }
    }
}

/// Reduces the elements `range` of `job`.
pub fn run(variant: Variant, arith: Arith, job: Job<'_>, range: Range<usize>) {
    match variant.0 {
        Set::Portable => by_dtype::<Portable>(arith, job, range),
        #[cfg(target_arch = "x86_64")]
        Set::Avx2 => by_dtype::<x86::Avx2>(arith, job, range),
        #[cfg(target_arch = "x86_64")]
        Set::Avx512 => by_dtype::<x86::Avx512>(arith, job, range),
    }
}

/// Elements of which so many at most are reduced one at a time, as every CPU does it.
pub const FEW: usize = 4;

/// Reduces all elements of `job`, which are few.
pub fn run_few(arith: Arith, job: Job<'_>, count: usize) {
    debug_assert!(count <= FEW);
    by_dtype::<Few>(arith, job, 0..count);
}

fn by_dtype<I: Isa>(arith: Arith, job: Job<'_>, range: Range<usize>) {
    let op = arith.op;
    match arith.dtype {
        DType::Bool => booleans::<I>(op, job, range),
        DType::U8 => integers::<I, U8>(op, job, range),
        DType::I8 => integers::<I, I8>(op, job, range),
        DType::I16 => integers::<I, I16>(op, job, range),
        DType::I32 => integers::<I, I32>(op, job, range),
        DType::I64 => integers::<I, I64>(op, job, range),
        DType::F16 => floats::<I, F16<I>>(op, job, range),
        DType::BF16 => floats::<I, BF16>(op, job, range),
        DType::F32 => floats::<I, F32>(op, job, range),
        DType::F64 => floats::<I, F64>(op, job, range),
    }
}

fn booleans<I: Isa>(op: ReduceOp, job: Job<'_>, range: Range<usize>) {
    match op {
        ReduceOp::Sum | ReduceOp::Avg | ReduceOp::Max | ReduceOp::BitOr => I::run::<Bool, Or>(job, range),
        ReduceOp::Product | ReduceOp::Min | ReduceOp::BitAnd => I::run::<Bool, And>(job, range),
        ReduceOp::BitXor => I::run::<Bool, Xor>(job, range),
    }
}

fn integers<I: Isa, E: Element>(op: ReduceOp, job: Job<'_>, range: Range<usize>)
where
    Sum: Op<E::Acc>,
    Product: Op<E::Acc>,
    Min: Op<E::Acc>,
    Max: Op<E::Acc>,
    And: Op<E::Acc>,
    Or: Op<E::Acc>,
    Xor: Op<E::Acc>,
{
    match op {
        ReduceOp::Sum | ReduceOp::Avg => I::run::<E, Sum>(job, range),
        ReduceOp::Product => I::run::<E, Product>(job, range),
        ReduceOp::Min => I::run::<E, Min>(job, range),
        ReduceOp::Max => I::run::<E, Max>(job, range),
        ReduceOp::BitAnd => I::run::<E, And>(job, range),
        ReduceOp::BitOr => I::run::<E, Or>(job, range),
        ReduceOp::BitXor => I::run::<E, Xor>(job, range),
    }
}

fn floats<I: Isa, E: Element>(op: ReduceOp, job: Job<'_>, range: Range<usize>)
where
    Sum: Op<E::Acc>,
    Product: Op<E::Acc>,
    Min: Op<E::Acc>,
    Max: Op<E::Acc>,
{
    match op {
        ReduceOp::Sum | ReduceOp::Avg => I::run::<E, Sum>(job, range),
        ReduceOp::Product => I::run::<E, Product>(job, range),
        ReduceOp::Min => I::run::<E, Min>(job, range),
        ReduceOp::Max => I::run::<E, Max>(job, range),
        ReduceOp::BitAnd | ReduceOp::BitOr | ReduceOp::BitXor => {
            unreachable!("{op} of floats was refused where the call entered")
        }
    }
}

/// An instruction set. Its functions are called only where the CPU has it: [`Variant`] sees to that.
pub trait Isa {
    fn run<E: Element, O: Op<E::Acc>>(job: Job<'_>, range: Range<usize>);

    /// Bit for bit as [`half::f16_to_f32`], but for which NaN a NaN becomes. To be inlined into `run`.
    fn widen_f16(src: &[[u8; 2]; LANES]) -> [f32; LANES];
    /// Bit for bit as [`half::f32_to_f16`]. To be inlined into `run`.
    fn narrow_f16(src: &[f32; LANES]) -> [[u8; 2]; LANES];
}

/// What every CPU of the architecture has (SSE2, NEON).
pub struct Portable;
impl Isa for Portable {
    fn run<E: Element, O: Op<E::Acc>>(job: Job<'_>, range: Range<usize>) {
        drive::<E, O>(job, range);
    }
    #[inline(always)]
    fn widen_f16(src: &[[u8; 2]; LANES]) -> [f32; LANES] {
        src.map(|half| half::f16_to_f32(u16::from_ne_bytes(half)))
    }
    #[inline(always)]
    fn narrow_f16(src: &[f32; LANES]) -> [[u8; 2]; LANES] {
        src.map(|single| half::f32_to_f16(single).to_ne_bytes())
    }
}

/// As [`Portable`], for a few elements.
struct Few;
impl Isa for Few {
    fn run<E: Element, O: Op<E::Acc>>(job: Job<'_>, range: Range<usize>) {
        drive_few::<E, O>(job, range);
    }
    #[inline(always)]
    fn widen_f16(src: &[[u8; 2]; LANES]) -> [f32; LANES] {
        Portable::widen_f16(src)
    }
    #[inline(always)]
    fn narrow_f16(src: &[f32; LANES]) -> [[u8; 2]; LANES] {
        Portable::narrow_f16(src)
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::*;

    pub struct Avx2;
    impl Isa for Avx2 {
        fn run<E: Element, O: Op<E::Acc>>(job: Job<'_>, range: Range<usize>) {
            #[target_feature(enable = "avx2,f16c")]
            fn inner<E: Element, O: Op<E::Acc>>(job: Job<'_>, range: Range<usize>) {
                drive::<E, O>(job, range);
            }
            // SAFETY: a Variant of this set exists, so the CPU has it.
            unsafe { inner::<E, O>(job, range) }
        }

        #[inline(always)]
        fn widen_f16(src: &[[u8; 2]; LANES]) -> [f32; LANES] {
            let mut wide = [0.0; LANES];
            // SAFETY: the CPU has the set, as in `run`; two times eight elements each; no alignment is needed.
            unsafe {
                for i in [0, 8] {
                    let halves = _mm_loadu_si128(src.as_ptr().add(i).cast());
                    _mm256_storeu_ps(wide.as_mut_ptr().add(i), _mm256_cvtph_ps(halves));
                }
            }
            wide
        }

        #[inline(always)]
        fn narrow_f16(src: &[f32; LANES]) -> [[u8; 2]; LANES] {
            let mut halves = [[0; 2]; LANES];
            // SAFETY: as in `widen_f16`.
            unsafe {
                let nan = _mm256_set1_ps(f32::from_bits(half::NAN_F32));
                for i in [0, 8] {
                    let x = _mm256_loadu_ps(src.as_ptr().add(i));
                    let x = _mm256_blendv_ps(x, nan, _mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
                    let eight = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x);
                    _mm_storeu_si128(halves.as_mut_ptr().add(i).cast(), eight);
                }
            }
            halves
        }
    }

    pub struct Avx512;
    impl Isa for Avx512 {
        fn run<E: Element, O: Op<E::Acc>>(job: Job<'_>, range: Range<usize>) {
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
            fn inner<E: Element, O: Op<E::Acc>>(job: Job<'_>, range: Range<usize>) {
                drive::<E, O>(job, range);
            }
            // SAFETY: a Variant of this set exists, so the CPU has it.
            unsafe { inner::<E, O>(job, range) }
        }

        #[inline(always)]
        fn widen_f16(src: &[[u8; 2]; LANES]) -> [f32; LANES] {
            let mut wide = [0.0; LANES];
            // SAFETY: the CPU has the set, as in `run`; sixteen elements each; no alignment is needed.
            unsafe {
                let halves = _mm256_loadu_si256(src.as_ptr().cast());
                _mm512_storeu_ps(wide.as_mut_ptr(), _mm512_cvtph_ps(halves));
            }
            wide
        }

        #[inline(always)]
        fn narrow_f16(src: &[f32; LANES]) -> [[u8; 2]; LANES] {
            let mut halves = [[0; 2]; LANES];
            // SAFETY: as in `widen_f16`.
            unsafe {
                let x = _mm512_loadu_ps(src.as_ptr());
                let nan = _mm512_set1_ps(f32::from_bits(half::NAN_F32));
                let x = _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x), nan);
                let sixteen = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x);
                _mm256_storeu_si256(halves.as_mut_ptr().cast(), sixteen);
            }
            halves
        }
    }
}
