//! Large messages that both ranks copy between their private memories: who copies what, what waits, what goes through cells.
#![cfg(not(loom))]
// Tests may unwrap: a panic there is the report.
#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use smddp_core::Region;
use smddp_core::transport::{Ctx, Message, MsgKey, NodeLocal};
use smddp_shm::{Membership, ShmNode, SingleCopies};

/// Four pieces.
const LEN: usize = 1 << 20;

/// Two ranks, polled by hand: rank 0 gives, rank 1 takes.
struct Pair {
    giver: ShmNode,
    taker: ShmNode,
    given: Vec<u64>,
    taken: Vec<u64>,
    sources: Vec<Vec<u8>>,
    targets: Vec<Vec<u8>>,
}

impl Pair {
    fn new(lens: &[usize]) -> Pair {
        Pair::of(lens, membership)
    }

    fn of(lens: &[usize], member: impl Fn(u64, usize, usize) -> Membership + Sync) -> Pair {
        let mut nodes = on_members(2, SMALL, member, |_, node| node);
        let (taker, giver) = (nodes.pop().unwrap(), nodes.pop().unwrap());
        let text = |number: usize, len: usize| (0..len).map(|i| (i / 3 + number * 7) as u8).collect();
        let sources = lens.iter().enumerate().map(|(number, &len)| text(number, len)).collect();
        let targets = lens.iter().map(|&len| vec![0; len]).collect();
        Pair { giver, taker, given: vec![], taken: vec![], sources, targets }
    }

    fn message(number: usize, peer: usize, bytes: &mut [u8]) -> Message {
        // SAFETY: the pair keeps its vectors until its nodes are gone.
        let region = unsafe { Region::of(bytes) };
        let key = MsgKey { group: 5, seq: MsgKey::P2P | number as u64, tag: 3 };
        Message { key, peer: peer as u32, peer_rank: 10, region, call: call(1), ctx: Ctx(number as u64) }
    }

    fn send(&mut self, number: usize) {
        self.giver.send(Pair::message(number, 1, &mut self.sources[number])).unwrap();
    }

    fn recv(&mut self, number: usize) {
        self.taker.recv(Pair::message(number, 0, &mut self.targets[number])).unwrap();
    }

    fn poll_giver(&mut self) -> bool {
        let mut done = vec![];
        let moved = self.giver.poll(&mut done).unwrap();
        self.given.extend(done.iter().map(|ctx| ctx.0));
        moved
    }

    fn poll_taker(&mut self) -> bool {
        let mut done = vec![];
        let moved = self.taker.poll(&mut done).unwrap();
        self.taken.extend(done.iter().map(|ctx| ctx.0));
        moved
    }

    /// Both in turn, until they have so many messages; checks those, sorted by number.
    fn finish(&mut self, numbers: &[u64]) {
        let mut polls = 0;
        while self.given.len() < numbers.len() || self.taken.len() < numbers.len() {
            self.poll_giver();
            self.poll_taker();
            polls += 1;
            assert!(polls < 100_000, "given {:?}, taken {:?}", self.given, self.taken);
        }
        self.given.sort_unstable();
        self.taken.sort_unstable();
        assert_eq!((&self.given[..], &self.taken[..]), (numbers, numbers));
        for &number in numbers {
            assert!(self.targets[number as usize] == self.sources[number as usize], "message {number}");
        }
    }

    /// Bytes that each copied straight.
    fn copied(&self) -> [usize; 2] {
        [&self.giver, &self.taker].map(|node| node.copied_once() as usize)
    }
}

/// B2: whoever has time copies what the other leaves.
#[test]
fn either_copies_what_the_other_leaves() {
    for (alone, want) in [(Some(0), [LEN, 0]), (Some(1), [0, LEN]), (None, [LEN / 2, LEN / 2])] {
        let mut pair = Pair::new(&[LEN]);
        pair.recv(0);
        pair.send(0);
        assert!(pair.poll_giver(), "it offers");
        assert!(pair.poll_taker(), "it accepts");
        assert_eq!(pair.copied(), [0, 0]);
        match alone {
            Some(0) => while pair.poll_giver() {},
            Some(_) => while pair.poll_taker() {},
            None => {}
        }
        pair.finish(&[0]);
        assert_eq!(pair.copied(), want, "{alone:?}");
        assert!(pair.giver.waiting_for().is_empty() && pair.taker.waiting_for().is_empty());
    }
}

/// Lengths around those of pieces.
#[test]
fn messages_of_any_length_arrive_whole() {
    let lens = [(256 << 10) - 1, 256 << 10, (256 << 10) + 1, LEN - 1, LEN + 1, (9 << 20) + 5];
    let mut pair = Pair::new(&lens);
    for number in 0..lens.len() {
        pair.recv(number);
        pair.send(number);
        pair.finish(&(0..=number as u64).collect::<Vec<_>>());
    }
    assert_eq!(
        pair.copied().iter().sum::<usize>(),
        lens[1..].iter().sum::<usize>(),
        "the first is too short"
    );
}

/// Its peer may have left since: a rank that has what it waited for waits for nobody.
#[test]
fn who_need_only_look_waits_for_nobody() {
    let mut pair = Pair::new(&[LEN, 8, 8, 8, 8]);
    (0..5).for_each(|number| pair.recv(number));
    pair.send(0);
    pair.poll_giver();
    while pair.poll_taker() {}
    assert_eq!((&pair.taken[..], &pair.given[..]), (&[0][..], &[][..]));
    assert!(pair.giver.waiting_for().is_empty(), "{:?}", pair.giver.waiting_for());
    // The other way around: the giver has written all.
    let mut pair = Pair::new(&[LEN]);
    pair.recv(0);
    pair.send(0);
    pair.poll_giver();
    pair.poll_taker();
    assert!(pair.taker.waiting_for().is_empty(), "it could read itself");
    while pair.poll_giver() {}
    assert!(pair.taker.waiting_for().is_empty() && pair.giver.waiting_for() == [1]);
    pair.finish(&[0]);
}

