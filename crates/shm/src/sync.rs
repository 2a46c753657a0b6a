//! Atomics, fences and the futex: the machine's own, or loom's when the protocols are model-checked.
//!
//! Every ordering the protocols rely on is named here, so that a model can weaken one and show that it is needed.

#[cfg(not(loom))]
pub(crate) use real::*;

#[cfg(loom)]
pub(crate) use model::*;

#[cfg(not(loom))]
mod real {
    use std::time::Duration;

    use rustix::thread::{Timespec, futex};
    pub(crate) use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

    /// The store that hands a slot or cell to its reader.
    #[inline]
    pub(crate) fn publish_order() -> Ordering {
        Ordering::Release
    }
    /// The store that hands a slot or cell back to its writer.
    #[inline]
    pub(crate) fn recycle_order() -> Ordering {
        Ordering::Release
    }

    /// The count of a piece that was written into a peer's memory.
    #[inline]
    pub(crate) fn count_order() -> Ordering {
        Ordering::Release
    }
    /// The store that ends a deal: its giver has its memory back.
    #[inline]
    pub(crate) fn end_order() -> Ordering {
        Ordering::Release
    }
    /// The store that tells that a rank has left its group, behind all it did there.
    #[inline]
    pub(crate) fn leave_order() -> Ordering {
        Ordering::Release
    }

    /// Between "I am about to sleep" and the last look at what peers published.
    #[inline]
    pub(crate) fn arm_fence() {
        fence(Ordering::SeqCst);
    }

    /// Between publishing and the look at who sleeps.
    #[inline]
    pub(crate) fn notify_fence() {
        fence(Ordering::SeqCst);
    }

    /// Whether a changed hint is followed by another look.
    #[inline]
    pub(crate) fn look_again() -> bool {
        true
    }

    /// Between "I am inside" and the look at the door.
    #[inline]
    pub(crate) fn enter_fence() {
        fence(Ordering::SeqCst);
    }

    /// Between closing a door and the look at who is inside.
    #[inline]
    pub(crate) fn close_fence() {
        fence(Ordering::SeqCst);
    }

    /// Memory that one side writes and the other reads, never both at once.
    #[repr(transparent)]
    pub(crate) struct Cell<T>(std::cell::UnsafeCell<T>);

    impl<T> Cell<T> {
        #[inline]
        pub(crate) fn with<R>(&self, f: impl FnOnce(*const T) -> R) -> R {
            f(self.0.get())
        }

        #[inline]
        pub(crate) fn with_mut<R>(&self, f: impl FnOnce(*mut T) -> R) -> R {
            f(self.0.get())
        }
    }

    /// A futex word in shared memory; never process-private.
    #[repr(transparent)]
    pub(crate) struct Futex(AtomicU32);

    impl Futex {
        #[inline]
        pub(crate) fn value(&self) -> u32 {
            self.0.load(Ordering::Acquire)
        }

        pub(crate) fn ring(&self) {
            self.0.fetch_add(1, Ordering::Release);
            // More than one thread of a process may sleep here. It fails only for a bad address.
            let _ = futex::wake(&self.0, futex::Flags::empty(), i32::MAX as u32);
        }

        /// Returns early for signals and by chance: the caller looks again anyway.
        pub(crate) fn wait(&self, value: u32, limit: Duration) {
            let limit = Timespec {
                tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(limit.subsec_nanos()),
            };
            let _ = futex::wait(&self.0, futex::Flags::empty(), value, Some(&limit));
        }
    }
}

#[cfg(loom)]
mod model {
    pub(crate) use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
    use loom::sync::{Condvar, Mutex};

    /// One ordering weakened on purpose.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) enum Mistake {
        RelaxedPublish,
        RelaxedRecycle,
        RelaxedCount,
        RelaxedEnd,
        RelaxedLeave,
        NoArmFence,
        NoNotifyFence,
        NoSecondLook,
        NoEnterFence,
        NoCloseFence,
    }

    std::thread_local! {
        /// loom runs all threads of a model on one thread of the machine.
        pub(crate) static MISTAKE: std::cell::Cell<Option<Mistake>> = const { std::cell::Cell::new(None) };
    }

    fn made(mistake: Mistake) -> bool {
        MISTAKE.with(|m| m.get() == Some(mistake))
    }

    pub(crate) fn publish_order() -> Ordering {
        if made(Mistake::RelaxedPublish) { Ordering::Relaxed } else { Ordering::Release }
    }

    pub(crate) fn recycle_order() -> Ordering {
        if made(Mistake::RelaxedRecycle) { Ordering::Relaxed } else { Ordering::Release }
    }

    pub(crate) fn count_order() -> Ordering {
        if made(Mistake::RelaxedCount) { Ordering::Relaxed } else { Ordering::Release }
    }

    pub(crate) fn end_order() -> Ordering {
        if made(Mistake::RelaxedEnd) { Ordering::Relaxed } else { Ordering::Release }
    }

    pub(crate) fn leave_order() -> Ordering {
        if made(Mistake::RelaxedLeave) { Ordering::Relaxed } else { Ordering::Release }
    }

    pub(crate) fn arm_fence() {
        if !made(Mistake::NoArmFence) {
            fence(Ordering::SeqCst);
        }
    }

    pub(crate) fn notify_fence() {
        if !made(Mistake::NoNotifyFence) {
            fence(Ordering::SeqCst);
        }
    }

    /// Whether a changed hint is followed by another look.
    pub(crate) fn look_again() -> bool {
        !made(Mistake::NoSecondLook)
    }

    pub(crate) fn enter_fence() {
        if !made(Mistake::NoEnterFence) {
            fence(Ordering::SeqCst);
        }
    }

    pub(crate) fn close_fence() {
        if !made(Mistake::NoCloseFence) {
            fence(Ordering::SeqCst);
        }
    }

    pub(crate) struct Cell<T>(loom::cell::UnsafeCell<T>);

    impl<T> Cell<T> {
        pub(crate) fn new(value: T) -> Cell<T> {
            Cell(loom::cell::UnsafeCell::new(value))
        }

        pub(crate) fn with<R>(&self, f: impl FnOnce(*const T) -> R) -> R {
            self.0.with(f)
        }

        pub(crate) fn with_mut<R>(&self, f: impl FnOnce(*mut T) -> R) -> R {
            self.0.with_mut(f)
        }
    }

    /// The kernel's futex: comparing and falling asleep are one step. A lost wake-up is a deadlock of the model.
    pub(crate) struct Futex {
        word: AtomicU32,
        lock: Mutex<()>,
        sleepers: Condvar,
    }

    impl Futex {
        pub(crate) fn new() -> Futex {
            Futex { word: AtomicU32::new(0), lock: Mutex::new(()), sleepers: Condvar::new() }
        }

        pub(crate) fn value(&self) -> u32 {
            self.word.load(Ordering::Acquire)
        }

        pub(crate) fn ring(&self) {
            self.word.fetch_add(1, Ordering::Release);
            let _guard = self.lock.lock().unwrap();
            self.sleepers.notify_all();
        }

        pub(crate) fn sleep(&self, value: u32) {
            let guard = self.lock.lock().unwrap();
            if self.word.load(Ordering::Acquire) == value {
                drop(self.sleepers.wait(guard).unwrap());
            }
        }
    }
}
