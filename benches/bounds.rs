//! What two cores allow: the least that calls of two ranks on ordinary tensors must do, without a library around it.
//!
//! - *link*: each thread fills slots and reads the other's, and does nothing else, in slots that they swap (docs/adr/0018). An
//!   all_reduce of S bytes must give and take as many.
//! - *private*: each thread copies S bytes that it has just written, as a rank must read its input. A core has so many lines under way
//!   at a time, wherever they come from, so that this and the link overlap in part only.
//! - *all_reduce*: the moves of a relay (docs/adr/0023) of data that was just written, between counters and nothing else.
//! - *direct*: the same where each thread can address the other's data, as tensors in shared memory allow: each sums its half of both
//!   and stores it to both.
//! - *broadcast*: one thread fills slots from data that it has just written, the other copies out of them.
//! - *all_gather*, *all_to_all*: two processes; each copies its own block, has the kernel copy the other's out of its memory, both just
//!   written, and ends when the other has its own. S bytes are what a rank has in the end.
//!
//! `cargo bench -p smddp-shm --bench bounds` prints microseconds of a call in the fastest batch of about 1 ms, as `smddp-perf` does;
//! with `-- --csv` as rows.

#![allow(clippy::unwrap_used, reason = "a measurement that fails says where")]

use std::sync::Barrier;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};
use std::time::Instant;

use smddp_core::Region;
use smddp_core::dtype::{DType, ReduceOp};
use smddp_core::order::Order;
use smddp_core::reduce::{Pass, Store, combine_and};
use smddp_core::transport::Arith;
use smddp_shm::Geometry;

const SIZES: [usize; 5] = [256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20];
const RING: Geometry = Geometry::USUAL;
const SLOTS: u64 = RING.slots as u64;
/// Of each size; the fastest counts.
const BATCHES: usize = 30;
/// Bytes of a batch's calls, about 1 ms.
const BATCH: usize = 8 << 20;
/// Bytes that the kernel copies at once, as it does for the library.
const AT_ONCE: usize = 1 << 20;
/// Read data goes to so small a place that it stays in the first cache.
const BLOCK: usize = 4096;
const SUM: Arith = Arith { dtype: DType::F32, op: ReduceOp::Sum, world: 2 };

/// Whether a thread fills the same slots again, or those that it has read.
#[derive(Clone, Copy, PartialEq)]
enum Slots {
    Own,
    Swapped,
}

/// What a thread does with its data.
#[derive(Clone, Copy)]
enum Work {
    Link,
    Private,
    AllReduce,
    Direct,
    Broadcast,
}

const WORKS: [(Work, &str); 5] = [
    (Work::Link, "link"),
    (Work::Private, "private"),
    (Work::AllReduce, "all_reduce"),
    (Work::Direct, "direct"),
    (Work::Broadcast, "broadcast"),
];

/// What two processes do whose data the kernel copies. Blocks that a rank brings: one for both, or one for each.
const EXCHANGES: [(usize, &str); 2] = [(1, "all_gather"), (2, "all_to_all")];

/// How many slots a thread has filled, and read of the other's, on lines of their own.
#[repr(align(128))]
#[derive(Default)]
struct Count(AtomicU64);

impl Count {
    fn wait(&self, least: u64) {
        while self.0.load(Ordering::Acquire) < least {
            std::hint::spin_loop();
        }
    }
}

struct Side {
    slots: Region,
    /// Holds what `slots` points to.
    _memory: Vec<u8>,
    filled: Count,
    read: Count,
    /// What its thread works with.
    data: AtomicPtr<f32>,
}

impl Side {
    fn new() -> Side {
        let mut memory = vec![0u8; RING.slot * RING.slots];
        // SAFETY: the vector stays with the region and is used through it alone; the counts keep writer and reader apart.
        let slots = unsafe { Region::of(&mut memory) };
        Side {
            slots,
            _memory: memory,
            filled: Count::default(),
            read: Count::default(),
            data: AtomicPtr::default(),
        }
    }

    fn slot(&self, number: u64) -> Region {
        self.slots.slice((number % SLOTS) as usize * RING.slot, RING.slot)
    }
}

/// One of two threads.
struct Rank<'a> {
    me: usize,
    own: &'a Side,
    other: &'a Side,
    slots: Slots,
    /// In which it reads the other's slots.
    order: Order,
    together: &'a Barrier,
    /// The number of the first slot of what it does next.
    first: u64,
}

