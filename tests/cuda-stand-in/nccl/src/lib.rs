//! A stand-in for NCCL on CPUs, for tests: NCCL's own C functions over sockets between processes and
//! threads, run on the streams of the stand-in for CUDA that lies beside this library.

mod api;
mod comm;
mod driver;
mod dtype;
mod error;
mod group;
mod operation;
mod room;
mod server;
mod wire;
