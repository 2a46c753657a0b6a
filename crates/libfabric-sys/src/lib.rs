//! libfabric's ABI and a run-time loader for it; nothing is linked.
//!
//! A process needs six exported symbols ([`Library`]); everything else is a call through a table of functions
//! that hangs on an object ([`abi`], with the calls in [`calls`]).
//!
//! Rules that keep one build working with every libfabric from 1.18 on
//! - **A1** structures and tables only grow at the tail from version to version: the ones the library gives us are
//!   declared up to the last field used, the ones we give it are declared in full and zeroed.
//! - **A2** `fi_info` is allocated by the library alone (`fi_dupinfo(NULL)`).
//! - **A3** `fi_getinfo` is asked for [`API_VERSION`], the oldest version accepted, whatever the library's own is.
//! - **A4** an entry of a table is used only when the table is long enough and the entry is not null.

#[allow(non_camel_case_types)]
pub mod abi;
pub mod calls;
mod loader;

pub use loader::{API_VERSION, Library, LoadError, MINIMUM, Place, Version, places};
