//! Messages between local ranks: any order of posting, any size, mismatches.
#![cfg(not(loom))]
// Tests may unwrap: a panic there is the report.
#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use proptest::prelude::*;
use smddp_core::transport::{Ctx, Message, MsgKey, NodeLocal};
use smddp_core::{Error, Region};
use smddp_shm::ShmNode;

#[derive(Clone, Copy, Debug)]
struct Letter {
    from: usize,
    to: usize,
    len: usize,
}

fn letters() -> impl Strategy<Value = (usize, Vec<Letter>, Vec<Vec<u32>>)> {
    (1usize..=5).prop_flat_map(|size| {
        let len = prop_oneof![3 => 0usize..200, 2 => 3900usize..4300, 1 => 0usize..700_000];
        let letter = (0..size, 0..size, len).prop_map(|(from, to, len)| Letter { from, to, len });
        let orders = prop::collection::vec(prop::collection::vec(any::<u32>(), 24), size);
        (Just(size), prop::collection::vec(letter, 0..12), orders)
    })
}

fn key(number: usize) -> MsgKey {
    MsgKey { group: 5, seq: MsgKey::P2P | number as u64, tag: 3 }
}

fn text(number: usize, len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + number * 7) as u8).collect()
}

fn message(number: usize, peer: usize, bytes: &mut [u8]) -> Message {
    Message {
        key: key(number),
        peer: peer as u32,
        peer_rank: 10 + peer as u32,
        // SAFETY: every caller keeps the bytes until the message is done.
        region: unsafe { Region::of(bytes) },
        call: call(1),
        ctx: Ctx(number as u64),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn every_letter_arrives_whatever_the_order_of_posting((size, letters, orders) in letters()) {
        on_ranks(size, SMALL, |me, mut node| {
            // Sends and receives of this rank, shuffled; each side of a letter is one piece of work.
            let mut work: Vec<(u32, usize, bool, Vec<u8>)> = vec![];
            for (number, letter) in letters.iter().enumerate() {
                if letter.from == me {
                    work.push((orders[me][number], number, true, text(number, letter.len)));
                }
                if letter.to == me {
                    work.push((orders[me][12 + number], number, false, vec![0; letter.len]));
                }
            }
            work.sort_by_key(|w| w.0);
            let mut done = vec![];
            for (at, (_, number, sends, bytes)) in work.iter_mut().enumerate() {
                let letter = letters[*number];
                if *sends {
                    node.send(message(*number, letter.to, bytes)).unwrap();
                } else {
                    node.recv(message(*number, letter.from, bytes)).unwrap();
                }
                if at % 3 == 0 {
                    node.poll(&mut done).unwrap();
                }
            }
            let total = work.len();
            done.extend(drive(&mut node, total - done.len(), 20).unwrap());
            let mut marks: Vec<u64> = done.iter().map(|ctx| ctx.0).collect();
            marks.sort_unstable();
            let mut expected: Vec<u64> = work.iter().map(|w| w.1 as u64).collect();
            expected.sort_unstable();
            assert_eq!(marks, expected);
            for (_, number, _, bytes) in &work {
                assert!(*bytes == text(*number, letters[*number].len), "letter {number} at rank {me}");
            }
            assert!(node.waiting_for().is_empty());
        });
    }
}

/// Rank 0 sends what `send` says, rank 1 receives what `recv` says; rank 1's error.
fn disagree(send: usize, recv: usize, early: bool, change: impl Fn(&mut Message) + Sync) -> Error {
    let sent = std::sync::Barrier::new(2);
    let errors = on_ranks(2, SMALL, |me, mut node| {
        let mut bytes = vec![1; if me == 0 { send } else { recv }];
        let mut m = message(1, 1 - me, &mut bytes);
        if me == 0 {
            change(&mut m);
            node.send(m).unwrap();
            drive(&mut node, 1, 10).unwrap();
            sent.wait();
            return None;
        }
        if early {
            sent.wait();
            // Another receive from the same rank makes this one take out what is not yet wanted.
            let mut other = vec![0; 8];
            node.recv(message(2, 0, &mut other)).unwrap();
            let mut none = vec![];
            while node.poll(&mut none).unwrap() {}
            return node.recv(m).err();
        }
        node.recv(m).unwrap();
        let error = drive(&mut node, 1, 10).err();
        sent.wait();
        error
    });
    errors.into_iter().nth(1).flatten().unwrap()
}

#[test]
fn unequal_lengths_and_calls_are_mismatches() {
    for early in [false, true] {
        for error in [disagree(100, 104, early, |_| ()), disagree(100, 100, early, |m| m.call.count = 9)] {
            let text = error.to_string();
            assert!(
                matches!(error, Error::Mismatch { peer: 10, .. }) && text.contains("100 bytes"),
                "{text}"
            );
        }
    }
}

#[test]
fn large_messages_both_ways_at_once_do_not_block_each_other() {
    on_ranks(2, SMALL, |me, mut node| {
        let len = 3 << 20;
        let (mut out, mut back) = (text(me, len), vec![0; len]);
        node.send(message(me, 1 - me, &mut out)).unwrap();
        node.recv(message(1 - me, 1 - me, &mut back)).unwrap();
        drive(&mut node, 2, 50).unwrap();
        assert!(back == text(1 - me, len));
    });
}

#[test]
fn phases_and_messages_share_a_group() {
    use smddp_core::dtype::{DType, ReduceOp};
    use smddp_core::plan::{Span, Who};
    let plan = one_phase(vec![span_move(Who::All, Who::All, Span::input(0, 4000), Span::output(0, 4000))]);
    on_ranks(3, SMALL, |me, mut node: ShmNode| {
        let mut memory = Memory { input: vec![1; 4000], output: vec![0; 4000], scratch: vec![] };
        let buffers = memory.buffers();
        let (mut out, mut back) = (text(me, 50_000), vec![0; 50_000]);
        for round in 0..20 {
            let sum = arith(DType::U8, ReduceOp::Sum, 3);
            node.submit(run(&plan, buffers, sum, call(1), 1000 + round)).unwrap();
            node.send(message(me, (me + 1) % 3, &mut out)).unwrap();
            node.recv(message((me + 2) % 3, (me + 2) % 3, &mut back)).unwrap();
            drive(&mut node, 3, 5).unwrap();
            assert!(back == text((me + 2) % 3, 50_000));
        }
        assert_eq!(memory.output, vec![3; 4000]);
    });
}

#[test]
fn an_early_message_still_arriving_is_not_confused_with_those_before_it() {
    // Both ranks in this thread, so that the third message is certainly half way when the first is received.
    let mut nodes = on_ranks(2, SMALL, |_, node| node);
    let (mut receiver, mut sender) = (nodes.pop().unwrap(), nodes.pop().unwrap());
    let lens = [100, 200, 100_000];
    let mut out: Vec<Vec<u8>> = lens.iter().enumerate().map(|(n, &len)| text(n, len)).collect();
    let mut back: Vec<Vec<u8>> = lens.iter().map(|&len| vec![0; len]).collect();
    let mut never = vec![0; 1];
    let (mut sent, mut got) = (vec![], vec![]);
    for (number, bytes) in out.iter_mut().enumerate() {
        sender.send(message(number, 1, bytes)).unwrap();
    }
    receiver.recv(message(9, 0, &mut never)).unwrap();
    sender.poll(&mut sent).unwrap();
    receiver.poll(&mut got).unwrap();
    assert_eq!((sent.len(), got.len()), (2, 0));
    for (number, bytes) in back.iter_mut().enumerate() {
        receiver.recv(message(number, 0, bytes)).unwrap();
        sender.poll(&mut sent).unwrap();
        receiver.poll(&mut got).unwrap();
    }
    while got.len() < 3 {
        let moved = [sender.poll(&mut sent).unwrap(), receiver.poll(&mut got).unwrap()];
        assert!(moved.contains(&true), "stuck at {sent:?}, {got:?}");
    }
    assert!(back == out);
    assert_eq!(receiver.waiting_for(), [0]);
}

#[test]
fn a_message_shows_itself_to_who_asks() {
    let mut nodes = on_ranks(2, SMALL, |_, node| node);
    let (mut receiver, mut sender) = (nodes.pop().unwrap(), nodes.pop().unwrap());
    let lens = [100, 0, 100_000];
    let mut out: Vec<Vec<u8>> = lens.iter().enumerate().map(|(n, &len)| text(n, len)).collect();
    let mut back: Vec<Vec<u8>> = lens.iter().map(|&len| vec![0; len]).collect();
    let (mut sent, mut got) = (vec![], vec![]);
    assert!(!receiver.has_come(0, &key(0)));
    assert_eq!(receiver.waiting_for(), [] as [usize; 0], "asking is not waiting");
    for (number, bytes) in out.iter_mut().enumerate() {
        sender.send(message(number, 1, bytes)).unwrap();
    }
    // Asked for in another order than sent: those before it are kept.
    let mut polls = 0;
    for number in [2, 0, 1] {
        while !receiver.has_come(0, &key(number)) {
            sender.poll(&mut sent).unwrap();
            receiver.poll(&mut got).unwrap();
            polls += 1;
            assert!(polls < 1000, "message {number} does not show");
        }
        receiver.recv(message(number, 0, &mut back[number])).unwrap();
    }
    while got.len() < 3 {
        let moved = [sender.poll(&mut sent).unwrap(), receiver.poll(&mut got).unwrap()];
        assert!(moved.contains(&true), "stuck at {sent:?}, {got:?}");
    }
    assert!(back == out);
    assert!(!receiver.has_come(0, &key(0)));
}
