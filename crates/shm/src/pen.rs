//! How a rank writes into its slots: through its caches or past them, whichever it finds faster.
//!
//! A line that a peer has read is dear to write again where the two do not share a last-level cache (two sockets, two halves of a
//! processor): 30 ns on an AMD EPYC, 2 GB/s, where stores past the caches go on with 13. Where they do share one, both
//! ways take about the same, but what went past it is slower to read. A virtual machine's cores may come to lie so while a
//! process runs, so what pieces take is looked at all the time.

use std::time::Instant;

use smddp_core::Region;
use smddp_core::memory::settle;

/// Smaller pieces are not worth a look at the clock.
const LEAST: usize = 16 << 10;
/// Of so many pieces one is timed.
const TIMED: u32 = 4;
/// Of so many pieces one goes the other way, timed.
const TRIED: u32 = 32;
/// Past the caches must be so many times as fast, for it is slower to read: on that EPYC it is 1.7 times as fast with a shared
/// cache, and a loss, and 7 times without.
const WORTH: f32 = 3.0;
/// A time above the last one counts for so much of it: a rank may have been stopped meanwhile.
const RISE: f32 = 1.2;

#[derive(Debug)]
pub(crate) struct Pen {
    /// Past the caches at all?
    may_stream: bool,
    pieces: u32,
    through: Cost,
    past: Cost,
}

/// Seconds a byte, as it was of late.
#[derive(Debug, Default)]
struct Cost(Option<f32>);

impl Cost {
    fn learn(&mut self, cost: f32) {
        self.0 = Some(self.0.map_or(cost, |before| cost.min(before * RISE)));
    }
}

impl Pen {
    pub(crate) fn new(may_stream: bool) -> Pen {
        Pen { may_stream, pieces: 0, through: Cost::default(), past: Cost::default() }
    }

    /// Copies `from` to `to`, which lies in a slot. `is_dear`: this rank wrote there last, and peers have read it without handing
    /// its lines back.
    #[inline]
    pub(crate) fn write(&mut self, to: Region, from: Region, is_dear: bool) {
        if to.len() < LEAST || !is_dear || !self.may_stream {
            to.copy_from(from);
        } else {
            self.write_much(to, from);
        }
    }

    fn write_much(&mut self, to: Region, from: Region) {
        let (streams, timed) = self.next();
        let start = timed.then(Instant::now);
        if streams {
            to.stream_from(from);
            settle();
        } else {
            to.copy_from(from);
        }
        if let Some(start) = start {
            self.learn(streams, start.elapsed().as_secs_f32() / to.len() as f32);
        }
    }

    /// Whether the next piece goes past the caches, and whether it is timed.
    fn next(&mut self) -> (bool, bool) {
        self.pieces = self.pieces.wrapping_add(1);
        let better = matches!((&self.through, &self.past), (Cost(Some(t)), Cost(Some(p))) if *t > WORTH * *p);
        match self.pieces % TRIED {
            0 => (!better, true),
            n => (better, n % TIMED == 0),
        }
    }

    fn learn(&mut self, streamed: bool, cost: f32) {
        let of = if streamed { &mut self.past } else { &mut self.through };
        of.learn(cost);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of `pieces` pieces, how many go past the caches where the two ways cost so much.
    fn streamed(pen: &mut Pen, pieces: u32, [through, past]: [f32; 2]) -> u32 {
        let one = |pen: &mut Pen| {
            let (streams, timed) = pen.next();
            if timed {
                pen.learn(streams, if streams { past } else { through });
            }
            u32::from(streams)
        };
        (0..pieces).map(|_| one(pen)).sum()
    }

    #[test]
    fn it_takes_to_the_faster_way_and_back() {
        let mut pen = Pen::new(true);
        assert_eq!(streamed(&mut pen, 10 * TRIED, [1.0, 1.0]), 10, "only tries it");
        assert_eq!(streamed(&mut pen, 10 * TRIED, [2.9, 1.0]), 10, "not worth it");
        let dear = [15.0, 1.0];
        assert!(streamed(&mut pen, 2 * TRIED, dear) > TRIED, "is soon past the caches");
        assert_eq!(streamed(&mut pen, 10 * TRIED, dear), 10 * (TRIED - 1), "and stays there");
        assert!(streamed(&mut pen, 2 * TRIED, [1.0, 1.0]) <= TRIED + 1, "comes back when it sees a reason");
        assert_eq!(streamed(&mut pen, 10 * TRIED, [1.0, 1.0]), 10);
    }

    #[test]
    fn one_stop_on_the_way_is_no_reason() {
        let mut pen = Pen::new(true);
        streamed(&mut pen, 10 * TRIED, [1.0, 1.0]);
        (0..2).for_each(|_| pen.learn(false, 1000.0));
        assert_eq!(streamed(&mut pen, TRIED, [1.0, 1.0]), 1);
    }

    #[test]
    fn pieces_arrive_either_way() {
        let ways = [(true, true), (true, false), (false, true)];
        for ((may_stream, is_dear), len) in ways.into_iter().flat_map(|way| [(way, LEAST + 24), (way, 100)]) {
            let mut pen = Pen::new(may_stream);
            for n in 0..2 * TRIED {
                let mut from: Vec<u8> = (0..len).map(|i| (i as u32 + n) as u8).collect();
                let mut to = vec![0u8; len];
                // SAFETY: both vectors outlive the regions, and are not touched while they are in use.
                unsafe { pen.write(Region::of(&mut to), Region::of(&mut from), is_dear) };
                assert_eq!(to, from);
            }
            assert_eq!(pen.past.0.is_some(), may_stream && is_dear && len >= LEAST);
        }
    }
}
