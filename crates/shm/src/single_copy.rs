//! Large blocks straight from one rank's private memory into another's: the kernel copies them (`process_vm_readv`,
//! `process_vm_writev`), so that they cross no slot.
//!
//! Two exchanges (`ring`) make a phase. In the first the ranks tell one another where their data lies; then each copies its
//! [`Part`]s. The second says whether all went well; where it did not for any rank, all run the phase again through slots.
//!
//! Where all ranks take from one another, each reads what it takes. Where one gives or takes alone, it would be the others that
//! copy, or it alone: so who gives writes a share of each block to where it belongs, and who takes reads the rest.
//!
//! Invariants
//! - **C1** Every rank decides alike, from the group's segment, the call and its moves ([`SingleCopy::takes`]), whether a phase begins so; and from the second
//!   exchange's heads, which all see, whether it goes on through slots.
//! - **C2** Nobody touches a peer's data before that peer has published the first exchange, and a rank's phase is over when all
//!   have published the second: as D1 and D2 of `direct`.
//! - **C3** A rank whose data would be written over while others may still read it, or be read when the phase runs again,
//!   offers none and takes none.
//! - **C4** A rank copies its own block before it reads its peers', a stretch at a time: two ranks are not at one block at once, and
//!   what a rank wrote last may leave its core's second cache on the way, out of which others read it slowly.
//! - **C5** A rank writes into a peer's memory only inside of its door (`door`), which the peer closes when it gives up.
//! - **C6** The parts of all ranks are disjoint and cover every block ([`Shares::parts`]).

use std::ops::Range;

use smddp_core::plan::{Buf, Move, Span, Who};
use smddp_core::transport::{Buffers, PhaseRun};
use smddp_core::{Collective, Region};

use crate::cut::{includes, travels};
use crate::equal_shares::CUT_ALIGN;
use crate::geometry::SingleCopies;
use crate::reach::Reach;
use crate::segment::Segment;

/// Exchanges of a phase that goes well.
pub(crate) const EXCHANGES: usize = 2;

/// The smallest block that is faster so than through slots where all take from one another, on data that its rank has just written
/// (docs/performance-log.md): a system call, and pages to be looked up, come before the first byte.
const LEAST: usize = 512 << 10;

/// And where one rank gives or takes alone.
const LEAST_ALONE: usize = 256 << 10;

/// The largest that is, there: above it, what is stored past the caches is (docs/adr/0022).
const MOST_ALONE: usize = 32 << 20;

/// The largest block of an all_gather that is: above it, what a rank and its peer read of it comes from main memory twice, and
/// through slots once.
const MOST_GATHERED: usize = 8 << 20;

/// Bytes of a block that are copied before the next rank's (C4): less, and they stay in the second cache; more, and they leave
/// the third as well.
const STRETCH: usize = 4 << 20;

/// What a rank says in the first exchange: where its buffers lie. All zero: it offers nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(crate) struct Offer {
    input: u64,
    output: u64,
    scratch: u64,
    /// Where this rank has its door, by local rank who is inside.
    door: u64,
}

impl Offer {
    /// What this rank offers; nothing where its data would be written over too early (C3).
    fn of(run: &PhaseRun, moves: &[Move], me: usize, segment: &Segment) -> Offer {
        let at = |span: Span| run.buffers.at(span, run.shift);
        // Another's block may be longer than this rank's buffers.
        let is_there = |m: &Move| m.from == Who::One(me as u32) && at(m.src).as_ptr() == at(m.dst).as_ptr();
        let writes = |m: &&Move| includes(m.to, me) && !is_there(m);
        let written = || moves.iter().filter(writes).map(|m| at(m.dst));
        let lasting = |m: &Move| written().all(|target| !target.overlaps(at(m.src)));
        if moves.iter().filter(|m| travels(m, me)).all(lasting) {
            let Buffers { input, output, scratch } = run.buffers;
            let [input, output, scratch] = [input, output, scratch].map(|region| region.as_ptr() as u64);
            Offer { input, output, scratch, door: segment.insides(me) }
        } else {
            Offer::default()
        }
    }

