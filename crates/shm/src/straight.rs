//! Large messages straight from one rank's private memory into another's, copied by both (`deal`, `reach`).
//!
//! A frame that carries none of its data tells of such a message (*offer*): where it lies, and by which deal it is copied. Nothing is copied before its
//! receive is posted, and it holds up no other message.

use smddp_core::Region;
use smddp_core::transport::Message;

use crate::deal::{Deal, End, Stand};
use crate::layout::Memory;
use crate::reach::{AT_ONCE, Reach, still_stood};
use crate::segment::Segment;

/// The shortest message that is faster so than through cells (docs/performance-log.md).
pub(crate) const LEAST: usize = 256 << 10;

/// A piece is a quarter of its message, at least so long and at most [`AT_ONCE`]: a system call each, and neither side ends long after the other.
const PIECES: usize = 4;
const SHORTEST: usize = 64 << 10;

/// A message that this rank gives, or takes.
pub(crate) struct Straight {
    pub(crate) message: Message,
    /// Number of its deal, among those of its giver with its taker.
    pub(crate) deal: usize,
    /// Where it lies in its giver's memory.
    pub(crate) from: u64,
}

/// What came of a look at one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Nothing,
    Moved,
    /// The deal is no longer this rank's.
    Over(End),
}

/// This rank's part of such messages.
pub(crate) struct Copier {
    me: usize,
    reach: Reach,
    /// It works, as far as is known, and nobody has forbidden it.
    wanted: bool,
}

fn pieces(total: usize) -> u32 {
    total.div_ceil(piece(total)) as u32
}

fn piece(total: usize) -> usize {
    (total / PIECES).clamp(SHORTEST, AT_ONCE).next_multiple_of(SHORTEST)
}

/// Piece `index` of `whole`; empty behind its end.
fn nth_piece(whole: Region, index: u32) -> (usize, Region) {
    let len = piece(whole.len());
    let start = whole.len().min(len.saturating_mul(index as usize));
    (start, whole.slice(start, len.min(whole.len() - start)))
}

impl Copier {
    pub(crate) fn new(me: usize, reach: Reach, wanted: bool) -> Copier {
        let wanted = wanted && reach.is_whole();
        Copier { me, reach, wanted }
    }

