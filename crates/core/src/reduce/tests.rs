//! Every variant this CPU can run against a model written one element at a time, bit for bit.

use ::half::{bf16, f16};
use proptest::prelude::*;

use super::half as own;
use super::isa::FEW;
use super::kernel::BLOCK;
use super::*;
use crate::order::Order;

/// A number in the accumulator of its dtype.
#[derive(Clone, Copy, Debug)]
enum Value {
    Bool(bool),
    /// Wrapped to the dtype's width after every step.
    Int(i128),
    Single(f32),
    Double(f64),
}

/// The `i`th element of `bytes`.
fn read(dtype: DType, bytes: &[u8], i: usize) -> Value {
    let raw = &bytes[i * dtype.size()..][..dtype.size()];
    match dtype {
        DType::Bool => Value::Bool(raw[0] != 0),
        DType::U8 => Value::Int(raw[0].into()),
        DType::I8 => Value::Int(i8::from_ne_bytes(raw.try_into().unwrap()).into()),
        DType::I16 => Value::Int(i16::from_ne_bytes(raw.try_into().unwrap()).into()),
        DType::I32 => Value::Int(i32::from_ne_bytes(raw.try_into().unwrap()).into()),
        DType::I64 => Value::Int(i64::from_ne_bytes(raw.try_into().unwrap()).into()),
        DType::F16 => Value::Single(f16::from_ne_bytes(raw.try_into().unwrap()).to_f32()),
        DType::BF16 => Value::Single(bf16::from_ne_bytes(raw.try_into().unwrap()).to_f32()),
        DType::F32 => Value::Single(f32::from_ne_bytes(raw.try_into().unwrap())),
        DType::F64 => Value::Double(f64::from_ne_bytes(raw.try_into().unwrap())),
    }
}

fn write(dtype: DType, value: Value) -> Vec<u8> {
    match (dtype, value) {
        (DType::Bool, Value::Bool(b)) => vec![u8::from(b)],
        (DType::U8 | DType::I8 | DType::I16 | DType::I32 | DType::I64, Value::Int(n)) => {
            n.to_le_bytes()[..dtype.size()].to_vec()
        }
        (DType::F16, Value::Single(x)) if x.is_nan() => 0x7e00u16.to_ne_bytes().to_vec(),
        (DType::F16, Value::Single(x)) => f16::from_f32(x).to_ne_bytes().to_vec(),
        (DType::BF16, Value::Single(x)) if x.is_nan() => 0x7fc0u16.to_ne_bytes().to_vec(),
        (DType::BF16, Value::Single(x)) => bf16::from_f32(x).to_ne_bytes().to_vec(),
        (DType::F32, Value::Single(x)) if x.is_nan() => 0x7fc0_0000u32.to_ne_bytes().to_vec(),
        (DType::F32, Value::Single(x)) => x.to_ne_bytes().to_vec(),
        (DType::F64, Value::Double(x)) if x.is_nan() => 0x7ff8_0000_0000_0000u64.to_ne_bytes().to_vec(),
        (DType::F64, Value::Double(x)) => x.to_ne_bytes().to_vec(),
        (dtype, value) => panic!("{value:?} is no {dtype}"),
    }
}

fn step(dtype: DType, op: ReduceOp, a: Value, b: Value) -> Value {
    match (a, b) {
        (Value::Bool(a), Value::Bool(b)) => Value::Bool(match op {
            ReduceOp::Sum | ReduceOp::Avg | ReduceOp::Max | ReduceOp::BitOr => a || b,
            ReduceOp::Product | ReduceOp::Min | ReduceOp::BitAnd => a && b,
            ReduceOp::BitXor => a != b,
        }),
        (Value::Int(a), Value::Int(b)) => {
            let exact = match op {
                ReduceOp::Sum | ReduceOp::Avg => a + b,
                ReduceOp::Product => a * b,
                ReduceOp::Min => a.min(b),
                ReduceOp::Max => a.max(b),
                ReduceOp::BitAnd => a & b,
                ReduceOp::BitOr => a | b,
                ReduceOp::BitXor => a ^ b,
            };
            // Through memory and back: wraps.
            read(dtype, &write(dtype, Value::Int(exact)), 0)
        }
        (Value::Single(a), Value::Single(b)) => Value::Single(match op {
            ReduceOp::Sum | ReduceOp::Avg => a + b,
            ReduceOp::Product => a * b,
            _ => extreme(op, a.into(), b.into()) as f32,
        }),
        (Value::Double(a), Value::Double(b)) => Value::Double(match op {
            ReduceOp::Sum | ReduceOp::Avg => a + b,
            ReduceOp::Product => a * b,
            _ => extreme(op, a, b),
        }),
        mixed => panic!("{mixed:?}"),
    }
}

