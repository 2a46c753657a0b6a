//! Topology, collectives as plans, the engine that runs them, and the traits transports implement.
//!
//! The data's way: a [`call::Call`] and a [`topology::GroupShape`] give a [`plan::Schedule`] (plain data, one
//! pure function an algorithm); the [`engine`] interprets it over a [`transport::NodeLocal`] (ranks of one
//! node) and a [`transport::Fabric`] (ranks of different nodes). Core knows no library by name.

#[cfg(target_endian = "big")]
compile_error!(
    "smddp does not support big-endian targets: halves are reduced as pairs of little-endian bytes"
);

mod atomics;
pub mod call;
pub mod communicator;
pub mod dtype;
pub mod element;
pub mod engine;
pub mod error;
pub mod far;
pub mod gate;
pub mod interrupt;
pub mod memory;
pub mod order;
pub mod plan;
pub mod process;
pub mod reduce;
pub mod request;
pub mod settings;
pub mod shared;
pub mod store;
pub mod testing;
pub mod threads;
pub mod topology;
pub mod transport;
pub mod yields;

pub use call::{Call, Collective};
pub use dtype::{DType, ReduceOp};
pub use error::{Error, Result};
pub use memory::Region;
pub use topology::GroupShape;
