//! The stand-in for NCCL does what NCCL does, between processes, and fails as it does.

mod common;

use common::*;
use smddp_standin::{Children, Rank};
use std::sync::atomic::Ordering;

fn value(rank: usize, i: usize) -> f32 {
    (rank * 100 + i) as f32
}

fn inputs(rank: usize, count: usize) -> Vec<f32> {
    (0..count).map(|i| value(rank, i)).collect()
}

fn summed(ranks: usize, count: usize) -> Vec<f32> {
    (0..count).map(|i| (0..ranks).map(|rank| value(rank, i)).sum()).collect()
}

fn start(rank: &Rank) -> (&'static Cuda, &'static Nccl, smddp_standin::Control, usize) {
    let (cuda, control) = cuda_on(rank.rank as i32);
    let nccl = Nccl::load();
    (cuda, nccl, control, comm(nccl, rank))
}

fn all_collectives(rank: &Rank) {
    let (cuda, nccl, _, comm) = start(rank);
    let (me, n, stream) = (rank.rank, rank.ranks, cuda.stream());
    let count = 1000;
    let sum = summed(n, count * n);

    let from = cuda.put(&inputs(me, count * n));
    let to = cuda.alloc(count * n * 4);
    assert_eq!(nccl.ncclAllReduce(from, to, count * n, F32, SUM, comm, stream), 0);
    assert_eq!(cuda.cuStreamSynchronize(stream), 0);
    assert_eq!(cuda.get(to, count * n), sum);

    assert_eq!(nccl.ncclReduceScatter(from, to, count, F32, SUM, comm, stream), 0);
    assert_eq!(cuda.cuStreamSynchronize(stream), 0);
    assert_eq!(cuda.get(to, count), sum[me * count..][..count]);

    assert_eq!(nccl.ncclAllGather(from, to, count, F32, comm, stream), 0);
    assert_eq!(cuda.cuStreamSynchronize(stream), 0);
    let gathered: Vec<f32> = (0..n).flat_map(|rank| inputs(rank, count)).collect();
    assert_eq!(cuda.get(to, count * n), gathered);

    let root = n - 1;
    assert_eq!(nccl.ncclBroadcast(from, to, count, F32, root as i32, comm, stream), 0);
    assert_eq!(cuda.cuStreamSynchronize(stream), 0);
    assert_eq!(cuda.get(to, count), inputs(root, count));

    let before = cuda.put(&vec![-1.0; count]);
    assert_eq!(nccl.ncclReduce(from, before, count, F32, SUM, root as i32, comm, stream), 0);
    assert_eq!(cuda.cuStreamSynchronize(stream), 0);
    let expected = if me == root { sum[..count].to_vec() } else { vec![-1.0; count] };
    assert_eq!(cuda.get(before, count), expected);

    // In place.
    assert_eq!(nccl.ncclAllReduce(from, from, count, F32, SUM, comm, stream), 0);
    assert_eq!(cuda.cuStreamSynchronize(stream), 0);
    assert_eq!(cuda.get(from, count), sum[..count]);

    assert_eq!(async_error(nccl, comm), 0);
    assert_eq!(nccl.ncclCommFinalize(comm), 0);
    assert_eq!(nccl.ncclCommDestroy(comm), 0);
}

#[test]
fn collectives_of_two_equal_the_reference() {
    Children::of("collectives_of_two_equal_the_reference").ranks(2).run(all_collectives);
}

#[test]
fn collectives_of_four_equal_the_reference_with_delays() {
    Children::of("collectives_of_four_equal_the_reference_with_delays")
        .ranks(4)
        .env("SMDDP_STANDIN_DELAY_US", "3000")
        .env("SMDDP_STANDIN_SEED", "7")
        .env("SMDDP_STANDIN_POISON", "start")
        .run(all_collectives);
}

#[test]
fn a_collective_blocks_while_a_peer_is_missing() {
    Children::of("a_collective_blocks_while_a_peer_is_missing").ranks(2).run(|rank| {
        let (cuda, nccl, control, comm) = start(rank);
        let (stream, data) = (cuda.stream(), cuda.put(&[1.0]));
        if rank.rank == 0 {
            assert_eq!(nccl.ncclAllReduce(data, data, 1, F32, SUM, comm, stream), 0);
            until("the operation waits", || control.parked() == 1);
            assert_eq!(cuda.cuStreamQuery(stream), 600);
            rank.publish("seen", b"");
        } else {
            rank.receive("seen");
            assert_eq!(nccl.ncclAllReduce(data, data, 1, F32, SUM, comm, stream), 0);
        }
        assert_eq!(cuda.cuStreamSynchronize(stream), 0);
        assert_eq!(cuda.get(data, 1), [2.0]);
    });
}

