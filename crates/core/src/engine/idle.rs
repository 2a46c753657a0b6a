//! How a driver waits: spin briefly, then yield the core, then sleep.
//!
//! A rank whose peers share its cores must not spin at all: a spinning waiter keeps the peer it waits for off the core
//! for a whole scheduler tick (4 to 16 ms). Even where cores suffice the scheduler may put two ranks on one for a while, so
//! the others spin for a few microseconds only: long spinning made each call cost its whole length then.

use std::time::Duration;

use crate::yields::{LookOut, Yields};

/// Fruitless polls in each stage.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    pub spins: u32,
    pub yields: u32,
    /// How long to look on instead of yielding where yields are dear.
    pub look_out: Duration,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Spin,
    Yield,
    Sleep,
}

/// Counts fruitless polls.
#[derive(Debug)]
pub struct Idle<'a> {
    pace: Pace,
    yields: &'a Yields,
    count: u32,
    look_out: LookOut,
    sleeps: u32,
}

impl<'a> Idle<'a> {
    pub fn new(pace: Pace, yields: &'a Yields) -> Idle<'a> {
        Idle { pace, yields, count: 0, look_out: LookOut::default(), sleeps: 0 }
    }

    /// Something moved.
    pub fn reset(&mut self) {
        self.count = 0;
        self.look_out = LookOut::default();
        self.sleeps = 0;
    }

    /// How long to sleep at most where the bell alone does not bring all news: longer and longer.
    pub fn nap(&mut self) -> Duration {
        let doublings = (self.sleeps / 8).min(4);
        self.sleeps = self.sleeps.saturating_add(1);
        SHORT_SLEEP * (1 << doublings)
    }

    pub fn fruitless(&mut self) -> Step {
        self.count = self.count.saturating_add(1);
        let Pace { spins, yields, look_out } = self.pace;
        if self.count <= spins {
            Step::Spin
        } else if spins > 0 && self.yields.are_dear() {
            if self.look_out.lasts(look_out) { Step::Spin } else { Step::Sleep }
        } else if self.count <= spins.saturating_add(yields) {
            Step::Yield
        } else {
            Step::Sleep
        }
    }
}

/// Longest sleep on a bell: also how late an abort written by a rank that could not ring is seen.
pub const LONGEST_SLEEP: Duration = Duration::from_millis(50);
/// First sleep while several bells, or a bell and the fabric, may bring news.
pub const SHORT_SLEEP: Duration = Duration::from_micros(200);
/// Sleep while a device computes what an operation waits for: what that may add to the operation's time.
pub const GATE_NAP: Duration = Duration::from_micros(50);
/// How often a process without work asks the fabric for news: what it adds to a peer's withdrawal of a group.
pub const LISTEN: Duration = Duration::from_millis(100);
/// How often a fruitless waiter asks whether its peers still live.
pub const LIVENESS: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_come_in_order_and_start_again() {
        let (pace, yields) = (Pace { spins: 2, yields: 1, look_out: Duration::MAX }, Yields::default());
        let mut idle = Idle::new(pace, &yields);
        let stages: Vec<Step> = (0..4).map(|_| idle.fruitless()).collect();
        assert_eq!(stages, [Step::Spin, Step::Spin, Step::Yield, Step::Sleep]);
        idle.reset();
        assert_eq!(idle.fruitless(), Step::Spin);
        let naps: Vec<Duration> = (0..100).map(|_| idle.nap()).collect();
        assert_eq!(naps[0], SHORT_SLEEP);
        assert!(naps.is_sorted() && naps[99] == SHORT_SLEEP * 16);
    }

    #[test]
    fn where_yields_are_dear_there_are_looks_instead() {
        let dear = Yields::dear();
        let third = |spins, look_out| {
            let mut idle = Idle::new(Pace { spins, yields: 9, look_out }, &dear);
            (0..3).map(|_| idle.fruitless()).last()
        };
        assert_eq!(third(2, Duration::MAX), Some(Step::Spin));
        assert_eq!(third(2, Duration::ZERO), Some(Step::Sleep));
        assert_eq!(third(0, Duration::MAX), Some(Step::Yield), "ranks share cores");
    }
}
