//! Elements as they lie in memory, and the accumulators they are reduced in.
//!
//! Elements are byte arrays: regions come from users and from the wire and need not be aligned.

use std::marker::PhantomData;

use super::half::{self, CHUNK, Halves};
use super::op::Op;

/// An element type. All slices given to one call have the same length, at most a block's.
pub trait Element {
    /// An element in memory.
    type Raw: Copy + Default;
    /// What it is reduced in.
    type Acc: Copy + Default;

    fn widen(raw: Self::Raw) -> Self::Acc;
    /// Rounds, once; floats give the canonical NaN (K2, K3).
    fn narrow(acc: Self::Acc) -> Self::Raw;
    fn divide(acc: Self::Acc, divisor: u32) -> Self::Acc;

    /// `acc = src`
    #[inline(always)]
    fn load(acc: &mut [Self::Acc], src: &[Self::Raw]) {
        for (acc, src) in acc.iter_mut().zip(src) {
            *acc = Self::widen(*src);
        }
    }

    /// `acc = a op b`
    #[inline(always)]
    fn pair<O: Op<Self::Acc>>(acc: &mut [Self::Acc], a: &[Self::Raw], b: &[Self::Raw]) {
        for ((acc, a), b) in acc.iter_mut().zip(a).zip(b) {
            *acc = O::apply(Self::widen(*a), Self::widen(*b));
        }
    }

    /// `acc = acc op src`
    #[inline(always)]
    fn fold<O: Op<Self::Acc>>(acc: &mut [Self::Acc], src: &[Self::Raw]) {
        for (acc, src) in acc.iter_mut().zip(src) {
            *acc = O::apply(*acc, Self::widen(*src));
        }
    }

    /// `dst = acc`
    #[inline(always)]
    fn emit(dst: &mut [Self::Raw], acc: &[Self::Acc]) {
        for (dst, acc) in dst.iter_mut().zip(acc) {
            *dst = Self::narrow(*acc);
        }
    }
}

macro_rules! integer {
    ($name:ident, $t:ty) => {
        pub struct $name;
        impl Element for $name {
            type Raw = [u8; size_of::<$t>()];
            type Acc = $t;

            #[inline(always)]
            fn widen(raw: Self::Raw) -> $t {
                <$t>::from_ne_bytes(raw)
            }
            #[inline(always)]
            fn narrow(acc: $t) -> Self::Raw {
                acc.to_ne_bytes()
            }
            /// In 64 bits, for a group may be larger than the type can count. The quotient fits: it is no
            /// further from zero than `acc`.
            #[inline(always)]
            fn divide(acc: $t, divisor: u32) -> $t {
                (i64::from(acc) / i64::from(divisor)) as $t
            }
        }
    };
}
integer!(U8, u8);
integer!(I8, i8);
integer!(I16, i16);
integer!(I32, i32);
integer!(I64, i64);

/// Any nonzero byte is true; reduced and written as 0 or 1.
pub struct Bool;
impl Element for Bool {
    type Raw = u8;
    type Acc = u8;

    #[inline(always)]
    fn widen(raw: u8) -> u8 {
        u8::from(raw != 0)
    }
    #[inline(always)]
    fn narrow(acc: u8) -> u8 {
        acc
    }
    /// There is no average of booleans ([`crate::ReduceOp::supports`]).
    #[inline(always)]
    fn divide(acc: u8, _divisor: u32) -> u8 {
        acc
    }
}

pub struct F32;
impl Element for F32 {
    type Raw = [u8; 4];
    type Acc = f32;

    #[inline(always)]
    fn widen(raw: [u8; 4]) -> f32 {
        f32::from_ne_bytes(raw)
    }
    #[inline(always)]
    fn narrow(acc: f32) -> [u8; 4] {
        half::canonical_f32(acc).to_ne_bytes()
    }
    #[inline(always)]
    fn divide(acc: f32, divisor: u32) -> f32 {
        acc / divisor as f32
    }
}

pub struct F64;
impl Element for F64 {
    type Raw = [u8; 8];
    type Acc = f64;

    #[inline(always)]
    fn widen(raw: [u8; 8]) -> f64 {
        f64::from_ne_bytes(raw)
    }
    #[inline(always)]
    fn narrow(acc: f64) -> [u8; 8] {
        half::canonical_f64(acc).to_ne_bytes()
    }
    #[inline(always)]
    fn divide(acc: f64, divisor: u32) -> f64 {
        acc / f64::from(divisor)
    }
}

/// float16 or bfloat16, reduced in float32. Whole chunks are converted by the instruction set's own means.
pub struct Half<C>(PhantomData<C>);