#[test]
fn sends_and_receives_in_a_group_cannot_block_each_other() {
    Children::of("sends_and_receives_in_a_group_cannot_block_each_other").ranks(3).run(|rank| {
        let (cuda, nccl, _, comm) = start(rank);
        let (me, n, stream) = (rank.rank, rank.ranks, cuda.stream());
        // All to all, a megabyte each, sends first.
        let count = 1 << 18;
        let from = cuda.put(&vec![me as f32; count]);
        let to: Vec<u64> = (0..n).map(|_| cuda.alloc(count * 4)).collect();
        assert_eq!(nccl.ncclGroupStart(), 0);
        for peer in 0..n {
            assert_eq!(nccl.ncclSend(from, count, F32, peer as i32, comm, stream), 0);
        }
        for (peer, to) in to.iter().enumerate() {
            assert_eq!(nccl.ncclRecv(*to, count, F32, peer as i32, comm, stream), 0);
        }
        assert_eq!(nccl.ncclGroupEnd(), 0);
        assert_eq!(cuda.cuStreamSynchronize(stream), 0);
        for (peer, to) in to.iter().enumerate() {
            assert_eq!(cuda.get(*to, count), vec![peer as f32; count]);
        }
    });
}

/// Without a group two sends meet no receive: as with NCCL, they wait for ever.
#[test]
fn sends_without_a_group_block() {
    Children::of("sends_without_a_group_block").ranks(2).run(|rank| {
        let (cuda, nccl, control, comm) = start(rank);
        let (stream, data, peer) = (cuda.stream(), cuda.put(&[1.0]), 1 - rank.rank as i32);
        assert_eq!(nccl.ncclSend(data, 1, F32, peer, comm, stream), 0);
        assert_eq!(nccl.ncclRecv(data, 1, F32, peer, comm, stream), 0);
        until("the send waits", || control.parked() == 1);
        rank.barrier("both wait");
        assert_eq!(cuda.cuStreamQuery(stream), 600);
        rank.barrier("both saw it");
        assert_eq!(nccl.ncclCommAbort(comm), 0);
        assert_eq!(cuda.cuStreamSynchronize(stream), 0);
    });
}

#[test]
fn a_group_of_several_streams_orders_them_all() {
    Children::of("a_group_of_several_streams_orders_them_all").ranks(2).run(|rank| {
        let (cuda, nccl, control, comm) = start(rank);
        let (one, two, flags) = (cuda.stream(), cuda.stream(), cuda.pinned(64));
        let (a, b) = (cuda.put(&[1.0]), cuda.put(&[10.0]));
        assert_eq!(cuda.cuStreamWaitValue32_v2(two, flags.device, 1, 0), 0);
        assert_eq!(nccl.ncclGroupStart(), 0);
        assert_eq!(nccl.ncclAllReduce(a, a, 1, F32, SUM, comm, one), 0);
        assert_eq!(nccl.ncclAllReduce(b, b, 1, F32, SUM, comm, two), 0);
        assert_eq!(nccl.ncclGroupEnd(), 0);
        until("the first stream waits for the second", || control.parked() == 2);
        assert_eq!(cuda.cuStreamQuery(one), 600);
        flags.word(0).store(1, Ordering::Release);
        assert_eq!([cuda.cuStreamSynchronize(one), cuda.cuStreamSynchronize(two)], [0, 0]);
        assert_eq!((cuda.get(a, 1), cuda.get(b, 1)), (vec![2.0], vec![20.0]));
    });
}

/// One communicator is serial: an operation parked behind a value keeps later ones on other streams back.
/// Two communicators are not.
#[test]
fn a_communicator_is_serial_whatever_the_streams() {
    Children::of("a_communicator_is_serial_whatever_the_streams").ranks(2).run(|rank| {
        let (cuda, nccl, control, comm) = start(rank);
        let mut other = 0;
        assert_eq!(nccl.ncclCommSplit(comm, 0, rank.rank as i32, &mut other, std::ptr::null()), 0);
        let (one, two, three) = (cuda.stream(), cuda.stream(), cuda.stream());
        let (flags, data) = (cuda.pinned(64), cuda.put(&[1.0, 1.0, 1.0]));
        assert_eq!(cuda.cuStreamWaitValue32_v2(one, flags.device, 1, 0), 0);
        assert_eq!(nccl.ncclAllReduce(data, data, 1, F32, SUM, comm, one), 0);
        assert_eq!(nccl.ncclAllReduce(data + 4, data + 4, 1, F32, SUM, comm, two), 0);
        assert_eq!(nccl.ncclAllReduce(data + 8, data + 8, 1, F32, SUM, other, three), 0);
        assert_eq!(cuda.cuStreamSynchronize(three), 0);
        until("the second operation waits for the first", || control.parked() == 2);
        assert_eq!(cuda.cuStreamQuery(two), 600);
        flags.word(0).store(1, Ordering::Release);
        assert_eq!([cuda.cuStreamSynchronize(two), cuda.cuStreamSynchronize(one)], [0, 0]);
        assert_eq!(cuda.get(data, 3), [2.0; 3]);
        assert_eq!([nccl.ncclCommDestroy(comm), nccl.ncclCommDestroy(other)], [0, 0]);
    });
}

