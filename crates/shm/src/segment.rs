//! A group's segment of shared memory: one sealed memfd, mapped whole by every local rank.
//!
//! Invariants
//! - **M1** The file has its final size before anybody else sees it, and the seals forbid changing it: no access inside
//!   the mapping can fault for lack of file.
//! - **M2** Every byte is allocated before the group is used (each rank allocates its own share, which also puts it near that
//!   rank's core), so none can fault for lack of memory later.
//! - **M3** Offsets come from [`Layout`] alone, whose parts lie within the mapping and are aligned for what they hold;
//!   indices are checked against it here.
//! - **M4** The mapping lives as long as the [`Segment`]; references into it borrow from it. Regions of its data area do
//!   not, and are used only by code that holds the segment.

use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;

use rustix::fs::{FallocateFlags, SealFlags};
use rustix::mm::{Advice, MapFlags};
use smddp_core::Region;
use smddp_core::order::Order;

use crate::deal::{DEALS, Deal};
use crate::error::ShmError;
use crate::geometry::{Agreed, Geometry, Header, Layout, MAGIC, VERSION};
use crate::layout::{AbortCell, Alerts, Control, Frame, INLINE, Line, Memory, SlotHead};
use crate::mask::MAX_LOCAL;
use crate::memfd::{self, out_of_memory};
use crate::sync::{AtomicU32, AtomicU64};

pub(crate) struct Segment {
    base: NonNull<u8>,
    layout: Layout,
    far: Order,
}

// SAFETY: the mapping is not tied to a thread, and everything in it is shared under the protocols' rules (L1).
unsafe impl Send for Segment {}
// SAFETY: as above.
unsafe impl Sync for Segment {}

impl Segment {
    /// A new segment, and the file to hand to the others. Allocates local rank 0's share.
    pub(crate) fn create(
        layout: Layout,
        group: u64,
        agreed: Agreed,
        pid_space: u64,
    ) -> Result<(Segment, OwnedFd), ShmError> {
        let total = layout.total();
        let file = memfd::create("smddp-group", total)?;
        let segment = Segment::map(&file, layout)?;
        segment.allocate(&file, 0)?;
        // SAFETY: the header is the first thing in the mapping, nobody else has it yet.
        unsafe { segment.base.cast::<Header>().write(layout.header(group, agreed, pid_space)) };
        Ok((segment, file))
    }

    /// The segment behind a file that came from local rank 0, checked; allocates `rank`'s share.
    pub(crate) fn open(
        file: &OwnedFd,
        group: u64,
        local_size: usize,
        rank: usize,
    ) -> Result<(Segment, Header), ShmError> {
        let seals = rustix::fs::fcntl_get_seals(file)
            .map_err(|e| ShmError::Refused(format!("what local rank 0 sent is no memfd: {e}")))?;
        if !seals.contains(SealFlags::SHRINK | SealFlags::GROW) {
            return Err(ShmError::Refused("the memory that local rank 0 sent could shrink".to_owned()));
        }
        let size = rustix::fs::fstat(file).map_err(|e| ShmError::system("fstat", e))?.st_size;
        let mut header = <Header as bytemuck::Zeroable>::zeroed();
        let read = rustix::io::pread(file, bytemuck::bytes_of_mut(&mut header), 0)
            .map_err(|e| ShmError::system("reading a segment's header", e))?;
        let layout = check(&header, read, size as u64, group, local_size)?;
        let segment = Segment::map(file, layout)?;
        segment.allocate(file, rank)?;
        Ok((segment, header))
    }

    fn map(file: impl AsFd, layout: Layout) -> Result<Segment, ShmError> {
        Ok(Segment {
            base: memfd::map(file, layout.total(), MapFlags::empty())?,
            layout,
            far: Order::Straight,
        })
    }

