//! One collective, send or receive: what a rank contributes and where the result goes.

use crate::comm::{Comm, Scalar};
use crate::driver::{self, Buffer};
use crate::dtype::{DType, Reduction, scale};
use crate::error::{Code, Error, Result, lock};
use crate::wire::{Call, Kind, Request};
use smddp_standin::switches::{Poison, Switches};

const POISON: u8 = 0xA5;
const PRE_MUL_SUM: i32 = 5;
/// CUDA_ERROR_ILLEGAL_ADDRESS.
const ILLEGAL_ADDRESS: i32 = 700;

enum What {
    Collective(Call),
    Send { peer: usize, count: u64, dtype: i32 },
    Recv { peer: usize, count: u64, dtype: i32 },
}

pub struct Operation {
    what: What,
    dtype: DType,
    from: Option<Buffer>,
    to: Option<Buffer>,
    scalar: Option<Source>,
}

enum Source {
    Bytes(Vec<u8>),
    Device(Buffer),
}

fn argument(text: String) -> Error {
    Error::new(Code::INVALID_ARGUMENT, text)
}

fn peer(comm: &Comm, rank: i32, what: &str) -> Result<usize> {
    usize::try_from(rank)
        .ok()
        .filter(|rank| *rank < comm.ranks)
        .ok_or_else(|| argument(format!("invalid {what} {rank} (value should be in 0..{})", comm.ranks)))
}

fn bytes(dtype: DType, count: usize, times: usize) -> Result<usize> {
    let all = count.checked_mul(dtype.size()).and_then(|bytes| bytes.checked_mul(times));
    all.ok_or_else(|| argument(format!("count {count} is too large")))
}

/// The scalar of a reduction of our own, and how the wire calls it.
fn reduction(comm: &Comm, op: i32, dtype: i32) -> Result<(i32, Option<Source>)> {
    if Reduction::of(op).is_some() {
        return Ok((op, None));
    }
    let found = lock(&comm.scalars).get(&op).copied();
    let (of, scalar) = found.ok_or_else(|| argument(format!("reduction operation {op} is unknown")))?;
    if of != dtype {
        return Err(argument(format!("reduction operation {op} is for type {of}, not {dtype}")));
    }
    let size = DType::of(dtype)?.size();
    let source = match scalar {
        Scalar::Immediate(word) => Source::Bytes(word[..size].to_vec()),
        Scalar::Device(address) => Source::Device(Buffer::new(address, size, "scalar")?),
    };
    Ok((PRE_MUL_SUM, Some(source)))
}

/// A collective's arguments as C gives them; what a kind does not use is 0.
pub struct Arguments {
    pub from: usize,
    pub to: usize,
    pub count: usize,
    pub dtype: i32,
    pub op: i32,
    pub root: i32,
}

/// Elements lie where their size divides the address: kernels read them so.
fn buffer(dtype: DType, address: usize, len: usize, what: &str) -> Result<Buffer> {
    if len > 0 && !address.is_multiple_of(dtype.size()) {
        return Err(argument(format!("{what} {address:#x} is not aligned to {} bytes", dtype.size())));
    }
    Buffer::new(address, len, what)
}

impl Operation {
    pub fn collective(comm: &Comm, kind: Kind, args: &Arguments) -> Result<Self> {
        let dtype = DType::of(args.dtype)?;
        let root = peer(comm, args.root, "root")?;
        let one = bytes(dtype, args.count, 1)?;
        let all = bytes(dtype, args.count, comm.ranks)?;
        let at_root = comm.rank == root;
        let (sends, receives) = match kind {
            Kind::AllReduce => (Some(one), Some(one)),
            Kind::ReduceScatter => (Some(all), Some(one)),
            Kind::AllGather => (Some(one), Some(all)),
            Kind::Broadcast => (at_root.then_some(one), Some(one)),
            Kind::Reduce => (Some(one), at_root.then_some(one)),
        };
        let reduces = matches!(kind, Kind::AllReduce | Kind::ReduceScatter | Kind::Reduce);
        let (op, scalar) = if reduces { reduction(comm, args.op, args.dtype)? } else { (0, None) };
        let call = Call { kind, count: args.count as u64, dtype: args.dtype, op, root: args.root };
        Ok(Self {
            what: What::Collective(call),
            dtype,
            from: sends.map(|len| buffer(dtype, args.from, len, "sendbuff")).transpose()?,
            to: receives.map(|len| buffer(dtype, args.to, len, "recvbuff")).transpose()?,
            scalar,
        })
    }

