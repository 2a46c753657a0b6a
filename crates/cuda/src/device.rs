//! One CUDA device: its primary context, streams and events. Errors are core's.

use std::ffi::{CStr, c_char, c_void};
use std::sync::{Arc, Mutex};

use smddp_core::{Error, Result};
use smddp_cuda_sys as sys;
use sys::{Driver, Status};

/// Loaded at first use and kept. Nothing is remembered of a failure: the next try may find a driver.
static DRIVER: Mutex<Option<Arc<Driver>>> = Mutex::new(None);

/// The machine's driver, started.
fn driver() -> Result<Arc<Driver>> {
    let place =
        DRIVER.lock().map_err(|_| Error::Internal("loading the CUDA driver panicked before".to_owned()))?;
    if let Some(driver) = place.as_ref() {
        return Ok(Arc::clone(driver));
    }
    drop(place);
    start(Driver::load().map_err(|e| library(e.to_string()))?)
}

fn start(driver: Driver) -> Result<Arc<Driver>> {
    // SAFETY: may be called at any time, by any thread, more than once.
    let status = unsafe { (driver.init)(0) };
    if status != sys::SUCCESS {
        return Err(library(driver.explain(status)));
    }
    let driver = Arc::new(driver);
    if let Ok(mut place) = DRIVER.lock() {
        *place = Some(Arc::clone(&driver));
    }
    Ok(driver)
}

/// Takes the driver from a file of this name, whatever the machine has. For tests, before the first use.
#[doc(hidden)]
pub fn use_driver(file: &std::ffi::OsStr) -> Result<()> {
    start(Driver::load_file(file).map_err(|e| library(e.to_string()))?).map(|_| ())
}

fn library(reason: String) -> Error {
    Error::Library {
        library: "the CUDA driver",
        reason,
        hint: "Tensors on the CPU need none of it".to_owned(),
    }
}

/// A device with its primary context held.
pub struct Device {
    pub(crate) driver: Arc<Driver>,
    pub(crate) ordinal: i32,
    handle: sys::Device,
    context: sys::Context,
}

// SAFETY: the context is the process's own and may be made current on any thread.
unsafe impl Send for Device {}
// SAFETY: as above; the driver's functions are thread-safe.
unsafe impl Sync for Device {}

impl Device {
    /// The device of this number, as CUDA_VISIBLE_DEVICES lets this process count them.
    pub fn open(ordinal: i32) -> Result<Arc<Device>> {
        let driver = driver()?;
        let (mut handle, mut context) = (0, std::ptr::null_mut());
        // SAFETY: a place for the device's handle.
        check(&driver, "finding the device", unsafe { (driver.device_get)(&raw mut handle, ordinal) })?;
        // SAFETY: a place for the context, released in drop.
        check(&driver, "opening the device", unsafe { (driver.primary_retain)(&raw mut context, handle) })?;
        Ok(Arc::new(Device { driver, ordinal, handle, context }))
    }

    /// Makes the device's context this thread's, as all calls below need, and its capture mode relaxed: else what asks the device, or
    /// makes memory, fails while any thread captures a graph as torch does, and ends that capture. For threads of our own:
    /// the program's have a current device and a mode, which [`visit`](Self::visit) leaves as they were.
    pub(crate) fn enter(&self) -> Result<()> {
        self.relax()?;
        // SAFETY: the context is held as long as this object lives.
        self.check("entering the device's context", unsafe { (self.driver.ctx_set)(self.context) })
    }

    /// As [`enter`](Self::enter), until what it gives is dropped.
    pub(crate) fn visit(&self) -> Result<Visit> {
        let mut before = std::ptr::null_mut();
        // SAFETY: a place for the context.
        self.check("asking for the thread's context", unsafe { (self.driver.ctx_current)(&raw mut before) })?;
        let before = (before != self.context).then_some(before);
        let visit = Visit { driver: Arc::clone(&self.driver), before, mode: self.relax()? };
        if before.is_some() {
            self.enter()?;
        }
        Ok(visit)
    }

    /// Relaxes this thread's capture mode; the one before.
    fn relax(&self) -> Result<i32> {
        let mut mode = sys::CAPTURE_MODE_RELAXED;
        // SAFETY: a place for the mode wanted, and for the one before.
        let status = unsafe { (self.driver.capture_mode)(&raw mut mode) };
        self.check("setting the thread's capture mode", status)?;
        Ok(mode)
    }

    pub(crate) fn check(&self, what: &str, status: Status) -> Result<()> {
        check(&self.driver, what, status)
    }

