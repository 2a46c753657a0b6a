//! The stand-in for the driver keeps the orders that CUDA promises, and no others.

mod common;

use common::*;
use smddp_standin::Children;
use std::ffi::c_void;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};

const GEQ: u32 = 0;
const NOT_READY: i32 = 600;

#[test]
fn streams_keep_order_and_wait_for_values() {
    Children::of("streams_keep_order_and_wait_for_values").run(|_| {
        let (cuda, control) = cuda();
        let (stream, flags) = (cuda.stream(), cuda.pinned(64));
        let device = cuda.alloc(8);
        let host = cuda.pinned(8);
        assert_eq!(cuda.cuMemsetD8Async(device, 1, 8, stream), 0);
        assert_eq!(cuda.cuStreamWaitValue32_v2(stream, flags.device, 5, GEQ), 0);
        assert_eq!(cuda.cuMemcpyDtoHAsync_v2(host.host, device, 8, stream), 0);
        assert_eq!(cuda.cuStreamWriteValue32_v2(stream, flags.device + 4, 9, 0), 0);
        until("the wait is reached", || control.parked() == 1);
        assert_eq!(cuda.cuStreamQuery(stream), NOT_READY);
        assert_eq!(flags.word(1).load(Ordering::Acquire), 0);
        assert_eq!(host.bytes(), [0; 8]);
        flags.word(0).store(6, Ordering::Release);
        until("the value is written", || flags.word(1).load(Ordering::Acquire) == 9);
        assert_eq!(host.bytes(), [1; 8]);
        assert_eq!(cuda.cuStreamSynchronize(stream), 0);
        assert_eq!(cuda.cuStreamQuery(stream), 0);
    });
}

/// A hundred fills of one buffer under delays end with the last one.
#[test]
fn delays_do_not_change_the_order_within_a_stream() {
    let test = Children::of("delays_do_not_change_the_order_within_a_stream")
        .env("SMDDP_STANDIN_DELAY_US", "300")
        .env("SMDDP_STANDIN_SEED", "3");
    test.run(|_| {
        let (cuda, control) = cuda();
        let (stream, device) = (cuda.stream(), cuda.alloc(4));
        for i in 1..=100 {
            assert_eq!(cuda.cuMemsetD32Async(device, i, 1, stream), 0);
        }
        let mut found = 0u32;
        assert_eq!(cuda.cuMemcpyDtoHAsync_v2((&raw mut found).cast(), device, 4, stream), 0);
        assert_eq!((found, control.executed()), (100, 101));
    });
}

#[test]
fn events_order_streams() {
    Children::of("events_order_streams").run(|_| {
        let (cuda, control) = cuda();
        let (one, two, event) = (cuda.stream(), cuda.stream(), cuda.event());
        let (flags, out) = (cuda.pinned(64), cuda.pinned(8));
        let device = cuda.alloc(8);
        // Never recorded: over, and nobody waits for it.
        assert_eq!((cuda.cuEventQuery(event), cuda.cuEventSynchronize(event)), (0, 0));
        assert_eq!(cuda.cuStreamWaitEvent(two, event, 0), 0);
        assert_eq!(cuda.cuStreamSynchronize(two), 0);

        assert_eq!(cuda.cuStreamWaitValue32_v2(one, flags.device, 1, GEQ), 0);
        assert_eq!(cuda.cuMemsetD8Async(device, 7, 8, one), 0);
        assert_eq!(cuda.cuEventRecord(event, one), 0);
        assert_eq!(cuda.cuStreamWaitEvent(two, event, 0), 0);
        assert_eq!(cuda.cuMemcpyDtoHAsync_v2(out.host, device, 8, two), 0);
        // The second stream waits for that record, though the event is recorded again behind a second value.
        assert_eq!(cuda.cuStreamWaitValue32_v2(one, flags.device, 2, GEQ), 0);
        assert_eq!(cuda.cuEventRecord(event, one), 0);
        until("both streams wait", || control.parked() == 2);
        assert_eq!((cuda.cuEventQuery(event), cuda.cuStreamQuery(two)), (NOT_READY, NOT_READY));
        assert_eq!(out.bytes(), [0; 8]);
        flags.word(0).store(1, Ordering::Release);
        assert_eq!(cuda.cuStreamSynchronize(two), 0);
        assert_eq!(out.bytes(), [7; 8]);
        assert_eq!(cuda.cuEventQuery(event), NOT_READY);
        flags.word(0).store(2, Ordering::Release);
        assert_eq!(cuda.cuEventSynchronize(event), 0);
        assert_eq!(cuda.cuEventQuery(event), 0);
        assert_eq!(cuda.cuEventDestroy_v2(event), 0);
        assert_eq!(cuda.cuEventQuery(event), 400);
    });
}

