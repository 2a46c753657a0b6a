//! What a rank called: the description every peer compares before data moves.

use std::fmt;

use crate::dtype::{DType, ReduceOp};

/// What is called. Blocks are in rank order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Collective {
    /// Everybody gets the combination of all contributions.
    AllReduce = 1,
    /// Each rank gets its block of the combination.
    ReduceScatter = 2,
    /// Everybody gets everybody's block.
    AllGather = 3,
    /// Each rank sends a block to each.
    AllToAll = 4,
    /// Everybody gets the root's data.
    Broadcast = 5,
    /// The root gets the combination.
    Reduce = 6,
    /// The root gets everybody's block.
    Gather = 7,
    /// Each rank gets its block of the root's data.
    Scatter = 8,
    /// Nobody goes on before all have come.
    Barrier = 9,
    /// Point to point; both sides of one message carry the same value.
    SendRecv = 10,
}

impl Collective {
    pub const ALL: [Collective; 10] = [
        Collective::AllReduce,
        Collective::ReduceScatter,
        Collective::AllGather,
        Collective::AllToAll,
        Collective::Broadcast,
        Collective::Reduce,
        Collective::Gather,
        Collective::Scatter,
        Collective::Barrier,
        Collective::SendRecv,
    ];

    /// All but messages: what there are plans for.
    pub const PLANNED: [Collective; 9] = {
        let [planned @ .., Collective::SendRecv] = Self::ALL else { unreachable!() };
        planned
    };

    /// Those of them that move data.
    pub const MOVING: [Collective; 8] = {
        let [moving @ .., Collective::Barrier] = Self::PLANNED else { unreachable!() };
        moving
    };

    pub const fn name(self) -> &'static str {
        match self {
            Collective::AllReduce => "all_reduce",
            Collective::ReduceScatter => "reduce_scatter",
            Collective::AllGather => "all_gather",
            Collective::AllToAll => "all_to_all",
            Collective::Broadcast => "broadcast",
            Collective::Reduce => "reduce",
            Collective::Gather => "gather",
            Collective::Scatter => "scatter",
            Collective::Barrier => "barrier",
            Collective::SendRecv => "send/recv",
        }
    }

    pub fn from_name(name: &str) -> Option<Collective> {
        Self::ALL.into_iter().find(|c| c.name() == name)
    }

    pub fn from_code(code: u8) -> Option<Collective> {
        Self::ALL.into_iter().find(|c| *c as u8 == code)
    }

    /// Whether contributions are combined (so that dtype and reduction matter, not only bytes).
    pub const fn reduces(self) -> bool {
        matches!(self, Collective::AllReduce | Collective::ReduceScatter | Collective::Reduce)
    }

    /// Whether one rank is singled out.
    pub const fn rooted(self) -> bool {
        matches!(self, Collective::Broadcast | Collective::Reduce | Collective::Gather | Collective::Scatter)
    }
}

impl fmt::Display for Collective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One call as this rank made it. All ranks of a group must make equal calls in the same order.
///
/// `count` is in elements: of the whole buffer for all_reduce, broadcast, reduce; of one rank's block for
/// all_gather, reduce_scatter, gather, scatter, all_to_all. Uneven calls whose sizes differ from rank to rank by
/// design set [`Call::uneven`]; `count` is then a checksum of the lengths of all ranks' blocks, or 0 where each rank knows its own
/// alone, whose lengths are compared a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Call {
    pub collective: Collective,
    pub dtype: DType,
    /// Compared only when the collective reduces.
    pub op: ReduceOp,
    /// Group rank; compared only when the collective is rooted. 0 otherwise.
    pub root: u32,
    pub count: u64,
    pub uneven: bool,
    /// On memory that the node's ranks share ([`crate::shared`]); on all ranks or on none.
    pub shared: bool,
    /// With its data on a device ([`crate::far`]); on all ranks or on none.
    pub far: bool,
}

/// A [`Call`] in 16 bytes, as it travels in message and slot headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct PackedCall {
    pub collective: u8,
    pub dtype: u8,
    pub op: u8,
    /// Bits: 1 uneven, 2 in shared memory, 4 on a device.
    pub form: u8,
    pub root: u32,
    pub count: u64,
}

impl Call {
    pub fn new(collective: Collective, dtype: DType, count: u64) -> Call {
        Call {
            collective,
            dtype,
            op: ReduceOp::Sum,
            root: 0,
            count,
            uneven: false,
            shared: false,
            far: false,
        }
    }

    pub fn pack(&self) -> PackedCall {
        PackedCall {
            collective: self.collective as u8,
            dtype: self.dtype as u8,
            op: if self.collective.reduces() { self.op as u8 } else { 0 },
            form: (u8::from(self.uneven) * UNEVEN)
                | (u8::from(self.shared) * SHARED)
                | (u8::from(self.far) * FAR),
            root: if self.collective.rooted() { self.root } else { 0 },
            count: self.count,
        }
    }

    /// Bytes of `count` elements.
    pub fn bytes(&self) -> usize {
        self.count as usize * self.dtype.size()
    }
}

/// Bits of [`PackedCall::form`].
const UNEVEN: u8 = 1;
const SHARED: u8 = 2;
const FAR: u8 = 4;

impl PackedCall {
    pub fn is_shared(&self) -> bool {
        self.form & SHARED != 0
    }

    /// Whether one rank is singled out.
    pub fn is_rooted(&self) -> bool {
        Collective::from_code(self.collective).is_some_and(Collective::rooted)
    }

    /// `None` when a byte names nothing known: the peer runs another version, or memory was overwritten.
    pub fn unpack(&self) -> Option<Call> {
        Some(Call {
            collective: Collective::from_code(self.collective)?,
            dtype: DType::from_code(self.dtype)?,
            op: ReduceOp::from_code(self.op)?,
            root: self.root,
            count: self.count,
            uneven: self.form & UNEVEN != 0,
            shared: self.is_shared(),
            far: self.form & FAR != 0,
        })
    }
}

impl fmt::Display for PackedCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.unpack() {
            Some(call) => call.fmt(f),
            None => write!(f, "an unreadable call ({self:?})"),
        }
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}({}", self.collective, self.dtype)?;
        if self.uneven {
            write!(f, ", uneven")?;
            if self.count != 0 {
                write!(f, ", lengths #{:04x}", self.count & 0xffff)?;
            }
        } else {
            write!(f, "[{}]", self.count)?;
        }
        if self.collective.reduces() {
            write!(f, ", {}", self.op)?;
        }
        if self.collective.rooted() {
            write!(f, ", root {}", self.root)?;
        }
        if self.shared {
            write!(f, ", in shared memory")?;
        }
        if self.far {
            write!(f, ", on a device")?;
        }
        f.write_str(")")
    }
}