#[test]
fn splits_make_communicators_by_color_and_key() {
    Children::of("splits_make_communicators_by_color_and_key").ranks(4).run(|rank| {
        let (cuda, nccl, _, comm) = start(rank);
        let (me, stream) = (rank.rank as i32, cuda.stream());
        // Evens and the one odd rank 1, in reverse order; rank 3 goes nowhere.
        let color = if me == 3 { -1 } else { me % 2 };
        let mut part = 1;
        assert_eq!(nccl.ncclCommSplit(comm, color, -me, &mut part, std::ptr::null()), 0);
        if me == 3 {
            assert_eq!(part, 0);
        } else {
            let (mut size, mut place, mut device) = (-1, -1, -1);
            assert_eq!(nccl.ncclCommCount(part, &mut size), 0);
            assert_eq!(nccl.ncclCommUserRank(part, &mut place), 0);
            assert_eq!(nccl.ncclCommCuDevice(part, &mut device), 0);
            assert_eq!((size, place, device), [(2, 1, 0), (1, 0, 1), (2, 0, 2)][me as usize]);
            let data = cuda.put(&[me as f32 + 1.0]);
            assert_eq!(nccl.ncclAllReduce(data, data, 1, F32, SUM, part, stream), 0);
            assert_eq!(cuda.cuStreamSynchronize(stream), 0);
            assert_eq!(cuda.get(data, 1), [[4.0, 2.0, 4.0][me as usize]]);
            assert_eq!(nccl.ncclCommDestroy(part), 0);
        }
        assert_eq!(nccl.ncclCommDestroy(comm), 0);
    });
}

#[test]
fn every_type_and_operation_reduces() {
    Children::of("every_type_and_operation_reduces").ranks(2).run(|rank| {
        let (cuda, nccl, _, comm) = start(rank);
        let stream = cuda.stream();
        // 3 and 2 in each type; sum, product, maximum, minimum, average of whole and of broken numbers.
        let half = |value: f32| half::f16::from_f32(value).to_le_bytes().to_vec();
        let bf16 = |value: f32| half::bf16::from_f32(value).to_le_bytes().to_vec();
        let e4m3 = |value: f32| {
            vec![
                [(2.0, 0x40u8), (2.5, 0x42), (3.0, 0x44), (5.0, 0x4a), (6.0, 0x4c)]
                    .iter()
                    .find(|(v, _)| *v == value)
                    .unwrap()
                    .1,
            ]
        };
        let e5m2 = |value: f32| {
            vec![
                [(2.0, 0x40u8), (2.5, 0x41), (3.0, 0x42), (5.0, 0x45), (6.0, 0x46)]
                    .iter()
                    .find(|(v, _)| *v == value)
                    .unwrap()
                    .1,
            ]
        };
        type Encode<'a> = &'a dyn Fn(f32) -> Vec<u8>;
        let types: [(i32, bool, Encode); 12] = [
            (0, true, &|v| vec![v as i8 as u8]),
            (1, true, &|v| vec![v as u8]),
            (2, true, &|v| (v as i32).to_le_bytes().to_vec()),
            (3, true, &|v| (v as u32).to_le_bytes().to_vec()),
            (4, true, &|v| (v as i64).to_le_bytes().to_vec()),
            (5, true, &|v| (v as u64).to_le_bytes().to_vec()),
            (6, false, &half),
            (7, false, &|v| v.to_le_bytes().to_vec()),
            (8, false, &|v| f64::from(v).to_le_bytes().to_vec()),
            (9, false, &bf16),
            (10, false, &e4m3),
            (11, false, &e5m2),
        ];
        for (dtype, whole, encode) in types {
            let results = [5.0, 6.0, 3.0, 2.0, if whole { 2.0 } else { 2.5 }];
            for (op, result) in results.into_iter().enumerate() {
                let mine = encode([3.0, 2.0][rank.rank]);
                let device = cuda.alloc(mine.len());
                assert_eq!(cuda.cuMemcpyHtoD_v2(device, mine.as_ptr(), mine.len()), 0);
                assert_eq!(nccl.ncclAllReduce(device, device, 1, dtype, op as i32, comm, stream), 0);
                let mut found = vec![0; mine.len()];
                assert_eq!(cuda.cuMemcpyDtoHAsync_v2(found.as_mut_ptr(), device, found.len(), stream), 0);
                assert_eq!(found, encode(result), "type {dtype}, operation {op}");
                assert_eq!(cuda.cuMemFree_v2(device), 0);
            }
        }
        let data = cuda.alloc(8);
        assert_eq!(nccl.ncclAllReduce(data, data, 1, 12, SUM, comm, stream), 4);
        assert_eq!(nccl.ncclAllReduce(data, data, 1, F32, 5, comm, stream), 4);
        assert_eq!(nccl.ncclBroadcast(data, data, 1, F32, 2, comm, stream), 4);
        assert!(text(nccl.ncclGetLastError(comm)).contains("root 2"));
    });
}

