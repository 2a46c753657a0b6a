//! The group's one abort record: the first rank to fail says why, everybody's next poll sees it.

use crate::layout::{ABORT_TEXT, ABORT_WRITING, ABORT_WRITTEN, Memory};
use crate::sync::Ordering;

/// Records that `rank` aborted and why, unless somebody was first.
pub(crate) fn raise(memory: &impl Memory, rank: usize, why: &str) {
    let flag = &memory.alerts().abort;
    if flag.compare_exchange(0, ABORT_WRITING, Ordering::AcqRel, Ordering::Acquire).is_err() {
        return;
    }
    let mut end = why.len().min(ABORT_TEXT);
    while !why.is_char_boundary(end) {
        end -= 1;
    }
    memory.abort_text().write(|record| {
        record.rank = rank as u32;
        record.len = end as u32;
        record.text[..end].copy_from_slice(&why.as_bytes()[..end]);
    });
    flag.store(ABORT_WRITTEN, crate::sync::publish_order());
}

#[inline]
pub(crate) fn is_raised(memory: &impl Memory) -> bool {
    memory.alerts().abort.load(Ordering::Acquire) == ABORT_WRITTEN
}

/// Who aborted, and why. Only when it [is raised](is_raised).
pub(crate) fn reason(memory: &impl Memory) -> (usize, String) {
    memory.abort_text().read(|record| {
        let len = (record.len as usize).min(ABORT_TEXT);
        (record.rank as usize, String::from_utf8_lossy(&record.text[..len]).into_owned())
    })
}
