//! Buffers of one measurement: filled with fresh data, called, checked.
//!
//! Values depend on the element's place (with period 7, which no power of two hides) and on the rank, and are small,
//! so that results are exact in every type for the numbers of ranks a machine holds.

use smddp::{Collective, Communicator, DType, Element, Error, ReduceOp, Region, Result, SharedMemory};

/// Values repeat after this many elements; prime, so that a block at a wrong place is seen.
const PERIOD: usize = 7;

/// Buffers begin at page boundaries, as allocators give them for large tensors.
const ALIGN: usize = 4096;

/// An element that data can be made of.
pub trait Sample: Element + PartialEq + Default {
    /// The value `v`, wrapped as integers wrap; for bool whether it is odd.
    fn of(v: i64) -> Self;
    /// `sum / n` as [`ReduceOp::Avg`] has it.
    fn mean(sum: i64, n: i64) -> Self;
    /// Whether `self` may stand for `wanted`: equal, or as near as rounding allows.
    fn near(self, wanted: Self) -> bool;
}

macro_rules! whole {
    ($($t:ty),*) => { $(impl Sample for $t {
        fn of(v: i64) -> Self { v as $t }
        // Sums wrap before they are divided.
        fn mean(sum: i64, n: i64) -> Self { (i64::from(sum as $t) / n) as $t }
        fn near(self, wanted: Self) -> bool { self == wanted }
    })* };
}
whole!(u8, i8, i16, i32, i64);

macro_rules! float {
    ($($t:ty, $from:expr, $to:expr, $digits:expr;)*) => { $(impl Sample for $t {
        fn of(v: i64) -> Self { $from(v as f64) }
        fn mean(sum: i64, n: i64) -> Self { $from(sum as f64 / n as f64) }
        fn near(self, wanted: Self) -> bool {
            let (a, b): (f64, f64) = ($to(self), $to(wanted));
            (a - b).abs() <= b.abs() * 2f64.powi(-$digits)
        }
    })* };
}
// One unit in the last place: rounded once a hop, and twice at most on the way.
float! {
    half::f16, half::f16::from_f64, half::f16::to_f64, 9;
    half::bf16, half::bf16::from_f64, half::bf16::to_f64, 6;
    f32, |v: f64| v as f32, f64::from, 22;
    f64, |v: f64| v, |v: f64| v, 51;
}

impl Sample for bool {
    fn of(v: i64) -> Self {
        v & 1 == 1
    }
    fn mean(_: i64, _: i64) -> Self {
        false // Avg is not defined for bool; the command line refuses it.
    }
    fn near(self, wanted: Self) -> bool {
        self == wanted
    }
}

/// Elements that begin at a page boundary.
pub struct Aligned<T> {
    store: Store<T>,
    /// Of the first element.
    start: usize,
    len: usize,
}

enum Store<T> {
    Own(Vec<T>),
    Shared(SharedMemory),
}

impl<T: Sample> Aligned<T> {
    pub fn new(len: usize) -> Self {
        let slack = ALIGN / size_of::<T>();
        let store = vec![T::default(); len + slack];
        let start = store.as_ptr().align_offset(ALIGN).min(slack);
        Aligned { store: Store::Own(store), start, len }
    }

    /// In memory that the ranks of `comm` share.
    fn shared(comm: &Communicator, len: usize) -> Result<Self> {
        let store = SharedMemory::new(comm, len * size_of::<T>())?;
        match store.why_not() {
            Some(reason) => {
                Err(Error::Internal(format!("memory that is not shared measures nothing: {reason}")))
            }
            None => Ok(Aligned { store: Store::Shared(store), start: 0, len }),
        }
    }

    fn get(&self) -> &[T] {
        match &self.store {
            Store::Own(store) => &store[self.start..self.start + self.len],
            // SAFETY: mapped as long as `self` lives, `len` elements long, any bytes are a number (bool: zeros, ones).
            Store::Shared(store) => unsafe {
                std::slice::from_raw_parts(store.region().as_ptr().cast(), self.len)
            },
        }
    }

