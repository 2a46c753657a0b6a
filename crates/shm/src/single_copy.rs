//! Large blocks straight from a peer's private memory into this rank's: the kernel copies them (`process_vm_readv`), so that
//! they cross no slot.
//!
//! Two exchanges (`ring`) make a phase. In the first the ranks tell one another where their data lies; then each takes what
//! it needs from its peers. The second says whether all went well; where it did not for any rank, all run the phase again
//! through slots.
//!
//! Invariants
//! - **C1** Every rank decides alike, from the group's segment, the call and its moves ([`SingleCopy::takes`]), whether a phase begins so; and from the second
//!   exchange's heads, which all see, whether it goes on through slots.
//! - **C2** Nobody reads a peer's data before that peer has published the first exchange, and a rank's phase is over when all
//!   have published the second: as D1 and D2 of `direct`.
//! - **C3** A rank whose data would be written over while others may still read it, or be read when the phase runs again,
//!   offers none and takes none.
//! - **C4** A rank copies its own block before it reads its peers', a stretch at a time: two ranks are not at one block at once, and
//!   what a rank wrote last may leave its core's second cache on the way, out of which others read it slowly.

use smddp_core::plan::{Buf, Move, Span, Who};
use smddp_core::transport::{Buffers, PhaseRun};
use smddp_core::{Collective, Region};

use crate::cut::{includes, travels};

/// Exchanges of a phase that goes well.
pub(crate) const EXCHANGES: usize = 2;

/// The smallest block that is faster so than through slots, on data that its rank has just written
/// (docs/performance-log.md): a system call, and pages to be looked up, come before the first byte.
const LEAST: usize = 512 << 10;

/// The largest block of an all_gather that is: above it, what a rank and its peer read of it comes from main memory twice, and
/// through slots once.
const MOST_GATHERED: usize = 8 << 20;

/// Bytes of a block that are copied before the next rank's (C4): less, and they stay in the second cache; more, and they leave
/// the third as well.
pub(crate) const STRETCH: usize = 4 << 20;

/// Bytes one poll may copy so: a system call each. Smaller ones cost up to a quarter (docs/performance-log.md).
pub(crate) const AT_ONCE: usize = 1 << 20;

/// What a rank says in the first exchange: where its buffers lie. All zero: it offers nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(crate) struct Offer {
    input: u64,
    output: u64,
    scratch: u64,
}

impl Offer {
    /// C3.
    fn of(run: &PhaseRun, moves: &[Move], me: usize) -> Offer {
        let at = |span: Span| run.buffers.at(span, run.shift);
        // Another's block may be longer than this rank's buffers.
        let is_there = |m: &Move| m.from == Who::One(me as u32) && at(m.src).as_ptr() == at(m.dst).as_ptr();
        let writes = |m: &&Move| includes(m.to, me) && !is_there(m);
        let written = || moves.iter().filter(writes).map(|m| at(m.dst));
        let lasting = |m: &Move| written().all(|target| !target.overlaps(at(m.src)));
        if moves.iter().filter(|m| travels(m, me)).all(lasting) {
            let Buffers { input, output, scratch } = run.buffers;
            let [input, output, scratch] = [input, output, scratch].map(|region| region.as_ptr() as u64);
            Offer { input, output, scratch }
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

/// This rank's way to its peers' private memory.
pub(crate) struct SingleCopy {
    /// Whether phases of the group begin so at all (C1).
    tried: bool,
    /// The peers' processes, by local rank; `None` where this rank knows no name for one.
    pids: Vec<Option<i32>>,
    /// It is not wanted here, or did not work once: it is not tried again.
    refused: bool,
    /// What the peers of the phase at hand offer, by local rank.
    offers: Vec<Offer>,
    /// Something of the phase at hand could not be taken.
    failed: bool,
    /// Bytes taken so far.
    bytes: u64,
}

impl SingleCopy {
    /// Does the group try, and does this rank want it?
    pub(crate) fn new(pids: Vec<Option<i32>>, tried: bool, wanted: bool) -> SingleCopy {
        let offers = Vec::with_capacity(pids.len());
        SingleCopy { tried, offers, pids, refused: !wanted, failed: false, bytes: 0 }
    }

    /// Whether a phase begins so (C1): the group tries and is on this node alone, every rank of it takes from all others while
    /// they take from it, and there are large blocks.
    pub(crate) fn takes(&self, run: &PhaseRun, moves: &[Move]) -> bool {
        let size = self.pids.len();
        if !self.tried || size < 2 || run.arith.world as usize != size {
            return false;
        }
        let most = match run.call.unpack().map(|call| call.collective) {
            Some(Collective::AllToAll) => usize::MAX,
            // With more ranks, each block is read by several: a slot's lines come once to a cache that they share.
            Some(Collective::AllGather) if size == 2 => MOST_GATHERED,
            _ => return false,
        };
        let longest = moves.iter().map(|m| m.src.len).max().unwrap_or(0);
        (LEAST..=most).contains(&longest) && moves.iter().all(|m| matches!(m.from, Who::One(_)))
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

    /// What this rank offers in `run`. Nothing, too, where it reads nothing itself: all then know at once that the phase runs
    /// again.
    pub(crate) fn offer(&self, run: &PhaseRun, moves: &[Move], me: usize) -> Offer {
        if self.refused { Offer::default() } else { Offer::of(run, moves, me) }
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
        let came = match (from, self.pids.get(rank).copied().flatten()) {
            (Some(from), Some(pid)) => match read_process(pid, from + done as u64, target) {
                Ok(came) => came == target.len(),
                Err(error) => {
                    tracing::debug!(pid, %error, "peers' memory cannot be read: their data comes through slots");
                    self.refused = true;
                    false
                }
            },
            (None, Some(_)) => false,
            (_, None) => {
                self.refused = true;
                false
            }
        };
        self.failed |= !came;
        self.bytes += if came { target.len() as u64 } else { 0 };
        came
    }

    /// Bytes taken so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// How many bytes came of those at `from` in process `pid`.
fn read_process(pid: i32, from: u64, target: Region) -> std::io::Result<usize> {
    let local = libc::iovec { iov_base: target.as_ptr().cast(), iov_len: target.len() };
    let remote = libc::iovec { iov_base: from as *mut libc::c_void, iov_len: target.len() };
    // SAFETY: `target` is valid and this call's alone (R1, T1); the kernel checks the other process's range itself.
    let came = unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) };
    usize::try_from(came).map_err(|_| std::io::Error::last_os_error())
}
