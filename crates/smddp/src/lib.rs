//! Data-parallel collectives for Linux on x86-64: shared memory within a node, libfabric between nodes, started by
//! `mpirun`, `torchrun`, Slurm, or alone.
//!
//! ```
//! fn main() -> smddp::Result<()> {
//!     let world = smddp::World::init()?;
//!     let mut gradients = vec![world.rank() as f32; 1000];
//!     world.all_reduce(&mut gradients, smddp::ReduceOp::Avg)?;
//!     assert_eq!(gradients[0], (world.size() - 1) as f32 / 2.0);
//!     Ok(())
//! }
//! ```
//!
//! The same program runs as one rank under `cargo run` and as many under `mpirun`; see `examples/all_reduce.rs`.
//!
//! A [`World`] finds the job (MPI, launcher variables, or a single process) and derefs to its [`Communicator`]; programs
//! that bring their own key-value store make a [`Communicator`] with [`connect`].

pub mod caches;
mod connect;
mod contact;
mod dirs;
mod node;
mod runtime;
mod shared;
pub mod slots;
mod transports;
mod world;

pub use connect::{GroupOptions, connect};
pub use dirs::library_dirs;
pub use node::NodeId;
pub use shared::{Mapped, SharedMemory};
pub use smddp_core::element::Element;
pub use smddp_core::request::Request;
pub use smddp_core::settings::Settings;
pub use smddp_core::store::Store;
pub use smddp_core::{Call, Collective, DType, Error, GroupShape, ReduceOp, Region, Result};
pub use transports::{Communicator, DeviceGroup, Handle, HostTransports, StartedOnDevice};
pub use world::World;

pub use smddp_bootstrap as bootstrap;
pub use smddp_cuda as cuda;
pub use smddp_fabric as fabric;
