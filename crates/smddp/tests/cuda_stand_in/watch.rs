//! Calls that NCCL carries have an end, well or not, and tell which.

use std::time::{Duration, Instant};

use smddp::{Collective, Communicator, DType, Error};

use crate::failures::{sum, told};
use crate::job::{Job, children};
use crate::reference::{Case, Placed};
use crate::{DOES_NOT_BLOCK, SLOW};

/// Kernels that wait for a rank which left wait until they are aborted, and the stand-in gives nothing up by itself.
pub const FOR_EVER: [(&str, &str); 2] =
    [("SMDDP_STANDIN_PEER_LOSS", "hang"), ("SMDDP_STANDIN_HANG_S", "600")];
/// Ranks connect at the first call, which blocks their hosts.
const LAZY: (&str, &str) = ("SMDDP_STANDIN_CONNECT", "call");
const NO_WORDS: (&str, &str) = ("SMDDP_STANDIN_WAIT_VALUE", "unsupported");
const LIMIT: Duration = Duration::from_secs(1);

pub fn until(what: impl Fn() -> bool) -> bool {
    let until = Instant::now() + Duration::from_secs(20);
    while !what() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(2));
    }
    what()
}

#[test]
fn ranks_that_connect_at_the_first_call_get_its_result() {
    let more = [LAZY, SLOW[0], SLOW[1]];
    children("watch::ranks_that_connect_at_the_first_call_get_its_result", &[3], &more).run(|rank| {
        let job = Job::start(rank, &[3]);
        let group = job.group("world", &[]);
        for count in [1, 5000] {
            let case = sum(&job, count);
            case.run(&job, &group);
        }
        rank.barrier("over");
        group.end();
        job.end();
    });
}

/// The host is given back, not only the stream; where NCCL lets it, before the communicator ends.
fn a_first_call_ends_at_its_limit(test: &str, blocks: bool) {
    let how = if blocks { ("SMDDP_STANDIN_QUIET", "0") } else { DOES_NOT_BLOCK };
    let more = [LAZY, FOR_EVER[0], FOR_EVER[1], how];
    children(test, &[2], &more).run(|rank| {
        let job = Job::start(rank, &[2]);
        let group = job.group("world", &[]);
        if rank.rank == 0 {
            group.device.set_timeout(LIMIT);
            let error = sum(&job, 1000).try_start(&job, &group).err().unwrap();
            assert!(matches!(error, Error::Timeout { .. }), "{error}");
            assert!(
                error.to_string().contains("rank 0 of group 'world', operation all_reduce #0"),
                "{error}"
            );
            assert!(job.comes_to_rest(), "the stream still waits");
            assert_eq!(job.control.calls("abort inside a call"), u64::from(blocks));
        }
        rank.barrier("too late");
        let error = told(&job, &group);
        assert!(error.to_string().contains("all_reduce"), "{error}");
        rank.barrier("over");
    });
}

#[test]
fn a_first_call_that_blocks_its_host_ends_at_its_limit() {
    a_first_call_ends_at_its_limit("watch::a_first_call_that_blocks_its_host_ends_at_its_limit", true);
}

#[test]
fn a_first_call_that_does_not_block_ends_at_its_limit() {
    a_first_call_ends_at_its_limit("watch::a_first_call_that_does_not_block_ends_at_its_limit", false);
}

/// Freeing waits for the call's kernel and holds the driver's lock, which asking for an event needs.
#[test]
fn a_call_ends_at_its_limit_while_another_thread_frees_memory() {
    let more = [("SMDDP_STANDIN_FREE_LOCK", "1"), FOR_EVER[0], FOR_EVER[1]];
    let test = "watch::a_call_ends_at_its_limit_while_another_thread_frees_memory";
    children(test, &[2], &more).run(|rank| {
        let job = Job::start(rank, &[2]);
        let group = job.group("world", &[]);
        rank.barrier("made");
        if rank.rank == 0 {
            group.device.set_timeout(LIMIT);
            let (_, started) = sum(&job, 1000).begin(&job, &group).unwrap();
            assert!(job.comes_to_wait(), "nothing waits for the rank that has not come");
            let (control, driver, context) = (&job.control, &job.driver, job.context());
            let spare = crate::job::allocate(driver, 4096);
            std::thread::scope(|scope| {
                let frees = scope.spawn(|| {
                    crate::job::enter(driver, context);
                    crate::job::free(driver, spare);
                });
                assert!(until(|| control.calls("free") > 0), "nobody frees");
                assert!(until(|| started.error().is_some()), "the call goes on for ever");
                frees.join().unwrap();
            });
            let error = started.error().unwrap();
            assert!(matches!(error, Error::Timeout { .. }), "{error}");
        }
        rank.barrier("over");
    });
}