    pub fn get_mut(&mut self) -> &mut [T] {
        match &mut self.store {
            Store::Own(store) => &mut store[self.start..self.start + self.len],
            // SAFETY: as above; peers touch it during calls alone.
            Store::Shared(store) => unsafe {
                std::slice::from_raw_parts_mut(store.region().as_ptr().cast(), self.len)
            },
        }
    }
}

/// What is measured, without its size.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    pub collective: Collective,
    pub op: ReduceOp,
    pub root: usize,
    /// The data that other ranks read lies in memory that the ranks share.
    pub shared: bool,
    /// Inputs are written anew before each call.
    pub fresh: bool,
    /// Results are read behind each call.
    pub used: bool,
}

/// Elements of the whole buffer (nccl-tests' "size") and of a rank's block, for at most `bytes`; `None` when not even
/// one element fits. `bytes` counts the largest buffer: the output of a gather, the input of a scatter.
pub fn shape(collective: Collective, dtype: DType, bytes: usize, world: usize) -> Option<(usize, usize)> {
    let total = bytes / dtype.size();
    let (total, block) = match collective {
        Collective::AllReduce | Collective::Broadcast | Collective::Reduce | Collective::SendRecv => {
            (total, total)
        }
        Collective::ReduceScatter
        | Collective::AllGather
        | Collective::AllToAll
        | Collective::Gather
        | Collective::Scatter => (total / world * world, total / world),
        Collective::Barrier => return Some((0, 0)),
    };
    (block > 0).then_some((total, block))
}

/// Bus bandwidth over algorithm bandwidth, as nccl-tests defines it.
pub fn bus_factor(collective: Collective, world: usize) -> f64 {
    let n = world as f64;
    match collective {
        Collective::AllReduce => 2.0 * (n - 1.0) / n,
        Collective::ReduceScatter
        | Collective::AllGather
        | Collective::AllToAll
        | Collective::Gather
        | Collective::Scatter => (n - 1.0) / n,
        Collective::Broadcast | Collective::Reduce | Collective::SendRecv => 1.0,
        Collective::Barrier => 0.0,
    }
}

/// The buffers of one rank.
pub struct Workload<'a, T> {
    comm: &'a Communicator,
    kind: Kind,
    block: usize,
    /// The large buffer: in-place data, a gather's output, a scatter's input.
    x: Aligned<T>,
    /// The other one; empty where there is none.
    y: Aligned<T>,
}

impl<'a, T: Sample> Workload<'a, T> {
    /// `total` and `block` as [`shape`] gives them.
    pub fn new(comm: &'a Communicator, kind: Kind, total: usize, block: usize) -> Result<Self> {
        let (x, y) = match kind.collective {
            Collective::AllReduce | Collective::Broadcast | Collective::Reduce => (total, 0),
            Collective::ReduceScatter | Collective::AllGather => (total, block),
            Collective::AllToAll | Collective::SendRecv => (total, total),
            Collective::Gather | Collective::Scatter if comm.rank() == kind.root => (total, block),
            Collective::Gather | Collective::Scatter => (0, block),
            Collective::Barrier => (0, 0),
        };
        let make = |len, read_by_others| {
            if kind.shared && read_by_others { Aligned::shared(comm, len) } else { Ok(Aligned::new(len)) }
        };
        let gathers = matches!(kind.collective, Collective::AllGather | Collective::Gather);
        Ok(Workload { comm, kind, block, x: make(x, !gathers)?, y: make(y, gathers)? })
    }

    /// The large buffer and the other one. Valid as long as the workload; whoever writes to them does so between calls.
    pub fn regions(&mut self) -> (Region, Region) {
        // SAFETY: the caller keeps to what the line above says.
        unsafe { (Region::of(self.x.get_mut()), Region::of(self.y.get_mut())) }
    }

