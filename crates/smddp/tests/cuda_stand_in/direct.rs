//! GPUDirect: messages between nodes from and to device memory, over a libfabric that reaches the stand-in's devices.

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use smddp::{Collective, DType, Result, library_dirs};

use crate::failures::{abort_while_one_waits, sum};
use crate::hierarchical::{CARRIED, HALF, SLOW, run_all};
use crate::job::{Group, Job, children};
use crate::reference::Case;
use smddp_standin::{Children, paths, registered_bytes};

const EAGER: usize = 1024;

fn with(test: &str, nodes: &[usize], gpudirect: &str) -> Children {
    let dirs = std::env::join_paths(library_dirs(&[])).unwrap();
    children(test, nodes, &SLOW)
        .env("SMDDP_STANDIN_GPUDIRECT", gpudirect)
        .env("SMDDP_STANDIN_LIBRARY_DIRS", dirs.to_str().unwrap())
}

fn group(job: &Job) -> Group {
    try_group(job, &[("SMDDP_GPUDIRECT", "on")]).unwrap()
}

fn try_group(job: &Job, more: &[(&str, &str)]) -> Result<Group> {
    job.try_group("world", &[&usual()[..], more].concat())
}

fn usual() -> [(&'static str, &'static str); 4] {
    let fabric = paths().fabric.to_str().unwrap();
    [
        ("SMDDP_LIBFABRIC", fabric),
        ("SMDDP_EAGER", "1K"),
        ("SMDDP_CUDA_SLOT", "64K"),
        ("SMDDP_CUDA_SLOTS", "3"),
    ]
}

/// Every collective, in sizes around the shortest message and around a slot, all under way at once.
fn every_collective(test: &str, nodes: &[usize], gpudirect: &str, ways: &str) {
    every_collective_of(with(test, nodes, gpudirect), nodes, gpudirect, ways);
}

fn every_collective_of(ranks: Children, nodes: &[usize], gpudirect: &str, ways: &str) {
    ranks.run(|rank| {
        let job = Job::start(rank, nodes);
        let settings = [("SMDDP_GPUDIRECT", "on"), ("SMDDP_CUDA_ALGORITHM", ways)];
        let group = try_group(&job, &settings).unwrap();
        let told = group.device.describe();
        assert!(told.contains(&format!("GPUDirect for messages of {} bytes", EAGER + 1)), "{told}");
        let ranks = nodes.len();
        let edge = ranks * (EAGER / 4);
        let mut calls = Vec::new();
        for count in [1, EAGER / 4, edge, edge + ranks, 5_000, HALF / ranks + 1, 4 * HALF + 3] {
            for collective in Collective::MOVING {
                for dtype in [DType::F32, DType::I64] {
                    calls.push(Case::of(collective, dtype, count, count % job.size(), &job));
                }
            }
        }
        run_all(&job, &group, &calls);
        assert_eq!(job.control.calls("flush") > 0, gpudirect == "flush");
        rank.barrier("over");
        group.end();
        job.end();
    });
}

#[test]
fn collectives_of_2_nodes() {
    every_collective("direct::collectives_of_2_nodes", &[1, 1], "ordered", "");
}

#[test]
fn collectives_of_3_nodes_whose_streams_flush() {
    every_collective("direct::collectives_of_3_nodes_whose_streams_flush", &[1, 1, 1], "flush", "");
}

#[test]
fn collectives_of_2_nodes_of_2() {
    every_collective("direct::collectives_of_2_nodes_of_2", &[2, 2], "flush", "");
}

/// Ranks that share a node go through the host, in a group whose rails need not.
#[test]
fn collectives_some_of_which_are_staged() {
    let ways = "all_reduce=staged, all_gather=staged";
    every_collective("direct::collectives_some_of_which_are_staged", &[2, 2], "ordered", ways);
}

