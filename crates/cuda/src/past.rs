//! Marks of where calls end on their streams.

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

    /// Marks where `stream` is now; the device must have been entered.
    pub(crate) fn mark(self: &Arc<Events>, stream: sys::Stream) -> Result<Past> {
        let spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let event = spare.map_or_else(|| Event::new(&self.device), Ok)?;
        event.record(stream)?;
        Ok(Past(Arc::new(Mark { event: Some(event), events: Arc::clone(self) })))
    }
}

struct Mark {
    /// Taken in drop.
    event: Option<Event>,
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
    /// Whether the device is past it.
    pub fn is_done(&self) -> Result<bool> {
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
        event.record(stream as sys::Stream)
    }

    fn visit(&self) -> Result<(Visit, &Event)> {
        let missing = || Error::Internal("a mark without its event".to_owned());
        let event = self.0.event.as_ref().ok_or_else(missing)?;
        Ok((self.0.events.device.visit()?, event))
    }
}
