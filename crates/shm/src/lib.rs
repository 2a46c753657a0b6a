//! The node-local transport for host memory: [`ShmNode`] moves a group's phases and messages between the processes
//! of one node through a shared memory segment.
//!
//! Where things are
//! - **the segment**: `handover` gives every local rank of a `membership` the same `segment`, a `memfd`, laid out by `geometry` and
//!   made of the structures in `layout`; `probe` times slots of several sizes, single copies, and handing lines back.
//! - **phases**: `phases` runs a plan's phases as exchanges over the slot `ring`. `cut` says how many, `exchange` does one, `script`
//!   one that is a whole phase, as often as it comes; `relay` cuts a large all_reduce, `equal_shares` what each rank does for all;
//!   `pen` says how slots are written. `direct` works on data in memory that the ranks share (`shared`), `single_copy` copies
//!   between their private memory.
//! - **messages**: `messages` sends over `pair` cells, `straight` copies large ones between private memory, as a `deal` says;
//!   `buffer` keeps what comes before its receive.
//! - **private memory of others**: `reach` has the kernel copy, inside of the peer's `door`.
//! - **waiting and ending**: `doorbell` puts ranks to sleep and wakes them; `abort`, `log` and `peers` tell why a group ended, or
//!   nothing comes. `mask` is a set of ranks, `sync` atomics.
//!
//! `ring`, `pair`, `doorbell`, `door`, `deal`, `abort` and `log` are the lock-free protocols; they see memory only through
//! `layout::Memory` and are model-checked with loom:
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
#[cfg(not(loom))]
mod theirs;

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