/// While a call of this rank blocks its host, another thread ends the group.
fn a_blocked_host_is_given_back(test: &str, shuts_down: bool) {
    let more = [LAZY, FOR_EVER[0], FOR_EVER[1]];
    children(test, &[2], &more).run(|rank| {
        let job = Job::start(rank, &[2]);
        let group = job.group("world", &[]);
        if rank.rank == 0 {
            let (case, context) = (sum(&job, 1000), job.context());
            let (control, driver) = (&job.control, &job.driver);
            let error = std::thread::scope(|scope| {
                scope.spawn(|| {
                    crate::job::enter(driver, context);
                    assert!(until(|| control.calls("ncclAllReduce") > 0), "nobody called");
                    if shuts_down {
                        group.device.shutdown();
                    } else {
                        group.device.abort("a test");
                    }
                });
                case.try_start(&job, &group).err().unwrap()
            });
            let why = if shuts_down { "shut down" } else { "a test" };
            assert!(matches!(error, Error::Aborted { .. }) && error.to_string().contains(why), "{error}");
            assert!(error.to_string().contains("rank 0 of group 'world'"), "{error}");
        }
        rank.barrier("ended");
        told(&job, &group);
        rank.barrier("over");
    });
}

#[test]
fn an_abort_gives_back_a_host_that_a_first_call_blocks() {
    a_blocked_host_is_given_back("watch::an_abort_gives_back_a_host_that_a_first_call_blocks", false);
}

#[test]
fn a_shutdown_gives_back_a_host_that_a_first_call_blocks() {
    a_blocked_host_is_given_back("watch::a_shutdown_gives_back_a_host_that_a_first_call_blocks", true);
}

/// Where streams cannot wait for words the host waits for NCCL's part, and so for the other ranks of its node.
fn a_host_that_waits_is_given_back(test: &str, aborts: bool) {
    let nodes = &[2, 2];
    children(test, nodes, &[NO_WORDS, FOR_EVER[0], FOR_EVER[1]]).run(|rank| {
        let job = Job::start(rank, nodes);
        let group = job.group("world", &[("SMDDP_CUDA_SLOT", "64K")]);
        rank.barrier("made");
        if rank.rank == 0 {
            if !aborts {
                group.device.set_timeout(LIMIT);
            }
            rank.publish("calls", b"");
            let error = sum(&job, 1000).try_start(&job, &group).err().unwrap();
            let expected = if aborts { "a test" } else { "timeout" };
            assert!(error.to_string().contains(expected), "{error}");
        } else if rank.rank == 1 && aborts {
            rank.receive("calls");
            group.device.abort("a test");
        }
        rank.barrier("ended");
        assert!(job.comes_to_rest(), "the stream still waits");
        told(&job, &group);
        rank.barrier("over");
    });
}

#[test]
fn a_host_that_waits_for_a_rank_that_stays_away_is_given_back() {
    let test = "watch::a_host_that_waits_for_a_rank_that_stays_away_is_given_back";
    a_host_that_waits_is_given_back(test, false);
}

#[test]
fn a_host_that_waits_for_a_rank_that_aborts_is_given_back() {
    let test = "watch::a_host_that_waits_for_a_rank_that_aborts_is_given_back";
    a_host_that_waits_is_given_back(test, true);
}

