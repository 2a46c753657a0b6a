//! Instruction sets: which the CPU has, and the reduction compiled for each.
//!
//! All but the conversions of halves is plain code that the compiler turns into vectors of each set's width.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU8, Ordering};

use super::element::{BF16, Bool, Element, F16, F32, F64, Half, I8, I16, I32, I64, U8};
use super::environment::Plain;
use super::half::Halves;
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
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16 = 4,
}

impl Variant {
    pub const PORTABLE: Variant = Variant(Set::Portable);

    /// Those this CPU can run, slowest first.
    pub fn available() -> impl DoubleEndedIterator<Item = Variant> {
        #[cfg(target_arch = "x86_64")]
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        [
            Some(Variant::PORTABLE),
            #[cfg(target_arch = "x86_64")]
            (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c"))
                .then_some(Variant(Set::Avx2)),
            #[cfg(target_arch = "x86_64")]
            avx512.then_some(Variant(Set::Avx512)),
            #[cfg(target_arch = "x86_64")]
            (avx512 && is_x86_feature_detected!("avx512bf16")).then_some(Variant(Set::Avx512Bf16)),
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
            #[cfg(target_arch = "x86_64")]
            Set::Avx512Bf16 => "avx512_bf16",
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
            #[cfg(target_arch = "x86_64")]
            4 => return Variant(Set::Avx512Bf16),
            _ => return Variant::PORTABLE,
        }
    }
}

/// Reduces the elements `range` of `job`.
pub fn run(variant: Variant, arith: Arith, job: Job<'_>, range: Range<usize>) {
    let _plain = Plain::enter();
    match variant.0 {
        Set::Portable => by_dtype::<Portable>(arith, job, range),
        #[cfg(target_arch = "x86_64")]
        Set::Avx2 => by_dtype::<x86::Avx2>(arith, job, range),
        #[cfg(target_arch = "x86_64")]
        // Different for one dtype: the others are not compiled once more.
        Set::Avx512Bf16 if arith.dtype == DType::BF16 => {
            floats::<x86::Avx512Bf16, Half<BF16<x86::Avx512Bf16>>>(arith.op, job, range);
        }
        #[cfg(target_arch = "x86_64")]
        Set::Avx512 | Set::Avx512Bf16 => by_dtype::<x86::Avx512>(arith, job, range),
    }
}

/// Elements of which so many at most are reduced one at a time, as every CPU does it.
pub const FEW: usize = 4;

/// Reduces all elements of `job`, which are few.
pub fn run_few(arith: Arith, job: Job<'_>, count: usize) {
    debug_assert!(count <= FEW);
    let _plain = Plain::enter();
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
        DType::F16 => floats::<I, Half<F16<I>>>(op, job, range),
        DType::BF16 => floats::<I, Half<BF16<I>>>(op, job, range),
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
pub trait Isa: Halves {
    fn run<E: Element, O: Op<E::Acc>>(job: Job<'_>, range: Range<usize>);
}

/// What every CPU of the architecture has (SSE2, NEON).
pub struct Portable;
impl Halves for Portable {}
impl Isa for Portable {
    fn run<E: Element, O: Op<E::Acc>>(job: Job<'_>, range: Range<usize>) {
        drive::<E, O>(job, range);
    }
}

/// As [`Portable`], for a few elements.
struct Few;
impl Halves for Few {}
impl Isa for Few {
    fn run<E: Element, O: Op<E::Acc>>(job: Job<'_>, range: Range<usize>) {
        drive_few::<E, O>(job, range);
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::super::half::{self, CHUNK};
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
    }

    impl Halves for Avx2 {
        #[inline(always)]
        fn widen_f16(src: &[[u8; 2]; CHUNK]) -> [f32; CHUNK] {
            let mut wide = [0.0; CHUNK];
            // SAFETY: the CPU has the set, as in `run`; eight elements each time; no alignment is needed.
            unsafe {
                for i in [0, 8, 16, 24] {
                    let halves = _mm_loadu_si128(src.as_ptr().add(i).cast());
                    _mm256_storeu_ps(wide.as_mut_ptr().add(i), _mm256_cvtph_ps(halves));
                }
            }
            wide
        }

        #[inline(always)]
        fn narrow_f16(src: &[f32; CHUNK]) -> [[u8; 2]; CHUNK] {
            let mut halves = [[0; 2]; CHUNK];
            // SAFETY: as in `widen_f16`.
            unsafe {
                let nan = _mm256_set1_ps(f32::from_bits(half::NAN_F32));
                for i in [0, 8, 16, 24] {
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
    }

    impl Halves for Avx512 {
        #[inline(always)]
        fn widen_f16(src: &[[u8; 2]; CHUNK]) -> [f32; CHUNK] {
            let mut wide = [0.0; CHUNK];
            // SAFETY: the CPU has the set, as in `run`; sixteen elements each time; no alignment is needed.
            unsafe {
                for i in [0, 16] {
                    let halves = _mm256_loadu_si256(src.as_ptr().add(i).cast());
                    _mm512_storeu_ps(wide.as_mut_ptr().add(i), _mm512_cvtph_ps(halves));
                }
            }
            wide
        }

        #[inline(always)]
        fn narrow_f16(src: &[f32; CHUNK]) -> [[u8; 2]; CHUNK] {
            let mut halves = [[0; 2]; CHUNK];
            // SAFETY: as in `widen_f16`.
            unsafe {
                let nan = _mm512_set1_ps(f32::from_bits(half::NAN_F32));
                for i in [0, 16] {
                    let x = _mm512_loadu_ps(src.as_ptr().add(i));
                    let x = _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x), nan);
                    let sixteen = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x);
                    _mm256_storeu_si256(halves.as_mut_ptr().add(i).cast(), sixteen);
                }
            }
            halves
        }
    }

    /// [`Avx512`] with instructions for bfloat16.
    pub struct Avx512Bf16;
    impl Isa for Avx512Bf16 {
        fn run<E: Element, O: Op<E::Acc>>(job: Job<'_>, range: Range<usize>) {
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
            fn inner<E: Element, O: Op<E::Acc>>(job: Job<'_>, range: Range<usize>) {
                drive::<E, O>(job, range);
            }
            // SAFETY: a Variant of this set exists, so the CPU has it.
            unsafe { inner::<E, O>(job, range) }
        }
    }

    impl Halves for Avx512Bf16 {
        /// The instruction flushes subnormals and keeps payloads of NaN: where there are such, plain code converts (K2, K3).
        #[inline(always)]
        fn narrow_bf16(src: &[f32; CHUNK]) -> [[u8; 2]; CHUNK] {
            const SUBNORMAL_OR_NAN: i32 = 0x20 | 0x80 | 0x01;
            let mut halves = [[0; 2]; CHUNK];
            // SAFETY: the CPU has the set, as in `run`; twice sixteen elements; no alignment is needed.
            unsafe {
                let even = _mm512_loadu_ps(src.as_ptr());
                let odd = _mm512_loadu_ps(src.as_ptr().add(CHUNK / 2));
                let special = _mm512_fpclass_ps_mask::<SUBNORMAL_OR_NAN>(even)
                    | _mm512_fpclass_ps_mask::<SUBNORMAL_OR_NAN>(odd);
                if special != 0 {
                    return half::f32_to_bf16_pairs(src);
                }
                let both: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(odd, even));
                let in_turns = _mm512_loadu_epi16(IN_TURNS.as_ptr());
                _mm512_storeu_epi16(halves.as_mut_ptr().cast(), _mm512_permutexvar_epi16(in_turns, both));
            }
            halves
        }
    }

    /// One of the lower half, one of the upper, and so on.
    const IN_TURNS: [i16; CHUNK] = {
        let mut order = [0; CHUNK];
        let mut i = 0;
        while i < CHUNK {
            order[i] = (i / 2 + i % 2 * (CHUNK / 2)) as i16;
            i += 1;
        }
        order
    };
}