#[test]
fn scalars_multiply_each_ranks_input() {
    Children::of("scalars_multiply_each_ranks_input").ranks(2).run(|rank| {
        let (cuda, nccl, _, comm) = start(rank);
        let stream = cuda.stream();
        let factor = [0.5f32, 0.25][rank.rank];
        let (data, scalar) = (cuda.put(&[4.0]), cuda.put(&[factor]));
        for (scalar, residence) in [((&raw const factor).cast(), 1), (scalar as *const _, 0)] {
            let (mut op, out) = (0, cuda.alloc(4));
            assert_eq!(nccl.ncclRedOpCreatePreMulSum(&mut op, scalar, F32, residence, comm), 0);
            assert_eq!(nccl.ncclAllReduce(data, out, 1, 8, op, comm, stream), 4);
            assert_eq!(nccl.ncclAllReduce(data, out, 1, F32, op, comm, stream), 0);
            assert_eq!(nccl.ncclRedOpDestroy(op, comm), 0);
            assert_eq!(nccl.ncclRedOpDestroy(op, comm), 4);
            assert_eq!(cuda.cuStreamSynchronize(stream), 0);
            assert_eq!(cuda.get(out, 1), [3.0]);
        }
    });
}

fn disagree(test: &str, call: fn(&Nccl, u64, usize, usize, usize) -> i32, named: &'static str) {
    Children::of(test).ranks(3).env("SMDDP_STANDIN_QUIET", "1").run(move |rank| {
        let (cuda, nccl, _, comm) = start(rank);
        let (stream, data) = (cuda.stream(), cuda.alloc(64));
        assert_eq!(call(nccl, data, comm, stream, rank.rank), 0);
        // Nothing hangs, and the context lives; the communicator does not.
        assert_eq!(cuda.cuStreamSynchronize(stream), 0);
        assert_eq!(async_error(nccl, comm), 5);
        let why = text(nccl.ncclGetLastError(comm));
        assert!(why.contains("disagree") && why.contains(named), "{why}");
        assert_eq!(nccl.ncclAllReduce(data, data, 1, F32, SUM, comm, stream), 5);
        assert_eq!(nccl.ncclCommAbort(comm), 0);
    });
}

#[test]
fn another_count_is_caught() {
    let call = |nccl: &Nccl, data, comm, stream, rank| {
        nccl.ncclAllReduce(data, data, if rank == 2 { 3 } else { 4 }, F32, SUM, comm, stream)
    };
    disagree("another_count_is_caught", call, "count: 3");
}

#[test]
fn another_type_is_caught() {
    let call = |nccl: &Nccl, data, comm, stream, rank| {
        nccl.ncclAllReduce(data, data, 4, if rank == 1 { 2 } else { F32 }, SUM, comm, stream)
    };
    disagree("another_type_is_caught", call, "dtype: 2");
}

#[test]
fn another_operation_is_caught() {
    let call = |nccl: &Nccl, data, comm, stream, rank| {
        nccl.ncclAllReduce(data, data, 4, F32, if rank == 1 { 2 } else { SUM }, comm, stream)
    };
    disagree("another_operation_is_caught", call, "op: 2");
}

#[test]
fn another_root_is_caught() {
    let call = |nccl: &Nccl, data, comm, stream, rank| {
        nccl.ncclBroadcast(data, data, 4, F32, if rank == 1 { 2 } else { 0 }, comm, stream)
    };
    disagree("another_root_is_caught", call, "root: 2");
}

#[test]
fn another_collective_is_caught() {
    let call = |nccl: &Nccl, data, comm, stream, rank| match rank {
        1 => nccl.ncclAllGather(data, data, 4, F32, comm, stream),
        _ => nccl.ncclAllReduce(data, data, 4, F32, SUM, comm, stream),
    };
    disagree("another_collective_is_caught", call, "AllGather");
}

