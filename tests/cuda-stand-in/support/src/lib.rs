//! For tests of CUDA code on machines without a GPU: where the stand-in libraries are, how to control them,
//! and what the two say to each other. Nothing here is part of the product.

// What fails here fails a test: a panic is the report.
#![allow(clippy::expect_used)]

pub mod abi;
pub mod switches;

mod build;
mod children;
mod control;

pub use build::{Paths, paths};
pub use children::{Children, Rank};
pub use control::{Control, registered_bytes};
