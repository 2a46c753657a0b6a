//! Calls on CUDA memory, over stand-ins for the driver and for NCCL: ranks are processes, nodes are named, the network
//! and shared memory are real. Nothing here is measured, and every wait has a limit.

#![allow(clippy::unwrap_used)]

mod direct;
mod failures;
mod graphs;
mod hierarchical;
mod job;
mod memory;
mod messages;
mod misuse;
mod queues;
mod reference;
mod streams;
mod watch;
mod ways;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use job::{Group, Job, children};
use smddp::cuda::DeviceCall;
use smddp::{Collective, DType, Error, ReduceOp};

/// Ranks on each node, and what carries their calls.
const SHAPES: [(&[usize], &str); 6] = [
    (&[1], "one rank"),
    (&[2], "one node"),
    (&[3], "one node"),
    (&[1, 1], "staged through the host"),
    (&[2, 1], "staged through the host"),
    (&[2, 2], "NCCL in a node, staged between nodes"),
];

/// Every collective, on enough elements for several pieces of a slot, twice with all that was enqueued still under way.
fn every_collective(test: &str, (nodes, how): (&[usize], &str), wanted: &str, more: &[(&str, &str)]) {
    children(test, nodes, more).run(|rank| {
        let job = Job::wanting(wanted, rank, nodes);
        let settings = [("SMDDP_CUDA_SLOT", "64K"), ("SMDDP_CUDA_SLOTS", "3"), ("SMDDP_CUDA", wanted)];
        let group = job.group("world", &settings);
        assert!(group.device.describe().contains(how), "{}", group.device.describe());
        let mut calls = Vec::new();
        for count in [1, 700, 9_001] {
            for collective in Collective::MOVING {
                for dtype in [DType::F32, DType::I64] {
                    let root = count % job.size();
                    calls.push(reference::Case::of(collective, dtype, count, root, &job));
                }
            }
            calls.push(reference::Case::uneven_gather(count, &job));
            // More chunks of several ranks' slots than there are slots.
            calls.push(reference::Case::of(Collective::AllReduce, DType::F32, 10 * count + 1, 0, &job));
            calls.push(reference::Case::uneven_exchange(count, &job));
        }
        let running: Vec<_> = calls.iter().map(|case| case.start(&job, &group)).collect();
        let waited = job.control.calls("cuStreamSynchronize") + job.control.calls("cuEventSynchronize");
        if how.contains("staged") && !group.device.describe().contains("host waits") {
            assert_eq!(waited, 0, "the host waited for the device");
        }
        job.synchronize();
        for (case, memory) in calls.iter().zip(running) {
            case.check(&job, &memory);
        }
        rank.barrier("over");
        group.end();
        job.end();
    });
}

/// Calls of NCCL's go on in threads of its own.
const DOES_NOT_BLOCK: (&str, &str) = ("NCCL_COMM_BLOCKING", "0");

macro_rules! on_shapes {
    ($($name:ident: $shape:literal, $more:expr;)*) => {
        $(#[test]
        fn $name() {
            every_collective(stringify!($name), SHAPES[$shape], "auto", $more);
        })*
    };
}

/// Operations of streams take their time, and what copies and NCCL write to is poison until they do.
const SLOW: &[(&str, &str)] = &[("SMDDP_STANDIN_DELAY_US", "200"), ("SMDDP_STANDIN_POISON", "start")];

on_shapes! {
    collectives_of_one_rank: 0, SLOW;
    collectives_of_one_rank_by_nccl: 1, SLOW;
    collectives_in_a_node_of_3: 2, &[("SMDDP_STANDIN_DELAY_US", "50")];
    collectives_of_2_nodes: 3, SLOW;
    collectives_of_uneven_nodes: 4, SLOW;
    collectives_of_2_nodes_of_2: 5, SLOW;
    collectives_where_streams_cannot_wait: 3, &[("SMDDP_STANDIN_WAIT_VALUE", "unsupported")];
    collectives_of_communicators_that_do_not_block: 2, &[DOES_NOT_BLOCK, SLOW[0]];
    collectives_of_2_nodes_of_2_whose_communicators_do_not_block: 5, &[DOES_NOT_BLOCK, SLOW[0]];
    collectives_with_few_connections: 5, &[("CUDA_DEVICE_MAX_CONNECTIONS", "1")];
    collectives_where_all_streams_share_a_queue: 3, &[("SMDDP_STANDIN_ONE_QUEUE", "1")];
    collectives_where_the_device_has_other_addresses: 3, &[("SMDDP_STANDIN_HOST_ALIAS", "1")];
}

const BY_NCCL_ALONE: &str = "NCCL in a node and between nodes";

#[test]
fn collectives_of_2_nodes_by_nccl_alone() {
    let shape: (&[usize], _) = (&[2, 2], BY_NCCL_ALONE);
    every_collective("collectives_of_2_nodes_by_nccl_alone", shape, "nccl", SLOW);
}

/// NCCL makes them copies, of which its communicator knows nothing.
#[test]
fn collectives_of_one_rank_by_nccl_alone() {
    every_collective("collectives_of_one_rank_by_nccl_alone", (&[1], "one node"), "nccl", SLOW);
}