    /// One call. Allocates nothing itself.
    pub fn call(&mut self) -> Result<()> {
        let Kind { collective, op, root, .. } = self.kind;
        let (comm, mine) = (self.comm, self.comm.rank() == root);
        match collective {
            Collective::AllReduce => comm.all_reduce(self.x.get_mut(), op),
            Collective::ReduceScatter => comm.reduce_scatter(self.x.get(), self.y.get_mut(), op),
            Collective::AllGather => comm.all_gather(self.y.get(), self.x.get_mut()),
            Collective::AllToAll => comm.all_to_all(self.x.get(), self.y.get_mut()),
            Collective::Broadcast => comm.broadcast(self.x.get_mut(), root),
            Collective::Reduce => comm.reduce(self.x.get_mut(), root, op),
            Collective::Gather => comm.gather(self.y.get(), mine.then(|| self.x.get_mut()), root),
            Collective::Scatter => comm.scatter(mine.then(|| self.x.get()), self.y.get_mut(), root),
            Collective::Barrier => comm.barrier(),
            Collective::SendRecv => self.ring(),
        }
    }

    /// To the next rank and from the one before, both at once.
    fn ring(&mut self) -> Result<()> {
        let (rank, size) = (self.comm.rank(), self.comm.size());
        let (next, last) = ((rank + 1) % size, (rank + size - 1) % size);
        self.comm.sendrecv(self.x.get(), next, self.y.get_mut(), last, 0)
    }

    /// Fresh data in the inputs, something else in the outputs.
    pub fn fill(&mut self) {
        let (rank, block, kind) = (self.comm.rank(), self.block, self.kind);
        let reduced = |i| T::of(contribution(kind.op, i, rank));
        let junk = |_| T::of(1);
        match kind.collective {
            Collective::AllReduce | Collective::Reduce => fill(self.x.get_mut(), 0, reduced),
            Collective::ReduceScatter => {
                fill(self.x.get_mut(), 0, reduced);
                fill(self.y.get_mut(), 0, junk);
            }
            Collective::AllGather | Collective::Gather => {
                fill(self.x.get_mut(), 0, junk);
                fill(self.y.get_mut(), 0, |i| labelled(i, rank, 0));
            }
            Collective::AllToAll => {
                for (to, part) in self.x.get_mut().chunks_exact_mut(block.max(1)).enumerate() {
                    fill(part, 0, |i| labelled(i, rank, to));
                }
                fill(self.y.get_mut(), 0, junk);
            }
            Collective::Scatter => {
                for (to, part) in self.x.get_mut().chunks_exact_mut(block.max(1)).enumerate() {
                    fill(part, 0, |i| labelled(i, kind.root, to));
                }
                fill(self.y.get_mut(), 0, junk);
            }
            Collective::Broadcast => fill(self.x.get_mut(), 0, |i| labelled(i, rank, 0)),
            Collective::SendRecv => {
                fill(self.x.get_mut(), 0, |i| labelled(i, rank, 0));
                fill(self.y.get_mut(), 0, junk);
            }
            Collective::Barrier => {}
        }
    }

