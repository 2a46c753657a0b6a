//! Numbers of the messages between two ranks: the n-th send of a tag meets the n-th receive of it.

use std::sync::Mutex;

use rustc_hash::FxHashMap;

use crate::error::{Error, Result};

/// What one direction of one tag between this rank and a peer is told apart by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Stream {
    /// Group rank.
    pub peer: usize,
    pub tag: u64,
    pub send: bool,
}

/// The next number of every stream of a group. Callers, and the engine on behalf of receives from any rank, take from
/// it; so a number is looked at and taken under one lock. A stream is known as long as the group is: its peer may use it again at
/// any time. So a program should not use a new tag for every message.
#[derive(Debug, Default)]
pub struct MessageNumbers {
    /// Callers choose the tags, and nobody gains by making them collide.
    next: Mutex<FxHashMap<Stream, u64>>,
}

impl MessageNumbers {
    pub fn take(&self, stream: Stream) -> Result<u64> {
        match self.take_if(stream, |_| true)? {
            Some(number) => Ok(number),
            None => Err(Error::Internal("a number that was not refused was not given".to_owned())),
        }
    }

    /// The next number, taken only if `wanted` says so of it.
    pub fn take_if(&self, stream: Stream, wanted: impl FnOnce(u64) -> bool) -> Result<Option<u64>> {
        let mut next = self
            .next
            .lock()
            .map_err(|_| Error::Internal("a thread panicked while it counted messages".to_owned()))?;
        let known = next.get_mut(&stream);
        let number = known.as_deref().copied().unwrap_or(0);
        if !wanted(number) {
            return Ok(None);
        }
        match known {
            Some(next) => *next += 1,
            None => drop(next.insert(stream, number + 1)),
        }
        Ok(Some(number))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_number_is_offered_again() {
        let numbers = MessageNumbers::default();
        let one = Stream { peer: 1, tag: 7, send: false };
        assert_eq!(numbers.take_if(one, |_| false).unwrap(), None);
        assert_eq!(numbers.take(one).unwrap(), 0);
        assert_eq!(numbers.take_if(one, |n| n == 1).unwrap(), Some(1));
        assert_eq!(numbers.take(Stream { send: true, ..one }).unwrap(), 0);
        assert_eq!(numbers.take(Stream { tag: 8, ..one }).unwrap(), 0);
    }
}
