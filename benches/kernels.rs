//! Speed of the reduction kernels on data that stays in the cache: bytes read from every source plus bytes written.
//!
//! `cargo bench -p smddp-core --bench kernels`

use divan::Bencher;
use divan::counter::BytesCount;
use smddp_core::reduce::{Pass, Variant, combine, combine_with};
use smddp_core::threads::use_threads;
use smddp_core::transport::Arith;
use smddp_core::{DType, ReduceOp, Region};

const ELEMENTS: usize = 32 << 10;

fn main() {
    divan::main();
}

/// Aligned as tensors are.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line([u8; 64]);

/// What a call costs beside its bytes: 16 elements.
#[divan::bench(args = variants())]
fn small_f32(bencher: Bencher<'_, '_>, variant: Variant) {
    let mut memory = [[1.0f32; 16]; 3];
    // SAFETY: `memory` outlives the regions and is not touched while they are in use.
    let regions = memory.each_mut().map(|m| unsafe { Region::of(m) });
    let arith = Arith { dtype: DType::F32, op: ReduceOp::Sum, world: 2 };
    bencher.bench_local(|| {
        combine_with(variant, Pass::default(), arith, true, regions[2], divan::black_box(&regions[..2]))
    });
}

/// The same of 2 elements, which are reduced one at a time.
#[divan::bench]
fn tiny_f32(bencher: Bencher<'_, '_>) {
    let mut memory = [[1.0f32; 2]; 3];
    // SAFETY: as above.
    let regions = memory.each_mut().map(|m| unsafe { Region::of(m) });
    let arith = Arith { dtype: DType::F32, op: ReduceOp::Sum, world: 2 };
    bencher.bench_local(|| combine(arith, true, regions[2], divan::black_box(&regions[..2])));
}

/// A reduction of two sources larger than the caches of a core, by one thread and by two: (threads, bytes).
#[divan::bench(args = [(1, 256 << 10), (2, 256 << 10), (1, 512 << 10), (2, 512 << 10), (1, 1 << 20), (2, 1 << 20), (1, 4 << 20), (2, 4 << 20), (1, 64 << 20), (2, 64 << 20)])]
fn large_f32(bencher: Bencher<'_, '_>, (threads, len): (usize, usize)) {
    use_threads(threads);
    let mut memory = [(); 3].map(|()| vec![Line([0; 64]); len / 64]);
    // SAFETY: `memory` outlives the regions and is not touched while they are in use.
    let regions = memory.each_mut().map(|m| unsafe { Region::of(m) });
    let arith = Arith { dtype: DType::F32, op: ReduceOp::Sum, world: 2 };
    bencher.counter(BytesCount::new(3 * len)).bench_local(|| combine(arith, true, regions[2], &regions[..2]));
    use_threads(1);
}

/// One reduction of `SRCS` sources apart from the result.
fn reduce<const SRCS: usize>(bencher: Bencher<'_, '_>, dtype: DType, op: ReduceOp, variant: Variant) {
    let len = ELEMENTS * dtype.size();
    // The same ordinary number everywhere: no sum gets out of range.
    let one: &[u8] = match dtype {
        DType::F16 => &[0x00, 0x3c],
        DType::BF16 => &[0x80, 0x3f],
        DType::F32 => &[0x00, 0x00, 0x80, 0x3f],
        _ => &[1],
    };
    let mut memory: Vec<Vec<Line>> = (0..=SRCS).map(|_| vec![Line([0; 64]); len / 64]).collect();
    for element in memory.iter_mut().flatten().flat_map(|line| line.0.chunks_mut(one.len())) {
        element.copy_from_slice(one);
    }
    // SAFETY: `memory` outlives the regions and is not touched while they are in use.
    let regions: Vec<Region> = memory.iter_mut().map(|m| unsafe { Region::of(m) }).collect();
    let arith = Arith { dtype, op, world: SRCS as u32 };
    bencher.counter(BytesCount::new((SRCS + 1) * len)).bench_local(|| {
        combine_with(variant, Pass::default(), arith, true, regions[SRCS], divan::black_box(&regions[..SRCS]))
    });
}

fn variants() -> impl Iterator<Item = Variant> {
    Variant::available()
}

macro_rules! benches {
    ($($name:ident: $dtype:ident $op:ident),* $(,)?) => {$(
        #[divan::bench(consts = [2, 4], args = variants())]
        fn $name<const SRCS: usize>(bencher: Bencher<'_, '_>, variant: Variant) {
            reduce::<SRCS>(bencher, DType::$dtype, ReduceOp::$op, variant);
        }
    )*};
}

benches! {
    sum_f32: F32 Sum,
    sum_bf16: BF16 Sum,
    sum_f16: F16 Sum,
    avg_f32: F32 Avg,
    max_f32: F32 Max,
    sum_i64: I64 Sum,
    avg_i32: I32 Avg,
}