/// Before the copy of a call lies work of the stream's that never ends; no kernel of NCCL's is there to be aborted.
#[test]
fn a_host_that_waits_for_its_own_stream_gives_up_at_the_limit() {
    let nodes = &[1, 1];
    let test = "watch::a_host_that_waits_for_its_own_stream_gives_up_at_the_limit";
    children(test, nodes, &[NO_WORDS, FOR_EVER[0], FOR_EVER[1]]).run(|rank| {
        let job = Job::wanting("nccl", rank, nodes);
        let both = job.group("both", &[]);
        // A group of NCCL over both, whose peer never comes, holds the stream.
        let stuck = job.group("stuck", &[("SMDDP_CUDA", "nccl")]);
        if rank.rank == 0 {
            sum(&job, 10).start(&job, &stuck);
            both.device.set_timeout(LIMIT);
            let case = sum(&job, 1000);
            let memory = job.memory(&[0; 4000]);
            let placed = Placed { input: memory, output: memory };
            let error = case.launch(&both, &placed, job.stream_address(), None).err().unwrap();
            assert!(matches!(error, Error::Timeout { .. }), "{error}");
            assert!(error.to_string().contains("rank 0 of group 'both', operation all_reduce"), "{error}");
        }
        rank.barrier("given up");
        // Whoever is told frees memory, which waits for all streams.
        stuck.device.abort("the end of a test");
        assert!(job.comes_to_rest(), "the stream still waits");
        let error = told(&job, &both);
        assert!(error.to_string().contains("all_reduce"), "{error}");
        rank.barrier("over");
    });
}

/// What rank 1 says on the host until rank 0 begins to meet it for NCCL.
fn plays_the_set_up(host: &Communicator) {
    let agrees = || host.all_gather(&[false], &mut [false; 2]).unwrap();
    let tells = |bytes: usize| host.all_gather(&vec![0u8; bytes], &mut vec![0u8; 2 * bytes]).unwrap();
    // Settings, device, where it sits, whether it is shared, staging, GPUDirect, other ways, the library, its identity.
    agrees();
    agrees();
    tells(32);
    (0..5).for_each(|_| agrees());
    tells(128);
}

/// Rank 0 meets for NCCL, alone; what it is told then.
fn while_ranks_meet(test: &str, dies: bool, more: &[(&str, &str)], check: impl Fn(&Job, Error)) {
    let all = children(test, &[2], &[&FOR_EVER[..], more].concat());
    (if dies { all.dies(1) } else { all }).run(|rank| {
        let job = Job::start(rank, &[2]);
        let host = job.host("world", &[]);
        // Longer than the test may take.
        host.set_timeout(Duration::from_secs(600));
        if rank.rank == 1 {
            plays_the_set_up(&host);
            rank.receive("meets");
            if dies {
                std::process::exit(3);
            }
            rank.receive("told");
            return;
        }
        let control = &job.control;
        let error = std::thread::scope(|scope| {
            scope.spawn(|| {
                assert!(until(|| control.calls("ncclCommInitRankConfig") > 0), "nobody meets");
                rank.publish("meets", b"");
                if !dies {
                    host.abort("a test");
                }
            });
            job.try_side(&host).err().unwrap()
        });
        check(&job, error);
        rank.publish("told", b"");
    });
}

#[test]
fn a_rank_that_dies_while_others_meet_for_nccl_is_named() {
    while_ranks_meet("watch::a_rank_that_dies_while_others_meet_for_nccl_is_named", true, &[], |_, error| {
        assert!(matches!(error, Error::PeerLost { peer: 1, .. }), "{error}");
    });
}

#[test]
fn an_abort_while_ranks_meet_for_nccl_is_heard() {
    while_ranks_meet("watch::an_abort_while_ranks_meet_for_nccl_is_heard", false, &[], |_, error| {
        assert!(matches!(&error, Error::Aborted { reason, .. } if reason == "a test"), "{error}");
    });
}

#[test]
fn an_abort_while_ranks_meet_leaves_no_thread_behind_where_nccl_does_not_block() {
    let test = "watch::an_abort_while_ranks_meet_leaves_no_thread_behind_where_nccl_does_not_block";
    while_ranks_meet(test, false, &[DOES_NOT_BLOCK], |job, error| {
        assert!(matches!(&error, Error::Aborted { reason, .. } if reason == "a test"), "{error}");
        assert!(until(|| job.control.calls("ncclCommAbort") == 1), "the communicator has not ended");
        assert!(until(|| !threads().iter().any(|name| name.starts_with("smddp-nccl"))), "{:?}", threads());
    });
}