#[test]
fn the_default_stream_orders_itself_with_blocking_streams_only() {
    Children::of("the_default_stream_orders_itself_with_blocking_streams_only").run(|_| {
        let (cuda, control) = cuda();
        let (mut blocking, free) = (0, cuda.stream());
        assert_eq!(cuda.cuStreamCreate(&mut blocking, 0), 0);
        let (flags, device) = (cuda.pinned(64), cuda.alloc(64));
        assert_eq!(cuda.cuStreamWaitValue32_v2(blocking, flags.device, 1, GEQ), 0);
        assert_eq!(cuda.cuMemsetD8Async(device, 1, 8, 0), 0);
        assert_eq!(cuda.cuMemsetD8Async(device, 1, 8, free), 0);
        assert_eq!(cuda.cuStreamSynchronize(free), 0);
        until("the default stream waits for the blocking one", || control.parked() == 2);
        assert_eq!(cuda.cuStreamQuery(0), NOT_READY);
        flags.word(0).store(1, Ordering::Release);
        assert_eq!(cuda.cuStreamSynchronize(0), 0);

        assert_eq!(cuda.cuStreamWaitValue32_v2(0, flags.device, 2, GEQ), 0);
        assert_eq!(cuda.cuMemsetD8Async(device, 2, 8, blocking), 0);
        until("the blocking stream waits for the default one", || control.parked() == 2);
        flags.word(0).store(2, Ordering::Release);
        assert_eq!(cuda.cuCtxSynchronize(), 0);
    });
}

#[test]
fn copies_to_and_from_pageable_memory_are_over_on_return() {
    let test = Children::of("copies_to_and_from_pageable_memory_are_over_on_return")
        .env("SMDDP_STANDIN_DELAY_US", "5000");
    test.run(|_| {
        let (cuda, _) = cuda();
        let (stream, device) = (cuda.stream(), cuda.alloc(8));
        for round in 0..10u8 {
            let (mut source, mut found) = ([round; 8], [99u8; 8]);
            assert_eq!(cuda.cuMemcpyHtoDAsync_v2(device, source.as_ptr(), 8, stream), 0);
            source.fill(77);
            assert_eq!(cuda.cuMemcpyDtoHAsync_v2(found.as_mut_ptr(), device, 8, stream), 0);
            assert_eq!((found, source), ([round; 8], [77; 8]));
        }
    });
}

#[test]
fn pinned_memory_is_read_when_the_stream_gets_there() {
    Children::of("pinned_memory_is_read_when_the_stream_gets_there").run(|_| {
        let (cuda, _) = cuda();
        let (stream, device) = (cuda.stream(), cuda.alloc(8));
        let (flags, from) = (cuda.pinned(64), cuda.pinned(8));
        assert_eq!(cuda.cuStreamWaitValue32_v2(stream, flags.device, 1, GEQ), 0);
        assert_eq!(cuda.cuMemcpyHtoDAsync_v2(device, from.host, 8, stream), 0);
        from.fill(5);
        flags.word(0).store(1, Ordering::Release);
        assert_eq!(cuda.cuStreamSynchronize(stream), 0);
        let mut found = [0u8; 8];
        assert_eq!(cuda.cuMemcpyDtoH_v2(found.as_mut_ptr(), device, 8), 0);
        assert_eq!(found, [5; 8]);
    });
}

#[test]
fn poison_shows_who_looks_too_early() {
    Children::of("poison_shows_who_looks_too_early").env("SMDDP_STANDIN_POISON", "enqueue").run(|_| {
        let (cuda, _) = cuda();
        let (stream, device) = (cuda.stream(), cuda.alloc(8));
        let (flags, to) = (cuda.pinned(64), cuda.pinned(8));
        assert_eq!(cuda.cuMemsetD8Async(device, 3, 8, stream), 0);
        assert_eq!(cuda.cuStreamWaitValue32_v2(stream, flags.device, 1, GEQ), 0);
        assert_eq!(cuda.cuMemcpyDtoHAsync_v2(to.host, device, 8, stream), 0);
        assert_eq!(to.bytes(), [0xA5; 8]);
        flags.word(0).store(1, Ordering::Release);
        assert_eq!(cuda.cuStreamSynchronize(stream), 0);
        assert_eq!(to.bytes(), [3; 8]);
    });
}

