//! What one step of a reduction does to two accumulators.

/// A reduction over accumulators of type `A`.
pub trait Op<A> {
    fn apply(a: A, b: A) -> A;
}

pub struct Sum;
pub struct Product;
pub struct Min;
pub struct Max;
pub struct And;
pub struct Or;
pub struct Xor;

macro_rules! integers {
    ($($t:ty),*) => {$(
        impl Op<$t> for Sum {
            #[inline(always)]
            fn apply(a: $t, b: $t) -> $t {
                a.wrapping_add(b)
            }
        }
        impl Op<$t> for Product {
            #[inline(always)]
            fn apply(a: $t, b: $t) -> $t {
                a.wrapping_mul(b)
            }
        }
        impl Op<$t> for Min {
            #[inline(always)]
            fn apply(a: $t, b: $t) -> $t {
                a.min(b)
            }
        }
        impl Op<$t> for Max {
            #[inline(always)]
            fn apply(a: $t, b: $t) -> $t {
                a.max(b)
            }
        }
        impl Op<$t> for And {
            #[inline(always)]
            fn apply(a: $t, b: $t) -> $t {
                a & b
            }
        }
        impl Op<$t> for Or {
            #[inline(always)]
            fn apply(a: $t, b: $t) -> $t {
                a | b
            }
        }
        impl Op<$t> for Xor {
            #[inline(always)]
            fn apply(a: $t, b: $t) -> $t {
                a ^ b
            }
        }
    )*};
}
integers!(u8, i8, i16, i32, i64);

macro_rules! floats {
    ($($t:ty),*) => {$(
        impl Op<$t> for Sum {
            #[inline(always)]
            fn apply(a: $t, b: $t) -> $t {
                a + b
            }
        }
        impl Op<$t> for Product {
            #[inline(always)]
            fn apply(a: $t, b: $t) -> $t {
                a * b
            }
        }
        // Equal numbers have equal bits unless they are zeros: or-ing keeps a minus, and-ing drops it (K4).
        // When `b` is the NaN, both comparisons fail and it is the one left.
        impl Op<$t> for Min {
            #[inline(always)]
            fn apply(a: $t, b: $t) -> $t {
                let less = if a < b { a } else { b };
                let number = if a == b { <$t>::from_bits(a.to_bits() | b.to_bits()) } else { less };
                if a.is_nan() { a } else { number }
            }
        }
        impl Op<$t> for Max {
            #[inline(always)]
            fn apply(a: $t, b: $t) -> $t {
                let more = if a > b { a } else { b };
                let number = if a == b { <$t>::from_bits(a.to_bits() & b.to_bits()) } else { more };
                if a.is_nan() { a } else { number }
            }
        }
    )*};
}
floats!(f32, f64);