    /// Whether this rank's result of one call on what [`Workload::fill`] left is right.
    pub fn check(&self) -> bool {
        let (rank, size, block, kind) = (self.comm.rank(), self.comm.size(), self.block, self.kind);
        let reduced = |i| combined::<T>(kind.op, i, size);
        let blocks = |buffer: &[T], want: &dyn Fn(usize, usize) -> T| {
            buffer.chunks_exact(block.max(1)).enumerate().all(|(b, part)| matches(part, 0, |i| want(i, b)))
        };
        match kind.collective {
            Collective::AllReduce => matches(self.x.get(), 0, reduced),
            Collective::Reduce if rank == kind.root => matches(self.x.get(), 0, reduced),
            Collective::Reduce => matches(self.x.get(), 0, |i| T::of(contribution(kind.op, i, rank))),
            Collective::ReduceScatter => matches(self.y.get(), rank * block, reduced),
            Collective::AllGather => blocks(self.x.get(), &|i, from| labelled(i, from, 0)),
            Collective::Gather if rank == kind.root => blocks(self.x.get(), &|i, from| labelled(i, from, 0)),
            Collective::Gather => true,
            Collective::AllToAll => blocks(self.y.get(), &|i, from| labelled(i, from, rank)),
            Collective::Scatter => matches(self.y.get(), 0, |i| labelled(i, kind.root, rank)),
            Collective::Broadcast => matches(self.x.get(), 0, |i| labelled(i, kind.root, 0)),
            Collective::SendRecv => matches(self.y.get(), 0, |i| labelled(i, (rank + size - 1) % size, 0)),
            Collective::Barrier => true,
        }
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Writes zeros into what this rank brings to a call, as a program that computes it writes it.
    pub fn renew(&mut self) {
        match self.kind.collective {
            Collective::AllGather | Collective::Gather => self.y.get_mut().fill(T::default()),
            Collective::Broadcast | Collective::Scatter if self.comm.rank() != self.kind.root => {}
            _ => self.x.get_mut().fill(T::default()),
        }
    }

    /// Looks at every cache line of what a call left on this rank, as a program that goes on with it does.
    pub fn read_result(&self) {
        let is_root = self.comm.rank() == self.kind.root;
        let result = match self.kind.collective {
            Collective::AllReduce | Collective::AllGather => self.x.get(),
            Collective::Broadcast if !is_root => self.x.get(),
            Collective::Reduce | Collective::Gather if is_root => self.x.get(),
            Collective::Broadcast | Collective::Reduce | Collective::Gather | Collective::Barrier => &[],
            _ => self.y.get(),
        };
        for first_of_line in result.iter().step_by(64 / size_of::<T>()) {
            std::hint::black_box(*first_of_line);
        }
    }

    /// Zeros, so that in-place sums stay finite however often they are repeated.
    pub fn clear(&mut self) {
        self.x.get_mut().fill(T::default());
        self.y.get_mut().fill(T::default());
    }
}

/// What rank `rank` brings to a reduction at place `i`.
fn contribution(op: ReduceOp, i: usize, rank: usize) -> i64 {
    let i = (i % PERIOD) as i64;
    let r = rank as i64;
    match op {
        ReduceOp::Sum | ReduceOp::Avg => (i + r) % 4,
        // Mostly ones: powers of two are exact in every float, and wrap alike in every integer.
        ReduceOp::Product => 1 + i64::from((i + r) % 8 == 0),
        ReduceOp::Min | ReduceOp::Max => (3 * i + 5 * r) % 11,
        ReduceOp::BitAnd | ReduceOp::BitOr | ReduceOp::BitXor => (11 * i + 37 * r) & 0x7f,
    }
}

/// The combination of all ranks' contributions at place `i`.
fn combined<T: Sample>(op: ReduceOp, i: usize, world: usize) -> T {
    let all = (0..world).map(|r| contribution(op, i, r));
    if T::DTYPE == DType::Bool {
        let bits = all.map(|v| v & 1);
        return T::of(match op {
            ReduceOp::Sum | ReduceOp::Max | ReduceOp::BitOr | ReduceOp::Avg => bits.fold(0, |a, b| a | b),
            ReduceOp::Product | ReduceOp::Min | ReduceOp::BitAnd => bits.fold(1, |a, b| a & b),
            ReduceOp::BitXor => bits.fold(0, |a, b| a ^ b),
        });
    }
    match op {
        ReduceOp::Sum => T::of(all.sum()),
        ReduceOp::Avg => T::mean(all.sum(), world as i64),
        ReduceOp::Product => T::of(all.fold(1, |a: i64, b| a.wrapping_mul(b))),
        ReduceOp::Min => T::of(all.min().unwrap_or(0)),
        ReduceOp::Max => T::of(all.max().unwrap_or(0)),
        ReduceOp::BitAnd => T::of(all.fold(-1, |a, b| a & b)),
        ReduceOp::BitOr => T::of(all.fold(0, |a, b| a | b)),
        ReduceOp::BitXor => T::of(all.fold(0, |a, b| a ^ b)),
    }
}

/// Place `i` of the block that `from` means for `to`.
fn labelled<T: Sample>(i: usize, from: usize, to: usize) -> T {
    T::of(((i % PERIOD + 3 * from + 5 * to) % 101) as i64)
}

/// One period of `value`, as it begins at place `first`.
fn pattern<T: Sample>(first: usize, value: impl Fn(usize) -> T) -> [T; PERIOD] {
    std::array::from_fn(|k| value((first + k) % PERIOD + first / PERIOD * PERIOD))
}

fn fill<T: Sample>(buffer: &mut [T], first: usize, value: impl Fn(usize) -> T) {
    let period = pattern(first, value);
    for chunk in buffer.chunks_mut(PERIOD) {
        chunk.copy_from_slice(&period[..chunk.len()]);
    }
}

fn matches<T: Sample>(buffer: &[T], first: usize, value: impl Fn(usize) -> T) -> bool {
    let period = pattern(first, value);
    let same = |chunk: &[T]| {
        *chunk == period[..chunk.len()] || chunk.iter().zip(&period).all(|(&got, &want)| got.near(want))
    };
    buffer.chunks(PERIOD).all(same)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_element_or_a_shifted_block_is_seen() {
        let mut buffer = vec![0f32; 1000];
        let value = |i| f32::of(contribution(ReduceOp::Sum, i, 1));
        fill(&mut buffer, 0, value);
        assert!(matches(&buffer, 0, value));
        assert!(!matches(&buffer, 64, value), "a shift by a power of two must show");
        buffer[999] += 1.0;
        assert!(!matches(&buffer, 0, value));
    }

    #[test]
    fn renewing_writes_what_a_rank_brings_and_nothing_else() {
        let alone = [("SMDDP_BOOTSTRAP".to_owned(), "single".to_owned())];
        let world = smddp::World::init_with(smddp::Settings::from_vars(alone).unwrap(), &[]).unwrap();
        let zeros = |collective, root| {
            let kind = Kind { collective, op: ReduceOp::Sum, root, shared: false, fresh: true, used: true };
            let mut work = Workload::<f32>::new(&world, kind, 8, 8).unwrap();
            work.x.get_mut().fill(1.0);
            work.y.get_mut().fill(1.0);
            work.renew();
            let zero = |buffer: &[f32]| !buffer.is_empty() && buffer.iter().all(|&v| v == 0.0);
            (zero(work.x.get()), zero(work.y.get()))
        };
        for collective in [Collective::AllReduce, Collective::ReduceScatter, Collective::AllToAll] {
            assert_eq!(zeros(collective, 0), (true, false), "{collective}");
        }
        for collective in [Collective::AllGather, Collective::Gather] {
            assert_eq!(zeros(collective, 0), (false, true), "{collective}");
        }
        for collective in [Collective::Broadcast, Collective::Scatter] {
            assert_eq!(zeros(collective, 0), (true, false), "{collective}, at the root");
            assert_eq!(zeros(collective, 1), (false, false), "{collective}, elsewhere");
        }
    }

    #[test]
    fn combinations_are_those_of_the_contributions() {
        // rank r brings (i + r) % 4: at i = 3, ranks 0 to 2 bring 3, 0, 1.
        assert_eq!(combined::<i32>(ReduceOp::Sum, 3, 3), 4);
        assert_eq!(combined::<f64>(ReduceOp::Avg, 3, 3), 4.0 / 3.0);
        assert_eq!(combined::<i32>(ReduceOp::Avg, 3, 3), 1);
        // 86 ranks bring 131 together, which wraps in 8 bits.
        assert_eq!(combined::<i8>(ReduceOp::Avg, 2, 86), -1);
        // 11 * 2 & 0x7f = 22, and with 37 more 59: 22 ^ 59 = 45.
        assert_eq!(combined::<u8>(ReduceOp::BitXor, 2, 2), 45);
        assert!(!combined::<bool>(ReduceOp::Product, 0, 2), "1 and 2 are odd and even");
    }

    #[test]
    fn rounding_is_forgiven_but_not_more() {
        assert!(half::bf16::from_f32(1.0).near(half::bf16::from_f32(1.0078125)));
        assert!(!half::bf16::from_f32(1.0).near(half::bf16::from_f32(1.0625)));
        assert!(!1f32.near(1.0001));
        assert!(!f32::NAN.near(1.0));
    }

    #[test]
    fn sizes_hold_whole_blocks() {
        assert_eq!(shape(Collective::AllReduce, DType::F32, 10, 3), Some((2, 2)));
        assert_eq!(shape(Collective::AllGather, DType::F32, 64, 3), Some((15, 5)));
        assert_eq!(shape(Collective::AllGather, DType::F32, 8, 3), None);
        assert_eq!(bus_factor(Collective::AllReduce, 4), 1.5);
    }
}