    /// Where `span` lies in its rank's memory, in the round that starts at `shift`.
    fn at(self, span: Span, shift: usize) -> Option<u64> {
        let (base, shift) = match span.buf {
            Buf::Input => (self.input, shift),
            Buf::Output => (self.output, shift),
            Buf::Scratch => (self.scratch, 0),
        };
        if base == 0 { None } else { base.checked_add((span.off + shift) as u64) }
    }
}

/// What a rank copies in one go: bytes `start..start + len` of the block that move `index` moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) way: Way,
    pub(crate) index: usize,
    pub(crate) start: usize,
    pub(crate) len: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// Within this rank's memory.
    Own,
    /// Out of this peer's.
    From(usize),
    /// Into this peer's.
    To(usize),
}

/// Who copies what of a phase's blocks.
#[derive(Clone, Copy)]
struct Shares {
    /// Of a block's bytes, so many of `of` are written by the rank that gives it.
    given: usize,
    of: usize,
}

impl Shares {
    /// `None` where the blocks of such a call are not copied so. What a rank that gives or takes alone copies for itself besides
    /// takes about half as long as as much between ranks.
    fn of(collective: Collective, size: usize) -> Option<Shares> {
        let (given, of) = match collective {
            Collective::AllToAll | Collective::AllGather => (0, 1),
            Collective::Broadcast => (1, size),
            Collective::Scatter => (1, 2 * size),
            Collective::Gather => (2 * size - 1, 2 * size),
            _ => return None,
        };
        Some(Shares { given, of })
    }

    /// Where the giver's share of a block of `len` bytes begins.
    fn split(self, len: usize) -> usize {
        (len / self.of * (self.of - self.given)).next_multiple_of(CUT_ALIGN).min(len)
    }

    /// What rank `me` of `size` copies, in this order (C4, C6).
    fn parts(self, moves: &[Move], me: usize, size: usize, parts: &mut Vec<Part>) {
        parts.clear();
        let longest = moves.iter().map(|m| m.src.len).max().unwrap_or(0);
        let mut push = |way, index, range: Range<usize>, turn: usize| {
            let start = range.end.min(range.start + turn * STRETCH);
            let len = STRETCH.min(range.end - start);
            if len > 0 {
                parts.push(Part { way, index, start, len });
            }
        };
        for turn in 0..longest.div_ceil(STRETCH) {
            for (index, m) in moves.iter().enumerate() {
                if m.from == Who::One(me as u32) && includes(m.to, me) {
                    push(Way::Own, index, 0..m.src.len, turn);
                }
            }
            for (index, m) in moves.iter().enumerate() {
                let (len, split) = (m.src.len, self.split(m.src.len));
                match m.from {
                    Who::One(from) if from as usize != me => {
                        if includes(m.to, me) {
                            push(Way::From(from as usize), index, 0..split, turn);
                        }
                    }
                    _ => {
                        let takers = (0..size).filter(|&rank| rank != me && includes(m.to, rank));
                        takers.for_each(|rank| push(Way::To(rank), index, split..len, turn));
                    }
                }
            }
        }
    }
}

/// This rank's way to its peers' private memory.
pub(crate) struct SingleCopy {
    /// Which phases of the group begin so at all (C1).
    tried: SingleCopies,
    /// For which this rank offers its memory: none, where it did not work once.
    wanted: SingleCopies,
    reach: Reach,
    /// What the peers of the phase at hand offer, by local rank.
    offers: Vec<Offer>,
    /// What this rank copies of it.
    parts: Vec<Part>,
    /// Something of the phase at hand could not be taken.
    failed: bool,
}

impl SingleCopy {
    /// Does the group try, and does this rank want it?
    pub(crate) fn new(reach: Reach, tried: SingleCopies, wanted: SingleCopies) -> SingleCopy {
        let wanted = if reach.is_whole() { wanted } else { SingleCopies::NONE };
        let offers = Vec::with_capacity(reach.size());
        SingleCopy { tried, wanted, reach, offers, parts: Vec::new(), failed: false }
    }

