//! The exported functions of the driver API.

mod device;
mod memory;
mod stream;
