//! cuStreamWriteValue and cuStreamWaitValue: words that host and device both see.

use crate::code::{Code, Result};
use crate::context;
use crate::entry::{self, lock};
use crate::memory::{self, Span};
use crate::queue::wait_parked;
use crate::stream::Stream;
use smddp_standin::switches::{GpuDirect, Switches, WaitValue};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Width {
    W32,
    W64,
}

impl Width {
    fn bytes(self) -> usize {
        match self {
            Self::W32 => 4,
            Self::W64 => 8,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Compare {
    Geq,
    Eq,
    And,
    Nor,
}

const FLUSH: u32 = 1 << 30;
/// Waits with that flag count as calls of this name.
const FLUSHED: &str = "flush";

impl Compare {
    /// FLUSH is taken where attribute 98 says that we have it.
    fn of(flags: u32) -> Result<Self> {
        let has_flush = Switches::get().gpudirect == GpuDirect::Flush;
        if has_flush && flags & FLUSH != 0 {
            entry::count(FLUSHED);
        }
        match if has_flush { flags & !FLUSH } else { flags } {
            0 => Ok(Self::Geq),
            1 => Ok(Self::Eq),
            2 => Ok(Self::And),
            3 => Ok(Self::Nor),
            flags if flags & FLUSH != 0 => Err(Code::NOT_SUPPORTED),
            _ => Err(Code::INVALID_VALUE),
        }
    }

    fn holds(self, width: Width, found: u64, value: u64) -> bool {
        match (self, width) {
            (Self::Geq, Width::W32) => (found as u32).wrapping_sub(value as u32) as i32 >= 0,
            (Self::Geq, Width::W64) => found.wrapping_sub(value) as i64 >= 0,
            (Self::Eq, _) => found == value,
            (Self::And, _) => found & value != 0,
            (Self::Nor, Width::W32) => !(found as u32 | value as u32) != 0,
            (Self::Nor, Width::W64) => !(found | value) != 0,
        }
    }
}

fn load(word: &Span, width: Width) -> Result<u64> {
    word.with_word(|ptr| match width {
        // SAFETY: live and aligned, as with_word sees to; host and device share it by atomics only.
        Width::W32 => u64::from(unsafe { AtomicU32::from_ptr(ptr.cast()) }.load(Ordering::Acquire)),
        // SAFETY: as above.
        Width::W64 => unsafe { AtomicU64::from_ptr(ptr.cast()) }.load(Ordering::Acquire),
    })
}

/// What streams have stored last, by address: what a wait sees that sees nothing of the host's.
static STORED: Mutex<BTreeMap<usize, u64>> = Mutex::new(BTreeMap::new());

fn was_stored_by_a_stream(word: &Span, found: u64) -> Result<bool> {
    word.with_word(|ptr| lock(&STORED).get(&ptr.addr()) == Some(&found))
}

fn store(word: &Span, width: Width, value: u64) -> Result {
    word.with_word(|ptr| lock(&STORED).insert(ptr.addr(), value))?;
    word.with_word(|ptr| match width {
        // SAFETY: as in `load`.
        Width::W32 => unsafe { AtomicU32::from_ptr(ptr.cast()) }.store(value as u32, Ordering::Release),
        // SAFETY: as in `load`.
        Width::W64 => unsafe { AtomicU64::from_ptr(ptr.cast()) }.store(value, Ordering::Release),
    })
}

/// A memory operation checked and ready to be queued.
pub enum MemOp {
    Wait { word: Span, width: Width, value: u64, compare: u32 },
    Write { word: Span, width: Width, value: u64 },
    Nothing,
}

fn word(address: u64, width: Width) -> Result<Span> {
    if Switches::get().wait_value == WaitValue::Unsupported {
        return Err(Code::NOT_SUPPORTED);
    }
    let word = memory::device_span(address, width.bytes())?;
    word.with_word(|_| ())?;
    Ok(word)
}

impl MemOp {
    pub fn wait(address: u64, width: Width, value: u64, flags: u32) -> Result<Self> {
        Compare::of(flags)?;
        Ok(Self::Wait { word: word(address, width)?, width, value, compare: flags })
    }

    pub fn write(address: u64, width: Width, value: u64, flags: u32) -> Result<Self> {
        if flags != 0 {
            return Err(Code::INVALID_VALUE);
        }
        Ok(Self::Write { word: word(address, width)?, width, value })
    }

    fn run(&self) -> Result {
        match self {
            Self::Nothing => Ok(()),
            Self::Write { word, width, value } => store(word, *width, *value),
            Self::Wait { word, width, value, compare } => {
                let compare = Compare::of(*compare)?;
                let never = Switches::get().wait_value == WaitValue::Never;
                let what = || {
                    let found = load(word, *width).unwrap_or_default();
                    format!("a word to be {compare:?} {value} (it is {found}), in cuStreamWaitValue")
                };
                wait_parked(what, |time| {
                    let steps = (time.as_micros() / 50).max(1);
                    for step in 0..steps {
                        let found = load(word, *width)?;
                        if compare.holds(*width, found, *value)
                            && (!never || was_stored_by_a_stream(word, found)?)
                        {
                            return Ok(true);
                        }
                        if step + 1 < steps {
                            std::thread::sleep(Duration::from_micros(50));
                        }
                    }
                    Ok(false)
                })
            }
        }
    }
}

pub fn queue(stream: &Arc<Stream>, name: &'static str, ops: Vec<MemOp>) {
    stream.enqueue(name, move || ops.iter().try_for_each(MemOp::run));
}

pub fn queue_one(stream: usize, name: &'static str, op: Result<MemOp>) -> Result {
    let stream = context::stream(stream)?;
    queue(&stream, name, vec![op?]);
    Ok(())
}

/// CUstreamBatchMemOpParams: 6 words of 8 bytes, whose first half word says which operation it is.
pub type BatchParams = [u64; 6];

pub fn parse_batch(params: &BatchParams) -> Result<MemOp> {
    let [operation, address, value, flags, ..] = *params;
    let (operation, flags) = (operation as u32, flags as u32);
    match operation {
        1 => MemOp::wait(address, Width::W32, value & 0xffff_ffff, flags),
        2 => MemOp::write(address, Width::W32, value & 0xffff_ffff, flags),
        4 => MemOp::wait(address, Width::W64, value, flags),
        5 => MemOp::write(address, Width::W64, value, flags),
        // A barrier: our operations are all ordered and released.
        6 => Ok(MemOp::Nothing),
        // Flushing remote writes, attribute 98, and atomic reductions.
        3 | 8 => Err(Code::NOT_SUPPORTED),
        _ => Err(Code::INVALID_VALUE),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comparisons_are_those_of_cuda() {
        let holds = |compare: Compare, found: u64, value: u64| compare.holds(Width::W32, found, value);
        assert!(holds(Compare::Geq, 5, 5) && holds(Compare::Geq, 6, 5) && !holds(Compare::Geq, 4, 5));
        // Cyclic: 1 is three after 0xffff_fffe, and half the range away is before.
        assert!(holds(Compare::Geq, 1, 0xffff_fffe) && !holds(Compare::Geq, 0xffff_fffe, 1));
        assert!(!holds(Compare::Geq, 0x8000_0005, 5) && holds(Compare::Geq, 0x8000_0004, 5));
        assert!(holds(Compare::Eq, 5, 5) && !holds(Compare::Eq, 6, 5));
        assert!(holds(Compare::And, 6, 2) && !holds(Compare::And, 5, 2));
        assert!(holds(Compare::Nor, 1, 2) && !holds(Compare::Nor, 0xffff_0000, 0xffff));
        assert!(Compare::Geq.holds(Width::W64, 1 << 40, 1) && !Compare::Geq.holds(Width::W64, 1, 1 << 40));
    }
}
