//! What is ordered behind what, and what a call leaves as it found it.

use smddp::{Collective, DType, ReduceOp};

use crate::job::{Job, children};
use crate::reference::Case;

/// The parts of two calls in the node go through device memory of one slot: the second waits until the first's is sent.
#[test]
fn calls_on_two_streams_keep_off_each_others_slots() {
    let nodes = &[2, 2];
    let slow = [("SMDDP_STANDIN_POISON", "start"), ("SMDDP_STANDIN_COPY_US", "20000")];
    children("streams::calls_on_two_streams_keep_off_each_others_slots", nodes, &slow).run(|rank| {
        let job = Job::start(rank, nodes);
        let group = job.group("world", &[("SMDDP_CUDA_SLOT", "64K"), ("SMDDP_CUDA_SLOTS", "2")]);
        // Two chunks each: half of a slot holds 4096 columns of a row for each node.
        let first = Case::of(Collective::ReduceScatter, DType::F32, 8192, 0, &job);
        let second = Case::reducing(Collective::ReduceScatter, DType::F32, ReduceOp::Sum, 8192, &job);
        let (one, two) = (first.place(&job), second.place(&job));
        job.synchronize();
        let other = job.new_stream();
        first.launch(&group, &one, job.stream_address(), None).unwrap();
        second.launch(&group, &two, other.addr() as u64, None).unwrap();
        job.synchronize_stream(other);
        first.check(&job, &one);
        second.check(&job, &two);
        job.end_stream(other);
        rank.barrier("over");
        group.end();
        job.end();
    });
}
