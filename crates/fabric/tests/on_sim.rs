//! The message layer over the deterministic network: every delivery order, both registration schemes, remote writes
//! and tagged messages, several rails, full queues; and groups that are withdrawn.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::*;
use proptest::prelude::*;
use smddp_core::call::PackedCall;
use smddp_core::error::Error;
use smddp_core::memory::{Owner, Region};
use smddp_core::settings::Settings;
use smddp_core::transport::{Ctx, Fabric, FabricFailure, Message, MsgKey};
use smddp_fabric::FabricEndpoint;
use smddp_fabric::sim::{SimConfig, SimDomain};

fn configs() -> impl Strategy<Value = (SimConfig, usize, Settings)> {
    let net = (any::<u64>(), any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    let mood = (1..40u64, any::<bool>(), any::<bool>(), 2..80usize, 0..500u32);
    let shape = (1..=3usize, prop::sample::select(vec!["64", "1K", "8K"]), any::<bool>());
    (net, mood, shape).prop_map(
        |((seed, rma, needs_local_mr, virt_addr, prov_key), (max_delay, reorder, early, depth, moody), s)| {
            let (rails, eager, forced) = s;
            let config = SimConfig {
                seed,
                rma,
                needs_local_mr,
                virt_addr,
                prov_key,
                max_msg: 1 << 20,
                max_delay,
                reorder,
                rate: None,
                depth,
                moody,
                early_completion: early,
                sockets: false,
                devices: None,
            };
            let mode = if forced { "tagged" } else { "auto" };
            let pairs = [
                ("SMDDP_EAGER", eager),
                ("SMDDP_STRIPE", "4K"),
                ("SMDDP_FABRIC_MODE", mode),
                ("SMDDP_STAGING", "2M"),
            ];
            (config, rails, settings(&pairs))
        },
    )
}

#[derive(Clone, Debug)]
struct Plan {
    from: usize,
    to: usize,
    len: usize,
    /// Positions in the order of posting, and whether the memory is registered staging.
    send_at: u32,
    recv_at: u32,
    staged: (bool, bool),
}

fn plans(processes: usize) -> impl Strategy<Value = Vec<Plan>> {
    let lens = prop_oneof![
        Just(0usize),
        1..200usize,
        Just(1024),
        Just(8192),
        8193..40_000usize,
        260_000..700_000usize,
        Just(1 << 20),
    ];
    let one = (0..processes, 0..processes, lens, any::<u32>(), any::<u32>(), any::<(bool, bool)>());
    let one = one.prop_map(|(from, to, len, send_at, recv_at, staged)| Plan {
        from,
        to,
        len,
        send_at: send_at % 1000,
        recv_at: recv_at % 1000,
        staged,
    });
    prop::collection::vec(one, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    /// Whatever is posted in whatever order on a reliable network arrives whole, once, and nothing else fails.
    #[test]
    fn every_message_arrives(((config, rails, settings), plans) in (configs(), plans(3)), late: bool) {
        let mut world = if late { World::strangers(3, rails, config, &settings) }
            else { World::new(3, rails, config, &settings) };
        let mut sources: Vec<Vec<u8>> = plans.iter().enumerate()
            .map(|(i, p)| (0..p.len).map(|b| (b * 7 + i * 13 + b / 251) as u8).collect()).collect();
        let wanted = sources.clone();
        let mut targets: Vec<Vec<u8>> = plans.iter().map(|p| vec![0xee; p.len]).collect();
        for (i, p) in plans.iter().enumerate() {
            if p.len > 0 && p.staged.0 { world.ends[p.from].register(region(&mut sources[i]), Owner::Host).unwrap(); }
            if p.len > 0 && p.staged.1 { world.ends[p.to].register(region(&mut targets[i]), Owner::Host).unwrap(); }
        }
        let mut posts: Vec<(u32, usize, bool)> = plans.iter().enumerate()
            .flat_map(|(i, p)| [(p.send_at, i, true), (p.recv_at, i, false)]).collect();
        posts.sort_unstable();
        if late {
            world.connect(0);
        }
        for (step, (_, i, is_send)) in posts.iter().enumerate() {
            let p = &plans[*i];
            if late && step == 2 {
                world.connect(2);
                world.connect(1);
            }
            if late && step < 2 && (if *is_send { p.from } else { p.to }) != 0 {
                world.connect(if *is_send { p.from } else { p.to });
            }
            let (me, peer, memory) = if *is_send { (p.from, p.to, region(&mut sources[*i])) }
                else { (p.to, p.from, region(&mut targets[*i])) };
            let m = message(key(*i), peer, memory, 2 * i + usize::from(*is_send));
            if *is_send { world.ends[me].send(m).unwrap() } else { world.ends[me].recv(m).unwrap() }
            if step % 3 == 0 { world.poll_all(); }
        }
        if late { for me in 0..3 { world.connect(me); } }
        let n = plans.len();
        world.until(|w| w.done.iter().map(Vec::len).sum::<usize>() == 2 * n || w.failed.iter().any(|f| !f.is_empty()));
        prop_assert!(world.failed.iter().all(Vec::is_empty), "{:?}", world.failed);
        for (i, p) in plans.iter().enumerate() {
            prop_assert!(world.done[p.to].contains(&Ctx(2 * i as u64)));
            prop_assert!(world.done[p.from].contains(&Ctx(2 * i as u64 + 1)));
            prop_assert!(targets[i] == wanted[i], "message {i} of {} bytes", p.len);
        }
        let mut counted: BTreeMap<(usize, usize), u64> = BTreeMap::new();
        for p in &plans { *counted.entry((p.from, p.to)).or_default() += p.len as u64; }
        // What the network itself has seen, over each rail.
        let over = |rail: usize, from: usize, to: usize| -> u64 {
            (0..rails).map(|there| world.net.carried(from * rails + rail, to * rails + there)).sum()
        };
        for (&(from, to), &bytes) in &counted {
            let by_rail: Vec<u64> = (0..rails).map(|rail| over(rail, from, to)).collect();
            prop_assert_eq!(by_rail.iter().sum::<u64>(), bytes, "{} to {}: {:?}", from, to, by_rail);
            // Of a message this long every rail has a part.
            if plans.iter().any(|p| (p.from, p.to) == (from, to) && p.len >= 260_000) {
                prop_assert!(by_rail.iter().all(|&b| b > 0), "{} to {}: {:?}", from, to, by_rail);
            }
        }
        for from in 0..3 {
            for (to, sent, received) in world.ends[from].traffic() {
                prop_assert_eq!(sent, counted.get(&(from, to as usize)).copied().unwrap_or(0));
                prop_assert_eq!(received, counted.get(&(to as usize, from)).copied().unwrap_or(0));
            }
        }
    }
}

/// Keys of messages point to point are numbered by pair and tag.
fn letter(number: usize) -> MsgKey {
    MsgKey { group: GROUP, seq: MsgKey::P2P | number as u64, tag: 9 }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]
    /// Receivers that want whatever comes first see it come, of any size; receivers that know what they want need not
    /// look; and what was announced late leaves nothing behind.
    #[test]
    fn a_message_shows_itself_before_its_receive(
        (config, rails, settings) in configs(),
        letters in prop::collection::vec((prop::sample::select(vec![0usize, 5, 70, 1100, 9000, 100_000]), any::<bool>()), 1..8),
        ahead: bool,
    ) {
        let mut world = World::new(2, rails, config, &settings);
        let mut sources: Vec<Vec<u8>> = letters.iter().enumerate().map(|(i, (len, _))| vec![i as u8 + 1; *len]).collect();
        let mut targets: Vec<Vec<u8>> = letters.iter().map(|(len, _)| vec![0; *len]).collect();
        for (i, bytes) in sources.iter_mut().enumerate() {
            if !ahead || letters[i].1 {
                world.ends[0].send(message(letter(i), 1, region(bytes), i)).unwrap();
            }
        }
        for (i, (_, looks)) in letters.iter().enumerate() {
            if *looks {
                let mut polls = 0;
                while !world.ends[1].has_come(0, &letter(i)) {
                    prop_assert!(polls < 100_000, "message {i} never shows");
                    world.poll_all();
                    polls += 1;
                }
            }
            world.ends[1].recv(message(letter(i), 0, region(&mut targets[i]), i)).unwrap();
        }
        for (i, bytes) in sources.iter_mut().enumerate() {
            if ahead && !letters[i].1 {
                world.ends[0].send(message(letter(i), 1, region(bytes), i)).unwrap();
            }
        }
        let n = letters.len();
        world.until(|w| w.done[0].len() == n && w.done[1].len() == n || w.failed.iter().any(|f| !f.is_empty()));
        prop_assert!(world.failed.iter().all(Vec::is_empty), "{:?}", world.failed);
        prop_assert!(targets == sources);
        for _ in 0..2000 { world.poll_all(); }
        for i in 0..n {
            prop_assert!(!world.ends[1].has_come(0, &letter(i)), "news of message {i} stayed");
        }
    }
}

/// Receives in registered memory are granted at once, so the data of one may overtake its announcement.
#[test]
fn an_announcement_that_comes_after_its_message_is_forgotten() {
    for rma in [true, false] {
        for seq in [0, MsgKey::P2P] {
            let config = SimConfig { rma, needs_local_mr: true, max_delay: 60, ..calm() };
            let mut world = World::new(2, 1, config, &settings(&[]));
            let (mut a, mut b) = (vec![1u8; 100_000], vec![0u8; 100_000]);
            let (from, to) = (region(&mut a), region(&mut b));
            world.ends[0].register(from, Owner::Host).unwrap();
            world.ends[1].register(to, Owner::Host).unwrap();
            for n in 0..200 {
                let key = MsgKey { group: GROUP, seq: seq | n, tag: 9 };
                let sent = world.net.small_messages();
                world.ends[1].recv(message(key, 0, to, 0)).unwrap();
                world.ends[0].send(message(key, 1, from, 0)).unwrap();
                assert_eq!(world.net.small_messages() - sent, 2, "granted and announced at once");
                world.until(|w| w.done.iter().all(|done| !done.is_empty()));
                world.done.iter_mut().for_each(Vec::clear);
            }
            for _ in 0..200 {
                world.poll_all();
            }
            let kept = (0..200)
                .filter(|n| world.ends[1].has_come(0, &MsgKey { group: GROUP, seq: seq | n, tag: 9 }));
            assert_eq!(kept.count(), 0, "rma {rma}, seq {seq}");
        }
    }
}

/// Posts a send and a receive that disagree, in either order, and gives what the two sides were told.
fn disagreement(config: SimConfig, first: usize, make: impl Fn(usize) -> (MsgKey, PackedCall, usize)) {
    let mut world = World::new(2, 1, config, &settings(&[]));
    let mut memory = [vec![1u8; 1 << 20], vec![0u8; 1 << 20]];
    for i in 0..2 {
        let me = (first + i) % 2;
        let (key, call, len) = make(me);
        let peer = 1 - me;
        let m = Message { call, ..message(key, peer, region(&mut memory[me][..len]), me) };
        if me == 0 {
            world.ends[0].send(m).unwrap()
        } else {
            world.ends[1].recv(m).unwrap()
        }
        for _ in 0..60 * i {
            world.poll_all();
        }
    }
    world.until(|w| w.failed.iter().any(|f| !f.is_empty()));
    let (side, failures) = world.failed.iter().enumerate().find(|(_, f)| !f.is_empty()).unwrap();
    let failure = &failures[0];
    assert_eq!(failure.group, Some(GROUP));
    let Error::Mismatch { ours, peer, theirs, .. } = &failure.error else { panic!("{failure:?}") };
    assert_eq!(*peer, 100 + 1 - side);
    for (who, text) in [(side, ours), (1 - side, theirs)] {
        let (_, call, len) = make(who);
        assert!(text.contains(&call.to_string()), "{text}");
        assert!(make(0).1 != make(1).1 || text.contains(&len.to_string()), "{text}");
    }
}

#[test]
fn sides_that_called_different_things_are_both_named() {
    for config in kinds() {
        for first in 0..2 {
            for len in SIZES {
                // Another call, same key.
                disagreement(config, first, |me| (key(0), call(5 + me), len));
                // Another algorithm: other tags, so the messages would never meet.
                disagreement(config, first, |me| (key(me), call(5 + me), len));
            }
            // The same call, other lengths: both small, one small, both large.
            for (a, b) in [(1, 2), (0, 9), (100, 9000), (9000, 100), (9000, 9001), (1 << 20, 9000)] {
                disagreement(config, first, |me| (key(0), call(5), if me == 0 { a } else { b }));
            }
        }
    }
}

/// A driver sleeps as long as nothing moves; were it woken by every probe, a late peer would cost it a tenth of a core.
#[test]
fn probes_go_out_and_come_in_but_nothing_has_moved() {
    for receiving in [true, false] {
        let mut world = World::new(2, 1, calm(), &settings(&[]));
        let mut data = vec![0u8; 100_000];
        let waits = message(key(0), 1, region(&mut data), 0);
        let done = if receiving { world.ends[0].recv(waits) } else { world.ends[0].send(waits) };
        done.unwrap();
        (0..100).for_each(|_| world.poll_all());
        let before = world.net.small_messages();
        let mut moved = 0;
        for _ in 0..20_000 {
            for end in &mut world.ends {
                moved += usize::from(end.poll(&mut Vec::new()).unwrap());
            }
        }
        let probes = world.net.small_messages() - before;
        assert!(probes >= 4, "{probes} probes");
        assert_eq!(moved, 0, "receiving: {receiving}; {probes} probes");
    }
}

/// What is asked again and again would lie before what others say to it.
#[test]
fn who_is_slow_to_answer_is_not_asked_again_meanwhile() {
    for ordered in [true, false] {
        let config = SimConfig { early_completion: true, reorder: !ordered, ..calm() };
        let mut world = World::new(2, 1, config, &settings(&[]));
        world.net.pace(Duration::from_micros(100));
        let mut data = vec![0u8; 100];
        world.ends[0].recv(message(key(0), 1, region(&mut data), 0)).unwrap();
        let mut said = |looks: bool| {
            let before = world.net.small_messages();
            for _ in 0..100 {
                // For 100 ms.
                for _ in 0..1000 {
                    world.ends[0].poll(&mut Vec::new()).unwrap();
                }
                if looks {
                    world.ends[1].poll(&mut Vec::new()).unwrap();
                }
            }
            world.net.small_messages() - before
        };
        let (often, never) = (said(true), said(false));
        assert!((100..=202).contains(&often), "{often} messages in 100 looks");
        // It may have been stopped, or have lost the question with its connection.
        assert!((5..=12).contains(&never), "{never} questions in 10 s");
    }
}

#[test]
fn few_small_messages_are_kept_however_many_are_sent() {
    // Room for 32 messages: 2 windows.
    let tight = settings(&[("SMDDP_STAGING", "1M"), ("SMDDP_EAGER", "8K")]);
    let mut world = World::new(4, 1, calm(), &tight);
    let n = 200;
    let mut sources = vec![vec![5u8; 8000]; 3 * n];
    let mut targets = vec![vec![0u8; 8000]; 3 * n];
    for (i, source) in sources.iter_mut().enumerate() {
        world.ends[1 + i % 3].send(message(key(i), 0, region(source), 0)).unwrap();
    }
    for _ in 0..3000 {
        world.poll_all();
    }
    let sent: usize = world.done[1..].iter().map(Vec::len).sum();
    assert!((1..=32).contains(&sent), "{sent} messages were taken in without a receive");
    // The last ones first: no order of receives can deadlock.
    for (i, target) in targets.iter_mut().enumerate().rev() {
        world.ends[0].recv(message(key(i), 1 + i % 3, region(target), 1)).unwrap();
    }
    world.until(|w| w.done[0].len() == 3 * n);
    assert!(targets == sources);
}

#[test]
fn credits_come_back() {
    let mut world = World::new(2, 1, calm(), &settings(&[]));
    let mut source = vec![3u8; 5000];
    for i in 0..200 {
        let mut target = vec![0u8; 5000];
        world.ends[0].send(message(key(i), 1, region(&mut source), i)).unwrap();
        if i > 0 {
            // The first one made the two acquainted; all others go unasked.
            world.until(|w| w.done[0].contains(&Ctx(i as u64)));
        }
        world.ends[1].recv(message(key(i), 0, region(&mut target), i)).unwrap();
        world.until(|w| w.done[1].contains(&Ctx(i as u64)));
        assert!(target == source);
    }
}

/// Ends the other thread, also when a check fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Messages of every length under way between two processes, in both directions.
struct Traffic {
    mine: Vec<Vec<u8>>,
    here: Vec<Vec<u8>>,
    _theirs: Vec<Vec<u8>>,
    there: Vec<Vec<u8>>,
}

impl Traffic {
    /// All of process 0's targets but the first `plain` are registered.
    fn start(world: &mut World, plain: usize) -> Traffic {
        let buffers = |value: u8| -> Vec<Vec<u8>> {
            [10, 1000, 5000, 300_000, 700_000].iter().map(|n| vec![value; *n]).collect()
        };
        let (mut mine, mut here, mut theirs, mut there) = (buffers(1), buffers(0), buffers(2), buffers(0));
        for buffer in here.iter_mut().skip(plain) {
            world.ends[0].register(region(buffer), Owner::Host).unwrap();
        }
        for i in 0..mine.len() {
            world.ends[0].send(message(key(i), 1, region(&mut mine[i]), i)).unwrap();
            world.ends[0].recv(message(key(10 + i), 1, region(&mut here[i]), 10 + i)).unwrap();
            world.ends[1].recv(message(key(i), 0, region(&mut there[i]), i)).unwrap();
            world.ends[1].send(message(key(10 + i), 0, region(&mut theirs[i]), 10 + i)).unwrap();
        }
        Traffic { mine, here, _theirs: theirs, there }
    }

    /// Writes to the memory of process 0: whatever still touched it would show.
    fn overwrite(&mut self) {
        self.here.iter_mut().for_each(|buffer| buffer.fill(0x55));
        self.mine.iter_mut().for_each(|buffer| buffer.fill(0x66));
    }

    fn check_unwritten(&self) {
        assert!(self.here.iter().all(|b| b.iter().all(|x| *x == 0x55)), "written after withdraw");
    }

    fn check_unsent(&self) {
        assert!(self.there.iter().all(|b| b.iter().all(|x| *x != 0x66)), "sent after withdraw");
    }
}

/// Polls until `stop`, and sets `told` at a failure; the failures.
fn poll_until(
    end: &mut FabricEndpoint<SimDomain>,
    stop: &AtomicBool,
    told: &AtomicBool,
) -> Vec<FabricFailure> {
    let (mut done, mut failures) = (Vec::new(), Vec::new());
    while !stop.load(Ordering::Relaxed) {
        if let Err(failure) = end.poll(&mut done) {
            failures.push(failure);
            told.store(true, Ordering::Relaxed);
        }
        std::thread::yield_now();
    }
    failures
}

/// Two processes with everything in flight; one withdraws while the other goes on polling.
fn withdrawn(config: SimConfig, steps: usize, why: bool) {
    let small = settings(&[("SMDDP_STAGING", "2M"), ("SMDDP_STRIPE", "4K"), ("SMDDP_EAGER", "1K")]);
    let mut world = World::new(2, 2, config, &small);
    let other = MsgKey { group: GROUP + 1, ..key(0) };
    // Registered staging cannot be taken back from a NIC: only settling protects it.
    let mut traffic = Traffic::start(&mut world, steps % 2);
    let (mut o1, mut o2) = (vec![9u8; 400_000], vec![0u8; 400_000]);
    world.ends[1].send(message(other, 0, region(&mut o1), 50)).unwrap();
    for _ in 0..steps {
        world.poll_all();
    }
    let World { mut ends, failed, mut done, net } = world;
    // However the two threads are scheduled, no time limit is reached.
    net.pace(Duration::from_micros(1));
    assert!(failed.iter().all(Vec::is_empty), "{failed:?}");
    let mut peer = ends.pop().unwrap();
    let (stop, told) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let (stop, told) = (&stop, &told);
        let stopping = Stop(stop);
        let peer = &mut peer;
        let poller = scope.spawn(move || poll_until(peer, stop, told));
        let me = &mut ends[0];
        let reason = Error::Internal("enough".to_owned());
        me.withdraw(GROUP, &[1], why.then_some(&reason));
        // From here on the memory is ours.
        traffic.overwrite();
        me.recv(message(other, 1, region(&mut o2), 51)).unwrap();
        let mut rounds = 0;
        while !done[0].contains(&Ctx(51)) || (why && !told.load(Ordering::Relaxed)) {
            me.poll(&mut done[0]).unwrap();
            rounds += 1;
            assert!(rounds < 500_000, "the other group is stuck, or the peer was not told");
            std::thread::yield_now();
        }
        traffic.check_unwritten();
        assert!(me.waiting_for(GROUP).is_empty());
        drop(stopping);
        net.pace(Duration::from_millis(10));
        let failures = poller.join().unwrap();
        if why {
            let text = format!("{failures:?}");
            assert!(text.contains("Aborted") && text.contains("enough"), "{text}");
            assert_eq!(failures.len(), 1, "{text}");
        } else {
            assert!(failures.is_empty(), "{failures:?}");
        }
        traffic.check_unsent();
    });
    assert_eq!(o1, o2);
}

