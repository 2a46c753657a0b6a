//! Tensors whose memory holds the negatives of their elements (`torch._neg_view(x)`, `z.conj().imag`), which DLPack's C
//! functions describe as any others.

use std::ptr;
use std::sync::OnceLock;

use pyo3::intern;
use pyo3::prelude::*;

use crate::peek::read;

/// Where a tensor says so. Torch's own `is_neg` costs more than all else that is asked of a tensor, and lets other threads
/// have the interpreter in between.
///
/// A tensor of Python holds a pointer to that of C++, which has a set of keys in one word. Nobody promises where either
/// is: both are found by sets that torch tells, read in a way that cannot fault, and where they are not found torch is
/// asked.
struct Place {
    pointer_at: usize,
    keys_at: usize,
    /// The one key of negatives.
    bit: u64,
}

static PLACE: OnceLock<Place> = OnceLock::new();

/// Bytes of a C++ tensor that are looked at; it is not much longer.
const LOOKED_AT: usize = 256;
const WORD: usize = size_of::<u64>();

/// Tells tensors with their sets of keys, and the key of negatives; whether it is known from now on where they are.
#[pyfunction]
pub fn use_key_sets(samples: Vec<(Bound<'_, PyAny>, u64)>, bit: u64) -> PyResult<bool> {
    if PLACE.get().is_some() {
        return Ok(true);
    }
    let Some((first, _)) = samples.first() else { return Ok(false) };
    let length = first.get_type().getattr(intern!(first.py(), "__basicsize__"))?.extract::<usize>()?;
    let mut found: Option<Vec<(usize, usize)>> = None;
    for (tensor, keys) in &samples {
        if !tensor.get_type().is(first.get_type()) {
            return Ok(false);
        }
        let mut places = places_of(tensor, length, *keys);
        if let Some(before) = found {
            places.retain(|place| before.contains(place));
        }
        found = Some(places);
    }
    if let (Some(&[(pointer_at, keys_at)]), 1) = (found.as_deref(), bit.count_ones()) {
        let _ = PLACE.set(Place { pointer_at, keys_at, bit });
    }
    Ok(PLACE.get().is_some())
}

/// (offset in the object of a pointer, offset behind that) wherever this set of keys is; the object is `length` long.
fn places_of(tensor: &Bound<'_, PyAny>, length: usize, keys: u64) -> Vec<(usize, usize)> {
    let mut places = Vec::new();
    let header = size_of::<pyo3::ffi::PyObject>();
    for pointer_at in (header..length.saturating_sub(WORD - 1)).step_by(WORD) {
        // SAFETY: within the object, which is alive.
        let address =
            unsafe { tensor.as_ptr().cast::<u8>().add(pointer_at).cast::<usize>().read_unaligned() };
        let Some(bytes) = read::<LOOKED_AT>(address) else { continue };
        let words = bytes.chunks_exact(WORD).enumerate();
        places.extend(
            words.filter(|(_, word)| *word == keys.to_ne_bytes()).map(|(i, _)| (pointer_at, i * WORD)),
        );
    }
    places
}

/// Whether a tensor's memory holds the negatives of its elements.
///
/// # Safety
/// It is of exactly the class of the samples.
pub unsafe fn is_negative(tensor: &Bound<'_, PyAny>) -> bool {
    let Some(place) = PLACE.get() else { return torch_says_so(tensor) };
    // SAFETY: an object of the class in which the pointer was found, alive.
    let value =
        unsafe { tensor.as_ptr().cast::<u8>().add(place.pointer_at).cast::<usize>().read_unaligned() };
    let value = ptr::with_exposed_provenance::<u8>(value);
    // SAFETY: the C++ tensor, which lives as long as the object.
    value.is_null() || unsafe { value.add(place.keys_at).cast::<u64>().read_unaligned() } & place.bit != 0
}

#[cold]
fn torch_says_so(tensor: &Bound<'_, PyAny>) -> bool {
    let said = tensor.call_method0(intern!(tensor.py(), "is_neg"));
    said.and_then(|said| said.extract::<bool>()).unwrap_or(true)
}