impl Rank<'_> {
    /// The memory of the slot that this thread (or the other) fills as its `number`.
    fn slot(&self, is_own: bool, number: u64) -> Region {
        let is_swapped = self.slots == Slots::Swapped && number / SLOTS % 2 == 1;
        if is_own == is_swapped { self.other.slot(number) } else { self.own.slot(number) }
    }

    /// Fills this thread's slot `number` of this call with `fill`, where the other has read what was in it.
    fn fill(&self, number: u64, fill: impl FnOnce(Region)) {
        let number = self.first + number;
        if self.slots == Slots::Own {
            self.other.read.wait((number + 1).saturating_sub(SLOTS));
        }
        fill(self.slot(true, number));
        self.own.filled.0.store(number + 1, Ordering::Release);
    }

    /// Hands the other's slot `number` of this call to `take`.
    fn take(&self, number: u64, take: impl FnOnce(Region)) {
        let number = self.first + number;
        self.other.filled.wait(number + 1);
        take(self.slot(false, number));
        self.own.read.0.store(number + 1, Ordering::Release);
    }

    /// Moves `len` bytes each way.
    fn link(&mut self, len: usize) {
        let pieces = len.div_ceil(RING.slot) as u64;
        let len = len.min(RING.slot);
        let mut block = [0u8; BLOCK];
        let fill = |rank: &Self, piece: u64| {
            // SAFETY: the slot's bytes, for which the other thread has no more use.
            rank.fill(piece, |slot| unsafe { std::ptr::write_bytes(slot.as_ptr(), piece as u8, len) });
        };
        fill(self, 0);
        for piece in 0..pieces {
            // One ahead, so that the other need not wait.
            if piece + 1 < pieces {
                fill(self, piece + 1);
            }
            self.take(piece, |slot| {
                for at in (0..len).step_by(BLOCK) {
                    // SAFETY: the block lives through the copy.
                    unsafe { Region::of(&mut block) }.copy_from(slot.slice(at, BLOCK));
                    let read = std::hint::black_box(&block)[at / BLOCK % BLOCK];
                    assert_eq!(read, piece as u8, "what was read is not what was written");
                }
            });
        }
        self.first += pieces;
    }

    /// Copies `data` into this thread's slots, which nobody reads.
    fn private(&self, data: Region) {
        for at in (0..data.len()).step_by(RING.slot) {
            let piece = piece(data, at);
            self.own.slot((at / RING.slot) as u64).slice(0, piece.len()).copy_from(piece);
        }
    }

    /// Sums both threads' `data`, each half by one of them: pieces of the other's half go out, sums of this one's come back as they are
    /// stored, and the other's sums are copied in.
    fn all_reduce(&mut self, data: Region) {
        let half = data.len() / 2;
        let halves = [data.slice(0, half), data.slice(half, half)];
        let (mine, theirs) = (halves[self.me], halves[1 - self.me]);
        let pieces = half.div_ceil(RING.slot) as u64;
        let at = |piece: u64| piece as usize * RING.slot;
        // Gathers go one ahead of sums: g0 g1 s0 g2 s1 and so on.
        let gather = |piece: u64| (2 * piece).saturating_sub(1);
        let spread = |piece: u64| (2 * piece + 2).min(2 * pieces - 1);
        let give = |rank: &Self, number: u64| {
            let piece = piece(theirs, at(number));
            rank.fill(gather(number), |slot| slot.slice(0, piece.len()).copy_from(piece));
        };
        give(self, 0);
        for number in 0..pieces {
            if number + 1 < pieces {
                give(self, number + 1);
            }
            let (own, other) = (piece(mine, at(number)), piece(theirs, at(number)));
            self.take(gather(number), |came| {
                self.fill(spread(number), |slot| {
                    let store = Store::Twice(slot.slice(0, own.len()));
                    combine_and(
                        Pass { store, order: self.order },
                        SUM,
                        true,
                        own,
                        &[own, came.slice(0, own.len())],
                    );
                });
            });
            self.take(spread(number), |came| other.copy_in(self.order, came.slice(0, other.len())));
        }
        self.first += 2 * pieces;
    }

    /// Sums this thread's half of both threads' data, into both.
    fn direct(&self, data: Region) {
        let (half, other) = (data.len() / 2, self.other.data.load(Ordering::Acquire));
        // SAFETY: the other thread's data is as long, stays until both have met again, and each works on its own half.
        let theirs = unsafe { Region::new(other.cast(), data.len()) };
        let [own, other] = [data, theirs].map(|all| all.slice(self.me * half, half));
        for at in (0..half).step_by(RING.slot) {
            let (own, other) = (piece(own, at), piece(other, at));
            combine_and(
                Pass { store: Store::Twice(other), ..Pass::default() },
                SUM,
                true,
                own,
                &[own, other],
            );
        }
    }

    /// Thread 0's `data` to the other's.
    fn broadcast(&mut self, data: Region) {
        let pieces = data.len().div_ceil(RING.slot) as u64;
        for number in 0..pieces {
            let piece = piece(data, number as usize * RING.slot);
            if self.me == 0 {
                self.fill(number, |slot| slot.slice(0, piece.len()).copy_from(piece));
            } else {
                self.take(number, |slot| piece.copy_in(self.order, slot.slice(0, piece.len())));
            }
        }
        self.first += pieces;
    }

    /// Fastest microseconds of this thread for each size.
    fn run(&mut self, work: Work) -> Vec<f64> {
        let mut memory = vec![0f32; SIZES[SIZES.len() - 1] / size_of::<f32>()];
        let mut once = |rank: &mut Self, bytes: usize, round: usize| {
            let data = &mut memory[..bytes / size_of::<f32>()];
            data.fill((round + rank.me) as f32);
            // SAFETY: `memory` outlives the region, through which alone it is used meanwhile.
            let region = unsafe { Region::of(data) };
            rank.own.data.store(region.as_ptr().cast(), Ordering::Release);
            rank.together.wait();
            let start = Instant::now();
            match work {
                Work::Link => rank.link(bytes),
                Work::Private => rank.private(region),
                Work::AllReduce => rank.all_reduce(region),
                Work::Direct => rank.direct(region),
                Work::Broadcast => rank.broadcast(region),
            }
            let time = start.elapsed().as_secs_f64() * 1e6;
            rank.together.wait();
            let wanted = match work {
                Work::AllReduce | Work::Direct => 2 * round + 1,
                Work::Broadcast => round,
                Work::Link | Work::Private => round + rank.me,
            };
            assert!(data.iter().all(|&x| x == wanted as f32), "the result is wrong");
            time
        };
        let fastest = |bytes: usize| {
            let calls = BATCH.div_ceil(bytes);
            let mut batch = |_| (0..calls).map(|round| once(self, bytes, round)).sum::<f64>() / calls as f64;
            (0..BATCHES).map(&mut batch).fold(f64::INFINITY, f64::min)
        };
        SIZES.into_iter().map(fastest).collect()
    }
}

