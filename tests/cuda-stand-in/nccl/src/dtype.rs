//! NCCL's element types and reductions, in rank order. Types of less than 32 bits are summed in f32 and
//! rounded once.

use crate::error::{Code, Error, Result};
use half::{bf16, f16};
use std::sync::OnceLock;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DType {
    I8,
    U8,
    I32,
    U32,
    I64,
    U64,
    F16,
    F32,
    F64,
    Bf16,
    E4m3,
    E5m2,
}

impl DType {
    const ALL: [Self; 12] = [
        Self::I8,
        Self::U8,
        Self::I32,
        Self::U32,
        Self::I64,
        Self::U64,
        Self::F16,
        Self::F32,
        Self::F64,
        Self::Bf16,
        Self::E4m3,
        Self::E5m2,
    ];

    /// As nccl.h numbers them.
    pub fn of(value: i32) -> Result<Self> {
        let found = usize::try_from(value).ok().and_then(|i| Self::ALL.get(i).copied());
        found.ok_or_else(|| Error::new(Code::INVALID_ARGUMENT, format!("invalid type {value}")))
    }

    pub fn size(self) -> usize {
        match self {
            Self::I8 | Self::U8 | Self::E4m3 | Self::E5m2 => 1,
            Self::F16 | Self::Bf16 => 2,
            Self::I32 | Self::U32 | Self::F32 => 4,
            Self::I64 | Self::U64 | Self::F64 => 8,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduction {
    Sum,
    Prod,
    Max,
    Min,
    Avg,
}

impl Reduction {
    pub fn of(value: i32) -> Option<Self> {
        [Self::Sum, Self::Prod, Self::Max, Self::Min, Self::Avg].get(usize::try_from(value).ok()?).copied()
    }
}

macro_rules! native {
    ($type:ty, $op:expr, $inputs:expr, $sum:expr, $prod:expr, $div:expr) => {{
        let get = |bytes: &[u8], i: usize| -> $type {
            const SIZE: usize = size_of::<$type>();
            let mut word = [0u8; SIZE];
            word.copy_from_slice(&bytes[i * SIZE..][..SIZE]);
            <$type>::from_le_bytes(word)
        };
        let combine: fn($type, $type) -> $type = match $op {
            Reduction::Sum | Reduction::Avg => $sum,
            Reduction::Prod => $prod,
            Reduction::Max => |a, b| a.max(b),
            Reduction::Min => |a, b| a.min(b),
        };
        let ranks = $inputs.len();
        let mut out = Vec::with_capacity($inputs[0].len());
        for i in 0..$inputs[0].len() / size_of::<$type>() {
            let all = $inputs[1..].iter().fold(get($inputs[0], i), |acc, input| combine(acc, get(input, i)));
            let divide: fn($type, usize) -> $type = $div;
            let result = if $op == Reduction::Avg { divide(all, ranks) } else { all };
            out.extend_from_slice(&result.to_le_bytes());
        }
        out
    }};
}

macro_rules! integer {
    ($type:ty, $op:expr, $inputs:expr) => {
        native!($type, $op, $inputs, |a, b| a.wrapping_add(b), |a, b| a.wrapping_mul(b), |a, n| {
            // More ranks than an i8 counts: the wide type divides.
            (i128::from(a) / n as i128) as $type
        })
    };
}

/// All ranks' contributions, of equal length, into one.
pub fn reduce(dtype: DType, op: Reduction, inputs: &[&[u8]]) -> Vec<u8> {
    match dtype {
        DType::I8 => integer!(i8, op, inputs),
        DType::U8 => integer!(u8, op, inputs),
        DType::I32 => integer!(i32, op, inputs),
        DType::U32 => integer!(u32, op, inputs),
        DType::I64 => integer!(i64, op, inputs),
        DType::U64 => integer!(u64, op, inputs),
        DType::F32 => native!(f32, op, inputs, |a, b| a + b, |a, b| a * b, |a, n| a / n as f32),
        DType::F64 => native!(f64, op, inputs, |a, b| a + b, |a, b| a * b, |a, n| a / n as f64),
        DType::F16 | DType::Bf16 | DType::E4m3 | DType::E5m2 => {
            let wide: Vec<Vec<u8>> = inputs.iter().map(|input| widen(dtype, input)).collect();
            let wide: Vec<&[u8]> = wide.iter().map(Vec::as_slice).collect();
            narrow(dtype, &reduce(DType::F32, op, &wide))
        }
    }
}

/// Each element times the scalar, in the element's type.
pub fn scale(dtype: DType, bytes: &[u8], scalar: &[u8]) -> Vec<u8> {
    let repeated = scalar.repeat(bytes.len() / dtype.size().max(1));
    reduce(dtype, Reduction::Prod, &[bytes, &repeated])
}

fn widen(dtype: DType, bytes: &[u8]) -> Vec<u8> {
    let pairs = || bytes.chunks_exact(2).map(|pair| [pair[0], pair[1]]);
    let floats: Vec<f32> = match dtype {
        DType::F16 => pairs().map(|pair| f16::from_le_bytes(pair).to_f32()).collect(),
        DType::Bf16 => pairs().map(|pair| bf16::from_le_bytes(pair).to_f32()).collect(),
        _ => bytes.iter().map(|byte| Small::of(dtype).decode(*byte)).collect(),
    };
    floats.iter().flat_map(|float| float.to_le_bytes()).collect()
}

fn narrow(dtype: DType, bytes: &[u8]) -> Vec<u8> {
    let floats = bytes.chunks_exact(4).map(|word| f32::from_le_bytes([word[0], word[1], word[2], word[3]]));
    match dtype {
        DType::F16 => floats.flat_map(|float| f16::from_f32(float).to_le_bytes()).collect(),
        DType::Bf16 => floats.flat_map(|float| bf16::from_f32(float).to_le_bytes()).collect(),
        _ => floats.map(|float| Small::of(dtype).encode(float)).collect(),
    }
}

/// A float of 8 bits: the values of the non-negative codes, in order.
struct Small {
    finite: Vec<f32>,
    nan: u8,
    infinity: Option<u8>,
}

impl Small {
    fn of(dtype: DType) -> &'static Self {
        static E4M3: OnceLock<Small> = OnceLock::new();
        static E5M2: OnceLock<Small> = OnceLock::new();
        match dtype {
            // No infinity; the last code is NaN.
            DType::E4m3 => E4M3.get_or_init(|| Self::new(3, 7, 0x7f, 0x7f, None)),
            _ => E5M2.get_or_init(|| Self::new(2, 15, 0x7c, 0x7f, Some(0x7c))),
        }
    }

    fn new(mantissa_bits: u8, bias: i32, codes: u8, nan: u8, infinity: Option<u8>) -> Self {
        let value = |code: u8| {
            let exponent = i32::from(code >> mantissa_bits);
            let mantissa = f32::from(code & ((1 << mantissa_bits) - 1)) / f32::from(1u8 << mantissa_bits);
            let (whole, power) = if exponent == 0 { (0.0, 1 - bias) } else { (1.0, exponent - bias) };
            (whole + mantissa) * 2f32.powi(power)
        };
        Self { finite: (0..codes).map(value).collect(), nan, infinity }
    }

    fn decode(&self, byte: u8) -> f32 {
        let code = byte & 0x7f;
        let magnitude = match self.finite.get(usize::from(code)) {
            Some(value) => *value,
            None if self.infinity == Some(code) => f32::INFINITY,
            None => f32::NAN,
        };
        if byte & 0x80 == 0 { magnitude } else { -magnitude }
    }

    /// To nearest, ties to even; beyond the largest: the largest.
    fn encode(&self, float: f32) -> u8 {
        let sign = if float.is_sign_negative() { 0x80 } else { 0 };
        let magnitude = float.abs();
        if magnitude.is_nan() {
            return sign | self.nan;
        }
        let above = self.finite.partition_point(|value| *value < magnitude);
        let code = match (above, self.finite.get(above)) {
            (0, _) => 0,
            (_, None) => above - 1,
            (_, Some(high)) => {
                let (down, up) = (magnitude - self.finite[above - 1], high - magnitude);
                if down < up || down == up && above % 2 == 1 { above - 1 } else { above }
            }
        };
        sign | code as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_floats_know_their_landmarks() {
        let (e4m3, e5m2) = (Small::of(DType::E4m3), Small::of(DType::E5m2));
        assert_eq!((e4m3.decode(0x38), e5m2.decode(0x3c)), (1.0, 1.0));
        assert_eq!((e4m3.decode(0x7e), e5m2.decode(0x7b)), (448.0, 57344.0));
        assert_eq!((e4m3.decode(0x01), e5m2.decode(0x01)), (2f32.powi(-9), 2f32.powi(-16)));
        assert!(e4m3.decode(0x7f).is_nan() && e5m2.decode(0x7c).is_infinite() && e5m2.decode(0xfd).is_nan());
        // Saturating, ties to even.
        assert_eq!((e4m3.encode(1e9), e4m3.encode(-1e9)), (0x7e, 0xfe));
        assert_eq!(e4m3.decode(e4m3.encode(1.0625)), 1.0);
        assert_eq!(e4m3.decode(e4m3.encode(1.1875)), 1.25);
    }

    #[test]
    fn small_floats_survive_the_way_there_and_back() {
        for dtype in [DType::E4m3, DType::E5m2] {
            let small = Small::of(dtype);
            for byte in 0..=255u8 {
                let value = small.decode(byte);
                if value.is_finite() {
                    assert_eq!(small.encode(value), byte, "{dtype:?} {byte:#x}");
                }
            }
        }
    }

    #[test]
    fn every_type_adds() {
        let one = [
            (DType::I8, vec![1u8]),
            (DType::U8, vec![1]),
            (DType::I32, 1i32.to_le_bytes().to_vec()),
            (DType::U32, 1u32.to_le_bytes().to_vec()),
            (DType::I64, 1i64.to_le_bytes().to_vec()),
            (DType::U64, 1u64.to_le_bytes().to_vec()),
            (DType::F16, f16::ONE.to_le_bytes().to_vec()),
            (DType::F32, 1f32.to_le_bytes().to_vec()),
            (DType::F64, 1f64.to_le_bytes().to_vec()),
            (DType::Bf16, bf16::ONE.to_le_bytes().to_vec()),
            (DType::E4m3, vec![0x38]),
            (DType::E5m2, vec![0x3c]),
        ];
        for (dtype, one) in &one {
            assert_eq!(one.len(), dtype.size());
            let inputs = [one.as_slice(); 4];
            assert_ne!(&reduce(*dtype, Reduction::Sum, &inputs), one, "{dtype:?}");
            for op in [Reduction::Prod, Reduction::Max, Reduction::Min, Reduction::Avg] {
                assert_eq!(&reduce(*dtype, op, &inputs), one, "{dtype:?} {op:?}");
            }
            let two = reduce(*dtype, Reduction::Sum, &inputs[..2]);
            assert_eq!(scale(*dtype, &two, &two), reduce(*dtype, Reduction::Sum, &inputs), "{dtype:?}");
        }
    }

    #[test]
    fn averages_of_integers_round_to_zero() {
        let inputs: [&[u8]; 2] = [&(-5i32).to_le_bytes(), &0i32.to_le_bytes()];
        assert_eq!(reduce(DType::I32, Reduction::Avg, &inputs), (-2i32).to_le_bytes());
    }
}
