//! Collectives on tensors in CUDA memory.
//!
//! Inside a node NCCL moves the data. Between nodes it goes through pinned memory and the engine's own plans: device
//! copies a piece into a slot, and a word beside it says so (`cuStreamWriteValue32`); the progress thread runs the
//! exchange as an ordinary operation with a gate ([`smddp_core::gate`]); a wait on a second word, enqueued ahead, releases
//! the copy back. NCCL's kernels, and at times the host that enqueues them, wait for their peers without limit; a thread of
//! the group's own, asleep while no call is under way, ends them where the engine would end an operation (`watch.rs`).
//! With GPUDirect the exchange's messages begin and end in device memory of the slot (`direct.rs`).
//!
//! Invariants
//! - **C1** everything is enqueued by the caller's thread, in call order; the host waits for the device only where streams
//!   cannot wait for words, and where a call, or those before it, are of more pieces than streams have places for (`stager.rs`), outside
//!   of the driver; and then for as long as the call may take.
//! - **C2** between "input is there" and "output is there" nobody calls CUDA or NCCL, or takes an interpreter's lock: the
//!   progress thread reads a word and stores a word. So nothing that holds a lock of the driver can stop it.
//! - **C3** a wait is enqueued only behind the copy and the word that lead to its release, so no order of enqueuing stops
//!   the device for ever; a failed operation releases its wait too (gate W2), and its group refuses later calls.
//! - **C4** a slot is written again only behind the event after its last copy out.
//! - **C5** what waits for a word comes behind the stream's work that leads to it by an event too: of an order by words alone the
//!   device knows nothing, and may put the wait first where streams share a queue.
//!
//! Where things are; no file uses what stands above it here
//! - **a group**: `group` starts, waits for and ends its calls; `setup` is what its ranks settle with each other first.
//! - **ways between nodes**: `select` chooses one by a table; `hierarchical` has NCCL and the stager work together.
//! - **NCCL**: `watch` ends what would wait for ever, `ask` has the driver say how far calls are, `life` is one call's; `meeting`
//!   brings ranks together; `nccl` is one communicator.
//! - **through the host**: `stager` moves pieces through slots, `direct` lets the network at those of the device; `pieces` cuts
//!   calls, `quiet` finds times in which no stream waits for a word, `pinned` is the host's memory.
//! - **below all**: `call` is a call as it is made, `past` where it ends on its stream, `device` one device.

mod ask;
mod call;
mod device;
mod direct;
mod group;
mod hierarchical;
mod life;
mod meeting;
mod nccl;
mod past;
mod path;
mod pieces;
mod pinned;
mod quiet;
mod select;
mod setup;
mod stager;
mod watch;

pub use call::{DeviceCall, DeviceMessage, Memory};
pub use device::Device;
#[doc(hidden)]
pub use device::use_driver;
pub use group::{DeviceGroup, DeviceOptions, Started};
pub use nccl::found as nccl_found;
pub use past::Past;
pub use path::{Path, Wanted};