/// How one of the two types becomes float32 and is made of it.
pub trait Convert {
    fn widen(raw: [u8; 2]) -> f32;
    fn narrow(acc: f32) -> [u8; 2];

    /// All of a chunk, in an order of its own that [`Convert::narrow_chunk`] undoes.
    fn widen_chunk(raw: &[[u8; 2]; CHUNK]) -> [f32; CHUNK];
    fn narrow_chunk(acc: &[f32; CHUNK]) -> [[u8; 2]; CHUNK];
}

pub struct F16<H>(PhantomData<H>);
impl<H: Halves> Convert for F16<H> {
    #[inline(always)]
    fn widen(raw: [u8; 2]) -> f32 {
        half::f16_to_f32(u16::from_ne_bytes(raw))
    }
    #[inline(always)]
    fn narrow(acc: f32) -> [u8; 2] {
        half::f32_to_f16(acc).to_ne_bytes()
    }
    #[inline(always)]
    fn widen_chunk(raw: &[[u8; 2]; CHUNK]) -> [f32; CHUNK] {
        H::widen_f16(raw)
    }
    #[inline(always)]
    fn narrow_chunk(acc: &[f32; CHUNK]) -> [[u8; 2]; CHUNK] {
        H::narrow_f16(acc)
    }
}

pub struct BF16<H>(PhantomData<H>);
impl<H: Halves> Convert for BF16<H> {
    #[inline(always)]
    fn widen(raw: [u8; 2]) -> f32 {
        half::bf16_to_f32(u16::from_ne_bytes(raw))
    }
    #[inline(always)]
    fn narrow(acc: f32) -> [u8; 2] {
        half::f32_to_bf16(acc).to_ne_bytes()
    }
    #[inline(always)]
    fn widen_chunk(raw: &[[u8; 2]; CHUNK]) -> [f32; CHUNK] {
        half::bf16_pairs_to_f32(raw)
    }
    #[inline(always)]
    fn narrow_chunk(acc: &[f32; CHUNK]) -> [[u8; 2]; CHUNK] {
        H::narrow_bf16(acc)
    }
}

impl<C: Convert> Element for Half<C> {
    type Raw = [u8; 2];
    type Acc = f32;

    #[inline(always)]
    fn widen(raw: [u8; 2]) -> f32 {
        C::widen(raw)
    }
    #[inline(always)]
    fn narrow(acc: f32) -> [u8; 2] {
        C::narrow(acc)
    }
    #[inline(always)]
    fn divide(acc: f32, divisor: u32) -> f32 {
        F32::divide(acc, divisor)
    }

    #[inline(always)]
    fn load(acc: &mut [f32], src: &[[u8; 2]]) {
        let (accs, acc_rest) = acc.as_chunks_mut::<CHUNK>();
        let (srcs, src_rest) = src.as_chunks::<CHUNK>();
        for (acc, src) in accs.iter_mut().zip(srcs) {
            *acc = C::widen_chunk(src);
        }
        for (acc, src) in acc_rest.iter_mut().zip(src_rest) {
            *acc = C::widen(*src);
        }
    }
    #[inline(always)]
    fn pair<O: Op<f32>>(acc: &mut [f32], a: &[[u8; 2]], b: &[[u8; 2]]) {
        Self::load(acc, a);
        Self::fold::<O>(acc, b);
    }
    #[inline(always)]
    fn fold<O: Op<f32>>(acc: &mut [f32], src: &[[u8; 2]]) {
        let (accs, acc_rest) = acc.as_chunks_mut::<CHUNK>();
        let (srcs, src_rest) = src.as_chunks::<CHUNK>();
        for (acc, src) in accs.iter_mut().zip(srcs) {
            let wide = C::widen_chunk(src);
            for (acc, wide) in acc.iter_mut().zip(wide) {
                *acc = O::apply(*acc, wide);
            }
        }
        for (acc, src) in acc_rest.iter_mut().zip(src_rest) {
            *acc = O::apply(*acc, C::widen(*src));
        }
    }
    #[inline(always)]
    fn emit(dst: &mut [[u8; 2]], acc: &[f32]) {
        let (dsts, dst_rest) = dst.as_chunks_mut::<CHUNK>();
        let (accs, acc_rest) = acc.as_chunks::<CHUNK>();
        for (dst, acc) in dsts.iter_mut().zip(accs) {
            *dst = C::narrow_chunk(acc);
        }
        for (dst, acc) in dst_rest.iter_mut().zip(acc_rest) {
            *dst = C::narrow(*acc);
        }
    }
}
