//! In which order memory is gone over.
//!
//! A core's prefetchers work within pages: it has more lines on the way from four pages at once than from one. That pays where lines
//! lie in another core's cache or in main memory, and costs where they are in the core's own first caches (docs/adr/0041). Not on every CPU: what
//! lies at the same place of each page shares a set of the first cache, which may have too few ways (docs/adr/0042).

/// What the prefetchers do not look beyond.
const PAGE: usize = 4096;
const PAGES: usize = 4;

/// The order of reads and writes of a copy or a reduction. Results do not depend on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// From the first byte to the last: what lies near.
    #[default]
    Straight,
    /// A little of each of four pages in turn: what comes from far.
    FourPages,
}

/// The order of the units, all of one size, that memory is cut into.
pub(crate) struct Walk {
    /// Units of a page.
    page: usize,
    /// Units that are gone over by four pages; what is left comes behind them, straight.
    far: usize,
}

impl Walk {
    /// Of `units` of `size` bytes, which is a power of two of at most a quarter of a page.
    #[inline(always)]
    pub(crate) fn new(order: Order, units: usize, size: usize) -> Walk {
        debug_assert!(size.is_power_of_two() && size <= PAGE / PAGES);
        let page = PAGE / size;
        let far = match order {
            Order::Straight => 0,
            Order::FourPages => units / (PAGES * page) * (PAGES * page),
        };
        Walk { page, far }
    }

    /// Units that are gone over by four pages.
    #[inline(always)]
    pub(crate) fn far(&self) -> usize {
        self.far
    }

    /// Which unit comes as number `n`.
    #[inline(always)]
    pub(crate) fn place(&self, n: usize) -> usize {
        if n >= self.far {
            return n;
        }
        let page = self.page;
        let (first, within) = (n / (PAGES * page) * (PAGES * page), n % (PAGES * page));
        let (which, step) = (within % PAGES, within / PAGES);
        first + which * page + step
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unit_is_gone_over_once() {
        for size in [64, 128, 256, 1024] {
            let group = PAGES * PAGE / size;
            for units in [0, 1, group - 1, group, group + 1, 3 * group + 7] {
                for order in [Order::Straight, Order::FourPages] {
                    let walk = Walk::new(order, units, size);
                    let mut places: Vec<usize> = (0..units).map(|n| walk.place(n)).collect();
                    let is_straight = places.is_sorted();
                    assert_eq!(is_straight, order == Order::Straight || units < group, "{size}, {units}");
                    places.sort_unstable();
                    assert!(places.into_iter().eq(0..units), "{size}, {units}, {order:?}");
                }
            }
        }
    }

    #[test]
    fn neighbours_lie_in_four_pages() {
        let walk = Walk::new(Order::FourPages, 1000, 64);
        let first: Vec<usize> = (0..8).map(|n| walk.place(n) * 64).collect();
        assert_eq!(first[..4], [0, PAGE, 2 * PAGE, 3 * PAGE]);
        assert_eq!(first[4..].iter().map(|place| place - 64).collect::<Vec<_>>(), first[..4]);
    }
}