    /// M2 for the share of `rank`.
    fn allocate(&self, file: impl AsFd, rank: usize) -> Result<(), ShmError> {
        let (offset, len) = self.layout.share(rank);
        rustix::fs::fallocate(file, FallocateFlags::empty(), offset as u64, len as u64)
            .map_err(|e| out_of_memory(self.layout.total(), e))?;
        // SAFETY: the range lies within the mapping (M3); populating changes no byte.
        let populated = unsafe {
            rustix::mm::madvise(self.base.as_ptr().add(offset).cast(), len, Advice::LinuxPopulateWrite)
        };
        if let Err(error) = populated {
            // Kernels before 5.14 cannot; pages are then mapped as they are touched.
            tracing::debug!(%error, "shared memory is not mapped ahead");
        }
        Ok(())
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Much of it is read in this order from now on.
    pub(crate) fn read_in(&mut self, far: Order) {
        self.far = far;
    }

    /// The order in which this rank reads much of it.
    #[inline]
    pub(crate) fn far(&self) -> Order {
        self.far
    }

    /// A reference to the `T` at `offset`.
    #[inline]
    fn at<T>(&self, offset: usize) -> &T {
        debug_assert!(
            offset + size_of::<T>() <= self.layout.total() && offset.is_multiple_of(align_of::<T>())
        );
        // SAFETY: M3 and M4; the callers ask only for types that any bytes make valid and that are shared under
        // the rules of `layout` (L2, L3).
        unsafe { self.base.add(offset).cast::<T>().as_ref() }
    }

    fn region(&self, offset: usize, len: usize) -> Region {
        debug_assert!(offset + len <= self.layout.total());
        // SAFETY: within the mapping (M3), which outlives every use (M4).
        unsafe { Region::new(self.base.as_ptr().add(offset), len) }
    }

    /// Data area `index` of `rank`; whose it is in an exchange, `ring` says.
    #[inline]
    pub(crate) fn data(&self, rank: usize, index: usize) -> Region {
        assert!(rank < self.layout.local_size && index < self.layout.geometry.slots);
        self.region(self.layout.slot(rank, index), self.layout.geometry.slot)
    }

    /// The inline bytes of the head of slot `index` of `rank`.
    #[inline]
    pub(crate) fn inline(&self, rank: usize, index: usize) -> Region {
        let head = self.slot(rank, index).body();
        // SAFETY: within the mapping (M3, M4); no reference is made.
        unsafe { Region::new((&raw mut (*head).inline).cast(), INLINE) }
    }

    /// The data behind the head of a message cell.
    #[inline]
    pub(crate) fn cell_data(&self, from: usize, to: usize, index: usize) -> Region {
        let head = size_of::<Line<Frame>>();
        assert!(from.max(to) < self.layout.local_size && index < self.layout.cells);
        self.region(self.layout.cell(from, to, index) + head, self.layout.cell_stride - head)
    }

    /// Address, in this process, of the word that says whether local rank 0 is inside the door of `rank`; those of the others follow.
    pub(crate) fn insides(&self, rank: usize) -> u64 {
        std::ptr::from_ref(self.inside(rank, 0)) as u64
    }

    /// The process of `rank`, as local rank 0 sees it; 0 when it does not.
    pub(crate) fn pid(&self, rank: usize) -> &AtomicU32 {
        assert!(rank < self.layout.local_size);
        self.at(self.layout.pids + 4 * rank)
    }
}

impl Memory for Segment {
    #[inline]
    fn alerts(&self) -> &Alerts {
        self.at(self.layout.alerts)
    }

    fn abort_text(&self) -> &AbortCell {
        self.at(self.layout.abort_text)
    }

    #[inline]
    fn control(&self, rank: usize) -> &Control {
        assert!(rank < self.layout.local_size);
        self.at(self.layout.control(rank))
    }

    #[inline]
    fn slot(&self, rank: usize, index: usize) -> &Line<SlotHead> {
        assert!(rank < self.layout.local_size && index < self.layout.geometry.slots);
        self.at(self.layout.head(rank, index))
    }

    #[inline]
    fn cell(&self, from: usize, to: usize, index: usize) -> &Line<Frame> {
        assert!(from.max(to) < self.layout.local_size && index < self.layout.cells);
        self.at(self.layout.cell(from, to, index))
    }

    #[inline]
    fn deal(&self, from: usize, to: usize, index: usize) -> &Deal {
        assert!(from.max(to) < self.layout.local_size && index < DEALS);
        self.at(self.layout.deal(from, to, index))
    }

    #[inline]
    fn closed(&self, rank: usize) -> &AtomicU64 {
        assert!(rank < self.layout.local_size);
        self.at(self.layout.door(rank))
    }

