//! Measuring on CUDA memory.
//!
//! A batch is enqueued behind a barrier; its time is that until the device has done it, and the host's part that until
//! the last call has returned. Beside it, where calls pass pinned memory: the copies they need at the least, both ways
//! at once, and the same call on the host's memory, which is what network and reduction take.

use std::path::Path;
use std::time::Instant;

use smddp::cuda::{DeviceCall, Memory, Path as Way};
use smddp::{Collective, DType, DeviceGroup, Error, Region, Result, World};
use smddp_cuda_sys::{Driver, STREAM_NON_BLOCKING, SUCCESS, Status, Stream};

use crate::measure::{self, Effort, repetitions, slowest};
use crate::row::{OnDevice, Row};
use crate::workload::{Aligned, Kind, Sample, Workload, shape};

/// This rank's device, and the world's calls on it.
pub struct Gpu {
    driver: Driver,
    group: DeviceGroup,
    /// The second one copies against the first.
    streams: [Stream; 2],
}

impl Gpu {
    /// The device of the local rank, counted from 0 again where there are more ranks. Every rank calls it.
    pub fn open(world: &World, driver: Option<&Path>) -> Result<Gpu> {
        let library = |reason: String| Error::Library {
            library: "the CUDA driver",
            reason,
            hint: "--device cpu needs none of it".to_owned(),
        };
        if let Some(file) = driver {
            smddp::cuda::use_driver(file.as_os_str())?;
        }
        let driver = driver.map_or_else(Driver::load, |file| Driver::load_file(file.as_os_str()));
        let driver = driver.map_err(|e| library(e.to_string()))?;
        let (mut devices, mut handle) = (0, 0);
        let (mut context, mut streams) = (std::ptr::null_mut(), [std::ptr::null_mut(); 2]);
        // SAFETY: places for what the driver gives; the context is held until the process ends.
        unsafe {
            check(&driver, "starting the driver", (driver.init)(0))?;
            check(&driver, "counting devices", (driver.device_count)(&raw mut devices))?;
            let ordinal = world.local_rank() as i32 % devices.max(1);
            check(&driver, "finding the device", (driver.device_get)(&raw mut handle, ordinal))?;
            check(&driver, "opening the device", (driver.primary_retain)(&raw mut context, handle))?;
            let group = world.on_device(ordinal)?;
            check(&driver, "entering the device's context", (driver.ctx_set)(context))?;
            for stream in &mut streams {
                let made = (driver.stream_create)(stream, STREAM_NON_BLOCKING, 0);
                check(&driver, "making a stream", made)?;
            }
            Ok(Gpu { driver, group, streams })
        }
    }

    pub fn describe(&self) -> String {
        self.group.describe()
    }

    pub fn end(&self) {
        self.group.shutdown();
    }

    /// Measures one size. `Ok(None)` when the size holds no whole element or block.
    pub fn measure(
        &self,
        world: &World,
        kind: Kind,
        dtype: DType,
        bytes: usize,
        effort: Effort,
    ) -> Result<Option<Row>> {
        let Some((count, block)) = shape(kind.collective, dtype, bytes, world.size()) else {
            return Ok(None);
        };
        let (mut row, mut device) = match dtype {
            DType::Bool => self.timed::<bool>(world, kind, count, block, effort),
            DType::U8 => self.timed::<u8>(world, kind, count, block, effort),
            DType::I8 => self.timed::<i8>(world, kind, count, block, effort),
            DType::I16 => self.timed::<i16>(world, kind, count, block, effort),
            DType::I32 => self.timed::<i32>(world, kind, count, block, effort),
            DType::I64 => self.timed::<i64>(world, kind, count, block, effort),
            DType::F16 => self.timed::<half::f16>(world, kind, count, block, effort),
            DType::BF16 => self.timed::<half::bf16>(world, kind, count, block, effort),
            DType::F32 => self.timed::<f32>(world, kind, count, block, effort),
            DType::F64 => self.timed::<f64>(world, kind, count, block, effort),
        }?;
        let staged = match self.group.path() {
            Way::Staged => Some(1),
            Way::Hierarchical => Some(world.local_size()),
            Way::Nccl | Way::Alone => None,
        };
        if let Some(share) = staged {
            let (down, up) = staged_bytes(world, kind, count * dtype.size());
            device.copies = Some(self.copies(world, (down / share, up / share), effort.budget)?);
        }
        // Between nodes a share of the call is on its way on each rail: another call than the host's.
        if staged == Some(1) {
            device.on_host = measure::measure(world, kind, dtype, bytes, effort)?.map(|r| r.median);
        }
        row.device = Some(device);
        Ok(Some(row))
    }

