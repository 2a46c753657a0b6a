//! Element-wise reduction of several regions into one: `dst[i] = srcs[0][i] op srcs[1][i] op …`.
//!
//! Every kernel variant gives the same bits, so that ranks on different CPUs agree.
//!
//! Invariants
//! - **K1** Bits are a function of the values and of the order of `srcs` alone: not of the variant, the length, the
//!   alignment, nor the number of threads. Sources are folded left to right, element by element; nothing is
//!   contracted (no fused multiply-add) or reassociated.
//! - **K2** float16 and bfloat16 are summed up in float32 and rounded once, to nearest even, with subnormals kept.
//!   (The `vcvtneps2bf16` instruction flushes subnormals: what contains some is converted without it.)
//! - **K3** A result that is not a number is always the same one: sign 0, quiet, no payload (`half.rs`). Which payload
//!   survives an addition differs between CPUs and even between two compilations of one expression.
//! - **K4** `Min` and `Max` are IEEE 754-2019's minimum and maximum: NaN wins, and −0 is less than +0. They are
//!   therefore independent of order.
//! - **K5** `dst`, or either of two, is the very region of some sources, or does not overlap them. Each block is read from all
//!   sources before its result is written, which is what makes the first case right.
//! - **K6** The floating-point environment is the default one (round to nearest, subnormals not flushed), as Rust assumes, whatever
//!   that of the calling thread is (`environment.rs`).
//!
//! One source without `Avg` is a plain copy: bytes arrive as they are.

mod element;
mod environment;
mod half;
mod isa;
mod kernel;
mod op;
#[cfg(test)]
mod tests;

use crate::dtype::{DType, ReduceOp};
use crate::memory::Region;
use crate::threads;
use crate::transport::Arith;

pub use isa::{Variant, use_portable, variant};
pub use kernel::{Pass, Store};

use kernel::Job;

/// Reduces `srcs`, in order, into `dst`, with the variant in force ([`variant`]).
///
/// With `finish` and `Avg`, the sum is divided by `arith.world` before it is rounded (integers truncate toward
/// zero); with `finish` and any other reduction nothing more happens. Integers wrap. Booleans read any nonzero byte as
/// true and are written as 0 or 1.
///
/// # Panics
/// When `srcs` is empty, or lengths differ or are no multiple of the element size: a plan that was not checked.
/// Pairs of reduction and dtype are checked where calls enter ([`ReduceOp::supports`]).
pub fn combine(arith: Arith, finish: bool, dst: Region, srcs: &[Region]) {
    combine_and(Pass::default(), arith, finish, dst, srcs);
}

/// [`combine`], going over memory as `pass` says.
///
/// # Panics
/// As [`combine`].
pub fn combine_and(pass: Pass, arith: Arith, finish: bool, dst: Region, srcs: &[Region]) {
    combine_with(isa::current(), pass, arith, finish, dst, srcs);
}

/// [`combine_and`] with a variant of the caller's choice: for tests and benches.
///
/// # Panics
/// As [`combine`].
pub fn combine_with(variant: Variant, pass: Pass, arith: Arith, finish: bool, dst: Region, srcs: &[Region]) {
    debug_assert!(arith.op.supports(arith.dtype), "{} of {}", arith.op, arith.dtype);
    let count = check(arith.dtype, dst, srcs);
    let divisor = (finish && arith.op == ReduceOp::Avg).then_some(arith.world.max(1));
    match (srcs, divisor) {
        _ if count == 0 => {}
        ([only], None) => {
            dst.copy_from(*only);
            if let Store::Twice(also) = pass.store {
                also.copy_from(*only);
            }
        }
        _ => {
            let job = Job { dst, srcs, divisor, pass };
            if count <= isa::FEW {
                isa::run_few(arith, job, count);
            } else {
                run(variant, arith, job, count);
            }
        }
    }
}

/// Not inlined: few elements need nothing of it.
#[inline(never)]
fn run(variant: Variant, arith: Arith, job: Job<'_>, count: usize) {
    let element = arith.dtype.size();
    threads::split(count * element, |bytes| {
        isa::run(variant, arith, job, bytes.start / element..bytes.end / element);
    });
}

/// The number of elements, once lengths have been compared.
fn check(dtype: DType, dst: Region, srcs: &[Region]) -> usize {
    assert!(!srcs.is_empty(), "reduction of no sources");
    assert_eq!(dst.len() % dtype.size(), 0, "{} bytes are no whole number of {dtype} elements", dst.len());
    for src in srcs {
        assert_eq!(src.len(), dst.len(), "reduction of regions of different length");
        debug_assert!(
            src.as_ptr() == dst.as_ptr()
                || (src.as_ptr() as usize).abs_diff(dst.as_ptr() as usize) >= dst.len(),
            "reduction of partly overlapping regions (K5)"
        );
    }
    dst.len() / dtype.size()
}