/// NICs that want all they touch registered, as EFA's do: the pinned slots are, so that nothing is copied once more.
#[test]
fn pinned_slots_are_registered_where_nics_want_it() {
    let nodes = &[1, 1];
    let test = "direct::pinned_slots_are_registered_where_nics_want_it";
    with(test, nodes, "off").env("SMDDP_STANDIN_MR_LOCAL", "1").run(|rank| {
        let job = Job::start(rank, nodes);
        let before = registered_bytes();
        let host = job.host("host", &usual());
        let by_host = registered_bytes() - before;
        assert!(by_host > 0, "the engine's staging is registered");
        let group = try_group(&job, &[]).unwrap();
        let slots = 3 * (64 << 10);
        assert_eq!(registered_bytes() - before - by_host, slots);
        run_all(&job, &group, &[sum(&job, 4 * HALF)]);
        rank.barrier("over");
        group.end();
        host.shutdown();
        job.end();
    });
}

#[test]
fn collectives_where_nics_want_all_registered() {
    let test = "direct::collectives_where_nics_want_all_registered";
    every_collective_of(
        with(test, &[1, 1], "ordered").env("SMDDP_STANDIN_MR_LOCAL", "1"),
        &[1, 1],
        "ordered",
        "",
    );
}

/// What is only moved is never copied to the host, and of what is summed a rank's own share alone.
#[test]
fn only_what_is_summed_passes_the_host() {
    let nodes = &[1, 1];
    with("direct::only_what_is_summed_passes_the_host", nodes, "ordered").run(|rank| {
        let job = Job::start(rank, nodes);
        let group = group(&job);
        let copies = || job.control.calls("cuMemcpyDtoHAsync_v2");
        for collective in CARRIED {
            for (count, is_direct) in [(HALF / 2, true), (EAGER / 4, false)] {
                run_all(&job, &group, &[Case::of(collective, DType::F32, count, 0, &job)]);
                let again = Case::of(collective, DType::F32, count, 0, &job);
                let before = copies();
                let memory = again.start(&job, &group);
                let copied = copies() - before;
                let sums = matches!(collective, Collective::AllReduce | Collective::ReduceScatter);
                let wanted = match (is_direct, collective) {
                    (true, _) => u64::from(sums),
                    (false, Collective::Broadcast) => u64::from(job.rank() == 0),
                    (false, _) => 1,
                };
                assert_eq!(copied, wanted, "{collective} of {count}");
                job.synchronize();
                again.check(&job, &memory);
            }
        }
        rank.barrier("over");
        group.end();
        job.end();
    });
}

/// Everything goes through the host then, and the description does not claim otherwise.
fn goes_through_the_host(job: &Job, more: &[(&str, &str)]) {
    let group = try_group(job, &[&[("SMDDP_GPUDIRECT", "on")], more].concat()).unwrap();
    assert!(!group.device.describe().contains("GPUDirect"), "{}", group.device.describe());
    run_all(job, &group, &[sum(job, 4 * HALF)]);
    group.end();
}

#[test]
fn what_devices_have_not_is_not_used() {
    let nodes = &[1, 1];
    with("direct::what_devices_have_not_is_not_used", nodes, "off").run(|rank| {
        let job = Job::start(rank, nodes);
        goes_through_the_host(&job, &[]);
        rank.barrier("over");
        job.end();
    });
}

/// Where host and device share page tables they have a link beside PCIe: words may overtake what NICs write.
#[test]
fn devices_with_a_link_of_their_own_to_the_host_do_not_use_it() {
    let nodes = &[1, 1];
    let test = "direct::devices_with_a_link_of_their_own_to_the_host_do_not_use_it";
    with(test, nodes, "coherent").run(|rank| {
        let job = Job::start(rank, nodes);
        goes_through_the_host(&job, &[]);
        rank.barrier("over");
        job.end();
    });
}

/// The machine's own libfabric, over tcp.
#[test]
fn what_the_provider_has_not_is_not_used() {
    let nodes = &[1, 1];
    with("direct::what_the_provider_has_not_is_not_used", nodes, "ordered").run(|rank| {
        let job = Job::start(rank, nodes);
        goes_through_the_host(&job, &[("SMDDP_LIBFABRIC", "")]);
        rank.barrier("over");
        job.end();
    });
}

/// What the log was given.
#[derive(Clone, Default)]
struct Said(Arc<Mutex<Vec<u8>>>);