    /// Where the device sits, e.g. "0000:17:00.0": equal for two ranks that share it.
    pub fn bus_id(&self) -> Result<String> {
        let mut text = [0 as c_char; 32];
        // SAFETY: room for 32 bytes, terminated by the driver.
        let status = unsafe { (self.driver.device_bus_id)(text.as_mut_ptr(), 32, self.handle) };
        self.check("asking where the device sits", status)?;
        // SAFETY: terminated, as above.
        Ok(unsafe { CStr::from_ptr(text.as_ptr()) }.to_string_lossy().into_owned())
    }

    fn attribute(&self, wanted: i32) -> Result<i32> {
        let mut value = 0;
        // SAFETY: a place for the answer.
        let status = unsafe { (self.driver.device_attribute)(&raw mut value, wanted, self.handle) };
        self.check("asking what the device can do", status)?;
        Ok(value)
    }

    /// How a stream of the device comes to see what a NIC has written to its memory; why it cannot.
    pub(crate) fn direct_access(&self) -> Result<std::result::Result<Arrival, &'static str>> {
        const BY_THE_DEVICE: i32 = 100;
        let can = |wanted| self.attribute(wanted).map(|value| value > 0);
        if !can(sys::GPU_DIRECT_RDMA_SUPPORTED)? && !can(sys::DMA_BUF_SUPPORTED)? {
            return Ok(Err("this device's driver does not let others at its memory"));
        }
        // What the device says of the order of writes is of those that come over PCIe. The words come over the other link.
        if can(sys::PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES)? {
            return Ok(Err(
                "host and device have a link of their own (NVLink-C2C), whose words may overtake a NIC's data",
            ));
        }
        if self.attribute(sys::GPU_DIRECT_RDMA_WRITES_ORDERING)? >= BY_THE_DEVICE {
            return Ok(Ok(Arrival::InOrder));
        }
        let flushes = can(sys::CAN_FLUSH_REMOTE_WRITES)?.then_some(Arrival::Flushed);
        Ok(flushes.ok_or("this device neither keeps the order of a NIC's writes nor flushes them"))
    }

    pub(crate) fn is_capturing(&self, stream: sys::Stream) -> Result<bool> {
        let mut state = 0;
        // SAFETY: a stream of this device (the caller's contract) and a place for the answer.
        let status = unsafe { (self.driver.stream_is_capturing)(stream, &raw mut state) };
        self.check("asking whether a graph is being captured", status)?;
        Ok(state != 0)
    }

    pub(crate) fn copy_on_device(&self, to: u64, from: u64, bytes: usize, stream: sys::Stream) -> Result<()> {
        if to == from || bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller of the group's `start` vouches for both ranges until the stream is past this.
        let status = unsafe { (self.driver.copy_on_device)(to, from, bytes, stream) };
        self.check("copying on the device", status)
    }
}

/// A device's context, and the relaxed mode, on a thread of the program's.
#[must_use]
pub(crate) struct Visit {
    driver: Arc<Driver>,
    /// The thread's context before, where it was another, or none (null).
    before: Option<sys::Context>,
    /// The thread's capture mode before.
    mode: i32,
}

impl Drop for Visit {
    fn drop(&mut self) {
        // SAFETY: a place for a mode, which holds the thread's own before (`before`, a pointer, keeps it on that thread).
        let _ = unsafe { (self.driver.capture_mode)(&raw mut self.mode) };
        if let Some(before) = self.before {
            // SAFETY: the thread's own context when the visit began (the pointer keeps it on that thread); the driver
            // refuses one that has been destroyed since.
            let _ = unsafe { (self.driver.ctx_set)(before) };
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: retained once in `open`. A process that is ending may have no driver any more: nothing to do then.
        let _ = unsafe { (self.driver.primary_release)(self.handle) };
    }
}

fn check(driver: &Driver, what: &str, status: Status) -> Result<()> {
    if status == sys::SUCCESS {
        return Ok(());
    }
    Err(Error::Transport { transport: "CUDA", reason: format!("{what}: {}", driver.explain(status)) })
}

/// How a stream that waits for a word comes to see what was written to the device's memory before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arrival {
    /// Writes of others arrive in order.
    InOrder,
    /// The stream must say that it wants to see them.
    Flushed,
}

/// Rows of device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rows {
    start: u64,
    /// Bytes from one to the next.
    pitch: usize,
}