    /// Whether a phase begins so (C1): the group tries and is on this node alone, and there are large blocks.
    pub(crate) fn takes(&self, run: &PhaseRun, moves: &[Move]) -> bool {
        let size = self.reach.size();
        let Some(collective) = collective_of(run).filter(|&collective| self.tried.allow(collective)) else {
            return false;
        };
        if size < 2 || run.arith.world as usize != size {
            return false;
        }
        let sizes = match collective {
            Collective::AllToAll => LEAST..=usize::MAX,
            // With more ranks, each block is read by several: a slot's lines come once to a cache that they share.
            Collective::AllGather if size == 2 => LEAST..=MOST_GATHERED,
            Collective::Broadcast if size == 2 => LEAST_ALONE..=MOST_ALONE,
            Collective::Scatter | Collective::Gather => LEAST_ALONE..=MOST_ALONE,
            _ => return false,
        };
        let longest = moves.iter().map(|m| m.src.len).max().unwrap_or(0);
        sizes.contains(&longest) && moves.iter().all(|m| matches!(m.from, Who::One(_)))
    }

    /// The phase at hand is over.
    pub(crate) fn forget(&mut self) {
        self.offers.clear();
        self.failed = false;
    }

    /// Ranks whose offers are known.
    pub(crate) fn known(&self) -> usize {
        self.offers.len()
    }

    /// What this rank offers in `run`. Nothing, too, where it copies nothing itself: all then know at once that the phase runs
    /// again.
    pub(crate) fn offer(&self, run: &PhaseRun, moves: &[Move], me: usize, segment: &Segment) -> Offer {
        let wanted = collective_of(run).is_some_and(|collective| self.wanted.allow(collective));
        if wanted { Offer::of(run, moves, me, segment) } else { Offer::default() }
    }

    /// Takes note of what the next rank offers.
    pub(crate) fn learn(&mut self, offer: Offer) {
        self.failed |= offer == Offer::default();
        self.offers.push(offer);
    }

    /// Whether a peer `failed`.
    pub(crate) fn hear(&mut self, failed: bool) {
        self.failed |= failed;
    }

    pub(crate) fn has_failed(&self) -> bool {
        self.failed
    }

    /// All offers are known: shares the work out.
    pub(crate) fn share_out(&mut self, run: &PhaseRun, moves: &[Move], me: usize) {
        self.parts.clear();
        if let Some(shares) = collective_of(run).and_then(|it| Shares::of(it, self.reach.size())) {
            shares.parts(moves, me, self.reach.size(), &mut self.parts);
        }
    }

    pub(crate) fn part(&self, index: usize) -> Option<Part> {
        self.parts.get(index).copied()
    }

    /// The bytes `done..` of what `rank` has at `span`, as many as fit into `target`. Whether they came; if not, the phase
    /// at hand has failed here.
    pub(crate) fn read(
        &mut self,
        rank: usize,
        span: Span,
        shift: usize,
        done: usize,
        target: Region,
    ) -> bool {
        let from = self.offers.get(rank).and_then(|offer| offer.at(span, shift));
        let came = from.is_some_and(|from| self.reach.read(rank, from.wrapping_add(done as u64), target));
        self.note(came)
    }

    /// Writes `source` into what `rank` has at `span`, from `done` on. Whether it is there; if not, the phase at hand has failed
    /// here.
    pub(crate) fn write(
        &mut self,
        rank: usize,
        span: Span,
        shift: usize,
        done: usize,
        source: Region,
        segment: &Segment,
    ) -> bool {
        let to = self.offers.get(rank).and_then(|offer| Some((offer.door, offer.at(span, shift)?)));
        let write = |(door, to): (u64, u64)| {
            self.reach.write(rank, door, to.wrapping_add(done as u64), source, segment)
        };
        let went = to.is_some_and(write);
        self.note(went)
    }

    /// Remembers where something could not be copied.
    fn note(&mut self, copied: bool) -> bool {
        if !copied {
            self.wanted = SingleCopies::NONE;
            self.failed = true;
        }
        copied
    }

    /// Bytes copied between this rank's memory and its peers' so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.reach.bytes()
    }
}

