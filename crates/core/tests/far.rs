//! Calls with their data on a device: messages reach that memory alone, sums the host's alone.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Group, groups, on_all};
use smddp_core::far::{Far, least_message, own_share};
use smddp_core::plan::Tuning;
use smddp_core::request::Request;
use smddp_core::{Collective, DType, GroupShape, Region};

/// Of one rank a node.
fn alone(size: usize) -> Vec<Group> {
    groups(&GroupShape::even(size, 1), 11, &Tuning::default())
}

/// What must not be read.
const POISON: i32 = -1_000_000_007;

/// Element `i` of a rank's input.
fn value(rank: usize, i: usize) -> i32 {
    (i % 1013) as i32 * 7 + rank as i32 * 100_000
}

/// A rank's memory: the host's and the device's copies.
struct Data {
    host: (Vec<i32>, Vec<i32>),
    device: (Vec<i32>, Vec<i32>),
}

/// The rank's input on the device, and its own share of it on the host.
fn data(collective: Collective, count: usize, size: usize, rank: usize) -> Data {
    let rows = |all: bool| if all { size * count } else { count };
    let (input, output) = match collective {
        Collective::ReduceScatter => (rows(true), rows(false)),
        Collective::AllGather => (rows(false), rows(true)),
        _ => (0, rows(false)),
    };
    let in_place = input == 0;
    let mut device = (vec![POISON; input], vec![POISON; output]);
    let source = if in_place { &mut device.1 } else { &mut device.0 };
    source.iter_mut().enumerate().for_each(|(i, v)| *v = value(rank, i));
    let mut host = (vec![POISON; input], vec![POISON; output]);
    let (start, len) = own_share(collective, 4, count, size, rank);
    let own = start / 4..(start + len) / 4;
    if in_place {
        host.1[own.clone()].copy_from_slice(&device.1[own]);
    } else {
        host.0[own.clone()].copy_from_slice(&device.0[own]);
    }
    Data { host, device }
}

fn run(group: &Group, collective: Collective, count: usize, root: usize, data: &mut Data) {
    // SAFETY: the vectors outlive the call, which is waited for below.
    let region = |v: &mut Vec<i32>| unsafe { Region::of(v) };
    let (host, device) = (&mut data.host, &mut data.device);
    let output = region(&mut host.1);
    let input = if host.0.is_empty() { output } else { region(&mut host.0) };
    let far_output =
        if collective == Collective::ReduceScatter { Region::EMPTY } else { region(&mut device.1) };
    let far_input = if device.0.is_empty() { far_output } else { region(&mut device.0) };
    let far = Some(Far { input: far_input, output: far_output });
    let request = Request { root, far, ..Request::new(collective, DType::I32, count, input, output) };
    // SAFETY: as above.
    unsafe { group.start(&request) }.unwrap().wait(None).unwrap();
}

/// Every element of the results, on the device but for sums.
fn check(collective: Collective, count: usize, root: usize, size: usize, rank: usize, data: &Data) {
    let sum = |i: usize| (0..size).map(|r| value(r, i)).sum::<i32>();
    let (start, len) = own_share(collective, 4, count, size, rank);
    let own = start / 4..(start + len) / 4;
    for i in 0..count {
        match collective {
            Collective::AllReduce if own.contains(&i) => assert_eq!(data.host.1[i], sum(i)),
            Collective::AllReduce => assert_eq!((data.device.1[i], data.host.1[i]), (sum(i), POISON)),
            Collective::ReduceScatter => assert_eq!(data.host.1[i], sum(rank * count + i)),
            Collective::Broadcast => assert_eq!(data.device.1[i], value(root, i)),
            _ => {
                for r in 0..size {
                    let wanted = if r == rank { POISON } else { value(r, i) };
                    assert_eq!(data.device.1[r * count + i], wanted);
                }
            }
        }
    }
}

#[test]
fn messages_reach_the_device_alone_and_sums_the_host_alone() {
    use Collective::{AllGather, AllReduce, Broadcast, ReduceScatter};
    for size in [2, 3, 5] {
        let groups = alone(size);
        for (count, root) in [(64, 0), (1000, 1), (70_001, size - 1)] {
            for collective in [AllReduce, ReduceScatter, AllGather, Broadcast] {
                on_all(&groups, |group| {
                    let mut data = data(collective, count, size, group.rank());
                    run(group, collective, count, root, &mut data);
                    check(collective, count, root, size, group.rank(), &data);
                });
            }
        }
    }
}

#[test]
fn what_cannot_be_is_refused() {
    let groups = alone(2);
    let (mut host, mut device) = (vec![0i32; 64], vec![0i32; 64]);
    // SAFETY: nothing is started.
    let (host, device) = unsafe { (Region::of(&mut host), Region::of(&mut device)) };
    let refused = |collective, far: Far| {
        let request = Request { far: Some(far), ..Request::new(collective, DType::I32, 64, host, host) };
        // SAFETY: as above: every one is refused.
        let error = unsafe { groups[0].start(&request) }.map(|_| ()).unwrap_err();
        assert!(error.to_string().contains("cannot have its data"), "{error}");
    };
    let whole = Far { input: device, output: device };
    refused(Collective::Reduce, whole);
    refused(Collective::AllReduce, Far { output: device.slice(0, 4), ..whole });
    refused(Collective::ReduceScatter, whole);
}

#[test]
fn the_shortest_message_of_a_call() {
    assert_eq!(least_message(Collective::Broadcast, 4, 100, 3), 400);
    assert_eq!(least_message(Collective::AllReduce, 4, 100, 3), 132);
    assert_eq!(least_message(Collective::AllReduce, 4, 1, 2), 0);
    let groups = alone(2);
    assert_eq!(groups[0].least_device_message(), Some(1));
}
