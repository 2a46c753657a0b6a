//! Devices, their primary contexts, and which one is current in a thread.

use crate::code::{Code, Result};
use crate::entry::lock;
use crate::stream::{Kind, Stream, next_handle};
use smddp_standin::switches::Switches;
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, OnceLock};

const CONTEXT: usize = 0x4000;
const LEGACY: [usize; 2] = [0, 1];
const PER_THREAD: usize = 2;

pub struct Device {
    pub ordinal: i32,
    /// Taken while an operation gets its place.
    pub order: Mutex<()>,
    legacy: OnceLock<Arc<Stream>>,
    streams: Mutex<BTreeMap<usize, Arc<Stream>>>,
    retained: Mutex<u32>,
}

fn devices() -> &'static [Device] {
    static DEVICES: OnceLock<Vec<Device>> = OnceLock::new();
    DEVICES.get_or_init(|| {
        (0..Switches::get().devices)
            .map(|ordinal| Device {
                ordinal,
                order: Mutex::default(),
                legacy: OnceLock::new(),
                streams: Mutex::default(),
                retained: Mutex::default(),
            })
            .collect()
    })
}

pub fn count() -> i32 {
    Switches::get().devices
}

pub fn device(ordinal: i32) -> Result<&'static Device> {
    usize::try_from(ordinal).ok().and_then(|i| devices().get(i)).ok_or(Code::INVALID_DEVICE)
}

/// Of an ordinal that [`device`] has given before.
pub fn device_known(ordinal: i32) -> &'static Device {
    &devices()[ordinal as usize]
}

impl Device {
    pub fn context(&self) -> usize {
        CONTEXT + self.ordinal as usize
    }

    pub fn retain(&self) {
        *lock(&self.retained) += 1;
    }

    pub fn release(&self) -> Result {
        let mut retained = lock(&self.retained);
        *retained = retained.checked_sub(1).ok_or(Code::INVALID_CONTEXT)?;
        Ok(())
    }

    pub fn is_active(&self) -> bool {
        *lock(&self.retained) > 0
    }

    fn legacy(&self) -> &Arc<Stream> {
        self.legacy.get_or_init(|| Arc::new(Stream::new(LEGACY[1], self.ordinal, Kind::Legacy, 0)))
    }

    pub fn create_stream(&self, kind: Kind, priority: i32) -> Arc<Stream> {
        let stream = Arc::new(Stream::new(next_handle(), self.ordinal, kind, priority));
        lock(&self.streams).insert(stream.handle(), Arc::clone(&stream));
        stream
    }

    /// What the legacy stream orders without being asked. Called under `order`.
    pub fn implied(&self, stream: &Stream) -> Vec<(Arc<Stream>, u64)> {
        let unfinished = |other: &Arc<Stream>| {
            let place = other.place();
            (!other.is_done(place)).then(|| (Arc::clone(other), place))
        };
        match stream.kind {
            Kind::NonBlocking => Vec::new(),
            Kind::Blocking => unfinished(self.legacy()).into_iter().collect(),
            Kind::Legacy => {
                let streams = lock(&self.streams);
                streams.values().filter(|s| s.kind == Kind::Blocking).filter_map(unfinished).collect()
            }
        }
    }

    fn all_streams(&self) -> Vec<Arc<Stream>> {
        let mut streams: Vec<_> = lock(&self.streams).values().cloned().collect();
        streams.push(Arc::clone(self.legacy()));
        streams
    }

    /// Waits for what all streams hold now.
    pub fn synchronize(&self) -> Result {
        let places: Vec<_> = {
            let _order = lock(&self.order);
            self.all_streams().into_iter().map(|stream| (stream.place(), stream)).collect()
        };
        places.iter().try_for_each(|(place, stream)| stream.synchronize(*place))
    }
}

thread_local! {
    static CURRENT: RefCell<Vec<Option<i32>>> = const { RefCell::new(Vec::new()) };
    static DEFAULTS: RefCell<HashMap<i32, Arc<Stream>>> = RefCell::default();
}

pub fn of_handle(context: usize) -> Result<&'static Device> {
    let ordinal = context.checked_sub(CONTEXT).and_then(|i| i32::try_from(i).ok());
    ordinal.and_then(|i| device(i).ok()).filter(|d| d.is_active()).ok_or(Code::INVALID_CONTEXT)
}

fn current_or_none() -> Option<&'static Device> {
    CURRENT.with_borrow(|stack| stack.last().copied().flatten()).map(device_known)
}

/// The current context's device.
pub fn current() -> Result<&'static Device> {
    current_or_none().filter(|device| device.is_active()).ok_or(Code::INVALID_CONTEXT)
}

pub fn current_handle() -> usize {
    current_or_none().map_or(0, Device::context)
}

fn ordinal_of(context: usize) -> Result<Option<i32>> {
    if context == 0 { Ok(None) } else { of_handle(context).map(|device| Some(device.ordinal)) }
}

/// Null takes the current one away.
pub fn set_current(context: usize) -> Result {
    let ordinal = ordinal_of(context)?;
    CURRENT.with_borrow_mut(|stack| {
        stack.pop();
        stack.push(ordinal);
    });
    Ok(())
}

pub fn push_current(context: usize) -> Result {
    let ordinal = ordinal_of(context)?.ok_or(Code::INVALID_CONTEXT)?;
    CURRENT.with_borrow_mut(|stack| stack.push(Some(ordinal)));
    Ok(())
}

pub fn pop_current() -> Result<usize> {
    let handle = current_handle();
    CURRENT.with_borrow_mut(Vec::pop).ok_or(Code::INVALID_CONTEXT)?;
    Ok(handle)
}

/// The stream of a handle; 0, 1 and 2 are the default streams of the current context.
pub fn stream(handle: usize) -> Result<Arc<Stream>> {
    if LEGACY.contains(&handle) {
        return Ok(Arc::clone(current()?.legacy()));
    }
    if handle == PER_THREAD {
        let device = current()?;
        return Ok(DEFAULTS.with_borrow_mut(|defaults| {
            let make = || device.create_stream(Kind::Blocking, 0);
            Arc::clone(defaults.entry(device.ordinal).or_insert_with(make))
        }));
    }
    let found = devices().iter().find_map(|device| lock(&device.streams).get(&handle).cloned());
    found.ok_or(Code::INVALID_HANDLE)
}

/// The handle is gone at once, what the stream holds is still done.
pub fn destroy_stream(handle: usize) -> Result {
    let found = devices().iter().find_map(|device| lock(&device.streams).remove(&handle));
    found.ok_or(Code::INVALID_HANDLE)?.close();
    Ok(())
}

pub fn live_streams() -> usize {
    devices().iter().map(|device| lock(&device.streams).len()).sum()
}