impl Write for Said {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Its calls could wait for the very stream that waits for the message. The stand-in ends a rank that registers memory then.
#[test]
fn a_provider_that_makes_cuda_calls_is_not_used() {
    let nodes = &[1, 1];
    let test = "direct::a_provider_that_makes_cuda_calls_is_not_used";
    with(test, nodes, "ordered").env("SMDDP_STANDIN_CUDA_CALLS", "1").run(|rank| {
        let said = Said::default();
        let log = said.clone();
        tracing_subscriber::fmt().with_ansi(false).with_writer(move || log.clone()).init();
        let job = Job::start(rank, nodes);
        goes_through_the_host(&job, &[]);
        let said = String::from_utf8(said.0.lock().unwrap().clone()).unwrap();
        assert!(said.contains("WARN") && said.contains("SMDDP_GPUDIRECT=on has no effect"), "{said}");
        rank.barrier("over");
        job.end();
    });
}

#[test]
fn what_one_rank_has_not_none_uses() {
    let nodes = &[1, 1, 1];
    with("direct::what_one_rank_has_not_none_uses", nodes, "ordered").run(|rank| {
        const INVALID: i32 = 1;
        let job = Job::start(rank, nodes);
        if rank.rank == 1 {
            job.control.fail("cuDeviceGetAttribute", 1, INVALID);
        }
        goes_through_the_host(&job, &[]);
        rank.barrier("over");
        job.end();
    });
}

#[test]
fn ranks_whose_settings_differ_are_told() {
    let nodes = &[1, 1];
    with("direct::ranks_whose_settings_differ_are_told", nodes, "ordered").run(|rank| {
        let job = Job::start(rank, nodes);
        let wanted = if rank.rank == 0 { "on" } else { "off" };
        let error = try_group(&job, &[("SMDDP_GPUDIRECT", wanted)]).map(|_| ()).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("SMDDP_GPUDIRECT") && text.contains(&format!("rank {}", 1 - rank.rank)),
            "{text}"
        );
        rank.barrier("over");
    });
}

/// Registering asks the driver, which answers when the device is idle: not before a call of the other group is over.
#[test]
fn a_group_is_made_while_a_call_of_another_is_under_way() {
    let nodes = &[1, 1];
    let test = "direct::a_group_is_made_while_a_call_of_another_is_under_way";
    with(test, nodes, "ordered").env("SMDDP_STANDIN_FREE_LOCK", "1").run(|rank| {
        let job = Job::start(rank, nodes);
        let first = job.group("first", &[&usual()[..], &[("SMDDP_GPUDIRECT", "on")]].concat());
        let case = sum(&job, 4 * HALF);
        let placed = case.place(&job);
        let spare = crate::job::allocate(&job.driver, 4096);
        job.synchronize();
        rank.barrier("made");
        let (control, driver, context, stream) =
            (&job.control, &job.driver, job.context(), job.stream_address());
        let call = || case.launch(&first, &placed, stream, None).unwrap();
        if rank.rank == 0 {
            call();
            assert!(job.comes_to_wait(), "nothing waits for the rank that has not come");
        }
        let second = std::thread::scope(|scope| {
            scope.spawn(|| {
                crate::job::enter(driver, context);
                if rank.rank == 0 {
                    crate::job::free(driver, spare);
                } else {
                    std::thread::sleep(Duration::from_secs(2));
                    call();
                }
            });
            while rank.rank == 0 && control.calls("free") == 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
            group(&job)
        });
        case.check(&job, &placed);
        assert!(second.device.describe().contains("GPUDirect"), "{}", second.device.describe());
        run_all(&job, &second, &[sum(&job, 4 * HALF)]);
        rank.barrier("over");
        second.end();
        first.end();
    });
}

/// A stream that waits for a message into device memory is released.
#[test]
fn an_abort_releases_the_stream() {
    let nodes = &[1, 1];
    with("direct::an_abort_releases_the_stream", nodes, "ordered").run(|rank| {
        let job = Job::start(rank, nodes);
        let group = group(&job);
        abort_while_one_waits(rank, &job, &group);
        rank.barrier("over");
    });
}
