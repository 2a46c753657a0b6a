//! Messages from device to device, by NCCL.

use std::time::{Duration, Instant};

use smddp::cuda::{DeviceMessage, Memory};
use smddp::{Collective, DType, Error, Result};

use crate::SLOW;
use crate::job::{Group, Job, children};
use crate::reference::Case;

/// Bytes that tell who sent them to whom, and when.
fn text(from: usize, to: usize, round: usize, len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + 31 * from + 57 * to + 101 * round) as u8).collect()
}

fn exchange(job: &Job, group: &Group, messages: &[DeviceMessage]) -> Result<()> {
    // SAFETY: the tests free memory after the stream was waited for, or never.
    unsafe { group.device.exchange(messages, None, job.stream_address(), None) }.map(|_| ())
}

fn sent(peer: usize, memory: Memory) -> DeviceMessage {
    DeviceMessage { peer, memory, is_sent: true }
}

fn received(peer: usize, memory: Memory) -> DeviceMessage {
    DeviceMessage { peer, memory, is_sent: false }
}

/// Every rank sends to every other and receives from it, at once and several times, among collectives.
fn all_pairs(test: &str, nodes: &[usize], wanted: &str) {
    children(test, nodes, SLOW).run(|rank| {
        let job = Job::wanting(wanted, rank, nodes);
        let group = job.group("world", &[("SMDDP_CUDA", wanted)]);
        assert!(group.device.carries_messages());
        let (me, size) = (rank.rank, job.size());
        let others = || (0..size).filter(|&peer| peer != me);
        let len = |from: usize, to: usize, round: usize| [0, 1, 5_000, 100_003][(from + 2 * to + round) % 4];
        let mut arrived = Vec::new();
        let sums: Vec<_> = (0..4)
            .map(|round| {
                let mut messages = Vec::new();
                for peer in others() {
                    messages.push(sent(peer, job.memory(&text(me, peer, round, len(me, peer, round)))));
                    let into = job.memory(&vec![0; len(peer, me, round)]);
                    messages.push(received(peer, into));
                    arrived.push((peer, round, into));
                }
                exchange(&job, &group, &messages).unwrap();
                let case = Case::of(Collective::AllReduce, DType::F32, 3000, 0, &job);
                let memory = case.start(&job, &group);
                (case, memory)
            })
            .collect();
        assert_eq!(job.control.calls("cuStreamSynchronize"), 0, "the host waited for the device");
        job.synchronize();
        for (peer, round, memory) in arrived {
            assert!(
                job.read(memory) == text(peer, me, round, len(peer, me, round)),
                "rank {peer}'s message of round {round} to rank {me}"
            );
        }
        for (case, memory) in sums {
            case.check(&job, &memory);
        }
        rank.barrier("over");
        group.end();
    });
}

#[test]
fn every_pair_of_a_node() {
    all_pairs("messages::every_pair_of_a_node", &[3], "auto");
}

#[test]
fn every_pair_over_nodes_by_nccl_alone() {
    all_pairs("messages::every_pair_over_nodes_by_nccl_alone", &[2, 1], "nccl");
}

/// NCCL takes both ends together, and matches those of several messages in their order.
#[test]
fn messages_to_oneself_move_with_the_others() {
    children("messages::messages_to_oneself_move_with_the_others", &[2], SLOW).run(|rank| {
        let job = Job::start(rank, &[2]);
        let group = job.group("world", &[]);
        let (me, peer) = (rank.rank, 1 - rank.rank);
        let fresh = |len: usize| job.memory(&vec![0; len]);
        let places = [fresh(300), fresh(5_000), fresh(700)];
        exchange(
            &job,
            &group,
            &[
                received(me, places[0]),
                sent(peer, job.memory(&text(me, peer, 0, 700))),
                sent(me, job.memory(&text(me, me, 0, 300))),
                sent(me, job.memory(&text(me, me, 1, 5_000))),
                received(peer, places[2]),
                received(me, places[1]),
            ],
        )
        .unwrap();
        job.synchronize();
        for (memory, (from, round, len)) in
            places.into_iter().zip([(me, 0, 300), (me, 1, 5_000), (peer, 0, 700)])
        {
            assert!(job.read(memory) == text(from, me, round, len), "{len} bytes of rank {from}");
        }
        let crossed = [sent(me, fresh(4)), received(me, fresh(8))];
        let error = exchange(&job, &group, &crossed).unwrap_err();
        assert!(error.to_string().contains("messages of [4] bytes to it and [8] from it"), "{error}");
        rank.barrier("over");
        group.end();
    });
}