    /// Bytes copied so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.reach.bytes()
    }

    /// Whether a message of so many bytes is offered.
    pub(crate) fn offers(&self, len: usize) -> bool {
        self.wanted && len >= LEAST
    }

    /// Offers `message` to `peer` by a deal that is free, if one is; its frame is to follow.
    pub(crate) fn offer(&self, segment: &Segment, peer: usize, message: Message) -> Option<Straight> {
        let is_free = |&at: &usize| segment.deal(self.me, peer, at).stand() == Stand::Free;
        let deal = (0..crate::deal::DEALS).find(is_free)?;
        segment.deal(self.me, peer, deal).offer(pieces(message.region.len()));
        Some(Straight { message, deal, from: message.region.as_ptr() as u64 })
    }

    /// Lets `peer` write what it has offered.
    pub(crate) fn accept(&self, segment: &Segment, peer: usize, straight: &Straight) {
        if self.wanted {
            let target = straight.message.region.as_ptr() as u64;
            self.taken(segment, peer, straight).accept(target, segment.insides(self.me));
        }
    }

    /// Has `peer` send what it offered through cells.
    pub(crate) fn refuse(&self, segment: &Segment, peer: usize, deal: usize) {
        segment.deal(peer, self.me, deal).end(End::Refused);
    }

    /// Looks after a message to `peer`: writes a piece, if one is left and `budget`.
    pub(crate) fn give(
        &mut self,
        segment: &Segment,
        peer: usize,
        straight: &Straight,
        budget: &mut usize,
    ) -> Outcome {
        let deal = segment.deal(self.me, peer, straight.deal);
        match deal.stand() {
            Stand::Over(end) => {
                deal.free();
                Outcome::Over(end)
            }
            Stand::Accepted if self.wanted && *budget > 0 => match deal.claim_back() {
                Some(index) => {
                    let (to, door) = deal.target();
                    let (start, source) = nth_piece(straight.message.region, index);
                    let to = to.wrapping_add(start as u64);
                    *budget = budget.saturating_sub(source.len());
                    if !source.is_empty() && self.reach.write(peer, door, to, source, segment) {
                        deal.count();
                    } else {
                        deal.leave_back();
                        self.wanted = false;
                    }
                    Outcome::Moved
                }
                None => Outcome::Nothing,
            },
            _ => Outcome::Nothing,
        }
    }

    /// Looks after a message from `peer`: reads a piece, if one is left and `budget`.
    pub(crate) fn take(
        &mut self,
        segment: &Segment,
        peer: usize,
        straight: &Straight,
        budget: &mut usize,
    ) -> Outcome {
        let deal = self.taken(segment, peer, straight);
        if *budget == 0 {
            return Outcome::Nothing;
        }
        if let Some(index) = deal.claim_front().filter(|_| self.wanted) {
            let (start, target) = nth_piece(straight.message.region, index);
            *budget = budget.saturating_sub(target.len());
            if self.reach.read(peer, straight.from.wrapping_add(start as u64), target) {
                return Outcome::Moved;
            }
            self.wanted = false;
        }
        if !self.wanted {
            deal.end(End::Unable);
            return Outcome::Over(End::Unable);
        }
        // Of a rank that has given up nothing counts; why it did is heard soon. Nor does what a stranger with its number had there.
        if deal.is_whole(pieces(straight.message.region.len()))
            && still_stood(segment, peer)
            && self.reach.is_alive(peer)
        {
            deal.end(End::Taken);
            return Outcome::Over(End::Taken);
        }
        Outcome::Nothing
    }

    /// Whether a message to `peer` is not over before that does something.
    pub(crate) fn waits_to_give(&self, segment: &Segment, peer: usize, straight: &Straight) -> bool {
        !matches!(segment.deal(self.me, peer, straight.deal).stand(), Stand::Over(_))
    }

    /// Whether a message from `peer` is not over before that has written what it claimed, or never will be.
    pub(crate) fn waits_to_take(&self, segment: &Segment, peer: usize, straight: &Straight) -> bool {
        let pieces = pieces(straight.message.region.len());
        self.taken(segment, peer, straight).waits_for_giver(pieces) || !self.reach.is_alive(peer)
    }

    fn taken<'a>(&self, segment: &'a Segment, peer: usize, straight: &Straight) -> &'a Deal {
        segment.deal(peer, self.me, straight.deal)
    }
}

#[cfg(test)]
mod tests {
    use smddp_core::call::{Call, Collective};
    use smddp_core::dtype::DType;
    use smddp_core::transport::{Ctx, MsgKey};

    use super::*;
    use crate::door;
    use crate::geometry::{Agreed, Geometry, Layout};

    const LEN: usize = 1 << 20;

    /// Rank 0 has offered `source` to rank 1, which has accepted; both in this process.
    fn agreed(source: &mut [u8], target: &mut [u8]) -> (Segment, [Copier; 2], [Straight; 2]) {
        let layout = Layout::new(Geometry { slot: 4096, slots: 2 }.fitted(2), 2);
        let (segment, _file) = Segment::create(layout, 7, Agreed::default(), 1).unwrap();
        let own = i32::try_from(std::process::id()).ok();
        let copiers = [0, 1].map(|me| Copier::new(me, Reach::new(me, vec![own; 2]), true));
        let message = |bytes: &mut [u8]| Message {
            key: MsgKey { group: 7, seq: MsgKey::P2P, tag: 0 },
            peer: 0,
            peer_rank: 0,
            // SAFETY: every test keeps the bytes while it copies.
            region: unsafe { Region::of(bytes) },
            call: Call::new(Collective::SendRecv, DType::U8, LEN as u64).pack(),
            ctx: Ctx(0),
        };
        let given = copiers[0].offer(&segment, 1, message(source)).unwrap();
        let taken = Straight { message: message(target), ..given };
        copiers[1].accept(&segment, 0, &taken);
        (segment, copiers, [given, taken])
    }

    /// Its callers may have written over what was read last.
    #[test]
    fn what_comes_of_a_rank_that_has_given_up_is_not_taken() {
        let (mut source, mut target) = (vec![1; LEN], vec![0; LEN]);
        let (segment, [_, mut taker], [_, taken]) = agreed(&mut source, &mut target);
        for _ in 0..pieces(LEN) {
            assert_eq!(taker.take(&segment, 0, &taken, &mut AT_ONCE.clone()), Outcome::Moved);
        }
        door::close(&segment, 0, door::Why::Failed);
        assert_eq!(taker.take(&segment, 0, &taken, &mut AT_ONCE.clone()), Outcome::Nothing);
    }

