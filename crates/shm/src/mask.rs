//! Sets of local ranks.

/// Local ranks one segment can hold: as many as `Mask` has bits, so that the sleepers' mask and the abort flag
/// share one cache line.
pub const MAX_LOCAL: usize = WORDS * 64;

pub(crate) const WORDS: usize = 7;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Mask([u64; WORDS]);

impl Mask {
    #[inline]
    pub(crate) fn set(&mut self, rank: usize) {
        self.0[rank / 64] |= 1 << (rank % 64);
    }

    #[inline]
    pub(crate) fn clear(&mut self, rank: usize) {
        self.0[rank / 64] &= !(1 << (rank % 64));
    }

    #[inline]
    pub(crate) fn has(&self, rank: usize) -> bool {
        self.0[rank / 64] >> (rank % 64) & 1 == 1
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        // Folded: comparing arrays calls memcmp.
        self.0.iter().fold(0, |any, word| any | word) == 0
    }

    pub(crate) fn iter(self) -> Around {
        self.iter_from(0)
    }

    /// From `first` on, and around.
    #[inline]
    pub(crate) fn iter_from(self, first: usize) -> Around {
        let (word, behind) = (first / 64, u64::MAX << (first % 64));
        Around { mask: self, before: !behind, word, bits: self.0[word] & behind, words_left: WORDS }
    }
}

/// The ranks of a mask from one on, and around. By hand: what adapters make of it is a tenth of a small message.
pub(crate) struct Around {
    mask: Mask,
    /// Bits of the first word that come last.
    before: u64,
    word: usize,
    /// Of `word`, still to come.
    bits: u64,
    words_left: usize,
}

impl Iterator for Around {
    type Item = usize;

    #[inline]
    fn next(&mut self) -> Option<usize> {
        while self.bits == 0 {
            self.words_left = self.words_left.checked_sub(1)?;
            self.word = (self.word + 1) % WORDS;
            let wanted = if self.words_left == 0 { self.before } else { u64::MAX };
            self.bits = self.mask.0[self.word] & wanted;
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
        mask.clear(63);
        assert!(mask.has(64) && !mask.has(63) && !mask.is_empty());
        assert_eq!(mask.iter().collect::<Vec<_>>(), vec![0, 64, MAX_LOCAL - 1]);
        assert_eq!(mask.iter_from(64).collect::<Vec<_>>(), vec![64, MAX_LOCAL - 1, 0]);
        assert_eq!(mask.iter_from(65).collect::<Vec<_>>(), vec![MAX_LOCAL - 1, 0, 64]);
        assert_eq!(mask.iter_from(MAX_LOCAL - 1).collect::<Vec<_>>(), vec![MAX_LOCAL - 1, 0, 64]);
        assert_eq!(mask.iter_from(0).collect::<Vec<_>>(), mask.iter().collect::<Vec<_>>());
    }
}
