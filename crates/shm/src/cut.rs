//! How the moves of a phase become exchanges: pure arithmetic that every rank does alike.
//!
//! Consecutive moves form *groups*; a group is cut into `cuts` exchanges, every move of it alike (cut `k` of each move
//! travels in exchange `k`). A rank's slot holds its pieces in the order of the moves, each aligned to [`ALIGN`].
//!
//! - **G1** All ranks compute the same groups and cuts: only moves, slot size, number of ranks and whether they hand lines back enter.
//! - **G2** No rank's pieces of one exchange exceed a slot, nor [`MOST_HANDED_BACK`] where lines are handed back: cuts are a
//!   multiple of [`CUT_ALIGN`] long, and a group ends before the rounding of its pieces could take more than half of either.
//! - **G3** Every phase has at least one exchange, even with nothing to move (ranks may rely on it to meet).

use smddp_core::plan::{Move, Who};

use crate::equal_shares::CUT_ALIGN;
use crate::geometry::Geometry;
use crate::layout::INLINE;
use crate::mask::Mask;
use crate::relay::Relay;

/// Alignment of a piece in a slot; the largest element size.
pub(crate) const ALIGN: usize = 8;

/// Parts of areas are no smaller: what is tiny stays in the caches after all.
const PART_ALIGN: usize = 4 << 10;

/// What is handed back takes no more of a slot: a ring of more leaves the second caches, and its lines are written again
/// from the shared one.
const MOST_HANDED_BACK: usize = Geometry::USUAL.slot;

/// What one rank alone gives, and takes several slots, goes in so many exchanges or so, for its readers to begin earlier; in no shorter
/// ones than these, since who follows its giver closely reads slowly (docs/performance-log.md).
const EXCHANGES_OF_ONE: usize = 8;
const SHORTEST_OF_ONE: usize = 64 << 10;

pub(crate) fn aligned(len: usize) -> usize {
    len.next_multiple_of(ALIGN)
}

/// Moves `start..end` of a phase, run as `cuts` exchanges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Group {
    pub(crate) start: usize,
    pub(crate) end: usize,
    pub(crate) cuts: usize,
    /// Nothing is cut: the first exchange has all of it, those behind it nothing.
    pub(crate) whole: bool,
    /// Every rank's pieces fit into its slot's head.
    pub(crate) inline: bool,
    /// Bytes that a rank puts into its slots, at most.
    pub(crate) most: usize,
    /// Bytes of an area's part that the exchange takes, if areas have several; 0: areas are not parted (`exchange::area`).
    pub(crate) part: usize,
    /// Ranks write slots again that their peers have read; two ranks that both give swap them.
    pub(crate) rewrites: bool,
    /// Each piece has one reader, who hands its lines back (docs/adr/0024).
    pub(crate) hands_back: bool,
    /// This rank gives something to others.
    pub(crate) writes: bool,
    /// Peers whose slots this rank reads.
    pub(crate) reads: Mask,
    /// Ranks that give something to others.
    pub(crate) givers: Mask,
}

impl Group {
    /// Whether its data lies in the slots' areas.
    #[inline]
    pub(crate) fn takes_areas(&self) -> bool {
        !self.inline && !self.whole
    }

    /// Whether the lines of its slots lie in readers' caches, who have not handed them back.
    #[inline]
    pub(crate) fn is_dear_to_write(&self) -> bool {
        self.rewrites && !self.hands_back
    }

    /// Of so many ranks, those that get results: one that gives alone has them already.
    #[inline]
    pub(crate) fn takers(&self, ranks: usize) -> usize {
        if self.givers.iter().count() == 1 { ranks - 1 } else { ranks }
    }

    /// Offset and length of cut `cut` of a move of `len` bytes.
    #[inline]
    pub(crate) fn piece(&self, len: usize, cut: usize) -> (usize, usize) {
        if self.cuts == 1 || self.whole {
            return (0, len);
        }
        let step = len.div_ceil(self.cuts).next_multiple_of(CUT_ALIGN);
        let start = len.min(cut * step);
        (start, step.min(len - start))
    }
}

