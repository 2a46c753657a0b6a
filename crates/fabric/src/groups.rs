//! What this process knows of each group: its recent calls (ours and the peers'), ranks, and whether it failed.
//!
//! Peers that choose different algorithms use different tags, so their messages would never meet; comparing calls by
//! (group, operation) finds such a disagreement from whatever message arrives first.

use std::collections::VecDeque;
use std::collections::hash_map::Entry;
use std::time::Duration;

use smddp_core::call::PackedCall;
use smddp_core::transport::MsgKey;

use crate::map::{Map, map};

/// Calls remembered of a group, on either side.
const RECENT: usize = 16;
/// Groups that peers may name before this process posts anything for them.
const UNKNOWN_GROUPS: usize = 4096;
/// Withdrawn groups remembered by name, so that late messages for them are dropped rather than kept.
const GONE: usize = 65_536;
/// Withdrawn groups whose counts are remembered, for peers that withdraw later.
const COUNTS: usize = 1024;
/// What is too old of either is looked for after so many withdrawals.
const SWEEP: usize = 256;

#[derive(Clone, Copy, Debug)]
struct Noted {
    seq: u64,
    call: PackedCall,
    peer: u32,
}

/// The last [`RECENT`] calls.
#[derive(Debug, Default)]
struct Recent {
    calls: Vec<Noted>,
    next: usize,
}

impl Recent {
    fn find(&self, seq: u64) -> Option<&Noted> {
        self.calls.iter().find(|n| n.seq == seq)
    }

    fn note(&mut self, noted: Noted) {
        if self.calls.len() < RECENT {
            self.calls.reserve_exact(RECENT - self.calls.len());
            self.calls.push(noted);
        } else {
            self.calls[self.next] = noted;
        }
        self.next = (self.next + 1) % RECENT;
    }
}

#[derive(Debug, Default)]
pub struct Group {
    ours: Recent,
    theirs: Recent,
    /// Something was posted here.
    known: bool,
    /// Its failure was reported; it waits to be withdrawn.
    pub failed: bool,
    /// Peers that withdrew from it: nothing of theirs counts any more.
    pub left: Vec<u32>,
    /// Peers that have destroyed it, as they answered, and when: what is under way of theirs still counts.
    over: Vec<(u32, Duration)>,
    /// An abort that came before anything was posted here.
    pub abort: Option<(u32, String)>,
}

/// What is known of one peer in one group.
#[derive(Clone, Copy, Debug, Default)]
pub struct Member {
    /// Group rank as our own messages named it.
    pub rank: Option<u32>,
    /// Pieces of large messages ever posted to it and arrived from it.
    pub posted: u64,
    pub arrived: u64,
}

/// A call that differs between this rank and `peer`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Disagreement {
    pub peer: u32,
    pub seq: u64,
    pub ours: PackedCall,
    pub theirs: PackedCall,
}

/// What to do with a message from a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Take,
    /// The group was withdrawn here, or has failed, or the peer left it.
    Drop,
    Disagree(Disagreement),
}

#[derive(Debug)]
pub struct Groups {
    groups: Map<u64, Group>,
    /// How many of them are not known here.
    unknown: usize,
    members: Map<(u64, u32), Member>,
    /// Withdrawn groups, in order, and by name with their numbers in it.
    gone: VecDeque<u64>,
    gone_set: Map<u64, usize>,
    withdrawn: usize,
}

impl Groups {
    pub fn new() -> Groups {
        Groups {
            groups: map(64),
            unknown: 0,
            members: map(256),
            gone: VecDeque::with_capacity(64),
            gone_set: map(64),
            withdrawn: 0,
        }
    }

    pub fn get_mut(&mut self, group: u64) -> Option<&mut Group> {
        self.groups.get_mut(&group)
    }

    pub fn is_gone(&self, group: u64) -> bool {
        self.gone_set.contains_key(&group)
    }

