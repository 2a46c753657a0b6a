//! How things end: libraries closed under their threads, ranks that die, contexts that break.

#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use smddp_standin::{Children, paths};

fn is_mapped(file: &str) -> bool {
    std::fs::read_to_string("/proc/self/maps").unwrap().contains(file)
}

#[test]
fn closing_a_library_leaves_it_to_its_threads() {
    Children::of("closing_a_library_leaves_it_to_its_threads").run(|_| {
        for (path, file) in
            [(&paths().cuda, "libsmddp_standin_cuda.so"), (&paths().nccl, "libsmddp_standin_nccl.so")]
        {
            assert!(!is_mapped(file));
            // SAFETY: the stand-ins may be loaded any time.
            let library = unsafe { libloading::Library::new(path) }.unwrap();
            library.close().unwrap();
            assert!(is_mapped(file), "{file}");
        }
    });
}

/// Rank 0 made the unique id, so its process serves the communicator.
#[test]
fn operations_wait_for_a_dead_rank_until_aborted_even_for_the_one_that_served() {
    Children::of("operations_wait_for_a_dead_rank_until_aborted_even_for_the_one_that_served")
        .ranks(2)
        .dies(0)
        .env("SMDDP_STANDIN_PEER_LOSS", "hang")
        .env("SMDDP_STANDIN_HANG_S", "600")
        .run(|rank| {
            let (cuda, control) = cuda_on(rank.rank as i32);
            let nccl = Nccl::load();
            let before = comm(nccl, rank);
            let (code, after) = try_comm(nccl, rank, "another id");
            assert_eq!(code, 0);
            if rank.rank == 0 {
                rank.publish("process", std::process::id().to_string().as_bytes());
                rank.receive("waits");
                std::process::abort();
            }
            let (one, two, data) = (cuda.stream(), cuda.stream(), cuda.put(&[1.0]));
            assert_eq!(nccl.ncclAllReduce(data, data, 1, F32, SUM, before, one), 0);
            until("it waits", || control.parked() == 1);
            let process = String::from_utf8(rank.receive("process")).unwrap();
            rank.publish("waits", b"");
            until("rank 0 is gone", || !std::path::Path::new("/proc").join(&process).exists());
            // The connection is closed already when this one starts.
            assert_eq!(nccl.ncclAllReduce(data, data, 1, F32, SUM, after, two), 0);
            until("both wait", || control.parked() == 2);
            // To notice the loss takes no time; long enough for one that would.
            std::thread::sleep(std::time::Duration::from_millis(300));
            assert_eq!(control.parked(), 2);
            assert_eq!((async_error(nccl, before), async_error(nccl, after)), (0, 0));
            assert_eq!((nccl.ncclCommAbort(before), nccl.ncclCommAbort(after)), (0, 0));
            assert_eq!((cuda.cuStreamSynchronize(one), cuda.cuStreamSynchronize(two)), (0, 0));
        });
}

#[test]
fn a_broken_context_ends_operations_that_wait_for_peers() {
    Children::of("a_broken_context_ends_operations_that_wait_for_peers")
        .ranks(2)
        .env("SMDDP_STANDIN_HANG_S", "600")
        .env("SMDDP_STANDIN_QUIET", "1")
        .run(|rank| {
            let (cuda, control) = cuda_on(rank.rank as i32);
            let nccl = Nccl::load();
            let comm = comm(nccl, rank);
            if rank.rank == 0 {
                let (waits, fails, data) = (cuda.stream(), cuda.stream(), cuda.put(&[1.0]));
                assert_eq!(nccl.ncclAllReduce(data, data, 1, F32, SUM, comm, waits), 0);
                until("it waits for rank 1", || control.parked() == 1);
                control.fail("stream", 1, 700);
                assert_eq!(cuda.cuMemsetD8Async(data, 0, 4, fails), 0);
                assert_eq!(cuda.cuStreamSynchronize(fails), 700);
                until("it no longer waits", || control.parked() == 0);
                until("the communicator tells", || async_error(nccl, comm) == 1);
                rank.publish("over", b"");
            } else {
                rank.receive("over");
            }
            assert_eq!(nccl.ncclCommAbort(comm), 0);
        });
}