/// From the start of the copy: what the destination held is there while the copy is behind something else.
#[test]
fn poison_at_start_spares_what_is_still_in_use() {
    let test = Children::of("poison_at_start_spares_what_is_still_in_use")
        .env("SMDDP_STANDIN_POISON", "start")
        .env("SMDDP_STANDIN_COPY_US", "200000");
    test.run(|_| {
        let (cuda, control) = cuda();
        let (stream, device) = (cuda.stream(), cuda.alloc(8));
        let (flags, to) = (cuda.pinned(64), cuda.pinned(8));
        assert_eq!(cuda.cuMemsetD8Async(device, 3, 8, stream), 0);
        assert_eq!(cuda.cuStreamWaitValue32_v2(stream, flags.device, 1, GEQ), 0);
        assert_eq!(cuda.cuMemcpyDtoHAsync_v2(to.host, device, 8, stream), 0);
        until("the wait is reached", || control.parked() == 1);
        assert_eq!(to.bytes(), [0; 8]);
        flags.word(0).store(1, Ordering::Release);
        until("poison is seen", || to.bytes() == [0xA5; 8]);
        assert_eq!(cuda.cuStreamSynchronize(stream), 0);
        assert_eq!(to.bytes(), [3; 8]);
    });
}

#[test]
fn memory_operations_in_a_batch_run_in_order() {
    Children::of("memory_operations_in_a_batch_run_in_order").run(|_| {
        let (cuda, control) = cuda();
        let (stream, flags) = (cuda.stream(), cuda.pinned(64));
        let (wait, write) = (1, 2);
        let batch = [
            [write, flags.device, 1, 0, 0, 0],
            [wait, flags.device + 4, 1, 0, 0, 0],
            [write, flags.device + 8, 7, 0, 0, 0],
        ];
        assert_eq!(cuda.cuStreamBatchMemOp_v2(stream, 3, batch.as_ptr(), 0), 0);
        until("the batch waits", || control.parked() == 1);
        let words = || [0, 1, 2].map(|i| flags.word(i).load(Ordering::Acquire));
        assert_eq!(words(), [1, 0, 0]);
        flags.word(1).store(1, Ordering::Release);
        assert_eq!(cuda.cuStreamSynchronize(stream), 0);
        assert_eq!(words(), [1, 1, 7]);
        // Flushing, odd addresses, flags and what is not registered are refused.
        let flush = 1 << 30;
        assert_eq!(cuda.cuStreamWaitValue32_v2(stream, flags.device, 1, flush), 801);
        assert_eq!(cuda.cuStreamWaitValue32_v2(stream, flags.device + 1, 1, GEQ), 1);
        assert_eq!(cuda.cuStreamWriteValue32_v2(stream, flags.device, 1, 1), 1);
        let own = AtomicU32::new(0);
        assert_eq!(cuda.cuStreamWaitValue32_v2(stream, own.as_ptr() as u64, 1, GEQ), 1);
    });
}

#[test]
fn faults_hit_the_call_they_name() {
    Children::of("faults_hit_the_call_they_name").env("SMDDP_STANDIN_FAIL", "cuMemAlloc_v2:2:2").run(|_| {
        let (cuda, control) = cuda();
        let mut address = 0;
        let codes: Vec<_> = (0..3).map(|_| cuda.cuMemAlloc_v2(&mut address, 16)).collect();
        assert_eq!((codes, control.calls("cuMemAlloc_v2")), (vec![0, 2, 0], 3));
        control.fail("cuCtxSynchronize", 1, 999);
        assert_eq!([cuda.cuCtxSynchronize(), cuda.cuCtxSynchronize()], [999, 0]);
    });
}

#[test]
fn a_fault_on_a_stream_breaks_the_context_and_releases_all() {
    let test = Children::of("a_fault_on_a_stream_breaks_the_context_and_releases_all")
        .env("SMDDP_STANDIN_FAIL", "stream:2:700");
    test.run(|_| {
        let (cuda, control) = cuda();
        let (one, two, flags) = (cuda.stream(), cuda.stream(), cuda.pinned(64));
        let device = cuda.alloc(8);
        assert_eq!(cuda.cuStreamWaitValue32_v2(one, flags.device, 1, GEQ), 0);
        until("the wait is reached", || control.parked() == 1);
        assert_eq!(cuda.cuMemsetD8Async(device, 3, 8, two), 0);
        assert_eq!([cuda.cuStreamSynchronize(two), cuda.cuStreamSynchronize(one)], [700, 700]);
        assert_eq!((cuda.cuStreamQuery(two), cuda.cuMemFree_v2(device)), (700, 700));
        let (code, text) = control.lasting_error().unwrap();
        assert_eq!(code, 700);
        assert!(text.contains("cuMemsetD8Async"), "{text}");
    });
}

