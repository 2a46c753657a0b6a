//! One peer process: its endpoints, the credits both ways, its counters.

use std::collections::VecDeque;
use std::time::Duration;

use smddp_core::transport::MsgKey;

use crate::domain::PeerAddr;
use crate::wire::{Address, MAX_RAILS};

/// Small messages a peer may send unasked before it must announce them, when there is room.
pub const WINDOW: u32 = 16;

/// Receives kept of a peer whose announcements may still come. One that is late is among the few packets that a peer may
/// have in flight; of most there is none, since the grant was there before the send.
const UNANNOUNCED: usize = 64;

/// Credits, counted absolutely and modulo 2³²: no order of messages can confuse them.
#[derive(Debug, Default)]
pub struct Credits {
    /// Ever given to us by the peer, ever used by us.
    got: u32,
    used: u32,
    /// Messages the peer may have outstanding here; those that came, and those taken off its account; what it was
    /// last told.
    window: u32,
    came: u32,
    consumed: u32,
    told: u32,
}

impl Credits {
    pub fn can_send(&self) -> bool {
        self.got.wrapping_sub(self.used) as i32 > 0
    }

    pub fn spend(&mut self) {
        self.used = self.used.wrapping_add(1);
    }

    /// A packet said how many the peer ever gave.
    pub fn hear(&mut self, given: u32) {
        if given.wrapping_sub(self.got) as i32 > 0 {
            self.got = given;
        }
    }

    pub fn window(&self) -> u32 {
        self.window
    }

    pub fn open(&mut self, window: u32) {
        self.window = window;
    }

    /// A message sent on credit came; false when the peer had none left.
    pub fn take(&mut self) -> bool {
        self.came = self.came.wrapping_add(1);
        self.came.wrapping_sub(self.consumed) <= self.window
    }

    /// A message sent on credit no longer takes room here.
    pub fn consume(&mut self) {
        self.consumed = self.consumed.wrapping_add(1);
    }

    /// What a packet to the peer tells.
    pub fn given(&self) -> u32 {
        self.consumed.wrapping_add(self.window)
    }

    /// A packet with this number is on its way.
    pub fn told(&mut self, given: u32) {
        self.told = given;
    }

    /// Whether the peer knows so little that a packet of its own is worth it.
    pub fn worth_telling(&self) -> bool {
        let untold = self.given().wrapping_sub(self.told);
        untold > 0 && untold >= self.window.div_ceil(2)
    }
}

/// How long an answer is waited for before the peer is probed again, twice as long each time, and in the end: its process may have
/// ended with the probe unread, or the probe was lost with its connection. One without work reads after 100 ms.
const UNANSWERED: Duration = Duration::from_millis(250);
const LONG_UNANSWERED: Duration = Duration::from_secs(2);

/// How far a probe has come. There is one at a time: more would only lie before what else is said to a peer that is slow to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    None,
    Queued,
    /// Sent, and an answer is waited for until then.
    Sent(Duration),
}

#[derive(Debug)]
pub struct Peer {
    pub label: String,
    /// Its endpoint on each rail both have.
    pub rails: Vec<PeerAddr>,
    /// Largest message sent unasked between the two.
    pub eager: usize,
    pub max_piece: u64,
    /// It bounces what is not staged, so large sends to it are announced.
    pub bounces: bool,
    pub credits: Credits,
    pub credit_queued: bool,
    /// Messages and grants of its that are kept until their operation is posted.
    pub kept: usize,
    /// Small sends in flight.
    pub small: u32,
    pub probe: Probe,
    /// How long the next answer is waited for.
    patience: Duration,
    /// So many answers to a probe of its are queued, one a rail.
    pub answers: usize,
    /// Receives from any rank wait for it, in this group, since the last look; and the group of the look before.
    asked: Option<u64>,
    asked_before: Option<u64>,
    pub lost: Option<String>,
    /// Whether anything ever went to it or came from it: there is a connection.
    pub talked: bool,
    /// Whether it was told that nothing more goes to it, and since when it has said so itself (E6).
    pub told_bye: bool,
    pub left: Option<Duration>,
    /// Lost, and perhaps still there, so that it may write: it was lost for what it said, or has been reached since.
    pub wild: bool,
    pub sent: u64,
    pub received: u64,
    /// Bytes of pieces in flight to it; pieces that came from it or left for it.
    pub flying: usize,
    pub pieces: u64,
    /// Small messages and remote writes ever posted to it and come from it, on each rail (E9).
    pub said: [u32; MAX_RAILS],
    pub heard: [u32; MAX_RAILS],
    /// How many rails, from the first on, anything was said or written over where order is kept.
    pub used: usize,
    /// The last large receives from it that were over without an announcement (E7).
    unannounced: VecDeque<MsgKey>,
    /// The pass over the queue in which it could take no more.
    pub full_in: u64,
}

