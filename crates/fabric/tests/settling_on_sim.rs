//! Groups that are withdrawn over the deterministic network when it is slow, and when peers go meanwhile.

#![allow(clippy::unwrap_used)]

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::*;
use smddp_core::error::Error;
use smddp_core::transport::{Ctx, Fabric, MsgKey};
use smddp_fabric::FabricEndpoint;
use smddp_fabric::sim::{SimConfig, SimDomain, SimNet};

/// A network as tcp makes one.
fn sockets() -> SimConfig {
    SimConfig { reorder: false, sockets: true, max_delay: 1, ..calm() }
}

/// Ends the other thread, also when a check fails.
struct Stop<'a>(&'a AtomicBool, SimNet);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
        self.1.in_rounds(false);
    }
}

/// Does `act` with the first process while the others are polled, whose failures are given.
fn while_polled(world: &mut World, act: impl FnOnce(&mut FabricEndpoint<SimDomain>)) -> Vec<String> {
    let (me, others) = world.ends.split_at_mut(1);
    let (stop, net) = (AtomicBool::new(false), world.net.clone());
    net.in_rounds(true);
    std::thread::scope(|scope| {
        let stopping = Stop(&stop, net);
        let poller = scope.spawn(|| {
            let mut failures = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                for other in &mut *others {
                    failures.extend(other.poll(&mut Vec::new()).err().map(|f| format!("{f:?}")));
                }
                std::thread::yield_now();
            }
            failures
        });
        act(&mut me[0]);
        drop(stopping);
        poller.join().unwrap()
    })
}

/// Both peers are well, and the network has much to do: that costs no endpoint.
#[test]
fn a_large_message_is_withdrawn_in_its_midst_whatever_the_network_takes() {
    for (rma, rails) in [(true, 1), (true, 2), (false, 1)] {
        for receives in [true, false] {
            // Twelve seconds for all of it, two for what is in flight, one for a piece.
            let len = rails * (48 << 20);
            let config = SimConfig { rma, rate: Some(1 << 20), ..sockets() };
            let mut world = World::new(2, rails, config, &settings(&[]));
            world.net.pace(Duration::from_millis(250));
            world.net.in_rounds(true);
            let (mut a, mut b) = (vec![1u8; len], vec![0u8; len]);
            let (from, to) = (region(&mut a), region(&mut b));
            world.ends[usize::from(receives)].send(message(key(0), usize::from(!receives), from, 0)).unwrap();
            world.ends[usize::from(!receives)].recv(message(key(0), usize::from(receives), to, 0)).unwrap();
            for _ in 0..10 {
                world.poll_all();
            }
            assert!(world.done.iter().all(Vec::is_empty));
            let why = Error::Internal("enough".to_owned());
            let failures = while_polled(&mut world, |me| {
                me.withdraw(GROUP, &[1], Some(&why));
                if receives {
                    b.fill(0x55);
                } else {
                    a.fill(0x66);
                }
                me.poll(&mut Vec::new()).unwrap();
            });
            assert!(failures.len() <= 1, "{failures:?}");
            let other = MsgKey { group: GROUP + 1, ..key(0) };
            let (mut c, mut d) = ([7u8; 100], [0u8; 100]);
            world.ends[0].send(message(other, 1, region(&mut c), 1)).unwrap();
            world.ends[1].recv(message(other, 0, region(&mut d), 1)).unwrap();
            world.until(|w| w.done.iter().all(|done| done.contains(&Ctx(1))));
            assert_eq!(c, d);
            let stray = if receives { 0x00 } else { 0x66 };
            assert!(!b.contains(&stray), "touched after withdraw");
        }
    }
}

/// Each piece comes soon enough after the one before it, but there are too many of them.
#[test]
fn a_peer_whose_pieces_come_and_come_costs_the_endpoint() {
    const PIECE: usize = 64 << 10;
    // One at each step, four a second; 8 MiB of them are in flight.
    let config = SimConfig { max_msg: PIECE, rate: Some(PIECE), depth: 256, ..sockets() };
    for receives in [true, false] {
        let mut world = World::new(2, 1, config, &settings(&[]));
        world.net.pace(Duration::from_millis(250));
        world.net.in_rounds(true);
        let (mut a, mut b) = (vec![1u8; 16 << 20], vec![0u8; 16 << 20]);
        let (from, to) = (region(&mut a), region(&mut b));
        world.ends[usize::from(receives)].send(message(key(0), usize::from(!receives), from, 0)).unwrap();
        world.ends[usize::from(!receives)].recv(message(key(0), usize::from(receives), to, 0)).unwrap();
        for _ in 0..10 {
            world.poll_all();
        }
        let mut said = String::new();
        while_polled(&mut world, |me| {
            me.withdraw(GROUP, &[1], Some(&Error::Internal("enough".to_owned())));
            said = me.poll(&mut Vec::new()).map_err(|failure| failure.error.to_string()).unwrap_err();
        });
        assert!(said.contains("node1 did not settle") && said.contains("in 20 s"), "{said}");
    }
}