/// The host's group has nothing to do with the call, so nobody else notices.
#[test]
fn a_rank_of_the_node_that_dies_is_named_though_its_kernel_waits_for_ever() {
    let test = "watch::a_rank_of_the_node_that_dies_is_named_though_its_kernel_waits_for_ever";
    children(test, &[2], &FOR_EVER).dies(1).run(|rank| {
        let job = Job::start(rank, &[2]);
        let group = job.group("world", &[]);
        let first = sum(&job, 100);
        first.run(&job, &group);
        rank.barrier("both");
        if rank.rank == 1 {
            std::process::exit(3);
        }
        let (_, started) = sum(&job, 1000).begin(&job, &group).unwrap();
        assert!(job.comes_to_rest(), "the stream still waits");
        let error = started.error().unwrap();
        assert!(matches!(error, Error::PeerLost { peer: 1, .. }), "{error}");
        assert!(error.to_string().contains("rank 0 of group 'world', operation all_reduce #1"), "{error}");
        assert_eq!(group.device.failure(), Some(error));
    });
}

/// NCCL hears of the end at once; a call under way and one that it refuses name the rank all the same.
#[test]
fn a_rank_of_the_node_that_dies_is_named_though_nccl_hears_of_it_first() {
    let test = "watch::a_rank_of_the_node_that_dies_is_named_though_nccl_hears_of_it_first";
    children(test, &[2], &[("SMDDP_STANDIN_QUIET", "1")]).dies(1).run(|rank| {
        let job = Job::start(rank, &[2]);
        let group = job.group("world", &[]);
        rank.barrier("made");
        if rank.rank == 1 {
            rank.receive("waits");
            std::process::exit(3);
        }
        let (_, started) = sum(&job, 1000).begin(&job, &group).unwrap();
        assert!(job.comes_to_wait(), "nothing waits for the other rank");
        rank.publish("waits", b"");
        assert!(job.comes_to_rest(), "the stream still waits");
        let refused = sum(&job, 1000).try_start(&job, &group).err().unwrap();
        let waited = group.device.wait(&started, Duration::from_secs(20)).unwrap_err();
        for error in [refused, waited] {
            assert!(matches!(error, Error::PeerLost { peer: 1, .. }), "{error}");
            assert!(error.to_string().contains("rank 0 of group 'world', operation all_reduce"), "{error}");
        }
    });
}

/// Of one rank NCCL carries nothing that an abort could end: the calls fail all the same, and the stream goes on by itself.
#[test]
fn calls_of_one_rank_fail_and_end_as_others() {
    let test = "watch::calls_of_one_rank_fail_and_end_as_others";
    children(test, &[1], &FOR_EVER).run(|rank| {
        let job = Job::start(rank, &[1]);
        for how in ["abort", "limit", "shutdown"] {
            let group = job.group(how, &[("SMDDP_CUDA", "nccl")]);
            let case = Case::of(Collective::AllGather, DType::F32, 1000, 0, &job);
            let placed = case.place(&job);
            job.synchronize();
            let hold = job.hold();
            if how == "limit" {
                group.device.set_timeout(LIMIT);
            }
            let started = case.launch(&group, &placed, job.stream_address(), None).unwrap();
            match how {
                "abort" => group.device.abort("a test"),
                "shutdown" => group.device.shutdown(),
                _ => assert!(until(|| started.error().is_some()), "the call goes on for ever"),
            }
            let error = started.error();
            match how {
                "abort" => assert!(matches!(error, Some(Error::Aborted { .. })), "{error:?}"),
                "limit" => assert!(matches!(error, Some(Error::Timeout { .. })), "{error:?}"),
                _ => assert_eq!(error, None),
            }
            hold.release();
            // What was enqueued is done, whatever became of the group.
            job.synchronize();
            group.end();
            case.check(&job, &placed);
        }
        assert_eq!(job.control.leaks().communicators, 0, "left behind");
    });
}

/// The stream goes on over data that is not there.
#[test]
fn a_call_that_is_ended_early_says_so() {
    children("watch::a_call_that_is_ended_early_says_so", &[2], &FOR_EVER).run(|rank| {
        let job = Job::start(rank, &[2]);
        let group = job.group("world", &[]);
        let (_, well) = sum(&job, 100).begin(&job, &group).unwrap();
        group.device.wait(&well, Duration::from_secs(20)).unwrap();
        if rank.rank == 0 {
            group.device.set_timeout(LIMIT);
            let (_, started) = sum(&job, 1000).begin(&job, &group).unwrap();
            assert!(job.comes_to_rest(), "the stream still waits");
            let error = started.error().unwrap();
            assert!(matches!(error, Error::Timeout { .. }), "{error}");
            let waited = group.device.wait(&started, Duration::from_secs(20));
            assert_eq!(waited, Err(error));
        }
        rank.barrier("too late");
        // Calls that ended before are not touched by it.
        assert_eq!(well.error(), None);
        rank.barrier("over");
    });
}

