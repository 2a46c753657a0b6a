//! Calls by NCCL inside nodes and pinned slots between them.

use smddp::{Collective, DType, ReduceOp};

use crate::job::{Group, Job, children};
use crate::reference::Case;

pub const CARRIED: [Collective; 4] =
    [Collective::AllReduce, Collective::ReduceScatter, Collective::AllGather, Collective::Broadcast];

/// Slots of 64 KiB: half of one holds 8192 elements of 4 bytes.
const SLOTS: [(&str, &str); 2] = [("SMDDP_CUDA_SLOT", "64K"), ("SMDDP_CUDA_SLOTS", "3")];
pub const HALF: usize = 8192;

pub const SLOW: [(&str, &str); 2] = [("SMDDP_STANDIN_DELAY_US", "200"), ("SMDDP_STANDIN_POISON", "start")];

/// From nothing to more chunks than there are slots, whole ones and not.
fn sizes(nodes: usize) -> [usize; 7] {
    [0, 1, 2, 777, HALF / nodes, HALF / nodes + 1, 4 * HALF + 3]
}

fn calls(job: &Job, nodes: usize) -> Vec<Case> {
    let mut calls = Vec::new();
    for count in sizes(nodes) {
        for collective in CARRIED {
            let root = count % job.size();
            calls.push(Case::of(collective, DType::F32, count, root, job));
        }
    }
    calls
}

/// All under way at once, then all checked.
pub fn run_all(job: &Job, group: &Group, calls: &[Case]) {
    let running: Vec<_> = calls.iter().map(|case| case.start(job, group)).collect();
    job.synchronize();
    for (case, memory) in calls.iter().zip(running) {
        case.check(job, &memory);
    }
}

#[test]
fn every_size_over_3_nodes_of_2() {
    let nodes = &[2, 2, 2];
    children("hierarchical::every_size_over_3_nodes_of_2", nodes, &SLOW).run(|rank| {
        let job = Job::start(rank, nodes);
        let group = job.group("world", &SLOTS);
        run_all(&job, &group, &calls(&job, 3));
        rank.barrier("over");
        group.end();
        job.end();
    });
}

#[test]
fn every_size_over_2_nodes_whose_ranks_alternate() {
    let nodes = &[2, 2];
    children("hierarchical::every_size_over_2_nodes_whose_ranks_alternate", nodes, &SLOW).run(|rank| {
        let job = Job::interleaved(rank, nodes);
        let group = job.group("world", &SLOTS);
        run_all(&job, &group, &calls(&job, 2));
        rank.barrier("over");
        group.end();
        job.end();
    });
}

/// What NCCL lacks goes another way, with the same results.
#[test]
fn every_reduction_of_every_type() {
    let nodes = &[2, 2];
    children("hierarchical::every_reduction_of_every_type", nodes, &[]).run(|rank| {
        let job = Job::start(rank, nodes);
        let group = job.group("world", &SLOTS);
        let mut calls = Vec::new();
        for dtype in DType::ALL {
            for op in ReduceOp::ALL.into_iter().filter(|op| op.supports(dtype)) {
                for collective in [Collective::AllReduce, Collective::ReduceScatter] {
                    calls.push(Case::reducing(collective, dtype, op, 1001, &job));
                }
            }
        }
        run_all(&job, &group, &calls);
        rank.barrier("over");
        group.end();
        job.end();
    });
}

/// What passes pinned memory, and so the network, is a share: the rows of this rank's rail, and no more.
#[test]
fn a_rank_stages_its_share_only() {
    let nodes = &[2, 2];
    children("hierarchical::a_rank_stages_its_share_only", nodes, &[]).run(|rank| {
        let job = Job::start(rank, nodes);
        let group = job.group("world", &SLOTS);
        // Rows that do not follow one another are one copy all the same.
        let calls = |name: &str| job.control.calls(name);
        let copies =
            || (calls("cuMemcpyDtoHAsync_v2"), calls("cuMemcpyHtoDAsync_v2") + calls("cuMemcpy2DAsync_v2"));
        let chunks = 5;
        let root_node = usize::from(rank.rank >= 2) == 0;
        // Copies to the host and to the device by each chunk, and elements a chunk of a row has.
        let expected = [
            (Collective::AllReduce, 2 * HALF, (1, 1), ("ncclReduceScatter", "ncclAllGather")),
            (Collective::ReduceScatter, HALF / 2, (1, 1), ("ncclReduce", "")),
            (Collective::AllGather, HALF / 2, (1, 1), ("", "ncclBroadcast")),
            (
                Collective::Broadcast,
                2 * HALF,
                if root_node { (1, 0) } else { (0, 1) },
                if root_node { ("ncclBroadcast", "") } else { ("", "ncclAllGather") },
            ),
        ];
        for (collective, elements, (down, up), (before, after)) in expected {
            let case = Case::of(collective, DType::F32, chunks * elements, 0, &job);
            let counts = |name: &str| if name.is_empty() { 0 } else { job.control.calls(name) };
            let (at_first, nccl) = (copies(), counts(before) + counts(after));
            let memory = case.start(&job, &group);
            let now = copies();
            // The case copies its own input there.
            let own = if matches!(collective, Collective::AllReduce | Collective::Broadcast) { 1 } else { 2 };
            let (came, went) = (now.0 - at_first.0, now.1 - at_first.1 - own);
            assert_eq!((came, went), (chunks as u64 * down, chunks as u64 * up), "{collective}");
            let of_a_chunk = match collective {
                Collective::AllReduce => 2,
                // Of each rank's row.
                Collective::ReduceScatter | Collective::AllGather => 4,
                _ => 1,
            };
            assert_eq!(counts(before) + counts(after) - nccl, chunks as u64 * of_a_chunk, "{collective}");
            job.synchronize();
            case.check(&job, &memory);
        }
        // Rows that one chunk holds are one collective of NCCL for each node.
        for (collective, name) in
            [(Collective::ReduceScatter, "ncclReduceScatter"), (Collective::AllGather, "ncclAllGather")]
        {
            let case = Case::of(collective, DType::F32, 100, 0, &job);
            let first = job.control.calls(name);
            let memory = case.start(&job, &group);
            assert_eq!(job.control.calls(name) - first, 2, "{collective}");
            job.synchronize();
            case.check(&job, &memory);
        }
        rank.barrier("over");
        group.end();
        job.end();
    });
}
