//! Large pieces of work on memory, on several cores of a rank that owns several.
//!
//! The caller does its share, so that nothing waits for a thread to wake up before it begins, and takes what sleepy threads
//! leave. Which thread does what changes no bits: the pieces are apart, and their bounds depend on lengths alone.

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::process;

/// Bytes below which waking other threads costs more than it saves (docs/performance-log.md).
pub const WORTH: usize = 1 << 20;

/// Bytes that a thread takes at a time: whole cache lines, and whole strips of any kernel.
const PIECE: usize = 64 << 10;

/// The caller's thread among them.
static THREADS: AtomicUsize = AtomicUsize::new(1);

/// The threads beside the callers', from the first large piece of work on, and whose they are: a forked child has none of them.
static POOL: OnceLock<Pool> = OnceLock::new();

struct Pool {
    process: u32,
    /// None where there could be none.
    threads: Option<ThreadPool>,
}

/// Says on how many threads, the caller's among them, large work is done from now on: 1 until said otherwise. Cores are
/// shared with the node's other ranks, so only who knows the node's shape can tell. Threads are started when they are
/// first needed, as many as are wanted then; later there can be fewer at work, not more.
pub fn use_threads(threads: usize) {
    THREADS.store(threads.max(1), Ordering::Relaxed);
}

/// On how many threads, the caller's among them, [`split`] does what is large.
pub fn in_use() -> usize {
    THREADS.load(Ordering::Relaxed)
}

/// Calls `work` with ranges that together are `0..bytes`, on several threads when there are some and it is worth it.
/// Ranges begin at multiples of 64 KiB.
pub fn split(bytes: usize, work: impl Fn(Range<usize>) + Sync) {
    if bytes < WORTH {
        return work(0..bytes);
    }
    let threads = in_use();
    match pool(threads) {
        Some(pool) => share_out(pool, threads, bytes, &work),
        None => work(0..bytes),
    }
}

fn pool(threads: usize) -> Option<&'static ThreadPool> {
    if threads < 2 {
        return None;
    }
    let start = || {
        let builder = ThreadPoolBuilder::new().num_threads(threads - 1);
        let pool = builder.thread_name(|i| format!("smddp-reduce-{i}")).build();
        let pool = pool.inspect_err(|e| tracing::warn!("no threads for large reductions, using one: {e}"));
        Pool { process: process::id(), threads: pool.ok() }
    };
    let pool = POOL.get_or_init(start);
    if pool.process == process::id() { pool.threads.as_ref() } else { None }
}

/// The caller and `threads - 1` others take a piece at a time until none are left.
fn share_out(pool: &ThreadPool, threads: usize, bytes: usize, work: &(impl Fn(Range<usize>) + Sync)) {
    let next = AtomicUsize::new(0);
    let take = || {
        loop {
            let start = next.fetch_add(PIECE, Ordering::Relaxed);
            if start >= bytes {
                return;
            }
            work(start..bytes.min(start + PIECE));
        }
    };
    pool.in_place_scope(|scope| {
        (1..threads).for_each(|_| scope.spawn(|_| take()));
        take();
    });
}

/// Held by tests that change the number of threads, which is the process's.
#[cfg(test)]
pub(crate) static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::sync::{Barrier, Mutex};

    #[test]
    fn threads_work_at_once_and_cover_everything_once() {
        let _alone = ALONE.lock().unwrap();
        for threads in [1, 3, 2] {
            use_threads(threads);
            for bytes in [0, 1, WORTH - 1, WORTH, (9 << 20) + 17] {
                let seen = Mutex::new(Vec::new());
                split(bytes, |range| seen.lock().unwrap().push(range));
                let mut seen = seen.into_inner().unwrap();
                seen.sort_by_key(|r| r.start);
                assert_eq!(seen.len() > 1, bytes >= WORTH && threads > 1);
                assert!(seen.windows(2).all(|w| w[0].end == w[1].start));
                assert!(seen.iter().all(|r| r.start % PIECE == 0));
                assert_eq!((seen[0].start, seen[seen.len() - 1].end), (0, bytes));
            }
            // Each waits in its first piece until all have one: ends only with so many threads at work.
            let (all, who) = (Barrier::new(threads), Mutex::new(HashSet::new()));
            split(WORTH, |_| {
                if who.lock().unwrap().insert(std::thread::current().id()) {
                    all.wait();
                }
            });
            let who = who.into_inner().unwrap();
            assert_eq!(who.len(), threads);
            assert!(who.contains(&std::thread::current().id()));
        }
        use_threads(1);
    }

    unsafe extern "C" {
        fn fork() -> i32;
        fn alarm(seconds: u32) -> u32;
        fn waitpid(pid: i32, status: *mut i32, options: i32) -> i32;
        fn _exit(status: i32) -> !;
    }

    /// The child has the pool's memory, and none of its threads.
    #[test]
    fn a_forked_child_works_alone() {
        let _alone = ALONE.lock().unwrap();
        use_threads(2);
        split(WORTH, |_| ());
        // SAFETY: the child calls nothing that another thread of the parent may have held a lock of.
        let child = unsafe { fork() };
        if child == 0 {
            // SAFETY: ends the child if it waits for ever.
            unsafe { alarm(20) };
            let done = AtomicUsize::new(0);
            split(WORTH, |range| {
                done.fetch_add(range.len(), Ordering::Relaxed);
            });
            // SAFETY: nothing of the parent's is to be cleaned up.
            unsafe { _exit(i32::from(done.into_inner() != WORTH)) };
        }
        let mut status = -1;
        // SAFETY: `status` outlives the call.
        assert_eq!(unsafe { waitpid(child, &raw mut status, 0) }, child);
        assert_eq!(status, 0);
        use_threads(1);
    }
}