#[test]
fn after_withdraw_nothing_is_touched() {
    for config in kinds() {
        for (i, steps) in (0..60).step_by(3).chain([100, 200]).enumerate() {
            for why in [true, false] {
                let config = SimConfig { seed: i as u64, max_delay: 30, ..config };
                withdrawn(config, steps, why);
            }
        }
    }
}

#[test]
fn a_peer_that_never_settles_costs_the_endpoint_and_it_says_so() {
    for config in kinds() {
        let mut world = World::new(2, 1, config, &settings(&[]));
        let (mut a, mut b) = (vec![0u8; 1 << 20], vec![0u8; 1 << 20]);
        world.ends[0].register(region(&mut a), Owner::Host).unwrap();
        world.ends[0].recv(message(key(0), 1, region(&mut a), 0)).unwrap();
        for _ in 0..50 {
            world.poll_all();
        }
        // Nobody polls the peer while this withdraws.
        world.net.pace(Duration::from_millis(1));
        let (me, _) = world.ends.split_at_mut(1);
        me[0].withdraw(GROUP, &[1], None);
        let text = me[0].send(message(key(1), 1, region(&mut b), 0)).unwrap_err().to_string();
        assert!(text.contains("node1 did not settle") && text.contains("initialise again"), "{text}");
        let failure = me[0].poll(&mut Vec::new()).unwrap_err();
        assert_eq!(failure.group, None);
    }
}