#[test]
fn a_send_and_a_receive_of_other_lengths_are_caught() {
    let test = Children::of("a_send_and_a_receive_of_other_lengths_are_caught")
        .ranks(2)
        .env("SMDDP_STANDIN_QUIET", "1");
    test.run(|rank| {
        let (cuda, nccl, _, comm) = start(rank);
        let (stream, data) = (cuda.stream(), cuda.alloc(64));
        let code = match rank.rank {
            0 => nccl.ncclSend(data, 4, F32, 1, comm, stream),
            _ => nccl.ncclRecv(data, 5, F32, 0, comm, stream),
        };
        assert_eq!((code, cuda.cuStreamSynchronize(stream), async_error(nccl, comm)), (0, 0, 5));
        let why = text(nccl.ncclGetLastError(comm));
        assert!(why.contains("sends 4") && why.contains("wants 5"), "{why}");
    });
}

#[test]
fn abort_releases_whoever_waits() {
    Children::of("abort_releases_whoever_waits").ranks(3).env("SMDDP_STANDIN_QUIET", "1").run(|rank| {
        let (cuda, nccl, control, comm) = start(rank);
        let (stream, data) = (cuda.stream(), cuda.put(&[1.0]));
        if rank.rank == 2 {
            rank.receive("waits-0");
            rank.receive("waits-1");
            // Aborts without having called anything: the others hear that it left.
            assert_eq!(nccl.ncclCommAbort(comm), 0);
            return;
        }
        assert_eq!(nccl.ncclAllReduce(data, data, 1, F32, SUM, comm, stream), 0);
        until("the operation waits", || control.parked() == 1);
        rank.publish(&format!("waits-{}", rank.rank), b"");
        assert_eq!(cuda.cuStreamSynchronize(stream), 0);
        assert_eq!(async_error(nccl, comm), 6);
        assert!(text(nccl.ncclGetLastError(comm)).contains("rank 2 has left"));
        assert_eq!(nccl.ncclCommAbort(comm), 0);
        assert_eq!(nccl.ncclCommAbort(comm), 4);
    });
}

#[test]
fn with_peer_loss_hang_only_ones_own_abort_releases() {
    let test = Children::of("with_peer_loss_hang_only_ones_own_abort_releases")
        .ranks(2)
        .env("SMDDP_STANDIN_PEER_LOSS", "hang");
    test.run(|rank| {
        let (cuda, nccl, control, comm) = start(rank);
        let (stream, data) = (cuda.stream(), cuda.put(&[1.0]));
        if rank.rank == 1 {
            assert_eq!(nccl.ncclCommAbort(comm), 0);
            rank.publish("left", b"");
            return;
        }
        rank.receive("left");
        assert_eq!(nccl.ncclAllReduce(data, data, 1, F32, SUM, comm, stream), 0);
        until("the operation waits", || control.parked() == 1);
        assert_eq!((cuda.cuStreamQuery(stream), async_error(nccl, comm)), (600, 0));
        assert_eq!(nccl.ncclCommAbort(comm), 0);
        assert_eq!(cuda.cuStreamSynchronize(stream), 0);
    });
}

/// As with NCCL: abort waits for its streams, so values must be stored first.
#[test]
fn abort_waits_behind_a_parked_value() {
    Children::of("abort_waits_behind_a_parked_value").ranks(2).run(|rank| {
        let (cuda, nccl, control, comm) = start(rank);
        let (stream, flags, data) = (cuda.stream(), cuda.pinned(64), cuda.put(&[1.0]));
        assert_eq!(cuda.cuStreamWaitValue32_v2(stream, flags.device, 1, 0), 0);
        assert_eq!(nccl.ncclAllReduce(data, data, 1, F32, SUM, comm, stream), 0);
        until("the value is waited for", || control.parked() == 1);
        std::thread::scope(|scope| {
            let aborting = scope.spawn(|| nccl.ncclCommAbort(comm));
            until("abort is called", || control.calls("ncclCommAbort") == 1);
            std::thread::sleep(std::time::Duration::from_millis(30));
            assert!(!aborting.is_finished());
            flags.word(0).store(1, Ordering::Release);
            assert_eq!(aborting.join().unwrap(), 0);
        });
        assert_eq!(cuda.cuStreamSynchronize(stream), 0);
    });
}

#[test]
fn a_rank_that_dies_is_an_error_for_the_others() {
    let test = Children::of("a_rank_that_dies_is_an_error_for_the_others")
        .ranks(3)
        .dies(0)
        .env("SMDDP_STANDIN_QUIET", "1");
    test.run(|rank| {
        let (cuda, nccl, control, comm) = start(rank);
        let (stream, data) = (cuda.stream(), cuda.put(&[1.0]));
        if rank.rank == 0 {
            // It serves the communicator too: all go down with it.
            rank.receive("waits-1");
            rank.receive("waits-2");
            std::process::abort();
        }
        assert_eq!(nccl.ncclAllReduce(data, data, 1, F32, SUM, comm, stream), 0);
        until("the operation waits", || control.parked() == 1);
        rank.publish(&format!("waits-{}", rank.rank), b"");
        assert_eq!(cuda.cuStreamSynchronize(stream), 0);
        assert_eq!(async_error(nccl, comm), 6);
    });
}

