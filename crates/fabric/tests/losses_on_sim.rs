//! The message layer over the deterministic network when messages, peers and groups are lost.

#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::*;
use smddp_core::error::Error;
use smddp_core::transport::{Ctx, Fabric, MsgKey};
use smddp_fabric::sim::SimConfig;

#[test]
fn a_lost_message_is_waited_for_by_its_rank() {
    let mut world = World::new(3, 1, calm(), &settings(&[]));
    let (mut a, mut b) = ([1u8; 10], [0u8; 10]);
    // The first small message of all is the announcement of this send.
    world.net.lose(0);
    world.ends[0].send(message(key(0), 2, region(&mut a), 0)).unwrap();
    world.ends[2].recv(message(key(0), 0, region(&mut b), 1)).unwrap();
    for _ in 0..50 {
        world.poll_all();
    }
    assert_eq!(world.ends[2].waiting_for(GROUP), [100]);
    assert_eq!(world.ends[0].waiting_for(GROUP), [102]);
    assert_eq!(world.ends[1].waiting_for(GROUP), [] as [usize; 0]);
    assert_eq!(world.ends[2].waiting_for(GROUP + 1), [] as [usize; 0]);
}

#[test]
fn the_death_of_a_link_is_told_to_the_groups_that_use_it() {
    for config in kinds() {
        for len in SIZES {
            let mut world = World::new(3, 1, config, &settings(&[]));
            let (mut a, mut b, mut c) = (vec![1u8; len], vec![0u8; len], vec![0u8; len]);
            let elsewhere = MsgKey { group: GROUP + 1, ..key(0) };
            world.net.kill_at(9, 1);
            world.ends[0].recv(message(key(0), 1, region(&mut a), 0)).unwrap();
            world.ends[0].recv(message(elsewhere, 2, region(&mut c), 1)).unwrap();
            world.until(|w| !w.failed[0].is_empty());
            let failure = &world.failed[0][0];
            assert_eq!(failure.group, Some(GROUP));
            let told = matches!(&failure.error, Error::PeerLost { peer: 101, node, .. } if node == "node1");
            assert!(told, "{config:?} {failure:?}");
            // The other group goes on.
            world.ends[2].send(message(elsewhere, 0, region(&mut b), 2)).unwrap();
            world.until(|w| w.done[0].contains(&Ctx(1)));
            assert!(world.ends[0].send(message(key(3), 1, region(&mut b), 3)).is_err());
            assert_eq!(world.failed[0].len(), 1, "{:?}", world.failed);
        }
    }
}

/// Slots that a lost peer may still write to are not used again, and others take their place.
#[test]
fn bounced_messages_arrive_after_peers_were_lost_in_the_midst_of_theirs() {
    for rma in [true, false] {
        // Two slots for receiving.
        let config = SimConfig { rma, needs_local_mr: true, ..calm() };
        let mut world = World::new(5, 1, config, &settings(&[("SMDDP_STAGING", "1M")]));
        let each = world.net.registrations() / 5;
        let (mut source, mut target) = (vec![3u8; 1 << 20], vec![0u8; 1 << 20]);
        for peer in 1..5 {
            let key = MsgKey { group: GROUP + peer as u64, ..key(0) };
            world.ends[peer].send(message(key, 0, region(&mut source), 0)).unwrap();
            world.ends[0].recv(message(key, peer, region(&mut target), peer)).unwrap();
            if peer == 4 {
                world.until(|w| w.done[0].contains(&Ctx(4)));
                break;
            }
            // It is announced and granted twice.
            let said = world.net.small_messages();
            world.until(|w| w.net.small_messages() >= said + 2);
            world.net.kill_at(0, peer);
            world.until(|w| w.failed[0].len() == peer);
            world.ends[0].withdraw(key.group, &[peer as u32], Some(&Error::Internal("lost".to_owned())));
        }
        assert!(target == source, "rma {rma}");
        // Two live; those that died hold nothing.
        let kept = world.net.registrations() - 2 * each;
        assert_eq!(kept, 3, "rma {rma}: a set of slots for each lost peer");
    }
}