/// Whether `who` includes `rank`.
#[inline]
pub(crate) fn includes(who: Who, rank: usize) -> bool {
    match who {
        Who::One(one) => one as usize == rank,
        Who::All => true,
    }
}

/// Whether `rank`'s source of `m` travels to others.
#[inline]
pub(crate) fn travels(m: &Move, rank: usize) -> bool {
    includes(m.from, rank) && m.to != Who::One(rank as u32)
}

/// Makes groups; keeps its working memory.
pub(crate) struct Cutter {
    me: usize,
    slot_bytes: usize,
    /// As the group's ranks agreed.
    pub(crate) hands_back: bool,
    /// Bytes and pieces each rank has beyond (or short of) what moves from `All` give everybody.
    bytes: Vec<i64>,
    pieces: Vec<i64>,
}

impl Cutter {
    pub(crate) fn new(me: usize, size: usize, slot_bytes: usize, hands_back: bool) -> Cutter {
        Cutter { me, slot_bytes, hands_back, bytes: vec![0; size], pieces: vec![0; size] }
    }

    /// All moves of a phase that takes no slots, in so many exchanges.
    pub(crate) fn whole(&self, moves: &[Move], exchanges: usize) -> Group {
        let mut group =
            Group { end: moves.len(), cuts: exchanges, whole: true, writes: true, ..Group::default() };
        (0..self.bytes.len()).filter(|&rank| rank != self.me).for_each(|rank| group.reads.set(rank));
        group
    }

    /// The one move of a phase that runs as `relay`; `None` where it does not.
    pub(crate) fn relay(&self, moves: &[Move]) -> Option<(Group, Relay)> {
        let [Move { from: Who::All, to: Who::All, src, .. }] = moves else { return None };
        let relay = Relay::of(src.len, self.bytes.len(), self.slot_bytes)?;
        let rewrites = self.bytes.len() > 2;
        let part = if rewrites { relay.most().next_multiple_of(PART_ALIGN) } else { 0 };
        let (cuts, most) = (relay.exchanges(), relay.most());
        let mut group = Group { end: 1, cuts, most, part, rewrites, writes: true, ..Group::default() };
        (0..self.bytes.len()).filter(|&rank| rank != self.me).for_each(|rank| group.reads.set(rank));
        Some((group, relay))
    }

    /// The group that starts at move `start`.
    pub(crate) fn group(&mut self, moves: &[Move], start: usize) -> Group {
        let limit = (self.slot_bytes.min(MOST_HANDED_BACK) / (2 * CUT_ALIGN)) as i64;
        let (mut all_bytes, mut all_pieces, mut most_pieces) = (0i64, 0i64, 0i64);
        self.bytes.fill(0);
        self.pieces.fill(0);
        let mut group = Group { start, end: start, cuts: 1, ..Group::default() };
        for m in &moves[start..] {
            let len = aligned(m.src.len) as i64;
            let (all, one) = match m.from {
                Who::All => (all_pieces + 1, most_pieces),
                Who::One(from) => (all_pieces, most_pieces.max(self.pieces[from as usize] + 1)),
            };
            if all + one > limit && group.end > start {
                break;
            }
            (all_pieces, most_pieces) = (all, one);
            match m.from {
                Who::All => {
                    all_bytes += len;
                    if let Who::One(to) = m.to {
                        self.bytes[to as usize] -= len;
                    }
                }
                Who::One(from) => {
                    self.pieces[from as usize] += 1;
                    if m.to != m.from {
                        self.bytes[from as usize] += len;
                    }
                }
            }
            self.note_part(&mut group, m);
            group.end += 1;
        }
        let most = self.bytes.iter().max().map_or(0, |extra| all_bytes + extra).max(0) as usize;
        group.inline = most <= INLINE;
        group.most = most;
        let one_gives = group.givers.iter().count() == 1;
        group.rewrites = self.bytes.len() > 2 || one_gives;
        let has_one_reader = |m: &Move| self.bytes.len() <= 2 || m.to != Who::All;
        group.hands_back = self.hands_back
            && group.rewrites
            // Heads have other readers.
            && !group.inline
            && moves[start..group.end].iter().all(has_one_reader);
        let room = if group.hands_back {
            self.slot_bytes.min(MOST_HANDED_BACK)
        } else if most > self.slot_bytes && one_gives {
            self.slot_bytes.min((most / EXCHANGES_OF_ONE).max(SHORTEST_OF_ONE))
        } else {
            self.slot_bytes
        };
        if most > room {
            let least = most.div_ceil(room);
            let comes_out_even = |m: &Move| m.src.len.is_multiple_of(least * CUT_ALIGN);
            group.cuts = if moves[start..group.end].iter().all(comes_out_even) {
                least
            } else {
                let rounding = (all_pieces + most_pieces) as usize * CUT_ALIGN;
                most.div_ceil(room - rounding.min(room / 2))
            };
        }
        if group.rewrites && !group.hands_back && most <= room {
            group.part = most.next_multiple_of(PART_ALIGN);
        }
        group
    }