#[test]
fn wrong_and_freed_pointers_are_caught() {
    Children::of("wrong_and_freed_pointers_are_caught").run(|_| {
        let (cuda, control) = cuda();
        let (stream, flags, device) = (cuda.stream(), cuda.pinned(64), cuda.alloc(8));
        let mut host = [0u8; 16];
        let mut to_host = |from, len| cuda.cuMemcpyDtoHAsync_v2(host.as_mut_ptr(), from, len, stream);
        assert_eq!([to_host(host_address(), 8), to_host(device, 16), to_host(device + 4, 4)], [1, 1, 0]);
        assert_eq!([cuda.cuMemFree_v2(device + 4), cuda.cuMemFree_v2(12345)], [1, 1]);
        assert_eq!(cuda.cuMemFreeHost(host.as_mut_ptr()), 1);
        assert_eq!(cuda.cuMemHostUnregister(host.as_mut_ptr()), 713);

        let mut freed = 0;
        assert_eq!(cuda.cuMemAllocAsync(&mut freed, 8, stream), 0);
        assert_eq!(cuda.cuStreamWaitValue32_v2(stream, flags.device, 1, GEQ), 0);
        assert_eq!(cuda.cuMemsetD8Async(freed, 1, 8, stream), 0);
        // Freed on another stream while the fill is parked: a race that corrupts memory on a device.
        let other = cuda.stream();
        assert_eq!(cuda.cuMemFreeAsync(freed, other), 0);
        assert_eq!(cuda.cuStreamSynchronize(other), 0);
        flags.word(0).store(1, Ordering::Release);
        assert_eq!(cuda.cuStreamSynchronize(stream), 700);
        assert!(control.lasting_error().unwrap().1.contains("cuMemsetD8Async"));
    });
}

fn host_address() -> u64 {
    static WORDS: [u64; 4] = [0; 4];
    WORDS.as_ptr() as u64
}

#[test]
fn what_is_not_given_back_is_a_leak() {
    Children::of("what_is_not_given_back_is_a_leak").run(|_| {
        let (cuda, control) = cuda();
        let none = control.leaks();
        assert_eq!(none, Default::default());
        let (stream, event, device, pinned) = (cuda.stream(), cuda.event(), cuda.alloc(40), cuda.pinned(8));
        let mut own = vec![0u8; 64];
        assert_eq!(cuda.cuMemHostRegister_v2(own.as_mut_ptr(), 64, 3), 0);
        assert_eq!(cuda.cuMemHostRegister_v2(own[8..].as_mut_ptr(), 64, 3), 712);
        let leaks = control.leaks();
        assert_eq!((leaks.streams, leaks.events, leaks.device_regions, leaks.device_bytes), (1, 1, 1, 40));
        assert_eq!((leaks.pinned_regions, leaks.registered_regions), (1, 1));
        assert_eq!(cuda.cuMemHostUnregister(own.as_mut_ptr()), 0);
        assert_eq!([cuda.cuMemFree_v2(device), cuda.cuMemFreeHost(pinned.host)], [0, 0]);
        assert_eq!([cuda.cuEventDestroy_v2(event), cuda.cuStreamDestroy_v2(stream)], [0, 0]);
        assert_eq!(control.leaks(), none);
        assert_eq!([cuda.cuMemFree_v2(device), cuda.cuStreamDestroy_v2(stream)], [1, 400]);
    });
}

/// As torch captures: what any thread calls meanwhile may spoil it.
#[test]
fn what_is_not_safe_during_a_capture_spoils_it() {
    Children::of("what_is_not_safe_during_a_capture_spoils_it").run(|_| {
        let (cuda, control) = cuda();
        let (captures, stream, event, device) = (cuda.stream(), cuda.stream(), cuda.event(), cuda.alloc(8));
        let mut own = vec![0u8; 64];
        let mut all = || {
            let host = own.as_mut_ptr();
            let asked = [cuda.cuStreamQuery(stream), cuda.cuEventQuery(event)];
            let mut address = 0;
            let made = [cuda.cuMemAlloc_v2(&mut address, 8), cuda.cuMemHostRegister_v2(host, 64, 3)];
            let given_back = [cuda.cuMemFree_v2(address), cuda.cuMemHostUnregister(host)];
            [asked, made, given_back].concat()
        };
        control.capture(captures, true).unwrap();
        assert_eq!((all(), control.calls("spoilt capture")), (vec![900; 6], 6));
        let mut mode = 2;
        assert_eq!((cuda.cuThreadExchangeStreamCaptureMode(&mut mode), mode), (0, 0));
        assert_eq!((all(), control.calls("spoilt capture")), (vec![0; 6], 6));
        assert_eq!((cuda.cuThreadExchangeStreamCaptureMode(&mut mode), mode), (0, 2));
        control.capture(captures, false).unwrap();
        assert_eq!((all(), control.calls("spoilt capture")), (vec![0; 6], 6));
        assert_eq!(cuda.cuMemFree_v2(device), 0);
    });
}