/// Minimum or maximum in IEEE 754's total order, NaN first.
fn extreme(op: ReduceOp, a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() {
        return f64::NAN;
    }
    let a_is_less = a.total_cmp(&b).is_lt();
    match op {
        ReduceOp::Min => {
            if a_is_less {
                a
            } else {
                b
            }
        }
        ReduceOp::Max => {
            if a_is_less {
                b
            } else {
                a
            }
        }
        _ => panic!("{op}"),
    }
}

fn divided(value: Value, by: u32) -> Value {
    match value {
        Value::Bool(_) => panic!("average of booleans"),
        Value::Int(n) => Value::Int(n / i128::from(by)),
        Value::Single(x) => Value::Single(x / by as f32),
        Value::Double(x) => Value::Double(x / f64::from(by)),
    }
}

fn model(arith: Arith, finish: bool, srcs: &[Vec<u8>]) -> Vec<u8> {
    let average = finish && arith.op == ReduceOp::Avg;
    if srcs.len() == 1 && !average {
        return srcs[0].clone();
    }
    let count = srcs[0].len() / arith.dtype.size();
    (0..count)
        .flat_map(|i| {
            let sum = srcs
                .iter()
                .map(|src| read(arith.dtype, src, i))
                .reduce(|a, b| step(arith.dtype, arith.op, a, b))
                .unwrap();
            write(arith.dtype, if average { divided(sum, arith.world) } else { sum })
        })
        .collect()
}

/// Where the result goes.
#[derive(Clone, Copy, Debug)]
enum Dst {
    Apart,
    Over(usize),
}

/// What `combine` gives, however it is stored.
fn reduced(variant: Variant, arith: Arith, finish: bool, srcs: &[Vec<u8>], dst: Dst) -> Vec<u8> {
    let of = |store| stored(variant, Pass { store, order: Order::FourPages }, arith, finish, srcs, dst);
    let cached = stored(variant, Pass::default(), arith, finish, srcs, dst);
    assert!(cached == of(Store::Cached), "in another order something else");
    assert!(cached == of(Store::PastCaches), "past the caches went something else");
    const MARGIN: usize = 5;
    let mut also = vec![0xa5; srcs[0].len() + 2 * MARGIN];
    // SAFETY: `also` outlives the region, and is not touched while that is in use.
    let twice = Store::Twice(unsafe { Region::of(&mut also) }.slice(MARGIN, srcs[0].len()));
    assert!(cached == of(twice), "the first of two is something else");
    assert!(also == [&[0xa5; MARGIN], &cached[..], &[0xa5; MARGIN]].concat(), "the second is something else");
    cached
}

/// Over more than four pages, and a rest.
#[test]
fn the_order_of_pages_does_not_matter() {
    let mut noise = Noise(10);
    for (dtype, op) in pairs() {
        let count = (9 * 4096 + 1000) / dtype.size() + 3;
        for srcs in [2, 3].map(|n| (0..n).map(|_| noise.elements(dtype, count)).collect::<Vec<_>>()) {
            let arith = Arith { dtype, op, world: 3 };
            let expected = model(arith, true, &srcs);
            for (variant, dst) in Variant::available().flat_map(|v| [(v, Dst::Apart), (v, Dst::Over(1))]) {
                assert!(
                    reduced(variant, arith, true, &srcs, dst) == expected,
                    "{op} of {dtype}, {variant:?}"
                );
            }
        }
    }
}

#[test]
fn a_second_place_may_be_a_source() {
    let mut noise = Noise(9);
    for (dtype, op) in pairs() {
        for count in LENGTHS {
            let srcs: Vec<_> = (0..3).map(|_| noise.elements(dtype, count)).collect();
            let arith = Arith { dtype, op, world: 3 };
            let expected = model(arith, true, &srcs);
            for (variant, (first, second)) in Variant::available().flat_map(|v| [(v, (0, 2)), (v, (2, 1))]) {
                let mut memory = srcs.clone();
                // SAFETY: `memory` outlives the regions, and is not touched while they are in use.
                let regions: Vec<Region> = memory.iter_mut().map(|m| unsafe { Region::of(m) }).collect();
                let store = Store::Twice(regions[second]);
                combine_with(
                    variant,
                    Pass { store, ..Pass::default() },
                    arith,
                    true,
                    regions[first],
                    &regions,
                );
                assert!(memory[first] == expected && memory[second] == expected, "{op} of {dtype}, {count}");
            }
        }
    }
}

