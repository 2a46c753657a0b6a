//! The stand-in for the driver keeps the orders that CUDA promises, and no others.

mod common;

use common::*;
use smddp_standin::Children;
use std::sync::atomic::Ordering;

#[test]
fn streams_keep_order_and_wait_for_values() {
    Children::of("streams_keep_order_and_wait_for_values").run(|_| {
        let (cuda, control) = cuda();
        let (stream, flags) = (cuda.stream(), cuda.pinned(64));
        let device = cuda.alloc(8);
        let host = cuda.pinned(8);
        assert_eq!(cuda.cuMemsetD8Async(device, 1, 8, stream), 0);
        assert_eq!(cuda.cuStreamWaitValue32_v2(stream, flags.device, 5, 0), 0);
        assert_eq!(cuda.cuMemcpyDtoHAsync_v2(host.host, device, 8, stream), 0);
        assert_eq!(cuda.cuStreamWriteValue32_v2(stream, flags.device + 4, 9, 0), 0);
        until("the wait is reached", || control.parked() == 1);
        assert_eq!((cuda.cuStreamQuery(stream), flags.word(1).load(Ordering::Acquire)), (600, 0));
        assert_eq!(host.bytes(), [0; 8]);
        flags.word(0).store(6, Ordering::Release);
        until("the value is written", || flags.word(1).load(Ordering::Acquire) == 9);
        assert_eq!(host.bytes(), [1; 8]);
        assert_eq!(cuda.cuStreamSynchronize(stream), 0);
    });
}