/// What lies where registered memory was is ordinary memory: its own registration is gone, and no other is taken for it.
#[test]
fn memory_that_was_taken_back_is_used_as_any() {
    for config in kinds() {
        let mut world = World::new(2, 2, config, &settings(&[]));
        let (mut a, mut b) = (vec![3u8; 1 << 20], vec![0u8; 1 << 20]);
        let (here, there) = (region(&mut a), region(&mut b));
        let before = world.net.registrations();
        for round in 0..4 {
            let registered = round % 2 == 0;
            if registered {
                world.ends[0].register(here, Owner::Host).unwrap();
                world.ends[1].register(there, Owner::Host).unwrap();
            }
            world.ends[0].send(message(key(round), 1, here, round)).unwrap();
            world.ends[1].recv(message(key(round), 0, there, round)).unwrap();
            world.until(|w| w.done[0].len() == round + 1 && w.done[1].len() == round + 1);
            // A part of it is not the region that was registered.
            world.ends[0].deregister(here.slice(0, 100));
            world.ends[0].deregister(here);
            world.ends[1].deregister(there);
            world.until(|w| w.net.registrations() == before);
        }
        drop(world);
        assert!(b.iter().all(|&x| x == 3));
    }
}

/// What of a message goes through slots already goes on so.
#[test]
fn memory_may_be_registered_while_a_message_comes_into_it() {
    for rma in [true, false] {
        let config = SimConfig { rma, needs_local_mr: true, virt_addr: true, ..calm() };
        let mut world = World::new(2, 1, config, &settings(&[]));
        let (mut a, mut b) = (vec![3u8; 2 << 20], vec![0u8; 2 << 20]);
        world.ends[0].send(message(key(0), 1, region(&mut a), 0)).unwrap();
        world.ends[1].recv(message(key(0), 0, region(&mut b), 0)).unwrap();
        // It is announced and granted in part.
        world.until(|w| w.net.small_messages() >= 2);
        world.ends[1].register(region(&mut b), Owner::Host).unwrap();
        world.until(|w| w.done.iter().all(|done| done.len() == 1));
        drop(world);
        assert_eq!(a, b);
    }
}

