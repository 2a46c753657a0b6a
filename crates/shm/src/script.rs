//! What one rank does in a phase that is one exchange through slots, worked out once: a small blocking call is such a
//! phase, again and again, and its moves say the same each time.
//!
//! Invariants
//! - **W1** A script does what `exchange` does with the same moves: the same bytes at the same places of the slots, takes in
//!   the order of the moves, each behind the peers it reads.
//! - **W2** A take is done once. Where a script is given up, `exchange` goes on at the move of the first take left; what was
//!   done before may have overwritten its own sources.

use smddp_core::plan::{Move, Span, Who};
use smddp_core::reduce::{Pass, combine_and};
use smddp_core::transport::PhaseRun;
use smddp_core::{Region, Result};

use crate::cut::{Group, includes, travels};
use crate::exchange::{Consuming, hand_back, has_come, slot_to_fill, slot_to_read};
use crate::layout::SlotHead;
use crate::mask::Mask;
use crate::pen::Pen;
use crate::ring::Ring;
use crate::segment::Segment;
use crate::theirs::Theirs;

/// Keeps its memory when it is written anew.
#[derive(Debug, Default)]
pub(crate) struct Script {
    written: bool,
    /// Whether the exchange takes areas.
    areas: bool,
    /// Bytes of an area's part that it takes, as [`Group::part`].
    part: usize,
    /// As [`Group::is_dear_to_write`].
    is_dear_to_write: bool,
    /// As [`Group::hands_back`].
    hands_back: bool,
    /// Bytes that a rank publishes, at most.
    most: usize,
    /// Empty where this rank publishes nothing.
    gives: Vec<Give>,
    takes: Vec<Take>,
    /// The peers that takes read, in the order in which they first do.
    peers: Vec<usize>,
    /// Of each take from all: where every local rank's piece lies in its slot.
    offsets: Vec<usize>,
}

/// A piece for others, and its place in this rank's slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Give {
    src: Span,
    offset: usize,
}

/// A move to this rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Take {
    /// Which of the phase's moves it is.
    number: usize,
    /// So many of the script's peers must have come.
    peers: usize,
    src: Span,
    dst: Span,
    from: Source,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Own,
    /// What lies at `offset` in the slot of `rank`.
    Peer {
        rank: usize,
        offset: usize,
    },
    /// All ranks' pieces; theirs begin at `offsets` in the script's list. `in_place`: this rank's is where the result goes.
    All {
        offsets: usize,
        finish: bool,
        in_place: bool,
    },
}

impl Script {
    #[inline]
    pub(crate) fn is_written(&self) -> bool {
        self.written
    }

    /// To be written for another phase.
    pub(crate) fn forget(&mut self) {
        self.written = false;
    }

    /// For rank `me` of `size`, of a phase whose moves all lie in `group`, uncut. `at` walks over them, as it does when
    /// they are consumed without a script.
    pub(crate) fn write(
        &mut self,
        me: usize,
        size: usize,
        moves: &[Move],
        group: &Group,
        at: &mut Consuming,
    ) {
        self.gives.clear();
        self.takes.clear();
        self.peers.clear();
        self.offsets.clear();
        (self.areas, self.part) = (group.takes_areas(), group.part);
        (self.is_dear_to_write, self.hands_back) = (group.is_dear_to_write(), group.hands_back);
        self.most = group.most;
        let mut seen = Mask::default();
        at.start(*group, 0);
        for (number, m) in moves.iter().enumerate() {
            if group.writes && travels(m, me) {
                // In a slot, pieces follow one another as they do for its readers.
                self.gives.push(Give { src: m.src, offset: at.offset(me) });
            }
            if includes(m.to, me) {
                let from = self.source(me, size, m, at, &mut seen);
                self.takes.push(Take { number, peers: self.peers.len(), src: m.src, dst: m.dst, from });
            }
            at.step_over(m, m.src.len);
        }
        self.written = true;
    }

    fn source(&mut self, me: usize, size: usize, m: &Move, at: &Consuming, seen: &mut Mask) -> Source {
        let mut read = |rank: usize| {
            if rank != me && !seen.has(rank) {
                seen.set(rank);
                self.peers.push(rank);
            }
        };
        match m.from {
            Who::One(from) if from as usize == me => Source::Own,
            Who::One(from) => {
                let rank = from as usize;
                read(rank);
                Source::Peer { rank, offset: at.offset(rank) }
            }
            Who::All => {
                (0..size).for_each(read);
                let offsets = self.offsets.len();
                // Its own piece this rank does not take from its slot: its entry means nothing, and might be negative.
                self.offsets.extend((0..size).map(|rank| if rank == me { 0 } else { at.offset(rank) }));
                Source::All { offsets, finish: m.finish, in_place: m.src == m.dst }
            }
        }
    }
}