#[test]
fn one_device_used_twice_is_refused() {
    Children::of("one_device_used_twice_is_refused").ranks(2).run(|rank| {
        let (_cuda, _) = cuda_on(3);
        let nccl = Nccl::load();
        let (code, comm) = try_comm(nccl, rank, "id");
        assert_eq!((code, comm), (5, 0));
        let why = text(nccl.ncclGetLastError(0));
        assert!(why.contains("Duplicate GPU detected") && why.contains("device 3"), "{why}");
    });
}

#[test]
fn one_device_may_be_shared_by_hosts_that_differ() {
    let test = Children::of("one_device_may_be_shared_by_hosts_that_differ").ranks(2);
    test.run(|rank| {
        // SAFETY: no other thread of this process looks at the environment yet.
        unsafe { std::env::set_var("NCCL_HOSTID", format!("host-{}", rank.rank)) };
        let (_cuda, _) = cuda_on(3);
        assert_eq!(try_comm(Nccl::load(), rank, "id").0, 0);
    });
}

#[test]
fn ranks_of_other_versions_are_refused() {
    Children::of("ranks_of_other_versions_are_refused").ranks(2).run(|rank| {
        // SAFETY: as above.
        unsafe { std::env::set_var("SMDDP_STANDIN_NCCL_VERSION", ["22809", "22005"][rank.rank]) };
        let (_cuda, _) = cuda_on(rank.rank as i32);
        let nccl = Nccl::load();
        let mut version = 0;
        assert_eq!((nccl.ncclGetVersion(&mut version), version), (0, [22809, 22005][rank.rank]));
        assert_eq!(try_comm(nccl, rank, "id").0, 5);
        assert!(text(nccl.ncclGetLastError(0)).contains("22005"));
    });
}

#[test]
fn ranks_may_be_threads_of_one_process() {
    Children::of("ranks_may_be_threads_of_one_process").run(|_| {
        let nccl = Nccl::load();
        let mut id = Id([0; 128]);
        assert_eq!(nccl.ncclGetUniqueId(&mut id), 0);
        std::thread::scope(|scope| {
            for rank in 0..3 {
                scope.spawn(move || {
                    let (cuda, _) = cuda_on(rank);
                    let (stream, mut comm) = (cuda.stream(), 0);
                    assert_eq!(nccl.ncclCommInitRank(&mut comm, 3, id, rank), 0);
                    let data = cuda.put(&[rank as f32]);
                    assert_eq!(nccl.ncclAllReduce(data, data, 1, F32, SUM, comm, stream), 0);
                    assert_eq!(cuda.cuStreamSynchronize(stream), 0);
                    assert_eq!(cuda.get(data, 1), [3.0]);
                    assert_eq!(nccl.ncclCommDestroy(comm), 0);
                });
            }
        });
    });
}

/// What one thread does for several devices goes in a group, or it waits for itself.
#[test]
fn one_thread_serves_several_devices_in_groups() {
    Children::of("one_thread_serves_several_devices_in_groups").run(|_| {
        let (nccl, mut id, mut comms) = (Nccl::load(), Id([0; 128]), [0; 2]);
        assert_eq!(nccl.ncclGetUniqueId(&mut id), 0);
        assert_eq!(nccl.ncclGroupStart(), 0);
        for (rank, comm) in comms.iter_mut().enumerate() {
            cuda_on(rank as i32);
            assert_eq!(nccl.ncclCommInitRank(comm, 2, id, rank as i32), 0);
        }
        assert_eq!(nccl.ncclGroupEnd(), 0);
        let ranks = [0, 1].map(|rank| {
            let (cuda, _) = cuda_on(rank);
            (rank, cuda, cuda.stream(), cuda.put(&[rank as f32 + 1.0]))
        });
        assert_eq!(nccl.ncclGroupStart(), 0);
        for (rank, _, stream, data) in ranks {
            assert_eq!(nccl.ncclAllReduce(data, data, 1, F32, SUM, comms[rank as usize], stream), 0);
        }
        assert_eq!(nccl.ncclGroupEnd(), 0);
        for (_, cuda, stream, data) in ranks {
            assert_eq!(cuda.cuStreamSynchronize(stream), 0);
            assert_eq!(cuda.get(data, 1), [3.0]);
        }
        assert_eq!(nccl.ncclGroupEnd(), 5);
    });
}