/// The mark of a withdrawn group's operation may be another's by the next poll.
#[test]
fn a_withdrawn_group_leaves_no_marks() {
    let mut world = World::new(2, 1, calm(), &settings(&[]));
    let (mut a, mut b) = ([3u8; 100], [0u8; 100]);
    let other = MsgKey { group: GROUP + 1, ..key(0) };
    // The first ones make the two acquainted; the next go unasked and are here before their receives.
    for (key, ctx) in [(key(0), 0), (other, 1)] {
        world.ends[0].send(message(key, 1, region(&mut a), ctx)).unwrap();
        world.ends[1].recv(message(key, 0, region(&mut b), ctx)).unwrap();
        world.until(|w| w.done.iter().all(|done| done.contains(&Ctx(ctx as u64))));
    }
    let next = [(2, key(1)), (3, MsgKey { tag: 1, ..other })];
    for (ctx, key) in next {
        world.ends[0].send(message(key, 1, region(&mut a), ctx)).unwrap();
    }
    (0..100).for_each(|_| world.poll_all());
    for (ctx, key) in next {
        world.ends[1].recv(message(key, 0, region(&mut b), ctx)).unwrap();
    }
    world.ends[1].withdraw(GROUP, &[0], None);
    let mut done = Vec::new();
    world.ends[1].poll(&mut done).unwrap();
    assert_eq!(done, [Ctx(3)]);
}

