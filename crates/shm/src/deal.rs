//! How two ranks share the copying of one message between their private memories.
//!
//! Who gives the message offers it; who takes it reads pieces from the front and, if it accepts, lets its peer write pieces from
//! the back, until they meet: whoever has time does more. A rank has a few deals for each of its peers, used again and again.
//!
//! Invariants
//! - **B1** A deal is the giver's while it is free or over. From the frame that tells of it until it is over it is the taker's to end,
//!   which touches it no more then.
//! - **B2** `claims` says which pieces have found their copier: those before `front` the taker, those from `back` on the giver. The
//!   taker alone moves `front`, the giver alone `back`, and never past one another.
//! - **B3** The giver counts a piece once it is written. All pieces are there when front and back meet, the taker has read
//!   its own, and as many are counted as lie behind `back`.
//! - **B4** The giver writes only after the taker has accepted, and said where its memory and its door are.

use crate::sync::{AtomicU64, Ordering, count_order, end_order, publish_order};

/// Deals of one rank with each peer: as many messages may be under way so.
pub(crate) const DEALS: usize = 4;

/// How a deal stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stand {
    Free,
    Offered,
    Accepted,
    Over(End),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// All of the message is where it belongs.
    Taken,
    /// It is to come through cells.
    Refused,
    /// So are all others: the taker cannot read its peer's memory.
    Unable,
}

const FREE: u64 = 0;
const OFFERED: u64 = 1;
const ACCEPTED: u64 = 2;
const TAKEN: u64 = 3;
const REFUSED: u64 = 4;
const UNABLE: u64 = 5;

/// In shared memory; all zero is free.
#[repr(C, align(64))]
pub(crate) struct Deal {
    stand: AtomicU64,
    /// `front`, 32 bits, and above it `back`.
    claims: AtomicU64,
    /// Pieces the giver has written.
    given: AtomicU64,
    /// Where the message belongs, and the taker's door, in its address space.
    target: AtomicU64,
    door: AtomicU64,
}

fn claims(front: u32, back: u32) -> u64 {
    u64::from(front) | u64::from(back) << 32
}

fn front_and_back(claims: u64) -> (u32, u32) {
    (claims as u32, (claims >> 32) as u32)
}

impl Deal {
    #[cfg(loom)]
    pub(crate) fn new() -> Deal {
        let word = || AtomicU64::new(0);
        Deal { stand: word(), claims: word(), given: word(), target: word(), door: word() }
    }

    /// What the peer has made of it.
    #[inline]
    pub(crate) fn stand(&self) -> Stand {
        match self.stand.load(Ordering::Acquire) {
            FREE => Stand::Free,
            OFFERED => Stand::Offered,
            ACCEPTED => Stand::Accepted,
            TAKEN => Stand::Over(End::Taken),
            REFUSED => Stand::Over(End::Refused),
            // A word that a broken peer wrote is as good.
            _ => Stand::Over(End::Unable),
        }
    }

    // ---- the giver's

    /// Offers a message of so many pieces; the frame that tells of it is published afterwards.
    pub(crate) fn offer(&self, pieces: u32) {
        self.claims.store(claims(0, pieces), Ordering::Relaxed);
        self.given.store(0, Ordering::Relaxed);
        self.stand.store(OFFERED, Ordering::Relaxed);
    }

    /// Takes it back when it is over (B1).
    pub(crate) fn free(&self) {
        self.stand.store(FREE, Ordering::Relaxed);
    }

    /// Where the message belongs, and the taker's door. Once it is accepted (B4).
    pub(crate) fn target(&self) -> (u64, u64) {
        (self.target.load(Ordering::Relaxed), self.door.load(Ordering::Relaxed))
    }

    /// The next piece from the back (B2).
    pub(crate) fn claim_back(&self) -> Option<u32> {
        self.claim(|front, back| (front, back - 1)).map(|(_, back)| back - 1)
    }

    /// The piece that was claimed last is left to the taker, who writes behind whatever was written of it.
    pub(crate) fn leave_back(&self) {
        self.claims.fetch_add(claims(0, 1), count_order());
    }

    /// A claimed piece has been written (B3).
    pub(crate) fn count(&self) {
        self.given.fetch_add(1, count_order());
    }

    // ---- the taker's

    /// Lets the giver write (B4).
    pub(crate) fn accept(&self, target: u64, door: u64) {
        self.target.store(target, Ordering::Relaxed);
        self.door.store(door, Ordering::Relaxed);
        self.stand.store(ACCEPTED, publish_order());
    }

    /// The next piece from the front (B2).
    pub(crate) fn claim_front(&self) -> Option<u32> {
        self.claim(|front, back| (front + 1, back)).map(|(front, _)| front)
    }

    /// Whether all of `pieces` are there, as far as the giver writes them (B3).
    pub(crate) fn is_whole(&self, pieces: u32) -> bool {
        let (front, back) = front_and_back(self.claims.load(Ordering::Relaxed));
        front == back && self.given.load(Ordering::Acquire) == u64::from(pieces.saturating_sub(back))
    }

    /// Whether nothing is left but what the giver has claimed and not counted yet.
    pub(crate) fn waits_for_giver(&self, pieces: u32) -> bool {
        let (front, back) = front_and_back(self.claims.load(Ordering::Relaxed));
        front == back && !self.is_whole(pieces)
    }

    /// It is over.
    pub(crate) fn end(&self, end: End) {
        let stand = match end {
            End::Taken => TAKEN,
            End::Refused => REFUSED,
            End::Unable => UNABLE,
        };
        self.stand.store(stand, end_order());
    }

    /// What was claimed until now, if anything was left.
    fn claim(&self, next: impl Fn(u32, u32) -> (u32, u32)) -> Option<(u32, u32)> {
        let claim = |word| {
            let (front, back) = front_and_back(word);
            (front < back).then(|| {
                let (front, back) = next(front, back);
                claims(front, back)
            })
        };
        let before = self.claims.fetch_update(Ordering::Acquire, Ordering::Relaxed, claim);
        before.ok().map(front_and_back)
    }
}