#[test]
fn an_offer_waits_for_its_receive_and_shows_itself() {
    let mut pair = Pair::new(&[LEN, 8]);
    pair.send(0);
    // Another behind it: the offer holds up nothing.
    pair.send(1);
    pair.recv(1);
    pair.poll_giver();
    while pair.poll_taker() {}
    assert_eq!((&pair.given[..], &pair.taken[..], pair.copied()), (&[1][..], &[1][..], [0, 0]));
    assert_eq!(pair.giver.waiting_for(), [1], "the sender of what is not received");
    assert_eq!(pair.taker.waiting_for(), [] as [usize; 0]);
    let key = MsgKey { group: 5, seq: MsgKey::P2P, tag: 3 };
    assert!(pair.taker.has_come(0, &key));
    pair.recv(0);
    pair.finish(&[0, 1]);
    assert_eq!(pair.copied().iter().sum::<usize>(), LEN);
}

/// S3 of `messages`: its sender may wait for the first message's end before it sends the one that is wanted.
#[test]
fn an_offer_in_the_way_of_what_is_wanted_is_refused() {
    for sleeps in [false, true] {
        let mut pair = Pair::new(&[LEN, LEN]);
        pair.send(0);
        pair.recv(1);
        assert!(pair.poll_giver(), "it offers");
        assert!(pair.poll_taker(), "it sees the offer");
        if sleeps {
            pair.taker.arm();
        }
        let in_vain = (0..).find(|polls| pair.poll_taker() || *polls > 1000).unwrap();
        // Before it sleeps at once: nothing would wake it.
        assert!(if sleeps { in_vain == 0 } else { (10..100).contains(&in_vain) }, "{in_vain}");
        pair.taker.disarm();
        while pair.given.is_empty() {
            let moved = [pair.poll_giver(), pair.poll_taker()];
            assert!(moved.contains(&true), "message 0 is never taken");
        }
        assert_eq!((&pair.given[..], pair.copied()), (&[0][..], [0, 0]), "through cells");
        pair.send(1);
        while pair.taken.is_empty() {
            pair.poll_giver();
            pair.poll_taker();
        }
        pair.recv(0);
        pair.finish(&[0, 1]);
        assert_eq!(pair.copied().iter().sum::<usize>(), LEN, "the other is copied straight");
    }
}

/// A rank has four deals for a peer; it need not wait for one.
#[test]
fn more_messages_than_deals_go_through_cells() {
    let mut pair = Pair::new(&[LEN; 6]);
    (0..6).for_each(|number| pair.send(number));
    assert!(pair.poll_giver());
    (0..6).rev().for_each(|number| pair.recv(number));
    pair.finish(&[0, 1, 2, 3, 4, 5]);
    let copied: usize = pair.copied().iter().sum();
    // The fifth goes through cells; the last may find a deal that is free again.
    assert!((4 * LEN..6 * LEN).contains(&copied), "{copied}");
    // All are free again.
    pair.given.clear();
    pair.taken.clear();
    (0..4).for_each(|number| pair.recv(number));
    (0..4).for_each(|number| pair.send(number));
    pair.finish(&[0, 1, 2, 3]);
    assert_eq!(pair.copied().iter().sum::<usize>(), copied + 4 * LEN);
}

#[test]
fn where_a_rank_does_not_want_it_messages_go_through_cells() {
    for without in [0, 1] {
        let member = |group, rank, size| {
            let own = membership(group, rank, size);
            let single_copy = if rank == without { SingleCopies::NONE } else { own.single_copy };
            Membership { single_copy, ..own }
        };
        let mut pair = Pair::of(&[LEN, LEN], member);
        for number in 0..2 {
            pair.send(number);
            pair.poll_giver();
            pair.recv(number);
            pair.finish(&(0..=number as u64).collect::<Vec<_>>());
        }
        assert_eq!(pair.copied(), [0, 0], "rank {without} without");
    }
}

#[test]
fn a_rank_that_reads_for_itself_does_not_write_for_its_peer() {
    let mut nodes = on_ranks(2, SMALL, |_, node| node);
    let mut sources = [vec![1u8; LEN], vec![2u8; LEN]];
    let mut targets = [vec![0u8; LEN], vec![0u8; LEN]];
    for (me, node) in nodes.iter_mut().enumerate() {
        node.recv(Pair::message(1 - me, 1 - me, &mut targets[me])).unwrap();
        node.send(Pair::message(me, 1 - me, &mut sources[me])).unwrap();
    }
    let mut done = [vec![], vec![]];
    // Both offer, and rank 0 accepts; then it reads a piece a poll, and writes none until it has read all.
    nodes[0].poll(&mut done[0]).unwrap();
    nodes[1].poll(&mut done[1]).unwrap();
    nodes[0].poll(&mut done[0]).unwrap();
    let before = nodes[0].copied_once() as usize;
    nodes[0].poll(&mut done[0]).unwrap();
    nodes[0].poll(&mut done[0]).unwrap();
    assert_eq!(nodes[0].copied_once() as usize, before + LEN / 2);
    while done.iter().any(|done| done.len() < 2) {
        for (node, done) in nodes.iter_mut().zip(&mut done) {
            node.poll(done).unwrap();
        }
    }
    assert_eq!(nodes.iter().map(|node| node.copied_once() as usize).sum::<usize>(), 2 * LEN);
    assert!(targets[0] == sources[1] && targets[1] == sources[0]);
}