#[test]
fn freeing_waits_for_the_device() {
    Children::of("freeing_waits_for_the_device").run(|_| {
        let (cuda, control) = cuda();
        let (stream, flags, device, spare) = (cuda.stream(), cuda.pinned(64), cuda.alloc(8), cuda.alloc(8));
        assert_eq!(cuda.cuStreamWaitValue32_v2(stream, flags.device, 1, GEQ), 0);
        until("the wait is reached", || control.parked() == 1);
        let freed = AtomicI32::new(-1);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (cuda, _) = common::cuda();
                freed.store(cuda.cuMemFree_v2(spare), Ordering::Release);
            });
            until("the free waits", || control.calls("free") == 1);
            // Whoever queues meanwhile is not held up.
            assert_eq!(cuda.cuMemsetD8Async(device, 1, 8, stream), 0);
            assert_eq!(control.leaks().device_regions, 2);
            assert_eq!(freed.load(Ordering::Acquire), -1);
            flags.word(0).store(1, Ordering::Release);
        });
        assert_eq!((freed.load(Ordering::Acquire), control.leaks().device_regions), (0, 1));
    });
}

/// The deadlock of a wait whose producer is queued after it, met by a free: with the lock nobody comes on, until
/// the limit breaks it up.
#[test]
fn the_lock_held_by_free_blocks_who_queues() {
    let test = Children::of("the_lock_held_by_free_blocks_who_queues")
        .env("SMDDP_STANDIN_FREE_LOCK", "1")
        .env("SMDDP_STANDIN_HANG_S", "1");
    test.run(|_| {
        let (cuda, control) = cuda();
        let (one, two, flags, spare) = (cuda.stream(), cuda.stream(), cuda.pinned(64), cuda.alloc(8));
        assert_eq!(cuda.cuStreamWaitValue32_v2(one, flags.device, 1, GEQ), 0);
        until("the wait is reached", || control.parked() == 1);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (cuda, _) = common::cuda();
                assert_eq!(cuda.cuMemFree_v2(spare), 702);
            });
            until("the free has the lock", || control.calls("free") == 1);
            // The producer of the value comes too late.
            cuda.cuStreamWriteValue32_v2(two, flags.device, 1, 0);
        });
        let (code, text) = control.lasting_error().unwrap();
        assert_eq!(code, 702);
        assert!(text.contains("cuStreamWaitValue"), "{text}");
    });
}

#[test]
fn one_queue_lets_a_parked_wait_stop_everything() {
    Children::of("one_queue_lets_a_parked_wait_stop_everything").env("SMDDP_STANDIN_ONE_QUEUE", "1").run(
        |_| {
            let (cuda, control) = cuda();
            let (one, two, flags, device) = (cuda.stream(), cuda.stream(), cuda.pinned(64), cuda.alloc(8));
            assert_eq!(cuda.cuStreamWaitValue32_v2(one, flags.device, 1, GEQ), 0);
            assert_eq!(cuda.cuMemsetD8Async(device, 1, 8, two), 0);
            until("the wait is reached", || control.parked() == 1);
            assert_eq!((cuda.cuStreamQuery(two), control.executed()), (NOT_READY, 0));
            flags.word(0).store(1, Ordering::Release);
            assert_eq!(cuda.cuStreamSynchronize(two), 0);
        },
    );
}