/// The slot's worth of `data` from `at` on.
fn piece(data: Region, at: usize) -> Region {
    data.slice(at, RING.slot.min(data.len() - at))
}

/// What the slower of two threads takes for each size, in the order that the CPU likes better.
fn measure(work: Work) -> Vec<f64> {
    let [straight, four_pages] = [Order::Straight, Order::FourPages].map(|order| measure_in(order, work));
    straight.into_iter().zip(four_pages).map(|(x, y)| x.min(y)).collect()
}

fn measure_in(order: Order, work: Work) -> Vec<f64> {
    // Who only gives does not read what it could write into next.
    let slots = if matches!(work, Work::Broadcast) { Slots::Own } else { Slots::Swapped };
    let (sides, together) = ([Side::new(), Side::new()], Barrier::new(2));
    let rank = |me: usize| {
        let (own, other) = (&sides[me], &sides[1 - me]);
        Rank { me, own, other, slots, order, together: &together, first: 0 }
    };
    std::thread::scope(|scope| {
        let peer = scope.spawn(|| rank(1).run(work));
        rank(0).run(work).into_iter().zip(peer.join().unwrap()).map(|(x, y)| x.max(y)).collect()
    })
}

/// What two processes tell one another, in memory that they share.
#[derive(Default)]
struct Told {
    /// Where each has its data.
    data: [AtomicU64; 2],
    /// How often each has been ready, and done with the other's data.
    ready: [Count; 2],
    done: [Count; 2],
    /// Nanoseconds of each, by size.
    times: [[AtomicU64; SIZES.len()]; 2],
}

impl Told {
    fn meet(&self, me: usize, counts: &[Count; 2], number: u64) {
        counts[me].0.store(number, Ordering::Release);
        counts[1 - me].wait(number);
    }