/// One after the other, in the order of both sides.
#[test]
fn messages_of_one_pair_keep_their_order() {
    children("messages::messages_of_one_pair_keep_their_order", &[2], SLOW).run(|rank| {
        let job = Job::start(rank, &[2]);
        let group = job.group("world", &[]);
        let places: Vec<Memory> = (0..20)
            .map(|round| {
                let memory =
                    job.memory(&if rank.rank == 0 { text(0, 1, round, 4000) } else { vec![0; 4000] });
                let message = if rank.rank == 0 { sent(1, memory) } else { received(0, memory) };
                exchange(&job, &group, &[message]).unwrap();
                memory
            })
            .collect();
        for (round, memory) in places.into_iter().enumerate() {
            assert!(job.read(memory) == text(0, 1, round, 4000), "message {round}");
            job.free(memory);
        }
        rank.barrier("over");
        group.end();
        job.end();
    });
}

#[test]
fn what_is_no_message_is_refused_and_harms_nobody() {
    children("messages::what_is_no_message_is_refused_and_harms_nobody", &[2], &[]).run(|rank| {
        let job = Job::start(rank, &[2]);
        let group = job.group("world", &[]);
        let memory = job.memory(&[0; 100]);
        let refused = |message| exchange(&job, &group, &[message]).unwrap_err();
        let error = refused(sent(2, memory));
        assert!(matches!(error, Error::Argument { argument: "dst", .. }), "{error}");
        for alone in [received(rank.rank, memory), sent(rank.rank, memory)] {
            let error = refused(alone);
            assert!(matches!(error, Error::Argument { argument: "peer", .. }), "{error}");
            assert!(error.to_string().contains("batch_isend_irecv"), "{error}");
        }
        let staged = job.group("staged", &[("SMDDP_CUDA", "staged")]);
        assert!(!staged.device.carries_messages());
        assert!(exchange(&job, &staged, &[sent(1 - rank.rank, memory)]).is_err());
        let case = Case::of(Collective::AllReduce, DType::F32, 1000, 0, &job);
        for group in [&group, &staged] {
            let memory = case.start(&job, group);
            job.synchronize();
            case.check(&job, &memory);
        }
        job.free(memory);
        rank.barrier("over");
        group.end();
        staged.end();
        job.end();
    });
}

/// A message that nobody receives holds its stream until the group's time limit.
#[test]
fn a_message_that_is_not_met_ends_at_the_limit() {
    children("messages::a_message_that_is_not_met_ends_at_the_limit", &[2], &[]).run(|rank| {
        let job = Job::start(rank, &[2]);
        let group = job.group("world", &[]);
        if rank.rank == 0 {
            group.device.set_timeout(Duration::from_secs(1));
            let memory = job.memory(&[1; 100]);
            exchange(&job, &group, &[sent(1, memory)]).unwrap();
            assert!(job.comes_to_rest(), "the stream still waits");
        }
        rank.barrier("too late");
        let until = Instant::now() + Duration::from_secs(20);
        while group.device.failure().is_none() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        let error = group.device.failure().unwrap();
        assert!(error.to_string().contains(Collective::SendRecv.name()), "{error}");
        rank.barrier("over");
    });
}
