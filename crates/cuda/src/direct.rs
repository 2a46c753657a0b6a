//! GPUDirect: a NIC that reads and writes the device memory of a stager's slots, so that only what is summed passes the
//! host. [`smddp_core::far`] has the rules; libfabric registers the memory (FI_HMEM), by dmabuf or otherwise as it sees fit.
//!
//! A stream must see what a NIC has written when the word comes that says so: where the device does not keep writes in
//! order, the wait for the word asks for it ([`Arrival`]).

use std::sync::Arc;
use std::time::Duration;

use smddp_core::communicator::Communicator;
use smddp_core::far::{self, Far};
use smddp_core::memory::Owner;
use smddp_core::request::Request;
use smddp_core::transport::Transports;
use smddp_core::{Collective, Error, Region, Result};

use crate::call::DeviceCall;
use crate::device::{Arrival, Device, DeviceMemory};
use crate::pieces::Rows;
use crate::quiet::quietly;

/// How long the end waits for calls of other groups.
const FAREWELL: Duration = Duration::from_secs(5);

/// Device memory that the network knows.
pub(crate) struct Direct {
    least: usize,
    arrival: Arrival,
    /// Ends the registration when dropped.
    registered: Option<Box<dyn Send>>,
}

impl Drop for Direct {
    fn drop(&mut self) {
        let registered = self.registered.take();
        // libfabric may ask the driver here, too. In the end there is no other way.
        if quietly(FAREWELL, || drop(registered)).is_none() {
            tracing::debug!("device memory was taken back from the network while calls were under way");
        }
    }
}

fn missing(what: &str) -> Error {
    Error::Transport { transport: "GPUDirect", reason: what.to_owned() }
}

impl Direct {
    /// Registers `memory`, which is made of `bytes` where there is none. An error says what does not have it.
    pub(crate) fn new<T: Transports>(
        device: &Arc<Device>,
        between: &Communicator<T>,
        by_words: bool,
        memory: &mut Option<DeviceMemory>,
        bytes: usize,
    ) -> Result<Direct> {
        let least = between.least_device_message().ok_or_else(|| {
            missing("this libfabric provider does not reach CUDA devices (FI_HMEM), or ranks share a node")
        })?;
        if !by_words {
            return Err(missing("streams cannot wait for words here"));
        }
        let arrival = device.direct_access()?.map_err(missing)?;
        let address = match memory {
            Some(memory) => memory.address,
            None => memory.insert(DeviceMemory::new(device, bytes)?).address,
        };
        // SAFETY: allocated for longer than it is registered; the host does not touch it, and a piece's rows are the network's
        // alone from the word that says that they are there to the word that says that the operation is over.
        let region = unsafe { Region::new(std::ptr::with_exposed_provenance_mut(address as usize), bytes) };
        // Half of the limit, since the other ranks wait meanwhile.
        let registered =
            quietly(between.timeout() / 2, || between.register(region, Owner::Cuda(device.ordinal)))
                .ok_or_else(|| {
                    missing("calls of this process's other groups did not end; make this group before them")
                })??;
        Ok(Direct { least, arrival, registered: Some(Box::new(registered)) })
    }

    pub(crate) fn from(mut self, least: usize) -> Direct {
        self.least = least;
        self
    }

    /// Bytes of the shortest message.
    pub(crate) fn least(&self) -> usize {
        self.least
    }

    pub(crate) fn arrival(&self) -> Arrival {
        self.arrival
    }

    /// Whether a piece of `count` columns goes so between the ranks of `host`.
    pub(crate) fn carries<T: Transports>(
        &self,
        host: &Communicator<T>,
        call: &DeviceCall,
        count: usize,
    ) -> bool {
        let message = || far::least_message(call.collective, call.dtype.size(), count, host.size());
        host.shape().even_local_size() == Some(1) && far::carries(call.collective) && message() >= self.least
    }
}

/// A piece of a call that goes from and to a slot's device memory.
pub(crate) struct DirectPiece<'a> {
    /// On the slot's memory on the host.
    pub(crate) request: Request,
    pub(crate) rows: &'a Rows,
    /// Bytes of a row.
    pub(crate) width: usize,
    /// Address of the slot's device memory.
    pub(crate) on_device: u64,
    /// Rank and size of the group.
    pub(crate) place: (usize, usize),
}

impl DirectPiece<'_> {
    /// What this rank sums: (offset, length) in bytes of the input.
    pub(crate) fn own_share(&self) -> (usize, usize) {
        let Request { collective, dtype, count, .. } = self.request;
        far::own_share(collective, dtype.size(), count, self.place.1, self.place.0)
    }

    /// The call on both memories.
    pub(crate) fn far_request(&self) -> Request {
        let rows = self.rows.input.max(self.rows.output);
        let start = std::ptr::with_exposed_provenance_mut(self.on_device as usize);
        // SAFETY: the slot's memory, which has room for all rows of a piece and lives as long as the stager.
        let device = unsafe { Region::new(start, rows * self.width) };
        let far = match self.request.collective {
            Collective::AllGather => {
                Far { input: device.slice(self.place.0 * self.width, self.width), output: device }
            }
            Collective::ReduceScatter => Far { input: device, output: Region::EMPTY },
            _ => Far { input: device, output: device },
        };
        Request { far: Some(far), ..self.request.clone() }
    }
}