impl Rows {
    /// `rows` rows of `width` bytes at these places; none: they are not spaced so that one copy takes them.
    pub(crate) fn at(place: &dyn Fn(usize) -> u64, rows: usize, width: usize) -> Option<Rows> {
        let start = place(0);
        if rows < 2 {
            return Some(Rows { start, pitch: width });
        }
        let pitch = usize::try_from(place(1).checked_sub(start)?).ok()?;
        let is_even = || (2..rows).all(|row| place(row) == start + (row * pitch) as u64);
        ((width..=sys::MAX_PITCH).contains(&pitch) && is_even()).then_some(Rows { start, pitch })
    }

    fn side(self) -> sys::Side2d {
        let (memory, none) = (sys::MEMORY_DEVICE, std::ptr::null_mut());
        sys::Side2d { x: 0, y: 0, memory, host: none, device: self.start, array: none, pitch: self.pitch }
    }
}

/// Rows on the host that follow one another.
fn dense(start: *mut u8, width: usize) -> sys::Side2d {
    let (memory, array) = (sys::MEMORY_HOST, std::ptr::null_mut());
    sys::Side2d { x: 0, y: 0, memory, host: start.cast(), device: 0, array, pitch: width }
}

/// A stream of our own, which the default stream does not wait for.
pub(crate) struct Stream {
    device: Arc<Device>,
    pub(crate) raw: sys::Stream,
}

// SAFETY: streams may be used from any thread.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    /// The device must have been entered.
    pub(crate) fn new(device: &Arc<Device>) -> Result<Stream> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: a place for the stream, destroyed in drop. Lower numbers go first: ahead of the user's kernels.
        let status = unsafe { (device.driver.stream_create)(&raw mut raw, sys::STREAM_NON_BLOCKING, -1) };
        device.check("making a stream", status)?;
        Ok(Stream { device: Arc::clone(device), raw })
    }

    pub(crate) fn wait(&self, event: &Event) -> Result<()> {
        wait(&self.device, self.raw, event)
    }

    pub(crate) fn copy_to_host(&self, to: *mut u8, from: u64, bytes: usize) -> Result<()> {
        // Whose part of a call is empty may have no memory for it.
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: `to` is a piece of a slot (C4) or of memory borrowed for the call, which stays until this stream is past
        // the copy, or for good; the device range is vouched for by the caller of the group's `start`.
        let status = unsafe { (self.device.driver.copy_to_host)(to.cast::<c_void>(), from, bytes, self.raw) };
        self.device.check("copying to the host", status)
    }

    pub(crate) fn copy_to_device(&self, to: u64, from: *const u8, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: as in `copy_to_host`.
        let status =
            unsafe { (self.device.driver.copy_to_device)(to, from.cast::<c_void>(), bytes, self.raw) };
        self.device.check("copying to the device", status)
    }

    /// Copies `rows` rows of `width` bytes, the device's `pitch` bytes apart, to where they follow one another.
    pub(crate) fn rows_to_host(&self, to: *mut u8, from: Rows, (rows, width): (usize, usize)) -> Result<()> {
        if from.pitch == width {
            return self.copy_to_host(to, from.start, rows * width);
        }
        let copy = sys::Copy2d { from: from.side(), to: dense(to, width), width, height: rows };
        self.copy_rows("copying rows to the host", &copy)
    }

    /// As [`rows_to_host`](Self::rows_to_host), the other way round.
    pub(crate) fn rows_to_device(
        &self,
        to: Rows,
        from: *const u8,
        (rows, width): (usize, usize),
    ) -> Result<()> {
        if to.pitch == width {
            return self.copy_to_device(to.start, from, rows * width);
        }
        let copy = sys::Copy2d { from: dense(from.cast_mut(), width), to: to.side(), width, height: rows };
        self.copy_rows("copying rows to the device", &copy)
    }

    fn copy_rows(&self, what: &str, copy: &sys::Copy2d) -> Result<()> {
        // SAFETY: as in `copy_to_host`, for each row.
        self.device.check(what, unsafe { (self.device.driver.copy_rows)(copy, self.raw) })
    }

    pub(crate) fn write_word(&self, at: u64, value: u32) -> Result<()> {
        // SAFETY: `at` is the device's address of a registered word that outlives the stream's work, for good if need be.
        let status =
            unsafe { (self.device.driver.stream_write_value)(self.raw, at, value, sys::WRITE_VALUE_DEFAULT) };
        self.device.check("writing a word from a stream", status)
    }

    /// What the device's memory holds of others' writes before the word is seen behind it as `arrival` says.
    pub(crate) fn wait_word(&self, at: u64, value: u32, arrival: Arrival) -> Result<()> {
        let flags = match arrival {
            Arrival::InOrder => sys::WAIT_VALUE_GEQ,
            Arrival::Flushed => sys::WAIT_VALUE_GEQ | sys::WAIT_VALUE_FLUSH,
        };
        // SAFETY: as in `write_word`.
        let status = unsafe { (self.device.driver.stream_wait_value)(self.raw, at, value, flags) };
        self.device.check("waiting for a word in a stream", status)
    }

    /// Whether everything enqueued so far is done.
    pub(crate) fn is_idle(&self) -> Result<bool> {
        // SAFETY: our own stream.
        match unsafe { (self.device.driver.stream_query)(self.raw) } {
            sys::NOT_READY => Ok(false),
            status => self.device.check("asking a stream", status).map(|()| true),
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: made in `new`; the driver finishes what is enqueued.
        let _ = unsafe { (self.device.driver.stream_destroy)(self.raw) };
    }
}