/// What it gives, stored so, from and to odd addresses; checks that nothing but `dst` was written.
fn stored(variant: Variant, pass: Pass, arith: Arith, finish: bool, srcs: &[Vec<u8>], dst: Dst) -> Vec<u8> {
    const MARGIN: usize = 3;
    let framed = |bytes: &[u8]| [&[0xa5; MARGIN], bytes, &[0x5a; MARGIN]].concat();
    let len = srcs[0].len();
    let mut memory: Vec<Vec<u8>> = srcs.iter().map(|s| framed(s)).collect();
    memory.push(framed(&vec![0xee; len]));
    let into = match dst {
        Dst::Apart => srcs.len(),
        Dst::Over(i) => i,
    };
    let regions: Vec<Region> = memory
        .iter_mut()
        // SAFETY: `memory` outlives the regions, and is not touched while they are in use.
        .map(|m| unsafe { Region::of(m) }.slice(MARGIN, len))
        .collect();
    combine_with(variant, pass, arith, finish, regions[into], &regions[..srcs.len()]);
    for (i, m) in memory.iter().enumerate() {
        let inner = &m[MARGIN..MARGIN + len];
        if i != into {
            let before = srcs.get(i).map_or_else(|| vec![0xee; len], Clone::clone);
            assert_eq!(inner, before, "a source was written");
        }
        assert!(m.starts_with(&[0xa5; MARGIN]) && m.ends_with(&[0x5a; MARGIN]), "written outside");
    }
    memory[into][MARGIN..MARGIN + len].to_vec()
}

