//! How the progress thread is called to work that somebody has left.
//!
//! Waking it costs who calls it a system call, and where ranks are as many as cores the thread takes a core from a rank: a
//! sendrecv of 64 B that is waited for at once took 7 to 23 µs in place of 1.3 (docs/performance-log.md). So it is called
//! at once to work that may go on beside a computation; of brief work it learns when it looks, a [`Nap`] later at most.
//!
//! Invariants
//! - **W1** What was left is done without a caller: whoever leaves work raises the word, in one step that also says whether the
//!   thread had parked before; who finds that it had wakes it. The thread parks only in a step that finds the word not raised.

use std::sync::atomic::Ordering;
use std::thread::Thread;
use std::time::Duration;

use crate::atomics::AtomicU8;

/// How late the thread looks at brief work at first, and where callers always wait for theirs: then nobody but its timer wakes it.
const SHORTEST: Duration = Duration::from_micros(100);
const LONGEST: Duration = Duration::from_millis(2);

/// How long the thread leaves brief work to those who may wait for it: twice as long behind each time that they did.
pub(crate) struct Nap(Duration);

impl Default for Nap {
    fn default() -> Nap {
        Nap(SHORTEST)
    }
}

impl Nap {
    /// Sleeps, until it is over or the thread is called.
    pub(crate) fn take(&mut self) {
        std::thread::park_timeout(self.0);
        self.0 = LONGEST.min(self.0 * 2);
    }
}

const PARKED: u8 = 0;
const AWAKE: u8 = 1;
const LATER: u8 = 2;
const NOW: u8 = 3;

/// When the thread is to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum When {
    Later,
    Now,
}

pub(crate) struct Summons(AtomicU8);

impl Default for Summons {
    fn default() -> Summons {
        Summons(AtomicU8::new(AWAKE))
    }
}

impl Summons {
    /// Calls the thread (W1).
    pub(crate) fn call(&self, when: When, thread: impl FnOnce() -> Option<Thread>) {
        self.call_by(when, || thread().iter().for_each(Thread::unpark));
    }

    /// [`call`](Self::call), with how to wake the thread.
    #[inline]
    pub(crate) fn call_by(&self, when: When, wake: impl FnOnce()) {
        if self.raise(when) {
            wake();
        }
    }

    /// Whether the thread is to be woken.
    #[inline]
    fn raise(&self, when: When) -> bool {
        let word = if when == When::Now { NOW } else { LATER };
        let before = self.0.fetch_max(word, Ordering::AcqRel);
        // At once: it may be napping.
        before == PARKED || when == When::Now
    }

    /// What the thread has been called to since it asked last.
    pub(crate) fn take(&self) -> Option<When> {
        match self.0.swap(AWAKE, Ordering::AcqRel) {
            NOW => Some(When::Now),
            LATER => Some(When::Later),
            _ => None,
        }
    }

    /// Sleeps until it is called, or `limit` has passed, or without a reason. The thread's alone.
    pub(crate) fn park(&self, limit: Option<Duration>) {
        self.park_by(|| match limit {
            Some(limit) => std::thread::park_timeout(limit),
            None => std::thread::park(),
        });
    }

    /// [`park`](Self::park), with how to sleep.
    #[inline]
    pub(crate) fn park_by(&self, sleep: impl FnOnce()) {
        if self.lie_down() {
            sleep();
        }
    }

    /// Whether the thread is to park: it has not been called.
    #[inline]
    fn lie_down(&self) -> bool {
        self.0.compare_exchange(AWAKE, PARKED, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }
}

#[cfg(all(test, loom))]
#[path = "summons_models.rs"]
mod models;

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;
    use std::time::Instant;

    use super::*;

    const ROUNDS: u32 = if cfg!(miri) { 50 } else { 5000 };

    /// W1: however the two meet, the thread takes what it is called to, and parks in between.
    #[test]
    fn what_is_left_is_taken_by_a_thread_that_parks() {
        let (summons, taken, parked) = (Summons::default(), AtomicU32::new(0), AtomicU32::new(0));
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                while taken.load(Ordering::Relaxed) < ROUNDS {
                    if summons.take().is_some() {
                        taken.fetch_add(1, Ordering::Release);
                    } else {
                        parked.fetch_add(1, Ordering::Relaxed);
                        summons.park(None);
                    }
                }
            });
            let until = Instant::now() + Duration::from_secs(60);
            for round in 0..ROUNDS {
                let when = if round % 3 == 0 { When::Now } else { When::Later };
                summons.call(when, || Some(thread.thread().clone()));
                while taken.load(Ordering::Acquire) <= round {
                    if Instant::now() > until {
                        // Lets the thread end, so that the test does.
                        taken.store(ROUNDS, Ordering::Relaxed);
                        thread.thread().unpark();
                        panic!("round {round}: not taken");
                    }
                    std::thread::yield_now();
                }
            }
        });
        // Where it is not called it does not turn and turn.
        assert!(parked.into_inner() <= 2 * ROUNDS + 1);
    }

    #[test]
    fn a_call_at_once_outdoes_one_for_later() {
        let summons = Summons::default();
        assert_eq!(summons.take(), None);
        for (calls, want) in [
            (&[When::Later][..], When::Later),
            (&[When::Later, When::Now], When::Now),
            (&[When::Now, When::Later], When::Now),
        ] {
            calls.iter().for_each(|&when| summons.call(when, || None));
            assert_eq!((summons.take(), summons.take()), (Some(want), None));
        }
    }

    #[test]
    fn naps_grow_longer_and_end() {
        let mut nap = Nap::default();
        for _ in 0..8 {
            let before = nap.0;
            nap.take();
            assert!(nap.0 == LONGEST || nap.0 == before * 2);
        }
        assert_eq!(nap.0, LONGEST);
    }
}