/// A phase that runs by its script, and how far it is.
pub(crate) struct Playing<'a> {
    pub(crate) me: usize,
    pub(crate) ranks: &'a [u32],
    pub(crate) script: &'a Script,
    pub(crate) run: &'a PhaseRun,
    pub(crate) segment: &'a Segment,
    pub(crate) sources: &'a mut Vec<Region>,
    pub(crate) pen: &'a mut Pen,
    pub(crate) so_far: SoFar,
}

/// What a script has done.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct SoFar {
    pub(crate) published: bool,
    /// Peers that have come, in the script's order.
    come: usize,
    taken: usize,
}

impl SoFar {
    /// The first of the phase's `moves` that is still to be done.
    pub(crate) fn next_move(&self, script: &Script, moves: usize) -> usize {
        script.takes.get(self.taken).map_or(moves, |take| take.number)
    }
}

impl Playing<'_> {
    /// Bytes that a rank publishes, at most.
    #[inline]
    pub(crate) fn bytes(&self) -> usize {
        self.script.most
    }

    #[inline]
    pub(crate) fn reads_peers(&self) -> bool {
        !self.script.peers.is_empty()
    }

    /// Publishes the exchange; false where its slot is not free.
    #[inline]
    pub(crate) fn publish(&mut self, ring: &mut Ring) -> bool {
        let areas = self.script.areas;
        // Nothing is queued, so this rank is not ahead of itself (E3).
        if self.script.gives.is_empty() {
            ring.skip(areas);
        } else if ring.in_the_way(self.segment).is_none() {
            let slot = slot_to_fill(self.me, areas, self.script.part, self.segment, ring);
            for Give { src, offset } in &self.script.gives {
                let (place, piece) =
                    (slot.slice(*offset, src.len), self.run.buffers.at(*src, self.run.shift));
                self.pen.write(place, piece, self.script.is_dear_to_write);
            }
            ring.publish(self.segment, areas, |head: &mut SlotHead| head.call = self.run.call);
        } else {
            return false;
        }
        self.so_far.published = true;
        true
    }

    /// Takes all that has come. `None` when the exchange is over, else a peer that has to publish it first.
    #[inline]
    pub(crate) fn take(&mut self, ring: &mut Ring) -> Result<Option<usize>> {
        while let Some(take) = self.script.takes.get(self.so_far.taken) {
            for &peer in &self.script.peers[self.so_far.come..take.peers] {
                if !has_come(peer, self.run, self.ranks, self.segment, ring)? {
                    return Ok(Some(peer));
                }
                self.so_far.come += 1;
            }
            self.do_take(take, ring);
            self.so_far.taken += 1;
        }
        ring.consume(self.segment, self.script.areas);
        Ok(None)
    }

    #[inline]
    fn do_take(&mut self, take: &Take, ring: &Ring) {
        let (buffers, shift) = (&self.run.buffers, self.run.shift);
        let dst = buffers.at(take.dst, shift);
        match take.from {
            Source::Own => dst.copy_from(buffers.at(take.src, shift)),
            Source::Peer { rank, offset } => {
                let theirs = self.theirs(rank, offset, take, ring);
                self.reading().copy(dst, theirs);
            }
            Source::All { offsets, finish, in_place } => {
                let own = if in_place { dst } else { buffers.at(take.src, shift) };
                self.sources.clear();
                for (rank, &offset) in self.script.offsets[offsets..][..self.ranks.len()].iter().enumerate() {
                    let source = if rank == self.me { own } else { self.theirs(rank, offset, take, ring) };
                    self.sources.push(source);
                }
                let pass = Pass { order: self.reading().order(dst.len()), ..Pass::default() };
                combine_and(pass, self.run.arith, finish, dst, self.sources);
                if self.script.hands_back {
                    hand_back(self.me, self.sources);
                }
            }
        }
    }

    #[inline]
    fn reading(&self) -> Theirs {
        Theirs::within(self.segment, self.script.hands_back)
    }

    /// What `take` reads of `rank`.
    #[inline]
    fn theirs(&self, rank: usize, offset: usize, take: &Take, ring: &Ring) -> Region {
        slot_to_read(rank, self.script.areas, self.script.part, self.segment, ring)
            .slice(offset, take.src.len)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use smddp_core::call::{Call, Collective};
    use smddp_core::dtype::{DType, ReduceOp};
    use smddp_core::plan::{Buf, Op, Plan};
    use smddp_core::transport::{Arith, Buffers, Ctx};

    use super::*;
    use crate::cut::tests::phase;
    use crate::cut::{Cutter, aligned};
    use crate::exchange::Step;
    use crate::geometry::{Agreed, Geometry, Layout, SingleCopies};
    use crate::phases::Phases;
    use crate::single_copy::SingleCopy;

    fn script(me: usize, size: usize, moves: &[Move], script: &mut Script) {
        let group = Cutter::new(me, size, 1 << 30, false).group(moves, 0);
        assert!(group.cuts == 1 && group.end == moves.len());
        script.write(me, size, moves, &group, &mut Consuming::new(size));
    }

    /// Where `rank` puts its piece of each move that travels: one behind the other.
    fn places(rank: usize, moves: &[Move]) -> Vec<Option<usize>> {
        let mut end = 0;
        let mut place = |m: &Move| {
            travels(m, rank).then(|| {
                end += aligned(m.src.len);
                end - aligned(m.src.len)
            })
        };
        moves.iter().map(&mut place).collect()
    }

    proptest! {
        #[test]
        fn a_script_gives_and_takes_what_the_moves_say((size, moves) in phase(), (_, others) in phase()) {
            let places: Vec<_> = (0..size).map(|rank| places(rank, &moves)).collect();
            for me in 0..size {
                let mut ours = Script::default();
                // Nothing of an older script stays.
                let largest = others.iter().filter(|m| matches!((m.from, m.to), (Who::All, Who::All)));
                script(me, size, &largest.copied().collect::<Vec<_>>(), &mut ours);
                script(me, size, &moves, &mut ours);
                let gives = |i: usize| Some(Give { src: moves[i].src, offset: places[me][i]? });
                let expected: Vec<_> = (0..moves.len()).filter(|_| size > 1).filter_map(gives).collect();
                prop_assert_eq!(&ours.gives, &expected);

                let mut takes = ours.takes.iter();
                let mut peers = vec![];
                for (number, m) in moves.iter().enumerate().filter(|(_, m)| includes(m.to, me)) {
                    let take = takes.next().unwrap();
                    prop_assert_eq!((take.number, take.src, take.dst), (number, m.src, m.dst));
                    let reads: Vec<_> = (0..size).filter(|&r| r != me && includes(m.from, r)).collect();
                    let read = |&rank: &usize| (rank, places[rank][number].unwrap());
                    let expected: Vec<_> = reads.iter().map(read).collect();
                    let (found, finish) = match take.from {
                        Source::Own => (vec![], false),
                        Source::Peer { rank, offset } => (vec![(rank, offset)], false),
                        Source::All { offsets, finish, in_place } => {
                            prop_assert_eq!(in_place, take.src == take.dst);
                            let all = ours.offsets[offsets..][..size].iter().copied().enumerate();
                            (all.filter(|(rank, _)| *rank != me).collect(), finish)
                        }
                    };
                    prop_assert_eq!((found, finish), (expected, m.finish && m.from == Who::All));
                    let new: Vec<_> = reads.into_iter().filter(|rank| !peers.contains(rank)).collect();
                    peers.extend(new);
                    prop_assert_eq!(&ours.peers[..take.peers], &peers[..]);
                }
                prop_assert!(takes.next().is_none() && ours.peers.len() == peers.len());
            }
        }
    }

    /// Cells of a buffer of each rank, in bytes, and how many there are. The first is before `shift`.
    const CELLS: usize = 7;

    #[derive(Clone, Debug)]
    struct Case {
        cell: usize,
        moves: Vec<Move>,
        /// Ranks, in the order in which they begin.
        order: Vec<usize>,
    }

    /// Moves between cells, which may lie over one another: what is done twice, or not in order, shows.
    fn case() -> impl Strategy<Value = Case> {
        let size = 3u32;
        let who = move || prop_oneof![Just(Who::All), (0..size).prop_map(Who::One)];
        let span = || (prop_oneof![Just(Buf::Input), Just(Buf::Output), Just(Buf::Scratch)], 0..CELLS - 1);
        let cell = prop_oneof![Just(0usize), Just(4), Just(12), Just(240)];
        let moves = prop::collection::vec((who(), who(), span(), span(), any::<bool>()), 0..7);
        let order = Just((0..size as usize).collect::<Vec<_>>()).prop_shuffle();
        (cell, moves, order).prop_map(|(cell, moves, order)| {
            let span = |(buf, at): (Buf, usize)| Span { buf, off: at * cell, len: cell };
            let to_move = |(from, to, src, dst, finish)| {
                let (src, dst) = (span(src), span(dst));
                Move { from, to, src, dst, finish }
            };
            Case { cell, moves: moves.into_iter().map(to_move).collect(), order }
        })
    }

    struct Rank {
        memory: [Vec<u8>; 3],
        phases: Phases,
        ring: Ring,
    }

    impl Rank {
        fn new(me: usize, case: &Case, geometry: Geometry, hands_back: bool) -> Rank {
            let size = case.order.len();
            let copy = SingleCopy::new(
                crate::reach::Reach::new(0, vec![None; size]),
                SingleCopies::NONE,
                SingleCopies::NONE,
            );
            let bytes = |salt| (0..CELLS * case.cell).map(|i| (i * 7 + me * 13 + salt) as u8).collect();
            Rank {
                memory: [1, 2, 3].map(bytes),
                phases: Phases::new(
                    me,
                    (0..size as u32).collect(),
                    geometry.slot,
                    usize::MAX,
                    copy,
                    hands_back,
                ),
                ring: Ring::new(me, size, geometry.slots),
            }
        }

        fn run(&mut self, plan: &Arc<Plan>, case: &Case) -> PhaseRun {
            let call = Call::new(Collective::AllReduce, DType::I32, 1).pack();
            // SAFETY: the memory stays where it is, and nobody else touches it while phases run.
            let [input, output, scratch] = self.memory.each_mut().map(|m| unsafe { Region::of(m) });
            PhaseRun {
                plan: Arc::clone(plan),
                step: 0,
                shift: case.cell,
                buffers: Buffers { input, output, scratch },
                arith: Arith { dtype: DType::I32, op: ReduceOp::Avg, world: 3 },
                call,
                seq: 0,
                ctx: Ctx(1),
            }
        }

        /// By its script as far as that goes. Whether the phase is over.
        fn begin(&mut self, run: &PhaseRun, segment: &Segment) -> bool {
            let up = self.phases.take_up(run).unwrap().unwrap();
            let mut playing = self.phases.play(run, up, segment);
            assert!(playing.publish(&mut self.ring));
            let missing = playing.take(&mut self.ring).unwrap();
            let so_far = playing.so_far;
            if missing.is_some() {
                self.phases.keep(run.clone(), up, so_far);
            }
            missing.is_none()
        }
    }

    /// What all ranks' memory is after the phase has run three times: by scripts as far as they go, or without; with
    /// lines handed back, or not.
    fn execute(case: &Case, scripts: bool, hands_back: bool) -> Vec<[Vec<u8>; 3]> {
        let size = case.order.len();
        let geometry = Geometry { slot: 4096, slots: 2 }.fitted(size);
        let (segment, _file) = Segment::create(Layout::new(geometry, size), 7, Agreed::default(), 1).unwrap();
        let mut plan = Plan::default();
        plan.push(Op::Phase(case.moves.clone()), &[]);
        let plan = Arc::new(plan);
        let mut ranks: Vec<_> = (0..size).map(|me| Rank::new(me, case, geometry, hands_back)).collect();
        for _ in 0..3 {
            for &rank in &case.order {
                let rank = &mut ranks[rank];
                let run = rank.run(&plan, case);
                if scripts {
                    rank.begin(&run, &segment);
                } else {
                    rank.phases.submit(run).unwrap();
                    assert_eq!(rank.phases.publish(&segment, &mut rank.ring), Step::Moved);
                }
            }
            for rank in &mut ranks {
                while !rank.phases.is_empty() {
                    let step = rank.phases.consume(&segment, &mut rank.ring, &mut vec![]).unwrap();
                    assert_eq!(step, Step::Moved);
                }
            }
        }
        ranks.into_iter().map(|rank| rank.memory).collect()
    }

    proptest! {
        #[test]
        fn a_phase_goes_on_without_its_script_where_that_stopped(case in case()) {
            let expected = execute(&case, false, false);
            for (scripts, hands_back) in [(true, false), (false, true), (true, true)] {
                prop_assert_eq!(&execute(&case, scripts, hands_back), &expected);
            }
        }
    }

    #[test]
    fn a_script_is_given_up_between_two_takes() {
        let cell = |at: usize| Span { buf: Buf::Output, off: 8 * at, len: 8 };
        let to_0 = |from, src, dst| Move {
            from: Who::One(from),
            to: Who::One(0),
            src: cell(src),
            dst: cell(dst),
            finish: false,
        };
        let sum = Move { from: Who::All, to: Who::All, src: cell(4), dst: cell(4), finish: true };
        // The second overwrites what the first copied; the third waits, and those behind it lie further in the slots.
        let moves = vec![to_0(0, 0, 1), to_0(1, 0, 0), to_0(2, 1, 2), to_0(1, 2, 3), sum];
        let case = Case { cell: 8, moves, order: vec![1, 0, 2] };
        let mut script = Script::default();
        super::tests::script(0, 3, &case.moves, &mut script);
        let so_far = SoFar { published: true, come: 1, taken: 2 };
        assert_eq!((so_far.next_move(&script, 5), &script.peers[..]), (2, &[1, 2][..]));
        assert_eq!(execute(&case, true, false), execute(&case, false, false));
    }
}
