//! Large reductions over several cores. Elements are independent, so bits do not depend on how they are split (K1).

use std::ops::Range;
use std::sync::OnceLock;

use rayon::prelude::*;

/// Below this many bytes of result, waking other threads costs more than it saves.
const THRESHOLD: usize = 4 << 20;

/// Bytes of result given to a thread at a time.
const PIECE: usize = 512 << 10;

static POOL: OnceLock<Option<rayon::ThreadPool>> = OnceLock::new();

/// Says how many cores this rank may use for large reductions; the first call counts. Without it, and with 1, they
/// run on the caller's thread: cores a process may run on are usually shared with the node's other ranks, so only
/// who knows the node's shape can tell.
pub fn use_threads(cores: usize) {
    POOL.get_or_init(|| {
        if cores < 2 {
            return None;
        }
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(cores)
            .thread_name(|i| format!("smddp-reduce-{i}"))
            .build();
        pool.inspect_err(|e| tracing::warn!("no threads for large reductions, using one: {e}")).ok()
    });
}

/// Calls `work` with ranges that together are `0..count`, on several threads when it is worth it.
pub fn split(count: usize, element: usize, work: impl Fn(Range<usize>) + Sync) {
    match POOL.get() {
        Some(Some(pool)) if count * element >= THRESHOLD => {
            let piece = PIECE / element;
            pool.install(|| {
                (0..count.div_ceil(piece))
                    .into_par_iter()
                    .for_each(|i| work(i * piece..count.min((i + 1) * piece)));
            });
        }
        _ => work(0..count),
    }
}