    /// Notes a message posted here. `Some` when a peer already called something else in the same operation.
    pub fn post(&mut self, key: MsgKey, call: PackedCall, peer: u32, rank: u32) -> Option<Disagreement> {
        self.members.entry((key.group, peer)).or_default().rank = Some(rank);
        let group = match self.groups.entry(key.group) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(place) => place.insert(Group { known: true, ..Group::default() }),
        };
        if !std::mem::replace(&mut group.known, true) {
            self.unknown -= 1;
        }
        if key.is_p2p() || group.ours.find(key.seq).is_some() {
            return None;
        }
        group.ours.note(Noted { seq: key.seq, call, peer });
        let theirs = group.theirs.find(key.seq)?;
        (theirs.call != call).then_some(Disagreement {
            peer: theirs.peer,
            seq: key.seq,
            ours: call,
            theirs: theirs.call,
        })
    }

    /// Judges a message of `peer`.
    pub fn arrive(&mut self, key: MsgKey, call: PackedCall, peer: u32) -> Verdict {
        if self.is_gone(key.group) {
            return Verdict::Drop;
        }
        let Some(group) = self.entry(key.group) else { return Verdict::Take };
        if group.failed || group.left.contains(&peer) {
            return Verdict::Drop;
        }
        if key.is_p2p() {
            return Verdict::Take;
        }
        if let Some(ours) = group.ours.find(key.seq) {
            if ours.call != call {
                let ours = ours.call;
                return Verdict::Disagree(Disagreement { peer, seq: key.seq, ours, theirs: call });
            }
        } else if group.theirs.find(key.seq).is_none() {
            group.theirs.note(Noted { seq: key.seq, call, peer });
        }
        Verdict::Take
    }

    /// The group a peer named; `None` when it is not known here and too many such are.
    pub fn entry(&mut self, group: u64) -> Option<&mut Group> {
        match self.groups.entry(group) {
            Entry::Occupied(entry) => Some(entry.into_mut()),
            Entry::Vacant(_) if self.unknown >= UNKNOWN_GROUPS => None,
            Entry::Vacant(place) => {
                self.unknown += 1;
                Some(place.insert(Group::default()))
            }
        }
    }

    /// The peer has withdrawn from the group, which is not gone here. That is noted of however many groups: what it said
    /// before may come later, and must not count.
    pub fn note_left(&mut self, group: u64, peer: u32) -> &mut Group {
        let entry = self.groups.entry(group).or_insert_with(|| {
            self.unknown += 1;
            Group::default()
        });
        if !entry.left.contains(&peer) {
            entry.left.push(peer);
        }
        entry
    }

    /// The peer has said that the group is destroyed there.
    pub fn is_over_at(&mut self, group: u64, peer: u32, now: Duration) {
        if self.is_gone(group) {
            return;
        }
        let Some(known) = self.entry(group) else { return };
        if !known.over.iter().any(|(p, _)| *p == peer) {
            known.over.push((peer, now));
        }
    }

    /// Since when that is known, if it is.
    pub fn over_since(&self, group: u64, peer: u32) -> Option<Duration> {
        let over = &self.groups.get(&group)?.over;
        over.iter().find(|(p, _)| *p == peer).map(|(_, since)| *since)
    }

    pub fn member(&mut self, group: u64, peer: u32) -> &mut Member {
        self.members.entry((group, peer)).or_default()
    }

    pub fn posted(&self, group: u64, peer: u32) -> u64 {
        self.members.get(&(group, peer)).map_or(0, |m| m.posted)
    }

    pub fn arrived(&self, group: u64, peer: u32) -> u64 {
        self.members.get(&(group, peer)).map_or(0, |m| m.arrived)
    }

    pub fn rank_of(&self, group: u64, peer: u32) -> Option<u32> {
        self.members.get(&(group, peer))?.rank
    }

    pub fn known(&self, group: u64) -> bool {
        self.groups.get(&group).is_some_and(|g| g.known)
    }

    /// Forgets the group's calls; messages for it are dropped from now on. Its counts stay for a while, because peers
    /// that withdraw later ask for them.
    pub fn withdraw(&mut self, group: u64) {
        if self.groups.remove(&group).is_some_and(|g| !g.known) {
            self.unknown -= 1;
        }
        if self.is_gone(group) {
            return;
        }
        self.withdrawn += 1;
        self.gone_set.insert(group, self.withdrawn);
        self.gone.push_back(group);
        if self.withdrawn.is_multiple_of(SWEEP) {
            self.sweep();
        }
    }

    fn sweep(&mut self) {
        let past = self.gone.len().saturating_sub(GONE);
        for group in self.gone.drain(..past) {
            self.gone_set.remove(&group);
        }
        // Those past had no counts any more.
        let old = self.withdrawn.saturating_sub(COUNTS);
        self.members.retain(|(group, _), _| self.gone_set.get(group).is_none_or(|&number| number > old));
    }
}

#[cfg(test)]
mod tests {
    use smddp_core::{Call, Collective, DType};

    use super::*;

