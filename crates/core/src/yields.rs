//! How a waiter gives its core away, and when it had better keep it.
//!
//! A yield is over in a microsecond where nobody else wants the core, or a peer that soon waits too. Where a process that computes
//! wants it (one that loads data, another job's), it is over when that process's time slice is: 4 ms, for an all_reduce of 0.5 µs. And
//! the peers, asleep by then, wake later than the waiter would yield again, so that each call costs a slice (docs/adr/0036).
//!
//! - **Y1** A yield of more than `LONG` makes yields dear for `REMEMBERED`: of so much time a waiter loses about one slice.
//! - **Y2** Where yields are dear, a waiter that may spin looks on for a while instead and then sleeps, from which its peers wake it.
//!   Those that may not, because ranks outnumber cores, yield on: there it is mostly a peer that gets the core.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What a yield takes if somebody computes meanwhile: a time slice is 0.7 to 4 ms.
const LONG: Duration = Duration::from_micros(500);
/// How long that is to be expected again.
const REMEMBERED: Duration = Duration::from_millis(100);
/// How long a caller looks on where yields are dear: longer than a peer takes that must be woken from its sleep, 20 to 50 µs.
pub const LOOK_OUT: Duration = Duration::from_micros(100);

/// What the yields of a process's waiters have cost.
#[derive(Debug)]
pub struct Yields {
    since: Instant,
    /// Nanoseconds from `since`; zero: never.
    dear_until: AtomicU64,
}

impl Default for Yields {
    fn default() -> Yields {
        Yields { since: Instant::now(), dear_until: AtomicU64::new(0) }
    }
}

impl Yields {
    /// Such as will always be dear.
    #[cfg(test)]
    pub(crate) fn dear() -> Yields {
        Yields { dear_until: AtomicU64::new(u64::MAX), ..Yields::default() }
    }

    /// Yields the core.
    pub fn give_way(&self) {
        let before = Instant::now();
        std::thread::yield_now();
        let after = Instant::now();
        self.learn(after - before, after);
    }

    /// Y1.
    fn learn(&self, took: Duration, now: Instant) {
        if took > LONG {
            let until = now.duration_since(self.since) + REMEMBERED;
            self.dear_until.store(u64::try_from(until.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        }
    }

    /// Whether a yield is likely to take long.
    #[inline]
    pub fn are_dear(&self) -> bool {
        self.dear_until.load(Ordering::Relaxed) > 0 && self.are_dear_at(Instant::now())
    }

    fn are_dear_at(&self, now: Instant) -> bool {
        now.duration_since(self.since).as_nanos() < u128::from(self.dear_until.load(Ordering::Relaxed))
    }
}

/// How long a waiter has looked on where yields are dear (Y2).
#[derive(Clone, Copy, Debug, Default)]
pub struct LookOut(Option<Instant>);

impl LookOut {
    /// Whether it goes on, if it lasts for `limit` from the first time it was asked.
    pub fn lasts(&mut self, limit: Duration) -> bool {
        self.0.get_or_insert_with(Instant::now).elapsed() < limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Y1.
    #[test]
    fn a_long_yield_makes_yields_dear_for_a_while() {
        let yields = Yields::default();
        let now = yields.since + Duration::from_secs(1);
        yields.learn(LONG, now);
        assert!(!yields.are_dear_at(now) && !yields.are_dear());
        yields.learn(LONG + Duration::from_nanos(1), now);
        // Short ones in between are no sign: who has had more than its share of the core is not given it at once.
        yields.learn(Duration::ZERO, now + REMEMBERED / 2);
        assert!(yields.are_dear_at(now + REMEMBERED - Duration::from_nanos(1)));
        assert!(!yields.are_dear_at(now + REMEMBERED));
    }

    #[test]
    fn a_look_out_lasts_from_its_first_look() {
        let mut look_out = LookOut::default();
        assert!(look_out.lasts(Duration::MAX));
        std::thread::sleep(Duration::from_millis(1));
        assert!(look_out.lasts(Duration::from_secs(3600)) && !look_out.lasts(Duration::from_millis(1)));
    }
}