/// Nothing is under way to the peer when it dies, so the network has nothing to tell.
#[test]
fn a_peer_that_dies_while_it_is_waited_for_is_missed() {
    for rma in [true, false] {
        let config = SimConfig { rma, early_completion: true, ..sockets() };
        let mut world = World::new(2, 1, config, &settings(&[]));
        let (mut a, mut b) = (vec![1u8; 1 << 20], vec![0u8; 1 << 20]);
        world.ends[0].recv(message(key(0), 1, region(&mut b), 0)).unwrap();
        (0..10).for_each(|_| world.poll_all());
        // Its word comes first, or it would be missed by that.
        world.net.kill_at(world.net.step() + 100, 1);
        world.net.pace(Duration::from_micros(100));
        world.ends[0].withdraw(GROUP, &[1], None);
        world.ends[0].poll(&mut Vec::new()).unwrap();
        let next = MsgKey { group: GROUP + 1, ..key(0) };
        let lost = world.ends[0].send(message(next, 1, region(&mut a), 0)).unwrap_err();
        assert!(matches!(lost, Error::PeerLost { .. }), "{lost}");
    }
}

/// Its goodbye is read before it is told of the group's end, and so it never is.
#[test]
fn a_peer_that_leaves_while_it_is_waited_for_has_settled() {
    for rma in [true, false] {
        let mut world = World::new(2, 1, SimConfig { rma, ..sockets() }, &settings(&[]));
        let mut b = vec![0u8; 1 << 20];
        world.ends[0].recv(message(key(0), 1, region(&mut b), 0)).unwrap();
        (0..10).for_each(|_| world.poll_all());
        // However the two threads are scheduled, the one that leaves waits for the other.
        world.net.pace(Duration::from_micros(1));
        let (said, leaving) = (world.net.small_messages(), world.ends.pop().unwrap());
        let goes = std::thread::spawn(move || drop(leaving));
        while world.net.small_messages() == said {
            std::thread::yield_now();
        }
        world.ends[0].withdraw(GROUP, &[1], None);
        world.ends[0].poll(&mut Vec::new()).unwrap();
        while !goes.is_finished() {
            world.ends[0].poll(&mut Vec::new()).unwrap();
        }
    }
}

/// As when a connection breaks that had taken the last piece: what was lost never comes, and its sender says that it was the last.
#[test]
fn a_piece_that_was_lost_with_a_connection_costs_its_group_alone() {
    for rails in 1..=3 {
        a_piece_is_lost(rails);
    }
}

fn a_piece_is_lost(rails: usize) {
    let config = SimConfig { early_completion: true, ..sockets() };
    let mut world = World::new(3, rails, config, &settings(&[("SMDDP_STRIPE", "64K")]));
    let (mut a, mut b) = (vec![1u8; 1 << 20], vec![0u8; 1 << 20]);
    // That of its last rail.
    world.net.lose_write(2 * rails - 1);
    world.ends[0].recv(message(key(0), 1, region(&mut b), 0)).unwrap();
    world.ends[1].send(message(key(0), 0, region(&mut a), 0)).unwrap();
    world.net.pace(Duration::from_millis(1));
    world.until(|w| !w.failed[0].is_empty());
    let failure = &world.failed[0][0].error;
    assert!(matches!(failure, Error::PeerLost { peer: 101, .. }), "{failure:?}");
    let failures = while_polled(&mut world, |me| {
        me.withdraw(GROUP, &[1], Some(&Error::Internal("lost".to_owned())));
        me.poll(&mut Vec::new()).unwrap();
    });
    let is_told = failures.len() == 1 && failures[0].contains("Aborted");
    assert!(is_told, "{failures:?}");
    let other = MsgKey { group: GROUP + 1, ..key(0) };
    world.ends[2].send(message(other, 0, region(&mut a), 1)).unwrap();
    world.ends[0].recv(message(other, 2, region(&mut b), 1)).unwrap();
    world.until(|w| [0, 2].iter().all(|&end| w.done[end].contains(&Ctx(1))));
    assert_eq!(a, b);
}