#[test]
fn the_credits_of_lost_peers_are_given_to_others() {
    // Room for 32 messages: 2 windows.
    let tight = settings(&[("SMDDP_STAGING", "1M"), ("SMDDP_EAGER", "8K")]);
    let mut world = World::new(4, 1, calm(), &tight);
    let (mut source, mut target) = (vec![3u8; 5000], vec![0u8; 5000]);
    let (from, to) = (region(&mut source), region(&mut target));
    for peer in [1, 2, 3] {
        let key = MsgKey { group: GROUP + peer as u64, ..key(0) };
        // The first one makes the two acquainted.
        world.ends[peer].send(message(key, 0, from, 0)).unwrap();
        world.ends[0].recv(message(key, peer, to, peer)).unwrap();
        world.until(|w| w.done[0].contains(&Ctx(peer as u64)) && !w.done[peer].is_empty());
        if peer < 3 {
            world.net.kill_at(0, peer);
            world.ends[0].recv(message(MsgKey { seq: 1, ..key }, peer, to, 9)).unwrap();
            world.until(|w| w.failed[0].len() == peer);
        }
    }
    for i in 1..=5 {
        world.ends[3].send(message(key(i), 0, from, i)).unwrap();
    }
    for _ in 0..1000 {
        world.poll_all();
    }
    assert_eq!(world.done[3].len(), 1 + 5, "messages without a receive");
}

#[test]
fn who_waits_for_a_rank_that_has_destroyed_the_group_is_told() {
    for config in kinds() {
        for receiving in [true, false] {
            let mut world = World::new(2, 1, config, &settings(&[]));
            world.ends[1].withdraw(GROUP, &[0], None);
            let mut data = vec![0u8; 100_000];
            let waits = message(key(0), 1, region(&mut data), 0);
            let done = if receiving { world.ends[0].recv(waits) } else { world.ends[0].send(waits) };
            done.unwrap();
            world.net.pace(Duration::from_millis(1));
            world.until(|w| !w.failed[0].is_empty());
            let failure = &world.failed[0][0];
            assert_eq!(failure.group, Some(GROUP));
            let Error::PeerLost { peer: 101, reason, .. } = &failure.error else { panic!("{failure:?}") };
            assert!(reason.contains("destroyed"), "{reason}");
        }
    }
}

/// A rank may destroy the group as soon as its last message is out of its hands.
#[test]
fn a_message_that_comes_after_the_news_of_the_groups_end_is_taken() {
    for seed in 0..100 {
        // The answer to a probe often overtakes the message.
        let config = SimConfig { seed, max_delay: 4000, early_completion: true, ..calm() };
        let mut world = World::new(2, 1, config, &settings(&[]));
        world.net.pace(Duration::from_micros(100));
        let (mut a, mut b) = ([7u8; 100], [0u8; 100]);
        let (from, to) = (region(&mut a), region(&mut b));
        // The first one makes the two acquainted; the next goes unasked.
        world.ends[0].send(message(key(0), 1, from, 0)).unwrap();
        world.ends[1].recv(message(key(0), 0, to, 0)).unwrap();
        world.until(|w| w.done.iter().all(|done| done.len() == 1));
        world.ends[0].send(message(key(1), 1, from, 1)).unwrap();
        world.until(|w| w.done[0].len() == 2);
        world.ends[0].withdraw(GROUP, &[1], None);
        world.ends[1].recv(message(key(1), 0, to, 1)).unwrap();
        world.until(|w| w.done[1].len() == 2 || !w.failed[1].is_empty());
        assert!(a == b && world.failed[1].is_empty(), "{:?}", world.failed[1]);
    }
}

#[test]
fn an_abort_before_the_first_message_waits_for_it() {
    let mut world = World::new(2, 1, calm(), &settings(&[]));
    let why = Error::Internal("no memory".to_owned());
    world.ends[0].withdraw(GROUP, &[1], Some(&why));
    for _ in 0..100 {
        world.poll_all();
    }
    assert!(world.failed[1].is_empty());
    let mut a = [0u8; 4];
    world.ends[1].recv(message(key(0), 0, region(&mut a), 0)).unwrap();
    world.until(|w| !w.failed[1].is_empty());
    let Error::Aborted { reason, .. } = &world.failed[1][0].error else { panic!("{:?}", world.failed) };
    assert!(reason.contains("no memory"), "{reason}");
}