impl Peer {
    pub fn new(address: &Address, label: &str, rails: Vec<PeerAddr>, eager: usize) -> Peer {
        Peer {
            label: label.to_owned(),
            rails,
            eager: eager.min(address.eager as usize),
            max_piece: address.max_piece,
            bounces: address.bounces,
            credits: Credits::default(),
            credit_queued: false,
            kept: 0,
            small: 0,
            probe: Probe::None,
            patience: UNANSWERED,
            answers: 0,
            asked: None,
            asked_before: None,
            lost: None,
            talked: false,
            told_bye: false,
            left: None,
            wild: false,
            sent: 0,
            received: 0,
            flying: 0,
            pieces: 0,
            said: [0; MAX_RAILS],
            heard: [0; MAX_RAILS],
            used: 1,
            unannounced: VecDeque::new(),
            full_in: 0,
        }
    }

    /// A large receive is over; its announcement, if there was one, is still on its way.
    pub fn over_unannounced(&mut self, key: MsgKey) {
        if self.unannounced.len() == UNANNOUNCED {
            self.unannounced.pop_front();
        }
        self.unannounced.push_back(key);
    }

    /// Whether the announcement that has come is of such a receive.
    pub fn is_late(&mut self, key: &MsgKey) -> bool {
        let at = self.unannounced.iter().rposition(|over| over == key);
        at.is_some_and(|at| self.unannounced.remove(at).is_some())
    }

    /// Nothing of the group counts any more.
    pub fn forget(&mut self, group: u64) {
        self.unannounced.retain(|key| key.group != group);
    }

    /// Receives from any rank of the group wait for it. Of several groups each has its turn to be asked about.
    pub fn ask(&mut self, group: u64) {
        if self.asked.is_none() || self.asked == self.asked_before {
            self.asked = Some(group);
        }
    }

    /// The group to ask it about, if any; once.
    pub fn take_asked(&mut self) -> Option<u64> {
        let asked = self.asked.take()?;
        self.asked_before = Some(asked);
        Some(asked)
    }

    /// Whether it may be probed now.
    pub fn is_to_probe(&self, now: Duration) -> bool {
        match self.probe {
            Probe::None => true,
            Probe::Queued => false,
            Probe::Sent(until) => now >= until,
        }
    }

    /// A probe is on its way.
    pub fn probed(&mut self, now: Duration) {
        self.probe = Probe::Sent(now + self.patience);
        self.patience = (2 * self.patience).min(LONG_UNANSWERED);
    }

    /// It has answered, or is to be asked anew whether or not it has.
    pub fn answered(&mut self) {
        self.patience = UNANSWERED;
        if let Probe::Sent(_) = self.probe {
            self.probe = Probe::None;
        }
    }

    /// Whether it sends nothing new any more.
    pub fn is_gone(&self) -> bool {
        self.lost.is_some() || self.left.is_some()
    }

    /// Whether its goodbye is still to come.
    pub fn owes_bye(&self) -> bool {
        self.told_bye && self.left.is_none() && self.lost.is_none()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn credits_survive_their_counters_wrap_and_late_news() {
        let mut c = Credits { got: u32::MAX, used: u32::MAX, ..Credits::default() };
        assert!(!c.can_send());
        c.hear(1);
        c.hear(u32::MAX);
        assert!(c.can_send());
        c.spend();
        c.spend();
        assert!(!c.can_send());
    }

    proptest! {
        /// Whatever order news arrives in, a sender never has more outstanding than the window, and gets everything in the end.
        #[test]
        fn never_more_than_the_window(window in 1..20u32, steps in prop::collection::vec((any::<bool>(), any::<prop::sample::Index>()), 1..200)) {
            let (mut sender, mut receiver) = (Credits::default(), Credits::default());
            receiver.open(window);
            let (mut held, mut news) = (0u32, vec![receiver.given()]);
            for (act, which) in steps {
                if act && sender.can_send() {
                    sender.spend();
                    prop_assert!(receiver.take());
                    held += 1;
                } else if held > 0 && which.index(2) == 0 {
                    held -= 1;
                    receiver.consume();
                    news.push(receiver.given());
                } else {
                    sender.hear(news[which.index(news.len())]);
                }
                prop_assert!(held <= window);
            }
            sender.hear(receiver.given());
            let mut left = 0;
            while sender.can_send() { sender.spend(); left += 1; }
            prop_assert_eq!(left, window - held);
        }
    }
}
