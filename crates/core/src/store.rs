//! The key-value store through which ranks find each other. Only bootstrap and group creation use it.

use std::time::Instant;

use crate::error::Result;

/// A store shared by the ranks that can reach it: torch's `Store`, our own TCP server, or a map in one process.
pub trait Store: Send + Sync {
    /// Publishes `value` under `key`.
    fn set(&self, key: &str, value: &[u8]) -> Result<()>;

    /// The value under `key`, waiting for it until `deadline`. `Error::Timeout` (missing ranks empty) when it passes.
    fn get(&self, key: &str, deadline: Instant) -> Result<Vec<u8>>;

    /// Adds to the counter under `key` (absent: 0) and returns the new value.
    fn add(&self, key: &str, amount: i64) -> Result<i64>;
}