    fn call(count: u64) -> PackedCall {
        Call::new(Collective::AllReduce, DType::F32, count).pack()
    }

    fn key(seq: u64) -> MsgKey {
        MsgKey { group: 1, seq, tag: 0 }
    }

    #[test]
    fn a_differing_call_is_found_whoever_is_first() {
        let mut groups = Groups::new();
        assert_eq!(groups.post(key(0), call(1), 7, 3), None);
        let found = Disagreement { peer: 7, seq: 0, ours: call(1), theirs: call(2) };
        assert_eq!(groups.arrive(key(0), call(2), 7), Verdict::Disagree(found));
        assert_eq!(groups.arrive(key(0), call(1), 7), Verdict::Take);

        assert_eq!(groups.arrive(key(1), call(5), 8), Verdict::Take);
        let found = Disagreement { peer: 8, seq: 1, ours: call(4), theirs: call(5) };
        assert_eq!(groups.post(key(1), call(4), 7, 3), Some(found));
        assert_eq!(groups.rank_of(1, 7), Some(3));
    }

    #[test]
    fn the_last_calls_are_kept_and_no_more() {
        let mut groups = Groups::new();
        for seq in 0..=RECENT as u64 {
            assert_eq!(groups.post(key(seq), call(seq), 0, 0), None);
        }
        assert_eq!(groups.arrive(key(0), call(99), 0), Verdict::Take, "forgotten");
        assert!(matches!(groups.arrive(key(1), call(99), 0), Verdict::Disagree(_)));
    }

    #[test]
    fn point_to_point_numbers_are_not_operations() {
        let mut groups = Groups::new();
        assert_eq!(groups.post(key(MsgKey::P2P), call(1), 0, 0), None);
        assert_eq!(groups.arrive(key(MsgKey::P2P), call(2), 0), Verdict::Take);
    }

    #[test]
    fn a_withdrawn_group_takes_nothing() {
        let mut groups = Groups::new();
        groups.post(key(0), call(1), 0, 0);
        groups.withdraw(1);
        assert_eq!(groups.arrive(key(0), call(1), 0), Verdict::Drop);
        for other in 2..(GONE + SWEEP) as u64 + 2 {
            groups.withdraw(other);
        }
        assert!(!groups.is_gone(1), "the memory of it is bounded");
        assert!(groups.gone.len() <= GONE + SWEEP && groups.gone_set.len() == groups.gone.len());
    }

    #[test]
    fn the_counts_of_a_withdrawn_group_stay_for_those_that_withdraw_later() {
        let mut groups = Groups::new();
        groups.member(1, 7).posted = 9;
        groups.post(key(0), call(1), 8, 0);
        groups.withdraw(1);
        for other in 2..COUNTS as u64 {
            groups.withdraw(other);
        }
        assert_eq!(groups.member(1, 7).posted, 9);
        for other in 0..2 * SWEEP as u64 {
            groups.withdraw(10_000 + other);
        }
        assert!(groups.is_gone(1) && groups.members.is_empty());
    }

    /// However many groups are in use, what peers say of others counts.
    #[test]
    fn groups_in_use_are_not_unknown() {
        let mut groups = Groups::new();
        for group in 100..100 + UNKNOWN_GROUPS as u64 {
            groups.post(MsgKey { group, ..key(0) }, call(1), 0, 0);
        }
        assert_eq!(groups.arrive(key(0), call(1), 7), Verdict::Take);
        let found = Disagreement { peer: 7, seq: 0, ours: call(2), theirs: call(1) };
        assert_eq!(groups.post(key(0), call(2), 7, 3), Some(found));
    }

    #[test]
    fn groups_not_in_use_are_bounded_and_room_comes_back() {
        let mut groups = Groups::new();
        let end = 100 + UNKNOWN_GROUPS as u64;
        for group in 100..end {
            assert!(groups.entry(group).is_some());
        }
        assert!(groups.entry(end).is_none());
        // One is used from now on, another is over.
        groups.post(MsgKey { group: 100, ..key(0) }, call(1), 0, 0);
        groups.withdraw(101);
        groups.withdraw(101);
        assert!(groups.entry(end).is_some() && groups.entry(end + 1).is_some());
        assert!(groups.entry(end + 2).is_none());
        // Who has left is noted in any case.
        groups.note_left(end + 2, 7);
        assert_eq!(groups.arrive(MsgKey { group: end + 2, ..key(0) }, call(1), 7), Verdict::Drop);
    }
}