#[test]
fn addresses_of_another_provider_or_mode_are_refused() {
    let mut ours = World::new(1, 1, calm(), &settings(&[]));
    let tagged = World::new(1, 1, SimConfig { rma: false, ..calm() }, &settings(&[]));
    let text = ours.ends[0].connect(&tagged.ends[0].address(), "node9").unwrap_err().to_string();
    assert!(text.contains("node9") && text.contains("SMDDP_FABRIC_MODE"), "{text}");
    let text = ours.ends[0].connect(b"junk", "node8").unwrap_err().to_string();
    assert!(text.contains("node8") && text.contains("version"), "{text}");
}

#[test]
fn a_description_names_rails_and_mode() {
    let world = World::new(1, 3, calm(), &settings(&[]));
    let text = world.ends[0].describe();
    assert!(text.contains("3 rail") && text.contains("sim2") && text.contains("remote writes"), "{text}");
}

/// A device's memory: addresses that nobody may touch, and its bytes as far behind them as they are long.
struct Device {
    start: *mut u8,
    len: usize,
}

impl Device {
    fn new(len: usize) -> Device {
        use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect};
        let len = len.next_multiple_of(4096);
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping, left in place until the process ends; its first half is never touched.
        let start = unsafe {
            let start = mmap_anonymous(std::ptr::null_mut(), 2 * len, access, MapFlags::PRIVATE).unwrap();
            mprotect(start, len, MprotectFlags::empty()).unwrap();
            start.cast()
        };
        Device { start, len }
    }

    fn part(&self, at: usize, len: usize) -> Region {
        // SAFETY: mapped for good; given to the network alone.
        unsafe { Region::new(self.start, self.len) }.slice(at, len)
    }

    fn bytes(&mut self, at: usize, len: usize) -> &mut [u8] {
        // SAFETY: the second half of the mapping, while no message is under way.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(self.len + at), len) }
    }
}

