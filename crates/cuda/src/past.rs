//! Marks of where calls end on their streams.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use smddp_core::{Error, Result};
use smddp_cuda_sys as sys;

use crate::device::{Device, Event, Visit, wait};

/// Events no mark uses any more; making one costs several calls of the driver's.
pub(crate) struct Events {
    device: Arc<Device>,
    spare: Mutex<Vec<Event>>,
}

impl Events {
    pub(crate) fn new(device: &Arc<Device>) -> Arc<Events> {
        Arc::new(Events { device: Arc::clone(device), spare: Mutex::default() })
    }

    /// Marks where `stream` is now; the device must have been entered. `is_captured`: a graph is captured from the stream.
    pub(crate) fn mark(self: &Arc<Events>, stream: sys::Stream, is_captured: bool) -> Result<Past> {
        let spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let event = spare.map_or_else(|| Event::new(&self.device), Ok)?;
        event.record(stream)?;
        let is_captured = AtomicBool::new(is_captured);
        Ok(Past(Arc::new(Mark { event: Some(event), is_captured, events: Arc::clone(self) })))
    }
}

struct Mark {
    /// Taken in drop.
    event: Option<Event>,
    /// It was last recorded in a capture: the driver answers nobody who asks for it.
    is_captured: AtomicBool,
    events: Arc<Events>,
}

impl Drop for Mark {
    /// Streams that were told to wait for the event do so whatever it is recorded for next.
    fn drop(&mut self) {
        if let (Some(event), Ok(mut spare)) = (self.event.take(), self.events.spare.lock()) {
            spare.push(event);
        }
    }
}

/// The end of a call on its stream.
#[derive(Clone)]
pub struct Past(Arc<Mark>);

impl Past {
    /// Whether the call was captured in a graph: only replays of that run it.
    pub fn is_captured(&self) -> bool {
        self.0.is_captured.load(Ordering::Relaxed)
    }

    /// Whether the device is past it; never past a call that was captured in a graph.
    pub fn is_done(&self) -> Result<bool> {
        if self.is_captured() {
            return Ok(false);
        }
        let (_visit, event) = self.visit()?;
        event.is_done()
    }

    /// Makes `stream` wait for it.
    ///
    /// # Safety
    /// A stream of the group's device.
    pub unsafe fn order(&self, stream: u64) -> Result<()> {
        let (_visit, event) = self.visit()?;
        wait(&self.0.events.device, stream as sys::Stream, event)
    }

    /// Moves it to where `stream` is now, where more was enqueued that belongs to the call.
    ///
    /// # Safety
    /// As [`order`](Self::order).
    pub unsafe fn extend(&self, stream: u64) -> Result<()> {
        let (_visit, event) = self.visit()?;
        let stream = stream as sys::Stream;
        event.record(stream)?;
        let is_captured = self.0.events.device.is_capturing(stream)?;
        self.0.is_captured.store(is_captured, Ordering::Relaxed);
        Ok(())
    }

    fn visit(&self) -> Result<(Visit, &Event)> {
        let missing = || Error::Internal("a mark without its event".to_owned());
        let event = self.0.event.as_ref().ok_or_else(missing)?;
        Ok((self.0.events.device.visit()?, event))
    }
}
