//! Messages between nodes: libfabric endpoints, rails, flow control, bounded staging.
//!
//! Bottom up: a [`domain::Domain`] is one NIC ([`LibfabricDomain`], or [`sim`]'s deterministic one for tests);
//! [`FabricEndpoint`] stripes over several of them and is core's [`Fabric`](smddp_core::transport::Fabric):
//! *eager* messages up to SMDDP_EAGER go through slots on credit, larger ones by *rendezvous* ([`wire::Grant`]).

mod arena;
pub mod domain;
mod endpoint;
mod error;
mod groups;
pub mod libfabric;
mod map;
mod open;
mod ops;
mod peer;
mod receiving;
mod rendezvous;
mod sending;
pub mod sim;
mod slab;
mod staging;
pub mod wire;
mod withdraw;

pub use endpoint::FabricEndpoint;
pub use error::Error;
pub use libfabric::{LibfabricDomain, NicInfo, Place, prepare_environment};
pub use open::{found, probe};