/// A wait that may come first does, and what leads to its end is behind it; an event keeps it from that.
#[test]
fn one_queue_may_take_streams_in_any_order() {
    let test = Children::of("one_queue_may_take_streams_in_any_order").env("SMDDP_STANDIN_ONE_QUEUE", "any");
    test.run(|_| {
        let (cuda, control) = cuda();
        let (one, two, flags, event) = (cuda.stream(), cuda.stream(), cuda.pinned(64), cuda.event());
        // Nothing runs before all of it is there.
        assert_eq!(cuda.cuStreamWaitValue32_v2(one, flags.device + 32, 1, GEQ), 0);
        until("the wait is reached", || control.parked() == 1);
        assert_eq!(cuda.cuStreamWriteValue32_v2(one, flags.device, 1, 0), 0);
        assert_eq!(cuda.cuEventRecord(event, one), 0);
        assert_eq!(cuda.cuStreamWaitEvent(two, event, 0), 0);
        assert_eq!(cuda.cuStreamWaitValue32_v2(two, flags.device, 1, GEQ), 0);
        flags.word(8).store(1, Ordering::Release);
        assert_eq!(cuda.cuStreamSynchronize(two), 0);

        assert_eq!(cuda.cuStreamWaitValue32_v2(one, flags.device + 32, 2, GEQ), 0);
        until("the wait is reached", || control.parked() == 1);
        assert_eq!(cuda.cuStreamWriteValue32_v2(one, flags.device + 4, 1, 0), 0);
        assert_eq!(cuda.cuStreamWaitValue32_v2(two, flags.device + 8, 1, GEQ), 0);
        flags.word(8).store(2, Ordering::Release);
        until("the first wait is over", || control.executed() == 6);
        until("the other waits", || control.parked() == 1);
        assert_eq!(flags.word(1).load(Ordering::Acquire), 0);
        flags.word(2).store(1, Ordering::Release);
        assert_eq!((cuda.cuStreamSynchronize(one), cuda.cuStreamSynchronize(two)), (0, 0));
    });
}

#[test]
fn who_gives_a_full_queue_more_waits() {
    let test = Children::of("who_gives_a_full_queue_more_waits").env("SMDDP_STANDIN_QUEUE_DEPTH", "4");
    test.run(|_| {
        let (cuda, control) = cuda();
        let (stream, flags) = (cuda.stream(), cuda.pinned(64));
        assert_eq!(cuda.cuStreamWaitValue32_v2(stream, flags.device, 1, GEQ), 0);
        until("the wait is reached", || control.parked() == 1);
        for value in 1..=4 {
            assert_eq!(cuda.cuStreamWriteValue32_v2(stream, flags.device + 4, value, 0), 0);
        }
        assert_eq!(control.calls("full queue"), 0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                until("one waits", || control.calls("full queue") == 1);
                flags.word(0).store(1, Ordering::Release);
            });
            assert_eq!(cuda.cuStreamWriteValue32_v2(stream, flags.device + 4, 5, 0), 0);
        });
        assert_eq!(cuda.cuStreamSynchronize(stream), 0);
        assert_eq!(flags.word(1).load(Ordering::Acquire), 5);
    });
}

#[test]
fn streams_do_not_stop_each_other() {
    Children::of("streams_do_not_stop_each_other").run(|_| {
        let (cuda, control) = cuda();
        let (one, two, flags, device) = (cuda.stream(), cuda.stream(), cuda.pinned(64), cuda.alloc(8));
        assert_eq!(cuda.cuStreamWaitValue32_v2(one, flags.device, 1, GEQ), 0);
        assert_eq!(cuda.cuMemsetD8Async(device, 1, 8, two), 0);
        assert_eq!(cuda.cuStreamSynchronize(two), 0);
        until("the wait is reached", || control.parked() == 1);
        flags.word(0).store(1, Ordering::Release);
        assert_eq!(cuda.cuStreamSynchronize(one), 0);
    });
}

#[test]
fn memory_operations_can_be_unsupported() {
    Children::of("memory_operations_can_be_unsupported").env("SMDDP_STANDIN_WAIT_VALUE", "unsupported").run(
        |_| {
            let (cuda, _) = cuda();
            let (stream, flags) = (cuda.stream(), cuda.pinned(64));
            assert_eq!(cuda.cuStreamWaitValue32_v2(stream, flags.device, 1, GEQ), 801);
            assert_eq!(cuda.cuStreamWriteValue32_v2(stream, flags.device, 1, 0), 801);
            let mut supported = -1;
            assert_eq!(cuda.cuDeviceGetAttribute(&mut supported, 122, 0), 0);
            assert_eq!(supported, 0);
        },
    );
}

