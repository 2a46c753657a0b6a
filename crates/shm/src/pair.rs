//! Message cells from one rank to another: a ring with one writer and one reader, the turn told by each cell's word.
//!
//! - **C1** In lap `n` (0, 1, …) a cell is its writer's while its word is `2n`, its reader's while it is `2n + 1`; the
//!   reader hands it back with `2n + 2`, the writer's word of the next lap.
//! - **C2** Cells are used in order, so frames arrive in the order they were sent.

use crate::layout::{Frame, Line};

/// One side's place in the ring.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Place {
    at: u64,
}

impl Place {
    #[inline]
    pub(crate) fn index(&self, cells: usize) -> usize {
        (self.at % cells as u64) as usize
    }

    fn lap(&self, cells: usize) -> u64 {
        self.at / cells as u64
    }

    /// For the writer: whether `cell`, the one at this place, may be filled.
    #[inline]
    pub(crate) fn is_free(&self, cell: &Line<Frame>, cells: usize) -> bool {
        cell.word() == 2 * self.lap(cells)
    }

    /// For the writer: hands the free `cell` over and steps on.
    #[inline]
    pub(crate) fn publish(&mut self, cell: &Line<Frame>, cells: usize, frame: Frame) {
        cell.publish(2 * self.lap(cells) + 1, |body| *body = frame);
        self.at += 1;
    }

    /// For the reader: the frame in `cell`, the one at this place, once it is there.
    #[inline]
    pub(crate) fn arrived(&self, cell: &Line<Frame>, cells: usize) -> Option<Frame> {
        (cell.word() == 2 * self.lap(cells) + 1).then(|| cell.read(|frame| *frame))
    }

    /// For the reader: hands `cell` back and steps on.
    #[inline]
    pub(crate) fn release(&mut self, cell: &Line<Frame>, cells: usize) {
        cell.release(2 * self.lap(cells) + 2);
        self.at += 1;
    }
}