    /// What this rank has to do with `m`.
    fn note_part(&self, group: &mut Group, m: &Move) {
        let size = self.bytes.len();
        match m.from {
            Who::One(from) if m.to != m.from => group.givers.set(from as usize),
            Who::One(_) => {}
            Who::All => (0..size).filter(|&rank| travels(m, rank)).for_each(|rank| group.givers.set(rank)),
        }
        group.writes |= size > 1 && travels(m, self.me);
        if !includes(m.to, self.me) {
            return;
        }
        match m.from {
            Who::One(from) => group.reads.set(from as usize),
            Who::All => (0..size).for_each(|rank| group.reads.set(rank)),
        }
        group.reads.clear(self.me);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;
    use smddp_core::plan::Span;

    fn a_move(size: u32) -> impl Strategy<Value = Move> {
        let who = move || prop_oneof![Just(Who::All), (0..size).prop_map(Who::One)];
        let len = prop_oneof![0usize..80, 0usize..20_000, 0usize..300_000];
        (who(), who(), len).prop_map(|(from, to, len)| Move {
            from,
            to,
            src: Span::input(0, len),
            dst: Span::output(0, len),
            finish: false,
        })
    }

    pub(crate) fn phase() -> impl Strategy<Value = (usize, Vec<Move>)> {
        (1u32..6).prop_flat_map(|size| {
            let any = prop::collection::vec(a_move(size), 0..120);
            // Lengths that cuts may divide without a rest.
            let even = prop::collection::vec(a_move(size), 1..6).prop_map(|mut moves| {
                moves.iter_mut().for_each(|m| {
                    (m.src.len, m.dst.len) = (m.src.len / 1024 * 1024, m.src.len / 1024 * 1024);
                });
                moves
            });
            (Just(size as usize), prop_oneof![3 => any, 1 => even])
        })
    }

    proptest! {
        #[test]
        fn groups_cover_every_move_and_cuts_cover_every_byte_within_a_slot(
            (size, moves) in phase(), hands_back in any::<bool>(), slot_bytes in prop_oneof![Just(4096), Just(384 << 10)],
        ) {
            let mut start = 0;
            loop {
                let mut cutters: Vec<_> = (0..size).map(|me| Cutter::new(me, size, slot_bytes, hands_back)).collect();
                let groups: Vec<Group> = cutters.iter_mut().map(|c| c.group(&moves, start)).collect();
                let group = groups[0];
                for other in &groups {
                    let alike = |g: &Group| (g.start, g.end, g.cuts, g.inline, g.part, g.hands_back);
                    prop_assert_eq!(alike(other), alike(&group));
                }
                prop_assert!(group.cuts >= 1 && (group.end > start || moves.is_empty()));
                let readers = |m: &Move, from: usize| (0..size).filter(|&rank| rank != from && includes(m.to, rank)).count();
                let alone = |m: &Move| (0..size).filter(|&from| travels(m, from)).all(|from| readers(m, from) <= 1);
                let have_one_reader = moves[start..group.end].iter().all(alone);
                prop_assert_eq!(group.hands_back, hands_back && group.rewrites && !group.inline && have_one_reader);
                prop_assert!(!group.hands_back || group.part == 0);
                let room = if group.hands_back { slot_bytes.min(MOST_HANDED_BACK) } else { slot_bytes };
                for cut in 0..group.cuts {
                    for rank in 0..size {
                        let sent: usize = moves[start..group.end].iter()
                            .filter(|m| travels(m, rank) && size > 1)
                            .map(|m| aligned(group.piece(m.src.len, cut).1))
                            .sum();
                        prop_assert!(sent <= room, "rank {} sends {} of {} in cut {}", rank, sent, room, cut);
                        prop_assert!(!group.inline || sent <= INLINE);
                    }
                }
                for m in &moves[start..group.end] {
                    let mut next = 0;
                    for cut in 0..group.cuts {
                        let (at, len) = group.piece(m.src.len, cut);
                        prop_assert_eq!(at, next);
                        prop_assert!(len == 0 || at % CUT_ALIGN == 0);
                        next += len;
                    }
                    prop_assert_eq!(next, m.src.len);
                }
                start = group.end;
                if start >= moves.len() { break; }
            }
        }
    }

    #[test]
    fn cuts_cover_more_than_four_gigabytes() {
        for len in [(1 << 32) - 64, (1 << 32) + 4, 5 << 30] {
            for (from, to) in [(Who::All, Who::All), (Who::One(0), Who::All), (Who::One(1), Who::One(2))] {
                let (src, dst) = (Span::input(0, len), Span::output(0, len));
                let moves = [Move { from, to, src, dst, finish: false }];
                let group = Cutter::new(0, 3, 384 << 10, false).group(&moves, 0);
                assert!(group.most >= len && group.cuts >= len.div_ceil(384 << 10));
                let mut next = 0;
                for cut in 0..group.cuts {
                    let (at, piece) = group.piece(len, cut);
                    assert!(at == next && piece <= 384 << 10);
                    next += piece;
                }
                assert_eq!(next, len);
            }
        }
        // Three ranks' pieces of 2 GiB: together they do not fit 32 bits either.
        let one = |at: usize| Span::output(at * (2 << 30), 2 << 30);
        let moves: Vec<Move> = (0..3)
            .map(|to| Move {
                from: Who::All,
                to: Who::One(to),
                src: one(to as usize),
                dst: one(0),
                finish: true,
            })
            .collect();
        let group = Cutter::new(0, 3, 384 << 10, false).group(&moves, 0);
        assert_eq!((group.end, group.most), (3, 4 << 30));
    }

    #[test]
    fn what_one_gives_is_cut_further_unless_it_is_handed_back() {
        let cuts = |len: usize, from: Who, hands_back: bool| {
            let span = Span::output(0, len);
            let moves = [Move { from, to: Who::All, src: span, dst: span, finish: true }];
            Cutter::new(0, 2, 128 << 10, hands_back).group(&moves, 0).cuts
        };
        let sizes = [128, 256, 512, 1024, 4096].map(|kib| kib << 10);
        assert_eq!(sizes.map(|len| cuts(len, Who::One(1), false)), [1, 4, 8, 8, 32]);
        assert_eq!(sizes.map(|len| cuts(len, Who::One(1), true)), [1, 2, 4, 8, 32]);
        assert_eq!(sizes.map(|len| cuts(len, Who::All, false)), [1, 2, 4, 8, 32]);
    }
}