    fn timed<T: Sample>(
        &self,
        world: &World,
        kind: Kind,
        count: usize,
        block: usize,
        effort: Effort,
    ) -> Result<(Row, OnDevice)> {
        let mut work = Workload::<T>::new(world, kind, count, block)?;
        let (x, y) = work.regions();
        let (on_x, on_y) = (self.buffer(x.len())?, self.buffer(y.len())?);
        let call = call_of::<T>(kind, (count, block), on_x.memory, on_y.memory);
        let first = self.checked(&mut work, &call, (&on_x, &on_y))?;
        work.clear();
        let (x, y) = work.regions();
        self.up(&on_x, x)?;
        self.up(&on_y, y)?;

        for _ in 0..3 {
            self.start(&call)?;
        }
        self.synchronize()?;
        let estimate = slowest(world, &mut [self.batch(world, &call, 2)?.1])?;
        let (calls, batches) = repetitions(estimate, effort);
        let (mut hosts, mut wholes) = (vec![0.0; batches], vec![0.0; batches]);
        for (host, whole) in hosts.iter_mut().zip(&mut wholes) {
            (*host, *whole) = self.batch(world, &call, calls)?;
        }
        slowest(world, &mut hosts)?;
        slowest(world, &mut wholes)?;
        let last = self.checked(&mut work, &call, (&on_x, &on_y))?;
        hosts.sort_by(f64::total_cmp);
        wholes.sort_by(f64::total_cmp);
        let row = Row {
            collective: kind.collective,
            dtype: T::DTYPE,
            op: kind.op,
            root: kind.root,
            world: world.size(),
            bytes: count * size_of::<T>(),
            count,
            calls: calls * batches,
            median: wholes[batches / 2],
            fastest: wholes[0],
            right: Some(measure::all_right(world, first && last)?),
            algorithm: way(self.group.path()).to_owned(),
            device: None,
        };
        Ok((row, OnDevice { host: hosts[batches / 2], copies: None, on_host: None }))
    }

    /// Makes a call on fresh data: whether its result on this rank is right.
    fn checked<T: Sample>(
        &self,
        work: &mut Workload<'_, T>,
        call: &DeviceCall,
        (on_x, on_y): (&Buffer<'_>, &Buffer<'_>),
    ) -> Result<bool> {
        work.fill();
        let (x, y) = work.regions();
        self.up(on_x, x)?;
        self.up(on_y, y)?;
        self.start(call)?;
        self.down(on_x, x)?;
        self.down(on_y, y)?;
        Ok(work.check())
    }

    /// Seconds a call, of the host and until the device has done them, over `calls` calls behind a barrier.
    fn batch(&self, world: &World, call: &DeviceCall, calls: usize) -> Result<(f64, f64)> {
        world.barrier()?;
        let start = Instant::now();
        for _ in 0..calls {
            self.start(call)?;
        }
        let host = start.elapsed();
        self.synchronize()?;
        let each = |time: std::time::Duration| time.as_secs_f64() / calls as f64;
        Ok((each(host), each(start.elapsed())))
    }

    fn start(&self, call: &DeviceCall) -> Result<()> {
        // SAFETY: the buffers outlive the calls: whoever frees them synchronizes first (`Buffer`).
        unsafe { self.group.start(call, self.streams[0].addr() as u64, None) }.map(|_| ())
    }

    /// Seconds of copies of so many bytes to the host and to the device, both at once, on all ranks at once.
    fn copies(&self, world: &World, (down, up): (usize, usize), budget: f64) -> Result<f64> {
        let (from, to) = (self.buffer(down)?, self.buffer(up)?);
        let (down, up) = (self.pinned(down)?, self.pinned(up)?);
        let both = || -> Result<f64> {
            world.barrier()?;
            let start = Instant::now();
            let d = &self.driver;
            // SAFETY: ranges of these lengths, which stay until both streams are past the copies.
            unsafe {
                let (place, len) = (down.region.as_ptr().cast(), down.region.len());
                let copied = (d.copy_to_host)(place, from.memory.address, len, self.streams[0]);
                self.check("copying to the host", copied)?;
                let (place, len) = (up.region.as_ptr().cast(), up.region.len());
                let copied = (d.copy_to_device)(to.memory.address, place, len, self.streams[1]);
                self.check("copying to the device", copied)?;
            }
            self.synchronize()?;
            Ok(start.elapsed().as_secs_f64())
        };
        both()?;
        let estimate = slowest(world, &mut [both()?])?;
        let mut times = vec![0.0; ((budget / estimate) as usize).clamp(5, 101)];
        for time in &mut times {
            *time = both()?;
        }
        slowest(world, &mut times)?;
        times.sort_by(f64::total_cmp);
        Ok(times[times.len() / 2])
    }

