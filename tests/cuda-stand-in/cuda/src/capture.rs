//! What may be called while a graph is captured: by any thread, since streams capture as torch has them do (globally).

use crate::code::{Code, Result};
use crate::entry::count;
use crate::stream::captures_under_way;
use std::cell::Cell;

/// CU_STREAM_CAPTURE_MODE_RELAXED.
const RELAXED: i32 = 2;
/// Captures that were spoilt count as calls of this name.
const SPOILT: &str = "spoilt capture";

thread_local! {
    static MODE: Cell<i32> = const { Cell::new(0) };
}

/// This thread's mode from now on; gives that before.
pub fn exchange_mode(wanted: i32) -> Result<i32> {
    if (0..=RELAXED).contains(&wanted) { Ok(MODE.replace(wanted)) } else { Err(Code::INVALID_VALUE) }
}

/// For calls that are not safe while a graph is captured by whichever thread, except where this one says that it knows.
pub fn refuse() -> Result {
    if MODE.get() == RELAXED || !captures_under_way() {
        return Ok(());
    }
    count(SPOILT);
    Err(Code::CAPTURE_UNSUPPORTED)
}