#[test]
fn a_failure_in_a_group_leaves_nothing_of_it() {
    let test = Children::of("a_failure_in_a_group_leaves_nothing_of_it")
        .ranks(2)
        .env("SMDDP_STANDIN_FAIL", "ncclAllGather:1:3");
    test.run(|rank| {
        let (cuda, nccl, control, comm) = start(rank);
        let (stream, data) = (cuda.stream(), cuda.put(&[1.0, 1.0]));
        let before = control.executed();
        assert_eq!(nccl.ncclGroupStart(), 0);
        assert_eq!(nccl.ncclAllReduce(data, data, 1, F32, SUM, comm, stream), 0);
        assert_eq!(nccl.ncclAllGather(data, data, 1, F32, comm, stream), 3);
        assert_eq!(nccl.ncclGroupEnd(), 3);
        assert_eq!((cuda.cuStreamSynchronize(stream), control.executed() - before), (0, 0));
        // And spoils nothing.
        assert_eq!(nccl.ncclAllReduce(data, data, 1, F32, SUM, comm, stream), 0);
        assert_eq!(cuda.cuStreamSynchronize(stream), 0);
        assert_eq!(cuda.get(data, 2), [2.0, 1.0]);
    });
}

#[test]
fn a_fault_of_a_launch_is_an_asynchronous_error() {
    let test = Children::of("a_fault_of_a_launch_is_an_asynchronous_error")
        .ranks(2)
        .env("SMDDP_STANDIN_FAIL", "nccl:2:1")
        .env("SMDDP_STANDIN_QUIET", "1");
    test.run(|rank| {
        let (cuda, nccl, _, comm) = start(rank);
        let (stream, data) = (cuda.stream(), cuda.put(&[1.0]));
        for expected in [0, 6] {
            assert_eq!(nccl.ncclAllReduce(data, data, 1, F32, SUM, comm, stream), 0);
            assert_eq!((cuda.cuStreamSynchronize(stream), async_error(nccl, comm)), (0, expected));
        }
    });
}

/// Collectives of one rank are copies, made when they are called, and the communicator knows nothing of them.
#[test]
fn collectives_of_one_rank_are_copies() {
    let test = Children::of("collectives_of_one_rank_are_copies").env("SMDDP_STANDIN_QUIET", "1");
    test.run(|rank| {
        let (cuda, nccl, control, comm) = start(rank);
        let (one, two) = (cuda.stream(), cuda.stream());
        let (flags, from, to) = (cuda.pinned(64), cuda.put(&[1.0, 2.0]), cuda.put(&[0.0, 0.0]));
        control.fail("nccl", 1, 1);
        // Neither is one stream ordered behind the other, nor does a group hold anything back.
        assert_eq!(cuda.cuStreamWaitValue32_v2(one, flags.device, 1, 0), 0);
        assert_eq!(nccl.ncclAllGather(from, to, 1, F32, comm, one), 0);
        assert_eq!(nccl.ncclGroupStart(), 0);
        assert_eq!(nccl.ncclReduceScatter(from + 4, to + 4, 1, F32, SUM, comm, two), 0);
        assert_eq!(cuda.cuStreamSynchronize(two), 0);
        assert_eq!(cuda.get(to, 2), [0.0, 2.0]);
        assert_eq!(nccl.ncclGroupEnd(), 0);
        // In place there is nothing to do.
        let done = control.executed();
        assert_eq!(nccl.ncclAllReduce(from, from, 2, F32, SUM, comm, two), 0);
        assert_eq!((cuda.cuStreamSynchronize(two), control.executed()), (0, done));
        flags.word(0).store(1, Ordering::Release);
        assert_eq!(cuda.cuStreamSynchronize(one), 0);
        assert_eq!((cuda.get(to, 2), control.calls("nccl")), (vec![1.0, 2.0], 0));
        assert_eq!((async_error(nccl, comm), nccl.ncclCommDestroy(comm)), (0, 0));
    });
}

/// What has failed is only aborted, and not by the thread whose destroy was refused.
#[test]
fn a_communicator_that_failed_is_not_destroyed() {
    let test = Children::of("a_communicator_that_failed_is_not_destroyed").env("SMDDP_STANDIN_QUIET", "1");
    test.run(|rank| {
        let (_, nccl, control, comm) = start(rank);
        assert_eq!((async_error(nccl, comm), control.leaks().communicators), (0, 1));
        control.fail("proxy", 1, 1);
        let refused = std::thread::spawn(move || (nccl.ncclCommDestroy(comm), nccl.ncclCommAbort(comm)));
        assert_eq!(refused.join().unwrap(), (6, 0));
        assert_eq!((async_error(nccl, comm), control.leaks().communicators), (6, 1));
        assert_eq!((nccl.ncclCommAbort(comm), control.leaks().communicators), (0, 0));
    });
}