#[test]
fn collectives_of_uneven_nodes_by_nccl_alone() {
    let shape: (&[usize], _) = (&[2, 1, 1], BY_NCCL_ALONE);
    every_collective("collectives_of_uneven_nodes_by_nccl_alone", shape, "nccl", SLOW);
}

/// Freeing waits for the device and keeps others from enqueuing meanwhile; the exchange goes on all the same.
#[test]
fn another_thread_frees_memory_meanwhile() {
    let more = [("SMDDP_STANDIN_FREE_LOCK", "1"), ("SMDDP_STANDIN_DELAY_US", "100")];
    children("another_thread_frees_memory_meanwhile", &[1, 1], &more).run(|rank| {
        let job = Job::start(rank, &[1, 1]);
        let group = job.group("world", &[("SMDDP_CUDA_SLOT", "64K"), ("SMDDP_CUDA_SLOTS", "2")]);
        let over = Arc::new(AtomicBool::new(false));
        let churn = {
            let (over, driver) = (Arc::clone(&over), Arc::clone(&job.driver));
            let context = job.context();
            std::thread::spawn(move || {
                job::enter(&driver, context);
                let mut frees = 0;
                while !over.load(Ordering::Acquire) {
                    job::free(&driver, job::allocate(&driver, 4096));
                    frees += 1;
                }
                frees
            })
        };
        for _ in 0..10 {
            let case = reference::Case::of(Collective::AllReduce, DType::F32, 40_000, 0, &job);
            case.run(&job, &group);
        }
        over.store(true, Ordering::Release);
        assert!(churn.join().unwrap() > 0);
        rank.barrier("over");
        group.end();
        job.end();
    });
}

/// While the first chunk is on its way between nodes, the node reduces as many of the next as there are slots, and no more.
#[test]
fn chunks_follow_one_another() {
    const SLOTS: usize = 3;
    // Half of a slot of 64 KiB, of each of two ranks.
    const SHARD: usize = 8192;
    let nodes = &[2, 2];
    children("chunks_follow_one_another", nodes, &[]).run(|rank| {
        let job = Job::start(rank, nodes);
        let group = job.group("world", &[("SMDDP_CUDA_SLOT", "64K"), ("SMDDP_CUDA_SLOTS", "3")]);
        let count = 2 * SHARD * (SLOTS + 2);
        let mine: Vec<u8> = (0..count).flat_map(|_| (rank.rank as f32 + 1.0).to_ne_bytes()).collect();
        let memory = job.memory(&mine);
        let call = DeviceCall {
            collective: Collective::AllReduce,
            dtype: DType::F32,
            op: ReduceOp::Sum,
            root: 0,
            count,
            input: memory,
            output: memory,
            counts: None,
            splits: None,
            timeout: None,
        };
        // SAFETY: freed only after the stream was waited for.
        let start = || unsafe { group.device.start(&call, job.stream_address(), None) }.map(|_| ()).unwrap();
        if rank.rank < 2 {
            start();
            let first_of = |chunk: usize| {
                let at = memory.address as usize + (chunk * 2 * SHARD + rank.rank * SHARD) * size_of::<f32>();
                // SAFETY: inside the memory, which the stand-in keeps in the host's.
                unsafe { std::ptr::with_exposed_provenance::<f32>(at).read_volatile() }
            };
            let until = Instant::now() + Duration::from_secs(20);
            while first_of(SLOTS - 1) != 3.0 && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(1));
            }
            let found: Vec<f32> = (0..SLOTS + 2).map(first_of).collect();
            let own = rank.rank as f32 + 1.0;
            assert_eq!(found, [3.0, 3.0, 3.0, own, own]);
            rank.barrier("seen");
        } else {
            rank.barrier("seen");
            start();
        }
        job.synchronize();
        let all: Vec<u8> = (0..count).flat_map(|_| 10f32.to_ne_bytes()).collect();
        assert!(job.read(memory) == all, "the sum is wrong on rank {}", rank.rank);
        job.free(memory);
        rank.barrier("over");
        group.end();
        job.end();
    });
}

#[test]
fn ranks_of_a_node_that_share_a_device_are_told() {
    children("ranks_of_a_node_that_share_a_device_are_told", &[2], &[]).run(|rank| {
        let job = Job::start_on(rank, &[2], 0);
        let refused = job.try_group("world", &[]).err().unwrap();
        assert!(matches!(refused, Error::Argument { argument: "device", .. }), "{refused}");
        let staged: Group = job.group("staged", &[("SMDDP_CUDA", "staged")]);
        let case = reference::Case::of(Collective::AllReduce, DType::F32, 1000, 0, &job);
        case.run(&job, &staged);
        rank.barrier("over");
        staged.end();
        job.end();
    });
}

#[test]
fn what_nccl_lacks_is_refused_and_harms_nobody() {
    children("what_nccl_lacks_is_refused_and_harms_nobody", &[2], &[]).run(|rank| {
        let job = Job::start(rank, &[2]);
        let group = job.group("world", &[]);
        let case = reference::Case::of(Collective::AllReduce, DType::I64, 100, 0, &job);
        let refused = case.with_op(ReduceOp::BitXor).try_start(&job, &group).err().unwrap();
        assert!(
            matches!(refused, Error::Unsupported { .. }) && refused.to_string().contains("NCCL"),
            "{refused}"
        );
        case.run(&job, &group);
        rank.barrier("over");
        group.end();
        job.end();
    });
}
