//! What moves data here, and core's types over it.

use smddp_core::transport::Transports;
use smddp_fabric::FabricEndpoint;
use smddp_shm::ShmNode;

/// Host memory: shared memory in a node, libfabric between nodes.
pub struct HostTransports;

impl Transports for HostTransports {
    type Local = ShmNode;
    type Fabric = FabricEndpoint;
}

/// A process group over shared memory and libfabric.
pub type Communicator = smddp_core::communicator::Communicator<HostTransports>;
/// An operation under way.
pub type Handle = smddp_core::communicator::Handle<HostTransports>;

/// The CUDA side of a process group.
pub type DeviceGroup = smddp_cuda::DeviceGroup<HostTransports>;
/// A call it has enqueued.
pub type StartedOnDevice = smddp_cuda::Started<HostTransports>;