    #[inline]
    fn inside(&self, rank: usize, peer: usize) -> &AtomicU64 {
        assert!(rank.max(peer) < self.layout.local_size);
        self.at(self.layout.door(rank) + 8 * (1 + peer))
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing borrows from it any more (M4).
        unsafe { memfd::unmap(self.base, self.layout.total()) };
    }
}

/// The layout a header describes, when it is ours in every respect.
fn check(header: &Header, read: usize, size: u64, group: u64, local_size: usize) -> Result<Layout, ShmError> {
    let refuse = |what: String| Err(ShmError::Refused(format!("the segment that local rank 0 sent {what}")));
    if read != size_of::<Header>() || header.magic != MAGIC {
        return refuse("is not one of this library".to_owned());
    }
    if header.version != VERSION {
        return refuse(format!("has version {}, this rank speaks {VERSION}", header.version));
    }
    if header.group != group || header.local_size as usize != local_size || local_size > MAX_LOCAL {
        return refuse(format!("is for {} ranks of group {:x}", header.local_size, header.group));
    }
    let geometry = Geometry { slot: header.slot as usize, slots: header.slots as usize };
    if geometry != geometry.fitted(local_size) {
        return refuse(format!("has impossible slots: {geometry:?}"));
    }
    let layout = Layout::new(geometry, local_size);
    if layout.total() as u64 != header.total || size != header.total {
        return refuse(format!("has {size} bytes, expected {}", layout.total()));
    }
    Ok(layout)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::geometry::SingleCopies;

    const AGREED: Agreed =
        Agreed { single_copy: SingleCopies { mutual: true, alone: false }, hands_back: false };

    fn layout() -> Layout {
        Layout::new(Geometry { slot: 4096, slots: 2 }.fitted(3), 3)
    }

    #[test]
    fn what_one_mapping_writes_the_other_reads() {
        let (ours, file) = Segment::create(layout(), 7, AGREED, 1).unwrap();
        let (theirs, header) = Segment::open(&file, 7, 3, 2).unwrap();
        assert_eq!(header, layout().header(7, AGREED, 1));
        assert_eq!(header.agreed(), AGREED);
        let mut bytes = *b"some words";
        // SAFETY: `bytes` outlives the copy.
        let from = unsafe { Region::of(&mut bytes) };
        ours.data(2, 1).slice(100, 10).copy_from(from);
        let mut back = [0u8; 10];
        // SAFETY: as above.
        unsafe { Region::of(&mut back) }.copy_from(theirs.data(2, 1).slice(100, 10));
        assert_eq!(back, bytes);
    }

    #[test]
    fn a_segment_of_another_group_size_or_version_is_refused() {
        let (_ours, file) = Segment::create(layout(), 7, AGREED, 1).unwrap();
        let refused = |group, size| match Segment::open(&file, group, size, 1) {
            Err(ShmError::Refused(text)) => text,
            other => panic!("not refused: {:?}", other.err()),
        };
        assert!(refused(8, 3).contains("group 7"));
        assert!(refused(7, 2).contains("3 ranks"));
        let header = layout().header(7, AGREED, 1);
        let size = header.total;
        let all = size_of::<Header>();
        assert!(check(&header, all, size, 7, 3).is_ok());
        assert!(check(&Header { version: 99, ..header }, all, size, 7, 3).is_err());
        assert!(check(&Header { magic: 1, ..header }, all, size, 7, 3).is_err());
        assert!(check(&Header { slot: u64::MAX, ..header }, all, size, 7, 3).is_err());
        assert!(check(&Header { slots: 1 << 40, ..header }, all, size, 7, 3).is_err());
        assert!(check(&header, all - 1, size, 7, 3).is_err());
        assert!(check(&header, all, size - 1, 7, 3).is_err());
    }

    proptest! {
        /// Whatever local rank 0 sends: a layout that fits the file, or a refusal.
        #[test]
        fn any_header_is_refused_or_describes_its_file(
            slot in prop_oneof![Just(4096usize), Just(64 << 10), Just(1 << 20)], slots in 1usize..20,
            at in 0usize..size_of::<Header>() / 4, word in prop_oneof![any::<u32>(), 0u32..200], more: bool,
            bytes in prop::collection::vec(any::<u8>(), size_of::<Header>()),
        ) {
            let layout = Layout::new(Geometry { slot, slots }.fitted(3), 3);
            let mut header = layout.header(7, AGREED, 1);
            let (honest, all) = (header.total, size_of::<Header>());
            prop_assert!(check(&header, all, honest, 7, 3).is_ok());
            bytemuck::cast_slice_mut::<u8, u32>(bytemuck::bytes_of_mut(&mut header))[at] = word;
            for size in [honest, header.total, honest + u64::from(more)] {
                if let Ok(found) = check(&header, all, size, 7, 3) {
                    prop_assert_eq!((found.total() as u64, found.local_size), (size, 3));
                    prop_assert_eq!(header.group, 7);
                    let last = found.geometry.slots - 1;
                    prop_assert!(found.slot(2, last) + found.geometry.slot <= found.total());
                }
            }
            let noise: Header = bytemuck::pod_read_unaligned(&bytes);
            prop_assert!(check(&noise, all, noise.total, 7, 3).is_err());
        }
    }

    #[test]
    fn a_file_that_could_shrink_is_refused() {
        use rustix::fs::MemfdFlags;
        let file = rustix::fs::memfd_create("open", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        assert!(matches!(Segment::open(&file, 7, 3, 1), Err(ShmError::Refused(_))));
    }
}