/// A small generator, so that failures repeat.
struct Noise(u64);
impl Noise {
    fn next(&mut self) -> u64 {
        // splitmix64 (Steele, Lea, Flood 2014).
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One element: an ordinary number, an edge value, or any bits at all.
    fn element(&mut self, dtype: DType) -> Vec<u8> {
        let any = self.next();
        let ordinary = ((any >> 16) as i32 as f64) / f64::from(1 << 20);
        let sign = (any >> 40 & 1) << (8 * dtype.size() - 1);
        // Bits of ±0, the least and greatest subnormal, the least normal, one, infinity, quiet and signalling NaN,
        // the greatest number: for integers just numbers near their ends.
        let edges: [u64; 9] = match dtype {
            DType::F16 => [0, 1, 0x3ff, 0x400, 0x3c00, 0x7c00, 0x7e55, 0x7c01, 0x7bff],
            DType::BF16 => [0, 1, 0x7f, 0x80, 0x3f80, 0x7f80, 0x7fd5, 0x7f81, 0x7f7f],
            DType::F32 => {
                [0, 1, 0x7f_ffff, 0x80_0000, 0x3f80_0000, 0x7f80_0000, 0x7fd5_5555, 0x7f80_0001, 0x7f7f_ffff]
            }
            DType::F64 => [
                0,
                1,
                0xf_ffff_ffff_ffff,
                0x10_0000_0000_0000,
                0x3ff0_0000_0000_0000,
                0x7ff0_0000_0000_0000,
                0x7ff8_5555_0000_0000,
                0x7ff0_0000_0000_0001,
                0x7fef_ffff_ffff_ffff,
            ],
            DType::Bool | DType::U8 | DType::I8 | DType::I16 | DType::I32 | DType::I64 => {
                [0, 1, 2, 3, 0x7f, 0x7fff, 0x7fff_ffff, u64::MAX >> 1, u64::MAX]
            }
        };
        match (any >> 60, dtype) {
            (0..10, DType::F16) => f16::from_f64(ordinary).to_ne_bytes().to_vec(),
            (0..10, DType::BF16) => bf16::from_f64(ordinary).to_ne_bytes().to_vec(),
            (0..10, DType::F32) => (ordinary as f32).to_ne_bytes().to_vec(),
            (0..10, DType::F64) => ordinary.to_ne_bytes().to_vec(),
            (0..13, _) => (edges[(any % 9) as usize] ^ sign).to_le_bytes()[..dtype.size()].to_vec(),
            _ => self.next().to_le_bytes()[..dtype.size()].to_vec(),
        }
    }

    fn elements(&mut self, dtype: DType, count: usize) -> Vec<u8> {
        (0..count).flat_map(|_| self.element(dtype)).collect()
    }
}

fn pairs() -> impl Iterator<Item = (DType, ReduceOp)> {
    DType::ALL
        .into_iter()
        .flat_map(|d| ReduceOp::ALL.into_iter().map(move |o| (d, o)))
        .filter(|(d, o)| o.supports(*d))
}

/// Around what counts as few, the widths of vectors and of the block.
const LENGTHS: [usize; 19] =
    [0, 1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 65, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 63];

fn describe(dtype: DType, op: ReduceOp, srcs: usize, count: usize, dst: Dst, variant: Variant) -> String {
    format!("{op} of {dtype}, {srcs} sources of {count}, result {dst:?}, {}", variant.name())
}

#[test]
fn every_variant_agrees_with_the_model_bit_for_bit() {
    let mut noise = Noise(1);
    for (dtype, op) in pairs() {
        for sources in 1..=5 {
            for count in LENGTHS {
                let srcs: Vec<_> = (0..sources).map(|_| noise.elements(dtype, count)).collect();
                for (finish, world) in [(false, 3), (true, 3), (true, 300)] {
                    let arith = Arith { dtype, op, world };
                    let expected = model(arith, finish, &srcs);
                    let turn = (noise.next() as usize) % (sources + 1);
                    let dst = if turn == sources { Dst::Apart } else { Dst::Over(turn) };
                    for variant in Variant::available() {
                        let got = reduced(variant, arith, finish, &srcs, dst);
                        assert!(
                            got == expected,
                            "{}: {got:x?} instead of {expected:x?} from {srcs:x?}",
                            describe(dtype, op, sources, count, dst, variant)
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn the_result_may_lie_over_any_source() {
    let mut noise = Noise(2);
    let count = 2 * BLOCK + 17;
    for dtype in DType::ALL {
        let arith = Arith { dtype, op: ReduceOp::Sum, world: 4 };
        for sources in 1..=5 {
            let srcs: Vec<_> = (0..sources).map(|_| noise.elements(dtype, count)).collect();
            let expected = model(arith, true, &srcs);
            for variant in Variant::available() {
                for over in 0..sources {
                    let got = reduced(variant, arith, true, &srcs, Dst::Over(over));
                    assert!(
                        got == expected,
                        "{}",
                        describe(dtype, arith.op, sources, count, Dst::Over(over), variant)
                    );
                }
            }
        }
    }
}

#[test]
fn halves_widen_exactly() {
    let same =
        |got: f32, expected: f32| got.to_bits() == expected.to_bits() || (got.is_nan() && expected.is_nan());
    for bits in 0..=u16::MAX {
        let (got, expected) = (own::f16_to_f32(bits), f16::from_bits(bits).to_f32());
        assert!(same(got, expected), "float16 {bits:#06x}: {got} instead of {expected}");
        let (got, expected) = (own::bf16_to_f32(bits), bf16::from_bits(bits).to_f32());
        assert!(same(got, expected), "bfloat16 {bits:#06x}: {got} instead of {expected}");
    }
}

/// Every half, the float32 numbers around it, and the ties between it and the next; then random bits.
fn interesting_singles() -> Vec<f32> {
    let mut all = Vec::new();
    for bits in 0..=u16::MAX {
        for exact in [f16::from_bits(bits).to_f32(), bf16::from_bits(bits).to_f32()] {
            let b = exact.to_bits();
            all.extend([b, b.wrapping_add(1), b.wrapping_sub(1)].map(f32::from_bits));
            // Ties: half a last place of bf16, of a normal and of each subnormal f16.
            all.extend((9..=24).flat_map(|place| {
                let tie = b ^ (1 << place);
                [tie, tie.wrapping_add(1), tie.wrapping_sub(1)].map(f32::from_bits)
            }));
        }
    }
    let mut noise = Noise(3);
    all.extend((0..1 << 20).map(|_| f32::from_bits(noise.next() as u32)));
    all
}

#[test]
fn rounding_to_halves_is_to_nearest_even() {
    for x in interesting_singles() {
        let expected = if x.is_nan() { 0x7e00 } else { f16::from_f32(x).to_bits() };
        assert_eq!(own::f32_to_f16(x), expected, "float16 of {x} ({:#x})", x.to_bits());
        let expected = if x.is_nan() { 0x7fc0 } else { bf16::from_f32(x).to_bits() };
        assert_eq!(own::f32_to_bf16(x), expected, "bfloat16 of {x} ({:#x})", x.to_bits());
    }
}

/// `half` may convert with the same instructions as we do: compared with integers alone as well.
#[test]
fn rounding_to_halves_agrees_with_arithmetic() {
    let mut noise = Noise(4);
    for _ in 0..1 << 16 {
        let x = f32::from_bits(noise.next() as u32);
        let x = if x.abs() < 70000.0 { x } else { x % 70000.0 };
        if x.is_nan() {
            continue;
        }
        // The nearest of the three neighbours, in double precision, even on a tie.
        let near = own::f32_to_f16(x);
        let distance = |h: u16| (f64::from(own::f16_to_f32(h)) - f64::from(x)).abs();
        if near & 0x7fff == 0x7c00 {
            assert!(x.abs() >= 65520.0, "{x} became infinite");
            continue;
        }
        for other in [near.wrapping_sub(1), near + 1] {
            if (other ^ near) & 0x8000 == 0 && other & 0x7fff < 0x7c00 {
                let (d, o) = (distance(near), distance(other));
                assert!(d < o || (d == o && near & 1 == 0), "{x}: {near:#x} rather than {other:#x}");
            }
        }
    }
}

/// All values through the kernels' own conversions, whole vectors at a time: rounding, then the way back.
#[test]
fn kernels_convert_every_half_as_the_model_does() {
    for dtype in [DType::F16, DType::BF16] {
        let arith = Arith { dtype, op: ReduceOp::Avg, world: 3 };
        let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_ne_bytes).collect();
        let mut noise = Noise(5);
        let any = noise.elements(dtype, 1 << 16);
        for srcs in [vec![all.clone()], vec![all.clone(), any.clone()], vec![any, all]] {
            let expected = model(arith, true, &srcs);
            for variant in Variant::available() {
                assert!(
                    reduced(variant, arith, true, &srcs, Dst::Apart) == expected,
                    "{dtype}, {}",
                    variant.name()
                );
            }
        }
    }
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_ne_bytes()).collect()
}

/// Written out by hand, so that model and kernels cannot be wrong together.
#[test]
fn rules_of_thumb() {
    let of = |dtype, op, world, srcs: &[Vec<u8>]| {
        let mut seen =
            Variant::available().map(|v| reduced(v, Arith { dtype, op, world }, true, srcs, Dst::Apart));
        let first = seen.next().unwrap();
        assert!(seen.all(|s| s == first));
        first
    };
    let one = |b: u8| vec![b];
    // i8: 3 × 100 wraps to 44; divided by a world an i8 cannot count.
    let hundreds = [one(100), one(100), one(100)];
    assert_eq!(of(DType::I8, ReduceOp::Sum, 3, &hundreds), one(44));
    assert_eq!(of(DType::I8, ReduceOp::Avg, 200, &hundreds), one(0));
    assert_eq!(of(DType::I8, ReduceOp::Avg, 2, &[one(-4i8 as u8), one(-3i8 as u8)]), one(-3i8 as u8));
    assert_eq!(of(DType::U8, ReduceOp::Avg, 2, &[one(250), one(3)]), one(126));
    // Any nonzero byte is true.
    assert_eq!(of(DType::Bool, ReduceOp::Sum, 2, &[one(0), one(8)]), one(1));
    assert_eq!(of(DType::Bool, ReduceOp::Product, 2, &[one(2), one(1)]), one(1));
    assert_eq!(of(DType::Bool, ReduceOp::BitXor, 2, &[one(2), one(1)]), one(0));
    // Zeros are ordered, NaN wins from either side.
    let zeros = [floats(&[0.0, -0.0, 1.0, f32::NAN]), floats(&[-0.0, 0.0, f32::NAN, 1.0])];
    let nan = f32::from_bits(0x7fc0_0000);
    assert_eq!(of(DType::F32, ReduceOp::Min, 2, &zeros), floats(&[-0.0, -0.0, nan, nan]));
    assert_eq!(of(DType::F32, ReduceOp::Max, 2, &zeros), floats(&[0.0, 0.0, nan, nan]));
    assert_eq!(of(DType::F32, ReduceOp::Sum, 2, &[floats(&[-0.0]), floats(&[-0.0])]), floats(&[-0.0]));
    let infinite = [floats(&[f32::INFINITY]), floats(&[f32::NEG_INFINITY])];
    assert_eq!(of(DType::F32, ReduceOp::Sum, 2, &infinite), floats(&[nan]));
    // One rounding: 1 + 2^-8 + 2^-8 in bfloat16 (8 bits) would be 1 if each step rounded (ties to even).
    let halves = [1.0, 1.0 / 256.0, 1.0 / 256.0].map(|x| bf16::from_f32(x).to_ne_bytes().to_vec());
    assert_eq!(of(DType::BF16, ReduceOp::Sum, 3, &halves), bf16::from_f32(1.0 + 1.0 / 128.0).to_ne_bytes());
    // Sums beyond float16's range come back before rounding.
    let large = [6e4f32, 6e4].map(|x| f16::from_f32(x).to_ne_bytes().to_vec());
    assert_eq!(of(DType::F16, ReduceOp::Avg, 2, &large).as_slice(), large[0]);
    // Subnormals stay.
    let tiny = [1u16, 1].map(|b| b.to_ne_bytes().to_vec());
    assert_eq!(of(DType::BF16, ReduceOp::Sum, 2, &tiny), 2u16.to_ne_bytes());
    assert_eq!(of(DType::F16, ReduceOp::Sum, 2, &tiny), 2u16.to_ne_bytes());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Equal contributions of any order and number average to themselves.
    #[test]
    fn the_average_of_equal_values_is_that_value(
        seed in any::<u64>(), which in 0..DType::ALL.len(), log in 0u32..4, count in 1usize..100,
    ) {
        let dtype = DType::ALL[which];
        prop_assume!(ReduceOp::Avg.supports(dtype));
        let world = 1 << log;
        // Small whole numbers: nothing wraps or rounds on the way.
        let numbers: Vec<i8> = (0..count).map(|i| ((seed >> (i % 60)) & 15) as i8).collect();
        let bytes: Vec<u8> = numbers.iter().flat_map(|n| match dtype {
            DType::F16 => f16::from_f32((*n).into()).to_ne_bytes().to_vec(),
            DType::BF16 => bf16::from_f32((*n).into()).to_ne_bytes().to_vec(),
            DType::F32 => f32::from(*n).to_ne_bytes().to_vec(),
            DType::F64 => f64::from(*n).to_ne_bytes().to_vec(),
            _ => i64::from(*n).to_le_bytes()[..dtype.size()].to_vec(),
        }).collect();
        let srcs = vec![bytes.clone(); world as usize];
        for variant in Variant::available() {
            let arith = Arith { dtype, op: ReduceOp::Avg, world };
            prop_assert_eq!(&reduced(variant, arith, true, &srcs, Dst::Over(0)), &bytes);
        }
    }

    /// Sources are folded left to right whatever the order they are given in, and what does not depend on the
    /// order by nature does not.
    #[test]
    fn order_is_kept_and_where_it_cannot_matter_it_does_not(
        seed in any::<u64>(), which in any::<prop::sample::Index>(),
        order in Just((0..5usize).collect::<Vec<_>>()).prop_shuffle(),
        count in 1usize..2 * BLOCK,
    ) {
        let all: Vec<_> = pairs().collect();
        let (dtype, op) = *which.get(&all);
        let arith = Arith { dtype, op, world: 5 };
        let mut noise = Noise(seed);
        let srcs: Vec<_> = (0..5).map(|_| noise.elements(dtype, count)).collect();
        let shuffled: Vec<_> = order.iter().map(|i| srcs[*i].clone()).collect();
        let expected = model(arith, true, &shuffled);
        for variant in Variant::available() {
            let got = reduced(variant, arith, true, &shuffled, Dst::Apart);
            prop_assert!(got == expected, "{} of {}", op, dtype);
            let orderless = !dtype.is_float() || matches!(op, ReduceOp::Min | ReduceOp::Max);
            if orderless {
                prop_assert!(got == reduced(variant, arith, true, &srcs, Dst::Apart), "{} of {}", op, dtype);
            }
        }
    }

    /// Two contributions commute, payloads of NaN included: ranks that exchange halves agree.
    #[test]
    fn two_sources_commute(seed in any::<u64>(), which in any::<prop::sample::Index>(), count in 1usize..100) {
        let all: Vec<_> = pairs().collect();
        let (dtype, op) = *which.get(&all);
        let arith = Arith { dtype, op, world: 2 };
        let mut noise = Noise(seed);
        let (a, b) = (noise.elements(dtype, count), noise.elements(dtype, count));
        let mut results = Variant::available().flat_map(|v| {
            [[a.clone(), b.clone()], [b.clone(), a.clone()]].map(|s| reduced(v, arith, true, &s, Dst::Over(0)))
        });
        let first = results.next().unwrap();
        prop_assert!(results.all(|r| r == first), "{} of {}", op, dtype);
    }
}

#[test]
fn large_reductions_may_use_several_threads() {
    let _alone = threads::ALONE.lock().unwrap();
    threads::use_threads(3);
    let count = (9 << 20) / 4 + 5;
    let mut noise = Noise(6);
    let srcs: Vec<Vec<u8>> =
        (0..2).map(|_| (0..count).flat_map(|_| (noise.next() as u32).to_ne_bytes()).collect()).collect();
    let arith = Arith { dtype: DType::F32, op: ReduceOp::Avg, world: 7 };
    assert!(reduced(variant(), arith, true, &srcs, Dst::Over(1)) == model(arith, true, &srcs));
    threads::use_threads(1);
}

#[test]
#[should_panic(expected = "different length")]
fn lengths_are_compared() {
    let (mut a, mut b) = ([0u8; 8], [0u8; 4]);
    // SAFETY: both arrays outlive the call.
    let (a, b) = unsafe { (Region::of(&mut a), Region::of(&mut b)) };
    combine(Arith { dtype: DType::F32, op: ReduceOp::Sum, world: 2 }, false, a, &[a, b]);
}

#[test]
#[should_panic(expected = "no whole number")]
fn parts_of_elements_are_refused() {
    let mut a = [0u8; 6];
    // SAFETY: the array outlives the call.
    let a = unsafe { Region::of(&mut a) };
    combine(Arith { dtype: DType::F32, op: ReduceOp::Sum, world: 2 }, false, a, &[a, a]);
}

#[test]
fn the_portable_variant_can_be_chosen() {
    // Other tests name their variant, so changing the one in force disturbs none.
    use_portable(true);
    assert_eq!(variant(), Variant::PORTABLE);
    use_portable(false);
    assert_eq!(Some(variant()), Variant::available().next_back());
}

/// Threads that flush subnormals, or round otherwise, get the same bits, and have their environment back (K6).
#[test]
fn the_callers_environment_changes_no_bits() {
    let subnormals: [(DType, &[u64]); 4] = [
        (DType::F16, &[0x0001, 0x8003, 0x03ff, 0x3c01]),
        (DType::BF16, &[0x0001, 0x8003, 0x007f, 0x3f81]),
        (DType::F32, &[0x0000_0001, 0x8000_0003, 0x007f_ffff, 0x3f80_0001]),
        (DType::F64, &[0x1, 0x8000_0000_0000_0003, 0x000f_ffff_ffff_ffff, 0x3ff0_0000_0000_0001]),
    ];
    for (dtype, values) in subnormals {
        for count in [1, FEW, 5, 100] {
            let source = |turn: usize| -> Vec<u8> {
                let value = |i: usize| values[(i / (turn + 1) + turn) % values.len()];
                (0..count).flat_map(|i| value(i).to_le_bytes()[..dtype.size()].to_vec()).collect()
            };
            let srcs = [source(0), source(1), source(2)];
            for op in [ReduceOp::Sum, ReduceOp::Avg, ReduceOp::Product, ReduceOp::Min, ReduceOp::Max] {
                let arith = Arith { dtype, op, world: 3 };
                let expected = model(arith, true, &srcs);
                for variant in Variant::available() {
                    let (mut srcs, mut dst) = (srcs.clone(), vec![0u8; expected.len()]);
                    // SAFETY: the vectors outlive the call.
                    let (from, to) =
                        unsafe { (srcs.each_mut().map(|s| Region::of(s)), Region::of(&mut dst)) };
                    environment::in_another(|| {
                        combine_with(variant, Pass::default(), arith, true, to, &from)
                    });
                    assert_eq!(dst, expected, "{op} of {count} {dtype}, {variant}");
                }
            }
        }
    }
}
