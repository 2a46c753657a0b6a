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

use crate::cut::{CUT_ALIGN, includes, travels};
use crate::door;
use crate::geometry::SingleCopies;
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

/// Bytes one poll may copy so: a system call each. Smaller ones cost up to a quarter (docs/performance-log.md).
pub(crate) const AT_ONCE: usize = 1 << 20;

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
    /// C3.
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
    /// The peers' processes, by local rank; `None` where this rank knows no name for one.
    pids: Vec<Option<i32>>,
    /// What the peers of the phase at hand offer, by local rank.
    offers: Vec<Offer>,
    /// What this rank copies of it.
    parts: Vec<Part>,
    /// Something of the phase at hand could not be taken.
    failed: bool,
    /// Bytes copied between this rank's memory and its peers' so far.
    bytes: u64,
}

impl SingleCopy {
    /// Of ranks with these processes. Does the group try, and does this rank want it?
    pub(crate) fn new(pids: Vec<Option<i32>>, tried: SingleCopies, wanted: SingleCopies) -> SingleCopy {
        let wanted = if pids.contains(&None) { SingleCopies::NONE } else { wanted };
        let offers = Vec::with_capacity(pids.len());
        SingleCopy { tried, wanted, offers, pids, parts: Vec::new(), failed: false, bytes: 0 }
    }

    /// Whether a phase begins so (C1): the group tries and is on this node alone, and there are large blocks.
    pub(crate) fn takes(&self, run: &PhaseRun, moves: &[Move]) -> bool {
        let size = self.pids.len();
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
        if let Some(shares) = collective_of(run).and_then(|it| Shares::of(it, self.pids.len())) {
            shares.parts(moves, me, self.pids.len(), &mut self.parts);
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
        let from = self.peer(rank).and_then(|(pid, offer)| Some((pid, offer.at(span, shift)?)));
        let came = from.map(|(pid, from)| read_process(pid, from + done as u64, target));
        self.note(came, target.len())
    }

    /// Writes `source` into what `rank` has at `span`, from `done` on. Whether it is there; if not, the phase at hand has failed
    /// here.
    pub(crate) fn write(
        &mut self,
        (rank, me): (usize, usize),
        span: Span,
        shift: usize,
        done: usize,
        source: Region,
        segment: &Segment,
    ) -> bool {
        let to = self.peer(rank).and_then(|(pid, offer)| Some((pid, offer.at(span, shift)?, offer.door)));
        let went = to.map(|(pid, to, door)| {
            if !door::enter(segment, rank, me) {
                // It tells why by itself.
                return Ok(0);
            }
            let went = write_process(pid, to + done as u64, source, door + 8 * me as u64);
            if !matches!(went, Ok(went) if went == source.len()) {
                door::leave(segment, rank, me);
            }
            went
        });
        self.note(went, source.len())
    }

    /// The process of `rank`, and what it offers.
    fn peer(&self, rank: usize) -> Option<(i32, Offer)> {
        Some((self.pids.get(rank).copied().flatten()?, *self.offers.get(rank)?))
    }

    /// Whether all of `len` bytes were copied; remembers if they were not.
    fn note(&mut self, copied: Option<std::io::Result<usize>>, len: usize) -> bool {
        if let Some(Err(error)) = &copied {
            tracing::debug!(%error, "peers' memory cannot be reached: data goes through slots");
            self.wanted = SingleCopies::NONE;
        }
        let all = matches!(copied, Some(Ok(copied)) if copied == len);
        self.failed |= !all;
        self.bytes += if all { len as u64 } else { 0 };
        all
    }

    /// Bytes copied between this rank's memory and its peers' so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}

fn collective_of(run: &PhaseRun) -> Option<Collective> {
    run.call.unpack().map(|call| call.collective)
}

/// How many bytes came of those at `from` in process `pid`.
fn read_process(pid: i32, from: u64, target: Region) -> std::io::Result<usize> {
    let local = libc::iovec { iov_base: target.as_ptr().cast(), iov_len: target.len() };
    let remote = libc::iovec { iov_base: from as *mut libc::c_void, iov_len: target.len() };
    // SAFETY: `target` is valid and this call's alone (R1, T1); the kernel checks the other process's range itself.
    let came = unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) };
    usize::try_from(came).map_err(|_| std::io::Error::last_os_error())
}