#[test]
fn waits_can_be_lost_and_end_by_the_limit() {
    let test = Children::of("waits_can_be_lost_and_end_by_the_limit")
        .env("SMDDP_STANDIN_WAIT_VALUE", "never")
        .env("SMDDP_STANDIN_HANG_S", "1");
    test.run(|_| {
        let (cuda, control) = cuda();
        let (stream, flags) = (cuda.stream(), cuda.pinned(64));
        // Another stream's store is seen, the host's is not.
        assert_eq!(cuda.cuStreamWaitValue32_v2(stream, flags.device + 4, 1, GEQ), 0);
        assert_eq!(cuda.cuStreamWriteValue32_v2(cuda.stream(), flags.device + 4, 1, 0), 0);
        assert_eq!(cuda.cuStreamSynchronize(stream), 0);
        flags.word(0).store(1, Ordering::Release);
        assert_eq!(cuda.cuStreamWaitValue32_v2(stream, flags.device, 1, GEQ), 0);
        assert_eq!(cuda.cuStreamSynchronize(stream), 702);
        let text = control.lasting_error().unwrap().1;
        assert!(text.contains("Geq 1 (it is 1)"), "{text}");
    });
}

#[test]
fn pinned_memory_can_have_other_addresses_on_devices() {
    Children::of("pinned_memory_can_have_other_addresses_on_devices")
        .env("SMDDP_STANDIN_HOST_ALIAS", "1")
        .run(|_| {
            let (cuda, _) = cuda();
            let (stream, flags, device) = (cuda.stream(), cuda.pinned(64), cuda.alloc(4));
            assert_ne!(flags.device, flags.host as u64);
            assert_eq!(cuda.cuStreamWriteValue32_v2(stream, flags.host as u64, 4, 0), 1);
            assert_eq!(cuda.cuStreamWriteValue32_v2(stream, flags.device + 8, 4, 0), 0);
            assert_eq!(cuda.cuStreamSynchronize(stream), 0);
            assert_eq!(flags.word(2).load(Ordering::Acquire), 4);
            // Copies take the host's address.
            assert_eq!(cuda.cuMemcpyHtoDAsync_v2(device, flags.host.wrapping_add(8), 4, stream), 0);
            let mut found = 0u32;
            assert_eq!(cuda.cuMemcpyDtoHAsync_v2((&raw mut found).cast(), device, 4, stream), 0);
            assert_eq!(found, 4);
            assert_eq!(cuda.cuMemFreeHost(flags.host), 0);
        });
}

#[test]
fn devices_and_memory_are_as_many_as_asked_for() {
    let test = Children::of("devices_and_memory_are_as_many_as_asked_for")
        .env("SMDDP_STANDIN_DEVICES", "2")
        .env("SMDDP_STANDIN_MEMORY", "1000");
    test.run(|_| {
        let raw = Cuda::load();
        let mut number = -1;
        assert_eq!(raw.cuDeviceGetCount(&mut number), 3);
        let (cuda, _) = cuda_on(1);
        assert_eq!((cuda.cuDeviceGetCount(&mut number), number), (0, 2));
        assert_eq!([cuda.cuDeviceGet(&mut number, 2), cuda.cuDeviceGet(&mut number, -1)], [101, 101]);
        let mut address = 0;
        let codes = [600, 401, 400].map(|len| cuda.cuMemAlloc_v2(&mut address, len));
        assert_eq!(codes, [0, 2, 0]);
        let (mut free, mut total) = (1, 1);
        assert_eq!(cuda.cuMemGetInfo_v2(&mut free, &mut total), 0);
        assert_eq!((free, total), (0, 1000));
        let mut name = std::ptr::null();
        assert_eq!(cuda.cuGetErrorName(600, &mut name), 0);
        assert_eq!(text(name), "CUDA_ERROR_NOT_READY");
        assert_eq!(cuda.cuGetErrorName(12345, &mut name), 1);
    });
}

#[test]
fn no_device_is_an_error_of_the_start() {
    Children::of("no_device_is_an_error_of_the_start").env("SMDDP_STANDIN_DEVICES", "0").run(|_| {
        let cuda = Cuda::load();
        assert_eq!(cuda.cuInit(0), 100);
        let mut stream = 0;
        assert_eq!(cuda.cuStreamCreate(&mut stream, 0), 3);
    });
}

#[test]
fn a_context_must_be_current() {
    Children::of("a_context_must_be_current").run(|_| {
        let (cuda, _) = cuda();
        let stream = cuda.stream();
        std::thread::spawn(move || {
            let cuda = Cuda::load();
            let mut address = 0;
            assert_eq!(cuda.cuMemAlloc_v2(&mut address, 8), 201);
            // A stream knows its own.
            assert_eq!(cuda.cuMemAllocAsync(&mut address, 8, stream), 0);
        })
        .join()
        .unwrap();
        assert_eq!(cuda.cuDevicePrimaryCtxRelease_v2(0), 0);
        let mut address = 0;
        assert_eq!(cuda.cuMemAlloc_v2(&mut address, 8), 201);
        assert_eq!(cuda.cuDevicePrimaryCtxRelease_v2(0), 201);
    });
}

