//! A stand-in for the CUDA driver (libcuda) on CPUs, for tests: the driver API's own C functions over
//! threads and host memory. Its file name and soname are not the driver's, so that only who names its path
//! gets it.

mod api;
mod capture;
mod code;
mod context;
mod entry;
mod event;
mod memops;
mod memory;
mod queue;
mod stream;
mod table;
