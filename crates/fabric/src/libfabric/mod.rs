//! The real thing: NICs found through libfabric, and domains over them.

mod domain;
mod knock;
pub(crate) mod nics;

pub use domain::LibfabricDomain;
pub use nics::{NicInfo, Place, prepare_environment};
