//! How a time is taken.
//!
//! Fresh data is checked first, and once more behind all timed calls: what goes wrong may do so late. Between, batches, of about a millisecond unless told otherwise, of back-to-back calls on zeros; each batch starts
//! behind a barrier, and its time is that of the slowest rank. With `--fresh` every call has inputs written just before it:
//! data that nobody writes between calls ends up in the reader's cache, as no real program's does. Such calls begin at a
//! moment that the ranks of a node agree on, since a barrier lets go of one rank before another, by up to a third of a small
//! call; on several nodes, whose clocks differ, they begin behind a barrier all the same. With `--used` the time includes that
//! each rank looks at its result: a call may be fast by leaving that in another core's cache. The figures are the median batch
//! and the fastest one: on a machine shared with others only the fastest tells what the library can do.

use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use smddp::{Collective, Communicator, DType, ReduceOp, Result};

use crate::row::Row;
use crate::workload::{Kind, Sample, Workload, shape};

/// How long to measure one size, in seconds.
#[derive(Clone, Copy)]
pub struct Effort {
    pub budget: f64,
    /// The length that batches are to have.
    pub batch: f64,
}

/// So long before it begins ranks agree on when a call does.
const NOTICE: Duration = Duration::from_micros(10);
/// Bounds of the number of calls in a batch, and of the number of batches.
const CALLS: (usize, usize) = (1, 20_000);
const BATCHES: (usize, usize) = (7, 401);

/// Measures one size. `Ok(None)` when the size holds no whole element or block.
pub fn measure(
    comm: &Communicator,
    kind: Kind,
    dtype: DType,
    bytes: usize,
    effort: Effort,
) -> Result<Option<Row>> {
    let Some((count, block)) = shape(kind.collective, dtype, bytes, comm.size()) else { return Ok(None) };
    let times = match dtype {
        DType::Bool => timed::<bool>(comm, kind, count, block, effort),
        DType::U8 => timed::<u8>(comm, kind, count, block, effort),
        DType::I8 => timed::<i8>(comm, kind, count, block, effort),
        DType::I16 => timed::<i16>(comm, kind, count, block, effort),
        DType::I32 => timed::<i32>(comm, kind, count, block, effort),
        DType::I64 => timed::<i64>(comm, kind, count, block, effort),
        DType::F16 => timed::<half::f16>(comm, kind, count, block, effort),
        DType::BF16 => timed::<half::bf16>(comm, kind, count, block, effort),
        DType::F32 => timed::<f32>(comm, kind, count, block, effort),
        DType::F64 => timed::<f64>(comm, kind, count, block, effort),
    }?;
    Ok(Some(Row {
        collective: kind.collective,
        dtype,
        op: kind.op,
        root: kind.root,
        world: comm.size(),
        bytes: count * dtype.size(),
        count,
        calls: times.calls,
        median: times.median,
        fastest: times.fastest,
        right: (kind.collective != Collective::Barrier).then_some(times.right),
        algorithm: times.algorithm,
        device: None,
    }))
}

struct Times {
    calls: usize,
    median: f64,
    fastest: f64,
    right: bool,
    algorithm: String,
}

fn timed<T: Sample>(
    comm: &Communicator,
    kind: Kind,
    count: usize,
    block: usize,
    effort: Effort,
) -> Result<Times> {
    let mut work = Workload::<T>::new(comm, kind, count, block)?;
    let first = checked(&mut work)?;
    // Messages have none.
    let is_message = kind.collective == Collective::SendRecv;
    let algorithm = if is_message { "-".to_owned() } else { comm.last_algorithm() };
    work.clear();

    for _ in 0..3 {
        work.call()?;
    }
    let estimate = slowest(comm, &mut [batch(comm, &mut work, 2)?])?;
    let between = if kind.fresh { NOTICE.as_secs_f64() } else { 0.0 };
    let (calls, batches) = repetitions(estimate + between, effort);
    let mut times = vec![0.0; batches];
    for time in &mut times {
        *time = batch(comm, &mut work, calls)?;
    }
    slowest(comm, &mut times)?;
    let last = checked(&mut work)?;
    times.sort_by(f64::total_cmp);
    Ok(Times {
        calls: calls * batches,
        median: times[batches / 2],
        fastest: times[0],
        right: all_right(comm, first && last)?,
        algorithm,
    })
}

/// Makes a call on fresh data: whether its result on this rank is right.
fn checked<T: Sample>(work: &mut Workload<'_, T>) -> Result<bool> {
    work.fill();
    work.call()?;
    Ok(work.check())
}

pub fn all_right(comm: &Communicator, mine: bool) -> Result<bool> {
    let mut all = [i32::from(mine)];
    comm.all_reduce(&mut all, ReduceOp::Min)?;
    Ok(all == [1])
}

/// Seconds a call on this rank, over `calls` calls behind a barrier; with fresh inputs, each call begins as [`begin`] says.
fn batch<T: Sample>(comm: &Communicator, work: &mut Workload<'_, T>, calls: usize) -> Result<f64> {
    if work.kind().fresh {
        let mut sum = 0.0;
        for _ in 0..calls {
            work.renew();
            let start = begin(comm)?;
            work.call()?;
            if work.kind().used {
                work.read_result();
            }
            sum += (nanos() - start) as f64 * 1e-9;
        }
        return Ok(sum / calls as f64);
    }
    comm.barrier()?;
    let start = Instant::now();
    for _ in 0..calls {
        work.call()?;
    }
    Ok(start.elapsed().as_secs_f64() / calls as f64)
}

/// Meets the other ranks; when all of them begin, in nanoseconds of this node's clock.
fn begin(comm: &Communicator) -> Result<i64> {
    comm.barrier()?;
    if comm.shape().node_count() > 1 {
        return Ok(nanos());
    }
    let notice = NOTICE.as_nanos() as i64;
    let mut start = [nanos() + notice];
    comm.broadcast(&mut start, 0)?;
    // More than that is left only where the ranks' clocks differ.
    while (1..=notice).contains(&(start[0] - nanos())) {
        std::hint::spin_loop();
    }
    Ok(start[0])
}

/// Of the clock that all processes of a machine read alike, and that nobody sets.
fn nanos() -> i64 {
    let time = clock_gettime(ClockId::Monotonic);
    time.tv_sec * 1_000_000_000 + time.tv_nsec
}

/// Replaces every time by the slowest rank's; returns the first.
pub fn slowest(comm: &Communicator, times: &mut [f64]) -> Result<f64> {
    comm.all_reduce(times, ReduceOp::Max)?;
    Ok(times[0])
}

/// Calls in a batch and batches, for a call that takes about `estimate` seconds.
pub fn repetitions(estimate: f64, effort: Effort) -> (usize, usize) {
    let estimate = estimate.max(1e-9);
    let calls = ((effort.batch / estimate) as usize).clamp(CALLS.0, CALLS.1);
    let batches = ((effort.budget / (estimate * calls as f64)) as usize).clamp(BATCHES.0, BATCHES.1);
    (calls, batches)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_last_as_long_as_asked_and_fit_the_budget() {
        let of = |estimate, budget, batch| repetitions(estimate, Effort { budget, batch });
        assert_eq!(of(1e-6, 0.06, 0.001), (1000, 60));
        assert_eq!(of(1e-6, 0.06, 0.005), (5000, 12));
        assert_eq!(of(1e-9, 0.3, 0.001), (20_000, 401));
        assert_eq!(of(2.0, 0.3, 0.001), (1, 7));
        assert_eq!(of(0.0, 0.3, 0.001), (20_000, 401));
    }
}
