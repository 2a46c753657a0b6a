//! The stand-in for NCCL does what NCCL does, between processes, and fails as it does.

mod common;

use common::*;
use smddp_standin::{Children, Rank};

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