    /// Does and times what process `me` does; `peer` is the other.
    fn exchange(&self, me: usize, peer: libc::pid_t, brought: usize) {
        let longest = SIZES[SIZES.len() - 1] / size_of::<f32>();
        let (mut memory, mut results) = (vec![0f32; longest], vec![0f32; longest]);
        let mut number = 0;
        let mut once = |bytes: usize, round: usize| {
            let half = bytes / 2 / size_of::<f32>();
            let (data, result) = (&mut memory[..brought * half], &mut results[..2 * half]);
            data.fill((round + me) as f32);
            self.data[me].store(data.as_ptr() as u64, Ordering::Relaxed);
            number += 1;
            self.meet(me, &self.ready, number);
            let theirs = self.data[1 - me].load(Ordering::Relaxed) + ((brought - 1) * me * bytes / 2) as u64;
            let start = Instant::now();
            let (own, other) = (me * half, (1 - me) * half);
            result[own..own + half].copy_from_slice(&data[(brought - 1) * own..][..half]);
            for (at, place) in result[other..other + half].chunks_mut(AT_ONCE / size_of::<f32>()).enumerate()
            {
                read_by_kernel(peer, theirs + (at * AT_ONCE) as u64, place);
            }
            self.meet(me, &self.done, number);
            let time = start.elapsed().as_nanos() as u64;
            let is_right = |(from, block): (usize, &[f32])| block.iter().all(|&x| x == (round + from) as f32);
            assert!(result.chunks(half).enumerate().all(is_right), "the result is wrong");
            time
        };
        for (at, bytes) in SIZES.into_iter().enumerate() {
            let calls = BATCH.div_ceil(bytes);
            let mut batch = |_| (0..calls).map(|round| once(bytes, round)).sum::<u64>() / calls as u64;
            let fastest = (0..BATCHES).map(&mut batch).min().unwrap_or(0);
            self.times[me][at].store(fastest, Ordering::Release);
        }
    }
}

/// Has the kernel fill `place` from `from` on in the memory of process `pid`.
fn read_by_kernel(pid: libc::pid_t, from: u64, place: &mut [f32]) {
    let len = size_of_val(place);
    let local = libc::iovec { iov_base: place.as_mut_ptr().cast(), iov_len: len };
    let remote = libc::iovec { iov_base: from as *mut libc::c_void, iov_len: len };
    // SAFETY: `place` is this call's alone, and any bytes are floats; the kernel checks the other range itself.
    let came = unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) };
    assert_eq!(came, len as isize, "the kernel does not copy: {}", std::io::Error::last_os_error());
}

/// What the slower of two processes takes for each size.
fn measure_processes(brought: usize) -> Vec<f64> {
    let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping of nobody's memory.
    let page = unsafe { libc::mmap(std::ptr::null_mut(), size_of::<Told>(), access, kind, -1, 0) };
    assert_ne!(page, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
    // SAFETY: it is large enough, page-aligned, zero, which is valid, and stays.
    let told: &Told = unsafe { &*page.cast() };
    // SAFETY: this process has one thread now.
    let (parent, child) = unsafe { (libc::getpid(), libc::fork()) };
    assert!(child >= 0, "{}", std::io::Error::last_os_error());
    if child == 0 {
        // Else it would wait for ever for a parent that failed.
        // SAFETY: no memory is involved.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
        // The parent would wait for ever for one that failed.
        let ended = std::panic::catch_unwind(|| told.exchange(1, parent, brought));
        // SAFETY: nothing of the parent's is to be cleaned up here.
        unsafe { if ended.is_ok() { libc::_exit(0) } else { libc::kill(parent, libc::SIGTERM) } };
        std::process::abort();
    }
    told.exchange(0, child, brought);
    // SAFETY: its own child.
    unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
    let slower =
        |at: usize| told.times.iter().map(|times| times[at].load(Ordering::Acquire)).max().unwrap_or(0);
    (0..SIZES.len()).map(|at| slower(at) as f64 / 1e3).collect()
}

fn main() {
    // Some kernels let only a parent read its child's memory.
    // SAFETY: no memory is involved.
    unsafe { libc::prctl(libc::PR_SET_PTRACER, libc::PR_SET_PTRACER_ANY, 0, 0, 0) };
    let between_threads = WORKS.map(|(work, name)| (name, measure(work)));
    let between_processes = EXCHANGES.map(|(brought, name)| (name, measure_processes(brought)));
    let columns: Vec<_> = between_threads.into_iter().chain(between_processes).collect();
    if std::env::args().any(|arg| arg == "--csv") {
        for (name, times) in &columns {
            SIZES.iter().zip(times).for_each(|(bytes, time)| println!("{name},{bytes},{time:.2}"));
        }
        return;
    }
    let line = |size: &str, cells: Vec<String>| {
        let cells: Vec<_> = cells.iter().map(|cell| format!("{cell:>14}")).collect();
        println!("{size:>10} {}", cells.join(" "));
    };
    line("us (GB/s)", columns.iter().map(|(name, _)| (*name).to_owned()).collect());
    for (at, bytes) in SIZES.into_iter().enumerate() {
        let cell = |times: &Vec<f64>| format!("{:.0} ({:.1})", times[at], bytes as f64 / times[at] / 1e3);
        line(&bytes.to_string(), columns.iter().map(|(_, times)| cell(times)).collect());
    }
}
