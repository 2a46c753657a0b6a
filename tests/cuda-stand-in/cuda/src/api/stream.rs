//! Streams, events and memory operations.

use crate::capture;
use crate::code::{Code, Result};
use crate::context;
use crate::entry::{In, InOut, Out, api, driver_shared, lasting_error};
use crate::event;
use crate::memops::{self, BatchParams, MemOp, Width};
use crate::stream::Kind;
use std::ffi::{c_int, c_uint, c_void};

type HostFn = extern "C" fn(*mut c_void);

/// What a host function is called with; it is the caller's to share between threads.
struct UserData(*mut c_void);

// SAFETY: cuLaunchHostFunc calls back on another thread by its contract.
unsafe impl Send for UserData {}

impl UserData {
    fn pass_to(&self, function: HostFn) {
        function(self.0);
    }
}

fn create(out: &Out<usize>, flags: c_uint, priority: c_int) -> Result {
    let device = context::current()?;
    let kind = match flags {
        0 => Kind::Blocking,
        1 => Kind::NonBlocking,
        _ => return Err(Code::INVALID_VALUE),
    };
    // Out of range is clamped, as cuda.h says.
    out.set(device.create_stream(kind, priority.clamp(-5, 0)).handle())
}

fn wait_event(stream: usize, event: usize, flags: c_uint) -> Result {
    if flags > 1 {
        return Err(Code::INVALID_VALUE);
    }
    let (event, stream) = (event::find(event)?, context::stream(stream)?);
    event.hold(&stream);
    Ok(())
}

fn record(event: usize, stream: usize) -> Result {
    let (event, stream) = (event::find(event)?, context::stream(stream)?);
    event.record(&stream);
    Ok(())
}

api! {
    fn cuStreamCreate(out: Out<usize>, flags: c_uint) {
        create(&out, flags, 0)
    }

    fn cuStreamCreateWithPriority(out: Out<usize>, flags: c_uint, priority: c_int) {
        create(&out, flags, priority)
    }

    fn cuStreamDestroy_v2(stream: usize) {
        context::destroy_stream(stream)
    }

    fn cuStreamSynchronize(stream: usize) {
        let stream = context::stream(stream)?;
        stream.synchronize(stream.place())
    }

    fn cuStreamQuery(stream: usize) {
        let _driver = driver_shared();
        capture::refuse()?;
        let stream = context::stream(stream)?;
        if !stream.is_done(stream.place()) {
            return Err(Code::NOT_READY);
        }
        lasting_error().map_or(Ok(()), |(code, _)| Err(code))
    }

    fn cuStreamWaitEvent(stream: usize, event: usize, flags: c_uint) {
        wait_event(stream, event, flags)
    }

    fn cuStreamGetPriority(stream: usize, out: Out<c_int>) {
        out.set(context::stream(stream)?.priority)
    }

    fn cuStreamGetFlags(stream: usize, out: Out<c_uint>) {
        out.set(c_uint::from(context::stream(stream)?.kind == Kind::NonBlocking))
    }

    fn cuStreamGetCtx(stream: usize, out: Out<usize>) {
        out.set(context::stream(stream)?.device().context())
    }

    fn cuStreamGetDevice(stream: usize, out: Out<c_int>) {
        out.set(context::stream(stream)?.device().ordinal)
    }

    fn cuStreamGetId(stream: usize, out: Out<u64>) {
        out.set(context::stream(stream)?.serial())
    }

    /// Capture is not there: a stream captures when a test says that it does.
    fn cuStreamIsCapturing(stream: usize, out: Out<c_int>) {
        out.set(c_int::from(context::stream(stream)?.is_capturing()))
    }

    fn cuThreadExchangeStreamCaptureMode(mode: InOut<c_int>) {
        mode.set(capture::exchange_mode(mode.get()?)?)
    }

    fn cuStreamBeginCapture_v2(_stream: usize, _mode: c_int) {
        Err(Code::NOT_SUPPORTED)
    }

    fn cuLaunchHostFunc(stream: usize, function: Option<HostFn>, data: *mut c_void) {
        let stream = context::stream(stream)?;
        let function = function.ok_or(Code::INVALID_VALUE)?;
        let data = UserData(data);
        stream.enqueue("cuLaunchHostFunc", move || {
            data.pass_to(function);
            Ok(())
        });
        Ok(())
    }

    fn cuEventCreate(out: Out<usize>, flags: c_uint) {
        context::current()?;
        out.set(event::create(flags)?)
    }

    fn cuEventDestroy_v2(event: usize) {
        event::destroy(event)
    }

    fn cuEventRecord(event: usize, stream: usize) {
        record(event, stream)
    }

    fn cuEventRecordWithFlags(event: usize, stream: usize, flags: c_uint) {
        if flags > 1 {
            return Err(Code::INVALID_VALUE);
        }
        record(event, stream)
    }

    fn cuEventQuery(event: usize) {
        let _driver = driver_shared();
        capture::refuse()?;
        event::find(event)?.query()
    }

    fn cuEventSynchronize(event: usize) {
        event::find(event)?.synchronize()
    }

    fn cuEventElapsedTime(out: Out<f32>, start: usize, end: usize) {
        out.set(event::find(start)?.milliseconds_to(&*event::find(end)?)?)
    }

    fn cuEventElapsedTime_v2(out: Out<f32>, start: usize, end: usize) {
        out.set(event::find(start)?.milliseconds_to(&*event::find(end)?)?)
    }

    fn cuStreamWaitValue32_v2(stream: usize, address: u64, value: u32, flags: c_uint) {
        let op = MemOp::wait(address, Width::W32, value.into(), flags);
        memops::queue_one(stream, "cuStreamWaitValue32", op)
    }

    fn cuStreamWriteValue32_v2(stream: usize, address: u64, value: u32, flags: c_uint) {
        let op = MemOp::write(address, Width::W32, value.into(), flags);
        memops::queue_one(stream, "cuStreamWriteValue32", op)
    }

    fn cuStreamWaitValue64_v2(stream: usize, address: u64, value: u64, flags: c_uint) {
        let op = MemOp::wait(address, Width::W64, value, flags);
        memops::queue_one(stream, "cuStreamWaitValue64", op)
    }

    fn cuStreamWriteValue64_v2(stream: usize, address: u64, value: u64, flags: c_uint) {
        let op = MemOp::write(address, Width::W64, value, flags);
        memops::queue_one(stream, "cuStreamWriteValue64", op)
    }

    fn cuStreamBatchMemOp_v2(stream: usize, count: c_uint, params: In<BatchParams>, flags: c_uint) {
        let stream = context::stream(stream)?;
        if count > 255 || flags != 0 {
            return Err(Code::INVALID_VALUE);
        }
        let ops = params.read(count as usize)?;
        let ops = ops.iter().map(memops::parse_batch).collect::<Result<Vec<_>>>()?;
        memops::queue(&stream, "cuStreamBatchMemOp", ops);
        Ok(())
    }
}