    fn buffer(&self, bytes: usize) -> Result<Buffer<'_>> {
        let mut address = 0;
        if bytes > 0 {
            // SAFETY: a place for the address, freed in drop.
            let status = unsafe { (self.driver.memory_allocate)(&raw mut address, bytes) };
            self.check("allocating device memory", status)?;
        }
        Ok(Buffer { gpu: self, memory: Memory { address, bytes } })
    }

    fn pinned(&self, bytes: usize) -> Result<Pinned<'_>> {
        const PAGE: usize = 4096;
        let mut store = Aligned::new(bytes.max(1).next_multiple_of(PAGE));
        // SAFETY: memory of `store`, which is kept beside it.
        let region = unsafe { Region::of(store.get_mut()) };
        // SAFETY: memory of `store`, unregistered before it is freed.
        let status = unsafe { (self.driver.host_register)(region.as_ptr().cast(), region.len(), 1) };
        self.check("pinning memory", status)?;
        Ok(Pinned { gpu: self, region: region.slice(0, bytes), _store: store })
    }

    fn up(&self, to: &Buffer<'_>, from: Region) -> Result<()> {
        if from.is_empty() {
            return Ok(());
        }
        let (at, place) = (to.memory.address, from.as_ptr().cast());
        // SAFETY: ranges of one length; the stream is waited for before either is used otherwise.
        let status = unsafe { (self.driver.copy_to_device)(at, place, from.len(), self.streams[0]) };
        self.check("copying to the device", status)?;
        self.synchronize()
    }

    fn down(&self, from: &Buffer<'_>, to: Region) -> Result<()> {
        if to.is_empty() {
            return Ok(());
        }
        let (at, place) = (from.memory.address, to.as_ptr().cast());
        // SAFETY: as in `up`.
        let status = unsafe { (self.driver.copy_to_host)(place, at, to.len(), self.streams[0]) };
        self.check("copying to the host", status)?;
        self.synchronize()
    }

    /// Waits for what both streams were given; a group that fails releases them.
    fn synchronize(&self) -> Result<()> {
        for stream in self.streams {
            // SAFETY: our stream.
            self.check("waiting for the device", unsafe { (self.driver.stream_synchronize)(stream) })?;
        }
        self.group.failure().map_or(Ok(()), Err)
    }

    fn check(&self, what: &str, status: Status) -> Result<()> {
        check(&self.driver, what, status)
    }
}

/// Device memory; its streams are idle, or the process is about to end, when it is dropped.
struct Buffer<'a> {
    gpu: &'a Gpu,
    memory: Memory,
}

impl Drop for Buffer<'_> {
    fn drop(&mut self) {
        // SAFETY: allocated by `buffer`; freeing waits for the device.
        let _ = unsafe { (self.gpu.driver.memory_free)(self.memory.address) };
    }
}

struct Pinned<'a> {
    gpu: &'a Gpu,
    region: Region,
    _store: Aligned<u8>,
}

impl Drop for Pinned<'_> {
    fn drop(&mut self) {
        // SAFETY: registered by `pinned`, and freed only behind this.
        let _ = unsafe { (self.gpu.driver.host_unregister)(self.region.as_ptr().cast()) };
    }
}

fn check(driver: &Driver, what: &str, status: Status) -> Result<()> {
    if status == SUCCESS {
        return Ok(());
    }
    Err(Error::Transport { transport: "CUDA", reason: format!("{what}: {}", driver.explain(status)) })
}

fn way(path: Way) -> &'static str {
    match path {
        Way::Nccl => "nccl",
        Way::Hierarchical => "nccl and staged",
        Way::Staged => "staged",
        Way::Alone => "copy",
    }
}

/// The call on the buffers as [`Workload`] has them.
fn call_of<T: Sample>(kind: Kind, (count, block): (usize, usize), x: Memory, y: Memory) -> DeviceCall {
    let (input, output) = match kind.collective {
        Collective::ReduceScatter | Collective::AllToAll | Collective::Scatter => (x, y),
        Collective::AllGather | Collective::Gather => (y, x),
        _ => (x, x),
    };
    let is_whole =
        matches!(kind.collective, Collective::AllReduce | Collective::Broadcast | Collective::Reduce);
    DeviceCall {
        collective: kind.collective,
        dtype: T::DTYPE,
        op: kind.op,
        root: kind.root,
        count: if is_whole { count } else { block },
        input,
        output,
        counts: None,
        splits: None,
        timeout: None,
    }
}

/// What a rank copies to the host and to the device for a call of so many bytes.
fn staged_bytes(world: &World, kind: Kind, bytes: usize) -> (usize, usize) {
    let (block, is_root) = (bytes / world.size(), world.rank() == kind.root);
    let some = |wanted: bool, bytes| if wanted { bytes } else { 0 };
    match kind.collective {
        Collective::ReduceScatter => (bytes, block),
        Collective::AllGather => (block, bytes),
        Collective::Broadcast => (some(is_root, bytes), some(!is_root, bytes)),
        Collective::Reduce => (bytes, some(is_root, bytes)),
        Collective::Gather => (block, some(is_root, bytes)),
        Collective::Scatter => (some(is_root, bytes), block),
        _ => (bytes, bytes),
    }
}
