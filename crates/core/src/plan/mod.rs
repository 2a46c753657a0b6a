//! A collective as plain data: what one rank sends, receives, reduces and copies.
//!
//! A [`Schedule`] is the whole call of one rank. The user's buffer is cut into *rounds* of the same shape, each run by
//! the same [`Plan`] with user-buffer offsets shifted by the round's start; several rounds are in flight at once.
//!
//! Invariants, proven by [`check`] for every algorithm
//! - **P1** steps are listed so that every dependency points backwards.
//! - **P2** two steps of one rank that touch overlapping bytes, one of them writing, are ordered by dependencies.
//! - **P3** all ranks of one node list the same phases (equal moves) in the same order.
//! - **P4** every `Send` meets exactly one `Recv` with the same pair, tag and length, and a schedule completes even
//!   when a send finishes only after its receive was posted.
//! - **P5** every rank's contribution enters each result exactly once, in the same association on every rank that
//!   computes it, and `finish` is applied exactly once.
//! - **P6** bytes over each node's link, each way, do not exceed [`Schedule::link_bytes`].
//! - **P7** a call with its data on a device keeps the rules of [`crate::far`].
//!
//! Where things are, from the ground up: `data` is what a plan consists of; `shape`, `tuning` and `context` say what is asked
//! for, by the names in `algorithms`; one file an algorithm builds (`all_reduce_*`, `broadcast`, ...) with `build` (cuts,
//! dependencies), `rail` (who talks to whom) and `rounds` (sizes); [`cost`] prices, `select` chooses, [`check`] proves,
//! [`render`] shows. A new way to all-reduce between nodes is a file, its line in `hierarchical::EXCHANGES` and its name in
//! [`algorithms`]; tests then prove it for all shapes.

mod algorithms;
mod all_gather;
mod all_reduce_halving_doubling;
mod all_reduce_recursive_doubling;
mod all_reduce_ring;
mod all_reduce_sharded;
mod all_reduce_tree;
mod broadcast;
pub(crate) mod build;
pub mod check;
mod context;
pub mod cost;
pub(crate) mod data;
mod hierarchical;
mod pairwise;
mod rail;
mod reduce;
mod reduce_scatter;
pub mod render;
mod rounds;
mod select;
mod shape;
mod tuning;

pub use algorithms::{algorithms, candidates};
pub use data::{Buf, Move, Op, Plan, Schedule, Span, Step, StepId, Who, source_of};
pub use select::schedule;
pub use shape::{CallShape, Splits};
pub use tuning::{Known, Override, Tuning};
