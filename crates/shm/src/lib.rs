//! The node-local transport for host memory: [`ShmNode`] moves a group's phases and messages between the processes
//! of one node through a shared memory segment.
//!
//! How it fits together: `handover` gives every local rank of a `membership` the same `segment` (laid out by `geometry`, made of
//! the structures in `layout`); `phases` runs a plan's phases as exchanges (`cut` says how many, `exchange` does one, `script` one
//! that is a whole phase, as often as it comes) over the slot `ring`, as a `relay` where much data goes from all to all, by `direct`
//! where the data lies in memory that the ranks share (`shared`), or by `single_copy` between their private memory, through a
//! `door`; where each rank does a part for all, the parts are `equal_shares`; `pen` says how slots are written; `probe` times
//! rings of several sizes, and single copies; `messages` sends point to point over `pair` cells; `doorbell` puts ranks to sleep and
//! wakes them; `abort` and `peers` tell why a group ended. `ring`, `pair`, `doorbell`, `door` and `abort` are the lock-free
//! protocols; they see memory only through `layout::Memory` and are model-checked with loom:
//!
//! ```sh
//! RUSTFLAGS="--cfg loom" cargo test --release -p smddp-shm --lib
//! ```

#![cfg_attr(loom, allow(dead_code))]

mod abort;
mod deal;
mod door;
mod doorbell;
mod layout;
mod log;
mod mask;
mod pair;
mod ring;
mod sync;

#[cfg(not(loom))]
mod buffer;
#[cfg(not(loom))]
mod cut;
#[cfg(not(loom))]
mod direct;
#[cfg(not(loom))]
mod equal_shares;
#[cfg(not(loom))]
mod error;
#[cfg(not(loom))]
mod exchange;
#[cfg(not(loom))]
mod geometry;
#[cfg(not(loom))]
mod handover;
#[cfg(not(loom))]
mod membership;
#[cfg(not(loom))]
mod memfd;
#[cfg(not(loom))]
mod messages;
#[cfg(not(loom))]
mod node;
#[cfg(not(loom))]
mod peers;
#[cfg(not(loom))]
mod pen;
#[cfg(not(loom))]
mod phases;
#[cfg(not(loom))]
pub mod probe;
#[cfg(not(loom))]
mod reach;
#[cfg(not(loom))]
mod relay;
#[cfg(not(loom))]
mod script;
#[cfg(not(loom))]
mod segment;
#[cfg(not(loom))]
mod shared;
#[cfg(not(loom))]
mod single_copy;
#[cfg(not(loom))]
mod straight;

#[cfg(all(test, loom))]
mod loom_tests;

#[cfg(not(loom))]
pub use error::ShmError;
#[cfg(not(loom))]
pub use geometry::{Geometry, SingleCopies};
#[cfg(not(loom))]
pub use handover::Listener;
pub use mask::MAX_LOCAL;
#[cfg(not(loom))]
pub use membership::Membership;
#[cfg(not(loom))]
pub use node::ShmNode;
#[cfg(not(loom))]
pub use shared::{Card, SharedBuffer};