    /// What was read last may have been a stranger's.
    #[test]
    fn what_comes_of_a_process_that_has_ended_is_not_taken() {
        let (mut source, mut target) = (vec![1; LEN], vec![0; LEN]);
        let (segment, [_, mut taker], [_, taken]) = agreed(&mut source, &mut target);
        taker.reach = taker.reach.of_stranger(0);
        for _ in 0..pieces(LEN) {
            assert_eq!(taker.take(&segment, 0, &taken, &mut AT_ONCE.clone()), Outcome::Moved);
        }
        assert_eq!(taker.take(&segment, 0, &taken, &mut AT_ONCE.clone()), Outcome::Nothing);
        assert!(taker.waits_to_take(&segment, 0, &taken), "it says who is missing");
    }

    #[test]
    fn nothing_is_written_for_a_rank_that_has_given_up() {
        let (mut source, mut target) = (vec![1; LEN], vec![0; LEN]);
        let (segment, [mut giver, _], [given, _]) = agreed(&mut source, &mut target);
        assert_eq!(giver.give(&segment, 1, &given, &mut AT_ONCE.clone()), Outcome::Moved);
        door::close(&segment, 1, door::Why::Failed);
        target.fill(2);
        for _ in 0..10 {
            giver.give(&segment, 1, &given, &mut AT_ONCE.clone());
        }
        assert!(target == vec![2; LEN]);
        assert_eq!(giver.bytes(), (LEN / 4) as u64, "but for the first piece");
    }

    /// What the giver could not write, the taker reads.
    #[test]
    fn a_piece_that_cannot_be_written_is_left_to_the_taker() {
        let (mut source, mut target) = (vec![1; LEN], vec![0; LEN]);
        let (segment, [_, mut taker], [given, taken]) = agreed(&mut source, &mut target);
        let mut lost = Copier::new(0, Reach::new(0, vec![Some(0), Some(i32::MAX)]), true);
        lost.give(&segment, 1, &given, &mut AT_ONCE.clone());
        assert_eq!(
            lost.give(&segment, 1, &given, &mut AT_ONCE.clone()),
            Outcome::Nothing,
            "it does not try again"
        );
        while taker.take(&segment, 0, &taken, &mut AT_ONCE.clone()) == Outcome::Moved {}
        assert_eq!(lost.give(&segment, 1, &given, &mut AT_ONCE.clone()), Outcome::Over(End::Taken));
        assert!(target == source && lost.bytes() == 0);
        assert_eq!(segment.deal(0, 1, given.deal).stand(), Stand::Free);
    }

    /// What the taker cannot read comes through cells, and whoever cannot read once does not try again.
    #[test]
    fn a_message_that_cannot_be_read_is_given_up() {
        let (mut source, mut target) = (vec![1; LEN], vec![0; LEN]);
        let (segment, [mut giver, mut taker], [given, taken]) = agreed(&mut source, &mut target);
        let elsewhere = Straight { from: 4096, ..taken };
        assert_eq!(taker.take(&segment, 0, &elsewhere, &mut AT_ONCE.clone()), Outcome::Over(End::Unable));
        assert_eq!(giver.give(&segment, 1, &given, &mut AT_ONCE.clone()), Outcome::Over(End::Unable));
        assert!(!taker.offers(LEN) && giver.offers(LEN));
    }

    #[test]
    fn pieces_cover_a_message() {
        for len in [LEAST, LEAST + 1, LEN - 1, LEN, (9 << 20) + 7, 100 << 20, (1 << 32) - 1, (5 << 30) + 7] {
            // SAFETY: nothing is read or written; only lengths are looked at.
            let whole = unsafe { Region::new(std::ptr::dangling_mut(), len) };
            let mut end = 0;
            for index in 0..pieces(len) {
                let (start, piece) = nth_piece(whole, index);
                assert_eq!(start, end);
                assert!(!piece.is_empty() && piece.len() <= AT_ONCE);
                end += piece.len();
            }
            assert_eq!(end, len);
            assert!(nth_piece(whole, pieces(len)).1.is_empty());
        }
    }
}