/// Device memory of our own.
pub(crate) struct DeviceMemory {
    device: Arc<Device>,
    pub(crate) address: u64,
}

impl DeviceMemory {
    /// The device must have been entered.
    pub(crate) fn new(device: &Arc<Device>, bytes: usize) -> Result<DeviceMemory> {
        let mut address = 0;
        // SAFETY: a place for the address, freed in drop.
        let status = unsafe { (device.driver.memory_allocate)(&raw mut address, bytes) };
        if status != sys::SUCCESS {
            return Err(Error::Resource {
                what: "staging for CUDA tensors".to_owned(),
                resource: "device memory",
                reason: format!("{bytes} bytes: {}", device.driver.explain(status)),
                hint:
                    "Lower SMDDP_CUDA_SLOT or SMDDP_CUDA_SLOTS, or make the group before the device is full"
                        .to_owned(),
            });
        }
        Ok(DeviceMemory { device: Arc::clone(device), address })
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        if let Ok(_visit) = self.device.visit() {
            // SAFETY: allocated in `new`; its user drops it only when the device is done with it.
            let _ = unsafe { (self.device.driver.memory_free)(self.address) };
        }
    }
}

/// Orders streams among each other.
pub(crate) struct Event {
    device: Arc<Device>,
    raw: sys::Event,
}

// SAFETY: events may be used from any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// The device must have been entered.
    pub(crate) fn new(device: &Arc<Device>) -> Result<Event> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: a place for the event, destroyed in drop.
        let status = unsafe { (device.driver.event_create)(&raw mut raw, sys::EVENT_DISABLE_TIMING) };
        device.check("making an event", status)?;
        Ok(Event { device: Arc::clone(device), raw })
    }

    pub(crate) fn record(&self, stream: sys::Stream) -> Result<()> {
        // SAFETY: our event, on a stream of its device.
        self.device
            .check("recording an event", unsafe { (self.device.driver.event_record)(self.raw, stream) })
    }

    pub(crate) fn is_done(&self) -> Result<bool> {
        // SAFETY: our event. One never recorded is done.
        match unsafe { (self.device.driver.event_query)(self.raw) } {
            sys::NOT_READY => Ok(false),
            status => self.device.check("asking an event", status).map(|()| true),
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made in `new`; the driver keeps what is still needed of it.
        let _ = unsafe { (self.device.driver.event_destroy)(self.raw) };
    }
}

/// Makes a stream wait for an event.
pub(crate) fn wait(device: &Device, stream: sys::Stream, event: &Event) -> Result<()> {
    // SAFETY: our event, and a stream of its device (for the caller's stream: its contract).
    device.check("ordering streams", unsafe { (device.driver.stream_wait_event)(stream, event.raw, 0) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_one_copy_where_they_are_evenly_spaced() {
        let of = |places: &[u64], width| Rows::at(&|row| places[row], places.len(), width);
        assert_eq!(of(&[64], 16), Some(Rows { start: 64, pitch: 16 }));
        assert_eq!(of(&[64, 96, 128], 16), Some(Rows { start: 64, pitch: 32 }));
        assert_eq!(of(&[64, 80], 16), Some(Rows { start: 64, pitch: 16 }));
        // Uneven, backwards, one upon the other, too far apart.
        for places in [&[64, 96, 129][..], &[64, 32], &[64, 72], &[0, 1 << 31]] {
            assert_eq!(of(places, 16), None, "{places:?}");
        }
    }
}