/// How many bytes of `source` were written to `to` in process `pid`; if all, that this rank has left its door is, too, behind
/// them: at `inside` (O2).
fn write_process(pid: i32, to: u64, source: Region, inside: u64) -> std::io::Result<usize> {
    let mut outside = door::OUTSIDE;
    let vector = |base: *mut libc::c_void, iov_len| libc::iovec { iov_base: base, iov_len };
    let word = size_of_val(&outside);
    let local = [vector(source.as_ptr().cast(), source.len()), vector((&raw mut outside).cast(), word)];
    let remote = [vector(to as *mut libc::c_void, source.len()), vector(inside as *mut libc::c_void, word)];
    // SAFETY: `source` is valid and nobody writes to it meanwhile (R1); the kernel checks the other process's ranges itself, which
    // that process has offered and keeps for as long as this rank is inside its door (C2, C5).
    let went = unsafe { libc::process_vm_writev(pid, local.as_ptr(), 2, remote.as_ptr(), 2, 0) };
    let went = usize::try_from(went).map_err(|_| std::io::Error::last_os_error())?;
    // All but the word: then it does not say that this rank has left.
    Ok(if went == source.len() + word { source.len() } else { went.min(source.len().saturating_sub(1)) })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use smddp_core::call::Call;
    use smddp_core::dtype::{DType, ReduceOp};
    use smddp_core::plan::Plan;
    use smddp_core::transport::{Arith, Ctx};

    use super::*;
    use crate::geometry::{Agreed, Geometry, Layout};

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
            kind in 0..KINDS.len(), size in 2usize..6, root in 0u32..6, len in 0usize..20 << 20,
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

    /// O2 and C5, with both ranks in this process.
    #[test]
    fn what_is_written_through_an_open_door_is_there_and_nobody_is_left_inside() {
        let layout = Layout::new(Geometry { slot: 4096, slots: 2 }.fitted(2), 2);
        let (segment, _file) = Segment::create(layout, 7, Agreed::default(), 1).unwrap();
        let own = i32::try_from(std::process::id()).ok();
        let mut copy = SingleCopy::new(vec![own; 2], SingleCopies::ALL, SingleCopies::ALL);
        let (mut source, mut target) = ([5u8; 100], [0u8; 200]);
        // SAFETY: both outlive the calls below, which alone touch them.
        let source = unsafe { Region::of(&mut source) };
        let output = target.as_mut_ptr() as u64;
        for rank in [0, 1] {
            copy.learn(Offer { input: 1, output, scratch: 1, door: segment.insides(rank) });
        }
        let place = Span::output(20, 150);
        assert!(copy.write((1, 0), place, 10, 3, source, &segment));
        assert_eq!(
            (&target[..33], &target[33..133], &target[133..]),
            (&[0; 33][..], &[5; 100][..], &[0; 67][..])
        );
        assert!(!door::is_inside(&segment, 1, 0));
        target.fill(0);
        // Memory that is not there, of which the kernel says so: the rank has left all the same.
        copy.offers[1].output = 4096;
        assert!(!copy.write((1, 0), place, 10, 3, source, &segment));
        assert!(!door::is_inside(&segment, 1, 0));
        copy.offers[1].output = output;
        door::close(&segment, 1);
        assert!(!copy.write((1, 0), place, 10, 3, source, &segment));
        assert_eq!((target, copy.bytes()), ([0; 200], 100));
        assert!(!door::is_inside(&segment, 1, 0));
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
            ctx: Ctx(0),
        };
        for pids in [vec![Some(1), Some(2)], vec![None; 2]] {
            let copy = SingleCopy::new(pids, SingleCopies::ALL, SingleCopies::ALL);
            assert!(copy.takes(&run, &moves));
        }
        let able = SingleCopy::new(vec![Some(1), Some(2)], SingleCopies::ALL, SingleCopies::ALL);
        let unable = SingleCopy::new(vec![Some(1), None], SingleCopies::ALL, SingleCopies::ALL);
        assert_eq!((able.wanted, unable.wanted), (SingleCopies::ALL, SingleCopies::NONE));
    }
}