#[test]
fn a_communicator_need_not_block_while_it_forms() {
    Children::of("a_communicator_need_not_block_while_it_forms").ranks(2).run(|rank| {
        let (cuda, _) = cuda_on(rank.rank as i32);
        let (nccl, mut comm) = (Nccl::load(), 0);
        let id = unique_id(nccl, rank, "id");
        let config = Config::blocking(0);
        let init =
            |comm: &mut Handle| nccl.ncclCommInitRankConfig(comm, 2, id, rank.rank as i32, &raw const config);
        let (stream, data) = (cuda.stream(), cuda.put(&[1.0]));
        if rank.rank == 0 {
            assert_eq!(init(&mut comm), 7);
            assert_eq!(async_error(nccl, comm), 7);
            assert_eq!(nccl.ncclAllReduce(data, data, 1, F32, SUM, comm, stream), 4);
            rank.publish("seen", b"");
        } else {
            rank.receive("seen");
            assert_eq!(init(&mut comm), 7);
        }
        until("all have joined", || async_error(nccl, comm) == 0);
        // Nor for its calls, alone or in a group.
        for (is_in_group, expected) in [(false, 2.0), (true, 4.0)] {
            let start = if is_in_group { nccl.ncclGroupStart() } else { 0 };
            let called = nccl.ncclAllReduce(data, data, 1, F32, SUM, comm, stream);
            let end = if is_in_group { nccl.ncclGroupEnd() } else { 0 };
            assert_eq!([start, called, end], if is_in_group { [0, 0, 7] } else { [0, 7, 0] });
            until("the call is queued", || async_error(nccl, comm) == 0);
            assert_eq!(cuda.cuStreamSynchronize(stream), 0);
            assert_eq!(cuda.get(data, 1), [expected]);
        }
        let wrong = Config { magic: 0, ..Config::blocking(1) };
        assert_eq!(nccl.ncclCommInitRankConfig(&mut comm, 2, id, 0, &raw const wrong), 4);
    });
}

#[test]
fn a_rank_that_never_joins_ends_by_the_limit() {
    let test = Children::of("a_rank_that_never_joins_ends_by_the_limit").env("SMDDP_STANDIN_HANG_S", "1");
    test.run(|rank| {
        let (_cuda, _) = cuda_on(0);
        let nccl = Nccl::load();
        let id = unique_id(nccl, rank, "id");
        let mut comm = 1;
        assert_eq!(nccl.ncclCommInitRank(&mut comm, 2, id, 0), 2);
        assert_eq!(comm, 0);
        assert!(text(nccl.ncclGetLastError(0)).contains("all ranks to join"));
    });
}

#[test]
fn wrong_arguments_are_named() {
    Children::of("wrong_arguments_are_named").run(|rank| {
        let (cuda, nccl, _, comm) = start(rank);
        let (stream, data, other) = (cuda.stream(), cuda.alloc(16), cuda.alloc(16));
        let last = || text(nccl.ncclGetLastError(comm));
        assert_eq!(nccl.ncclAllReduce(data, data, 4, F32, SUM, 0, stream), 4);
        assert!(last().contains("comm argument is NULL"), "{}", last());
        assert_eq!(nccl.ncclAllReduce(data, data, 5, F32, SUM, comm, stream), 4);
        assert!(last().contains("sendbuff"), "{}", last());
        assert_eq!(nccl.ncclAllReduce(data, 64, 4, F32, SUM, comm, stream), 4);
        assert!(last().contains("recvbuff"), "{}", last());
        assert_eq!(nccl.ncclAllReduce(data, other, 4, F32, SUM, comm, 0x99), 1);
        assert_eq!(nccl.ncclSend(data, 4, F32, 1, comm, stream), 4);
        assert!(last().contains("peer 1"), "{}", last());
        let mut handle = 0;
        assert_eq!(nccl.ncclCommRegister(comm, data, 16, &mut handle), 0);
        assert_eq!(nccl.ncclCommRegister(comm, data, 17, &mut handle), 4);
        assert_eq!([nccl.ncclCommDeregister(comm, handle), nccl.ncclCommDeregister(comm, handle)], [0, 4]);
        assert_eq!(
            text(nccl.ncclGetErrorString(4)),
            "invalid argument (run with NCCL_DEBUG=WARN for details)"
        );
        // Nothing was queued by all that.
        assert_eq!(nccl.ncclAllReduce(data, data, 4, F32, SUM, comm, stream), 0);
        assert_eq!((cuda.cuStreamSynchronize(stream), async_error(nccl, comm)), (0, 0));
        assert_eq!([nccl.ncclCommDestroy(comm), nccl.ncclCommDestroy(comm)], [0, 4]);
    });
}
