//! The bounds of an all_reduce of private memory through slots. What the link between two cores gives: each of two threads fills
//! slots and reads the other's, and does nothing else, once in slots of its own and once in slots that they swap
//! (docs/adr/0018); a rank must give S bytes, or S/2 twice, and take as many. And what private memory gives: each thread reads S
//! bytes that it has written before into a slot, as a rank must too. A core has so many lines under way at a time, wherever they
//! come from, so the two times are taken to add up.
//!
//! `cargo bench -p smddp-shm --bench links`

#![allow(clippy::unwrap_used, reason = "a measurement that fails says where")]

use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use smddp_core::Region;
use smddp_shm::Geometry;

const SIZES: [usize; 5] = [256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20];
const RING: Geometry = Geometry::USUAL;
/// Of the measurements of a size; the fastest counts.
const ROUNDS: usize = 40;
/// Read data goes to so small a place that it stays in the first cache.
const BLOCK: usize = 4096;

/// Whether a thread fills the same slots again, or those that it has read.
#[derive(Clone, Copy)]
enum Slots {
    Own,
    Swapped,
}

/// A thread's slots, and how many it has filled and read of the other's, on lines of their own.
#[repr(align(128))]
#[derive(Default)]
struct Count(AtomicU64);

struct Side {
    slots: Region,
    /// Holds what `slots` points to.
    _memory: Vec<u8>,
    filled: Count,
    read: Count,
}

impl Side {
    fn new() -> Side {
        let mut memory = vec![0u8; RING.slot * RING.slots];
        // SAFETY: the vector stays with the region and is used through it alone; the counts keep writer and reader apart.
        let slots = unsafe { Region::of(&mut memory) };
        Side { slots, _memory: memory, filled: Count::default(), read: Count::default() }
    }

    fn slot(&self, number: u64) -> Region {
        self.slots.slice((number % RING.slots as u64) as usize * RING.slot, RING.slot)
    }
}

fn wait(count: &Count, least: u64) {
    while count.0.load(Ordering::Acquire) < least {
        std::hint::spin_loop();
    }
}

/// The two threads as one of them sees them.
struct Link<'a> {
    own: &'a Side,
    other: &'a Side,
    slots: Slots,
}

impl Link<'_> {
    /// The memory of the slot that this thread (or the other) fills as its `number`.
    fn slot(&self, is_own: bool, number: u64) -> Region {
        let is_swapped = matches!(self.slots, Slots::Swapped) && number / RING.slots as u64 % 2 == 1;
        if is_own == is_swapped { self.other.slot(number) } else { self.own.slot(number) }
    }

    /// Moves `bytes` each way, in slots from number `first` on; true when everything read was what was written.
    fn exchange(&self, bytes: usize, first: u64) -> bool {
        let pieces = bytes.div_ceil(RING.slot) as u64;
        let len = bytes.min(RING.slot);
        let mut block = [0u8; BLOCK];
        let (mut filled, mut right) = (0, true);
        for piece in 0..pieces {
            // One ahead, so that the other need not wait.
            while filled < pieces && filled <= piece + 1 {
                let number = first + filled;
                wait(&self.other.read, (number + 1).saturating_sub(RING.slots as u64));
                let slot = self.slot(true, number).slice(0, len);
                // SAFETY: the slot's bytes, for which the other thread has no more use.
                unsafe { std::ptr::write_bytes(slot.as_ptr(), number as u8, len) };
                self.own.filled.0.store(number + 1, Ordering::Release);
                filled += 1;
            }
            let number = first + piece;
            wait(&self.other.filled, number + 1);
            for at in (0..len).step_by(BLOCK) {
                // SAFETY: the block lives through the copy.
                unsafe { Region::of(&mut block) }.copy_from(self.slot(false, number).slice(at, BLOCK));
                right &= std::hint::black_box(&block)[at / BLOCK % BLOCK] == number as u8;
            }
            self.own.read.0.store(number + 1, Ordering::Release);
        }
        right
    }

    /// Fastest microseconds of one thread for each size.
    fn run(&self, together: &Barrier) -> Vec<f64> {
        let mut first = 0;
        let mut measure = |bytes: usize| {
            together.wait();
            let start = Instant::now();
            assert!(self.exchange(bytes, first), "what was read is not what was written");
            first += bytes.div_ceil(RING.slot) as u64;
            start.elapsed().as_secs_f64() * 1e6
        };
        let mut fastest = |bytes: usize| (0..ROUNDS).map(|_| measure(bytes)).fold(f64::INFINITY, f64::min);
        SIZES.iter().map(|&bytes| fastest(bytes)).collect()
    }
}

/// What the slower of two threads takes for each size.
fn slower(peer: impl FnOnce() -> Vec<f64> + Send, mine: impl FnOnce() -> Vec<f64>) -> Vec<f64> {
    std::thread::scope(|scope| {
        let peer = scope.spawn(peer);
        mine().into_iter().zip(peer.join().unwrap()).map(|(x, y)| x.max(y)).collect()
    })
}

fn link(slots: Slots) -> Vec<f64> {
    let (a, b, together) = (Side::new(), Side::new(), Barrier::new(2));
    slower(
        || Link { own: &b, other: &a, slots }.run(&together),
        || Link { own: &a, other: &b, slots }.run(&together),
    )
}

fn private() -> Vec<f64> {
    let together = Barrier::new(2);
    slower(|| read_own(&together), || read_own(&together))
}

/// Fastest microseconds for each size that a thread needs to read its own memory, written before, while another does so too.
fn read_own(together: &Barrier) -> Vec<f64> {
    let (mut memory, mut slot) = (vec![0u8; SIZES[SIZES.len() - 1]], vec![0u8; RING.slot]);
    let mut fastest = |bytes: usize| {
        let measure = |round: usize| {
            memory[..bytes].fill(round as u8);
            together.wait();
            let start = Instant::now();
            for piece in memory[..bytes].chunks(RING.slot) {
                slot[..piece.len()].copy_from_slice(std::hint::black_box(piece));
                std::hint::black_box(&slot);
            }
            start.elapsed().as_secs_f64() * 1e6
        };
        (0..ROUNDS).map(measure).fold(f64::INFINITY, f64::min)
    };
    SIZES.iter().map(|&bytes| fastest(bytes)).collect()
}

fn main() {
    let columns = [link(Slots::Own), link(Slots::Swapped), private()];
    println!(
        "{:>10} {:>14} {:>14} {:>14} {:>17}",
        "us (GB/s)", "own", "swapped", "private", "swapped + private"
    );
    for (at, bytes) in SIZES.into_iter().enumerate() {
        let [own, swapped, private] = columns.each_ref().map(|times| times[at]);
        let cell = |time: f64| format!("{time:.0} ({:.1})", bytes as f64 / time / 1e3);
        println!(
            "{bytes:>10} {:>14} {:>14} {:>14} {:>17}",
            cell(own),
            cell(swapped),
            cell(private),
            cell(swapped + private)
        );
    }
}
