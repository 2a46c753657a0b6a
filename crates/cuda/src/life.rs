//! The life of a call that NCCL carries.
//!
//! ```text
//! announced -> enqueued -> ended
//!         |           |
//!         |           +--> failed
//!         +-> ended, failed
//! ```
//!
//! - **L1** a call is announced, which begins its time, before any of it is enqueued; it is enqueued when its end on its stream
//!   is marked. One that is refused, or captured in a graph, ends right then: its replays run, and they are not watched.
//! - **L2** ended and failed are for good.
//!
//! Who ends it, and why, is in `watch.rs` (L3 and on).

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use smddp_core::{Collective, Error, Result};

use crate::past::Past;

/// A call's, from its announcement on.
pub(crate) struct Life {
    pub(crate) collective: Collective,
    pub(crate) seq: u64,
    pub(crate) since: Instant,
    pub(crate) limit: Duration,
    /// Where it ends on its stream, once it is enqueued.
    past: OnceLock<Past>,
    /// How it ended, or failed (L2).
    end: OnceLock<Result<()>>,
}

impl Life {
    /// That of a call that is announced now (L1).
    pub(crate) fn begin(collective: Collective, seq: u64, limit: Duration) -> Life {
        let (past, end) = (OnceLock::new(), OnceLock::new());
        Life { collective, seq, since: Instant::now(), limit, past, end }
    }

    /// It ends at `past`.
    pub(crate) fn enqueued(&self, past: &Past) {
        // Once a call: its caller's thread does it.
        let _ = self.past.set(past.clone());
    }

    /// It has ended well, unless it has failed before.
    pub(crate) fn ends(&self) {
        let _ = self.end.set(Ok(()));
    }

    pub(crate) fn fails(&self, error: &Error) {
        let _ = self.end.set(Err(error.clone()));
    }

    pub(crate) fn is_over(&self) -> bool {
        self.end.get().is_some()
    }

    /// How it ended; none: not yet.
    pub(crate) fn outcome(&self) -> Option<Result<()>> {
        self.end.get().cloned()
    }

    /// What it failed with.
    pub(crate) fn error(&self) -> Option<Error> {
        self.outcome()?.err()
    }

    pub(crate) fn is_past(&self) -> Result<bool> {
        self.past.get().map_or(Ok(false), Past::is_done)
    }
}
