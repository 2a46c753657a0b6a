//! Where data may be divided, and the share of it that each rank gets where all of them get one.

/// Cuts and shares fall on cache lines of the data.
pub(crate) const CUT_ALIGN: usize = 64;

/// Start and length of the share of `rank` among `ranks` of `len` bytes: as long as others', but at the end.
pub(crate) fn share(len: usize, ranks: usize, rank: usize) -> (usize, usize) {
    let step = len.div_ceil(ranks).next_multiple_of(CUT_ALIGN);
    let start = len.min(step * rank);
    (start, step.min(len - start))
}
