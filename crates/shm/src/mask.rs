//! Sets of local ranks.

/// Local ranks one segment can hold: as many as `Mask` has bits, so that the sleepers' mask and the abort flag
/// share one cache line.
pub const MAX_LOCAL: usize = WORDS * 64;

pub(crate) const WORDS: usize = 7;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Mask {
    words: [u64; WORDS],
    /// Ranks in it: few of many words are looked at.
    len: usize,
}

impl Mask {
    #[inline]
    pub(crate) fn set(&mut self, rank: usize) {
        self.len += usize::from(!self.has(rank));
        self.words[rank / 64] |= 1 << (rank % 64);
    }

    #[inline]
    pub(crate) fn clear(&mut self, rank: usize) {
        self.len -= usize::from(self.has(rank));
        self.words[rank / 64] &= !(1 << (rank % 64));
    }

    #[inline]
    pub(crate) fn has(&self, rank: usize) -> bool {
        self.words[rank / 64] >> (rank % 64) & 1 == 1
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) fn iter(self) -> Around {
        self.iter_from(0)
    }

    /// From `first` on, and around.
    #[inline]
    pub(crate) fn iter_from(self, first: usize) -> Around {
        let (word, behind) = (first / 64, u64::MAX << (first % 64));
        Around { mask: self, first: word, before: !behind, word, bits: self.words[word] & behind }
    }
}

/// The ranks of a mask from one on, and around. By hand: what adapters make of it is a tenth of a small message.
pub(crate) struct Around {
    /// Its `len` counts those still to come.
    mask: Mask,
    first: usize,
    /// Bits of the first word that come last.
    before: u64,
    word: usize,
    /// Of `word`, still to come.
    bits: u64,
}

impl Iterator for Around {
    type Item = usize;

    #[inline]
    fn next(&mut self) -> Option<usize> {
        self.mask.len = self.mask.len.checked_sub(1)?;
        while self.bits == 0 {
            self.word = if self.word + 1 < WORDS { self.word + 1 } else { 0 };
            let wanted = if self.word == self.first { self.before } else { u64::MAX };
            self.bits = self.mask.words[self.word] & wanted;
        }
        let bit = self.bits.trailing_zeros() as usize;
        self.bits &= self.bits - 1;
        Some(self.word * 64 + bit)
    }
}

/// The positions of the bits that are set, ascending.
#[inline]
pub(crate) fn bits_of(mut bits: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        if bits == 0 {
            return None;
        }
        let at = bits.trailing_zeros() as usize;
        bits &= bits - 1;
        Some(at)
    })
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn holds_what_was_set() {
        let mut mask = Mask::default();
        assert!(mask.is_empty());
        for rank in [0, 63, 64, MAX_LOCAL - 1] {
            mask.set(rank);
        }
        mask.set(64);
        mask.clear(63);
        mask.clear(63);
        assert!(mask.has(64) && !mask.has(63) && !mask.is_empty());
        assert_eq!(mask.iter().collect::<Vec<_>>(), vec![0, 64, MAX_LOCAL - 1]);
        assert_eq!(mask.iter_from(64).collect::<Vec<_>>(), vec![64, MAX_LOCAL - 1, 0]);
        assert_eq!(mask.iter_from(65).collect::<Vec<_>>(), vec![MAX_LOCAL - 1, 0, 64]);
        assert_eq!(mask.iter_from(MAX_LOCAL - 1).collect::<Vec<_>>(), vec![MAX_LOCAL - 1, 0, 64]);
        assert_eq!(mask.iter_from(0).collect::<Vec<_>>(), mask.iter().collect::<Vec<_>>());
    }
}