fn collective_of(run: &PhaseRun) -> Option<Collective> {
    run.call.unpack().map(|call| call.collective)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use smddp_core::call::Call;
    use smddp_core::dtype::{DType, ReduceOp};
    use smddp_core::plan::Plan;
    use smddp_core::transport::{Arith, Ctx};

    use super::*;

    fn moves(collective: Collective, size: usize, root: u32, len: usize) -> Vec<Move> {
        let span = |off| Span::output(off, len);
        let one = |from, to| Move { from, to, src: span(0), dst: span(0), finish: true };
        let ranks = 0..size as u32;
        match collective {
            Collective::Broadcast => vec![one(Who::One(root), Who::All)],
            Collective::AllGather => ranks.map(|from| one(Who::One(from), Who::All)).collect(),
            Collective::Scatter => ranks.map(|to| one(Who::One(root), Who::One(to))).collect(),
            Collective::Gather => ranks.map(|from| one(Who::One(from), Who::One(root))).collect(),
            _ => {
                let from = |from| ranks.clone().map(move |to| (from, to));
                ranks.clone().flat_map(from).map(|(from, to)| one(Who::One(from), Who::One(to))).collect()
            }
        }
    }

    const KINDS: [Collective; 5] = [
        Collective::Broadcast,
        Collective::AllGather,
        Collective::Scatter,
        Collective::Gather,
        Collective::AllToAll,
    ];

    proptest! {
        /// C6: of each move, each taker's bytes are copied by one rank, once.
        #[test]
        fn parts_cover_every_block_once(
            kind in 0..KINDS.len(), size in 2usize..6, root in 0u32..6,
            len in prop_oneof![31 => 0usize..20 << 20, 1 => (1usize << 32) - 99..(1usize << 32) + 99],
        ) {
            let moves = moves(KINDS[kind], size, root % size as u32, len);
            let shares = Shares::of(KINDS[kind], size).unwrap();
            // (move, taker, start, end)
            let mut copied = Vec::new();
            for me in 0..size {
                let mut parts = Vec::new();
                shares.parts(&moves, me, size, &mut parts);
                for Part { way, index, start, len } in parts {
                    let giver = match moves[index].from { Who::One(one) => one as usize, Who::All => unreachable!() };
                    let taker = match way {
                        Way::Own => { prop_assert_eq!(giver, me); me }
                        Way::From(peer) => { prop_assert_eq!(giver, peer); me }
                        Way::To(peer) => { prop_assert_eq!(giver, me); peer }
                    };
                    prop_assert!(len > 0 && len <= STRETCH);
                    copied.push((index, taker, start, start + len));
                }
            }
            copied.sort_unstable();
            let takers = |m: &Move| (0..size).filter(|&rank| includes(m.to, rank)).collect::<Vec<_>>();
            for (index, m) in moves.iter().enumerate() {
                for taker in takers(m) {
                    let mut end = 0;
                    for part in copied.iter().filter(|part| (part.0, part.1) == (index, taker)) {
                        prop_assert_eq!(part.2, end);
                        end = part.3;
                    }
                    prop_assert_eq!(end, len);
                }
            }
            let bytes: usize = copied.iter().map(|part| part.3 - part.2).sum();
            prop_assert_eq!(bytes, moves.iter().map(|m| takers(m).len() * len).sum::<usize>());
        }
    }

    /// C1: a rank that knows no names for its peers' processes, in a container of its own say, begins as they do, and offers nothing.
    #[test]
    fn a_rank_that_cannot_begins_as_the_others_do() {
        let moves = moves(Collective::AllToAll, 2, 0, LEAST);
        let mut memory = vec![0u8; LEAST];
        // SAFETY: nothing is read or written.
        let all = unsafe { Region::of(&mut memory) };
        let run = PhaseRun {
            plan: std::sync::Arc::new(Plan::default()),
            step: 0,
            shift: 0,
            buffers: Buffers { input: all, output: all, scratch: Region::EMPTY },
            arith: Arith { dtype: DType::U8, op: ReduceOp::Sum, world: 2 },
            call: Call::new(Collective::AllToAll, DType::U8, LEAST as u64).pack(),
            seq: 0,
            ctx: Ctx(0),
        };
        for pids in [vec![Some(1), Some(2)], vec![None; 2]] {
            let copy = SingleCopy::new(Reach::new(0, pids), SingleCopies::ALL, SingleCopies::ALL);
            assert!(copy.takes(&run, &moves));
        }
        let able =
            SingleCopy::new(Reach::new(0, vec![Some(1), Some(2)]), SingleCopies::ALL, SingleCopies::ALL);
        let unable =
            SingleCopy::new(Reach::new(0, vec![Some(1), None]), SingleCopies::ALL, SingleCopies::ALL);
        assert_eq!((able.wanted, unable.wanted), (SingleCopies::ALL, SingleCopies::NONE));
    }
}
