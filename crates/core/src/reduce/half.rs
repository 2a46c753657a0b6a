//! float16 and bfloat16 to and from float32, in integer operations without branches so that loops over them
//! become vector code. Rounding is to nearest even; NaN becomes the canonical one (K3).

/// Halves converted at a time.
pub const CHUNK: usize = 32;

/// The only NaN a reduction writes, in each type (in bfloat16 the upper half of float32's).
pub const NAN_F16: u16 = 0x7e00;
pub const NAN_F32: u32 = 0x7fc0_0000;
pub const NAN_F64: u64 = 0x7ff8_0000_0000_0000;

/// Distance between the exponent biases of float32 and float16, in float32's place.
const REBIAS: u32 = (127 - 15) << 23;

/// Exact. NaN stays some NaN.
#[inline(always)]
pub fn f16_to_f32(half: u16) -> f32 {
    let sign = (u32::from(half) & 0x8000) << 16;
    // Exponent and fraction moved to float32's places, the exponent still with float16's bias.
    let magnitude = (u32::from(half) & 0x7fff) << 13;
    let normal = magnitude + REBIAS;
    // No implicit one: read as 2^-14 * 1.fraction, then take the 2^-14 away, exactly.
    const ONE_TOO_MUCH: u32 = REBIAS + (1 << 23);
    let subnormal = (f32::from_bits(magnitude + ONE_TOO_MUCH) - f32::from_bits(ONE_TOO_MUCH)).to_bits();
    let special = magnitude | 0x7f80_0000;
    let finite = if magnitude < 1 << 23 { subnormal } else { normal };
    f32::from_bits(sign | if magnitude < 31 << 23 { finite } else { special })
}

/// Rounded to nearest even; beyond the range, infinity.
#[inline(always)]
pub fn f32_to_f16(single: f32) -> u16 {
    let bits = single.to_bits();
    let sign = (bits >> 16) & 0x8000;
    let magnitude = bits & 0x7fff_ffff;
    // Half of what the dropped 13 bits count, less one unless the kept part is odd: ties go to even. The carry may
    // run into the exponent, up to infinity, which is right.
    let odd = (magnitude >> 13) & 1;
    let normal = magnitude.wrapping_sub(REBIAS).wrapping_add(0xfff + odd) >> 13;
    // float16's subnormals count in units of 2^-24, which is the last place of 0.5: the addition rounds.
    let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
    let finite = if magnitude < REBIAS + (1 << 23) { subnormal } else { normal };
    let number = if magnitude < (127 + 16) << 23 { finite } else { 0x7c00 };
    let result = if magnitude > 0x7f80_0000 { u32::from(NAN_F16) } else { sign | number };
    result as u16
}

/// Exact.
#[inline(always)]
pub fn bf16_to_f32(half: u16) -> f32 {
    f32::from_bits(u32::from(half) << 16)
}

/// Rounded to nearest even; beyond the range, infinity.
#[inline(always)]
pub fn f32_to_bf16(single: f32) -> u16 {
    (rounded_to_bf16(single) >> 16) as u16
}

/// The rounded number in the upper half, anything in the lower.
#[inline(always)]
fn rounded_to_bf16(single: f32) -> u32 {
    let bits = canonical_f32(single);
    // As above for 16 dropped bits; infinity and the canonical NaN have none of them set and stay.
    bits.wrapping_add(0x7fff + ((bits >> 16) & 1))
}

/// Exact: the chunk's even elements, then its odd ones. Two neighbours lie in one word, and moving them to float32's place takes
/// one instruction each that way.
#[inline(always)]
pub fn bf16_pairs_to_f32(halves: &[[u8; 2]; CHUNK]) -> [f32; CHUNK] {
    let mut singles = [0.0; CHUNK];
    let (even, odd) = singles.split_at_mut(CHUNK / 2);
    let (words, _) = halves.as_flattened().as_chunks::<4>();
    for ((even, odd), word) in even.iter_mut().zip(odd).zip(words) {
        let word = u32::from_le_bytes(*word);
        *even = f32::from_bits(word << 16);
        *odd = f32::from_bits(word & 0xffff_0000);
    }
    singles
}

/// As [`f32_to_bf16`], in the order that [`bf16_pairs_to_f32`] gives.
#[inline(always)]
pub fn f32_to_bf16_pairs(singles: &[f32; CHUNK]) -> [[u8; 2]; CHUNK] {
    let mut halves = [[0; 2]; CHUNK];
    let (even, odd) = singles.split_at(CHUNK / 2);
    let (words, _) = halves.as_flattened_mut().as_chunks_mut::<4>();
    for ((even, odd), word) in even.iter().zip(odd).zip(words) {
        *word = (rounded_to_bf16(*even) >> 16 | rounded_to_bf16(*odd) & 0xffff_0000).to_le_bytes();
    }
    halves
}

/// The bits, with one NaN for all.
#[inline(always)]
pub fn canonical_f32(x: f32) -> u32 {
    if x.is_nan() { NAN_F32 } else { x.to_bits() }
}

/// The bits, with one NaN for all.
#[inline(always)]
pub fn canonical_f64(x: f64) -> u64 {
    if x.is_nan() { NAN_F64 } else { x.to_bits() }
}

/// How an instruction set converts halves. Its functions are called only where the CPU has it.
pub trait Halves {
    /// Bit for bit as [`f16_to_f32`], but for which NaN a NaN becomes. To be inlined into the set's kernels, as the others.
    #[inline(always)]
    fn widen_f16(src: &[[u8; 2]; CHUNK]) -> [f32; CHUNK] {
        src.map(|half| f16_to_f32(u16::from_ne_bytes(half)))
    }
    /// Bit for bit as [`f32_to_f16`].
    #[inline(always)]
    fn narrow_f16(src: &[f32; CHUNK]) -> [[u8; 2]; CHUNK] {
        src.map(|single| f32_to_f16(single).to_ne_bytes())
    }
    /// Bit for bit as [`f32_to_bf16_pairs`].
    #[inline(always)]
    fn narrow_bf16(src: &[f32; CHUNK]) -> [[u8; 2]; CHUNK] {
        f32_to_bf16_pairs(src)
    }
}