#[test]
fn an_abort_names_the_rank_and_is_cut_to_fit() {
    let mut world = World::new(2, 1, calm(), &settings(&[("SMDDP_EAGER", "64")]));
    let mut a = [0u8; 4];
    world.ends[1].recv(message(key(0), 0, region(&mut a), 0)).unwrap();
    let why = Error::Internal("ä".repeat(5000));
    world.ends[0].withdraw(GROUP, &[1], Some(&why));
    world.until(|w| !w.failed[1].is_empty());
    let Error::Aborted { reason, .. } = &world.failed[1][0].error else { panic!("{:?}", world.failed) };
    assert!(reason.contains("rank 100 (node0)") && reason.contains("ää") && reason.len() < 1200, "{reason}");
}

/// Where messages keep their order, one that is missing shows by the next.
#[test]
fn what_was_lost_with_a_connection_is_missed() {
    for (rma, sockets) in [(true, true), (true, false), (false, true)] {
        let config = SimConfig { rma, reorder: false, sockets, ..calm() };
        let mut world = World::new(2, 1, config, &settings(&[]));
        let (mut a, mut b) = (vec![1u8; 1 << 20], vec![0u8; 1 << 20]);
        let mut post = |world: &mut World, tag, len: usize| {
            world.ends[0].send(message(key(tag), 1, region(&mut a[..len]), tag)).unwrap();
            world.ends[1].recv(message(key(tag), 0, region(&mut b[..len]), tag)).unwrap();
        };
        for (tag, len) in [100, 1 << 20, 100].into_iter().enumerate() {
            post(&mut world, tag, len);
            world.until(|w| w.done.iter().all(|done| done.len() == tag + 1));
        }
        world.net.lose(world.net.small_messages());
        post(&mut world, 3, 100);
        world.until(|w| !w.failed[1].is_empty());
        let failure = &world.failed[1][0];
        let Error::PeerLost { peer: 100, reason, .. } = &failure.error else { panic!("{failure:?}") };
        assert!(reason.contains("connection"), "{reason}");
        // The two still settle: it costs the group alone.
        let World { mut ends, net, .. } = world;
        net.pace(Duration::from_micros(1));
        let mut other = ends.remove(0);
        let ends = std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                ends[0]
                    .recv(message(MsgKey { group: GROUP, seq: 1, tag: 0 }, 0, region(&mut [0; 4]), 0))
                    .unwrap_err();
                ends[0].withdraw(GROUP, &[0], Some(&Error::Internal("lost".to_owned())));
                ends[0].poll(&mut Vec::new()).unwrap();
                ends
            });
            while !thread.is_finished() {
                let _ = other.poll(&mut Vec::new());
            }
            thread.join().unwrap()
        });
        drop((ends, other));
    }
}

/// Peers that take nothing in hold slots for a time without end.
#[test]
fn peers_that_are_stuck_leave_slots_to_the_others() {
    for eager in ["1K", "64K"] {
        for stuck in [1, 4, 8] {
            let config = SimConfig { depth: 1000, ..calm() };
            let mut world = World::new(2 + stuck, 1, config, &settings(&[("SMDDP_EAGER", eager)]));
            let (mut a, mut b) = (vec![1u8; 100_000], vec![0u8; 100_000]);
            // The first one makes the two acquainted.
            for len in [100, 100, 100_000] {
                world.done.iter_mut().for_each(Vec::clear);
                let tag = world.net.small_messages() as usize;
                for (me, memory) in [(0, &mut a), (1, &mut b)] {
                    let m = message(key(tag), 1 - me, region(&mut memory[..len]), 0);
                    if me == 0 { world.ends[0].send(m).unwrap() } else { world.ends[1].recv(m).unwrap() }
                }
                for _ in 0..200 {
                    for end in 0..2 {
                        world.ends[end].poll(&mut world.done[end]).unwrap();
                    }
                }
                let arrived = (world.done[0].len(), world.done[1].len());
                assert_eq!(arrived, (1, 1), "{len} bytes past {stuck} stuck peers, eager {eager}");
                for i in 0..30 * stuck {
                    let m = message(key(tag + i), 2 + i % stuck, region(&mut a[..100]), 0);
                    world.ends[0].send(m).unwrap();
                }
            }
        }
    }
}