/// Messages from and to a device's memory, which the host cannot touch.
#[test]
fn a_devices_memory_is_the_networks_alone() {
    const LEN: usize = 300_001;
    for config in kinds() {
        let mut device = Device::new(4 * LEN);
        let config = SimConfig { devices: Some(device.len as isize), ..config };
        let mut world = World::new(2, 2, config, &settings(&[("SMDDP_STRIPE", "64K")]));
        let least = world.ends[0].least_device_message().unwrap();
        assert!(least > 1024 && least < LEN);
        for end in &mut world.ends {
            end.register(device.part(0, 4 * LEN), Owner::Cuda(1)).unwrap();
        }
        device.bytes(0, LEN).iter_mut().enumerate().for_each(|(i, b)| *b = (i * 7 + i / 251) as u8);
        let wanted = device.bytes(0, LEN).to_vec();
        let mut host = vec![0; LEN];
        // Round and round: device to device, device to host, host to device.
        let ways = [
            (device.part(0, LEN), device.part(LEN, LEN)),
            (device.part(LEN, LEN), region(&mut host)),
            (region(&mut host), device.part(2 * LEN, LEN)),
            (device.part(2 * LEN, least), device.part(3 * LEN, least)),
        ];
        for (i, (from, to)) in ways.into_iter().enumerate() {
            world.ends[i % 2].send(message(key(i), 1 - i % 2, from, i)).unwrap();
            world.ends[1 - i % 2].recv(message(key(i), i % 2, to, i)).unwrap();
            world.until(|w| w.done.iter().map(Vec::len).sum::<usize>() == 2 * (i + 1));
        }
        assert!(host == wanted && device.bytes(2 * LEN, LEN) == wanted);
        assert!(device.bytes(3 * LEN, least) == &wanted[..least]);
        let small = message(key(9), 1, device.part(0, least - 1), 9);
        let text = world.ends[0].send(small).unwrap_err().to_string();
        assert!(text.contains("device memory"), "{text}");
    }
}

#[test]
fn a_network_that_reaches_no_device_says_so() {
    let world = World::new(2, 1, SimConfig::default(), &settings(&[]));
    assert_eq!(world.ends[0].least_device_message(), None);
}
