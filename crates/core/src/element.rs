//! Rust types that can be elements of a buffer.

use crate::dtype::DType;

mod sealed {
    pub trait Sealed {}
}

/// A plain number of a dtype this library reduces.
pub trait Element: Copy + Send + 'static + sealed::Sealed {
    const DTYPE: DType;
}

macro_rules! elements {
    ($($t:ty => $d:ident),* $(,)?) => {$(
        impl sealed::Sealed for $t {}
        impl Element for $t { const DTYPE: DType = DType::$d; }
    )*};
}

elements! {
    bool => Bool, u8 => U8, i8 => I8, i16 => I16, i32 => I32, i64 => I64,
    half::f16 => F16, half::bf16 => BF16, f32 => F32, f64 => F64,
}