    pub fn send(comm: &Comm, from: usize, count: usize, dtype: i32, to: i32) -> Result<Self> {
        let (peer, of) = (peer(comm, to, "peer")?, DType::of(dtype)?);
        let from = Some(buffer(of, from, bytes(of, count, 1)?, "sendbuff")?);
        let what = What::Send { peer, count: count as u64, dtype };
        Ok(Self { what, dtype: of, from, to: None, scalar: None })
    }

    pub fn receive(comm: &Comm, to: usize, count: usize, dtype: i32, from: i32) -> Result<Self> {
        let (peer, of) = (peer(comm, from, "peer")?, DType::of(dtype)?);
        let to = Some(buffer(of, to, bytes(of, count, 1)?, "recvbuff")?);
        let what = What::Recv { peer, count: count as u64, dtype };
        Ok(Self { what, dtype: of, from: None, to, scalar: None })
    }

    pub fn name(&self) -> &'static str {
        match &self.what {
            What::Collective(call) => match call.kind {
                Kind::AllReduce => "ncclAllReduce",
                Kind::ReduceScatter => "ncclReduceScatter",
                Kind::AllGather => "ncclAllGather",
                Kind::Broadcast => "ncclBroadcast",
                Kind::Reduce => "ncclReduce",
            },
            What::Send { .. } => "ncclSend",
            What::Recv { .. } => "ncclRecv",
        }
    }

    /// A collective of one rank: no operation of the communicator's, in a group or not, but a copy on the stream, if that.
    pub fn copy(self, stream: usize) -> Result {
        let is_there = match (&self.from, &self.to) {
            (Some(from), Some(to)) => from.is_at(to) && self.scalar.is_none(),
            _ => true,
        };
        if is_there {
            return Ok(());
        }
        driver::launch(self.name(), &[stream], move || self.run_alone().map_or(ILLEGAL_ADDRESS, |()| 0))
    }

    fn run_alone(&self) -> Result {
        let bytes = self.contribution()?;
        self.poison()?;
        self.finish(&bytes)
    }

    pub fn request(&self, id: u64) -> Request {
        match &self.what {
            What::Collective(call) => Request::Collective { id, call: call.clone() },
            What::Send { peer, count, dtype } => {
                Request::Send { id, peer: *peer, count: *count, dtype: *dtype }
            }
            What::Recv { peer, count, dtype } => {
                Request::Recv { id, peer: *peer, count: *count, dtype: *dtype }
            }
        }
    }

    /// What this rank gives.
    pub fn contribution(&self) -> Result<Vec<u8>> {
        let mut bytes = self.from.as_ref().map_or(Ok(Vec::new()), Buffer::read)?;
        let scalar = match &self.scalar {
            Some(Source::Bytes(scalar)) => Some(scalar.clone()),
            Some(Source::Device(buffer)) => Some(buffer.read()?),
            None => None,
        };
        if let Some(scalar) = scalar {
            bytes = scale(self.dtype, &bytes, &scalar);
        }
        Ok(bytes)
    }

    /// Marks the result as not yet there.
    pub fn poison(&self) -> Result {
        match &self.to {
            Some(to) if Switches::get().poison != Poison::Off => to.fill(POISON),
            _ => Ok(()),
        }
    }

    pub fn finish(&self, bytes: &[u8]) -> Result {
        self.to.as_ref().map_or(Ok(()), |to| to.write(bytes))
    }
}