/// The `nth` kernel of NCCL's fails.
fn a_kernel_that_fails_is_told_by_the_call(test: &str, nodes: &[usize], nth: u64) {
    children(test, nodes, &[]).run(|rank| {
        let job = Job::start(rank, nodes);
        let group = job.group("world", &[]);
        rank.barrier("made");
        if rank.rank == 0 {
            job.control.fail("nccl", nth, 1);
        }
        let begun = sum(&job, 1000).begin(&job, &group);
        if rank.rank == 0 {
            let started = begun.unwrap().1;
            let error = group.device.wait(&started, Duration::from_secs(20)).unwrap_err();
            assert!(matches!(error, Error::Transport { transport: "NCCL", .. }), "{error}");
            assert_eq!(started.error(), Some(error));
        }
        assert!(job.comes_to_rest(), "the stream still waits");
        rank.barrier("over");
    });
}

#[test]
fn a_kernel_that_fails_in_a_node_is_told_by_the_call() {
    let test = "watch::a_kernel_that_fails_in_a_node_is_told_by_the_call";
    a_kernel_that_fails_is_told_by_the_call(test, &[2], 1);
}

/// Those who ask NCCL at once find each other asking.
#[test]
fn a_kernel_that_fails_is_told_to_all_who_wait() {
    let nodes = &[2];
    children("watch::a_kernel_that_fails_is_told_to_all_who_wait", nodes, &[]).run(|rank| {
        let job = Job::start(rank, nodes);
        let group = job.group("world", &[]);
        rank.barrier("made");
        if rank.rank == 0 {
            job.control.fail("nccl", 1, 1);
        }
        let begun = sum(&job, 1000).begin(&job, &group);
        if rank.rank == 0 {
            let (started, device) = (&begun.unwrap().1, &group.device);
            let told: Vec<_> = std::thread::scope(|threads| {
                let wait = || threads.spawn(|| device.wait(started, Duration::from_secs(20)));
                let waiting: Vec<_> = (0..16).map(|_| wait()).collect();
                waiting.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            assert!(told.iter().all(Result::is_err), "{told:?}");
        }
        assert!(job.comes_to_rest(), "the stream still waits");
        rank.barrier("over");
    });
}

/// The exchange between nodes, which comes before it, goes well.
#[test]
fn a_last_kernel_that_fails_is_told_by_the_call() {
    a_kernel_that_fails_is_told_by_the_call(
        "watch::a_last_kernel_that_fails_is_told_by_the_call",
        &[2, 2],
        2,
    );
}

/// Whoever waits in slices is told of the whole time, and of which call.
#[test]
fn a_wait_of_several_slices_tells_the_whole_time() {
    children("watch::a_wait_of_several_slices_tells_the_whole_time", &[2], &[]).run(|rank| {
        let job = Job::start(rank, &[2]);
        let group = job.group("world", &[]);
        let (_, first) = sum(&job, 100).begin(&job, &group).unwrap();
        group.device.wait(&first, Duration::from_secs(20)).unwrap();
        let case = sum(&job, 1000);
        if rank.rank == 0 {
            let (memory, started) = case.begin(&job, &group).unwrap();
            let (since, slice) = (Instant::now(), Duration::from_millis(20));
            let error = loop {
                match group.device.wait_for(&started, (since, LIMIT), slice) {
                    Ok(is_over) => assert!(!is_over, "rank 1 has not come"),
                    Err(error) => break error,
                }
            };
            let Error::Timeout { site, waited, .. } = error else { panic!("{error}") };
            assert!(waited >= LIMIT, "{waited:?}");
            assert_eq!((site.op.as_str(), site.seq, site.group.as_str()), ("all_reduce", 1, "world"));
            // Only the wait has ended.
            rank.barrier("given up");
            group.device.wait(&started, Duration::from_secs(20)).unwrap();
            case.check(&job, &memory);
        } else {
            rank.barrier("given up");
            case.run(&job, &group);
        }
        rank.barrier("over");
        group.end();
    });
}

fn a_call_after_the_shutdown(test: &str, nodes: &[usize]) {
    children(test, nodes, &[]).run(|rank| {
        let job = Job::start(rank, nodes);
        let group = job.group("world", &[]);
        rank.barrier("made");
        group.device.shutdown();
        let error = sum(&job, 100).try_start(&job, &group).err().unwrap();
        let text = error.to_string();
        assert!(matches!(error, Error::Aborted { .. }), "{text}");
        let site = format!("rank {} of group 'world', operation all_reduce #0", rank.rank);
        assert!(text.contains(&site) && text.contains("Make a new group"), "{text}");
        rank.barrier("over");
        group.end();
        job.end();
    });
}

#[test]
fn a_call_of_nccl_after_the_shutdown_is_told_whose_it_was() {
    a_call_after_the_shutdown("watch::a_call_of_nccl_after_the_shutdown_is_told_whose_it_was", &[2]);
}

#[test]
fn a_staged_call_after_the_shutdown_is_told_whose_it_was() {
    a_call_after_the_shutdown("watch::a_staged_call_after_the_shutdown_is_told_whose_it_was", &[1, 1]);
}

/// While no call is open nobody asks NCCL, which does not end in order what has failed.
#[test]
fn a_communicator_that_failed_between_calls_is_ended_with_its_group() {
    let test = "watch::a_communicator_that_failed_between_calls_is_ended_with_its_group";
    children(test, &[2], &[("SMDDP_STANDIN_QUIET", "1")]).run(|rank| {
        let job = Job::start(rank, &[2]);
        let group = job.group("world", &[]);
        assert_eq!(job.control.leaks().communicators, 1);
        job.control.fail("proxy", 1, 1);
        rank.barrier("failed");
        group.end();
        assert_eq!(job.control.leaks().communicators, 0, "left behind");
        assert_eq!(job.control.calls("ncclCommAbort"), 1);
        job.end();
    });
}

/// Names of this process's threads.
pub fn threads() -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let name = |task: std::io::Result<std::fs::DirEntry>| {
        // A thread that ends meanwhile has no name any more.
        std::fs::read_to_string(task.unwrap().path().join("comm")).unwrap_or_default()
    };
    tasks.map(name).collect()
}

/// The communicator of the node is there when that of all ranks fails on one of them.
#[test]
fn what_was_made_of_a_group_that_fails_is_ended() {
    let nodes = &[2, 2];
    let settings = [("SMDDP_CUDA_ALGORITHM", "all_reduce=nccl")];
    children("watch::what_was_made_of_a_group_that_fails_is_ended", nodes, &[]).run(|rank| {
        let job = Job::wanting("nccl", rank, nodes);
        rank.barrier("before");
        if rank.rank == 3 {
            job.control.fail("ncclCommInitRankConfig", 2, 3);
        }
        let error = job.try_group("world", &settings).err().unwrap();
        assert!(error.to_string().contains(if rank.rank == 3 { "internal" } else { "rank 3" }), "{error}");
        assert_eq!(job.control.calls("ncclCommAbort"), 1, "communicators ended");
        let watches = || threads().iter().filter(|name| name.starts_with("smddp-nccl-watc")).count();
        assert!(until(|| watches() == 0), "{:?}", threads());
        rank.barrier("told");
        let group = job.group("again", &settings);
        let case = Case::of(Collective::AllReduce, DType::F32, 1000, 0, &job);
        case.run(&job, &group);
        rank.barrier("over");
        group.end();
        job.end();
    });
}

/// Ranks may share a device where NCCL is told to take them for ranks of several hosts: on all of them, or on none.
#[test]
fn a_permission_to_share_a_device_that_one_rank_lacks_is_told() {
    let test = "watch::a_permission_to_share_a_device_that_one_rank_lacks_is_told";
    children(test, &[2], &[]).run(|rank| {
        if rank.rank == 0 {
            // SAFETY: the process has no other threads that read the environment yet.
            unsafe { std::env::set_var("NCCL_HOSTID", "rank0") };
        }
        let job = Job::start_on(rank, &[2], 0);
        let error = job.try_group("world", &[]).err().unwrap();
        if rank.rank == 0 {
            assert!(error.to_string().contains("rank 1 of group 'world' failed in"), "{error}");
        } else {
            assert!(matches!(error, Error::Argument { argument: "device", .. }), "{error}");
        }
        rank.barrier("over");
    });
}
