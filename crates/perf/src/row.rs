//! One line of the table: a call, and what was measured of it.

use smddp::{Collective, DType, ReduceOp};

use crate::workload::bus_factor;

/// One line of the table.
#[derive(Clone, Debug)]
pub struct Row {
    pub collective: Collective,
    pub dtype: DType,
    pub op: ReduceOp,
    pub root: usize,
    pub world: usize,
    /// Bytes and elements of the whole buffer.
    pub bytes: usize,
    pub count: usize,
    /// Timed calls.
    pub calls: usize,
    /// Seconds a call.
    pub median: f64,
    pub fastest: f64,
    /// Every rank's result was right; `None` where there is none.
    pub right: Option<bool>,
    pub algorithm: String,
    /// Where the calls were on CUDA memory.
    pub device: Option<OnDevice>,
}

impl Row {
    /// GB/s (1e9) of the median batch.
    pub fn algbw(&self) -> f64 {
        self.bytes as f64 / self.median / 1e9
    }

    pub fn busbw(&self) -> f64 {
        self.algbw() * bus_factor(self.collective, self.world)
    }
}

/// What a row has more when it was measured on CUDA memory, seconds a call.
#[derive(Clone, Debug)]
pub struct OnDevice {
    /// Of the host.
    pub host: f64,
    /// The copies to and from pinned memory alone, both ways at once.
    pub copies: Option<f64>,
    /// The same call on the host's memory.
    pub on_host: Option<f64>,
}

impl OnDevice {
    /// What the call cannot be faster than, as far as it was measured.
    pub fn bound(&self) -> Option<f64> {
        [self.copies, self.on_host].into_iter().flatten().reduce(f64::max)
    }
}