#[test]
fn callbacks_may_not_call_the_driver() {
    extern "C" fn callback(data: *mut c_void) {
        // SAFETY: the test waits for the callback before it lets go of what it passed.
        let code = unsafe { &*data.cast::<AtomicI32>() };
        code.store(Cuda::load().cuCtxSynchronize(), Ordering::Release);
    }
    Children::of("callbacks_may_not_call_the_driver").run(|_| {
        let (cuda, _) = cuda();
        let (stream, code) = (cuda.stream(), AtomicI32::new(-1));
        assert_eq!(cuda.cuLaunchHostFunc(stream, callback, (&raw const code).cast_mut().cast()), 0);
        assert_eq!(cuda.cuStreamSynchronize(stream), 0);
        assert_eq!(code.load(Ordering::Acquire), 800);
    });
}

#[test]
fn a_destroyed_stream_still_does_what_it_holds() {
    Children::of("a_destroyed_stream_still_does_what_it_holds").run(|_| {
        let (cuda, _) = cuda();
        let (stream, flags) = (cuda.stream(), cuda.pinned(64));
        assert_eq!(cuda.cuStreamWaitValue32_v2(stream, flags.device, 1, GEQ), 0);
        assert_eq!(cuda.cuStreamWriteValue32_v2(stream, flags.device + 4, 1, 0), 0);
        assert_eq!((cuda.cuStreamDestroy_v2(stream), cuda.cuStreamQuery(stream)), (0, 400));
        flags.word(0).store(1, Ordering::Release);
        until("the rest is done", || flags.word(1).load(Ordering::Acquire) == 1);
    });
}

#[test]
fn host_memory_can_be_labelled_as_a_devices() {
    Children::of("host_memory_can_be_labelled_as_a_devices").run(|_| {
        let (cuda, control) = cuda();
        let (stream, mut own) = (cuda.stream(), vec![0u8; 64]);
        let address = own.as_mut_ptr();
        assert_eq!(cuda.cuMemsetD8Async(address as u64, 1, 64, stream), 1);
        // SAFETY: `own` lives longer than the label.
        unsafe { control.adopt(address, 64, 0) }.unwrap();
        assert_eq!(cuda.cuMemsetD8Async(address as u64, 1, 64, stream), 0);
        assert_eq!(cuda.cuStreamSynchronize(stream), 0);
        control.disown(address).unwrap();
        assert_eq!(own, [1; 64]);
        assert_eq!(control.disown(address), Err(1));
    });
}

/// As the driver: all that a copy goes over, first to last byte, is one allocation's, also where two are neighbours.
#[test]
fn copies_over_two_allocations_are_refused() {
    Children::of("copies_over_two_allocations_are_refused").run(|_| {
        let (cuda, control) = cuda();
        let (stream, host) = (cuda.stream(), cuda.pinned(32));
        let own: &'static mut [u8] = Box::leak(Box::new([7u8; 128]));
        let (first, second) = own.split_at_mut(64);
        let (device, second) = (first.as_mut_ptr(), second.as_mut_ptr());
        for half in [device, second] {
            // SAFETY: leaked, and used by the stream only.
            unsafe { control.adopt(half, 64, 0) }.unwrap();
        }
        // Four rows of eight bytes, evenly spaced.
        let status = |start: u64, pitch: usize, is_to_host: bool| {
            let (host, device) = (Side2d::host(host.host, 8), Side2d::device(start, pitch));
            let (from, to) = if is_to_host { (device, host) } else { (host, device) };
            cuda.cuMemcpy2DAsync_v2(&Copy2d { from, to, width: 8, height: 4 }, stream)
        };
        let device = device as u64;
        for is_to_host in [true, false] {
            // Of the last row only its own bytes count.
            assert_eq!([status(device, 16, is_to_host), status(device + 8, 16, is_to_host)], [0, 0]);
            assert_eq!([status(device + 16, 16, is_to_host), status(device, 32, is_to_host)], [1, 1]);
        }
        assert_eq!(cuda.cuMemcpyDtoHAsync_v2(host.host, device + 48, 32, stream), 1);
        assert_eq!(cuda.cuStreamSynchronize(stream), 0);
        assert_eq!(host.bytes(), [7; 32]);
    });
}
