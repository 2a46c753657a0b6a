//! Pinned memory: it stays as long as a device or an operation may use it, and no longer.

use crate::failures::told;
use crate::job::{Job, children};
use crate::reference::Case;

const NODES: &[usize] = &[1, 1];

/// Of a call with rows of different lengths, whose copy to the host is under way when the next step fails.
#[test]
fn memory_of_a_call_that_fails_midway_stays() {
    const STEPS: [&str; 4] =
        ["cuStreamWriteValue32_v2", "cuStreamWaitValue32_v2", "cuMemcpyHtoDAsync_v2", "cuEventRecord"];
    children("memory::memory_of_a_call_that_fails_midway_stays", NODES, &[]).run(|rank| {
        let job = Job::start(rank, NODES);
        for step in STEPS {
            let group = job.group(step, &[]);
            let case = Case::uneven_exchange(5000, &job);
            let placed = case.place(&job);
            let hold = job.hold();
            rank.barrier(&format!("{step}-before"));
            if rank.rank == 0 {
                // The first event is that of the stream's place, before there is any memory.
                job.control.fail(step, if step == "cuEventRecord" { 2 } else { 1 }, 1);
            }
            let outcome = case.launch(&group, &placed, job.stream_address(), None);
            assert!(rank.rank != 0 || outcome.is_err(), "{step} did not fail");
            hold.release();
            told(&job, &group);
            rank.barrier(&format!("{step}-told"));
            group.end();
            assert_eq!(job.control.lasting_error(), None, "{step}");
            case.free(&job, &placed);
        }
        rank.barrier("over");
    });
}
